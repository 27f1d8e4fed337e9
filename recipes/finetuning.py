"""What the finetuning recipes share: the arms, a cell of the experiment, its rows, and the table of all.

`ce`: standard finetuning of SimCLR's model; `nce`: non-negative tuning, the same with a ReLU before the classifier.
Controls regularise without making features monosemantic: `ce+weight_decay`, `ce+dropout` (of the features), and
`ce+early_stopping` (a share of the training images is held out, and the epoch that is best on it is taken).
`lora` and `monolora` adapt the frozen backbone with PEFT's `LoraConfig` or `MonoLoraConfig`, cross entropy as in `ce`.
For a seed all arms see the same images, labels, initial classifier and, but for held-out images, the same batches.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from program import parse
from torch import nn
from vision_ladder import (
    SPLITS,
    VIEWS,
    DownstreamArguments,
    ProbingArguments,
    load_splits,
    pretrained,
    results_config,
    start_accelerator,
)

from mono_peft import MonoLoraConfig, activation_sparsity
from vision_bench.corruptions import flip_labels
from vision_bench.data import ImageSet, stratified_fraction
from vision_bench.features import normalise
from vision_bench.finetune import CROPS_AND_FLIPS, LAYERS, Classifier, FinetuneConfig, embed, finetune
from vision_bench.metrics import MEASURED, semantic_consistency
from vision_bench.models import ContrastiveModel
from vision_bench.runs import DIVERGED, Interval, Run, device_name, interval, markdown_table, option, paired_difference

LOSSES = ("ce", "nce")
CONTROLS = ("ce+weight_decay", "ce+dropout", "ce+early_stopping")
ADAPTERS = {"lora": LoraConfig, "monolora": MonoLoraConfig}
METHODS = (*LOSSES, *CONTROLS, *ADAPTERS)
ACCURACIES = ("train_top1", "validation_top1")
FINAL = {name: f"finetuned_{name}" for name in ACCURACIES}  # of the weights that an arm ends with
ADAPTER_IMAGES = 256  # test images on which the sparsity of monolora's latents is measured


@dataclass
class FinetuningArguments(DownstreamArguments):
    """Pretraining of SimCLR's model, and how it is finetuned."""

    seeds: list[int] = field(
        default_factory=lambda: list(range(3)), metadata={"help": "Of pretraining, draws, noise and finetuning."}
    )
    methods: list[str] = field(
        default_factory=lambda: [*LOSSES, *CONTROLS], metadata={"help": f"Arms, of {', '.join(METHODS)}."}
    )
    layer: str = field(default="projector", metadata={"help": f"What is classified: {', '.join(LAYERS)}."})
    finetuning_epochs: int = field(default=10, metadata={"help": "100 in the paper."})
    finetuning_batch_size: int = field(default=32, metadata={"help": "256 in the official code."})
    finetuning_optimizer: str = field(default="momentum", metadata={"help": "A name of timm's; this one is SGD."})
    finetuning_learning_rate: float = field(default=0.05, metadata={"help": "1.5 in the official code."})
    finetuning_views: str | None = field(
        default=None, metadata={"help": "JSON of settings of SimCLRViews; by default crops and flips alone."}
    )
    test_fraction: float = field(default=1.0, metadata={"help": "Of the test images, drawn from each class."})
    curve_epochs: int = field(default=2, metadata={"help": "Accuracies so often, also those of early stopping."})
    control_weight_decay: float = field(default=0.01, metadata={"help": "Of ce+weight_decay; all others have none."})
    control_dropout: float = field(default=0.5, metadata={"help": "Of ce+dropout."})
    held_out: float = field(default=0.2, metadata={"help": "Share of the training images of ce+early_stopping."})
    adapter_r: int = field(default=8, metadata={"help": "Rank of lora and monolora."})
    adapter_alpha: float = field(default=16, metadata={"help": "Their scale is alpha / r."})
    adapter_targets: list[str] = field(
        default_factory=lambda: ["qkv"], metadata={"help": "Modules of the backbone that they adapt."}
    )
    keep_models: bool = option(False, help="Keep every finetuned model: many files.", changes_results=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods is {self.methods}; it takes different names of {', '.join(METHODS)}.")
        if self.methods[0] != "ce":
            raise ValueError(f"methods is {self.methods}; the first must be ce, with which the others are compared.")
        try:
            views = self.finetuning_views
            self.finetuning_views = json.loads(views) if isinstance(views, str) else views
        except json.JSONDecodeError as error:
            raise ValueError(f"finetuning_views is {views!r}, which is not JSON ({error}).") from None
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must be in (0, 1).")
        if self.adapter_r < 1 or not self.adapter_alpha > 0:
            raise ValueError(f"adapter_r is {self.adapter_r}, adapter_alpha {self.adapter_alpha}; both are above 0.")
        for method in self.methods:
            self.finetune_config(method, 0)

    def finetune_config(self, method: str, seed: int) -> FinetuneConfig:
        """Of an arm."""
        views = CROPS_AND_FLIPS | VIEWS.get(self.data, {})
        return FinetuneConfig(
            loss="nce" if method == "nce" else "ce",
            layer=self.layer,
            epochs=self.finetuning_epochs,
            batch_size=self.finetuning_batch_size,
            optimizer=self.finetuning_optimizer,
            learning_rate=self.finetuning_learning_rate,
            weight_decay=self.control_weight_decay if method == "ce+weight_decay" else 0.0,
            dropout=self.control_dropout if method == "ce+dropout" else 0.0,
            held_out=self.held_out if method == "ce+early_stopping" else 0.0,
            monitor_epochs=self.curve_epochs,
            views=views if self.finetuning_views is None else self.finetuning_views,
            seed=seed,
        )

    def conditions(self) -> list[dict[str, float]]:
        """The conditions in which every arm is finetuned, each with `fraction` and `noise_rate`."""
        raise NotImplementedError

    def check(self, train: ImageSet) -> None:
        """Raise ValueError for settings that would fail only after pretraining."""
        if not 1 <= self.batch_size <= len(train):
            raise ValueError(f"batch_size is {self.batch_size} for {len(train)} images; it must not exceed them.")
        for fraction in dict.fromkeys(condition["fraction"] for condition in self.conditions()):
            left = len(drawn(train, fraction, seed=0))
            if "ce+early_stopping" in self.methods:
                left -= round(self.held_out * left)
            if left < self.finetuning_batch_size:
                raise ValueError(
                    f"finetuning_batch_size is {self.finetuning_batch_size}, and a fraction of {fraction:g} leaves "
                    f"{left} of {len(train)} images to train on; it must not exceed them."
                )
        model = ContrastiveModel(self.model_config("simclr"))
        for method in ADAPTERS.keys() & set(self.methods):
            adapted(model, method, self, 0)
        if self.layer == "backbone" and "nce" in self.methods:
            some = train.subset(torch.arange(min(8, len(train))))
            if embed(Classifier(model, self.finetune_config("ce", 0), train.num_classes), some).min() >= 0:
                raise ValueError(
                    f"layer is 'backbone', and the features of {self.backbone} are never negative: nce would be ce. "
                    "Take the projector, or another backbone."
                )


def adapted(
    model: ContrastiveModel, method: str, script: FinetuningArguments, seed: int
) -> tuple[ContrastiveModel, dict[str, Any]]:
    """A frozen copy of a model whose backbone has trainable adapters, and what they are.

    Raises:
        ValueError: the backbone has no linear layer of the names in `adapter_targets`.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    linear = {name.rsplit(".", 1)[-1] for name, part in model.backbone.named_modules() if isinstance(part, nn.Linear)}
    if missing := set(script.adapter_targets) - linear:
        raise ValueError(
            f"adapter_targets has {', '.join(sorted(missing))}; {script.backbone} has these linear layers: "
            f"{', '.join(sorted(linear)) or 'none, so take a vision transformer'}."
        )
    settings = {
        "r": script.adapter_r,
        "lora_alpha": script.adapter_alpha,
        "target_modules": sorted(script.adapter_targets),
    }
    torch.manual_seed(seed)  # of the encoders A; B starts at zero
    model.backbone = get_peft_model(model.backbone, ADAPTERS[method](**settings))
    return model, {"method": method, **settings}


def drawn(train: ImageSet, fraction: float, seed: int, noise_rate: float = 0.0) -> ImageSet:
    """A share of each class, and then wrong labels at a share of its images."""
    indices = torch.arange(len(train))
    if fraction != 1:
        indices = stratified_fraction(train.labels, fraction, torch.Generator().manual_seed(seed))
    part = train.subset(indices)
    if not noise_rate:
        return part
    labels = flip_labels(part.labels, noise_rate, train.num_classes, torch.Generator().manual_seed(seed))
    return replace(part, labels=labels)


def measure(run: Run, script: FinetuningArguments, splits: Mapping[str, ImageSet], accelerator: Accelerator) -> None:
    """Finetune and add the rows of every cell (seed x condition x method) that the run lacks.

    A cell whose finetuning diverges is marked so, and those of a seed whose pretraining does; the others go on.
    """
    for model_seed, seeds in script.models_of().items():
        cells = [
            (seed, condition, method)
            for seed, condition, method in itertools.product(seeds, script.conditions(), script.methods)
            if not any(
                run.find(metric, seed=seed, method=method, **condition)
                for metric in (FINAL["validation_top1"], DIVERGED)
            )
        ]
        if not cells:
            continue
        start = time.monotonic()
        try:
            model = pretrained(script, "simclr", model_seed, splits["train"], splits["test"], accelerator).model
        except FloatingPointError as error:
            measured = {"seconds": time.monotonic() - start, "device": device_name(accelerator.device)}
            for seed, condition, method in cells:
                arm = {"method": method, **condition}
                run.add_diverged(f"pretraining: {error}", n=len(splits["train"]), seed=seed, **measured, **arm)
            continue
        for seed, condition, method in cells:
            finetune_cell(run, script, model, seed, condition, method, splits, accelerator)


def finetune_cell(
    run: Run,
    script: FinetuningArguments,
    model: ContrastiveModel,
    seed: int,
    condition: Mapping[str, float],
    method: str,
    splits: Mapping[str, ImageSet],
    accelerator: Accelerator,
) -> None:
    """Finetune one arm and add all of its rows at once."""
    start = time.monotonic()
    train, test = drawn(splits["train"], seed=seed, **condition), splits["test"]
    name = "-".join([method, *(f"{value:g}" for value in condition.values()), str(seed)])
    folder = Path(script.output_dir) / "finetuned" / name
    starting, adapter = adapted(model, method, script, seed) if method in ADAPTERS else (model, None)
    arm = {"method": method, **condition}
    try:
        found = finetune(
            folder,
            starting,
            script.finetune_config(method, seed),
            train,
            test,
            accelerator,
            adapter=adapter,
            checkpoint_minutes=script.checkpoint_minutes,
            compile_model=script.compile,
            workers=script.workers,
            name=name,
            progress=True,
        )
    except FloatingPointError as error:
        measured = {"seconds": time.monotonic() - start, "device": device_name(accelerator.device)}
        run.add_diverged(str(error), n=len(train), seed=seed, **measured, **arm)
        found = None
    if found is not None and accelerator.is_main_process:
        features = embed(found.model.to(accelerator.device), test)
        what = semantic_consistency(features, test.labels).summary
        measured = {"seed": seed, "seconds": time.monotonic() - start, "device": device_name(accelerator.device)}
        kept = len(train) - round(script.finetune_config(method, seed).held_out * len(train))
        counts = {"train_top1": kept, "online_train_top1": kept, "validation_top1": len(test)}
        rows = [
            run.row(metric, entry[metric], n=counts[metric], epoch=entry["epoch"], **measured, **arm)
            for entry, metric in itertools.product(found.log, counts)
            if metric in entry
        ]
        last = found.log[found.epoch - 1]
        rows += [run.row(metric, value, n=len(test), **measured, **arm) for metric, value in what.items()]
        if method == "monolora":
            pixels = normalise(test.images[:ADAPTER_IMAGES], test.mean, test.std)
            zeros = activation_sparsity(found.model.backbone, [{"x": pixels}]).overall
            rows.append(run.row("adapter_sparsity", zeros, n=len(pixels), **measured, **arm))
        # The last of these says that the cell is complete.
        rows += [run.row(FINAL[m], last[m], n=counts[m], epoch=found.epoch, **measured, **arm) for m in ACCURACIES]
        run.add_rows(rows)
    if accelerator.is_main_process and not script.keep_models:
        shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def percent(run: Run, metric: str, **arm: Any) -> list[dict[str, Any]]:
    """Rows in percent, one for every seed."""
    return [row | {"value": 100 * row["value"]} for row in run.find(metric, **arm)]


def defined(values: list[float]) -> Interval:
    """The interval of values, of none where all seeds of an arm diverged."""
    return interval(values or [None])


def diverged(run: Run, script: FinetuningArguments, **arm: Any) -> str:
    """How many of an arm's trainings diverged, in words; an empty text for none."""
    count = len(run.find(DIVERGED, **arm))
    total = len(script.seeds) * (1 if "fraction" in arm else len(script.conditions()))
    return "" if count == 0 else "diverged" if count == total else f"{count} of {total} diverged"


def mean(run: Run, metric: str, method: str, condition: Mapping[str, float]) -> Interval:
    """Accuracy in percent at the end of finetuning, over the seeds that did not diverge."""
    return defined([row["value"] for row in percent(run, FINAL[metric], method=method, **condition)])


def gain(run: Run, metric: str, method: str, condition: Mapping[str, float], over: str = "ce") -> Interval:
    """Points of accuracy over another arm, paired by the seeds of which neither diverged."""
    one, other = (percent(run, FINAL[metric], method=name, **condition) for name in (method, over))
    return paired_difference(one, other) or defined([])


def tables(
    run: Run,
    script: FinetuningArguments,
    name: Callable[[Mapping[str, float]], str],
    paper: Mapping[str, Sequence[str]],
) -> str:
    """Every arm in every condition with what its features are, and the paired gains of NCE, as Markdown.

    Args:
        name: what a condition is called.
        paper: by the name of a further row of the gains, the paper's gains in the conditions.
    """
    conditions = script.conditions()
    header = ["condition", "arm", "train", "validation", "train - ce", "validation - ce"]
    header += [metric.replace("_", " ") for metric in MEASURED]
    lines = []
    for condition, method in itertools.product(conditions, script.methods):
        note = diverged(run, script, method=method, **condition)
        accuracies = [mean(run, metric, method, condition) for metric in ACCURACIES]
        cells = [f"{one.text(1)} ({note})" if note and one.n else note or one.text(1) for one in accuracies]
        for metric in ACCURACIES:
            cells.append("-" if method == "ce" else gain(run, metric, method, condition).text(1, sign=True))
        for metric in MEASURED:
            values = [row["value"] for row in run.find(metric, method=method, **condition)]
            cells.append(defined(values).text(0 if "live" in metric else 3))
        lines.append([name(condition), method, *cells])
    text = (
        "Top-1 accuracy in % after finetuning: on the training images with the labels that were trained on, and on\n"
    )
    text += "the test images.\n\n" + markdown_table(header, lines)
    header = ["points of test accuracy, paired by seed", *(name(condition) for condition in conditions)]
    pairs = [("nce", over) for over in script.methods if over != "nce" and "nce" in script.methods]
    pairs += [("monolora", "lora")] if ADAPTERS.keys() <= set(script.methods) else []
    lines = []
    for method, over in pairs:
        gains = [gain(run, "validation_top1", method, condition, over).text(1, sign=True) for condition in conditions]
        lines.append([f"{method} - {over}", *gains])
    lines += [[title, *values] for title, values in paper.items()]
    of = (
        "draws, noise and finetuning, the model is the same"
        if script.shared_pretraining
        else "pretraining and all else"
    )
    controls = f"weight decay {script.control_weight_decay:g}, dropout {script.control_dropout:g}, "
    zeros = [row["value"] for row in run.find("adapter_sparsity")]
    adapters = f"Zeros among monolora's latents, all conditions: {interval(zeros).text(3)}.\n" if zeros else ""
    return text + (
        f"\n## Gains\n\n{markdown_table(header, lines)}"
        f"\nMean ± half-width of the 95 % interval over {len(script.seeds)} seeds ({of}); trainings that diverged\n"
        "(NaN or infinite weights or scores) are counted in the table and enter no mean. The paper's numbers are of\n"
        "another scale (ResNet-18, ImageNet-100, 100 epochs). Accuracies are of eval mode, on images as they are.\n"
        "Consistency, sparsity and live dimensions are of the classified features of the test images; chance is the\n"
        f"consistency with shuffled labels. Controls: {controls}{100 * script.held_out:g} % held out.\n{adapters}"
    )


def curves(
    run: Run, script: FinetuningArguments, condition: Mapping[str, float]
) -> tuple[list[int], dict[str, dict[str, tuple[list[float], list[float]]]]]:
    """Epochs, and mean and half-width of both accuracies of every arm at them, for a drawing."""
    epochs = sorted({row["config"]["epoch"] for row in run.find("validation_top1", **condition)})
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for metric, label in zip(ACCURACIES, ("training accuracy, %", "test accuracy, %"), strict=True):
        panels[label] = {}
        for method in script.methods:
            found = [
                defined([row["value"] for row in percent(run, metric, method=method, epoch=epoch, **condition)])
                for epoch in epochs
            ]
            panels[label][method] = [one.mean for one in found], [one.half_width or 0.0 for one in found]
    return epochs, panels


def levels(run: Run, script: FinetuningArguments) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Mean and half-width in every condition of both accuracies and of the gain over `ce`, for a drawing."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for label, of, metric in (
        ("training accuracy, %", mean, "train_top1"),
        ("test accuracy, %", mean, "validation_top1"),
        ("test, points over ce", gain, "validation_top1"),
    ):
        panels[label] = {}
        for method in script.methods:
            if of is gain and method == "ce":
                continue
            found = [of(run, metric, method, condition) for condition in script.conditions()]
            panels[label][method] = [one.mean for one in found], [one.half_width or 0.0 for one in found]
    return panels


def start(
    settings: type[FinetuningArguments], arguments: list[str] | None, recipe: str
) -> tuple[Any, dict[str, ImageSet], Accelerator, Run]:
    """Settings, images by split, processes and the folder of a recipe; raises ValueError for what cannot work."""
    script = parse(settings, arguments, shared_with=ProbingArguments)
    splits = dict(zip(SPLITS, load_splits(script), strict=True))
    splits["test"] = drawn(splits["test"], script.test_fraction, seed=0)
    script.check(splits["train"])
    accelerator = start_accelerator(script, recipe)
    run = Run(script.output_dir, recipe, results_config(script, *splits.values()), is_main=accelerator.is_main_process)
    run.bind()
    return script, splits, accelerator, run
