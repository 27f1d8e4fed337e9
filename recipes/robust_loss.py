"""Fig. 6: does a loss that is robust to wrong labels add to what monosemantic features bear?

    python recipes/robust_loss.py --output_dir runs/robust_loss
    accelerate launch recipes/robust_loss.py --config recipes/configs/cifar100.yaml --output_dir runs/figure6

Linear classifiers on frozen features, trained on labels of which a share is wrong with each loss, tested on clean
ones. The losses: `ce`, cross entropy; `sce`, symmetric cross entropy, alpha CE + beta reverse CE (Wang et al., 2019);
and the control `ce_scaled`, alpha CE alone, as a loss that is alpha times as large may train a probe of few steps
differently by itself. The features and the controls are those of vision_bench/kinds.py, and `poly_decay`, which is
poly probed with the weight decay that is best for the loss and the rate. All losses, rates and seeds of one kind of
features are one pass of probes.

The paper (a picture only): sce helps poly and mono features, and mono features help with both losses. alpha 6.0 and
beta 0.1 are the official setting for 100 classes; Wang et al. take 0.1 and 1.0 for the 10 classes of CIFAR-10. The
default run, about two minutes on 2 cores, is of another scale (1,437 digits, a network of three convolutions).
Expected there: sce at most half a point apart from ce_scaled, and ncl behind poly under much noise with every loss.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from frozen_features import FEATURES, describe, frozen_models, is_described
from probes import (
    ACCURACY,
    ARMS,
    Cell,
    ControlledArguments,
    accuracies,
    accuracy_lines,
    bars,
    gain_lines,
    growth,
    kind_of,
    mean,
    measured_header,
    notes,
    training_table,
)
from program import run_as_program
from training_accuracies import add_training, chance_percent
from vision_ladder import SPLITS, finish, highest_with_signal, measure_seeds, start

from vision_bench import figures
from vision_bench.corruptions import flip_labels
from vision_bench.data import ImageSet
from vision_bench.probe import TRAINING, fit_linear_probes, probe_accuracy
from vision_bench.runs import Interval, Run, device_name, markdown_table, paired_difference

LOSSES = {"ce": "cross entropy", "sce": "symmetric cross entropy", "ce_scaled": "alpha times cross entropy"}


@dataclass
class RobustLossArguments(ControlledArguments):
    """Settings of this recipe."""

    noise_rates: list[float] = field(
        default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 0.9], metadata={"help": "Shares of wrong training labels."}
    )
    alpha: float = field(default=6.0, metadata={"help": "Weight of cross entropy in sce and ce_scaled."})
    beta: float = field(default=0.1, metadata={"help": "Weight of reverse cross entropy in sce."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for rate in self.noise_rates:
            if not 0 <= rate <= 1:
                raise ValueError(f"noise_rates has {rate}; each must be in [0, 1], 0.9 for 90 % of the labels.")
        if not self.noise_rates or len(set(self.noise_rates)) < len(self.noise_rates):
            raise ValueError(f"noise_rates takes different numbers, got {self.noise_rates}.")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; it must be above 0: with 0 the loss would be another one.")

    def weights(self, loss: str) -> tuple[float, float]:
        """(alpha, beta) of a loss of `LOSSES`."""
        return {"ce": (1.0, 0.0), "sce": (self.alpha, self.beta), "ce_scaled": (self.alpha, 0.0)}[loss]


def probe_arm(
    run: Run,
    script: RobustLossArguments,
    name: str,
    train: torch.Tensor,
    test: torch.Tensor,
    splits: dict[str, ImageSet],
    seeds: list[int],
    device: torch.device,
) -> None:
    """Rows of one kind of features: accuracy for every loss, rate and seed (and weight decay), from one pass."""
    start = time.monotonic()
    labels, num_classes = splits["train"].labels, splits["train"].num_classes
    probed = list(itertools.product(LOSSES, script.decays_of(name), seeds, script.noise_rates))
    noisy = {
        (seed, rate): flip_labels(labels, rate, num_classes, torch.Generator().manual_seed(seed))
        for seed in seeds
        for rate in script.noise_rates
    }
    weights = [script.weights(loss) for loss, *_ in probed]
    label_sets = torch.stack([noisy[seed, rate] for *_, seed, rate in probed])
    probes = fit_linear_probes(
        train.to(device),
        label_sets,
        num_classes,
        weight_decay=[decay for _, decay, *_ in probed],
        alpha=[alpha for alpha, _ in weights],
        beta=[beta for _, beta in weights],
        seeds=[seed for *_, seed, _ in probed],
        device=device,
        progress=True,
        **script.probe_settings(),
    )
    accuracy = probe_accuracy(*probes, test, splits["test"].labels, topk=(1,))[1]
    measured = {"n": len(test), "seconds": time.monotonic() - start, "device": device_name(device)}
    arms = [
        (seed, {"features": name, "loss": loss, "noise_rate": rate, "probe_weight_decay": decay})
        for loss, decay, seed, rate in probed
    ]
    add_training(run, probes, train, label_sets, arms)
    run.add_rows(
        [
            run.row(ACCURACY, value, seed=seed, **measured, **arm)
            for (seed, arm), value in zip(arms, accuracy.tolist(), strict=True)
            if not run.find(ACCURACY, seed=seed, **arm)
        ]
    )
    describe(run, name, test, splits["test"].labels, seeds, device)


def is_complete(run: Run, script: RobustLossArguments, name: str, seeds: list[int]) -> bool:
    """Whether the folder has every row of one kind of features."""
    probes = len(LOSSES) * len(script.noise_rates) * len(script.decays_of(name))
    return is_described(run, name, seeds) and all(
        len(run.find(metric, features=name, seed=seed)) == probes for metric in (ACCURACY, *TRAINING) for seed in seeds
    )


def measure(
    run: Run, script: RobustLossArguments, seed: int, splits: dict[str, ImageSet], accelerator: Accelerator
) -> None:
    """Rows of the models of one pretraining seed that the folder lacks."""
    seeds = script.models_of()[seed]
    missing = [name for name in ARMS if not is_complete(run, script, name, seeds)]
    if not missing:
        return
    models, made = frozen_models(run, script, seed, splits, accelerator)
    if not accelerator.is_main_process:
        return
    for name in missing:
        train, test = (models.features(kind_of(name), made[split]) for split in SPLITS)
        probe_arm(run, script, name, train, test, splits, seeds, accelerator.device)


def difference(run: Run, name: str, first: Cell, second: Cell) -> Interval:
    """Points of accuracy of the same features in one cell over those in another, paired by seed."""
    found = paired_difference(accuracies(run, name, **first), accuracies(run, name, **second))
    assert found is not None
    return found


def report(run: Run, script: RobustLossArguments, num_classes: int) -> str:
    """A table of accuracies and gains for each loss, what the loss adds for each kind of features, and whether that
    is more or less for other features than for poly, as Markdown."""
    rates = script.noise_rates
    header = ["features", *(f"{100 * rate:g} %" for rate in rates)]
    text = f"# Robust loss on frozen features under label noise: {script.data}, {script.backbone}\n\n"
    text += f"Top-1 accuracy on clean test labels, %, by the share of wrong training labels; alpha {script.alpha:g}, "
    text += f"beta {script.beta:g}.\n"
    cells = {loss: [{"loss": loss, "noise_rate": rate} for rate in rates] for loss in LOSSES}
    for loss, words in LOSSES.items():
        text += f"\n## {loss}: {words}\n\n"
        text += markdown_table([*header, *measured_header()], accuracy_lines(run, cells[loss]))
        text += training_table(run, header[1:], cells[loss], cells[loss])
        text += "\nPoints gained over poly with the same loss, paired by seed:\n\n"
        text += markdown_table(header, gain_lines(run, cells[loss]))
    text += "\n## Points that the loss adds, paired by seed\n\n"
    lines = []
    for name, (loss, base) in itertools.product(ARMS, (("sce", "ce"), ("ce_scaled", "ce"), ("sce", "ce_scaled"))):
        points = [difference(run, name, a, b) for a, b in zip(cells[loss], cells[base], strict=True)]
        lines.append([f"{name}: {loss} over {base}", *(one.text(1, sign=True) for one in points)])
    text += markdown_table(header, lines)
    text += "\n## What sce adds to ce, less what it adds for poly, paired by seed\n\n"
    text += "0 where loss and features help independently; below 0 where one makes up for the other.\n\n"
    lines = [
        [name, *(growth(run, name, a, b).text(1, sign=True) for a, b in zip(cells["sce"], cells["ce"], strict=True))]
        for name in ARMS[1:]
    ]
    text += markdown_table(header, lines)
    text += notes(run, script, [cell for loss in LOSSES for cell in cells[loss]])
    limit = 100 * (num_classes - 1) / num_classes
    text += f"With {num_classes} classes, no signal is left at a rate of {limit:g} %.\n"
    return text + "The paper shows Fig. 6 as a picture only: no numbers of it stand beside ours.\n"


def draw(run: Run, script: RobustLossArguments, num_classes: int) -> None:
    """Fig. 6 at the highest rate that leaves a signal, and the curves over all rates."""
    rates = sorted(script.noise_rates)
    highest = highest_with_signal(rates, num_classes)
    short = {"ce": "CE", "sce": "SCE", "ce_scaled": f"{script.alpha:g} CE"}
    curves = {}
    for name, loss in itertools.product(FEATURES, ("ce", "sce")):
        found = [mean(run, name, loss=loss, noise_rate=rate) for rate in rates]
        curves[name, short[loss]] = [one.mean for one in found], [one.half_width or 0.0 for one in found]
    drawings = {
        "figure_6": figures.accuracy_bars(
            bars(run, {short[loss]: {"loss": loss, "noise_rate": highest} for loss in LOSSES}),
            [chance_percent(run)] * len(LOSSES),
        ),
        "all_rates": figures.loss_curves([100 * rate for rate in rates], curves, chance_percent(run)),
    }
    for name, figure in drawings.items():
        figures.save(run.folder / name, figure)


def main(arguments: list[str] | None = None) -> None:
    """Measure what the output folder has no rows of, then write and print the table and draw the figures."""
    script, splits, accelerator, run = start(RobustLossArguments, arguments, "robust_loss")
    measure_seeds(run, script, accelerator, lambda seed: measure(run, script, seed, splits, accelerator))
    num_classes = splits["train"].num_classes
    finish(accelerator, run, lambda: report(run, script, num_classes), lambda: draw(run, script, num_classes))


if __name__ == "__main__":
    run_as_program(main)
