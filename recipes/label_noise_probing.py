"""Table 1 and Fig. 1(b): which features bear noisy labels?

    python recipes/label_noise_probing.py --output_dir runs/label_noise
    accelerate launch recipes/label_noise_probing.py --config recipes/configs/cifar100.yaml --output_dir runs/table1

Linear classifiers on frozen features, trained on labels of which a share is wrong, tested on clean ones. The features
and the controls are those of vision_bench/kinds.py, and `poly_decay`, poly probed with the weight decay that is best
for the rate.

The paper: the gain of sae and ncl over poly grows with the rate, to +3.4 and +9.2 points at 90 % on CIFAR-100. The
default run, about two minutes on 2 cores, is of another scale: 1,437 digits, a network of three convolutions. With
its 10 classes a rate of 90 % leaves no signal at all (each class is as likely as any other), so look at 80 %. Expected
there: sae about 12 points below poly, random_relu 9, ncl 18, poly_unit level. Under `--rescale false`, where the scale
of the features decides how far a probe comes, sae is about 9 points over poly and random_relu about 6.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from frozen_features import FEATURES, describe, frozen_models, is_described
from probes import (
    ACCURACY,
    ARMS,
    ControlledArguments,
    accuracy_lines,
    bars,
    curves,
    gain_lines,
    kind_of,
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
from vision_bench.metrics import MEASURED
from vision_bench.probe import TRAINING, fit_linear_probes, probe_accuracy
from vision_bench.runs import Run, device_name, markdown_table

PAPER = {  # Table 1, top-1 % at the noise rates 0, 0.1 ... 0.9
    "CIFAR-100": {
        "poly": (54.5, 53.4, 52.8, 52.1, 51.2, 49.9, 49.5, 48.0, 45.0, 35.7),
        "sae": (54.4, 53.9, 53.4, 52.9, 51.9, 51.3, 50.5, 49.7, 47.1, 39.1),
        "ncl": (52.8, 53.9, 53.5, 52.6, 52.6, 52.3, 51.4, 49.5, 48.0, 44.9),
    },
    "ImageNet-100": {
        "poly": (66.8, 63.1, 61.8, 60.1, 58.8, 56.4, 54.9, 53.1, 48.9, 34.4),
        "sae": (66.2, 65.3, 62.3, 60.5, 59.8, 59.7, 58.5, 55.9, 54.3, 45.9),
        "ncl": (66.7, 65.4, 64.4, 63.9, 62.4, 62.3, 60.6, 59.8, 57.6, 48.1),
    },
}
PAPER_RATES = tuple(i / 10 for i in range(10))


@dataclass
class LabelNoiseArguments(ControlledArguments):
    """Settings of this recipe."""

    noise_rates: list[float] = field(
        default_factory=lambda: [i / 10 for i in range(10)], metadata={"help": "Shares of wrong training labels."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for rate in self.noise_rates:
            if not 0 <= rate <= 1:
                raise ValueError(f"noise_rates has {rate}; each must be in [0, 1], 0.9 for 90 % of the labels.")
        if not self.noise_rates or len(set(self.noise_rates)) < len(self.noise_rates):
            raise ValueError(f"noise_rates takes different numbers, got {self.noise_rates}.")


def probe_arm(
    run: Run,
    script: LabelNoiseArguments,
    name: str,
    train: torch.Tensor,
    test: torch.Tensor,
    splits: dict[str, ImageSet],
    seeds: list[int],
    device: torch.device,
) -> None:
    """Rows of one kind of features: accuracy for every seed, rate (and weight decay), and what the features are."""
    start = time.monotonic()
    labels, num_classes = splits["train"].labels, splits["train"].num_classes
    cells = list(itertools.product(script.decays_of(name), seeds, script.noise_rates))
    noisy = {
        (seed, rate): flip_labels(labels, rate, num_classes, torch.Generator().manual_seed(seed))
        for seed in seeds
        for rate in script.noise_rates
    }
    label_sets = torch.stack([noisy[seed, rate] for _, seed, rate in cells])
    probes = fit_linear_probes(
        train.to(device),
        label_sets,
        num_classes,
        weight_decay=[decay for decay, _, _ in cells],
        seeds=[seed for _, seed, _ in cells],
        device=device,
        progress=True,
        **script.probe_settings(),
    )
    accuracy = probe_accuracy(*probes, test, splits["test"].labels, topk=(1,))[1]
    measured = {"n": len(test), "seconds": time.monotonic() - start, "device": device_name(device)}
    arms = [(seed, {"features": name, "noise_rate": rate, "probe_weight_decay": decay}) for decay, seed, rate in cells]
    add_training(run, probes, train, label_sets, arms)
    run.add_rows(
        [
            run.row(ACCURACY, value, seed=seed, **measured, **arm)
            for (seed, arm), value in zip(arms, accuracy.tolist(), strict=True)
            if not run.find(ACCURACY, seed=seed, **arm)
        ]
    )
    describe(run, name, test, splits["test"].labels, seeds, device)


def is_complete(run: Run, script: LabelNoiseArguments, name: str, seeds: list[int]) -> bool:
    """Whether the folder has every row of one kind of features."""
    probes = len(script.decays_of(name)) * len(script.noise_rates)
    return is_described(run, name, seeds) and all(
        len(run.find(metric, features=name, seed=seed)) == probes for metric in (ACCURACY, *TRAINING) for seed in seeds
    )


def measure(
    run: Run, script: LabelNoiseArguments, seed: int, splits: dict[str, ImageSet], accelerator: Accelerator
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


def report(run: Run, script: LabelNoiseArguments, num_classes: int) -> str:
    """Table 1 with intervals, gains, what the features are, and the paper's numbers beside ours, as Markdown."""
    rates = script.noise_rates
    cells = [{"noise_rate": rate} for rate in rates]
    text = f"# Linear probes on frozen features under label noise: {script.data}, {script.backbone}\n\n"
    text += "Top-1 accuracy on clean test labels, %, by the share of wrong training labels.\n\n"
    header = ["features", *(f"{100 * rate:g} %" for rate in rates)]
    lines = accuracy_lines(run, cells)
    for (data, table), name in itertools.product(PAPER.items(), FEATURES):
        values = dict(zip(PAPER_RATES, table[name], strict=True))
        known = [f"{values[rate]:g}" if rate in values else "-" for rate in rates]
        lines.append([f"{name}, the paper, {data}", *known, *["-"] * len(MEASURED)])
    text += markdown_table([*header, *measured_header()], lines)
    text += training_table(run, header[1:], cells, cells)
    text += "\n## Points gained over poly, paired by seed\n\n"
    lines = gain_lines(run, cells)
    for (data, table), name in itertools.product(PAPER.items(), FEATURES[1:]):
        published = [round(a - b, 1) for a, b in zip(table[name], table["poly"], strict=True)]
        values = dict(zip(PAPER_RATES, published, strict=True))
        known = [f"{values[rate]:+g}" if rate in values else "-" for rate in rates]
        lines.append([f"{name}, the paper, {data}", *known])
    text += markdown_table(header, lines)
    limit = 100 * (num_classes - 1) / num_classes
    return (
        text + notes(run, script, cells) + f"With {num_classes} classes, no signal is left at a rate of {limit:g} %.\n"
    )


def draw(run: Run, script: LabelNoiseArguments, num_classes: int) -> None:
    """The label noise of Fig. 1(b), at the highest rate that leaves a signal, and the curves over all rates."""
    rates = sorted(script.noise_rates)
    highest = highest_with_signal(rates, num_classes)
    conditions = {f"{100 * rate:g} % wrong labels": {"noise_rate": rate} for rate in (rates[0], highest)}
    panels = curves(run, [{"noise_rate": rate} for rate in rates])
    chance, percents = chance_percent(run), [100 * rate for rate in rates]
    label = "share of wrong training labels, %"
    drawings = {
        "figure_1b": figures.accuracy_bars(bars(run, conditions), [chance] * len(conditions)),
        "all_rates": figures.noise_curves(percents, panels, label, [chance] * len(rates)),
    }
    for name, figure in drawings.items():
        figures.save(run.folder / name, figure)


def main(arguments: list[str] | None = None) -> None:
    """Measure what the output folder has no rows of, then write and print the table and draw the figures."""
    script, splits, accelerator, run = start(LabelNoiseArguments, arguments, "label_noise_probing")
    measure_seeds(run, script, accelerator, lambda seed: measure(run, script, seed, splits, accelerator))
    num_classes = splits["train"].num_classes
    finish(accelerator, run, lambda: report(run, script, num_classes), lambda: draw(run, script, num_classes))


if __name__ == "__main__":
    run_as_program(main)
