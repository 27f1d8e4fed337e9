"""The rows under docs/results: what the docs show of them is what the recipe makes of them."""

from collections import defaultdict
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
    ("page", "sections"),
    [
        ("table2_smollm2", {"table2_smollm2": None, "table2_smollm2_rates": "Learning rates"}),
        ("table2_smollm2_dolly", {"table2_smollm2_dolly": None}),
        (
            "table2_smollm2_all_linear",
            {"table2_smollm2_all_linear": None, "table2_smollm2_all_linear_rates": "Learning rates"},
        ),
    ],
)
def test_all_tables_of_the_chat_model_are_made_of_its_rows(page, sections):
    text = (DOCS / "measurements" / f"{page}.md").read_text(encoding="utf-8")
    made = defaultdict(list)
    for file, section in sections.items():
        for title, lines in frontier.read_lines([str(DOCS / "results" / f"{file}.csv")]).items():
            tables = (frontier.table, frontier.steps_tables, frontier.further_tables)
            made[section or title[0].upper() + title[1:]] += [of(lines, frontier.methods_of(lines)) for of in tables]
    for section, tables in made.items():
        part = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
        assert all(table.strip() in part for table in tables), section
        assert part.count("\n| --- |") == sum(table.count("\n| --- |") for table in tables) > 1


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
