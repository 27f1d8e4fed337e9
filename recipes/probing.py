"""What the recipes that probe frozen features share: the arms, the frozen models of a pretraining, and the sweep.

Beside the kinds of features of vision_bench/kinds.py there is the arm `poly_decay`: poly probed with the weight decay
that is best for a column of the table, on the test labels themselves, which favours the control.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from experiments import Experiment
from vision import (
    BEFORE,
    IMAGES,
    PretrainingSettings,
    ProbingSettings,
    finish,
    highest_with_signal,
    measure_seeds,
    models_of,
    pretrained,
    start,
)

from vision_bench import features, kinds, learners, models, sae
from vision_bench.data import ImageSet
from vision_bench.label_noise import LabelNoise
from vision_bench.learners import LEARNERS, PROBE
from vision_bench.metrics import chance_level
from vision_bench.models import ContrastiveModel
from vision_bench.probe import Probes
from vision_bench.report import CHANCE, DECAY
from vision_bench.runs import Cell, Run, defaults, device_name, option
from vision_bench.sweep import Arm, Fitted, Grid, Measured, Test, Training, rows, sweep

FEATURES = ("poly", "sae", "ncl")
ARMS = (*FEATURES, "poly_decay", "poly_unit", "random_relu", "random_mask")
METHODS = {"simclr": kinds.BASE, "ncl": kinds.NCL}
CHUNK = 8192  # rows of features that are classified at once

GridOf = Callable[[dict[str, Any], int], Grid]  # of a run's configuration and the seed of the pretraining
Study = Callable[[str, Fitted, torch.Tensor, torch.Tensor], list[Measured]]


@dataclass
class ControlSettings:
    """The arms of a table of probes."""

    decays: list[float] = option([1e-4, 1e-3, 1e-2, 1e-1], help="Weight decays that poly_decay may take.")
    arms: list[str] = option(list(ARMS), help="Kinds of vision_bench/kinds.py, poly_decay; with poly.")

    def __post_init__(self) -> None:
        if not self.decays or len(set(self.decays)) < len(self.decays) or min(self.decays) < 0:
            raise ValueError(f"decays is {self.decays}; it takes different weight decays of at least 0.")
        if "poly" not in self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms is {self.arms}; it takes poly and others, each once.")
        for arm in self.arms:
            if arm != "poly_decay":
                kinds.find(arm)
            if kinds.head_of(arm) is not None:
                raise ValueError(f"arms has {arm}, a head of a frozen model, which python -m vision_bench trains.")


@dataclass
class LearnerSettings:
    """What learns from the features."""

    learners: list[str] = option([PROBE], help=f"Of {', '.join(LEARNERS)}; with {PROBE}, on the same labels.")

    def __post_init__(self) -> None:
        learners.check(self.learners)
        if PROBE not in self.learners:
            raise ValueError(f"learners is {self.learners}; the tables need {PROBE}, give it too.")


@dataclass
class NoisyProbeSettings:
    """The classifier that section 4.1 looks into: a linear probe trained on noisy labels."""

    noise_rate: float | None = option(
        None, help="Share of wrong training labels. None: 0.9 as in the paper, 0.8 for 10 classes."
    )

    def __post_init__(self) -> None:
        if self.noise_rate is not None and not 0 <= self.noise_rate <= 1:
            raise ValueError(f"noise_rate is {self.noise_rate}; it must be in [0, 1], 0.9 for 90 % of the labels.")

    def check(self, pretraining: PretrainingSettings, splits: Mapping[str, ImageSet]) -> None:
        """Settle the noise rate: the paper's, or the highest tenth that leaves a signal."""
        if self.noise_rate is None:
            self.noise_rate = highest_with_signal([i / 10 for i in range(10)], splits["train"].num_classes)


def experiment(
    classes: Sequence[type[Any]], grid: GridOf, recorded: Mapping[str, Any] | None = None, **shown: Any
) -> Experiment:
    """An experiment whose rows are a grid for each pretraining.

    Args:
        classes: of the settings.
        grid: as `measure` takes it.
        recorded: what else a run records, at its default.
        shown: what the page of results shows, as `Experiment` takes it.
    """

    def cells(config: dict[str, Any]) -> Iterator[Cell]:
        for model_seed in models_of(config):
            yield from cells_of(grid(config, model_seed), model_seed)

    # The images have no default that is asked for.
    known = {**defaults(*classes), **BEFORE, IMAGES: {}, **(recorded or {})}
    return Experiment(cells=cells, defaults=known, **shown)


def run_experiment(
    experiment: Experiment,
    classes: Sequence[type[Any]],
    grid: GridOf,
    arguments: list[str] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    study: Callable[[dict[str, Any], str, Fitted, torch.Tensor, torch.Tensor], list[Measured]] | None = None,
) -> None:
    """Measure what the output folder has no rows of, then write and print the table and draw the figures.

    Args:
        config: of the run, beside the settings.
        study: as `measure` takes it, with the configuration of the run before its arguments.
    """
    settings, splits, accelerator, run = start(experiment.recipe, classes, arguments, config=config)
    of_run = None if study is None else partial(study, run.config)
    measure(run, settings, splits, accelerator, grid, study=of_run)
    finish(accelerator, run, experiment.report, experiment.draw)


def controlled_grid(
    config: Mapping[str, Any],
    model_seed: int,
    tests: Sequence[Test],
    *,
    training_arm: Callable[[Training], dict[str, Any]] = lambda training: {},
    test_arm: Callable[[Test], dict[str, Any]] = lambda test: {},
    losses: Mapping[str, tuple[float, float]] | None = None,
    noises: Sequence[LabelNoise] = (0.0,),
) -> Grid:
    """The probes with the models of a pretraining, for every loss, weight decay, seed and noise on the labels.

    Args:
        config: of the run; without learners there are linear probes alone.
        model_seed: of the pretraining.
        tests, training_arm, test_arm: as `Grid`; rows of a training also have their weight decay.
        losses: (alpha, beta) by name; None is cross entropy without a name.
        noises: on the training labels.
    """
    trainings = {
        name: [
            Training(noise, alpha=alpha, beta=beta, weight_decay=decay, loss=loss, learner=learner, seed=seed)
            for learner in (config.get("learners", [PROBE]) if name == "" else [PROBE])
            for loss, (alpha, beta) in (losses or {"": (1.0, 0.0)}).items()
            for decay in decays
            for seed in models_of(config)[model_seed]
            for noise in noises
        ]
        for name, decays in {"poly_decay": config["decays"], "": [0.0]}.items()
    }
    arms = {
        name: Arm("poly", trainings[name]) if name == "poly_decay" else Arm(name, trainings[""])
        for name in config["arms"]
    }
    return Grid(
        arms,
        tests,
        lambda training: {**training_arm(training), DECAY: training.weight_decay},
        test_arm,
        model_seed=seed_of_models(config, model_seed),
    )


def noisy_grid(config: Mapping[str, Any], model_seed: int) -> Grid:
    """The noisy probes of poly, sae and ncl with the models of a pretraining."""
    trainings = [Training(config["noise_rate"], seed=seed) for seed in models_of(config)[model_seed]]
    arms = {name: Arm(name, trainings) for name in FEATURES}
    return Grid(arms, [Test()], lambda training: {}, lambda test: {}, model_seed=seed_of_models(config, model_seed))


def seed_of_models(config: Mapping[str, Any], model_seed: int) -> int | None:
    """The seed of rows that depend on the models alone: none where several seeds share them.

    Such rows exist once, because copies for each seed would pass for an interval of no width.
    """
    return model_seed if len(models_of(config)[model_seed]) == 1 else None


def cells_of(grid: Grid, model_seed: int) -> Iterator[Cell]:
    """The cells of the models of a pretraining: of the grid, of the autoencoder, and the chance levels.

    A chance level is of all rows, and of each shift, as the classes of its images may have other shares.
    """
    yield from (cell for name in grid.arms for cell in grid.cells(name))
    yield from (
        Cell(metric, model_seed, {"features": None if name == "sae" else name})
        for name in autoencoders(grid.arms)
        for metric in sae.QUALITY
    )
    arms = [grid.test_arm(test) for test in grid.tests]
    shifts = dict.fromkeys(arm["shift"] for arm in arms if "shift" in arm)
    yield from (Cell(CHANCE, None, arm) for arm in ({}, *({"shift": shift} for shift in shifts)))


def autoencoders(arms: Iterable[str]) -> list[str]:
    """The kinds that are latents of an autoencoder whose quality is measured: `sae`, and those among the arms.

    Rows of `sae` do not name it, as they did not when it was the only one.
    """
    named = {arm.removesuffix(kinds.RANDOM_BASIS) for arm in arms}
    return [name for name in kinds.AUTOENCODERS if name == "sae" or name in named]


class FrozenModels(NamedTuple):
    """The models of a pretraining, and what they make of the images."""

    contrastive: dict[str, ContrastiveModel]  # kinds.BASE is SimCLR's, kinds.NCL the non-negative one
    frozen: kinds.Frozen
    test: kinds.Outputs  # of the test images


def frozen_models(
    run: Run,
    pretraining: PretrainingSettings,
    probing: ProbingSettings,
    seed: int,
    arms: Iterable[str],
    splits: Mapping[str, ImageSet],
    accelerator: Accelerator,
) -> FrozenModels:
    """The models of a seed, trained or loaded, by all processes; adds the rows of autoencoders and of chance.

    Args:
        arms: which decide what autoencoders there are beside that of `sae`.
    """
    trained = {
        method: pretrained(pretraining, method, seed, splits, accelerator).model.to(accelerator.device)
        for method in METHODS
    }
    outputs: dict[str, dict[str, torch.Tensor]] = {split: {} for split in splits}
    for method, model in trained.items():
        checkpoint = models.fingerprint(model)
        for split, images in splits.items():
            folder = run.folder / "features" / f"{method}-{seed}-{split}"
            source = features.extract(
                folder, model, images, split, [probing.layer], progress=True, checkpoint=checkpoint
            )
            outputs[split][METHODS[method]] = features.load(folder, probing.layer, source)
    directions, test = kinds.directions(outputs["train"][kinds.BASE]), F.normalize(outputs["test"][kinds.BASE])
    halves = {name: kinds.AUTOENCODERS[name] for name in autoencoders(arms)}
    fitted = {
        half: sae.fit(
            directions,
            probing.sae_latents or directions.shape[1],
            probing.sae_k,
            epochs=probing.sae_epochs,
            learning_rate=probing.sae_learning_rate,
            batch_size=min(256, len(directions)),
            seed=seed,
            frozen=half,
            accelerator=accelerator,
            checkpoint_dir=run.folder / "sae" / (str(seed) if half is None else f"{seed}-frozen-{half}"),
            progress=True,
        ).autoencoder
        for half in halves.values()
    }
    if accelerator.is_main_process:
        timed: dict[str, Any] = {"n": len(test), "seconds": 0.0, "device": device_name(accelerator.device)}
        if not run.find(CHANCE):
            level = chance_level(splits["test"].labels, splits["test"].num_classes)
            run.add(CHANCE, level, seed=None, **timed, split="test")
        for name, half in halves.items():
            arm = {} if name == "sae" else {"features": name}
            for metric, value in zip(sae.QUALITY, sae.evaluate(fitted[half], test), strict=True):
                if not run.find(metric, seed=seed, features=arm.get("features")):
                    run.add(metric, value, seed=seed, **timed, **arm)
    by_kind = {METHODS[method]: model for method, model in trained.items()}
    return FrozenModels(by_kind, kinds.Frozen(outputs["train"], fitted.__getitem__, seed), outputs["test"])


def measure(
    run: Run,
    settings: Sequence[Any],
    splits: Mapping[str, ImageSet],
    accelerator: Accelerator,
    grid: GridOf,
    *,
    images: Callable[[Test], ImageSet] | None = None,
    study: Study | None = None,
) -> None:
    """Add the rows of a recipe that the run lacks, pretraining seed after pretraining seed; all processes call this.

    Args:
        settings: `PretrainingSettings` and `ProbingSettings` first. What `probe_settings` of any of them returns are
            arguments of `sweep.fit`.
        images: of a test other than the first, which has the test images as they are; by default these too.
        study: as `sweep` takes it; it is called for one arm at a time.

    Raises:
        ValueError: a learner takes more dimensions than features have; before anything is trained.
    """
    pretraining, probing, device = *settings[:2], accelerator.device
    # How wide a backbone is, is not known yet.
    widths = [pretraining.projector_out] if probing.layer != "backbone" else []
    widths += [probing.sae_latents] if any(map(kinds.needs_autoencoder, run.config.get("arms", ()))) else []
    learners.check(run.config.get("learners", [PROBE]), min(filter(None, widths), default=None))

    def measure_seed(model_seed: int) -> None:
        whole = grid(run.config, model_seed)
        if not run.lacking(cells_of(whole, model_seed)):
            return
        models = frozen_models(run, settings[0], probing, model_seed, whole.arms, splits, accelerator)

        def load(test: Test) -> tuple[kinds.Outputs, torch.Tensor]:
            start, shown = time.monotonic(), splits["test"] if images is None else images(test)
            shift = {name: value for name, value in whole.test_arm(test).items() if name == "shift"}
            outputs = models.test
            if test != whole.tests[0]:
                outputs = {
                    name: features.embed(
                        model, shown.images, shown.mean, shown.std, [probing.layer], noise=test.noise
                    )[probing.layer]
                    for name, model in models.contrastive.items()
                }
            if not run.find(CHANCE, **shift):
                level, seconds = chance_level(shown.labels, shown.num_classes), time.monotonic() - start
                about = {"n": len(shown), "seed": None, "seconds": seconds, "device": device_name(device)}
                run.add(CHANCE, level, **about, **shift)
            return outputs, shown.labels

        settled: dict[str, Any] = {}  # of all probes
        for part in settings:
            settled |= part.probe_settings() if hasattr(part, "probe_settings") else {}
        # With one test an arm is done once it is probed; the images of several tests are made once for all arms.
        parts = [{name: arm} for name, arm in whole.arms.items()] if len(whole.tests) == 1 else [whole.arms]
        for arms in parts if accelerator.is_main_process else ():
            batches = sweep(
                replace(whole, arms=arms),
                models.frozen,
                splits["train"].labels,
                splits["train"].num_classes,
                load,
                device=device,
                lacking=run.lacking,
                study=study,
                progress=True,
                **settled,
            )
            for batch in rows(run, batches, device):
                run.add_rows(batch)

    measure_seeds(run, accelerator, measure_seed)


@torch.no_grad()
def predictions(probes: Probes, features: torch.Tensor) -> torch.Tensor:
    """Classes (k, n) on the CPU that k probes give to features (n, d)."""
    weights, biases = probes
    parts = [
        torch.einsum("nd,kcd->knc", part.to(weights), weights) + biases[:, None] for part in features.split(CHUNK)
    ]
    return torch.cat([logits.argmax(dim=2).cpu() for logits in parts], dim=1)
