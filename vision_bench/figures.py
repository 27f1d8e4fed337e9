"""Drawings from result rows and tensors: functions that return a matplotlib figure of one column (3.4 inch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

WIDTH = 3.4  # inch
# Okabe and Ito's colour-blind safe palette; black and white prints tell the arms apart by line style or hatch.
COLOURS = {"mono": "#0072B2", "poly": "#D55E00"}
LINES = {"mono": "-", "poly": "--"}
_STYLE: dict[Any, Any] = {"font.size": 7, "axes.titlesize": 7, "axes.linewidth": 0.6, "lines.linewidth": 1.2}


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw with `_STYLE`, and leave matplotlib's settings as they were."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def separability_curves(panels: Sequence[Sequence[Mapping[str, Any]]]) -> Figure:
    """The criterion of both representations against the noise, with the crossing marked or its absence stated.

    Args:
        panels: rows of panels, each with `title`, `label` of the noise axis, `levels` (n,), `mono` (n,), `poly` (n,)
            and `crossing`, the level where mono overtakes poly or None.
    """
    figure, axes = _figure(len(panels), len(panels[0]), height=1.45 * len(panels))
    for ax, panel in zip(axes.flat, (panel for row in panels for panel in row), strict=True):
        for arm in COLOURS:
            ax.plot(panel["levels"], panel[arm], LINES[arm], color=COLOURS[arm], label=arm)
        ax.set(title=panel["title"], xlabel=panel["label"], xlim=(panel["levels"][0], panel["levels"][-1]))
        crossing = panel["crossing"]
        if crossing is None:
            ax.text(0.97, 0.95, "no crossing", transform=ax.transAxes, ha="right", va="top")
        else:
            height = np.interp(crossing, panel["levels"], panel["mono"])
            ax.plot(crossing, height, "o", markersize=3.5, markerfacecolor="white", markeredgecolor="black", zorder=3)
            ax.text(0.97, 0.95, f"crossing at {crossing:.3f}", transform=ax.transAxes, ha="right", va="top")
        ax.margins(y=0.12)
    for ax in axes[:, 0]:
        ax.set_ylabel("criterion J")
    _legend(figure, axes.flat[0])
    return figure


@_styled
def gram_heatmaps(grams: Mapping[str, ArrayLike]) -> Figure:
    """W^T W (n, n) of several encoders side by side, by title (Fig. 5a)."""
    figure, axes = _figure(1, len(grams), height=WIDTH / len(grams) + 0.1)
    for ax, (title, gram) in zip(axes.flat, grams.items(), strict=True):
        image = ax.imshow(gram, cmap="PuOr_r", vmin=-1, vmax=1, interpolation="nearest")
        ax.set(title=title, xlabel="feature")
    axes.flat[0].set_ylabel("feature")
    figure.colorbar(image, ax=list(axes.flat), label="$W^T W$", shrink=0.75)
    return figure


@_styled
def accuracy_bars(conditions: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
    """Accuracy of mono and poly side by side by condition (Fig. 5b).

    Args:
        conditions: by the name below the bars, mean and half-width of the interval of each arm, in percent.
    """
    figure, axes = _figure(1, 1, height=1.9)
    ax = axes.flat[0]
    places = np.arange(len(conditions))
    for offset, arm, hatch in ((-0.2, "mono", ""), (0.2, "poly", "////")):
        means, errors = zip(*(arms[arm] for arms in conditions.values()), strict=True)
        style = {"color": COLOURS[arm], "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        ax.bar(
            places + offset, means, 0.38, yerr=errors, error_kw={"elinewidth": 0.8, "capsize": 2}, label=arm, **style
        )
    ax.set(xticks=places, xticklabels=list(conditions), ylabel="test accuracy, %")
    _legend(figure, ax)
    return figure


@_styled
def phase_diagram(
    gains: Mapping[str, ArrayLike],
    half_widths: Mapping[str, ArrayLike],
    samples: Sequence[int],
    sparsities: Sequence[float],
) -> Figure:
    """Gain of mono over poly against the number of samples and the sparsity, one panel for each condition.

    A cell shows the gain in points; it is in bold type where its interval leaves out 0.

    Args:
        gains: by title, array (sparsities, samples), in points of accuracy.
        half_widths: of the intervals of the gains, same shape; NaN where there is none.
        samples, sparsities: names of the columns and the rows.
    """
    figure, axes = _figure(1, len(gains), height=1.9)
    values = {title: np.asarray(gain, dtype=float) for title, gain in gains.items()}
    for ax, (title, gain) in zip(axes.flat, values.items(), strict=True):
        limit = max(float(np.nanmax(np.abs(gain))), 1e-9)
        ax.imshow(gain, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
        for (row, column), value in np.ndenumerate(gain):
            certain = abs(value) > np.asarray(half_widths[title])[row, column]
            ax.text(
                column,
                row,
                f"{value:+.1f}",
                ha="center",
                va="center",
                size=6,
                weight="bold" if certain else "normal",
                color="white" if abs(value) > 0.5 * limit else "black",
            )
        ax.set(title=title, xlabel="training samples", xticks=range(len(samples)), yticks=range(len(sparsities)))
        ax.set_xticklabels([f"{count / 1000:g}k" for count in samples])
        ax.set_yticklabels([f"{sparsity:g}" for sparsity in sparsities] if ax is axes.flat[0] else [])
    axes.flat[0].set_ylabel("sparsity S")
    figure.suptitle("mono $-$ poly, points of accuracy (bold: more than the interval)", size=7)
    return figure


def _figure(rows: int, columns: int, height: float) -> tuple[Figure, np.ndarray[Any, Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _legend(figure: Figure, ax: Axes) -> None:
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
