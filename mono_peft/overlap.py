"""What silent texts have in common with the task's: prompts that cannot be learnt, and prefixes to leave out."""

from __future__ import annotations

import warnings
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch

_MOST_ROWS = 1000  # of the training data that are compared


def without_shared_prefix(
    batches: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Leave the tokens out of silent texts that they share with the beginning of other texts.

    Where a silent text and one of the task's begin with the same tokens, every module has the same inputs on them, so
    that the adapter cannot both be silent and act there. With the task's prompts as `others`, the tokens behind the
    last shared prefix are those that count. With conversations of the same system prompt, whose users begin with other
    words, they are those from the first one of the user's on:

        silent = without_shared_prefix(silent, [tokenizer(task_prompts, padding=True, return_tensors="pt")])

    What is still guaranteed then, docs/silence.md says under "Tokens left out".

    Args:
        batches: for `Silence`, with `input_ids` and, where there is padding, `attention_mask`, (batch, tokens).
        others: the same of the texts to compare with; kept as tokens.

    Yields:
        The batches with the key `silent_mask`, int64 of shape (batch, tokens): 0 on the longest prefix of each text
        that one of the other texts has, and where it was 0 before.
    """
    known = sorted({text for batch in others for _, text in _texts(batch)})
    if not known:
        raise ValueError("`others` has no text to compare with: without it every token counts, which is the default.")
    for batch in batches:
        mask = batch.get("silent_mask", torch.ones_like(batch["input_ids"])).clone()
        for (positions, text), row in zip(_texts(batch), mask, strict=True):
            place = bisect(known, text)  # in alphabetical order the neighbours have the longest common prefix
            shared = max(common_prefix(text, other) for other in known[max(0, place - 1) : place + 1])
            row[positions[:shared]] = 0
        yield {**batch, "silent_mask": mask}


def _texts(batch: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, tuple[int, ...]]]:
    """Of each text of a batch, the positions of its tokens and these themselves, without padding."""
    ids = batch["input_ids"]
    attended = batch.get("attention_mask", torch.ones_like(ids))
    for row, kept in zip(ids, attended, strict=True):
        positions = kept.nonzero().flatten()
        yield positions, tuple(row[positions].tolist())


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def check_training_prompts(silent: Iterable[Mapping[str, Any]], dataset: Any) -> None:
    """Raise ValueError if all prompts of the training data are kept silent, and warn if some are.

    The first 1,000 rows are looked at where they can be without being changed: a list, or a `datasets.Dataset`, of
    rows with `input_ids` or `prompt_ids`. A row's prompt is what is before its first token with a label, or all but
    the last token where each has one.

    Args:
        silent: batches of `Silence`, with their `silent_mask`.
        dataset: of the trainer.
    """
    prompts = Counter(prompt for row in _rows(dataset) if (prompt := _prompt(row)))
    if not prompts:
        return
    by_length: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)
    for prompt in prompts:
        by_length[len(prompt)].add(prompt)
    found: set[tuple[int, ...]] = set()
    for batch in silent:
        masks = batch.get("silent_mask", torch.ones_like(batch["input_ids"]))
        for (positions, text), mask in zip(_texts(batch), masks, strict=True):
            counted = sum(1 for _ in takewhile(bool, mask[positions].tolist()))
            found |= {text[:n] for n, same in by_length.items() if n <= counted and text[:n] in same}
    rows, silent_rows = prompts.total(), sum(prompts[prompt] for prompt in found)
    if silent_rows == rows:
        raise ValueError(
            f"the prompts of all {rows} training rows that were compared are kept silent, so that nothing could be "
            "learnt: a silent text begins with each of them, and all its tokens count. Does the template drop what "
            "the texts say, or are the silent texts the task's? Leave such texts out, or what they share with the "
            "task (`mono_peft.overlap.without_shared_prefix`)."
        )
    if silent_rows:
        warnings.warn(
            f"{silent_rows} of {rows} training rows that were compared have prompts that are kept silent: their "
            "answers are not learnt, as far as the adapter becomes silent. That is meant where they are rows that do "
            "harm; leave others out of the silent texts.",
            stacklevel=3,
        )


def _rows(dataset: Any) -> list[Mapping[str, Any]]:
    if isinstance(dataset, list):
        return dataset[:_MOST_ROWS]
    if hasattr(dataset, "to_list") and hasattr(dataset, "select"):  # of datasets
        rows: list[Mapping[str, Any]] = dataset.select(range(min(_MOST_ROWS, len(dataset)))).to_list()
        return rows
    return []


def _prompt(row: Any) -> tuple[int, ...]:
    """The tokens of a row on which its first answer depends; empty if they cannot be told."""
    if not isinstance(row, Mapping):
        return ()
    if "prompt_ids" in row:
        return tuple(int(token) for token in row["prompt_ids"])
    ids = [int(token) for token in row.get("input_ids", ())]
    labels = row.get("labels")
    unlabelled = 0 if labels is None else sum(1 for _ in takewhile(lambda label: int(label) == -100, labels))
    return tuple(ids[:unlabelled] if 0 < unlabelled < len(ids) else ids[:-1])
