"""Rows of results and their statistics, in the one format of this repository.

The format and its writer are those of `evals.rows`, which this package does not import; a test holds them together.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import stats

_PACKAGES = ("mono-peft", "torch", "accelerate", "timm", "numpy", "scipy")

Row = dict[str, Any]


def row(
    recipe: str, metric: str, value: float, *, n: int, seed: int | None, config: Row, seconds: float, device: str
) -> Row:
    """One measured value: of `n` samples, under `config`, in `seconds` of wall-clock time."""
    return {
        "recipe": recipe,
        "metric": metric,
        "value": value,
        "n": n,
        "seed": seed,
        "config": config,
        "seconds": round(seconds, 3),
        "device": device,
        "versions": versions(),
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def read(path: Path) -> list[Row]:
    """The rows of a results.jsonl, none if there is no file. Raises ValueError that names the line that is no row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); restore or delete the file.") from None
    return rows


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text`; a kill or a full disk leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Interval(NamedTuple):
    """Mean of values and the half-width of its 95 % interval (Student's t), None for a single value."""

    mean: float
    half_width: float | None

    def text(self, digits: int = 1, sign: bool = False) -> str:
        """'91.2 ± 0.4', or only the mean."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of values, at least one."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return Interval(mean, None)
    error = (sum((value - mean) ** 2 for value in values) / (n - 1) / n) ** 0.5
    return Interval(mean, float(stats.t.ppf(0.975, n - 1)) * error)


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
    ask = {"capture_output": True, "text": True, "check": True}
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], **ask).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **ask).stdout  # type: ignore[call-overload]
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if changed.strip() else "")


def device_name(device: torch.device) -> str:
    """'cpu (2 threads)', or the name of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type
