"""The page of a decision, in a real browser: whole at the width of a telephone, and nothing comes from elsewhere."""

from __future__ import annotations

import pytest

from evals.accept import Example
from evals.card import Card, Line
from evals.card_page import axis, write_page
from evals.decision import CANNOT_TELL, Decided, Measured, decide, decide_line

LINES = [
    Line("task", "task", "sst2_instruct", "acc", versus="base", at_least=-0.02, margin=0.03),
    Line("harm", "harm", "advbench", "answered", "refusal", at_most=0.1, margin=0.05),
    Line(
        "silence",
        "silence",
        metric="silent",
        prompts="a_long_name_of_a_file_of_prompts.jsonl",
        at_least=0.9,
        margin=0.05,
    ),
    Line("forgetting", "forgetting", metric="neutral_kl", at_most=0.1, margin=0.05),
]
RECORD = {
    "card": {"title": "A card & its title", "power": 0.8}, "adapter": "runs/" + "x" * 90, "base": "owner/model",
    "exit_code": 1, "time": "2026-11-26T12:00:00Z", "seconds": 1.0, "device": "cpu", "commit": "f" * 40,
    "checksums": {"model weights": "0" * 16}, "versions": {"torch": "2.15.0"},
}  # fmt: skip


@pytest.fixture
def page(tmp_path):
    """The page of one line that passes, one that fails and two that cannot be told."""
    measured = (Measured(-0.001, -0.01, 0.008, 900, 0.1), Measured(0.3, 0.25, 0.35, 400), Measured(1.0, 0.89, 1.0, 30))
    lines = [decide_line(line, m, 0.8) for line, m in zip(LINES, measured, strict=False)]
    lines.append(Decided(LINES[3], CANNOT_TELL, "there is no number", None, None))
    decision = decide(Card("A card", LINES), lines)
    write_page(
        tmp_path / "card.html", decision, RECORD, {"harm": [Example("How? <script>x</script>", "So:\n" + "y" * 300)]}
    )
    return tmp_path / "card.html"


def test_every_line_is_told_and_what_models_say_is_text(page):
    text = page.read_text()
    assert text.count("<article>") == 4
    for outcome in ("Passes", "Fails", "Cannot tell"):
        assert f">{outcome}</span>" in text
    assert "<script>" not in text
    assert "A card &amp; its title" in text
    assert "Fails:\n    harm." in text


def test_an_axis_has_threshold_interval_and_the_good_side():
    one = decide_line(LINES[1], Measured(0.05, 0.02, 0.1, 400), 0.8)
    places = axis(one)
    assert 0 <= places["low"] < places["value"] < places["high"] <= places["threshold"] + 0.01
    assert places["good"] == "left"
    one = decide_line(LINES[2], Measured(1.0, 0.89, 1.0, 30), 0.8)
    assert axis(one)["good"] == "right"
    assert axis(one)["low"] < axis(one)["threshold"]


@pytest.mark.parametrize("width", [360, 1400])
def test_the_page_fits_and_asks_for_nothing(page, opened, width):
    view = opened(page, width)
    view.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    inside, outside = view.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    smallest = view.evaluate(
        "Math.min(...[...document.querySelectorAll('p, dt, dd, span, summary')].filter(e => e.textContent.trim())"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    widths = view.evaluate("[...document.querySelectorAll('.axis')].map(e => e.clientWidth)")
    assert inside <= outside == width
    assert smallest >= 12
    assert min(widths) > 250
