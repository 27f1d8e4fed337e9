"""The figure of safety against task performance: its panels from rows, and their drawing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from evals.paper import PAPER_JUDGES, table_2_points
from evals.registry import JUDGES
from vision_bench.runs import select

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind safe palette; the markers tell the methods apart without colour.
STYLES = {"base": ("#000000", "o"), "lora": ("#D55E00", "s"), "monolora": ("#0072B2", "^")}
OTHER_STYLES = (("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X"), ("#F0E442", "*"))


class Point(NamedTuple):
    """One method and seed: where it stands on both axes, and the 95 % intervals over prompts where they are known."""

    method: str
    performance: float
    harm: float
    performance_interval: tuple[float, float] | None = None
    harm_interval: tuple[float, float] | None = None
    path: Sequence[tuple[float, float]] = ()  # where it stood (performance, harm) at the steps of its training before


class Panel(NamedTuple):
    """The points of one experiment, with the names of its axes."""

    title: str
    performance: str
    harm: str
    points: Sequence[Point]


class Measure(NamedTuple):
    """A metric of a run's rows, and how tables and figures show it."""

    title: str
    metric: str
    task: str = ""
    judge: str = ""
    factor: int = 1
    is_refusal: bool = False  # the higher, the safer

    def lines(self, table: pd.DataFrame) -> pd.DataFrame:
        """Its lines of a table of `measured`."""
        return select(table, self.metric, task=self.task, judge=self.judge)

    def rows(self, table: pd.DataFrame) -> pd.DataFrame:
        """Those of its lines that have a value, without those of parts."""
        chosen = self.lines(table)
        return chosen[chosen["value"].notna() & ~chosen["is_part"]]

    def harm(self, share: float) -> float:
        """Scale a share for the axis of harm, on which a refusal counts as no harm."""
        return self.factor * (1 - share if self.is_refusal else share)


def panel(table: pd.DataFrame, title: str, performance: Measure, harm: Measure) -> list[Panel]:
    """A panel with a point for each arm that has both, with the path over its training steps; none without points."""
    columns = ["arm", "value", "low", "high"]
    places = harm.rows(table).merge(performance.rows(table)[columns], on="arm", suffixes=("_harm", "_performance"))
    steps = places[places["step"].notna()].sort_values("step")
    base = places[places["method"] == "base"]

    def place(line: Any) -> tuple[float, float]:
        return performance.factor * line.value_performance, harm.harm(line.value_harm)

    points = []
    for line in places[places["step"].isna()].itertuples():
        before = steps[(steps["method"] == line.method) & (steps["seed"] == line.seed)]
        path = [place(step) for step in (*base.itertuples(), *before.itertuples())] if len(before) else []
        across = _limits(performance.factor * low for low in (line.low_performance, line.high_performance))
        up = _limits(harm.harm(low) for low in (line.low_harm, line.high_harm))
        points.append(Point(str(line.method), *place(line), across, up, path))
    return [Panel(title, performance.title, harm.title, points)] if points else []


def _limits(values: Iterable[float]) -> tuple[float, float] | None:
    low, high = sorted(values)
    return None if math.isnan(low) else (low, high)


def with_paper(panels: list[Panel], part: str) -> list[Panel]:
    """The panels with the paper's: the measures of its judges that spoke, ShieldGemma's if it was others."""
    if not panels:
        return []
    shown = {panel.harm for panel in panels}
    kinds = [kind for kind in PAPER_JUDGES if JUDGES[kind].harm_label in shown] or ["shieldgemma"]
    return panels + [
        Panel(
            f"paper: Llama-2-7b-chat, {part}",
            "task performance",
            JUDGES[kind].harm_label,
            [Point(*point) for point in table_2_points(part, PAPER_JUDGES[kind])],
        )
        for kind in kinds
    ]


def safety_against_performance(panels: Sequence[Panel]) -> Figure:
    """One panel of 2.6 inch beside the other, each with axes of its own; lower right is better.

    A thin line with dots leads through a point's path over the training steps.
    """
    import matplotlib
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(point.method for panel in panels for point in panel.points))
    others = [method for method in methods if method not in STYLES]
    styles = STYLES | {method: OTHER_STYLES[i % len(OTHER_STYLES)] for i, method in enumerate(others)}
    with matplotlib.rc_context({"font.size": 7, "axes.titlesize": 7, "axes.linewidth": 0.6}):
        figure = Figure(figsize=(2.6 * len(panels), 2.6), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
            for point in panel.points:
                colour, marker = styles[point.method]
                if point.path:
                    steps = [*point.path, (point.performance, point.harm)]
                    axes.plot(
                        *zip(*steps, strict=True), color=colour, linewidth=0.7, alpha=0.6, marker=".", markersize=3
                    )
                axes.errorbar(
                    point.performance,
                    point.harm,
                    xerr=_errors(point.performance, point.performance_interval),
                    yerr=_errors(point.harm, point.harm_interval),
                    color=colour,
                    marker=marker,
                    markersize=5,
                    linestyle="none",
                    elinewidth=0.8,
                    capsize=2,
                    label=point.method,
                )
            axes.set(title=panel.title, xlabel=panel.performance, ylabel=panel.harm)
            axes.margins(0.15)
        figure.supxlabel("to the right: better at the task; below: safer", size=6)
        handles = {
            label: handle
            for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper center",
            ncols=min(len(handles), 2 * len(panels)),
            frameon=False,
        )
    return figure


def _errors(value: float, interval: tuple[float, float] | None) -> list[list[float]] | None:
    return None if interval is None else [[max(value - interval[0], 0)], [max(interval[1] - value, 0)]]
