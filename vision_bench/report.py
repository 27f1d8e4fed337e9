"""Tables of probes, for recipes and the command: accuracies, gains, their growth, and what to beware of."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from vision_bench.learners import LEARNERS, PROBE, metrics_of
from vision_bench.metrics import MEASURED
from vision_bench.runs import Interval, frame, markdown_table, over_seeds, paired, select

CHANCE = "chance_top1"
DECAY = "probe_weight_decay"
UNEXPLAINED = 0.5  # share of the variance above which an autoencoder leaves out more than it keeps
TRAINING_NOTE = (
    "Own training labels: accuracy on the labels, wrong ones included, that the probes were trained on. Chance\n"
    "level: of a guess, or of the most frequent class where that is more.\n"
)

Curves = dict[str, tuple[list[float], list[float]]]  # means and half-widths by arm


class Comparison(NamedTuple):
    """A line of a table of gains."""

    line: str  # its first cell
    arm: str
    over: str  # the arm that it is compared with


class OwnLabels(NamedTuple):
    """What probes fit of the labels that they were trained on, in percent."""

    accuracy: Interval
    # Of the nearest class mean by the same labels, which needs no training; not measured but for linear probes.
    class_means: Interval | None = None

    @property
    def trained(self) -> bool:
        """Whether the probes fit their labels at least as often as class means do; of none measured (NaN) too."""
        return self.class_means is None or not self.accuracy.mean < self.class_means.mean

    @property
    def text(self) -> str:
        """The accuracy as a cell of a table, marked where the probes are not trained."""
        return self.accuracy.text(1) + ("" if self.trained else " (not trained)")

    @property
    def words(self) -> str:
        """Both numbers, for the warning."""
        assert self.class_means is not None, "there is a warning only where class means are measured"
        return f"{self.accuracy.mean:.1f} %, class means {self.class_means.mean:.1f} %"


class ProbeTable:
    """Accuracies of probes of one learner in percent: arms of features x columns, with intervals over seeds.

        from vision_bench.report import ProbeTable
        from vision_bench.runs import read_rows

        rows = read_rows("runs/label_noise/results.jsonl")
        table = ProbeTable(rows, {rate: {"noise_rate": rate} for rate in (0.0, 0.8)}, ["poly", "sae"])
        print(table.mean("sae", 0.8).text(1), table.gain("sae", 0.8, over="poly").text(1, sign=True))

    An arm whose probes have several weight decays is shown with the one whose mean accuracy in a column is highest.
    Where a column has several rows of an arm and a seed, as one of many corruptions, their mean is taken.

    Args:
        rows: of the run, or of one model where it has several.
        columns: by any key, the settings that the rows of a column have. Rows that do not depend on a setting, such
            as those of training labels on the test images, are found without it.
        arms: names of features, in the order of the lines.
        comparisons: lines of the tables of gains.
        learner: of `learners.LEARNERS`.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        columns: Mapping[Hashable, Mapping[str, Any]],
        arms: Sequence[str],
        comparisons: Sequence[Comparison] = (),
        learner: str = PROBE,
    ) -> None:
        self.accuracy_metric, self.training_metrics = metrics_of(learner)
        self.rows = frame(rows)
        self.columns, self.arms, self.comparisons = columns, arms, comparisons
        self.decays: dict[Hashable, dict[str, float]] = {}  # by column and arm
        self._points = {column: self._by_seed(column) for column in columns}

    def _by_seed(self, column: Hashable) -> pd.DataFrame:
        """Accuracies in percent, a line for each arm and a column for each seed."""
        rows = select(self.rows, self.accuracy_metric, **self.columns[column])
        if DECAY in rows:
            means = rows.groupby(["features", DECAY], sort=False)["value"].agg(lambda values: over_seeds(values).mean)
            self.decays[column] = dict(means.groupby("features", sort=False).idxmax().tolist())
            rows = rows[rows[DECAY] == rows["features"].map(self.decays[column])]
        return 100 * rows.pivot_table(index="features", columns="seed", values="value")

    def select(self, metric: str, column: Hashable, **settings: Any) -> pd.DataFrame:
        """The rows of a metric in a column, without those of its settings that no row of the metric has."""
        rows = select(self.rows, metric, **settings)
        has = {
            name: value for name, value in self.columns[column].items() if name in rows and rows[name].notna().any()
        }
        return select(rows, metric, **has)

    def points(self, arm: str, column: Hashable) -> pd.Series:
        """Accuracies in percent by seed; empty if the arm has none."""
        points = self._points[column]
        return points.loc[arm] if arm in points.index else pd.Series(dtype=float)

    def mean(self, arm: str, column: Hashable) -> Interval:
        """Accuracy in percent."""
        return over_seeds(self.points(arm, column))

    def gain(self, arm: str, column: Hashable, over: str = "poly") -> Interval:
        """Points of accuracy over another arm, paired by seed."""
        return paired(self.points(arm, column), self.points(over, column))

    def growth(self, arm: str, column: Hashable, start: Hashable, over: str = "poly") -> Interval:
        """Points by which the gain over another arm is larger in `column` than in `start`, paired by seed."""
        changes = (self.points(name, column) - self.points(name, start) for name in (arm, over))
        return paired(*changes)

    def own_labels(self, arm: str, column: Hashable) -> OwnLabels:
        """Accuracy of the probes of a column on their own training labels."""
        decay = {DECAY: self.decays[column][arm]} if column in self.decays else {}
        rows = (self.select(metric, column, features=arm, **decay) for metric in self.training_metrics)
        return OwnLabels(*(over_seeds(100 * chosen["value"]) for chosen in rows))

    def chance(self, column: Hashable) -> float:
        """Accuracy by chance in percent, of the test images of a column."""
        return 100 * float(self.select(CHANCE, column)["value"].iloc[0])

    def accuracy_table(
        self, header: Sequence[str], columns: Sequence[Hashable], more: Sequence[list[str]] = ()
    ) -> str:
        """Accuracies, what the features are (`MEASURED`), and the chance level, as Markdown.

        Args:
            header: of `columns`.
            more: further lines, with a cell for the name and one for each column.
        """
        lines = [
            [arm, *(self.mean(arm, column).text(1) for column in columns), *measured_cells(self.rows, arm)]
            for arm in self.arms
        ]
        for line in (["chance level", *(f"{self.chance(column):.1f}" for column in columns)], *more):
            lines.append([*line, *["-"] * len(MEASURED)])
        return markdown_table(["features", *header, *measured_header()], lines)

    def training_table(self, header: Sequence[str], columns: Sequence[Hashable]) -> str:
        """Accuracies of the probes on their own training labels, and a warning of those that are not trained."""
        lines, cells = [], []
        for arm in self.arms:
            own = [self.own_labels(arm, column) for column in columns]
            lines.append([arm, *(labels.text for labels in own)])
            cells += [f"{arm}, {name} ({o.words})" for name, o in zip(header, own, strict=True) if not o.trained]
        title = "\nAccuracy of the probes on their own training labels, wrong ones included, %.\n\n"
        return title + markdown_table(["features", *header], lines) + untrained(cells)

    def gain_table(self, header: Sequence[str], columns: Sequence[Hashable], more: Sequence[list[str]] = ()) -> str:
        """Points gained in each column, a line for each comparison, and `more` lines, as Markdown."""
        lines = [
            [line, *(self.gain(arm, column, over).text(1, sign=True) for column in columns)]
            for line, arm, over in self.comparisons
        ]
        return markdown_table(["features", *header], [*lines, *more])

    def growth_table(self, header: Sequence[str], columns: Sequence[Hashable], starts: Sequence[Hashable]) -> str:
        """Markdown table of the growth of gains from the columns `starts` to `columns`, a line a comparison."""
        pairs = list(zip(columns, starts, strict=True))
        lines = [
            [line, *(self.growth(arm, *pair, over).text(1, sign=True) for pair in pairs)]
            for line, arm, over in self.comparisons
        ]
        return markdown_table(["features", *header], lines)

    def curves(self, columns: Sequence[Hashable]) -> dict[str, Curves]:
        """The panels of `figures.band_curves`: accuracies, and gains over poly, along the columns."""
        accuracies = {arm: [self.mean(arm, column) for column in columns] for arm in self.arms}
        gains = {arm: [self.gain(arm, column) for column in columns] for arm in self.arms if arm != "poly"}
        panels = {"accuracy, %": accuracies, "gain over poly, points": gains}
        return {label: {arm: with_widths(line) for arm, line in lines.items()} for label, lines in panels.items()}

    def bars(
        self, conditions: Mapping[str, Hashable], arms: Sequence[str]
    ) -> tuple[dict[str, dict[str, tuple[float, float]]], list[float]]:
        """The arguments of `figures.accuracy_bars`: arms in columns by what stands below them, and chance levels."""
        shown = [arm for arm in arms if arm in self.arms]
        means = {label: {arm: self.mean(arm, column) for arm in shown} for label, column in conditions.items()}
        bars = {
            label: {arm: (mean.mean, mean.half_width or 0.0) for arm, mean in group.items()}
            for label, group in means.items()
        }
        return bars, [self.chance(column) for column in conditions.values()]


def learner_title(name: str, standardize: bool) -> str:
    """What a learner is, and whether its results can say that the axes of features mean something."""
    equivariant = LEARNERS[name].is_equivariant(standardize)
    words = "equivariant under rotations" if equivariant else "not equivariant under rotations, so that axes matter"
    return f"{name} ({LEARNERS[name].words}; {words})"


def with_widths(intervals: Sequence[Interval]) -> tuple[list[float], list[float]]:
    """Means and half-widths of the intervals, for a curve with a band."""
    return [i.mean for i in intervals], [i.half_width or 0.0 for i in intervals]


def measured_header() -> list[str]:
    """The columns of `measured_cells`."""
    return [name.replace("_", " ") for name in MEASURED]


def measured_cells(rows: pd.DataFrame, arm: str) -> list[str]:
    """Cells of a table that say what the features of an arm are: `MEASURED`."""
    values = [(metric, over_seeds(select(rows, metric, features=arm)["value"])) for metric in MEASURED]
    return [value.text(0 if "live" in metric else 3) for metric, value in values]


def untrained(cells: Sequence[str]) -> str:
    """A warning of cells of a table whose probes fit their own labels less often than class means do."""
    if not cells:
        return ""
    return (
        "\n**Warning: not trained.** These probes fit the labels that they were trained on less often than the\n"
        "nearest class mean by the same labels, a linear classifier without training. Their accuracy, and gains of\n"
        "them or over them, say how far a probe came, not what the features bear: give the probes more epochs, or\n"
        "another learning rate.\n\n" + "".join(f"- {cell}\n" for cell in cells)
    )


def unexplained(shares: Mapping[str, float | None]) -> str:
    """A warning of autoencoders, by name, whose share of the variance unexplained is too large or undefined."""
    numbers = {name: math.nan if share is None else share for name, share in shares.items()}
    poor = [f"{name} ({share:.2f})" for name, share in numbers.items() if not share <= UNEXPLAINED]
    if not poor:
        return ""
    return (
        f"\n**Warning: variance unexplained above {UNEXPLAINED:g}:** {', '.join(poor)}. These latents do not\n"
        "represent the features that they are made of: what sae gains or loses says nothing about making these\n"
        "monosemantic. Train the autoencoder longer, or with more active latents.\n"
    )
