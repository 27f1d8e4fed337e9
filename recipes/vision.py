"""What the vision recipes share: the settings of pretraining, and the models that it gives."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from program import parse

from vision_bench import data
from vision_bench.data import ImageSet, stratified_fraction
from vision_bench.models import LAYERS, ModelConfig
from vision_bench.pretrain import PretrainConfig, Pretrained, pretrain
from vision_bench.probe import OPTIMIZERS, SCHEDULES
from vision_bench.runs import DIVERGED, Run, device_name

METHODS = ("simclr", "ncl")
SPLITS = ("train", "test")
IMAGES = "images"  # of a run's configuration: the fingerprint of each split, which is no setting
# Mirrored digits are others, and a blur or a small crop of 8 x 8 pixels leaves none.
VIEWS: dict[str, dict[str, Any]] = {
    "digits": {"crop_scale": [0.4, 1.0], "flip_probability": 0.0, "blur_probability": 0.0}
}
# Where and how fast, not what.
_NO_RESULT = {"output_dir", "checkpoints", "data_root", "memory_gib", "workers", "compile", "report_to"}
_NO_RESULT |= {"checkpoint_minutes", "monitor_epochs", "keep_models"}


@dataclass
class PretrainingArguments:
    """The offline default: 1,437 digits of 8 x 8 pixels and a network of three convolutions."""

    output_dir: str = field(metadata={"help": "Folder of the results."})
    seeds: list[int] = field(default_factory=lambda: list(range(5)), metadata={"help": "One pretraining for each."})
    checkpoints: str | None = field(default=None, metadata={"help": "Folder of the models; else in output_dir."})
    data: str = field(default="digits", metadata={"help": "Name of a data set, see vision_bench.data."})
    data_root: str | None = field(default=None, metadata={"help": "Folder where its files are."})
    train_split: str = field(default="train", metadata={"help": "Name of the split of the training images."})
    test_split: str = field(default="test", metadata={"help": "Of the test images; val or validation if none is."})
    # The command's test_fraction; the recipes of finetuning have another option of that name.
    test_from_train: float | None = field(
        default=None, metadata={"help": "Share of the training split that is the test images, of each class."}
    )
    train_fraction: float = field(default=1.0, metadata={"help": "Of the training images, drawn from each class."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels; resized and cropped at the centre."})
    skip_corrupt: bool = field(default=False, metadata={"help": "Leave out images that cannot be decoded."})
    label_column: str | None = field(default=None, metadata={"help": "Of a Hugging Face set, if not found."})
    memory_gib: float = field(default=4.0, metadata={"help": "A larger set is streamed, not held in memory."})
    workers: int = field(default=0, metadata={"help": "Processes that decode a streamed set."})
    backbone: str = field(default="small_conv", metadata={"help": "small_conv or any model of timm."})
    backbone_options: str | None = field(
        default=None, metadata={"help": "JSON of further arguments of timm.create_model, such as img_size."}
    )
    stem: str = field(default="timm", metadata={"help": "timm, or cifar for a ResNet on small images."})
    stem_padding: int = field(default=1, metadata={"help": "Of the CIFAR stem; 2 in the official code."})
    projector_hidden: int = field(default=512, metadata={"help": "16384 in the paper."})
    projector_out: int = field(default=256, metadata={"help": "2048 in the paper."})
    non_negative: str = field(default="relu", metadata={"help": "Output of NCL, see vision_bench.models."})
    pretraining_epochs: int = field(default=20, metadata={"help": "200 in the paper."})
    warmup_epochs: int = field(default=2, metadata={"help": "10 in the paper."})
    batch_size: int = field(default=128, metadata={"help": "Images, over all processes; 256 in the paper."})
    optimizer: str = field(default="lars", metadata={"help": "A name of timm's."})
    learning_rate: float = field(default=0.4, metadata={"help": "Of pretraining."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Of pretraining."})
    temperature: float = field(default=0.2, metadata={"help": "Of InfoNCE."})
    activation_bonus: float = field(default=0.0, metadata={"help": "NCL only; 1.0 in the official code."})
    views: str | None = field(default=None, metadata={"help": "JSON of arguments for vision_bench.views.SimCLRViews."})
    precision: str = field(default="no", metadata={"help": "no or bf16."})
    compile: bool = field(default=False, metadata={"help": "torch.compile, for GPUs."})
    monitor_epochs: int = field(default=10, metadata={"help": "Validation accuracies so often."})
    checkpoint_minutes: float = field(default=10.0, metadata={"help": "The training state is saved so often."})
    report_to: list[str] = field(default_factory=list, metadata={"help": "Trackers of accelerate."})

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds takes different integers of at least 0, got {self.seeds}.")
        for name in ("views", "backbone_options"):
            text = getattr(self, name)
            try:
                setattr(self, name, json.loads(text) if isinstance(text, str) else text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name} is {text!r}, which is not JSON ({error}).") from None
        for method in METHODS:
            self.model_config(method)
            self.pretrain_config(method, 0)

    def model_config(self, method: str) -> ModelConfig:
        """Of "simclr" or "ncl", which differ in the output."""
        return ModelConfig(
            backbone=self.backbone,
            stem=self.stem,
            stem_padding=self.stem_padding,
            projector_hidden=self.projector_hidden,
            projector_out=self.projector_out,
            non_negative="none" if method == "simclr" else self.non_negative,
            backbone_options=self.backbone_options or {},
        )

    def pretrain_config(self, method: str, seed: int) -> PretrainConfig:
        """Of "simclr" or "ncl"; the two see the same images and views."""
        return PretrainConfig(
            epochs=self.pretraining_epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_epochs=self.warmup_epochs,
            temperature=self.temperature,
            activation_bonus=0.0 if method == "simclr" else self.activation_bonus,
            views=VIEWS.get(self.data, {}) if self.views is None else self.views,
            seed=seed,
        )


def results_config(script: PretrainingArguments, train: ImageSet, test: ImageSet) -> dict[str, Any]:
    """What decides results, for `Run`: settings, and the images themselves in the place of where they are."""
    settings = {name: value for name, value in asdict(script).items() if name not in _NO_RESULT}
    return settings | {IMAGES: {"train": train.fingerprint, "test": test.fingerprint}}


def load_splits(script: PretrainingArguments) -> tuple[ImageSet, ImageSet]:
    """Training and test images, the same in every process and for every seed.

    Raises:
        ValueError: a set cannot be had, or the two do not have the same classes.
    """
    with data.warnings_in_one_line():
        train, test = data.load_splits(
            script.data,
            script.data_root,
            script.train_split,
            script.test_split,
            script.test_from_train,
            image_size=script.image_size,
            skip_corrupt=script.skip_corrupt,
            label_column=script.label_column,
            memory_limit=int(script.memory_gib * 2**30),
            progress=True,
        )
    if script.train_fraction != 1:
        generator = torch.Generator().manual_seed(0)
        drawn = stratified_fraction(train.labels, script.train_fraction, generator, train.class_names)
        train = train.subset(drawn)
    return train, test


def start_accelerator(script: PretrainingArguments, recipe: str) -> Accelerator:
    """Processes, devices, precision and trackers; `end_training` closes the trackers."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # unless it is told, every process of a launch would be alone
        mixed_precision=script.precision,
        log_with=script.report_to or None,
        project_dir=script.output_dir,
    )
    if script.report_to:
        accelerator.init_trackers(recipe, {k: str(v) for k, v in asdict(script).items()})
    return accelerator


def start(
    settings: type[ProbingArguments], arguments: list[str] | None, recipe: str
) -> tuple[Any, dict[str, ImageSet], Accelerator, Run]:
    """Settings, images by split, processes and the folder of a recipe; raises ValueError for what cannot work."""
    script = parse(settings, arguments)
    splits = dict(zip(SPLITS, load_splits(script), strict=True))
    script.check(splits["train"], splits["test"])
    accelerator = start_accelerator(script, recipe)
    run = Run(script.output_dir, recipe, results_config(script, *splits.values()), is_main=accelerator.is_main_process)
    run.bind()
    return script, splits, accelerator, run


def finish(
    accelerator: Accelerator, run: Run, report: Callable[[], str], draw: Callable[[], None] | None = None
) -> None:
    """Close the trackers; the main process writes `results.md`, draws, and prints the table."""
    accelerator.end_training()
    if accelerator.is_main_process:
        text = report() + _diverged_seeds(run)
        run.write("results.md", text)
        if draw is not None:
            draw()
        print(text)


def measure_seeds(
    run: Run, script: DownstreamArguments, accelerator: Accelerator, measure: Callable[[int], None]
) -> None:
    """Measure the models of each pretraining seed; seeds whose models or probes diverge are marked, others go on.

    Args:
        measure: adds the rows of the models of a seed that the run lacks; every process calls it.

    Raises:
        FloatingPointError: those of every seed diverged, so that there is nothing to report.
    """
    for model_seed, seeds in script.models_of().items():
        if run.find(DIVERGED, seed=model_seed):
            continue
        start = time.monotonic()
        try:
            measure(model_seed)
        except FloatingPointError as error:
            measured = {"n": 0, "seconds": time.monotonic() - start, "device": device_name(accelerator.device)}
            run.replace([row for row in run.rows if row["seed"] not in seeds])  # some arms may have been measured
            for seed in seeds:
                run.add_diverged(str(error), seed=seed, **measured)
    marks = run.find(DIVERGED)
    if len(marks) == len(script.seeds):
        reason = marks[0]["config"]["reason"]
        raise FloatingPointError(f"every seed diverged, so that there is nothing to report: {reason}")


def _diverged_seeds(run: Run) -> str:
    """Which seeds diverged as a whole, and why, as Markdown; nothing where none did."""
    marks = [
        row for row in run.find(DIVERGED) if "method" not in row["config"]
    ]  # those of a method stand in its table
    reasons = "; ".join(f"{row['seed']} ({row['config']['reason'].rstrip('.')})" for row in marks)
    if not marks:
        return ""
    return f"\n**Diverged:** seeds {reasons}. They have no part in the tables, which are of the other seeds.\n"


def highest_with_signal(rates: Sequence[float], num_classes: int) -> float:
    """The highest noise rate at which the true class is still the most frequent one, else the highest of all."""
    return max((rate for rate in rates if rate < (num_classes - 1) / num_classes - 1e-9), default=max(rates))


def pretrained(
    script: PretrainingArguments,
    method: str,
    seed: int,
    train: ImageSet,
    validation: ImageSet,
    accelerator: Accelerator,
) -> Pretrained:
    """The model of a method and a seed, trained now unless its folder has it or a part of it."""
    folder = Path(script.checkpoints or Path(script.output_dir) / "models") / f"{method}-{seed}"
    return pretrain(
        folder,
        script.model_config(method),
        script.pretrain_config(method, seed),
        train,
        validation,
        accelerator,
        monitor_epochs=script.monitor_epochs,
        checkpoint_minutes=script.checkpoint_minutes,
        compile_model=script.compile,
        workers=script.workers,
        name=f"{method}-{seed}",
        progress=True,
    )


@dataclass
class DownstreamArguments(PretrainingArguments):
    """Pretraining, and whether the seeds of what follows share it."""

    shared_pretraining: bool = field(
        default=False,
        metadata={"help": "All seeds take the models of the first; intervals then leave pretraining out."},
    )

    def models_of(self) -> dict[int, list[int]]:
        """The seeds of what follows by the seed of the models that they take."""
        return {self.seeds[0]: self.seeds} if self.shared_pretraining else {seed: [seed] for seed in self.seeds}


@dataclass
class ProbingArguments(DownstreamArguments):
    """Pretraining, the sparse autoencoder on SimCLR's features, and linear probes on frozen features."""

    layer: str = field(default="output", metadata={"help": f"What is probed: {', '.join(LAYERS)}."})
    sae_latents: int | None = field(default=None, metadata={"help": "By default the width of the features."})
    sae_k: int = field(default=32, metadata={"help": "Active latents; 256 of 2048 in the paper."})
    sae_epochs: int = field(default=50, metadata={"help": "Over the cached features; 100 in the configurations."})
    sae_learning_rate: float = field(default=1e-3, metadata={"help": "Of Adam."})
    probe_epochs: int = field(default=50, metadata={"help": "As in the paper."})
    probe_batch_size: int = field(default=256, metadata={"help": "As in the paper."})
    probe_optimizer: str = field(default="lars", metadata={"help": "lars, or sgd for ImageNet-100."})
    probe_learning_rate: float = field(default=0.4, metadata={"help": "1.5 with sgd for ImageNet-100."})
    probe_schedule: str = field(default="cosine", metadata={"help": "cosine, or step for ImageNet-100."})
    standardize: bool = field(default=False, metadata={"help": "Standardise each feature before probing."})
    rescale: bool = field(
        default=True,
        metadata={"help": "Probe all features at one mean norm. false as in the paper: their scale decides."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("layer", LAYERS),
            ("probe_optimizer", OPTIMIZERS),
            ("probe_schedule", SCHEDULES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")

    def check(self, train: ImageSet, test: ImageSet) -> None:
        """Raise ValueError for settings that would fail only after pretraining."""
        for name in ("batch_size", "probe_batch_size"):
            if not 1 <= getattr(self, name) <= len(train):
                raise ValueError(f"{name} is {getattr(self, name)} for {len(train)} images; it must not exceed them.")
        latents = self.sae_latents or (self.projector_out if self.layer != "backbone" else self.sae_k)
        if not 1 <= self.sae_k <= latents:
            raise ValueError(f"sae_k is {self.sae_k} for {latents} latents; it must be in [1, {latents}].")
        for name in ("sae_epochs", "probe_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("sae_learning_rate", "probe_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")

    @property
    def varied(self) -> str:
        """What differs between the seeds."""
        return (
            "probes and noise, the models are the same" if self.shared_pretraining else "pretraining, noise and probes"
        )

    def probe_settings(self) -> dict[str, Any]:
        """The arguments of `vision_bench.probe.fit_linear_probes` that all probes of a recipe share."""
        return {
            "epochs": self.probe_epochs,
            "batch_size": self.probe_batch_size,
            "optimizer": self.probe_optimizer,
            "learning_rate": self.probe_learning_rate,
            "schedule": self.probe_schedule,
            "standardize": self.standardize,
            "rescale": self.rescale,
        }
