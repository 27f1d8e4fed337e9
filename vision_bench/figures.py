"""Drawings from result rows and tensors: functions that return a matplotlib figure of one column (3.4 inch)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from vision_bench.styles import MONO, POLY, Style, style_of

Curve = tuple[ArrayLike, ArrayLike]  # mean (n,) and half-width (n,) of its interval at each level

WIDTH = 3.4  # inch
SUFFIXES = ("png", "pdf")
REFERENCES = ("poly", "ce")  # arms that others are compared with: a panel without them shows differences

_HOLLOW: dict[str, Any] = {"color": "black", "markersize": 3.5, "markerfacecolor": "none", "markeredgewidth": 0.7}
_CHANCE: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 0.8, "label": "chance level"}
# Of matplotlib, within each function that draws; they leave its settings as they were.
_SETTINGS: dict[Any, Any] = {"font.size": 7, "axes.titlesize": 7, "axes.linewidth": 0.6, "lines.linewidth": 1.2}


def save(path: Path, figure: Figure | None) -> None:
    """Write `path`, a name without suffix, as PNG and PDF; where there is no figure, delete those of before.

    Example:
        >>> figure = accuracy_bars({"clean": {"poly": (90.0, 0.5), "sae": (89.0, 0.4)}}, chance=[10.0])
        >>> save(Path("figure_1b"), figure)  # writes figure_1b.png and figure_1b.pdf
    """
    for suffix in SUFFIXES:
        file = path.with_name(f"{path.name}.{suffix}")
        if figure is None:
            file.unlink(missing_ok=True)
        else:
            figure.savefig(file, dpi=300)


@matplotlib.rc_context(_SETTINGS)
def separability_curves(panels: Sequence[Sequence[Mapping[str, Any]]]) -> Figure:
    """The criterion of both representations against the noise, with the crossing marked or its absence stated.

    A panel has `title`, `label` of the noise axis, `levels` (n,), `mono` (n,), `poly` (n,) and `crossing`, the level
    where mono overtakes poly or None.
    """
    figure, axes = _figure(len(panels), len(panels[0]), height=1.45 * len(panels))
    for ax, panel in zip(axes.flat, chain(*panels), strict=True):
        for arm in ("mono", "poly"):
            ax.plot(panel["levels"], panel[arm], style_of(arm).line, color=style_of(arm).colour, label=arm)
        ax.set(title=panel["title"], xlabel=panel["label"], xlim=(panel["levels"][0], panel["levels"][-1]))
        crossing = panel["crossing"]
        text = "no crossing" if crossing is None else f"crossing at {crossing:.3f}"
        ax.text(0.97, 0.95, text, transform=ax.transAxes, ha="right", va="top")
        if crossing is not None:
            height = np.interp(crossing, panel["levels"], panel["mono"])
            ax.plot(crossing, height, "o", markersize=3.5, markerfacecolor="white", markeredgecolor="black", zorder=3)
        ax.margins(y=0.12)
    for ax in axes[:, 0]:
        ax.set_ylabel("criterion J")
    return _with_legend(figure, axes.flat[0])


@matplotlib.rc_context(_SETTINGS)
def gram_heatmaps(grams: Mapping[str, ArrayLike]) -> Figure:
    """W^T W (n, n) of several encoders side by side, by title (Fig. 5a)."""
    figure, axes = _figure(1, len(grams), height=WIDTH / len(grams) + 0.1)
    for ax, (title, gram) in zip(axes.flat, grams.items(), strict=True):
        image = ax.imshow(gram, cmap="PuOr_r", vmin=-1, vmax=1, interpolation="nearest")
        ax.set(title=title, xlabel="feature")
    axes.flat[0].set_ylabel("feature")
    figure.colorbar(image, ax=list(axes.flat), label="$W^T W$", shrink=0.75)
    return figure


@matplotlib.rc_context(_SETTINGS)
def accuracy_bars(
    conditions: Mapping[str, Mapping[str, tuple[float, float]]], chance: Sequence[float] | None = None
) -> Figure:
    """Accuracy of several arms side by side by condition (Fig. 1b, Fig. 5b).

    `conditions` has, by the name below the bars and by arm (the same in all), mean and half-width of the interval, and
    `chance` the chance level of each; in percent.
    """
    figure, axes = _figure(1, 1, height=1.9)
    ax, places = axes.flat[0], np.arange(len(conditions))
    arms = list(next(iter(conditions.values())))
    width = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        means, errors = zip(*(values[arm] for values in conditions.values()), strict=True)
        style, middle = style_of(arm), places + (i - (len(arms) - 1) / 2) * width
        look = {"color": style.colour, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0}
        look |= {"yerr": errors, "error_kw": {"elinewidth": 0.8, "capsize": 2}}
        ax.bar(middle, means, 0.95 * width, label=arm.replace("_", " "), **look)
    if chance is not None:
        ax.hlines(chance, places - 0.45, places + 0.45, **_CHANCE)
    ax.set(xticks=places, xticklabels=list(conditions), ylabel="test accuracy, %", ylim=(0, None))
    return _with_legend(figure, ax)


@matplotlib.rc_context(_SETTINGS)
def band_curves(
    levels: Sequence[float],
    panels: Mapping[str, Mapping[str, Curve]],
    label: str,
    chance: Sequence[float] | None = None,
    *,
    logarithmic: bool = False,
    published: Mapping[float | None, float] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Figure:
    """Curves of arms with bands of their 95 % intervals, panels above each other (Fig. 2, Fig. 3).

    Args:
        levels: (n,), what the horizontal axis, named `label`, shows: a noise, epochs, training images.
        panels: by the name of the vertical axis, the curve of each arm. A panel without an arm of `REFERENCES` is of
            differences from it and has a line at 0. NaN leaves a gap.
        chance: (n,), the chance level of the accuracies, in percent; without it the levels are marked by dots.
        logarithmic: whether the horizontal axis is, with a tick at every level.
        published: the paper's largest differences, in the panels of differences, by level: a hollow marker, or a thin
            line under None, where the paper does not say at which level.
        notes: what the legend says behind the names of arms, such as "diverged".
    """
    height = 1.45 * len(panels) + 0.5 if chance is None else 1.7 * len(panels) + 0.4
    figure, axes = _figure(len(panels), 1, height=height, sharex=True)
    marker = "o" if chance is None and len(levels) < 20 else ""
    for ax, (name, curves) in zip(axes.flat, panels.items(), strict=True):
        for arm, curve in curves.items():
            text = ", ".join(filter(None, [arm.replace("_", " "), (notes or {}).get(arm)]))
            # Bands of the controls are fainter: five of them hide each other.
            _curve(ax, levels, curve, style_of(arm), text, band=0.07 if "+" in arm else 0.2, marker=marker)
        ax.set_ylabel(name)
        if logarithmic:
            ax.set_xscale("log")
            ax.set_xticks(levels, [f"{level:g}" for level in levels])
            ax.minorticks_off()
        if not curves.keys().isdisjoint(REFERENCES):
            _finish_accuracies(ax, levels, chance)
        else:
            ax.axhline(0, color="black", linewidth=0.6)
            for level, most in (published or {}).items():
                _published(ax, level, most, leftwards=level == max(levels))
    axes.flat[-1].set_xlabel(label)
    return _with_legend(figure, axes.flat[0])


@matplotlib.rc_context(_SETTINGS)
def loss_curves(levels: Sequence[float], curves: Mapping[tuple[str, str], Curve], chance: float) -> Figure:
    """Accuracy against the label noise for kinds of features (colour) with two losses (dashed, solid; Fig. 6).

    `levels` (n,) are shares of wrong labels, curves are by (features, loss), the first loss dashed; in percent.
    """
    figure, axes = _figure(1, 1, height=2.4)
    ax = axes.flat[0]
    losses = list(dict.fromkeys(loss for _, loss in curves))
    for (arm, loss), curve in curves.items():
        style = style_of(arm)._replace(line=("--", "-")[losses.index(loss)])
        _curve(ax, levels, curve, style, f"{arm.replace('_', ' ')}, {loss}", band=0.15)
    ax.set(xlabel="share of wrong training labels, %", ylabel="test accuracy, %")
    _finish_accuracies(ax, levels, [chance] * len(levels))
    return _with_legend(figure, ax)


def _published(ax: Axes, level: float | None, most: float, leftwards: bool) -> None:
    """The paper's largest difference, at a level, with its name on one side, or at none."""
    text = f"paper, ImageNet-100: {most:+g} at most"
    if level is None:
        ax.axhline(most, color="black", linestyle=":", linewidth=0.7)
        ax.annotate(text, (0, most), (3, -2), ax.get_yaxis_transform(), "offset points", va="top", size=6)
    else:
        ax.plot(level, most, "o", **_HOLLOW)
        side, offset = ("right", -5) if leftwards else ("left", 5)
        ax.annotate(text, (level, most), (offset, 0), textcoords="offset points", ha=side, va="center", size=6)
    ax.margins(y=0.15)


@matplotlib.rc_context(_SETTINGS)
def phase_diagram(
    gains: Mapping[str, ArrayLike],
    half_widths: Mapping[str, ArrayLike],
    samples: Sequence[int],
    sparsities: Sequence[float],
) -> Figure:
    """Gain of mono over poly against the number of samples and the sparsity, one panel for each condition.

    `gains` and the `half_widths` of their intervals (NaN where there is none) are by title, (sparsities, samples), in
    points of accuracy. A gain is in bold type where its interval leaves out 0.
    """
    figure, axes = _figure(1, len(gains), height=1.9)
    for ax, title in zip(axes.flat, gains, strict=True):
        gain, half_width = np.asarray(gains[title], dtype=float), np.asarray(half_widths[title])
        limit = max(float(np.nanmax(np.abs(gain))), 1e-9)
        ax.imshow(gain, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
        for (row, column), value in np.ndenumerate(gain):
            weight = "bold" if abs(value) > half_width[row, column] else "normal"
            colour = "white" if abs(value) > 0.5 * limit else "black"
            ax.text(column, row, f"{value:+.1f}", ha="center", va="center", size=6, weight=weight, color=colour)
        ax.set(title=title, xlabel="training samples")
        ax.set_xticks(range(len(samples)), [f"{count / 1000:g}k" for count in samples])
        ax.set_yticks(range(len(sparsities)), [f"{s:g}" if ax is axes.flat[0] else "" for s in sparsities])
    axes.flat[0].set_ylabel("sparsity S")
    figure.suptitle("mono $-$ poly, points of accuracy (bold: more than the interval)", size=7)
    return figure


@matplotlib.rc_context(_SETTINGS)
def gains_beside_paper(
    levels: Sequence[float],
    ours: Mapping[str, Curve],
    published: Mapping[str, Mapping[str, Mapping[float, float]]],
    label: str,
) -> Figure:
    """Points of accuracy gained over poly against the level of a noise, a panel for each other kind of features.

    `ours` are drawn as lines with bands, the `published` gains by data set, kind of features and level as markers.
    """
    figure, axes = _figure(1, len(ours), height=2.0)
    for ax, (arm, curve) in zip(axes.flat, ours.items(), strict=True):
        _curve(ax, levels, curve, style_of(arm), "ours")
        for marker, (data, arms) in zip("o^sD", published.items(), strict=False):
            places, values = zip(*sorted(arms[arm].items()), strict=True)
            ax.plot(places, values, marker, **_HOLLOW, label=f"paper, {data}")
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set(title=arm, xlabel=label)
    axes.flat[0].set_ylabel("gain over poly, points")
    return _with_legend(figure, axes.flat[0])


class Histogram(NamedTuple):
    """How the consistencies of a group of samples are spread, and the mean and chance level to mark."""

    shares: ArrayLike  # (bins,), of the group's samples in equal bins from 0 on; empty bins at the end may be missing
    mean: float
    interval: tuple[float, float]  # of the mean
    chance: float  # the mean with shuffled labels


@matplotlib.rc_context(_SETTINGS)
def consistency_histograms(panels: Mapping[str, Mapping[str, Histogram]], bins: int) -> Figure:
    """Semantic consistency of right and wrong samples, a panel above the other for each kind of features (Fig. 4c).

    `bins` is the number of bins of [0, 1]; neighbours are drawn as one where there are many. Above the bars stand the
    means with their intervals; dotted lines mark their chance levels.
    """
    figure, axes = _figure(len(panels), 1, height=1.3 * len(panels) + 0.3)
    styles = {"right": (MONO, 0.93), "wrong": (POLY._replace(marker="s"), 0.83)}
    for ax, (name, groups) in zip(axes.flat, panels.items(), strict=True):
        ends = [int((np.cumsum(h.shares) < 1 - 5e-3).sum()) for h in groups.values()]  # without a far tail of samples
        last = max(*ends, *(int(bins * h.interval[1]) + 1 for h in groups.values())) + 1
        merged = max(1, last // 40)
        edges = np.arange(0, last + merged, merged)
        for group, histogram in groups.items():
            style, height = styles[group]
            padded = np.pad(np.asarray(histogram.shares), (0, int(edges[-1])))
            heights = [100 * padded[low : low + merged].sum() for low in edges[:-1]]
            ax.stairs(heights, edges / bins, color=style.colour, linestyle=style.line, linewidth=1, label=group)
            ax.stairs(heights, edges / bins, color=style.colour, fill=True, alpha=0.12)
            mean, (low, high) = histogram.mean, histogram.interval
            xerr = [[max(mean - low, 0)], [max(high - mean, 0)]]
            look = {"color": style.colour, "marker": style.marker, "markersize": 3.5, "capsize": 2, "elinewidth": 1}
            ax.errorbar(mean, height, xerr=xerr, transform=ax.get_xaxis_transform(), **look)
        for histogram in groups.values():
            ax.axvline(histogram.chance, color="black", linestyle=":", linewidth=0.7, label="mean by chance")
        ax.set(title=name, ylabel="samples, %", xlim=(0, edges[-1] / bins), ylim=(0, 1.3 * ax.get_ylim()[1]))
    axes.flat[-1].set_xlabel("semantic consistency of the most active dimension")
    return _with_legend(figure, axes.flat[0])


@matplotlib.rc_context(_SETTINGS)
def robustness_dots(
    panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]], learner: str
) -> Figure:
    """Accuracy under each corruption, with 95 % intervals, of the kinds of features of several models.

    `panels` has, by model, kind of features and corruption, mean and half-width of the accuracy and its chance level,
    in percent; the corruptions, the clean condition first, are the same in all.
    """
    return _dots(panels, f"test accuracy of {learner}, %", _CHANCE, xlim=(0, None))


@matplotlib.rc_context(_SETTINGS)
def gain_dots(panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]], learner: str) -> Figure:
    """Parts of gains of a learner: mean and half-width, in points, by kind of features, part and corruption."""
    zeros = {
        kind: {part: {name: (*value, 0.0) for name, value in by_name.items()} for part, by_name in by_part.items()}
        for kind, by_part in panels.items()
    }
    return _dots(zeros, f"points of accuracy of {learner}", {"color": "black", "linewidth": 0.6})


def _dots(
    panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]],
    label: str,
    reference: Mapping[str, Any],
    xlim: tuple[float | None, float | None] = (None, None),
) -> Figure:
    """Panels above each other, each with a row of dots for a condition and a line, `reference`, behind it."""
    conditions = list(next(iter(next(iter(panels.values())).values())))
    names = [name.split("/")[-1] for name in conditions]
    names = [name if names.count(name) == 1 else whole for name, whole in zip(names, conditions, strict=True)]
    titles = [_wrapped(model, 30) for model in panels]
    row = max(0.2, 0.05 * max(map(len, panels.values())))
    height = len(panels) * (row * len(conditions) + 0.35) + 0.13 * "".join(titles).count("\n") + 0.5
    figure, axes = _figure(len(panels), 1, height=height, sharex=True)
    for ax, title, kinds in zip(axes.flat, titles, panels.values(), strict=True):
        rows = np.arange(len(conditions))
        for i, (kind, values) in enumerate(kinds.items()):
            means, errors, chance = zip(*(values[name] for name in conditions), strict=True)
            places = rows + min(0.22, 0.85 / len(kinds)) * (i - (len(kinds) - 1) / 2)
            style = style_of(kind)
            bars = {"xerr": errors, "elinewidth": 0.8, "capsize": 1.5}
            ax.errorbar(means, places, fmt=style.marker, color=style.colour, markersize=3, label=kind, **bars)
        ax.vlines(chance, rows - 0.45, rows + 0.45, **reference)
        ax.set(title=title, yticks=range(len(conditions)), yticklabels=[_wrapped(name, 24) for name in names])
        ax.set(ylim=(len(conditions) - 0.5, -0.5), axisbelow=True)
        ax.grid(axis="x", linewidth=0.3)
    axes.flat[-1].set(xlabel=label, xlim=xlim)
    return _with_legend(figure, *axes.flat)


def _wrapped(name: str, width: int) -> str:
    """A name in lines of at most `width` characters, which end behind a mark or space where there is one."""
    return "\n".join(re.findall(rf".{{1,{width}}}$|.{{1,{width}}}(?<=[\W_])|.{{1,{width}}}", name))


class ImageGrid(NamedTuple):
    """The images that activate a dimension most."""

    title: str
    images: torch.Tensor  # uint8 (k, 3, h, w)
    classes: Sequence[str]  # of the images


def readable(name: str) -> str:
    """A class name in a picture: without underscores, and of several names the first."""
    return name.partition(",")[0].replace("_", " ")


@matplotlib.rc_context(_SETTINGS)
def image_grids(blocks: Mapping[str, Sequence[ImageGrid]]) -> Figure:
    """Grids of images with the names of their classes, a row for each kind of features (Fig. 1a, Fig. 4a, b).

    Images of the grid's most frequent class have a thick blue frame and bold names.
    """
    columns = max(len(grids) for grids in blocks.values())
    side = int(np.ceil(max(len(grid.classes) for grids in blocks.values() for grid in grids) ** 0.5))
    figure = Figure(figsize=(WIDTH, len(blocks) * (1.12 * WIDTH / columns + 0.25)))
    figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    rows = figure.subfigures(len(blocks), columns, squeeze=False, hspace=0.02, wspace=0.04)
    for (kind, grids), parts in zip(blocks.items(), rows, strict=True):
        for grid, part in zip(grids, parts, strict=False):
            part.suptitle(f"{kind}, {grid.title}", size=6)
            count, most = max((list(grid.classes).count(label), label) for label in grid.classes)
            places = list(part.subplots(side, side, squeeze=False).flat)
            for ax in places:
                ax.set(xticks=[], yticks=[], visible=False)
            for ax, image, label in zip(places, grid.images, grid.classes, strict=False):
                ax.set_visible(True)
                ax.imshow(np.asarray(image).transpose(1, 2, 0), interpolation="nearest")
                name, same = readable(label), label == most and count > 1
                name = name if len(name) < 15 else f"{name[:13]}…"
                ax.set_title(name, size=4.5, weight="bold" if same else "normal", pad=1.5)
                for spine in ax.spines.values():
                    spine.set(color=MONO.colour if same else "#999999", linewidth=1.4 if same else 0.4)
    return figure


def _curve(
    ax: Axes, levels: Sequence[float], curve: Curve, style: Style, label: str, band: float = 0.2, marker: str = ""
) -> None:
    """A line with its interval as a band of the opacity `band`, or as a bar where one level leaves a band no width."""
    mean, half_width = map(np.asarray, curve)
    ax.plot(levels, mean, color=style.colour, linestyle=style.line, label=label, marker=marker, markersize=2)
    if len(levels) == 1:
        ax.errorbar(levels, mean, yerr=half_width, color=style.colour, fmt="o", markersize=2, capsize=2)
    ax.fill_between(levels, mean - half_width, mean + half_width, color=style.colour, alpha=band, linewidth=0)


def _finish_accuracies(ax: Axes, levels: Sequence[float], chance: Sequence[float] | None) -> None:
    """Draw the chance level and end the axes where levels and shares do, beyond which an interval may reach."""
    margin = 1 if chance is None else 0  # for the dots that mark the levels
    if chance is not None and len(levels) > 1:
        ax.plot(levels, chance, **_CHANCE)
        ax.set_xlim(levels[0], levels[-1])
    elif chance is not None:
        ax.axhline(chance[0], **_CHANCE)
    low, high = ax.get_ylim()
    ax.set_ylim(max(-margin, low), min(100 + margin, high))


def _figure(rows: int, columns: int, height: float, sharex: bool = False) -> tuple[Figure, np.ndarray[Any, Any]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=sharex)


def _with_legend(figure: Figure, *axes: Axes) -> Figure:
    """The figure with a legend of what is drawn in the axes, each name once, in as many columns as are not cut."""
    named = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    for columns in range(min(len(named), 3), 0, -1):
        legend = figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=columns, frameon=False)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    return figure
