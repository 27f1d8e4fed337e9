"""What probes fit of the labels that they were trained on, and what accuracy there is by chance: rows and tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from vision_bench.probe import TRAINING, Probes, training_accuracy
from vision_bench.runs import Run, device_name, interval

CHANCE = "chance_top1"


def add_training(
    run: Run,
    probes: Probes,
    train: torch.Tensor,
    label_sets: torch.Tensor,
    arms: Sequence[tuple[int, dict[str, Any]]],
) -> None:
    """Add the rows of `TRAINING` that the run lacks, for each probe.

    Args:
        train, label_sets: as `features` and `label_sets` of `vision_bench.probe.training_accuracy` takes them.
        arms: the seed of each probe and what distinguishes its rows.
    """
    start = time.monotonic()
    accuracies = training_accuracy(probes, train, label_sets)
    measured = {"n": len(train), "seconds": time.monotonic() - start, "device": device_name(probes.weights.device)}
    run.add_rows(
        [
            run.row(metric, value, seed=seed, **measured, **arm)
            for metric, values in zip(TRAINING, accuracies, strict=True)
            for (seed, arm), value in zip(arms, values.tolist(), strict=True)
            if not run.find(metric, seed=seed, **arm)
        ]
    )


def own_labels(run: Run, **arm: Any) -> tuple[str, str]:
    """A cell of a table, accuracy on the own training labels in percent over seeds; why it is not trained, or ""."""
    own, class_means = (interval([100 * row["value"] for row in run.find(metric, **arm)]) for metric in TRAINING)
    if own.mean >= class_means.mean:
        return own.text(1), ""
    return f"{own.text(1)} (not trained)", f"{own.mean:.1f} %, class means {class_means.mean:.1f} %"


def chance_percent(run: Run, **cell: Any) -> float:
    """Accuracy by chance in percent, of the test images of a cell."""
    return 100 * float(run.find(CHANCE, shift=cell.get("shift"))[0]["value"])
