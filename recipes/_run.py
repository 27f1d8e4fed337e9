"""A recipe's run: the folder, its rows, their statistics and tables; `result_rows`, as the packages write rows too."""

from result_rows import (
    CONFIG,
    DIVERGED,
    Interval,
    Run,
    commit,
    device_name,
    interval,
    markdown_table,
    paired_difference,
    read_rows,
    versions,
    write_atomic,
)

__all__ = [
    "CONFIG",
    "DIVERGED",
    "Interval",
    "Run",
    "commit",
    "device_name",
    "interval",
    "markdown_table",
    "paired_difference",
    "read_rows",
    "versions",
    "write_atomic",
]
