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
from dataclasses import dataclass
from functools import partial
from typing import Any

from probe_report import draw_gain_parts, notes, probe_table
from probing import FEATURES, ControlSettings, controlled_grid, experiment, run_experiment
from vision import PretrainingSettings, ProbingSettings, check_rates, highest_with_signal

from vision_bench import figures
from vision_bench.report import ProbeTable, with_widths
from vision_bench.runs import Run, markdown_table, option, paired, run_as_program
from vision_bench.sweep import Grid, Test

LOSSES = {"ce": "cross entropy", "sce": "symmetric cross entropy", "ce_scaled": "alpha times cross entropy"}


@dataclass
class RobustLossSettings:
    """The noise on the training labels, and the losses."""

    noise_rates: list[float] = option([0.0, 0.2, 0.4, 0.6, 0.8, 0.9], help="Shares of wrong training labels.")
    alpha: float = option(6.0, help="Weight of cross entropy in sce and ce_scaled.")
    beta: float = option(0.1, help="Weight of reverse cross entropy in sce.")

    def __post_init__(self) -> None:
        check_rates(self.noise_rates)
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; it must be above 0: with 0 the loss would be another one.")


SETTINGS = (PretrainingSettings, ProbingSettings, ControlSettings, RobustLossSettings)


def grid(config: dict[str, Any], model_seed: int) -> Grid:
    """The probes with the models of a pretraining: each arm with every loss at every rate, tested on clean images."""
    alpha, beta = config["alpha"], config["beta"]
    return controlled_grid(
        config,
        model_seed,
        [Test()],
        training_arm=lambda training: {"loss": training.loss, "noise_rate": training.label_noise},
        losses={"ce": (1.0, 0.0), "sce": (alpha, beta), "ce_scaled": (alpha, 0.0)},
        noises=config["noise_rates"],
    )


def table_of(run: Run) -> ProbeTable:
    """The accuracies, a column for each loss and rate."""
    columns = itertools.product(LOSSES, run.config["noise_rates"])
    return probe_table(run, {(loss, rate): {"loss": loss, "noise_rate": rate} for loss, rate in columns})


def report(run: Run) -> str:
    """A table of accuracies and gains for each loss, what the loss adds for each kind of features, and whether that
    is more or less for other features than for poly, as Markdown."""
    config, table = run.config, table_of(run)
    header = [f"{100 * rate:g} %" for rate in config["noise_rates"]]
    columns = {loss: [(loss, rate) for rate in config["noise_rates"]] for loss in LOSSES}
    text = (
        f"# Robust loss on frozen features under label noise: {config['data']}, {config['backbone']}\n\n"
        "Top-1 accuracy on clean test labels, %, by the share of wrong training labels; "
        f"alpha {config['alpha']:g}, beta {config['beta']:g}.\n"
    )
    for loss, words in LOSSES.items():
        text += (
            f"\n## {loss}: {words}\n\n{table.accuracy_table(header, columns[loss])}"
            f"{table.training_table(header, columns[loss])}"
            "\nPoints gained over poly with the same loss, paired by seed:\n\n"
            f"{table.gain_table(header, columns[loss])}"
        )
    lines = []
    for name, (loss, base) in itertools.product(
        config["arms"], (("sce", "ce"), ("ce_scaled", "ce"), ("sce", "ce_scaled"))
    ):
        both = zip(columns[loss], columns[base], strict=True)
        points = [paired(table.points(name, ours), table.points(name, theirs)) for ours, theirs in both]
        lines.append([f"{name}: {loss} over {base}", *(one.text(1, sign=True) for one in points)])
    text += f"\n## Points that the loss adds, paired by seed\n\n{markdown_table(['features', *header], lines)}"
    text += "\n## What sce adds to ce, less what it adds for poly, paired by seed\n\n"
    text += "0 where loss and features help independently; below 0 where one makes up for the other.\n\n"
    lines = [
        [
            name,
            *(
                table.growth(name, ours, theirs).text(1, sign=True)
                for ours, theirs in zip(columns["sce"], columns["ce"], strict=True)
            ),
        ]
        for name in config["arms"]
        if name != "poly"
    ]
    text += markdown_table(["features", *header], lines) + notes(run, table, list(table.columns))
    limit = 100 * (config["num_classes"] - 1) / config["num_classes"]
    text += f"With {config['num_classes']} classes, no signal is left at a rate of {limit:g} %.\n"
    return text + "The paper shows Fig. 6 as a picture only: no numbers of it stand beside ours.\n"


def draw(run: Run) -> None:
    """Fig. 6 at the highest rate that leaves a signal, and the curves over all rates."""
    table, rates = table_of(run), sorted(run.config["noise_rates"])
    highest = highest_with_signal(rates, run.config["num_classes"])
    draw_gain_parts(run, table, list(table.columns))
    short = {"ce": "CE", "sce": "SCE", "ce_scaled": f"{run.config['alpha']:g} CE"}
    bars = table.bars({short[loss]: (loss, highest) for loss in LOSSES}, FEATURES)
    figures.save(run.folder / "figure_6", figures.accuracy_bars(*bars))
    curves = {
        (name, short[loss]): with_widths([table.mean(name, (loss, rate)) for rate in rates])
        for name, loss in itertools.product(FEATURES, ("ce", "sce"))
        if name in table.arms
    }
    chance = table.chance(("ce", highest))
    figures.save(run.folder / "all_rates", figures.loss_curves([100 * rate for rate in rates], curves, chance))


EXPERIMENT = experiment(
    SETTINGS,
    grid,
    recipe="robust_loss",
    items=("figure_6",),
    title="Figure 6: a robust loss under label noise",
    claim="The paper: symmetric cross entropy helps polysemantic and monosemantic features, and monosemantic "
    "features help with either loss (a picture without numbers).",
    pictures={
        "figure_6": "Figure 6: ours",
        "all_rates": "All rates, ours",
        "gain_parts": "What the gains over poly consist of: ours",
    },
    report=report,
    draw=draw,
    facts=("num_classes",),
)


main = partial(run_experiment, EXPERIMENT, SETTINGS, grid)


if __name__ == "__main__":
    run_as_program(main)
