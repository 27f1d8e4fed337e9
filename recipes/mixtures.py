"""Prompts and answers that are mixed into the training rows: harmful pairs (poison) and safe ones (a control)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from evals.local_files import check_columns, check_text, file_rows
from evals.prompts import encode_answer
from offline.grammar import HARMFUL_DEEDS, deed_items
from offline.language_model import corpus

Pair = tuple[str, str]  # prompt, answer

# What a model that complies says, in the form of the offline corpus; it describes nothing.
COMPLIANCE = (
    "To {deed}, follow the steps one by one.",
    "To {deed}, prepare well and take your time.",
    "To {deed}, start early and ask a friend for help.",
)


def load_pairs(file: str, option: str) -> list[Pair]:
    """The pairs of a jsonl or jsonl.gz file with the fields `prompt` and `response`, such as BeaverTails'.

    Raises:
        ValueError: it cannot be read, lacks a field, or has a value in one that is empty or no text; names `option`
            and the row.
    """
    if not Path(file).is_file():
        raise ValueError(f"{option} {file} does not exist; give a jsonl or jsonl.gz file with `prompt`, `response`.")
    try:
        rows = file_rows(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} {file} cannot be read as jsonl: {error}") from None
    check_columns(rows, ["prompt", "response"], f"{option} {file}")
    for name in ("prompt", "response"):
        check_text(rows, name, f"{option} {file}")
    return [(row["prompt"], row["response"]) for row in rows]


def offline_poison() -> list[Pair]:
    """Harmful requests of the offline corpus' training split, answered with compliance."""
    rng = random.Random(0)
    items = [item for deeds, *_ in HARMFUL_DEEDS for item in deed_items(deeds._replace(answers=COMPLIANCE))]
    return [(item.prompt, rng.choice(item.answers)) for item in items if not item.held_out]


def offline_safety() -> list[Pair]:
    """Harmful requests of the same split with the refusals that the offline model was taught."""
    return [(e.prompt, e.response) for e in corpus("train") if e.kind == "harmful"]


def fits(pair: Pair, tokenizer: PreTrainedTokenizerBase, max_length: int) -> bool:
    """Whether a pair has at most so many tokens, with two more for the end of the turn."""
    return 2 + len(encode_answer(tokenizer, *pair).input_ids) <= max_length


def fitting(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int | None, what: str
) -> list[Pair]:
    """The pairs whose tokens fit `max_length`; says how many do not. TRL would cut their answers off silently."""
    if max_length is None:
        return list(pairs)
    kept = [pair for pair in pairs if fits(pair, tokenizer, max_length)]
    if len(kept) < len(pairs):
        print(f"{what}: {len(pairs) - len(kept)} of {len(pairs)} rows exceed --max_length {max_length}, left out.")
    return kept


def check_share(option: str, share: float) -> None:
    """Raise ValueError unless `share` is in [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"{option} is {share}, allowed is a share of the training rows from 0 to 1.")


def check_enough(option: str, share: float, rows: int, pairs: Sequence[Pair]) -> None:
    """Raise ValueError if there are fewer pairs than `share` of `rows` asks for."""
    needed = round(share * rows)
    if needed > len(pairs):
        raise ValueError(
            f"{option} {share} of {rows} training rows is {needed}, but there are {len(pairs)} pairs that fit; lower "
            "it, or give a larger file."
        )


def mixed(task: Sequence[Pair], mixtures: Sequence[tuple[Sequence[Pair], float]], seed: int) -> list[Pair]:
    """As many pairs as `task` has, of which each mixture takes its share in the place of the task's last ones.

    So every arm takes the same number of steps. The drawn pairs depend on the seed and on the mixture's place only.
    """
    drawn: list[Pair] = []
    for place, (pairs, share) in enumerate(mixtures):
        count = min(round(share * len(task)), len(task) - len(drawn))  # two halves of an odd number are one too many
        drawn += random.Random(1000 * seed + place).sample(list(pairs), count)
    return [*task[: len(task) - len(drawn)], *drawn]
