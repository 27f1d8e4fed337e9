"""completions.jsonl: what models answered, one row a line, appended in whole lines so that a killed run continues.

Verdicts are kept the same way, so `read_lines` and `LineAppender` know nothing of completions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

FINISH_REASONS = ("stop", "length")  # the model ended its answer, or the limit of new tokens did


@dataclass(frozen=True)
class Completion:
    """One prompt of one task and what one model, with or without an adapter, answered.

    Raises:
        ValueError: a field has the wrong type, `finish_reason` is not one of FINISH_REASONS, an identifier is empty,
            or a text holds half a surrogate pair, which no file and no tokenizer can hold.
    """

    prompt_id: str  # unique among the rows of the same task, model and adapter
    task: str
    category: str | None  # of the prompt, as its data set names it
    prompt: str  # the user's text as written, without a chat template
    response: str  # may be empty
    finish_reason: str
    model: str  # as given on the command line
    adapter: str | None  # as given on the command line; None for the base model
    seed: int | None  # of the adapter's training
    generation: dict[str, Any]  # settings of the generation
    references: list[str]  # answers of the data set, may be empty

    def __post_init__(self) -> None:
        for name in ("prompt_id", "task", "prompt", "response", "finish_reason", "model"):
            _check_text(name, getattr(self, name))
        for name in ("category", "adapter"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for name in ("prompt_id", "task", "model"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is empty; it must tell the row from others")
        if self.finish_reason not in FINISH_REASONS:
            raise ValueError(f"`finish_reason` is {self.finish_reason!r}, allowed are {', '.join(FINISH_REASONS)}")
        if self.seed is not None and type(self.seed) is not int:
            raise ValueError(f"`seed` is {self.seed!r}, allowed are whole numbers and null")
        if not isinstance(self.generation, dict):
            raise ValueError(f"`generation` is {self.generation!r}, allowed is an object of settings")
        if not isinstance(self.references, list):
            raise ValueError(f"`references` is {self.references!r}, allowed is a list of texts")
        for reference in self.references:
            _check_text("references", reference)

    @property
    def key(self) -> tuple[str, str, str | None, str]:
        """What no two rows of a file share: task, model, adapter, prompt_id."""
        return self.task, self.model, self.adapter, self.prompt_id


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is {value!r}, a text is needed")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{name}` holds half a surrogate pair ({value[error.start]!r} at character {error.start}); write it with "
            "an encoder that keeps pairs together"
        ) from None


class Lines(NamedTuple):
    """The complete rows of a jsonl file with the number of each one's line, and what is cut at its end."""

    rows: list[tuple[int, dict[str, Any]]]
    torn: str | None  # a sentence that reports the cut last line, None if there is none
    whole_bytes: int  # length of the complete part


class Completions(NamedTuple):
    """The complete rows of a completions file, and a sentence that reports its cut last line, if it has one."""

    rows: list[Completion]
    torn: str | None


def read_completions(path: str | Path) -> Completions:
    """Read and check a completions file. A last line that was cut is left out and reported in `torn`.

    Raises:
        ValueError: the file does not exist, or a line before its end is not UTF-8, not JSON, lacks a field (a prompt
            without a response is one of these), has one too many or of a wrong type, or repeats an earlier row.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"The completions file {path} does not exist; `python -m evals generate` writes one.")
    lines = read_lines(path)
    seen: dict[tuple[str, str, str | None, str], int] = {}
    rows = []
    for number, row in lines.rows:
        completion = _completion(row, f"{path}, line {number}")
        first = seen.setdefault(completion.key, number)
        if first != number:
            raise ValueError(
                f"{path}, line {number}: prompt_id {completion.prompt_id!r} of task {completion.task!r}, model "
                f"{completion.model!r}, adapter {completion.adapter!r} stands in line {first} already; delete one of "
                "the two lines."
            )
        rows.append(completion)
    return Completions(rows, lines.torn)


def _completion(row: dict[str, Any], where: str) -> Completion:
    needed = {field.name for field in fields(Completion)}
    missing, unknown = sorted(needed - row.keys()), sorted(row.keys() - needed)
    if missing or unknown:
        wrong = " and ".join(
            f"{verb} {', '.join(names)}" for verb, names in (("lacks", missing), ("has the unknown", unknown)) if names
        )
        raise ValueError(
            f"{where} (prompt_id {row.get('prompt_id')!r}) {wrong}. Delete the line and generate it again, or correct "
            f"it; the fields are {', '.join(field.name for field in fields(Completion))}."
        )
    try:
        return Completion(**row)
    except ValueError as error:
        raise ValueError(f"{where} (prompt_id {row['prompt_id']!r}): {error}.") from None


def read_lines(path: Path) -> Lines:
    """The JSON objects of a file, one a line; a last line without its end that is no whole object is `torn`.

    Lines end with a line feed only: the other characters that Python's `splitlines` takes for ends, such as U+2028,
    stand in texts.

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
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, got {line[:40]!r}")
    return row


class LineAppender:
    """Appends JSON objects to a file, each call's lines whole and on the disk when it returns; a context manager.

    A cut last line is cleared away when it opens, since nothing could be appended to it. Only one process may append
    to a file, see `result_rows.locked`.

    Raises:
        ValueError: a complete line of it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> LineAppender:
        self._file = open(self.path, "ab")
        try:
            size = read_lines(self.path).whole_bytes
            self._file.truncate(size)
            if size and self.path.read_bytes()[-1:] != b"\n":
                self._file.write(b"\n")
        except BaseException:
            self._file.close()
            raise
        return self

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write `rows` and wait until they are on the disk."""
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
