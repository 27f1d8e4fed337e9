"""The folder of a run, the rows of results in it, and the statistics and tables made from rows.

The one row format of everything here: `evals`, `vision_bench` and the recipes write it and read it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from scipy import stats

ROWS = "results.jsonl"
CONFIG = "config.json"
DIVERGED = "diverged"  # metric of the row that marks an arm whose weights, scores or features are not finite
_PACKAGES = (
    "mono-peft", "torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "bitsandbytes", "lm_eval", "timm",
    "numpy", "scipy",
)  # fmt: skip


class Run:
    """The folder of one configuration of a recipe; run again with the same configuration it continues.

    Args:
        output_dir: created by `bind`, or at the first row, if it does not exist.
        recipe: name of the recipe or command, stands in every row.
        config: every setting that changes a result, JSON-serialisable; stands in every row.
        is_main: False in all but one of several processes: such a run writes nothing.

    Raises:
        ValueError: the folder holds another configuration or recipe, or rows that cannot be read; or a setting is NaN
            or infinite.
    """

    def __init__(self, output_dir: str | Path, recipe: str, config: dict[str, Any], is_main: bool = True) -> None:
        for name, value in config.items():
            try:
                json.dumps(value, allow_nan=False)
            except ValueError:
                raise ValueError(
                    f"{name} is {value}; JSON has no NaN and no infinity, take a finite number."
                ) from None
        self.folder = Path(output_dir)
        self.recipe = recipe
        self.config = json.loads(json.dumps(config))  # as it will be read back
        self.is_main = is_main
        self._held = ExitStack()  # the lock and the open file of rows, from `bind` on
        self._bound = False
        self._appender: LineAppender | None = None
        self._load()

    def _load(self) -> None:
        """Take the rows of the folder, if its configuration is this one."""
        self._check_folder()
        self.rows = read_rows(self.folder / ROWS) if (self.folder / ROWS).exists() else []
        self._index: dict[str, dict[tuple[str, ...], dict[Any, list[dict[str, Any]]]]] = {}

    def _check_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--output_dir {self.folder} is a file; name a folder.")
        path = self.folder / CONFIG
        if not path.exists():
            if (self.folder / ROWS).exists():
                raise ValueError(f"{self.folder} has a {ROWS} without the {CONFIG} it was made with; choose another.")
            return
        before = json.loads(path.read_text(encoding="utf-8"))
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

    def row(
        self, metric: str, value: float | None, *, n: int, seed: int | None, seconds: float, device: str, **arm: Any
    ) -> dict[str, Any]:
        """A row of this run, not yet in it; the arguments are those of `add`."""
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

    def add(
        self, metric: str, value: float | None, *, n: int, seed: int | None, seconds: float, device: str, **arm: Any
    ) -> None:
        """Append one row and wait until it is on the disk; `add_rows` does so once for many.

        Args:
            value: a finite number, or None where the statistic is undefined.
            n: number of samples behind `value`.
            seconds: wall-clock time it took.
            arm: what distinguishes this row within the run, such as the method.

        Raises:
            ValueError: `value` is NaN or infinite.
        """
        self.add_rows([self.row(metric, value, n=n, seed=seed, seconds=seconds, device=device, **arm)])

    def add_diverged(self, reason: str, *, n: int, seed: int | None, seconds: float, device: str, **arm: Any) -> None:
        """Mark an arm whose weights, scores or features are not finite: a row of the metric `DIVERGED`.

        Such an arm has no other results, is not measured again, and tables say that it diverged.

        Args:
            reason: a sentence without its full stop that says what is not finite; stands in the row's config.
            n, seed, seconds, device, arm: as in `add`.
        """
        self.add(DIVERGED, 1.0, n=n, seed=seed, seconds=seconds, device=device, **arm, reason=reason)

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
            if not (self.folder / CONFIG).exists():
                described = {"recipe": self.recipe, "config": self.config}
                self.write(CONFIG, json.dumps(described, indent=2, sort_keys=True) + "\n")
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
        self.write(ROWS, "".join(map(_line, rows)))
        if self._appender is not None:
            self._appender.close()  # its file is the one that was replaced
            self._appender.open()

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


@contextmanager
def locked(folder: Path, timeout: float = 0) -> Iterator[None]:
    """Hold a folder, which is created, for this process; one that is killed gives it back.

    A process that holds the folder already may hold it once more.

    Args:
        timeout: seconds to wait for a process that holds the folder; below 0 without an end.

    Raises:
        ValueError: another process holds it.
        OSError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.resolve() / ".lock", timeout=0, is_singleton=True)
        with lock.acquire(timeout):
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


class Lines(NamedTuple):
    """The complete rows of a jsonl file with the number of each one's line, and what is cut at its end."""

    rows: list[tuple[int, dict[str, Any]]]
    torn: str | None  # a sentence that reports the cut last line, None if there is none
    whole_bytes: int  # length of the complete part


def read_lines(path: Path) -> Lines:
    """The JSON objects of a file, one a line; a last line without its end that is no whole object is `torn`.

    Lines end with a line feed only: the other characters that Python's `splitlines` takes for ends, such as U+2028,
    stand in texts. NaN and infinities, which are no JSON, become None.

    Raises:
        ValueError: a complete line is not UTF-8 or not a JSON object; names the line.
    """
    *whole, last = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(whole, 1):
        try:
            rows.append((number, _object(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}. Delete the line, or restore the file.") from None
    size = sum(len(line) + 1 for line in whole)
    if not last:
        return Lines(rows, None, size)
    try:
        row = _object(last)
    except ValueError:
        torn = (
            f"{path}: the last line, {len(whole) + 1}, is cut after {len(last)} bytes; the {len(rows)} complete lines "
            "before it are used"
        )
        return Lines(rows, torn, size)
    return Lines([*rows, (len(whole) + 1, row)], None, size + len(last))


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=lambda _: None)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, got {line[:40]!r}")
    return row


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


class LineAppender:
    """Appends JSON objects to a file, each call's lines whole and on the disk when it returns; a context manager.

    A cut last line is cleared away when it opens, since nothing could be appended to it. Only one process may append
    to a file, see `locked`.

    Raises:
        ValueError: a complete line of it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def open(self) -> None:
        """Open the file, which is created, at its end."""
        self._file = open(self.path, "ab")  # noqa: SIM115 (`close` closes it)
        try:
            size = read_lines(self.path).whole_bytes
            self._file.truncate(size)
            if size and self.path.read_bytes()[-1:] != b"\n":
                self._file.write(b"\n")
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file; `open` opens it again."""
        self._file.close()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write `rows` and wait until they are on the disk.

        Raises:
            OSError: they cannot be written, for instance to a full disk; what is on the disk already stays.
            ValueError: a number in them is NaN or infinite, which JSON cannot say.
        """
        self._file.write("".join(map(_line, rows)).encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> LineAppender:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results.jsonl, without a last one that was cut while it was written.

    Raises:
        ValueError: a line is not a row; names the line.
    """
    return [row for _, row in read_lines(path).rows]


def file_checksum(path: str | Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


class Interval(NamedTuple):
    """Mean of n values with the half-width of its 95 % interval (Student's t), None for a single value."""

    mean: float  # NaN of no value
    half_width: float | None
    n: int

    def scaled(self, factor: float) -> Interval:
        """The interval of `factor` times the values, for instance 100 for percent."""
        return Interval(self.mean * factor, None if self.half_width is None else self.half_width * factor, self.n)

    def text(self, digits: int = 2, sign: bool = False) -> str:
        """'91.23 ± 0.45', or only the mean, or '-' where no value is defined."""
        if self.n == 0:
            return "-"
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.{digits}f}"


def interval(values: Sequence[float | None]) -> Interval:
    """95 % interval of the mean over seeds; None, an undefined value, is left out.

    Raises:
        ValueError: there are no values at all.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    numbers = [value for value in values if value is not None]
    n = len(numbers)
    if n < 2:
        return Interval(numbers[0] if numbers else math.nan, None, n)
    mean = sum(numbers) / n
    error = (sum((v - mean) ** 2 for v in numbers) / (n - 1) / n) ** 0.5
    return Interval(mean, float(stats.t.ppf(0.975, n - 1)) * error, n)


def paired_difference(first: Iterable[dict[str, Any]], second: Iterable[dict[str, Any]]) -> Interval | None:
    """Interval of first - second over the seeds that have a value in both, None if they share none."""
    by_seed = {row["seed"]: row["value"] for row in second if row["value"] is not None}
    pairs = [row for row in first if row["value"] is not None and row["seed"] in by_seed]
    differences = [row["value"] - by_seed[row["seed"]] for row in pairs]
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
    """The commit of the repository that this file is part of, with "-dirty" if files differ from it.

    None outside a checkout, and for an installed copy, whatever repository the environment lies in.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
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
