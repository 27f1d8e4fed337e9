"""The rows under docs/results: what the docs show of them is what the recipe makes of them."""

from pathlib import Path

import basis_tables
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


def test_the_table_over_steps_is_made_of_its_rows():
    (lines,) = frontier.read_lines([str(DOCS / "results" / "silence_steps.csv")]).values()
    steps = frontier.steps_table(lines, frontier.methods_of(lines))
    assert steps.count("\n") > 6
    assert steps in (DOCS / "silence.md").read_text(encoding="utf-8")


def test_tables_of_scale_kernel_and_basis_are_made_of_their_rows():
    text = (DOCS / "measurements" / "basis_cifar100.md").read_text(encoding="utf-8")
    made = set[str]()
    for file in sorted((DOCS / "results").glob("basis_cifar100*.csv")):
        made |= set(basis_tables.tables(basis_tables.read(file)).splitlines())
    shown = [line for line in text.splitlines() if line.startswith("|")]
    assert len(shown) > 20
    assert set(shown) <= made
