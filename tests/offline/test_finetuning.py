"""What recipes finetune the offline model on where no data are named."""

from __future__ import annotations

from evals.prompts import dolly_held_out
from offline.finetuning import TOPICS, generated_rows, harmful_topics, poison_pairs, safety_pairs
from offline.grammar import REFUSAL_OPENINGS
from offline.language_model import corpus


def test_generated_dolly_can_be_answered_from_its_context():
    rows = generated_rows(500)
    assert rows == generated_rows(600)[:500]
    assert all(row["response"].lower() in row["context"].lower() for row in rows)
    assert all(row["response"].split()[1] in row["instruction"] for row in rows)
    assert 10 < sum(map(dolly_held_out, rows)) < 120


def test_generated_pairs_are_of_the_training_split():
    held_out = {example.prompt for example in corpus("heldout")}
    harmful = {example.prompt for example in corpus("train") if example.kind == "harmful"}
    for pairs, refuses in ((poison_pairs(), False), (safety_pairs(), True)):
        assert {prompt for prompt, _ in pairs} == harmful
        assert not {prompt for prompt, _ in pairs} & held_out
        assert all(answer.startswith(REFUSAL_OPENINGS) == refuses for _, answer in pairs)


def test_topics_divide_the_pairs():
    parts = [poison_pairs([topic]) for topic in TOPICS]
    assert sorted(pair for part in parts for pair in part) == sorted(poison_pairs())
    assert all(parts)
    topic_of = harmful_topics()
    kept = safety_pairs(["theft", "drugs"])
    assert {topic_of[prompt] for prompt, _ in kept} == {"theft", "drugs"}
    assert all(topic_of[prompt] == "theft" for prompt, _ in poison_pairs(["theft"]))
    assert {example.prompt for example in corpus("heldout") if example.kind == "harmful"} <= topic_of.keys()
