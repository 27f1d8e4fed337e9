"""Accuracies of linear probes as rows of a run, and the statistics and tables that recipes make of them.

Beside the features and controls of vision_bench/kinds.py there is `poly_decay`: poly probed with the weight decay that
is best for the cell of the table, on the test labels themselves, which favours the control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import frozen_features
from frozen_features import FEATURES
from training_accuracies import chance_percent, own_labels
from vision_ladder import ProbingArguments

from vision_bench import report as cautions
from vision_bench import sae
from vision_bench.metrics import MEASURED
from vision_bench.runs import Interval, Run, interval, markdown_table, paired_difference

CONTROLS = ("poly_decay", *frozen_features.CONTROLS)
ARMS = (*FEATURES, *CONTROLS)
ACCURACY = "offline_probe_top1"
RANDOM = ("poly_unit", "random_relu")  # what sae and ncl must beat to have gained by what they learnt

Cell = dict[str, Any]  # what the rows of a cell of a table have in common


@dataclass
class ControlledArguments(ProbingArguments):
    """Probes with the control of weight decay."""

    decays: list[float] = field(
        default_factory=lambda: [1e-4, 1e-3, 1e-2, 1e-1], metadata={"help": "Weight decays that poly_decay may take."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.decays or len(set(self.decays)) < len(self.decays) or min(self.decays) < 0:
            raise ValueError(f"decays is {self.decays}; it takes different weight decays of at least 0.")

    def decays_of(self, name: str) -> list[float]:
        """The weight decays that the features `name` are probed with."""
        return self.decays if name == "poly_decay" else [0.0]


def kind_of(name: str) -> str:
    """What is probed under a name of `ARMS`: a name of `FrozenModels.features`."""
    return "poly" if name == "poly_decay" else name


def best_decay(run: Run, **cell: Any) -> float:
    """The weight decay of poly_decay whose mean accuracy over the rows of the cell is the highest."""
    by_decay: dict[float, list[float]] = {}
    for row in run.find(ACCURACY, features="poly_decay", **cell):
        by_decay.setdefault(row["config"]["probe_weight_decay"], []).append(row["value"])
    return max(by_decay, key=lambda decay: interval(by_decay[decay]).mean)


def accuracies(run: Run, name: str, **cell: Any) -> list[dict[str, Any]]:
    """`seed` and `value`, the accuracy in percent, for every seed; the mean where the cell has several rows of one."""
    if name == "poly_decay":
        cell = cell | {"probe_weight_decay": best_decay(run, **cell)}
    by_seed: dict[int, list[float]] = {}
    for row in run.find(ACCURACY, features=name, **cell):
        by_seed.setdefault(row["seed"], []).append(100 * row["value"])
    return [{"seed": seed, "value": sum(values) / len(values)} for seed, values in by_seed.items()]


def mean(run: Run, name: str, **cell: Any) -> Interval:
    """Accuracy in percent."""
    return interval([row["value"] for row in accuracies(run, name, **cell)])


def gain(run: Run, name: str, over: str = "poly", **cell: Any) -> Interval:
    """Points of accuracy over other features, paired by seed."""
    found = paired_difference(accuracies(run, name, **cell), accuracies(run, over, **cell))
    assert found is not None
    return found


def growth(run: Run, name: str, cell: Cell, start: Cell, over: str = "poly") -> Interval:
    """By how many points the gain over other features is larger in `cell` than in `start`, paired by seed."""

    def changes(arm: str) -> list[dict[str, Any]]:
        before = {row["seed"]: row["value"] for row in accuracies(run, arm, **start)}
        return [row | {"value": row["value"] - before[row["seed"]]} for row in accuracies(run, arm, **cell)]

    found = paired_difference(changes(name), changes(over))
    assert found is not None
    return found


def accuracy_lines(run: Run, cells: Sequence[Cell]) -> list[list[str]]:
    """A line for each arm: its accuracy in each cell, and what the features are (`MEASURED`)."""
    lines = []
    for name in ARMS:
        what = [
            interval([row["value"] for row in run.find(metric, features=name)]).text(0 if "live" in metric else 3)
            for metric in MEASURED
        ]
        lines.append([name, *(mean(run, name, **cell).text(1) for cell in cells), *what])
    levels = (f"{chance_percent(run, **cell):.1f}" for cell in cells)
    return [*lines, ["chance level", *levels, *["-"] * len(MEASURED)]]


def training_table(run: Run, header: Sequence[str], cells: Sequence[Cell], probed: Sequence[Cell]) -> str:
    """Accuracy of the probes of each arm on their own training labels, and a warning of those not trained.

    Args:
        header: of the columns after the first.
        cells: where poly_decay's weight decay is chosen, for each column.
        probed: what the rows of the probes of each column have in common.
    """
    lines, untrained = [], []
    for name in ARMS:
        lines.append([name])
        for column, cell, arm in zip(header, cells, probed, strict=True):
            decay = best_decay(run, **cell) if name == "poly_decay" else 0.0
            text, why = own_labels(run, features=name, probe_weight_decay=decay, **arm)
            lines[-1].append(text)
            untrained += [f"{name}, {column} ({why})"] if why else []
    text = "\nAccuracy of the probes on their own training labels, wrong ones included, %.\n\n"
    return text + markdown_table(["features", *header], lines) + cautions.untrained(untrained)


def compared() -> list[tuple[str, str, str]]:
    """(line of a table, arm, what it is compared with): each arm with poly, then sae and ncl with random controls."""
    pairs = [(name, name, "poly") for name in ARMS[1:]]
    return pairs + [(f"{name} over {over}", name, over) for name in FEATURES[1:] for over in RANDOM]


def gain_lines(run: Run, cells: Sequence[Cell]) -> list[list[str]]:
    """A line for each comparison: points gained in each cell."""
    return [
        [line, *(gain(run, name, over, **cell).text(1, sign=True) for cell in cells)]
        for line, name, over in compared()
    ]


def growth_lines(run: Run, cells: Sequence[Cell], start: Cell) -> list[list[str]]:
    """A line for each comparison: by how much the gain grows from `start` to each of the cells."""
    return [
        [line, *(growth(run, name, cell, start, over).text(1, sign=True) for cell in cells)]
        for line, name, over in compared()
    ]


def measured_header() -> list[str]:
    """The columns that `accuracy_lines` ends with."""
    return [name.replace("_", " ") for name in MEASURED]


def notes(run: Run, script: ControlledArguments, cells: Sequence[Cell]) -> str:
    """What the tables of a recipe of probes mean."""
    quality = [interval([row["value"] for row in run.find(metric)]) for metric in sae.QUALITY]
    fvu, l0, dead = (one.text(3) for one in quality)
    unscaled = "" if script.rescale else "The scale of features decides how far these probes come (rescale: false).\n"
    decays = ", ".join(f"{best_decay(run, **cell):g}" for cell in cells)
    return (
        f"\nMean ± half-width of the 95 % interval over {len(script.seeds)} seeds ({script.varied}).\n"
        "The paper's numbers are of another scale (ResNet-18, 200 epochs, 16384-2048 projector) unless that is what\n"
        "was run here. Consistency, sparsity and live dimensions are of the clean test images; chance is the\n"
        "consistency with shuffled labels. A consistency means little without the sparsity beside it.\n"
        f"poly_decay takes the best of {len(script.decays)} weight decays for each column on the test labels\n"
        f"themselves, which favours it (those it took, column after column of all tables: {decays});\n"
        "poly_unit, random_relu, random_mask: see vision_bench/kinds.py.\n"
        f"{cautions.TRAINING_NOTE}{unscaled}"
        f"SAE on test images: FVU {fvu}, L0 {l0}, dead {dead}.\n" + cautions.unexplained({"sae": quality[0].mean})
    )


def curves(run: Run, cells: Sequence[Cell]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """The panels of `vision_bench.figures.noise_curves`: accuracies, and gains over poly, along the cells."""
    panels = {}
    for label, of, names in (
        ("accuracy, %", mean, ARMS),
        ("gain over poly, points", gain, ARMS[1:]),
    ):
        panels[label] = {}
        for name in names:
            found = [of(run, name, **cell) for cell in cells]
            panels[label][name] = [one.mean for one in found], [one.half_width or 0.0 for one in found]
    return panels


def bars(run: Run, conditions: dict[str, Cell]) -> dict[str, dict[str, tuple[float, float]]]:
    """The argument of `vision_bench.figures.accuracy_bars`: poly, sae and ncl in cells, by what stands below them."""
    return {
        label: {name: (one.mean, one.half_width or 0.0) for name in FEATURES if (one := mean(run, name, **cell))}
        for label, cell in conditions.items()
    }
