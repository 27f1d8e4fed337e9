"""The folder of a run: append-only rows under a lock, the statistics over them, and where they are from.

from vision_bench.runs import Run, interval

run = Run("runs/mine", "my_recipe", {"seeds": [0, 1]})
for seed in run.config["seeds"]:
    run.add("accuracy", 0.5 + seed / 10, n=100, seed=seed, seconds=1.0, device="cpu", arm="lora")
print(interval([row["value"] for row in run.find("accuracy", arm="lora")]).text())  # 0.55 ± 0.64
"""

from vision_bench.runs.lines import LineAppender, Lines, file_checksum, locked, read_lines, replacing, write_atomic
from vision_bench.runs.run import CONFIG, DIVERGED, ROWS, Cell, Run, commit, device_name, read_rows, versions
from vision_bench.runs.settings import defaults, differences, option, parse, recorded, run_as_program
from vision_bench.runs.statistics import (
    Interval,
    frame,
    interval,
    markdown_table,
    over_seeds,
    paired,
    paired_difference,
    select,
)

__all__ = [
    "CONFIG",
    "DIVERGED",
    "ROWS",
    "Cell",
    "Interval",
    "LineAppender",
    "Lines",
    "Run",
    "commit",
    "defaults",
    "device_name",
    "differences",
    "file_checksum",
    "frame",
    "interval",
    "locked",
    "markdown_table",
    "option",
    "over_seeds",
    "paired",
    "paired_difference",
    "parse",
    "read_lines",
    "read_rows",
    "recorded",
    "replacing",
    "run_as_program",
    "select",
    "versions",
    "write_atomic",
]
