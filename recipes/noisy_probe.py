"""The classifier that section 4.1 looks into: a linear probe of frozen features trained on noisy labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from frozen_features import is_described
from training_accuracies import add_training
from vision_ladder import ProbingArguments, highest_with_signal

from vision_bench.corruptions import flip_labels
from vision_bench.data import ImageSet
from vision_bench.probe import Probes, fit_linear_probes
from vision_bench.runs import Interval, Run, interval

ACCURACY = "offline_probe_top1"
CHUNK = 8192  # rows
PAPER_RATE = 0.9


@dataclass
class NoisyProbeArguments(ProbingArguments):
    """Settings of `ProbingArguments`, and the noise."""

    noise_rate: float | None = field(
        default=None,
        metadata={"help": "Share of wrong training labels. None: 0.9 as in the paper, 0.8 for 10 classes."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_rate is not None and not 0 <= self.noise_rate <= 1:
            raise ValueError(f"noise_rate is {self.noise_rate}; it must be in [0, 1], 0.9 for 90 % of the labels.")

    @property
    def over(self) -> str:
        """What an interval is over, for the tables."""
        return f"Mean ± half-width of the 95 % interval over {len(self.seeds)} seeds ({self.varied})."

    def check(self, train: ImageSet, test: ImageSet) -> None:
        """As `ProbingArguments`; settles `noise_rate`: the paper's, or the highest tenth that leaves a signal."""
        super().check(train, test)
        if self.noise_rate is None:
            self.noise_rate = highest_with_signal([i / 10 for i in range(10)], train.num_classes)


def noisy_probes(
    run: Run,
    script: NoisyProbeArguments,
    name: str,
    train: torch.Tensor,
    images: ImageSet,
    seeds: Sequence[int],
    device: torch.device,
) -> Probes:
    """A probe for each seed of noise and initial weights, of the features (n, d) of the training images.

    Adds rows of what they fit of their labels to the run, for the kind of features `name`.
    """
    assert script.noise_rate is not None  # settled by `check`
    noisy = torch.stack(
        [
            flip_labels(images.labels, script.noise_rate, images.num_classes, torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
    )
    probes = fit_linear_probes(
        train.to(device),
        noisy,
        images.num_classes,
        seeds=list(seeds),
        device=device,
        progress=True,
        **script.probe_settings(),
    )
    add_training(run, probes, train, noisy, [(seed, {"features": name}) for seed in seeds])
    return probes


@torch.no_grad()
def predictions(probes: Probes, test: torch.Tensor) -> torch.Tensor:
    """Classes (k, n) on the CPU that k probes give to features (n, d)."""
    device = probes.weights.device
    parts = [
        torch.einsum("nd,kcd->knc", part.to(device, probes.weights.dtype), probes.weights) + probes.biases[:, None]
        for part in test.split(CHUNK)
    ]
    return torch.cat([logits.argmax(dim=2).cpu() for logits in parts], dim=1)


def is_complete(run: Run, name: str, seeds: Sequence[int]) -> bool:
    """Whether the folder has the rows that are written last of one kind of features."""
    return is_described(run, name, seeds) and all(run.find(ACCURACY, features=name, seed=seed) for seed in seeds)


def over_seeds(run: Run, metric: str, name: str, **arm: Any) -> Interval:
    """Mean of one kind of features over seeds."""
    return interval([row["value"] for row in run.find(metric, features=name, **arm)])


def where_there_is_one(run: Run, script: NoisyProbeArguments, metric: str, name: str, digits: int) -> str:
    """As `over_seeds`, signed, of a metric that a seed may have no value of: "-" if none has, else how many have."""
    found = run.find(metric, features=name)
    if not found:
        return "-"
    few = f" ({len(found)} of {len(script.seeds)} seeds)" if len(found) < len(script.seeds) else ""
    return over_seeds(run, metric, name).text(digits, sign=True) + few
