"""What the vision recipes share: their settings, images and processes, and the models of pretraining.

A recipe composes its settings of `PretrainingSettings`, what comes after (`ProbingSettings`), and its own, begins with
`start`, measures with `measure_seeds`, and ends with `finish`:

    @dataclass
    class MySettings:
        noise_rates: list[float] = option([0.0, 0.4], help="Shares of wrong training labels.")

    (pretraining, probing, mine), splits, accelerator, run = start(
        "my_recipe", (PretrainingSettings, ProbingSettings, MySettings), arguments
    )
    measure_seeds(run, accelerator, measure)
    finish(accelerator, run, report, draw)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from experiments import show

from vision_bench import data
from vision_bench.data import ImageSet, stratified_fraction
from vision_bench.models import LAYERS, ModelConfig
from vision_bench.pretrain import PretrainConfig, Pretrained, pretrain
from vision_bench.probe import OPTIMIZERS, SCHEDULES
from vision_bench.runs import DIVERGED, Run, defaults, device_name, option, parse, recorded

METHODS = ("simclr", "ncl")
IMAGES = "images"  # in a run's configuration: the fingerprint of each split, in the place of where the images are
# What a folder counts as that lacks a setting, where this is not what is done today.
BEFORE = {"rescale": False, "noise_draw": "in one stream"}
# Mirrored digits are others, and a blur or a small crop of 8 x 8 pixels leaves none.
VIEWS: dict[str, dict[str, Any]] = {
    "digits": {"crop_scale": [0.4, 1.0], "flip_probability": 0.0, "blur_probability": 0.0}
}


@dataclass
class PretrainingSettings:
    """The images and the pretraining; by default 1,437 digits of 8 x 8 pixels and a network of three convolutions."""

    output_dir: str = option(help="Folder of the results.", changes_results=False)
    seeds: list[int] = option([0, 1, 2, 3, 4], help="One pretraining for each.")
    checkpoints: str | None = option(None, help="Folder of the models; else in output_dir.", changes_results=False)
    data: str = option("digits", help="Name of a data set, see vision_bench.data.")
    data_root: str | None = option(None, help="Folder where its files are.", changes_results=False)
    train_split: str = option("train", help="Name of the split of the training images.")
    test_split: str = option("test", help="Of the test images; val or validation if none is.")
    # The command's test_fraction; the recipes of finetuning have another option of that name.
    test_from_train: float | None = option(
        None, help="Share of the training split that is the test images, of each class."
    )
    train_fraction: float = option(1.0, help="Of the training images, drawn from each class.")
    image_size: int | None = option(None, help="Pixels; resized and cropped at the centre.")
    skip_corrupt: bool = option(False, help="Leave out images that cannot be decoded.")
    label_column: str | None = option(None, help="Of a Hugging Face set, if not found.")
    memory_gib: float = option(4.0, help="A larger set is streamed, not held in memory.", changes_results=False)
    workers: int = option(0, help="Processes that decode a streamed set.", changes_results=False)
    backbone: str = option("small_conv", help="small_conv or any model of timm.")
    backbone_options: str | None = option(
        None, help="JSON of further arguments of timm.create_model, such as img_size."
    )
    stem: str = option("timm", help="timm, or cifar for a ResNet on small images.")
    stem_padding: int = option(1, help="Of the CIFAR stem; 2 in the official code.")
    projector_hidden: int = option(512, help="16384 in the paper.")
    projector_out: int = option(256, help="2048 in the paper.")
    non_negative: str = option("relu", help="Output of NCL, see vision_bench.models.")
    pretraining_epochs: int = option(20, help="200 in the paper.")
    warmup_epochs: int = option(2, help="10 in the paper.")
    batch_size: int = option(128, help="Images, over all processes; 256 in the paper.")
    optimizer: str = option("lars", help="A name of timm's.")
    learning_rate: float = option(0.4, help="Of pretraining.")
    weight_decay: float = option(1e-4, help="Of pretraining.")
    temperature: float = option(0.2, help="Of InfoNCE.")
    activation_bonus: float = option(0.0, help="NCL only; 1.0 in the official code.")
    views: str | None = option(None, help="JSON of arguments for vision_bench.views.SimCLRViews.")
    precision: str = option("no", help="no or bf16.")
    compile: bool = option(False, help="torch.compile, for GPUs.", changes_results=False)
    monitor_epochs: int = option(10, help="Validation accuracies so often.", changes_results=False)
    checkpoint_minutes: float = option(10.0, help="The training state is saved so often.", changes_results=False)
    report_to: list[str] = option([], help="Trackers of accelerate.", changes_results=False)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds takes different integers of at least 0, got {self.seeds}.")
        self.views = from_json("views", self.views)
        self.backbone_options = from_json("backbone_options", self.backbone_options)
        for method in METHODS:
            self.model_config(method)
            self.pretrain_config(method, 0)

    def model_config(self, method: str) -> ModelConfig:
        """The model of "simclr" or "ncl", which differ in the output."""
        return ModelConfig(
            backbone=self.backbone,
            stem=self.stem,
            stem_padding=self.stem_padding,
            projector_hidden=self.projector_hidden,
            projector_out=self.projector_out,
            non_negative="none" if method == "simclr" else self.non_negative,
            backbone_options=from_json("backbone_options", self.backbone_options) or {},
        )

    def pretrain_config(self, method: str, seed: int) -> PretrainConfig:
        """The pretraining of "simclr" or "ncl"; the two see the same images and views."""
        return PretrainConfig(
            epochs=self.pretraining_epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_epochs=self.warmup_epochs,
            temperature=self.temperature,
            activation_bonus=0.0 if method == "simclr" else self.activation_bonus,
            views=VIEWS.get(self.data, {}) if self.views is None else from_json("views", self.views),
            seed=seed,
        )


SHARED_PRETRAINING = "All seeds take the models of the first; intervals then leave pretraining out."


@dataclass
class ProbingSettings:
    """The sparse autoencoder on SimCLR's features, and the linear probes on frozen features."""

    shared_pretraining: bool = option(False, help=SHARED_PRETRAINING)
    layer: str = option("output", help=f"What is probed: {', '.join(LAYERS)}.")
    sae_latents: int | None = option(None, help="By default the width of the features.")
    sae_k: int = option(32, help="Active latents; 256 of 2048 in the paper.")
    sae_epochs: int = option(50, help="Over the cached features; 100 in the configurations.")
    sae_learning_rate: float = option(1e-3, help="Of Adam.")
    probe_epochs: int = option(50, help="As in the paper.")
    probe_batch_size: int = option(256, help="As in the paper.")
    probe_optimizer: str = option("lars", help="lars, or sgd for ImageNet-100.")
    probe_learning_rate: float = option(0.4, help="1.5 with sgd for ImageNet-100.")
    probe_schedule: str = option("cosine", help="cosine, or step for ImageNet-100.")
    standardize: bool = option(False, help="Standardise each feature before probing.")
    rescale: bool = option(
        True, help="Probe all features at one mean norm. false as in the paper: their scale decides."
    )

    def __post_init__(self) -> None:
        for name, allowed in (("layer", LAYERS), ("probe_optimizer", OPTIMIZERS), ("probe_schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")

    def check(self, pretraining: PretrainingSettings, splits: Mapping[str, ImageSet]) -> None:
        """Raise ValueError for settings that would fail only after pretraining."""
        images = len(splits["train"])
        for name, size in (("batch_size", pretraining.batch_size), ("probe_batch_size", self.probe_batch_size)):
            if not 1 <= size <= images:
                raise ValueError(f"{name} is {size} for {images} images; it must not exceed them.")
        latents = self.sae_latents or (pretraining.projector_out if self.layer != "backbone" else self.sae_k)
        if not 1 <= self.sae_k <= latents:
            raise ValueError(f"sae_k is {self.sae_k} for {latents} latents; it must be in [1, {latents}].")
        for name in ("sae_epochs", "probe_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("sae_learning_rate", "probe_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")

    def probe_settings(self) -> dict[str, Any]:
        """The arguments of `vision_bench.probe.fit_linear_probes` that all probes of a recipe share."""
        names = ("epochs", "batch_size", "optimizer", "learning_rate", "schedule")
        settings = {name: getattr(self, f"probe_{name}") for name in names}
        return settings | {"standardize": self.standardize, "rescale": self.rescale}


def from_json(name: str, text: str | None) -> Any:
    """The JSON that the setting `name` holds, or `text` itself if it is no text; raises ValueError if it is none."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is {text!r}, which is not JSON ({error}).") from None


def load_splits(pretraining: PretrainingSettings) -> dict[str, ImageSet]:
    """The images by split, "train" and "test", the same in every process and for every seed.

    Raises:
        ValueError: a set cannot be had, or the two do not have the same classes.
    """
    with data.warnings_in_one_line():
        train, test = data.load_splits(
            pretraining.data,
            pretraining.data_root,
            pretraining.train_split,
            pretraining.test_split,
            pretraining.test_from_train,
            image_size=pretraining.image_size,
            skip_corrupt=pretraining.skip_corrupt,
            label_column=pretraining.label_column,
            memory_limit=int(pretraining.memory_gib * 2**30),
            progress=True,
        )
    if pretraining.train_fraction != 1:
        drawn = torch.Generator().manual_seed(0)
        train = train.subset(stratified_fraction(train.labels, pretraining.train_fraction, drawn, train.class_names))
    return {"train": train, "test": test}


def begin(
    recipe: str,
    settings: Sequence[Any],
    splits: Mapping[str, ImageSet],
    config: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> tuple[Accelerator, Run]:
    """The processes and the folder of a recipe; every `check` of the settings comes before.

    Args:
        settings: `PretrainingSettings` first.
        config, facts: of the run, beside the settings, the fingerprints of the images, and the number of classes.

    Raises:
        ValueError: settings cannot work with these images, or the folder is of another configuration.
    """
    pretraining, *others = settings
    for part in others:
        if hasattr(part, "check"):
            part.check(pretraining, splits)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # unless it is told, every process of a launch would be alone
        mixed_precision=pretraining.precision,
        log_with=pretraining.report_to or None,
        project_dir=pretraining.output_dir,
    )
    if pretraining.report_to:
        values = {name: str(value) for part in settings for name, value in asdict(part).items()}
        accelerator.init_trackers(recipe, values)
    fingerprints = {name: images.fingerprint for name, images in splits.items()}
    run = Run(
        pretraining.output_dir,
        recipe,
        {**recorded(*settings), IMAGES: fingerprints, **(config or {})},
        is_main=accelerator.is_main_process,
        defaults={**defaults(*map(type, settings)), **BEFORE},
        facts={"num_classes": splits["train"].num_classes, **(facts or {})},
    )
    run.bind()
    return accelerator, run


def start(
    recipe: str,
    classes: Sequence[type[Any]],
    arguments: list[str] | None,
    shared: Iterable[type[Any]] = (),
    config: Mapping[str, Any] | None = None,
) -> tuple[tuple[Any, ...], dict[str, ImageSet], Accelerator, Run]:
    """Settings, images by split, processes and the folder of a recipe; raises ValueError for what cannot work.

    Args:
        classes: `PretrainingSettings` first; `check(pretraining, splits)` of others is called before the run begins.
        shared: classes of other recipes whose settings a file may have too.
        config: as `begin` takes it.
    """
    settings = parse(classes, arguments, shared=shared)
    splits = load_splits(settings[0])
    return settings, splits, *begin(recipe, settings, splits, config)


def finish(
    accelerator: Accelerator, run: Run, report: Callable[[Run], str], draw: Callable[[Run], None] | None = None
) -> None:
    """Close the trackers, and show the run."""
    accelerator.end_training()
    show(run, report, draw)


def models_of(config: Mapping[str, Any]) -> dict[int, list[int]]:
    """The seeds of a run's probes or finetunings by the seed of the pretrained models that they take."""
    seeds = config["seeds"]
    return {seeds[0]: seeds} if config["shared_pretraining"] else {seed: [seed] for seed in seeds}


def measure_seeds(run: Run, accelerator: Accelerator, measure: Callable[[int], None]) -> None:
    """Measure the models of each pretraining seed; seeds whose models or probes diverge are marked, others go on.

    Args:
        measure: adds the rows of the models of a seed that the run lacks; every process calls it.

    Raises:
        FloatingPointError: those of every seed diverged, so that there is nothing to report.
    """
    for model_seed, seeds in models_of(run.config).items():
        if run.find(DIVERGED, seed=model_seed):
            continue
        start = time.monotonic()
        try:
            measure(model_seed)
        except FloatingPointError as error:
            device, seconds = device_name(accelerator.device), time.monotonic() - start
            run.replace([row for row in run.rows if row["seed"] not in seeds])  # some arms may have been measured
            for seed in seeds:
                run.add_diverged(str(error), n=0, seed=seed, seconds=seconds, device=device)
    marks = run.find(DIVERGED)
    if len(marks) == len(run.config["seeds"]):
        reason = marks[0]["config"]["reason"]
        raise FloatingPointError(f"every seed diverged, so that there is nothing to report: {reason}")


def check_rates(rates: Sequence[float], name: str = "noise_rates") -> None:
    """Raise ValueError unless `rates`, a setting of this name, has different shares of wrong labels."""
    for rate in rates:
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} has {rate}; each must be in [0, 1], 0.9 for 90 % of the labels.")
    if not rates or len(set(rates)) < len(rates):
        raise ValueError(f"{name} takes different numbers, got {rates}.")


def highest_with_signal(rates: Sequence[float], num_classes: int) -> float:
    """The highest noise rate at which the true class is still the most frequent one, else the highest of all."""
    return max((rate for rate in rates if rate < (num_classes - 1) / num_classes - 1e-9), default=max(rates))


def pretrained(
    pretraining: PretrainingSettings,
    method: str,
    seed: int,
    splits: Mapping[str, ImageSet],
    accelerator: Accelerator,
) -> Pretrained:
    """The model of a method and a seed, trained now unless its folder has it or a part of it."""
    folder = Path(pretraining.checkpoints or Path(pretraining.output_dir) / "models") / f"{method}-{seed}"
    return pretrain(
        folder,
        pretraining.model_config(method),
        pretraining.pretrain_config(method, seed),
        splits["train"],
        splits["test"],
        accelerator,
        monitor_epochs=pretraining.monitor_epochs,
        checkpoint_minutes=pretraining.checkpoint_minutes,
        compile_model=pretraining.compile,
        workers=pretraining.workers,
        name=f"{method}-{seed}",
        progress=True,
    )
