"""The folder of a run and the rows of results in it.

The one row format of everything here: `evals`, `vision_bench` and the recipes write it and read it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vision_bench.runs.lines import LineAppender, line, locked, read_lines, write_atomic
from vision_bench.runs.settings import differences

ROWS = "results.jsonl"
CONFIG = "config.json"
DIVERGED = "diverged"  # metric of the row that marks an arm whose weights, scores or features are not finite
_PACKAGES = (
    "mono-peft", "torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "bitsandbytes", "lm_eval", "timm",
    "numpy", "scipy",
)  # fmt: skip


class Cell(NamedTuple):
    """A row that a whole run has: its metric and seed, and what distinguishes it within the run."""

    metric: str
    seed: int | None
    arm: Mapping[str, Any] = {}


class Run:
    """The folder of one configuration of a recipe; run again with the same configuration it continues.

    Args:
        output_dir: created by `bind`, or at the first row, if it does not exist.
        recipe: name of the recipe or command, stands in every row.
        config: every setting that changes a result, JSON-serialisable; stands in every row.
        is_main: False in all but one of several processes: such a run writes nothing.
        defaults: of settings. A folder from before an option existed continues while the option is at its default.
        facts: what follows from the settings and the data, such as the number of classes: stands in every row and in
            `config` as settings do, but does not tell configurations apart.

    Attributes:
        config: the settings and the facts.
        rows: in the order of writing.

    Raises:
        ValueError: the folder holds another configuration or recipe, or rows that cannot be read; or a setting is NaN
            or infinite.
    """

    def __init__(
        self,
        output_dir: str | Path,
        recipe: str,
        config: Mapping[str, Any],
        is_main: bool = True,
        *,
        defaults: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.facts = dict(facts or {})
        self.config: dict[str, Any] = {**config, **self.facts}
        for name, value in self.config.items():
            try:
                json.dumps(value, allow_nan=False)
            except ValueError:
                raise ValueError(
                    f"{name} is {value}; JSON has no NaN and no infinity, take a finite number."
                ) from None
        self.folder = Path(output_dir)
        self.recipe = recipe
        self.config = json.loads(json.dumps(self.config))  # as it will be read back
        self._defaults = defaults
        self.is_main = is_main
        self._held = ExitStack()  # the lock and the open file of rows, from `bind` on
        self._bound = False
        self._appender: LineAppender | None = None
        self._load()

    def _load(self) -> None:
        """Take the rows of the folder, if its configuration is this one."""
        path, rows = self.folder / CONFIG, self.folder / ROWS
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--output_dir {self.folder} is a file; name a folder.")
        if rows.exists() and not path.exists():
            raise ValueError(f"{self.folder} has a {ROWS} without the {CONFIG} it was made with; choose another.")
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["recipe"] != self.recipe:
                raise ValueError(
                    f"{self.folder} holds results of the recipe {before['recipe']!r}; choose another folder."
                )
            if changed := differences(self._settings(before["config"]), self._settings(self.config), self._defaults):
                raise ValueError(
                    f"{self.folder} holds results of another configuration ({changed}). Choose another --output_dir, "
                    "or repeat the old settings to continue that run."
                )
        self.rows = read_rows(rows) if rows.exists() else []
        self._index: dict[str, dict[tuple[str, ...], dict[Any, list[dict[str, Any]]]]] = {}

    def _settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in config.items() if name not in self.facts}

    def find(self, metric: str, **arm: Any) -> list[dict[str, Any]]:
        """The rows of `metric` whose seed and configuration have the values of `arm`, in the order of writing.

        A value of None also matches the rows that lack the setting. The first call for a combination of names indexes
        the rows by it, so that further ones cost no pass over all rows.
        """
        names = tuple(sorted(arm))
        indices = self._index.setdefault(metric, {})
        if names not in indices:
            indices[names] = {}
            for row in self.rows:
                if row["metric"] == metric:
                    indices[names].setdefault(_values(row, names), []).append(row)
        return list(indices[names].get(tuple(_hashable(arm[name]) for name in names), ()))

    def lacking(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells that have no row, each once and in order; those of an arm that is marked as diverged need none.

        A mark counts for all cells of its seed that agree with it in what it names: one that names no arm counts for
        the whole seed. A cell without a seed has its row too if there is one of each seed of the run, as there were
        before what several seeds share was measured once.
        """

        def has_row(cell: Cell) -> bool:
            every = self.config.get("seeds", ()) if cell.seed is None else ()
            rows = [bool(self.find(cell.metric, seed=seed, **cell.arm)) for seed in (cell.seed, *every)]
            return rows[0] or (len(rows) > 1 and all(rows[1:]))

        def is_marked(cell: Cell) -> bool:
            configs = (mark["config"] for mark in self.find(DIVERGED, seed=cell.seed))
            return any(all(_hashable(c.get(k, v)) == _hashable(v) for k, v in cell.arm.items()) for c in configs)

        each = {(cell.metric, cell.seed, _hashable(dict(cell.arm))): cell for cell in cells}.values()
        return [cell for cell in each if not has_row(cell) and not is_marked(cell)]

    def row(
        self, metric: str, value: float | None, *, n: int, seed: int | None, seconds: float, device: str, **arm: Any
    ) -> dict[str, Any]:
        """A row of this run, not yet in it.

        Args:
            value: a finite number, or None where the statistic is undefined.
            n: number of samples behind `value`.
            seconds: wall-clock time it took.
            arm: what distinguishes this row within the run, such as the method.

        Raises:
            ValueError: `value` is NaN or infinite.
        """
        if value is not None and not math.isfinite(value):
            raise ValueError(
                f"{metric} is {value} for seed {seed}, {arm}; a row holds a finite number, or None where a statistic "
                "is undefined. Mark an arm that diverged with add_diverged."
            )
        return {
            "recipe": self.recipe,
            "metric": metric,
            "value": value,
            "n": n,
            "seed": seed,
            "config": self.config | arm,
            "seconds": round(seconds, 3),
            "device": device,
            "versions": versions(),
            "commit": commit(),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def add(self, metric: str, value: float | None, **measured: Any) -> None:
        """Append one row and wait until it is on the disk, with the arguments of `row`; for many see `add_rows`."""
        self.add_rows([self.row(metric, value, **measured)])

    def add_diverged(self, reason: str, **measured: Any) -> None:
        """Mark an arm whose weights, scores or features are not finite: a row of the metric `DIVERGED`.

        Such an arm has no other results, is not measured again, and tables say that it diverged.

        Args:
            reason: a sentence without its full stop that says what is not finite; stands in the row's config.
            measured: n, seed, seconds, device and the arm, as in `row`.
        """
        self.add(DIVERGED, 1.0, **measured, reason=reason)

    def add_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows that `row` made, and wait once until all are on the disk; a kill leaves whole rows."""
        if not rows:
            return
        self.bind()
        if self.is_main:
            if self._appender is None:
                self._appender = self._held.enter_context(LineAppender(self.folder / ROWS))
            self._appender.append(rows)
        self.rows.extend(rows)
        for row in rows:
            for names, index in self._index.get(row["metric"], {}).items():
                index.setdefault(_values(row, names), []).append(row)

    def bind(self) -> None:
        """Take the folder for this run: called when long work begins, not before bad input is found.

        The main process holds the folder's lock from here on for as long as the run lives, reads the rows that another
        process may have added meanwhile, and writes down which configuration the folder is for.

        Raises:
            ValueError: another process holds the folder, it has got another configuration meanwhile, or nothing can
                be written to it.
        """
        if self._bound or not self.is_main:
            return
        try:
            self._held.enter_context(locked(self.folder))
            self._load()
            # A folder that is full or read-only is noticed before the work whose results would be lost.
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(bytes(2**16))
                os.fsync(file.fileno())
            described = {"recipe": self.recipe, "config": self._settings(self.config), "facts": self.facts}
            text, path = json.dumps(described, indent=2, sort_keys=True) + "\n", self.folder / CONFIG
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                self.write(CONFIG, text)  # also with the facts and new options that an older folder lacks
        except OSError as error:
            self._held.close()
            raise ValueError(f"--output_dir {self.folder} cannot be written to ({error}); choose another.") from None
        except BaseException:
            self._held.close()
            raise
        self._bound = True

    def replace(self, rows: list[dict[str, Any]]) -> None:
        """Let the run have `rows` and no others, on the disk too; to append rows, `add_rows` is cheaper."""
        self.bind()
        self.rows = list(rows)
        self._index = {}
        if self._appender is not None:
            self._appender.replace(rows)
        else:
            self.write(ROWS, "".join(map(line, rows)))

    def write(self, name: str, text: str) -> None:
        """Write a text file of the folder, whole or not at all."""
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / name, text)


def _values(row: dict[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    """The values of a row's seed and settings by name, as a key of the index."""
    config = row["config"]
    return tuple(row["seed"] if name == "seed" else _hashable(config.get(name)) for name in names)


def _hashable(value: Any) -> Any:
    """A key that is equal for equal values of JSON, lists and tuples being the same."""
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, dict):
        return frozenset((name, _hashable(item)) for name, item in value.items())
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results.jsonl, without a last one that was cut while it was written.

    Raises:
        ValueError: a line is not a row; names the line.
    """
    return [row for _, row in read_lines(path).rows]


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results, those installed."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


@cache
def commit() -> str | None:
    """The commit of the repository that this file is part of, with "-dirty" if files differ from it.

    None outside a checkout, and for an installed copy, whatever repository the environment lies in.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # no tags
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device | str | None = None) -> str:
    """'cpu (2 threads)', or the name of the GPU; by default of what torch would use."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type == "cuda":
        return torch.cuda.get_device_name(kind)
    return f"cpu ({torch.get_num_threads()} threads)" if kind.type == "cpu" else kind.type
