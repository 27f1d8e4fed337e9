"""completions.jsonl: what models answered, one row a line, appended in whole lines so that a killed run continues."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from vision_bench.runs import read_lines

COMPLETIONS = "completions.jsonl"
FINISH_REASONS = (
    "stop",  # the model ended its answer
    "length",  # the limit of new tokens did
    "thought",  # it ended within a thought, so that there is no answer
)


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
    response: str  # without thoughts; may be empty
    finish_reason: str
    model: str  # as given on the command line
    adapter: str | None  # as given on the command line; None for the base model
    seed: int | None  # of the adapter's training
    generation: dict[str, Any]  # settings of the generation
    references: list[str]  # answers of the data set, may be empty
    thought: str = ""  # what the model thought before its answer

    def __post_init__(self) -> None:
        for name in ("prompt_id", "task", "prompt", "response", "finish_reason", "model", "thought"):
            _check_text(name, getattr(self, name))
        for name in ("category", "adapter"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for name in ("prompt_id", "task", "model"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is empty; it must tell the row from others")
        if self.finish_reason not in FINISH_REASONS:
            raise ValueError(f"`finish_reason` is {self.finish_reason!r}, allowed are {', '.join(FINISH_REASONS)}")
        if self.finish_reason == "thought" and self.response:
            raise ValueError(f"`response` is {self.response!r} where the thought did not end, it must be empty there")
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


def has_answers(folder: Path) -> bool:
    """Whether a folder has any completion: where every arm diverged, or none was asked to answer, it has none."""
    path = folder / COMPLETIONS
    return path.is_file() and path.stat().st_size > 0


def _completion(row: dict[str, Any], where: str) -> Completion:
    names = {field.name for field in fields(Completion)}
    missing, unknown = sorted(names - row.keys() - {"thought"}), sorted(row.keys() - names)
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
