"""The figure of README: how an adapter adds exactly nothing, and what that was measured to keep.

    python recipes/front_page.py --rows docs/results/silence_frontier.csv --output docs/figures/front_page.png

Left: a plane of inputs with three units of an encoder. A unit adds to the layer's output on its side of its line, and
where all are on their other side the layer is the base's; a picture of the idea, without data. Right, with `--rows`:
the task's accuracy against harmful requests that are not refused, means over seeds with their 95 % intervals, of the
rows that recipes/silence_frontier.py writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from frontier import ACCURACY, HARMS, methods_of, read_lines, styles_of, values

from vision_bench.runs import over_seeds, run_as_program

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Three units as (a, b), which fire where a x + b > 0, and where the texts are that must not change.
_ENCODER, _BIAS = np.array([[1.0, 0.25], [0.5, 1.0], [-0.2, 1.0]]), np.array([-0.2, -0.3, -0.55])
_SILENT_CENTRE, _TASK_CENTRE = (-0.65, -0.4), (0.8, 0.75)
CONDITION = "10 % poison"


def draw_idea(axes: Axes) -> None:
    """Shade a plane by how many units fire, with the texts that must not change where none does."""
    grid = np.stack(np.meshgrid(np.linspace(-1.6, 1.6, 400), np.linspace(-1.3, 1.5, 400)), -1)
    firing = (grid @ _ENCODER.T + _BIAS > 0).sum(-1)
    axes.contourf(
        grid[..., 0],
        grid[..., 1],
        firing,
        [-0.5, 0.5, 1.5, 2.5, 3.5],
        colors=["#FFFFFF", "#E3EEF6", "#C1DAEB", "#99C3DE"],
    )
    for a, b in zip(_ENCODER, _BIAS, strict=True):
        axes.contour(grid[..., 0], grid[..., 1], grid @ a + b, [0.0], colors="#0072B2", linewidths=0.9)
    rng = np.random.default_rng(0)
    for centre, colour, text in (
        (_SILENT_CENTRE, "#666666", "texts that must not change:\nthe layer is the base's, exactly"),
        (_TASK_CENTRE, "#0072B2", "the task: units fire"),
    ):
        points = rng.normal(centre, 0.16, (25, 2))
        axes.scatter(points[:, 0], points[:, 1], 9, color=colour, linewidth=0, zorder=3)
        axes.annotate(text, (centre[0], centre[1] - 0.45), ha="center", va="top", size=6.5, color=colour)
    axes.set(xticks=[], yticks=[], title="h = W x + s B ReLU(A x + b)")
    axes.title.set_fontsize(9)


def draw_frontier(axes: Axes, lines: pd.DataFrame, methods: Sequence[str]) -> None:
    """Draw each arm's accuracy against harmful prompts that are not refused, in percent."""
    harm = next((measure for measure in HARMS if len(measure.rows(lines))), HARMS[0])
    for method, (colour, marker) in styles_of(methods).items():
        across, up = (over_seeds(values(lines, measure, method)) for measure in (ACCURACY, harm))
        axes.errorbar(
            across.mean, up.mean, xerr=across.half_width, yerr=up.half_width, color=colour, marker=marker,
            markersize=5, elinewidth=0.7, linestyle="", label=method,
        )  # fmt: skip
    axes.set(xlabel=ACCURACY.title, ylabel=harm.title, title=CONDITION, ylim=(-5, 105))
    axes.title.set_fontsize(9)
    axes.legend(frameon=False, fontsize=6.5, loc="upper left", bbox_to_anchor=(1, 1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure.

    Raises:
        ValueError: the rows lack what is to be drawn.
    """
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description="The figure of README.")
    parser.add_argument("--rows", type=Path, help="a frontier.csv; without it the left part is drawn alone")
    parser.add_argument("--methods", nargs="+", help="arms of the rows, in the order of the legend; else all")
    parser.add_argument("--output", type=Path, default=Path("docs/figures/front_page.png"))
    settings = parser.parse_args(arguments)
    panels = read_lines([str(settings.rows)]) if settings.rows else {}
    if settings.rows and CONDITION not in panels:
        raise ValueError(f"--rows {settings.rows} has {', '.join(panels)}, and no rows of {CONDITION!r}.")
    if lacking := set(settings.methods or ()) - set(panels[CONDITION]["method"] if panels else ()):
        raise ValueError(
            f"--methods has {', '.join(sorted(lacking))}, of which --rows {settings.rows} has no rows of "
            f"{CONDITION!r}."
        )
    figure = Figure(figsize=(8.2 if settings.rows else 3.6, 2.9), layout="constrained")
    if settings.rows:
        idea, frontier = figure.subplots(1, 2, width_ratios=[1, 1])
        lines = panels[CONDITION]
        draw_frontier(frontier, lines, settings.methods or methods_of(lines))
    else:
        idea = figure.subplots()
    draw_idea(idea)
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.output, dpi=130)


if __name__ == "__main__":
    run_as_program(main)
