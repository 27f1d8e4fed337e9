"""The rows under docs/results: what the docs show of them is what the recipe makes of them."""

from pathlib import Path

import basis_tables
import frontier
import pytest

DOCS = Path(__file__).parents[2] / "docs"


def lines_of(table):
    return [line for line in table.splitlines() if line]


def test_tables_of_the_frontier_are_made_of_their_rows():
    text = (DOCS / "silence.md").read_text(encoding="utf-8")
    panels = frontier.read_lines([str(DOCS / "results" / "silence_frontier.csv")])
    assert panels
    for lines in panels.values():
        for line in lines_of(frontier.table(lines, frontier.methods_of(lines))):
            assert line in text


@pytest.mark.parametrize(
    ("page", "files"),
    [
        ("table2_smollm2", ["table2_smollm2", "table2_smollm2_rates"]),
        ("table2_smollm2_dolly", ["table2_smollm2_dolly"]),
        ("table2_smollm2_all_linear", ["table2_smollm2_all_linear", "table2_smollm2_all_linear_rates"]),
    ],
)
def test_all_tables_of_the_chat_model_are_made_of_its_rows(page, files):
    text = (DOCS / "measurements" / f"{page}.md").read_text(encoding="utf-8")
    made = []
    for file in files:
        for lines in frontier.read_lines([str(DOCS / "results" / f"{file}.csv")]).values():
            for of in (frontier.table, frontier.steps_tables, frontier.further_tables):
                blocks = of(lines, frontier.methods_of(lines)).split("\n\n")
                made += [block.strip() for block in blocks if block.strip().startswith("|")]
    assert len(made) > 3
    assert all(block in text for block in made)
    # No other table of arms or steps stands there.
    assert sum(line.startswith(("| arm |", "| step |")) for line in text.splitlines()) == len(made)


def test_the_table_over_steps_is_made_of_its_rows():
    (lines,) = frontier.read_lines([str(DOCS / "results" / "silence_steps.csv")]).values()
    steps = frontier.steps_tables(lines, frontier.methods_of(lines))
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
