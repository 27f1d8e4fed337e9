"""The experiments of recipes that do not export an `EXPERIMENT` of their own yet, from the table that stood here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments import CannotShow, Experiment
from vision import IMAGES

from vision_bench.runs import Cell, Run

CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "imagenet100": 100}

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
        draw=draw,
        overridden=own,
    )


def crossed(metric: str, config: dict[str, Any], **axes: Sequence[Any]) -> list[Need]:
    """Every combination of values, for all seeds of the run."""
    return [(metric, dict(zip(axes, values, strict=True)), config["seeds"]) for values in product(*axes.values())]


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


def separability(run: Run, source: Path) -> str:
    """The theorems."""
    recipe = importlib.import_module(run.recipe)
    script = settings_of(run, recipe.SeparabilityArguments)
    recipe.draw(script, run.folder)
    return str(recipe.report(run, script))


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
)

UNPORTED = {experiment.recipe: experiment for experiment in TABLE}
