"""What the finetuning recipes share: the arms, a cell of the experiment, its rows, and the table of all.

`ce`: standard finetuning of SimCLR's model; `nce`: non-negative tuning, the same with a ReLU before the classifier.
Controls regularise without making features monosemantic: `ce+weight_decay`, `ce+dropout` (of the features), and
`ce+early_stopping` (a share of the training images is held out, and the epoch that is best on it is taken).
`lora` and `monolora` adapt the frozen backbone with PEFT's `LoraConfig` or `MonoLoraConfig`, cross entropy as in `ce`.
For a seed all arms see the same images, labels, initial classifier and, but for held-out images, the same batches.

Another arm is a row of `ARMS`:

    ARMS["dora"] = Arm(adapter=lambda settings: LoraConfig(use_dora=True, **settings.lora_options()), baseline="lora")
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import vision
from accelerate import Accelerator
from experiments import Experiment
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from vision import PretrainingSettings

from mono_peft import MonoLoraConfig, activation_sparsity
from vision_bench import figures
from vision_bench.corruptions import flip_labels
from vision_bench.data import ImageSet, stratified_fraction
from vision_bench.features import normalise
from vision_bench.finetune import CROPS_AND_FLIPS, LAYERS, Classifier, FinetuneConfig, embed, finetune
from vision_bench.metrics import MEASURED, semantic_consistency
from vision_bench.models import ContrastiveModel
from vision_bench.report import measured_header, with_widths
from vision_bench.runs import DIVERGED, Cell, Run, defaults, device_name, option, parse
from vision_bench.runs.statistics import Interval, interval, markdown_table, paired_difference

ACCURACIES = ("train_top1", "validation_top1")
FINAL = {name: f"finetuned_{name}" for name in ACCURACIES}  # the accuracies of the weights that an arm ends with
ADAPTER_IMAGES = 256  # test images on which the sparsity of an adapter's latents is measured

Condition = dict[str, float]  # `fraction` of the training images, and `noise_rate` of their labels
Curves = dict[str, dict[str, figures.Curve]]  # by panel and arm


class Arm(NamedTuple):
    """How an arm differs from standard finetuning.

    Where `has_latents`, sparsity is measured on the sigma(A x) of its adapters; `baseline` is the arm beside `ce` over
    which its gain is shown.
    """

    changes: Callable[[FinetuningSettings], dict[str, Any]] = lambda settings: {}  # fields of `FinetuneConfig`
    adapter: Callable[[FinetuningSettings], PeftConfig] | None = None  # of the frozen backbone
    has_latents: bool = False
    baseline: str | None = None


ARMS = {
    "ce": Arm(),
    "nce": Arm(lambda settings: {"loss": "nce"}),
    "ce+weight_decay": Arm(lambda settings: {"weight_decay": settings.control_weight_decay}),
    "ce+dropout": Arm(lambda settings: {"dropout": settings.control_dropout}),
    "ce+early_stopping": Arm(lambda settings: {"held_out": settings.held_out}),
    "lora": Arm(adapter=lambda settings: LoraConfig(**settings.lora_options())),
    "monolora": Arm(
        adapter=lambda settings: MonoLoraConfig(**settings.lora_options()), has_latents=True, baseline="lora"
    ),
}


@dataclass
class ThreeSeeds(PretrainingSettings):
    """The images and the pretraining, with fewer seeds, since each has many finetunings."""

    seeds: list[int] = option([0, 1, 2], help="Of pretraining, draws, noise and finetuning.")


@dataclass
class FinetuningSettings:
    """How SimCLR's model is finetuned."""

    shared_pretraining: bool = option(False, help=vision.SHARED_PRETRAINING)
    methods: list[str] = option(list(ARMS)[:5], help=f"Arms, of {', '.join(ARMS)}.")
    layer: str = option("projector", help=f"What is classified: {', '.join(LAYERS)}.")
    finetuning_epochs: int = option(10, help="100 in the paper.")
    finetuning_batch_size: int = option(32, help="256 in the official code.")
    finetuning_optimizer: str = option("momentum", help="A name of timm's; this one is SGD.")
    finetuning_learning_rate: float = option(0.05, help="1.5 in the official code.")
    finetuning_views: str | None = option(
        None, help="JSON of settings of SimCLRViews; by default crops and flips alone."
    )
    test_fraction: float = option(1.0, help="Of the test images, drawn from each class.")
    curve_epochs: int = option(2, help="Accuracies so often, also those of early stopping.")
    control_weight_decay: float = option(0.01, help="Of ce+weight_decay; all others have none.")
    control_dropout: float = option(0.5, help="Of ce+dropout.")
    held_out: float = option(0.2, help="Share of the training images of ce+early_stopping.")
    adapter_r: int = option(8, help="Rank of lora and monolora.")
    adapter_alpha: float = option(16, help="Their scale is alpha / r.")
    adapter_targets: list[str] = option(["qkv"], help="Modules of the backbone that they adapt.")
    keep_models: bool = option(False, help="Keep every finetuned model: many files.", changes_results=False)

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in ARMS]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods is {self.methods}; it takes different names of {', '.join(ARMS)}.")
        if self.methods[0] != "ce":
            raise ValueError(f"methods is {self.methods}; the first must be ce, with which the others are compared.")
        self.finetuning_views = vision.from_json("finetuning_views", self.finetuning_views)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must be in (0, 1).")
        if self.adapter_r < 1 or not self.adapter_alpha > 0:
            raise ValueError(f"adapter_r is {self.adapter_r}, adapter_alpha {self.adapter_alpha}; both are above 0.")
        for method in self.methods:
            self.finetune_config(method, 0)

    def finetune_config(self, method: str, seed: int, data: str = "") -> FinetuneConfig:
        """The finetuning of an arm on the data set `data`, which decides the views unless they are set."""
        views = vision.from_json("finetuning_views", self.finetuning_views)
        config = FinetuneConfig(
            layer=self.layer,
            epochs=self.finetuning_epochs,
            batch_size=self.finetuning_batch_size,
            optimizer=self.finetuning_optimizer,
            learning_rate=self.finetuning_learning_rate,
            monitor_epochs=self.curve_epochs,
            views=CROPS_AND_FLIPS | vision.VIEWS.get(data, {}) if views is None else views,
            seed=seed,
        )
        return replace(config, **ARMS[method].changes(self))

    def lora_options(self) -> dict[str, Any]:
        """The arguments of PEFT's `LoraConfig`."""
        targets = sorted(self.adapter_targets)
        return {"r": self.adapter_r, "lora_alpha": self.adapter_alpha, "target_modules": targets}


def check(
    pretraining: PretrainingSettings, settings: FinetuningSettings, conditions: Sequence[Condition], train: ImageSet
) -> None:
    """Raise ValueError for settings that would fail only after pretraining."""
    if not 1 <= pretraining.batch_size <= len(train):
        raise ValueError(f"batch_size is {pretraining.batch_size} for {len(train)} images; it must not exceed them.")
    held_out = max(settings.finetune_config(method, 0).held_out for method in settings.methods)
    for fraction in dict.fromkeys(condition["fraction"] for condition in conditions):
        left = len(drawn(train, fraction, seed=0))
        left -= round(held_out * left)
        if left < settings.finetuning_batch_size:
            raise ValueError(
                f"finetuning_batch_size is {settings.finetuning_batch_size}, and a fraction of {fraction:g} leaves "
                f"{left} of {len(train)} images to train on; it must not exceed them."
            )
    model = ContrastiveModel(pretraining.model_config("simclr"))
    for method in settings.methods:
        if ARMS[method].adapter:
            adapted(model, method, settings, 0)
    if settings.layer == "backbone" and "nce" in settings.methods:
        some = train.subset(torch.arange(min(8, len(train))))
        if embed(Classifier(model, settings.finetune_config("ce", 0), train.num_classes), some).min() >= 0:
            raise ValueError(
                f"layer is 'backbone', and the features of {pretraining.backbone} are never negative: nce would be "
                "ce. Take the projector, or another backbone."
            )


def adapted(
    model: ContrastiveModel, method: str, settings: FinetuningSettings, seed: int
) -> tuple[ContrastiveModel, dict[str, Any]]:
    """A frozen copy of a model whose backbone has trainable adapters, and what they are.

    Raises:
        ValueError: the backbone has no linear layer of the names in `adapter_targets`.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    linear = {name.rsplit(".", 1)[-1] for name, part in model.backbone.named_modules() if isinstance(part, nn.Linear)}
    if missing := set(settings.adapter_targets) - linear:
        raise ValueError(
            f"adapter_targets has {', '.join(sorted(missing))}; {model.config.backbone} has these linear layers: "
            f"{', '.join(sorted(linear)) or 'none, so take a vision transformer'}."
        )
    adapter = ARMS[method].adapter
    assert adapter is not None
    torch.manual_seed(seed)  # of the encoders A; B starts at zero
    model.backbone = get_peft_model(model.backbone, adapter(settings))
    return model, {"method": method, **settings.lora_options()}


def drawn(images: ImageSet, fraction: float, seed: int, noise_rate: float = 0.0) -> ImageSet:
    """A share of each class, and then wrong labels at a share of its images."""
    indices = torch.arange(len(images))
    if fraction != 1:
        indices = stratified_fraction(images.labels, fraction, torch.Generator().manual_seed(seed))
    part = images.subset(indices)
    if not noise_rate:
        return part
    labels = flip_labels(part.labels, noise_rate, images.num_classes, torch.Generator().manual_seed(seed))
    return replace(part, labels=labels)


def measure(
    run: Run,
    cells: Iterable[Cell],
    pretraining: PretrainingSettings,
    settings: FinetuningSettings,
    splits: Mapping[str, ImageSet],
    accelerator: Accelerator,
) -> None:
    """Finetune and add the rows of every arm of which the run lacks the cell.

    An arm whose finetuning diverges is marked so, and those of a seed whose pretraining does; the others go on.
    """
    lacking = run.lacking(cells)
    for model_seed, seeds in vision.models_of(run.config).items():
        arms = [cell for cell in lacking if cell.seed in seeds]
        if not arms:
            continue
        begun = time.monotonic()
        try:
            model = vision.pretrained(pretraining, "simclr", model_seed, splits, accelerator).model
        except FloatingPointError as error:
            measured: dict[str, Any] = {"seconds": time.monotonic() - begun, "device": device_name(accelerator.device)}
            for cell in arms:
                reason = f"pretraining: {error}"
                run.add_diverged(reason, n=len(splits["train"]), seed=cell.seed, **measured, **cell.arm)
            continue
        for cell in arms:
            finetune_cell(run, cell, model, pretraining, settings, splits, accelerator)


def finetune_cell(
    run: Run,
    cell: Cell,
    model: ContrastiveModel,
    pretraining: PretrainingSettings,
    settings: FinetuningSettings,
    splits: Mapping[str, ImageSet],
    accelerator: Accelerator,
) -> None:
    """Finetune one arm and add all of its rows at once."""
    begun = time.monotonic()
    assert cell.seed is not None
    method, seed, condition = cell.arm["method"], cell.seed, {k: v for k, v in cell.arm.items() if k != "method"}
    train, test = drawn(splits["train"], seed=seed, **condition), splits["test"]
    name = "-".join([method, *(f"{value:g}" for value in condition.values()), str(seed)])
    folder = Path(pretraining.output_dir) / "finetuned" / name
    initial, adapter = adapted(model, method, settings, seed) if ARMS[method].adapter else (model, None)
    config = settings.finetune_config(method, seed, pretraining.data)
    try:
        tuned = finetune(
            folder,
            initial,
            config,
            train,
            test,
            accelerator,
            adapter=adapter,
            checkpoint_minutes=pretraining.checkpoint_minutes,
            compile_model=pretraining.compile,
            workers=pretraining.workers,
            name=name,
            progress=True,
        )
    except FloatingPointError as error:
        measured: dict[str, Any] = {"seconds": time.monotonic() - begun, "device": device_name(accelerator.device)}
        run.add_diverged(str(error), n=len(train), seed=seed, **measured, **cell.arm)
        tuned = None
    if tuned is not None and accelerator.is_main_process:
        consistency = semantic_consistency(embed(tuned.model.to(accelerator.device), test), test.labels).summary
        arm: dict[str, Any] = {"seed": seed, "device": device_name(accelerator.device), **cell.arm}
        arm["seconds"] = time.monotonic() - begun
        kept = len(train) - round(config.held_out * len(train))
        counts = {"train_top1": kept, "online_train_top1": kept, "validation_top1": len(test)}
        rows = [
            run.row(metric, entry[metric], n=counts[metric], epoch=entry["epoch"], **arm)
            for entry, metric in product(tuned.log, counts)
            if metric in entry
        ]
        rows += [run.row(metric, value, n=len(test), **arm) for metric, value in consistency.items()]
        if ARMS[method].has_latents:
            pixels = normalise(test.images[:ADAPTER_IMAGES], test.mean, test.std)
            zeros = activation_sparsity(tuned.model.backbone, [{"x": pixels}]).overall
            rows.append(run.row("adapter_sparsity", zeros, n=len(pixels), **arm))
        last = tuned.log[tuned.epoch - 1]
        # The last of these is the row of the cell.
        rows += [run.row(FINAL[m], last[m], n=counts[m], epoch=tuned.epoch, **arm) for m in ACCURACIES]
        run.add_rows(rows)
    if accelerator.is_main_process and not settings.keep_models:
        shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def mean(rows: Sequence[Mapping[str, Any]]) -> Interval:
    """The interval of the values of rows, or of none where all seeds of an arm diverged."""
    return interval([row["value"] for row in rows] or [None])


def accuracy(run: Run, metric: str, **arm: Any) -> Interval:
    """Percent, over the seeds that did not diverge."""
    return mean(run.find(metric, **arm)).scaled(100)


def gain(run: Run, metric: str, method: str, condition: Condition, over: str = "ce") -> Interval:
    """Points of accuracy over another arm, paired by the seeds of which neither diverged."""
    first, second = (run.find(FINAL[metric], method=name, **condition) for name in (method, over))
    return (paired_difference(first, second) or mean([])).scaled(100)


def diverged(run: Run, conditions: Sequence[Condition], method: str) -> str:
    """How many of an arm's trainings in some conditions diverged, in words; an empty text for none."""
    count = sum(len(run.find(DIVERGED, method=method, **condition)) for condition in conditions)
    total = len(run.config["seeds"]) * len(conditions)
    return "" if count == 0 else "diverged" if count == total else f"{count} of {total} diverged"


@dataclass(frozen=True)
class Study:
    """Every arm finetuned in several conditions, which differ in one share.

    Args:
        recipe: its name.
        settings: the class of the settings that this recipe alone has.
        conditions: all of them, from the recorded configuration.
        axis: the name, in a condition, of the share in which they differ.
        hardest: `min` or `max`: which share has its accuracies per epoch drawn.
        title: of the table.
        picture, label, logarithmic: the drawing over the share, its horizontal axis, and whether that has logarithms.
        published: the paper's largest gains of NCE on ImageNet-100 in points, by share; under None one whose share is
            not printed.
    """

    recipe: str
    settings: type[Any]
    conditions: Callable[[Mapping[str, Any]], list[Condition]]
    axis: str
    hardest: Callable[..., Condition]
    title: str
    picture: str
    label: str
    published: Mapping[float | None, float]
    logarithmic: bool = False

    def cells(self, config: Mapping[str, Any]) -> Iterator[Cell]:
        """The last row of every arm of a whole run; the other rows of an arm are written together with it."""
        for seed, condition, method in product(config["seeds"], self.conditions(config), config["methods"]):
            yield Cell(FINAL["validation_top1"], seed, {"method": method, **condition})

    def experiment(self, **shown: Any) -> Experiment:
        """The study for the page of results; `shown` are the items, title, claim and pictures."""
        recorded = defaults(ThreeSeeds, FinetuningSettings, self.settings) | {vision.IMAGES: None}
        return Experiment(
            recipe=self.recipe, cells=self.cells, report=self.report, draw=self.draw, defaults=recorded, **shown
        )

    def main(self, arguments: list[str] | None = None) -> None:
        """Finetune what the output folder has no rows of, then write and print the table and draw the figures."""
        classes = (ThreeSeeds, FinetuningSettings, self.settings)
        pretraining, settings, own = composed = parse(classes, arguments, shared=[vision.ProbingSettings])
        splits = vision.load_splits(pretraining)
        splits["test"] = drawn(splits["test"], settings.test_fraction, seed=0)
        check(pretraining, settings, self.conditions(vars(own)), splits["train"])
        accelerator, run = vision.begin(self.recipe, composed, splits)
        measure(run, self.cells(run.config), pretraining, settings, splits, accelerator)
        vision.finish(accelerator, run, self.report, self.draw)

    def report(self, run: Run) -> str:
        """Every arm in every condition with what its features are, and the gains beside the paper's, as Markdown."""
        config, methods = run.config, run.config["methods"]
        conditions = {f"{100 * condition[self.axis]:g} %": condition for condition in self.conditions(config)}
        lines = []
        for (name, condition), method in product(conditions.items(), methods):
            note = diverged(run, [condition], method)
            accuracies = [accuracy(run, FINAL[metric], method=method, **condition) for metric in ACCURACIES]
            line = [f"{value.text(1)} ({note})" if note and value.n else note or value.text(1) for value in accuracies]
            for metric in ACCURACIES:
                line.append("-" if method == "ce" else gain(run, metric, method, condition).text(1, sign=True))
            for metric in MEASURED:
                line.append(mean(run.find(metric, method=method, **condition)).text(0 if "live" in metric else 3))
            lines.append([name, method, *line])
        header = ["condition", "arm", "train", "validation", "train - ce", "validation - ce"]
        arms = markdown_table([*header, *measured_header()], lines)
        pairs = [("nce", over) for over in methods if over != "nce" and "nce" in methods]
        pairs += [(method, over) for method in methods if (over := ARMS.get(method, Arm()).baseline) in methods]
        lines = []
        for method, over in pairs:
            values = [gain(run, "validation_top1", method, condition, over) for condition in conditions.values()]
            lines.append([f"{method} - {over}", *(value.text(1, sign=True) for value in values)])
        printed = {None: "-"} | {share: f"{points:+g} at most" for share, points in self.published.items() if share}
        somewhere = f": {self.published[None]:+g} at most" if None in self.published else ""
        paper = [printed.get(condition[self.axis], "-") for condition in conditions.values()]
        lines.append([f"nce - ce, the paper, ImageNet-100{somewhere}", *paper])
        gains = markdown_table(["points of test accuracy, paired by seed", *conditions], lines)
        shared = config["shared_pretraining"]
        varied = "draws, noise and finetuning, the model is the same" if shared else "pretraining and all else"
        controls = "weight decay {control_weight_decay:g}, dropout {control_dropout:g}, ".format(**config)
        adapters = "".join(
            f"Zeros among {method}'s latents, all conditions: {mean(rows).text(3)}.\n"
            for method in methods
            if (rows := run.find("adapter_sparsity", method=method))
        )
        scale = "{data}, {backbone}, {finetuning_epochs} epochs".format(**config)
        return f"""# Finetuning on {self.title}: {scale}

Top-1 accuracy in % after finetuning: on the training images with the labels that were trained on, and on
the test images.

{arms}
## Gains

{gains}
Mean ± half-width of the 95 % interval over {len(config["seeds"])} seeds ({varied}); trainings that diverged
(NaN or infinite weights or scores) are counted in the table and enter no mean. The paper's numbers are of
another scale (ResNet-18, ImageNet-100, 100 epochs). Accuracies are of eval mode, on images as they are.
Consistency, sparsity and live dimensions are of the classified features of the test images; chance is the
consistency with shuffled labels. Controls: {controls}{100 * config["held_out"]:g} % held out.
{adapters}"""

    def draw(self, run: Run) -> None:
        """Accuracies and gains over the conditions, and `epochs`, accuracies per epoch in the hardest condition."""
        conditions, methods = self.conditions(run.config), run.config["methods"]
        panels: Curves = {"training accuracy, %": {}, "test accuracy, %": {}, "test, points over ce": {}}
        per_epoch: Curves = {name: {} for name in list(panels)[:2]}
        hardest = self.hardest(conditions, key=lambda condition: condition[self.axis])
        epochs = sorted({row["config"]["epoch"] for row in run.find("validation_top1", **hardest)})
        for method in methods:
            for name, metric in zip(per_epoch, ACCURACIES, strict=True):
                final = [accuracy(run, FINAL[metric], method=method, **condition) for condition in conditions]
                panels[name][method] = with_widths(final)
                values = [accuracy(run, metric, method=method, epoch=epoch, **hardest) for epoch in epochs]
                per_epoch[name][method] = with_widths(values)
            if method != "ce":
                gains = [gain(run, "validation_top1", method, condition) for condition in conditions]
                panels["test, points over ce"][method] = with_widths(gains)
        shares = [condition[self.axis] for condition in conditions]
        published = {s and 100 * s: points for s, points in self.published.items() if s in (None, *shares)}
        notes = {method: diverged(run, conditions, method) for method in methods}
        curves = ([100 * share for share in shares], panels, self.label)
        options: dict[str, Any] = {"logarithmic": self.logarithmic, "published": published, "notes": notes}
        figures.save(run.folder / self.picture, figures.band_curves(*curves, **options))
        notes = {method: diverged(run, [hardest], method) for method in methods}
        figures.save(run.folder / "epochs", figures.band_curves(epochs, per_epoch, "epoch", notes=notes))
