"""The rows under docs/results: what the docs show of them is what the recipe makes of them."""

from pathlib import Path

import basis_tables
import frontier

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


def test_all_tables_of_the_chat_model_are_made_of_its_rows():
    text = (DOCS / "measurements" / "table2_smollm2.md").read_text(encoding="utf-8")
    panels = frontier.read_lines([str(DOCS / "results" / "table2_smollm2.csv")])
    assert list(panels) == ["10 % poison", "the task alone"]
    for title, lines in panels.items():
        part = text.split(f"\n## {title[0].upper()}{title[1:]}\n")[1].split("\n## ")[0]
        methods = frontier.methods_of(lines)
        shown = lines_of(frontier.table(lines, methods) + frontier.further_tables(lines, methods))
        assert len(shown) > 30
        assert shown == lines_of(part)


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
