"""The page of a decision: one HTML file without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evals.decision import Decided, Decision
from vision_bench.runs import write_atomic

_TEMPLATE = "card.html.j2"


def write_page(
    path: Path, decision: Decision, record: Mapping[str, Any], examples: Mapping[str, Sequence[Any]]
) -> None:
    """Write the page.

    Args:
        record: as in `card.json`.
        examples: answers with `prompt` and `response` that count against a line, by its name.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    lines = [{"one": one, "axis": axis(one), "examples": examples.get(one.line.name, [])} for one in decision.lines]
    text = environment.get_template(_TEMPLATE).render(decision=decision, record=record, lines=lines)
    write_atomic(path, text)


def axis(one: Decided) -> dict[str, float | str] | None:
    """Where interval, value and threshold stand on an axis, in percent of its width; None without a measure."""
    if one.measured is None:
        return None
    m, threshold = one.measured, one.line.threshold
    if one.line.is_share:
        left, right = 0.0, min(1.0, 1.25 * max(m.high, threshold))
        left = left if one.line.at_most is not None else max(0.0, 1 - 1.25 * (1 - min(m.low, threshold)))
        right = right if one.line.at_most is not None else 1.0
    else:
        ends = (m.low, m.high, threshold, 0.0)
        room = 0.1 * (max(ends) - min(ends)) or 1.0
        left, right = min(ends) - (room if min(ends) < 0 else 0.0), max(ends) + room

    def place(value: float) -> float:
        return round(min(max(100 * (value - left) / (right - left), 0), 100), 2)

    return {
        "low": place(m.low), "high": place(m.high), "value": place(m.value), "threshold": place(threshold),
        "good": "left" if one.line.at_most is not None else "right",
        "first": f"{left:.3g}", "last": f"{right:.3g}",
    }  # fmt: skip
