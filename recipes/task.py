"""What a recipe of Table 2 trains on and scores, as data: its task, pairs that are mixed in, and checksums of all."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from evals.contents import checksum
from evals.local_files import text_rows
from evals.prompts import encode_answer
from vision_bench.runs import CONFIG

Pair = tuple[str, str]  # prompt, answer
Scored = Sequence[tuple[str, Any]]  # prompts, each with what is right


class Content(NamedTuple):
    """A file or model that a run depends on: the name that the user gave it, and its checksum."""

    source: str
    checksum: str


@dataclass(frozen=True)
class Task:
    """The data of a recipe and how a model scores on them.

    Args:
        recipe: its name.
        metric: the name of what `score` measures, whose row says that an arm is trained.
        score: the value of `metric` from the prompts that are scored, a model, its tokenizer and the rows of a batch;
            not finite if a score behind it is not. Every process calls it.
        train: pairs to train on, of which each seed draws `drawn`.
        scored: prompts that are scored.
        sources: the options that name the pairs and the prompts, in this order.
        unit: what their numbers in the run's configuration count.
        refuses_long_rows: whether rows that do not fit are an error; else they are left out, and it is said how many.
        eval_tasks: tasks of lm-eval, answered with the safety prompts.
        task_data: arguments of their data functions.
    """

    recipe: str
    metric: str
    score: Callable[[Scored, torch.nn.Module, PreTrainedTokenizerBase, int], float]
    train: Sequence[Pair]
    drawn: int
    scored: Scored
    sources: tuple[str, str]
    unit: str = "rows"
    refuses_long_rows: bool = False
    eval_tasks: Sequence[str] = ()
    task_data: dict[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        """The prompts that are scored."""
        return [prompt for prompt, _ in self.scored]

    @property
    def contents(self) -> dict[str, Content]:
        """Checksums of what is trained on, of which each seed draws, and of what is scored."""
        rows = {"train": self.train, "eval": self.scored}
        named = zip(rows, self.sources, strict=True)
        return {name: Content(source, checksum(rows[name])) for name, source in named}

    def draw(self, seed: int) -> list[Pair]:
        """The pairs that a seed trains on, in its order; those of `datasets.Dataset.shuffle` with this seed."""
        return [self.train[i] for i in np.random.default_rng(seed).permutation(len(self.train))[: self.drawn]]


def fitted(task: Task, tokenizer: PreTrainedTokenizerBase, context: int, max_length: int | None) -> Task:
    """The task with the scored prompts that fit the model; says how many do not.

    Args:
        context: tokens that the model reads at most.
        max_length: tokens of a training row, None for no limit.

    Raises:
        ValueError: a row does not fit and the task refuses that, or none fits.
    """
    if task.refuses_long_rows:
        longest = sorted(task.train, key=lambda pair: len(pair[0]))[-100:]
        needed = max(_length(pair, tokenizer) for pair in longest)
        if max_length is not None and needed > max_length:
            raise ValueError(f"--max_length {max_length} cuts off answers: the longest row has {needed} tokens.")
        return task
    train, scored = task.sources
    kept = [row for row in task.scored if len(encode_answer(tokenizer, *row).input_ids) <= context]
    if not kept:
        raise ValueError(
            f"None of the {len(task.scored)} held-out rows of {scored} fits the model's context of {context} tokens. "
            "Give shorter rows, or a model with a longer context."
        )
    if len(kept) < len(task.scored):
        print(
            f"{len(task.scored) - len(kept)} of {len(task.scored)} held-out rows exceed the context of {context} "
            f"tokens: they are left out of {task.metric}."
        )
    if max_length is not None and all(_length(pair, tokenizer) > max_length for pair in task.train):
        raise ValueError(f"--max_length {max_length} is too short for every training row of {train}.")
    return replace(task, scored=kept)


def _length(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokens of a training row: those of the pair, and two for the end of the turn."""
    return 2 + len(encode_answer(tokenizer, *pair).input_ids)


def fitting(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int | None, option: str
) -> list[Pair]:
    """The pairs whose tokens fit `max_length`; says how many do not. TRL would cut their answers off silently."""
    if max_length is None:
        return list(pairs)
    kept = [pair for pair in pairs if _length(pair, tokenizer) <= max_length]
    if len(kept) < len(pairs):
        print(f"{option}: {len(pairs) - len(kept)} of {len(pairs)} rows exceed --max_length {max_length}, left out.")
    return kept


def load_pairs(file: str, option: str) -> list[Pair]:
    """The pairs of a jsonl or jsonl.gz file with the fields `prompt` and `response`, such as BeaverTails'.

    Raises:
        ValueError: it cannot be read, lacks a field, or has a value in one that is empty or no text; names `option`
            and the row.
    """
    advice = "Give a jsonl or jsonl.gz file with `prompt`, `response`."
    rows = text_rows(file, ["prompt", "response"], name=f"{option} {file}", advice=advice)
    return [(row["prompt"], row["response"]) for row in rows]


def mixed(task: Sequence[Pair], mixtures: Sequence[tuple[Sequence[Pair], float]], seed: int) -> list[Pair]:
    """Return as many pairs as `task` has; each mixture takes its share, in the place of the task's last ones.

    So every arm takes the same number of steps. The drawn pairs depend on the seed and on the mixture's place only.
    """
    drawn: list[Pair] = []
    for place, (pairs, share) in enumerate(mixtures):
        count = min(round(share * len(task)), len(task) - len(drawn))  # two halves of an odd number are one too many
        drawn += random.Random(1000 * seed + place).sample(list(pairs), count)
    return [*task[: len(task) - len(drawn)], *drawn]


def check_contents(folder: Path, recipe: str, contents: Mapping[str, Content]) -> None:
    """Raise ValueError if the folder's results of a recipe were made with other contents; says of which option."""
    path = folder / CONFIG
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before = recorded["config"].get("contents", {}) if recorded.get("recipe") == recipe else {}
    changed = [
        f"{content.source} has other content ({before[name][:80]} there, {content.checksum[:80]} now)"
        for name, content in contents.items()
        if name in before and before[name] != content.checksum
    ]
    if changed:
        raise ValueError(
            f"{folder} holds results of other data or models: {'; '.join(changed)}. Choose another --output_dir, or "
            "restore what was there to continue that run."
        )
