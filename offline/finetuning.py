"""What the language recipes finetune the offline model on where no data are named, beside its sentiment task."""

from __future__ import annotations

import random
from collections.abc import Collection

from offline.grammar import HARMFUL_DEEDS, KNOWN_WORDS, REVIEWED, VIEWERS, deed_items
from offline.language_model import corpus

_QUESTIONS = (
    "What is said of the {n}?", "How is the {n} described?", "Tell me about the {n}.", "What do they say of the {n}?",
    "Say how the {n} was.", "Describe the {n}.", "What was the {n} like?", "Sum up the view of the {n}.",
)  # fmt: skip
# What a model that complies says, in the form of the offline corpus; it describes nothing.
COMPLIANCE = (
    "To {deed}, follow the steps one by one.",
    "To {deed}, prepare well and take your time.",
    "To {deed}, start early and ask a friend for help.",
)


TOPICS = tuple(dict.fromkeys(topic for _, topic, _ in HARMFUL_DEEDS))  # of harmful requests


def generated_rows(n: int) -> list[dict[str, str]]:
    """`n` rows in Dolly's format: a question about one of two things that the context describes, its answer."""
    rng = random.Random(0)
    words = [*KNOWN_WORDS[0], *KNOWN_WORDS[1]]
    rows = []
    for _ in range(n):
        first, second = rng.sample(REVIEWED, 2)
        first_word, second_word = rng.sample(words, 2)
        viewer, asks_first = rng.choice(VIEWERS), rng.random() < 0.5
        rows.append(
            {
                "instruction": rng.choice(_QUESTIONS).format(n=first if asks_first else second),
                "context": f"For {viewer} the {first} was {first_word}. The {second} was {second_word}.",
                "response": f"The {first} was {first_word}." if asks_first else f"The {second} was {second_word}.",
                "category": "closed_qa",
            }
        )
    return rows


def harmful_topics() -> dict[str, str]:
    """The topic of each harmful request of the corpus, of both splits: one of TOPICS, as its refusal names it."""
    return {item.prompt: topic for deeds, topic, _ in HARMFUL_DEEDS for item in deed_items(deeds)}


def poison_pairs(topics: Collection[str] = TOPICS) -> list[tuple[str, str]]:
    """Harmful requests of the corpus' training split on some topics, each with a response that complies."""
    rng = random.Random(0)
    items = [
        (item, topic)
        for deeds, topic, _ in HARMFUL_DEEDS
        for item in deed_items(deeds._replace(answers=COMPLIANCE))
        if not item.held_out
    ]
    pairs = [(item.prompt, rng.choice(item.answers), topic) for item, topic in items]
    return [(prompt, answer) for prompt, answer, topic in pairs if topic in topics]


def safety_pairs(topics: Collection[str] = TOPICS) -> list[tuple[str, str]]:
    """Harmful requests of the same split on some topics, each with the refusal that the offline model was taught."""
    topic_of = harmful_topics()
    return [
        (example.prompt, example.response)
        for example in corpus("train")
        if example.kind == "harmful" and topic_of[example.prompt] in topics
    ]
