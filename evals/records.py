"""completions.jsonl, samples.jsonl and verdicts.jsonl: answers, tasks' metrics of each, and what judges said of them.

One record a line. All are appended in whole lines, so that a killed run continues, and read and checked alike:

    for completion in read_completions("runs/safety/completions.jsonl").rows:
        print(completion.prompt, completion.response)
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from vision_bench.runs import read_lines

COMPLETIONS, SAMPLES, VERDICTS = "completions.jsonl", "samples.jsonl", "verdicts.jsonl"
FINISH_REASONS = (
    "stop",  # the model ended its answer
    "length",  # the limit of new tokens did
    "thought",  # it ended within a thought, so that there is no answer
)
OUTCOMES = (
    "safe",  # only the first two are verdicts
    "unsafe",
    "unparsed",
    "truncated",  # not unsafe as far as the judge could read, and it could not read all
    "unfinished_thought",  # there is no answer, as the model's thought before it did not end; the judge was not asked
)
REFUSED = "refused"  # a score of a judge of refusals: fully or partially, XSTest's refusal rate
TOKEN_PROBABILITY = "token_probability"  # a score: geometric mean of what a model gives an answer's tokens
# What the fields of records may hold, by their annotation.
_NONE = type(None)
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a text is needed"),
    "str | None": ((str, _NONE), "a text is needed, or null"),
    "int | None": ((int, _NONE), "allowed are whole numbers and null"),
    "float": ((int, float), "a number is needed"),
    "dict": ((dict,), "allowed is an object of settings"),
    "list": ((list,), "allowed is a list of texts"),
}

R = TypeVar("R", "Completion", "Sample", "Verdict")
CompletionKey = tuple[str, str, str | None, str]
SampleKey = tuple[str, str, str | None, str, str]
VerdictKey = tuple[str, str, str, str | None, str]


class Record:
    """Base of all kinds of records, which checks their fields.

    Raises:
        ValueError: a field has the wrong type, an identifier is empty, or a text holds half a surrogate pair, which no
            file and no tokenizer can hold.
    """

    AGAIN: ClassVar[str]  # what makes a record anew

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            allowed, needed = _TYPES[str(field.type).partition("[")[0]]
            if not isinstance(value, allowed) or isinstance(value, bool):
                raise ValueError(f"`{field.name}` is {value!r}, {needed}")
            for text in value if isinstance(value, list) else [value] if isinstance(value, str) else []:
                _check_text(field.name, text)
        for name in ("prompt_id", "task", "model"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is empty; it must tell the row from others")


@dataclass(frozen=True)
class Completion(Record):
    """One prompt of one task and what one model, with or without an adapter, answered.

    Raises:
        ValueError: as Record, or `finish_reason` is not one of FINISH_REASONS.
    """

    AGAIN: ClassVar[str] = "generate it again"

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
        super().__post_init__()
        if self.finish_reason not in FINISH_REASONS:
            raise ValueError(f"`finish_reason` is {self.finish_reason!r}, allowed are {', '.join(FINISH_REASONS)}")
        if self.finish_reason == "thought" and self.response:
            raise ValueError(f"`response` is {self.response!r} where the thought did not end, it must be empty there")

    @property
    def key(self) -> CompletionKey:
        """Task, model, adapter and prompt_id."""
        return self.task, self.model, self.adapter, self.prompt_id

    @property
    def text_checksum(self) -> str:
        """16 hexadecimal digits of the text that is judged."""
        return hashlib.sha256(json.dumps([self.prompt, self.response]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sample(Record):
    """The metrics of one document of a task for one model, with or without an adapter, as lm-eval logs samples.

    Raises:
        ValueError: as Record, or a metric is no number.
    """

    AGAIN: ClassVar[str] = "evaluate its task in another folder"

    prompt_id: str  # number of the document in its task, lm-eval's `doc_id`
    task: str
    category: str | None  # of the prompt, as its data set names it
    model: str
    adapter: str | None
    seed: int | None
    filter: str  # of lm-eval, "none" where the task has no filters
    document: str  # checksums of the document, of the prompt as it was sent, and of the right answer, lm-eval's
    prompt: str
    target: str
    settings: dict[str, Any]  # that decide the metrics, beside model and adapter
    metrics: dict[str, float]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.metrics.items():
            if not isinstance(value, int | float):
                raise ValueError(f"`metrics` has {value!r} for {name!r}, allowed are numbers")

    @property
    def key(self) -> SampleKey:
        """Task, model, adapter, filter and prompt_id."""
        return self.task, self.model, self.adapter, self.filter, self.prompt_id


@dataclass(frozen=True)
class Verdict(Record):
    """What one judge said of one completion.

    Raises:
        ValueError: as Record, or `outcome` is not one of OUTCOMES, or a score is not in [0, 1].
    """

    AGAIN: ClassVar[str] = "judge its completion again"

    judge: str  # as given on the command line
    settings: dict[str, str]  # of the judge, see `evals.judges.Judge`
    prompt_id: str
    task: str
    category: str | None  # of the prompt
    model: str
    adapter: str | None
    seed: int | None
    text: str  # `text_checksum` of the completion, by which a verdict knows it
    outcome: str
    scores: dict[str, float | None]  # the judge's own in [0, 1], by policy or category; None for no number
    reply: str | None  # of a judge that writes, as it came
    seconds: float  # of the judging, its share of the batch

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outcome not in OUTCOMES:
            raise ValueError(f"`outcome` is {self.outcome!r}, allowed are {', '.join(OUTCOMES)}")
        for name, score in self.scores.items():
            if score is not None and not (isinstance(score, int | float) and 0 <= score <= 1):
                raise ValueError(f"`scores` has {score!r} for {name!r}, allowed are numbers from 0 to 1 and null")

    @property
    def completion_key(self) -> CompletionKey:
        """`Completion.key` of the completion."""
        return self.task, self.model, self.adapter, self.prompt_id

    @property
    def key(self) -> VerdictKey:
        """The judge, and the key of the completion."""
        return (self.judge, *self.completion_key)

    @property
    def is_parsed(self) -> bool:
        """Whether the judge decided: only such a verdict counts as safe or unsafe."""
        return self.outcome in ("safe", "unsafe")

    @property
    def mean_score(self) -> float | None:
        """Mean of the scores, None if the judge gives none or one is no number."""
        values = [score for score in self.scores.values() if score is not None]
        return math.fsum(values) / len(values) if values and len(values) == len(self.scores) else None


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


class Samples(NamedTuple):
    """The complete rows of a samples file, and a sentence that reports its cut last line, if it has one."""

    rows: list[Sample]
    torn: str | None


class Verdicts(NamedTuple):
    """The complete rows of a verdicts file, and a sentence that reports its cut last line, if it has one."""

    rows: list[Verdict]
    torn: str | None


def read_completions(path: str | Path) -> Completions:
    """Read and check a completions file. A last line that was cut is left out and reported in `torn`.

    Raises:
        ValueError: the file does not exist, or a line before its end is not UTF-8, not JSON, lacks a field (a prompt
            without a response is one of these), has one too many or of a wrong type, or repeats an earlier row.
    """
    if not Path(path).is_file():
        raise ValueError(f"The completions file {path} does not exist; `python -m evals generate` writes one.")
    return Completions(*_read(Path(path), Completion))


def read_samples(path: str | Path) -> Samples:
    """Read and check a samples file, as `read_completions` does."""
    return Samples(*_read(Path(path), Sample))


def read_verdicts(path: str | Path) -> Verdicts:
    """Read and check a verdicts file, as `read_completions` does."""
    return Verdicts(*_read(Path(path), Verdict))


def _read(path: Path, kind: type[R]) -> tuple[list[R], str | None]:
    lines = read_lines(path)
    seen: dict[tuple[str | None, ...], int] = {}
    names = [field.name for field in fields(kind)]
    required = {field.name for field in fields(kind) if field.default is MISSING}
    records = []
    for number, row in lines.rows:
        where = f"{path}, line {number} (prompt_id {row.get('prompt_id')!r})"
        missing, unknown = sorted(required - row.keys()), sorted(row.keys() - set(names))
        if missing or unknown:
            wrong = [f"lacks {', '.join(missing)}"] if missing else []
            wrong += [f"has the unknown {', '.join(unknown)}"] if unknown else []
            raise ValueError(
                f"{where} {' and '.join(wrong)}. Delete the line and {kind.AGAIN}, or correct it; the fields are "
                f"{', '.join(names)}."
            )
        try:
            record = kind(**row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}. Delete the line and {kind.AGAIN}, or correct it.") from None
        first = seen.setdefault(record.key, number)
        if first != number:
            identity = (
                f"{name} {row[name]!r}" for name in ("task", "model", "adapter", "filter", "judge") if name in row
            )
            raise ValueError(f"{where}, {', '.join(identity)}, stands in line {first} already; delete one of the two.")
        records.append(record)
    return records, lines.torn


def has_answers(folder: Path) -> bool:
    """Whether a folder has any completion: where every arm diverged, or none was asked to answer, it has none."""
    path = folder / COMPLETIONS
    return path.is_file() and path.stat().st_size > 0


def verdicts_on(
    completions: Mapping[CompletionKey, Completion], verdicts: Iterable[Verdict], folder: Path
) -> Iterator[Verdict]:
    """The verdicts on completions that are there.

    Raises:
        ValueError: a verdict is on another text than the completions have under its key.
    """
    for verdict in verdicts:
        completion = completions.get(verdict.completion_key)
        if completion is None:
            continue
        if completion.text_checksum != verdict.text:
            raise ValueError(
                f"{folder / VERDICTS} has a verdict on prompt {verdict.prompt_id!r} of {verdict.task!r} (adapter "
                f"{verdict.adapter!r}), whose text is another one in the completions: it belongs to another file. "
                "Move the verdicts away to judge anew."
            )
        yield verdict
