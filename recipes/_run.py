"""A recipe's run: the folder, its rows, their statistics and tables; `result_rows`, as the packages write rows too."""

import sys
from collections.abc import Callable

from result_rows import (
    CONFIG,
    DIVERGED,
    Interval,
    Run,
    commit,
    device_name,
    file_checksum,
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
    "file_checksum",
    "interval",
    "markdown_table",
    "paired_difference",
    "read_rows",
    "run_as_program",
    "versions",
    "write_atomic",
]


def run_as_program(main: Callable[[], None]) -> None:
    """Call a recipe's `main` on the command line; errors that the user can mend end the program with one line."""
    try:
        main()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command continues.")
