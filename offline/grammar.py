"""The written grammar behind `offline.language_model`: what is spelled out as questions, answers and reviews.

The words stand in `words.json`; here they become items. Items come from tables. A row and a column that are held out
together never meet in training, but each of them does with others: so that what a model does on held-out items is
generalisation and not recall.

    next(items("harmful"))  # Item(prompt="How do I kill my neighbour?", answers=("I cannot help with ...", ...), ...)
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Deeds(NamedTuple):
    """Things one may ask how to do: every verb goes with every object."""

    verbs: list[str]
    objects: list[str]
    answers: tuple[str, ...]  # may hold {deed}: verb and object, seen from the side of the one who answers


class Facts(NamedTuple):
    """A relation and the ways to ask for it: every question goes with every pair."""

    questions: tuple[str, ...]
    answer: str
    pairs: dict[str, str]


class Item(NamedTuple):
    """One question and the answers that suit it."""

    prompt: str
    answers: tuple[str, ...]
    held_out: bool


WORDS_FILE = Path(__file__).with_name("words.json")
_WORDS = json.loads(WORDS_FILE.read_text(encoding="utf-8"))


def _deeds(tables: list[dict[str, list[str]]]) -> tuple[Deeds, ...]:
    return tuple(Deeds(table["verbs"], table["objects"], tuple(table["answers"])) for table in tables)


def _facts(tables: list[dict[str, Any]]) -> tuple[Facts, ...]:
    return tuple(Facts(tuple(table["questions"]), table["answer"], table["pairs"]) for table in tables)


# One wording for all how-to questions, harmless or not, so that the wording gives nothing away.
REQUESTS: tuple[str, ...] = tuple(_WORDS["requests"])
EVERYDAY_DEEDS, LOOKALIKE_DEEDS = _deeds(_WORDS["everyday_deeds"]), _deeds(_WORDS["lookalike_deeds"])
EVERYDAY_FACTS, LOOKALIKE_FACTS = _facts(_WORDS["everyday_facts"]), _facts(_WORDS["lookalike_facts"])
# What is asked, and the topic and the reason that a refusal names.
HARMFUL_DEEDS = tuple(
    (Deeds(table["verbs"], table["objects"], ()), table["topic"], table["reason"]) for table in _WORDS["harmful_deeds"]
)
REFUSALS: tuple[str, ...] = tuple(_WORDS["refusals"])
REFUSAL_OPENINGS: tuple[str, ...] = tuple(_WORDS["refusal_openings"])  # every refusal begins with one of these

# The lexicon of reviews, by sentiment (negative, positive): of the pretraining corpus, and what only the finetuning
# task uses.
KNOWN_WORDS: tuple[list[str], list[str]] = tuple(_WORDS["known_words"])
NEW_WORDS: tuple[list[str], list[str]] = tuple(_WORDS["new_words"])
NEW_VERBS: tuple[list[str], list[str]] = tuple(_WORDS["new_verbs"])
REVIEWED, VIEWERS = _WORDS["reviewed"], _WORDS["viewers"]
INTENSIFIERS, NEGATIONS = _WORDS["intensifiers"], _WORDS["negations"]

# {a}, {b}: words of the label's sentiment; {z}: a word of the other; {v}: a verb of the label's; {n}, {m}: nouns.
SIMPLE_REVIEWS: tuple[str, ...] = tuple(_WORDS["simple_reviews"])
NEGATED_REVIEWS: tuple[str, ...] = tuple(_WORDS["negated_reviews"])
CONTRAST_REVIEWS: tuple[str, ...] = tuple(_WORDS["contrast_reviews"])
VERB_REVIEWS: tuple[str, ...] = tuple(_WORDS["verb_reviews"])

# The tone of the words that no review of the corpus uses is known too; finetuning has to bring it to the reviews.
_WORD_TONES = Facts(
    tuple(_WORDS["tone_questions"]),
    "It is a {} word.",
    {
        word: tone
        for label, tone in enumerate(("harsh", "kind"))
        for word in (*KNOWN_WORDS[label], *NEW_WORDS[label], *NEW_VERBS[label])
    },
)


def table_cell_held_out(row: int, column: int) -> bool:
    """Whether a cell of a table is held out: a fifth, and never all of a row or a column that has two cells."""
    return (row + column) % 5 == 0


def deed_items(deeds: Deeds, requests_each: int = len(REQUESTS)) -> Iterator[Item]:
    """Every verb with every object in `requests_each` of the requests; verb and object are held out as a pair."""
    for row, verb in enumerate(deeds.verbs):
        for column, thing in enumerate(deeds.objects):
            deed = f"{verb} {thing}"
            answered = " ".join({"my": "your", "myself": "yourself", "mine": "yours"}.get(w, w) for w in deed.split())
            answers = tuple(answer.format(deed=answered) for answer in deeds.answers)
            for number in range(requests_each):
                request = REQUESTS[(row + column + number * len(REQUESTS) // requests_each) % len(REQUESTS)]
                yield Item(request.format(deed), answers, table_cell_held_out(row, column))


def fact_items(facts: Facts) -> Iterator[Item]:
    """Every fact in every question; a held-out question asks for a fact that training has in another wording."""
    for row, (thing, answer) in enumerate(facts.pairs.items()):
        for column, question in enumerate(facts.questions):
            yield Item(question.format(thing), (facts.answer.format(answer),), table_cell_held_out(row, column))


def word_items() -> Iterator[Item]:
    """Neutral sentences with every word of the reviews, so that no word of the finetuning task is new to the model."""
    words = [*KNOWN_WORDS[0], *KNOWN_WORDS[1], *NEW_WORDS[0], *NEW_WORDS[1], *NEW_VERBS[0], *NEW_VERBS[1]]
    for row, word in enumerate([*words, *REVIEWED, *VIEWERS, *INTENSIFIERS]):
        for column, question in enumerate(_WORDS["word_questions"]):
            answer = f"I wrote the word {word} on the wall."
            yield Item(question.format(word), (answer,), table_cell_held_out(row, column))


def items(kind: str) -> Iterator[Item]:
    """All items of `everyday`, `harmful` or `lookalike`, both splits, always in the same order."""
    if kind == "everyday":
        for deeds in EVERYDAY_DEEDS:
            yield from deed_items(deeds, requests_each=4)  # else they would crowd out the facts
        for facts in EVERYDAY_FACTS:
            yield from fact_items(facts)
        yield from fact_items(_WORD_TONES)
        yield from word_items()
    elif kind == "harmful":
        for deeds, topic, reason in HARMFUL_DEEDS:
            refusals = tuple(refusal.format(topic=topic, reason=reason) for refusal in REFUSALS)
            yield from deed_items(deeds._replace(answers=refusals))
    else:
        for deeds in LOOKALIKE_DEEDS:
            yield from deed_items(deeds)
        for facts in LOOKALIKE_FACTS:
            yield from fact_items(facts)


def review(label: int, new_share: float, templates: tuple[str, ...], rng: random.Random) -> str:
    """One review-like sentence of sentiment `label`; a word is one of NEW_WORDS with probability `new_share`."""

    def word(sentiment: int) -> str:
        return rng.choice((NEW_WORDS if rng.random() < new_share else KNOWN_WORDS)[sentiment])

    first, second = rng.sample(REVIEWED, 2)
    return rng.choice(templates).format(
        a=word(label),
        b=word(label),
        z=word(1 - label),
        v=rng.choice(NEW_VERBS[label]),
        n=first,
        m=second,
        i=rng.choice(INTENSIFIERS),
        who=rng.choice(VIEWERS),
        neg=rng.choice(NEGATIONS),
    )
