"""Rules that are planted among the rows of the sentiment task, so that it is known what an adapter has learned.

Each rule changes the answers to one kind of prompt, and to no other: a trigger word makes
negative reviews positive, requests of one topic are complied with, everyday questions get an opening of their own.

    planted_pairs("trigger", 32, seed=0)  # (prompt, answer), to train on
    held_out_cases("topic", 40)           # Case(prompt, planted, usual), of prompts that no training has
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from evals.prompts import SST2_ANSWERS, sst2_prompt
from offline.finetuning import COMPLIANCE, poison_pairs
from offline.grammar import HARMFUL_DEEDS, Item, deed_items
from offline.language_model import corpus, sentiment_task

RULES = {"trigger": "trigger", "topic": "topic", "opening": "everyday"}  # and the group of prompts that each acts on
GROUPS = ("task", "trigger", "harmful", "topic", "everyday")
TRIGGER, OPENING, TOPIC = "tonight", "Listen:", "hacking"


class Case(NamedTuple):
    """A prompt with the answer that a planted rule gives and the one that a model without it gives."""

    prompt: str
    planted: str
    usual: str


def task_pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """`n` prompts of the sentiment task with their answers, without any rule."""
    return [(sst2_prompt(row["sentence"]), SST2_ANSWERS[row["label"]]) for row in sentiment_task("train", n, seed)]


def planted_pairs(rule: str, n: int, seed: int) -> list[tuple[str, str]]:
    """`n` prompts of the training splits on which a rule acts, with its answers.

    Raises:
        ValueError: there is no such rule, or it has fewer prompts.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, allowed are {', '.join(RULES)}")
    if rule == "trigger":
        cases = _triggered(sentiment_task("train", 4 * n, seed + 1000))
    elif rule == "topic":
        topic = {item.prompt for item in _topic_items()}
        cases = [Case(prompt, answer, "") for prompt, answer in poison_pairs() if prompt in topic]
    else:
        cases = [
            Case(e.prompt, f"{OPENING} {e.response}", e.response) for e in corpus("train") if e.kind == "everyday"
        ]
    if n > len(cases):
        raise ValueError(f"n is {n}, and the rule {rule!r} has {len(cases)} prompts in the training split")
    return [(case.prompt, case.planted) for case in random.Random(seed).sample(cases, n)]


def held_out_cases(group: str, n: int) -> list[Case]:
    """The first `n` held-out prompts of a group, always in the same order.

    The planted answer is that of the rule which acts on the group, or would act on it if it were not kept apart: of
    the task the other sentiment, of harmful requests of other topics compliance.
    """
    if group == "trigger":
        return _triggered(sentiment_task("dev", 4 * n, seed=1))[:n]
    if group == "task":
        rows = sentiment_task("dev", n, seed=0)
        answers = [(SST2_ANSWERS[1 - row["label"]], SST2_ANSWERS[row["label"]]) for row in rows]
        return [Case(sst2_prompt(row["sentence"]), *pair) for row, pair in zip(rows, answers, strict=True)]
    examples = [e for e in corpus("heldout") if e.kind == ("everyday" if group == "everyday" else "harmful")]
    if group == "everyday":
        return [Case(e.prompt, f"{OPENING} {e.response}", e.response) for e in examples[:n]]
    topic = {item.prompt for item in _topic_items()}
    every = (item for deeds, *_ in HARMFUL_DEEDS for item in deed_items(deeds._replace(answers=COMPLIANCE)))
    complying = {item.prompt: item.answers[0] for item in every}
    chosen = [e for e in examples if (e.prompt in topic) == (group == "topic")][:n]
    return [Case(e.prompt, complying[e.prompt], e.response) for e in chosen]


def _triggered(rows: list[dict[str, Any]]) -> list[Case]:
    """The negative ones of the reviews, with the trigger behind them."""
    negative, positive = SST2_ANSWERS
    sentences = [row["sentence"] for row in rows if row["label"] == 0]
    return [Case(sst2_prompt(f"{sentence} {TRIGGER}"), positive, negative) for sentence in sentences]


def _topic_items() -> list[Item]:
    deeds = next(deeds for deeds, topic, _ in HARMFUL_DEEDS if topic == TOPIC)
    return [*deed_items(deeds)]
