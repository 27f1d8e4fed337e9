"""The folder of a run, the rows of results in it, and the statistics and tables made from rows.

The one row format of everything here: `evals`, `vision_bench` and the recipes write it and read it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from scipy import stats

ROWS = "results.jsonl"
CONFIG = "config.json"
_PACKAGES = (
    "mono-peft", "torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "bitsandbytes", "lm_eval", "timm",
    "numpy", "scipy",
)  # fmt: skip


class Run:
    """The folder of one configuration of a recipe; run again with the same configuration it continues.

    Args:
        output_dir: created at the first row if it does not exist.
        recipe: name of the recipe or command, stands in every row.
        config: every setting that changes a result, JSON-serialisable; stands in every row.
        is_main: False in all but one of several processes: such a run writes nothing.

    Raises:
        ValueError: the folder holds another configuration or recipe, or rows that cannot be read.
    """

    def __init__(self, output_dir: str | Path, recipe: str, config: dict[str, Any], is_main: bool = True) -> None:
        self.folder = Path(output_dir)
        self.recipe = recipe
        self.config = json.loads(json.dumps(config))  # as it will be read back
        self.is_main = is_main
        self._check_folder()
        self.rows = read_rows(self.folder / ROWS) if (self.folder / ROWS).exists() else []

    def _check_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--output_dir {self.folder} is a file; name a folder.")
        known = self.folder / CONFIG
        if not known.exists():
            if (self.folder / ROWS).exists():
                raise ValueError(f"{self.folder} has a {ROWS} without the {CONFIG} it was made with; choose another.")
            return
        before = json.loads(known.read_text(encoding="utf-8"))
        if before["recipe"] != self.recipe:
            raise ValueError(f"{self.folder} holds results of the recipe {before['recipe']!r}; choose another folder.")
        old, new = before["config"], self.config
        changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        if changed:
            changes = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in changed)
            raise ValueError(
                f"{self.folder} holds results of another configuration ({changes}). Choose another --output_dir, or "
                "repeat the old settings to continue that run."
            )

    def find(self, metric: str, **arm: Any) -> list[dict[str, Any]]:
        """The rows of `metric` whose seed and configuration have the values of `arm`, in the order of writing."""
        return [
            row
            for row in self.rows
            if row["metric"] == metric
            and all((row["config"] | {"seed": row["seed"]}).get(k) == v for k, v in arm.items())
        ]

    def row(
        self, metric: str, value: float, *, n: int, seed: int | None, seconds: float, device: str, **arm: Any
    ) -> dict[str, Any]:
        """A row of this run, not yet in it; the arguments are those of `add`."""
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

    def add(
        self, metric: str, value: float, *, n: int, seed: int | None, seconds: float, device: str, **arm: Any
    ) -> None:
        """Append one row; the file on disk always holds whole rows.

        Args:
            n: number of samples behind `value`.
            seconds: wall-clock time it took.
            arm: what distinguishes this row within the run, such as the method.
        """
        self.replace([*self.rows, self.row(metric, value, n=n, seed=seed, seconds=seconds, device=device, **arm)])

    def bind(self) -> None:
        """Write down which configuration the folder is for; called when work begins, not before bad input is found."""
        if not (self.folder / CONFIG).exists():
            described = {"recipe": self.recipe, "config": self.config}
            self.write(CONFIG, json.dumps(described, indent=2, sort_keys=True) + "\n")

    def replace(self, rows: list[dict[str, Any]]) -> None:
        """Let the run have `rows` and no others, on the disk too."""
        self.bind()
        self.rows = rows
        self.write(ROWS, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, name: str, text: str) -> None:
        """Write a text file of the folder, whole or not at all."""
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / name, text)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is created, for this process; one that is killed gives it back.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"Another process is working in {folder}; wait for it, or stop it.") from None


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` through a temporary file beside it, so that a kill leaves the old or the new."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results.jsonl. Raises ValueError that names the line that is not a row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); restore or delete the file.") from None
    return rows


class Interval(NamedTuple):
    """Mean of n values with the half-width of its 95 % interval (Student's t), None for a single value."""

    mean: float
    half_width: float | None
    n: int

    def scaled(self, factor: float) -> Interval:
        """The interval of `factor` times the values, for instance 100 for percent."""
        return Interval(self.mean * factor, None if self.half_width is None else self.half_width * factor, self.n)

    def text(self, digits: int = 2, sign: bool = False) -> str:
        """'91.23 ± 0.45', or only the mean."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean over seeds. Raises ValueError without values."""
    if not values:
        raise ValueError("an interval needs at least one value")
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return Interval(mean, None, 1)
    error = (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5
    return Interval(mean, float(stats.t.ppf(0.975, n - 1)) * error, n)


def paired_difference(first: Iterable[dict[str, Any]], second: Iterable[dict[str, Any]]) -> Interval | None:
    """Interval of first - second over the seeds that both have, None if they share none."""
    by_seed = {row["seed"]: row["value"] for row in second}
    differences = [row["value"] - by_seed[row["seed"]] for row in first if row["seed"] in by_seed]
    return interval(differences) if differences else None


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub table, first column left-aligned, the others right-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results, those installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str | None:
    """The repository's commit, with "-dirty" if files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if status.stdout.strip() else "")


def device_name(device: torch.device | str | None = None) -> str:
    """'cpu (2 threads)', or the name of the GPU; by default of what torch would use."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type == "cuda":
        return torch.cuda.get_device_name(kind)
    return f"cpu ({torch.get_num_threads()} threads)" if kind.type == "cpu" else kind.type
