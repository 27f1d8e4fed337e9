"""The experiments of recipes that do not export an `EXPERIMENT` of their own yet, from the table that stood here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from experiments import CannotShow, Experiment
from frozen_features import FEATURES
from probes import ACCURACY, ARMS, gain
from training_accuracies import CHANCE
from vision import IMAGES

from vision_bench import figures
from vision_bench.corruptions import shift_names
from vision_bench.metrics import MEASURED
from vision_bench.probe import TRAINING
from vision_bench.runs import Cell, Run
from vision_bench.shifts import SEVERITIES

CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "imagenet100": 100}
FINETUNED = "finetuned_validation_top1"

Need = tuple[str, dict[str, Any], Sequence[int]]


def of_table(
    recipe: str,
    items: tuple[str, ...],
    title: str,
    claim: str,
    metric: str,
    needs: Callable[[dict[str, Any]], Iterable[Need]],
    pictures: Mapping[str, str],
    render: Callable[[Run, Path], str],
    own: frozenset[str] = frozenset(),
) -> Experiment:
    """An experiment from its row of the table below."""

    def cells(config: dict[str, Any]) -> Iterable[Cell]:
        return [Cell(metric, seed, arm) for metric, arm, seeds in needs(config) for seed in seeds]

    def draw(run: Run) -> None:
        """The report draws."""

    return Experiment(
        recipe=recipe,
        items=items,
        title=title,
        claim=claim,
        pictures=pictures,
        cells=cells,
        report=lambda run: render(run, Path()),
        draw=None if recipe == "top_activated_samples" else draw,
        overridden=own,
    )


def crossed(metric: str, config: dict[str, Any], **axes: Sequence[Any]) -> list[Need]:
    """Every combination of values, for all seeds of the run."""
    return [(metric, dict(zip(axes, values, strict=True)), config["seeds"]) for values in product(*axes.values())]


def probed(config: dict[str, Any], features: Sequence[str] = ARMS, **axes: Sequence[Any]) -> list[Need]:
    """Accuracies of probes, also on their training labels and by chance, and what the features are."""
    trained = {name: values for name, values in axes.items() if name in ("loss", "noise_rate")}
    what = [need for metric in MEASURED for need in crossed(metric, config, features=features)]
    what += [need for metric in TRAINING for need in crossed(metric, config, features=features, **trained)]
    return crossed(ACCURACY, config, features=features, **axes) + what + crossed(CHANCE, config)


def input_noise_needs(config: dict[str, Any]) -> list[Need]:
    """Of all noises and scales; without noise there is one set of rows."""
    noisy = probed(config, noise=config["noises"], scale=[scale for scale in config["scales"] if scale])
    return noisy + crossed(ACCURACY, config, features=ARMS, noise=["none"])


def shifted_needs(config: dict[str, Any]) -> list[Need]:
    """Of all shifts, of CIFAR-C those of all its corruptions at all severities."""
    corruptions = config.get("corruptions", {})
    found = probed(config, shift=["none", *(shift for shift in config["shifts"] if shift not in corruptions)])
    for shift, names in corruptions.items():
        axes = {"shift": [shift], "corruption": names, "severity": range(1, SEVERITIES + 1)}
        found += crossed(ACCURACY, config, features=ARMS, **axes)
    return found


def superposition_needs(config: dict[str, Any]) -> list[Need]:
    """Of the window for all seeds, of its neighbours for the first few."""
    window = {name: [config[name]] for name in ("sparsity", "samples")}
    axes = {"sparsity": config["sparsities"], "samples": config["sample_sizes"]}
    few = config | {"seeds": config["seeds"][: config["neighbour_seeds"]]}
    noises = [("clean", 0.0), ("label", config["noise_rate"]), *(("input", level) for level in config["input_noises"])]
    found = crossed("superposition", config, size=config["sizes"], features=("mono", "poly"))
    for noise, level in noises:
        arm = {"noise": [noise], "level": [level], "features": ("mono", "poly")}
        first = {"size": config["sizes"][:1], "flips": config["flips"][:1]}
        found += crossed("accuracy", config, **first, **window, **arm)
        found += crossed("accuracy", few, size=config["sizes"], flips=config["flips"], **axes, **arm)
    return found


def separability_needs(config: dict[str, Any]) -> list[Need]:
    """Of the simulation, which comes after the closed forms, and of the claims."""
    values = crossed("value", config, source=["simulation"], sparsity=config["sparsities"])
    return values + crossed("claim", config, ties=["zero", "one", "coin", "drop"], kind=[None, "fisher", "difference"])


def settings_of(run: Run, settings: type[Any]) -> Any:
    """The dataclass of a recipe's settings as the run's configuration has them.

    Raises:
        CannotShow: it has settings that this version of the recipe does not have.
    """
    config = {name: value for name, value in run.config.items() if name != IMAGES}
    known = {f.name for f in fields(settings)}
    unknown = sorted(config.keys() - known)
    if unknown:
        raise CannotShow(
            f"rows of {run.recipe} have the settings {', '.join(unknown)}, which recipes/{run.recipe}.py lacks; use "
            "the version that made them, or run it again."
        )
    return settings(**{"output_dir": str(run.folder)} | config)


def drawn_by_recipe(
    settings: str, arguments: Callable[[Any], tuple[Any, ...]] = lambda script: ()
) -> Callable[[Run, Path], str]:
    """Rendering by the recipe's own `draw` and `report`, which take the run, its settings and `arguments` of them."""

    def render(run: Run, source: Path) -> str:
        recipe = importlib.import_module(run.recipe)
        script = settings_of(run, getattr(recipe, settings))
        recipe.draw(run, script, *arguments(script))
        return str(recipe.report(run, script, *arguments(script)))

    return render


def classes(script: Any) -> tuple[int]:
    """The number of classes of the data, which is in no row.

    Raises:
        CannotShow: it is not known by the data's name.
    """
    if script.data not in CLASSES:
        raise CannotShow(
            f"data is {script.data!r}, and how many classes it has stands in no row: {', '.join(CLASSES)} are known. "
            "The recipe's own results.md in the folder of the run has the table."
        )
    return (CLASSES[script.data],)


def label_noise(run: Run, source: Path) -> str:
    """Table 1 and Fig. 1(b) by the recipe, and the gains beside the paper's."""
    text = drawn_by_recipe("LabelNoiseArguments", classes)(run, source)
    recipe = importlib.import_module(run.recipe)
    script = settings_of(run, recipe.LabelNoiseArguments)
    rates = sorted(script.noise_rates)
    ours = {}
    for name in FEATURES[1:]:
        gains = [gain(run, name, noise_rate=rate) for rate in rates]
        ours[name] = [one.mean for one in gains], [one.half_width or 0.0 for one in gains]
    published = {
        data: {
            name: {
                100 * rate: a - b for rate, a, b in zip(recipe.PAPER_RATES, table[name], table["poly"], strict=True)
            }
            for name in ours
        }
        for data, table in recipe.PAPER.items()
    }
    figure = figures.gains_beside_paper([100 * rate for rate in rates], ours, published, "wrong labels, %")
    figures.save(run.folder / "gains_beside_paper", figure)
    return text


def shifted(run: Run, source: Path) -> str:
    """Fig. 2(c), with the names of the shifts and the corruptions from the settings in place of their images.

    Raises:
        CannotShow: rows are of corruptions that the settings do not name, so that some may be missing.
    """
    recipe = importlib.import_module(run.recipe)
    config = dict(run.config)
    corruptions = config.pop("corruptions", {})
    places = [name if name in shift_names() else f"{name}=as in the rows" for name in config["shifts"]]
    named = Run(run.folder, run.recipe, config | {"shifts": places})
    named.rows = run.rows
    shifts = {}
    for name, fingerprint in config["shifts"].items():
        if name not in corruptions and any("corruption" in row["config"] for row in run.find(ACCURACY, shift=name)):
            raise CannotShow(
                f"the settings of this run do not say which corruptions of {name} there were, so whether all have "
                "rows is not known: they are of an older version of recipes/ood_probing.py; run it again."
            )
        files = {corruption: Path(corruption) for corruption in corruptions.get(name, ())}
        # the recipe asks such an object for the names of its files only
        shifts[name] = recipe.Corruptions(files, torch.zeros(0), None, fingerprint) if files else None
    recipe.draw(named, shifts)
    return str(recipe.report(named, settings_of(named, recipe.OodArguments), shifts))


def separability(run: Run, source: Path) -> str:
    """The theorems."""
    recipe = importlib.import_module(run.recipe)
    script = settings_of(run, recipe.SeparabilityArguments)
    recipe.draw(script, run.folder)
    return str(recipe.report(run, script))


def top_activated(run: Run, source: Path) -> str:
    """The tables from the rows; the pictures are those of the run, as their images are in no row."""
    recipe = importlib.import_module(run.recipe)
    return str(recipe.report(run, settings_of(run, recipe.TopActivatedArguments)))


def table_2(task: str) -> Callable[[Run, Path], str]:
    """A half of Table 2; `task` is the class of its recipe."""

    def render(run: Run, source: Path) -> str:
        report: ModuleType = importlib.import_module("table2_report")
        of = getattr(importlib.import_module(run.recipe), task)
        config = run.config
        trained = [method for method in config["methods"] if method != "base"]
        return str(
            report.write_report(
                run, of.paper, of.performance, trained, config["judges"], demonstration=config["demonstration"]
            )
        )

    return render


TABLE = (
    of_table(
        recipe="top_activated_samples",
        items=("figure_1a", "figure_4ab"),
        title="Figures 1(a), 4(a), 4(b): the images that activate a dimension most",
        claim="The paper: images of one class for a monosemantic dimension, of several for a polysemantic one; under "
        "90 % label noise the best class relies on a dimension that shows one class, the worst on one that does not "
        "(boathouse and jeans of ImageNet-100; pictures, no numbers).",
        metric=ACCURACY,
        needs=lambda config: probed(config, FEATURES),
        pictures={
            "figure_1a": "Figure 1(a): random dimensions",
            "figure_4ab": "Figure 4(a, b): the dimension with the largest weight of the worst and of the best class",
        },
        render=top_activated,
    ),
    of_table(
        recipe="label_noise_probing",
        items=("table_1", "figure_1b"),
        title="Table 1 and Figure 1(b): linear probes under label noise",
        claim="The paper: the gain over polysemantic features grows with the noise; at 90 % on CIFAR-100 +3.4 points "
        "for SAE and +9.2 for NCL, on ImageNet-100 +11.5 and +13.7.",
        metric=ACCURACY,
        needs=lambda config: probed(config, noise_rate=config["noise_rates"]),
        pictures={
            "figure_1b": "Figure 1(b), label noise: ours",
            "gains_beside_paper": "Table 1 as gains: ours (line, 95 % band) and the paper's (markers)",
            "all_rates": "Table 1, ours: all features and controls",
        },
        render=label_noise,
    ),
    of_table(
        recipe="input_noise_probing",
        items=("figure_2ab", "figure_1b"),
        title="Figures 2(a), 2(b) and 1(b): input noise",
        claim="The paper: SAE and NCL are ahead under uniform and Gaussian noise, the more the noise (ImageNet-100; "
        "curves without numbers).",
        metric=ACCURACY,
        needs=input_noise_needs,
        pictures={
            "figure_2_uniform": "Figure 2(a): uniform noise, ours",
            "figure_2_gaussian": "Figure 2(b): Gaussian noise, ours",
            "figure_2_uniform_centred": "Uniform noise around zero, ours",
            "figure_1b": "Figure 1(b), input noise: ours",
        },
        render=drawn_by_recipe("InputNoiseArguments"),
    ),
    of_table(
        recipe="ood_probing",
        items=("figure_2c",),
        title="Figure 2(c): distribution shifts",
        claim="The paper: SAE and NCL are ahead on ImageNet-Sketch and ImageNet-Stylized (ImageNet-100; bars without "
        "numbers).",
        metric=ACCURACY,
        needs=shifted_needs,
        pictures={
            "figure_2c": "Figure 2(c): ours",
            "severities_*": "Accuracy by severity of the corruptions of {}: ours",
        },
        render=shifted,
    ),
    of_table(
        recipe="few_shot_finetuning",
        items=("figure_3ab",),
        title="Figures 3(a), 3(b): finetuning on few labels",
        claim="The paper: non-negative tuning (NCE) has the lower training and the higher validation accuracy, the "
        "more the fewer the labels, up to +3.9 points at 10 % of ImageNet-100.",
        metric=FINETUNED,
        needs=lambda config: crossed(FINETUNED, config, method=config["methods"], fraction=config["fractions"]),
        pictures={"figure_3ab": "Figure 3(a, b): ours", "epochs": "Accuracy per epoch at the smallest fraction, ours"},
        render=drawn_by_recipe("FewShotArguments"),
    ),
    of_table(
        recipe="noisy_finetuning",
        items=("figure_3c",),
        title="Figure 3(c): finetuning on wrong labels",
        claim="The paper: the gain of non-negative tuning (NCE) grows with the label noise, up to +11.9 points on "
        "ImageNet-100.",
        metric=FINETUNED,
        needs=lambda config: crossed(FINETUNED, config, method=config["methods"], noise_rate=config["noise_rates"]),
        pictures={"figure_3c": "Figure 3(c): ours", "epochs": "Accuracy per epoch at the highest rate, ours"},
        render=drawn_by_recipe("NoisyArguments"),
    ),
    of_table(
        recipe="sst2_monolora",
        items=("table_2", "table_2_sst2"),
        title="Table 2, SST-2: MonoLoRA",
        claim="The paper (Llama-2-7b-chat, one run): accuracy 92.78 % with LoRA and 94.84 % with MonoLoRA; "
        "ShieldGemma's average score, lower is safer, 7.90 and 3.53, of the base 4.83.",
        metric="accuracy",
        needs=lambda config: crossed("accuracy", config, method=config["methods"]),
        pictures={"safety": "Safety against task performance: ours, and the paper's"},
        render=table_2("Sst2"),
    ),
    of_table(
        recipe="dolly_monolora",
        items=("table_2", "table_2_dolly"),
        title="Table 2, Dolly: MonoLoRA",
        claim="The paper (Llama-2-7b-chat, one run): task performance 14.08 with LoRA and 14.48 with MonoLoRA; "
        "ShieldGemma's average score 6.12 and 6.04, of the base 4.83.",
        metric="answer_nll",
        needs=lambda config: crossed("answer_nll", config, method=config["methods"]),
        pictures={"safety": "Safety against task performance: ours, and the paper's"},
        render=table_2("Dolly"),
    ),
    of_table(
        recipe="salient_features",
        items=("figure_4c",),
        title="Figure 4(c): semantic consistency of salient dimensions",
        claim="The paper: under 90 % label noise the most active dimension of samples that are classified rightly is "
        "much more consistent than that of others (ImageNet-100; a histogram without numbers).",
        metric=ACCURACY,
        needs=lambda config: probed(config, FEATURES),
        pictures={"figure_4c": "Figure 4(c): ours"},
        render=drawn_by_recipe("SalientArguments"),
    ),
    of_table(
        recipe="superposition",
        items=("figure_5",),
        title="Figure 5: the toy model of superposition",
        claim="The paper: with superposition (poly) the toy model classifies better without noise, without it (mono) "
        "better under 90 % label noise and under input noise (bars without numbers).",
        metric="superposition",
        needs=superposition_needs,
        pictures={
            "gram": "Figure 5(a): ours",
            "accuracy": "Figure 5(b): ours",
            "phase": "Where the ordering holds",
        },
        render=drawn_by_recipe("SuperpositionArguments"),
        own=frozenset({"sparsity", "samples", "flips"}),
    ),
    of_table(
        recipe="separability",
        items=("theorems",),
        title="Theorems 4.1, 4.2 and B.1 to B.9: separability",
        claim="The paper: poly separates better without noise, mono from a label noise of 25 % on.",
        metric="claim",
        needs=separability_needs,
        pictures={"criterion": "The criterion against label and input noise"},
        render=separability,
        own=frozenset({"ties", "kind"}),
    ),
    of_table(
        recipe="robust_loss",
        items=("figure_6",),
        title="Figure 6: a robust loss under label noise",
        claim="The paper: symmetric cross entropy helps polysemantic and monosemantic features, and monosemantic "
        "features help with either loss (a picture without numbers).",
        metric=ACCURACY,
        needs=lambda config: probed(config, loss=("ce", "sce", "ce_scaled"), noise_rate=config["noise_rates"]),
        pictures={"figure_6": "Figure 6: ours", "all_rates": "All rates, ours"},
        render=drawn_by_recipe("RobustLossArguments", classes),
    ),
)

UNPORTED = {experiment.recipe: experiment for experiment in TABLE}
