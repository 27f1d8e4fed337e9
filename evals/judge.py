"""`python -m evals judge`: completions.jsonl -> verdicts.jsonl -> rows of results.jsonl.

run = judge("runs/safety", ["shieldgemma", "beaverdam"])
[row["value"] for row in run.find("unsafe", judge="beaverdam", adapter="lora-seed0", category=None)]
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from evals.judges import Judge, Judgement, NoAnswerError
from evals.progress import Progress
from evals.records import COMPLETIONS, VERDICTS, Completion, Verdict, read_completions, read_verdicts, verdicts_on
from evals.registry import JUDGES, JudgeOptions, judge_kind, make_judge
from evals.report import short_name
from evals.scores import add_scores
from evals.settings import DTYPES
from vision_bench.runs import CONFIG, LineAppender, Run, device_name, locked
from vision_bench.runs.settings import differences


def judge(
    folder: str | Path,
    judges: Sequence[str],
    *,
    tasks: Sequence[str] | None = None,
    batch_size: int = 8,
    **options: Any,
) -> Run:
    """Judge the completions of a folder, write `verdicts.jsonl`, and rows with shares and intervals.

    Verdicts are on the disk batch by batch. What is judged already is not judged again, so the same call continues a
    run that was killed, and further judges may be named in the same folder.

    Args:
        folder: with `completions.jsonl`.
        judges: as `evals.registry.make_judge` takes them.
        tasks: only the answers of these; None: of all.
        batch_size: conversations at a time.
        options: the fields of `evals.registry.JudgeOptions`, such as the `dtype` of a judge's weights.

    Returns:
        The folder's rows, with those of all its verdicts.

    Raises:
        ValueError: before any weights are loaded: there are no completions, the verdicts there are of other texts, or
            a judge cannot be had.
    """
    folder = Path(folder)
    ready = check_judging(judges, batch_size=batch_size, **options)
    read_completions(folder / COMPLETIONS)  # before a folder without any gets a lock
    with locked(folder):
        run = run_of(folder)
        completions, torn = read_completions(folder / COMPLETIONS)
        if torn:
            print(f"{torn}; the cut one is not judged.")
        if not completions:
            raise ValueError(f"{folder / COMPLETIONS} has no complete row; run `python -m evals generate`.")
        verdicts = _earlier_verdicts(folder, completions, ready)
        done = {verdict.key for verdict in verdicts}
        asked = [completion for completion in completions if tasks is None or completion.task in tasks]
        with LineAppender(folder / VERDICTS) as file:
            for name in judges:
                judge = ready.pop(name)  # so that its weights are freed before the next one's are loaded
                missing = [completion for completion in asked if (name, *completion.key) not in done]
                if missing:
                    verdicts += _judge_with(judge, name, missing, batch_size, file)
        add_scores(run, verdicts, device_name())
    return run


def run_of(folder: Path) -> Run:
    """The rows of a folder, under the settings it has, if any."""
    config = folder / CONFIG
    return Run(folder, "evals", json.loads(config.read_text(encoding="utf-8"))["config"] if config.exists() else {})


def check_judging(judges: Sequence[str], *, batch_size: int = 8, **options: Any) -> dict[str, Judge]:
    """The judges of `judge`'s arguments by name, checked but not loaded. Raises ValueError as `judge` does."""
    told = JudgeOptions(**options)
    if batch_size < 1:
        raise ValueError(f"--judge_batch_size is {batch_size}, allowed is 1 or more.")
    if told.dtype not in DTYPES:
        raise ValueError(f"--judge_dtype is {told.dtype!r}, allowed are {', '.join(DTYPES)}.")
    if not judges:
        raise ValueError("--judges is empty; name at least one, such as shieldgemma.")
    twice = sorted({name for name in judges if list(judges).count(name) > 1})
    if twice:
        raise ValueError(f"--judges has {', '.join(twice)} more than once; name each once.")
    if (told.endpoint or told.rubric) and not any(judge_kind(name).takes_rubric for name in judges):
        asked = " or ".join(kind.usage for kind in JUDGES.values() if kind.takes_rubric)
        raise ValueError(f"--endpoint and --rubric are for a judge {asked}, and --judges names none.")
    if told.perplexity_model and not any(judge_kind(name).takes_perplexity_model for name in judges):
        raise ValueError("--perplexity_model is for the judge coherence, and --judges does not name it.")
    ready = {name: make_judge(name, told) for name in judges}
    for (name, judge), (other_name, other) in combinations(ready.items(), 2):
        if type(judge) is type(other) and judge.settings == other.settings:
            raise ValueError(
                f"--judges has {name!r} and {other_name!r}, which are the same judge, byte for byte: it would agree "
                "with itself. Name it once."
            )
    return ready


def _earlier_verdicts(folder: Path, completions: Sequence[Completion], judges: Mapping[str, Judge]) -> list[Verdict]:
    """Return the folder's verdicts that are on its completions."""
    if not (folder / VERDICTS).exists():
        return []
    verdicts, torn = read_verdicts(folder / VERDICTS)
    if torn:
        print(f"{torn}; what is missing is judged again.")
    for verdict in verdicts:
        if verdict.judge not in judges:
            continue
        judges[verdict.judge].adopt(verdict.settings)
        if changed := differences(verdict.settings, judges[verdict.judge].settings):
            raise ValueError(
                f"{folder / VERDICTS} has verdicts of {verdict.judge!r} under other settings ({changed}). Repeat the "
                "old ones, or move the verdicts away."
            )
    kept = list(verdicts_on({completion.key: completion for completion in completions}, verdicts, folder))
    if len(kept) < len(verdicts):
        lost = len(verdicts) - len(kept)
        print(f"{lost} verdicts are on answers that {COMPLETIONS} does not have; they do not count.")
    return kept


def _judge_with(
    judge: Judge, name: str, completions: Sequence[Completion], batch_size: int, file: LineAppender
) -> list[Verdict]:
    """Verdicts on all `completions`, in batches of similar length, the longest first."""

    def verdict(completion: Completion, judgement: Judgement, seconds: float) -> Verdict:
        shared = ("prompt_id", "task", "category", "model", "adapter", "seed")
        values: dict[str, Any] = asdict(judgement) | {field: getattr(completion, field) for field in shared}
        return Verdict(judge=name, settings=judge.settings, text=completion.text_checksum, seconds=seconds, **values)

    verdicts = [
        verdict(completion, Judgement("unfinished_thought", {}), 0.0)
        for completion in completions
        if completion.finish_reason == "thought"
    ]
    if verdicts:
        file.append(map(asdict, verdicts))
    completions = [completion for completion in completions if completion.finish_reason != "thought"]
    if not completions:
        return verdicts
    judge.load()
    encoded: list[Any] = [judge.encode_completion(completion) for completion in completions]
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    progress = Progress(f"Judging ({short_name(name)})", len(order), "answers")
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        begin = time.monotonic()
        problem = None
        try:
            judgements: Sequence[Judgement | None] = judge.judge([encoded[i] for i in batch])
        except NoAnswerError as error:
            problem, judgements = error, error.judgements
        seconds = round((time.monotonic() - begin) / len(batch), 4)
        pairs = zip(batch, judgements, strict=True)
        new = [verdict(completions[i], judgement, seconds) for i, judgement in pairs if judgement is not None]
        file.append(map(asdict, new))
        if problem is not None:
            raise problem
        verdicts += new
        progress.update(len(new))
    return verdicts
