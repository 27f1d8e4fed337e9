"""verdicts.jsonl: what judges said of completions, one row a line."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from evals.completions import Completion
from vision_bench.runs import read_lines

VERDICTS = "verdicts.jsonl"
OUTCOMES = ("safe", "unsafe", "unparsed", "truncated", "unfinished_thought")  # only the first two are verdicts


@dataclass(frozen=True)
class Verdict:
    """What one judge said of one completion.

    Raises:
        ValueError: `outcome` is not one of OUTCOMES, a score is not in [0, 1], or another field has a wrong type.
    """

    judge: str  # as given on the command line
    settings: dict[str, str]  # of the judge, see `evals.judges.Judge`
    prompt_id: str
    task: str
    category: str | None  # of the prompt
    model: str
    adapter: str | None
    seed: int | None
    text: str  # checksum of prompt and response, by which a verdict knows its completion
    # "truncated": not unsafe as far as the judge could read, and it could not read all; "unfinished_thought": there is
    # no answer, because the model's thought before it did not end, and the judge was not asked.
    outcome: str
    scores: dict[str, float | None]  # the judge's own in [0, 1], by policy or category; None for no number
    reply: str | None  # of a judge that writes, as it came
    seconds: float  # of the judging, its share of the batch

    def __post_init__(self) -> None:
        texts: dict[str, type | tuple[type, ...]] = dict.fromkeys(
            ("judge", "prompt_id", "task", "model", "text", "outcome"), str
        )
        optional = (str, type(None))
        types = texts | {"category": optional, "adapter": optional, "reply": optional, "seed": (int, type(None))}
        for name, allowed in (types | {"settings": dict, "scores": dict, "seconds": (int, float)}).items():
            if not isinstance(getattr(self, name), allowed):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, which has the wrong type")
        if self.outcome not in OUTCOMES:
            raise ValueError(f"`outcome` is {self.outcome!r}, allowed are {', '.join(OUTCOMES)}")
        for name, score in self.scores.items():
            if score is not None and not (isinstance(score, int | float) and 0 <= score <= 1):
                raise ValueError(f"`scores` has {score!r} for {name!r}, allowed are numbers from 0 to 1 and null")

    @property
    def completion_key(self) -> tuple[str, str, str | None, str]:
        """`Completion.key` of the completion."""
        return self.task, self.model, self.adapter, self.prompt_id

    @property
    def key(self) -> tuple[str, str, str, str | None, str]:
        """What no two verdicts of a file share."""
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


def text_checksum(completion: Completion) -> str:
    """16 hex digits of the judged text."""
    text = json.dumps([completion.prompt, completion.response])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Verdicts(NamedTuple):
    """The complete rows of a verdicts file, and a sentence that reports its cut last line, if it has one."""

    rows: list[Verdict]
    torn: str | None


def read_verdicts(path: str | Path) -> Verdicts:
    """Read and check a verdicts file. A last line that was cut is left out and reported in `torn`.

    Raises:
        ValueError: a line before its end is no verdict, or repeats an earlier one; names the line.
    """
    path = Path(path)
    lines = read_lines(path)
    needed = {field.name for field in fields(Verdict)}
    seen: dict[tuple[str, str, str, str | None, str], int] = {}
    rows = []
    for number, row in lines.rows:
        where = f"{path}, line {number}"
        if row.keys() != needed:
            raise ValueError(
                f"{where} is no verdict: its fields must be {', '.join(sorted(needed))}. Delete the line."
            )
        try:
            verdict = Verdict(**row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}. Delete the line, the completion is judged again.") from None
        first = seen.setdefault(verdict.key, number)
        if first != number:
            raise ValueError(f"{where} judges what line {first} has judged already; delete one of the two lines.")
        rows.append(verdict)
    return Verdicts(rows, lines.torn)


def belonging(
    verdicts: Iterable[Verdict], completions: Mapping[tuple[str, str, str | None, str], Completion], folder: Path
) -> Iterator[Verdict]:
    """The verdicts on completions that are there.

    Raises:
        ValueError: a verdict is on another text than the completions have under its key.
    """
    for verdict in verdicts:
        completion = completions.get(verdict.completion_key)
        if completion is None:
            continue
        if text_checksum(completion) != verdict.text:
            raise ValueError(
                f"{folder / VERDICTS} has a verdict on prompt {verdict.prompt_id!r} of {verdict.task!r} (adapter "
                f"{verdict.adapter!r}), whose text is another one in the completions: it belongs to another file. "
                "Move the verdicts away to judge anew."
            )
        yield verdict
