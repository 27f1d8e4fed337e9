"""Files of JSON objects, one a line, that a kill leaves whole, and the lock of the folder that they are in."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout


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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file that takes the place of `path` once it is written; a kill leaves the old or the new."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`, so that a kill leaves the old or the new."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
    for number, text in enumerate(whole, 1):
        try:
            rows.append((number, _object(text)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}. Delete the line, or restore the file.") from None
    size = sum(len(text) + 1 for text in whole)
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


def _object(text: bytes) -> dict[str, Any]:
    try:
        row = json.loads(text.decode("utf-8"), parse_constant=lambda _: None)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, got {text[:40]!r}")
    return row


def line(row: Mapping[str, Any]) -> str:
    """A JSON object as a line of such a file. Raises ValueError if a number is NaN or infinite."""
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

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write `rows` and wait until they are on the disk.

        Raises:
            OSError: they cannot be written, for instance to a full disk; what is on the disk already stays.
            ValueError: a number in them is NaN or infinite, which JSON cannot say.
        """
        self._file.write("".join(map(line, rows)).encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Let the file have `rows` and no others, whole or not at all."""
        write_atomic(self.path, "".join(map(line, rows)))
        self._file.close()
        self.open()

    def __enter__(self) -> LineAppender:
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def file_checksum(path: str | Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
