"""What a gain over raw features consists of: the scale, the kernel and the basis; and what tuning would have gained.

Of each kind of features whose twin in a random basis (`kinds.RANDOM_BASIS`) is beside it, in points of accuracy:

    gain = scale + kernel + basis
    scale = unit - raw, kernel = twin - unit, basis = kind - twin

docs/basis.md explains it.

    from vision_bench import gain_parts

    names = gain_parts.RawNames("raw", "unit")
    if gain_parts.explained_kinds(table.arms, names):  # table is a `report.ProbeTable`
        print(gain_parts.markdown(table, {"clean": "clean", "40 % wrong labels": 0.4}, names))
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from vision_bench.kinds import RANDOM_BASIS
from vision_bench.report import ProbeTable
from vision_bench.runs import Interval, markdown_table, paired

GAIN, SCALE, TUNING, KERNEL, BASIS = "gain over raw", "scale", "tuning", "kernel", "basis"


class RawNames(NamedTuple):
    """How a table calls raw features, and the L2-normalised ones."""

    raw: str
    unit: str


def explained_kinds(arms: Sequence[str], names: RawNames) -> list[str]:
    """The arms whose gain can be taken apart, because the arms that this takes are there too."""
    if not set(names) <= set(arms):
        return []
    return [arm for arm in arms if arm not in names and arm + RANDOM_BASIS in arms]


def parts(
    table: ProbeTable, kind: str, column: Hashable, names: RawNames, tuned: ProbeTable | None = None
) -> dict[str, Interval]:
    """The gain of a kind in a column and what it consists of, in points of accuracy, each paired by seed.

    Args:
        kind: one of `explained_kinds`.
        tuned: a table with the same columns of tuned probes of raw features; without it there is no `TUNING`.
    """
    raw, unit = names
    twin = kind + RANDOM_BASIS
    found = {GAIN: table.gain(kind, column, over=raw), SCALE: table.gain(unit, column, over=raw)}
    if tuned is not None:
        found[TUNING] = paired(tuned.points(raw, column), table.points(raw, column))
    return found | {KERNEL: table.gain(twin, column, over=unit), BASIS: table.gain(kind, column, over=twin)}


def dots(
    table: ProbeTable, columns: Mapping[str, Hashable], names: RawNames, tuned: ProbeTable | None = None
) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """The panels of `figures.gain_dots`: `parts` of every gain by kind, part and column; none if none is explained.

    `columns` are by the names that they are shown with.
    """
    panels: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for kind in explained_kinds(table.arms, names):
        for shown, column in columns.items():
            for part, gain in parts(table, kind, column, names, tuned).items():
                panels.setdefault(kind, {}).setdefault(part, {})[shown] = gain.mean, gain.half_width or 0.0
    return panels


def markdown(
    table: ProbeTable,
    columns: Mapping[str, Hashable],
    names: RawNames,
    tuned: ProbeTable | None = None,
    *,
    is_equivariant: bool = True,
) -> str:
    """A table with a line for each kind and column, and what it says, as Markdown.

    Args:
        table, names, tuned: as in `parts`; at least one kind can be explained.
        columns: by the names that they are shown with.
        is_equivariant: whether the accuracies are of a learner that does not know in which basis features are.
    """
    found = {
        (kind, shown): parts(table, kind, column, names, tuned)
        for kind in explained_kinds(table.arms, names)
        for shown, column in columns.items()
    }
    header = ["features", "corruption", *next(iter(found.values()))]
    lines = [[*line, *(gain.text(1, sign=True) for gain in by_part.values())] for line, by_part in found.items()]
    raw, unit = names
    basis = (
        f"This learner cannot tell one basis from another: {BASIS} is 0 but for rounding and the draw of its start,\n"
        "and says nothing about axes that mean something. Only learners to which axes matter can.\n"
        if is_equivariant
        else f"To this learner axes matter: {BASIS} is what those of the features are worth to it.\n"
    )
    tuning = f"{TUNING}: what tuned probes of {raw} gain over the others of {raw}. " if tuned is not None else ""
    return (
        f"{markdown_table(header, lines, left=2)}"
        f"\nPoints of accuracy, paired by seed; gain over {raw} = {SCALE} + {KERNEL} + {BASIS}.\n"
        f"{SCALE}: {unit} - {raw}, what normalising alone gains. {tuning}{KERNEL}: the twin of the features in a\n"
        f"random basis - {unit}, what their distances and angles gain. {BASIS}: the features - their twin.\n{basis}"
    )
