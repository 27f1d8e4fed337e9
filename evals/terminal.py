"""Tables on the terminal, at most 100 columns wide; what does not fit is wrapped within its cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 100


def table_text(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A line with the title, and a table, the first `left` columns left-aligned, the others right-aligned."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold", no_wrap=i >= left + 3)
    for row in rows:
        table.add_row(*row)
    file = StringIO()
    Console(file=file, width=WIDTH, color_system=None, markup=False, emoji=False, highlight=False).print(table)
    return "".join(f"{line.rstrip()}\n" for line in (title, *file.getvalue().splitlines()))
