"""Probes of clean images tested on other ones: what input_noise_probing.py and ood_probing.py share.

The features of the images of a trial are made once and shared by all probes that the trial tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from frozen_features import FrozenModels, describe, frozen_models, is_described
from probes import ACCURACY, ARMS, ControlledArguments, kind_of
from tqdm.auto import tqdm
from training_accuracies import CHANCE, add_training

from vision_bench.data import ImageSet
from vision_bench.features import embed
from vision_bench.metrics import chance_level
from vision_bench.probe import TRAINING, Probes, fit_linear_probes, probe_accuracy
from vision_bench.runs import Run, device_name


@dataclass(frozen=True)
class Trial:
    """Images that probes are tested on.

    Args:
        arm: what distinguishes its rows.
        seeds: of the probes that are tested.
        images: gives the images, labelled with the classes of the training set.
        perturb: gives a function of normalised images, such as noise; it is asked anew for each model, so that all
            models see the same noise.
    """

    arm: dict[str, Any]
    seeds: Sequence[int]
    images: Callable[[], ImageSet]
    perturb: Callable[[], Callable[[torch.Tensor], torch.Tensor]] | None = None


def probes_of(script: ControlledArguments, name: str, seeds: Sequence[int]) -> list[tuple[float, int]]:
    """(weight decay, seed) of the probes of a kind of features, in the order of `fit`."""
    return [(decay, seed) for decay in script.decays_of(name) for seed in seeds]


def fit(
    run: Run,
    script: ControlledArguments,
    name: str,
    train: torch.Tensor,
    of: ImageSet,
    seeds: list[int],
    device: torch.device,
) -> Probes:
    """The probes of a kind of features on clean training images, in one pass; adds rows of what they fit of these."""
    wanted = probes_of(script, name, seeds)
    label_sets = of.labels.expand(len(wanted), -1)
    probes = fit_linear_probes(
        train.to(device),
        label_sets,
        of.num_classes,
        weight_decay=[decay for decay, _ in wanted],
        seeds=[seed for _, seed in wanted],
        device=device,
        progress=True,
        **script.probe_settings(),
    )
    arms = [(seed, {"features": name, "probe_weight_decay": decay}) for decay, seed in wanted]
    add_training(run, probes, train, label_sets, arms)
    return probes


def test(
    run: Run,
    script: ControlledArguments,
    trial: Trial,
    models: FrozenModels,
    probes: dict[str, Probes],
    seeds: list[int],
) -> None:
    """Add the rows of a trial: the accuracy of the probes, fitted for `seeds`, of all arms."""
    start = time.monotonic()
    images = trial.images()
    shifted = {
        method: embed(
            model,
            images.images,
            images.mean,
            images.std,
            [script.layer],
            perturb=trial.perturb() if trial.perturb else None,
        )[script.layer]
        for method, model in models.contrastive.items()
    }
    found = []
    for name in ARMS:
        wanted = {i: of for i, of in enumerate(probes_of(script, name, seeds)) if of[1] in trial.seeds}
        mine = [part[list(wanted)] for part in probes[name]]
        accuracy = probe_accuracy(*mine, models.features(kind_of(name), shifted), images.labels, topk=(1,))[1]
        for (decay, seed), value in zip(wanted.values(), accuracy.tolist(), strict=True):
            arm = {"features": name, "probe_weight_decay": decay}
            if not run.find(ACCURACY, seed=seed, **trial.arm, **arm):
                found.append((value, seed, arm))
    measured = {
        "n": len(images),
        "seconds": time.monotonic() - start,
        "device": device_name(probes[ARMS[0]].weights.device),
    }
    rows = [run.row(ACCURACY, v, seed=s, **measured, **trial.arm, **arm) for v, s, arm in found]
    shift = {
        name: value for name, value in trial.arm.items() if name == "shift"
    }  # of which classes may have other shares
    if not run.find(CHANCE, **shift):
        rows.append(run.row(CHANCE, chance_level(images.labels, images.num_classes), seed=None, **measured, **shift))
    run.add_rows(rows)


def measure(
    run: Run,
    script: ControlledArguments,
    seed: int,
    splits: dict[str, ImageSet],
    accelerator: Accelerator,
    trials: list[Trial],
) -> None:
    """Rows of the trials, with the models of one pretraining seed, that the folder lacks.

    All processes train the models and extract the clean features; the main one does the rest.
    """
    seeds = script.models_of()[seed]
    probed = sum(len(script.decays_of(name)) for name in ARMS)
    missing = [t for t in trials if any(len(run.find(ACCURACY, seed=s, **t.arm)) < probed for s in t.seeds)]
    trained = all(len(run.find(metric, seed=one)) == probed for metric in TRAINING for one in seeds)
    if not missing and trained and all(is_described(run, name, seeds) for name in ARMS):
        return
    models, made = frozen_models(run, script, seed, splits, accelerator)
    if not accelerator.is_main_process:
        return
    probes = {}
    for name in ARMS:
        describe(
            run, name, models.features(kind_of(name), made["test"]), splits["test"].labels, seeds, accelerator.device
        )
        train = models.features(kind_of(name), made["train"])
        probes[name] = fit(run, script, name, train, splits["train"], seeds, accelerator.device)
    for trial in tqdm(missing, desc="shifted images", unit="set"):
        test(run, script, trial, models, probes, seeds)
