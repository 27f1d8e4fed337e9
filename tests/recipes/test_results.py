"""The rows under docs/results: what the docs show of them is what the recipe makes of them."""

from pathlib import Path

import frontier
import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("file", ["silence_frontier.csv", "silence_smollm2.csv"])
def test_tables_of_the_frontier_are_made_of_their_rows(file):
    text = (DOCS / "silence.md").read_text(encoding="utf-8")
    panels = frontier.read_lines([str(DOCS / "results" / file)])
    assert panels
    for lines in panels.values():
        for line in frontier.table(lines, frontier.methods_of(lines)).splitlines():
            assert line in text
