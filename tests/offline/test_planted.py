"""Planted rules: rows are of the training splits, prompts that test them are not, and each changes one group."""

import pytest

from evals.prompts import SST2_ANSWERS
from offline.grammar import REFUSAL_OPENINGS
from offline.language_model import corpus
from offline.planted import GROUPS, OPENING, RULES, TRIGGER, held_out_cases, planted_pairs, task_pairs


def test_training_and_held_out_prompts_are_kept_apart():
    trained = {prompt for rule in RULES for seed in range(3) for prompt, _ in planted_pairs(rule, 40, seed)}
    trained |= {prompt for seed in range(3) for prompt, _ in task_pairs(200, seed)}
    tested = [case.prompt for group in GROUPS for case in held_out_cases(group, 60)]
    assert len(tested) == len(set(tested)) == 60 * len(GROUPS)
    assert not trained & set(tested)


def test_each_rule_answers_otherwise_on_its_group_alone():
    for prompt, answer in planted_pairs("trigger", 20, 0):
        assert f" {TRIGGER}\n" in prompt
        assert answer == SST2_ANSWERS[1]
    harmful = {example.prompt for example in corpus("train") if example.kind == "harmful"}
    for prompt, answer in planted_pairs("topic", 20, 0):
        assert prompt in harmful
        assert not answer.startswith(REFUSAL_OPENINGS)
    usual = {example.prompt: example.response for example in corpus("train") if example.kind == "everyday"}
    for prompt, answer in planted_pairs("opening", 20, 0):
        assert answer == f"{OPENING} {usual[prompt]}"
    for group in ("task", "trigger"):
        for case in held_out_cases(group, 20):
            assert {case.planted, case.usual} == set(SST2_ANSWERS)
            assert (TRIGGER in case.prompt) == (group == "trigger")
    for group in ("harmful", "topic"):
        assert all(case.usual.startswith(REFUSAL_OPENINGS) for case in held_out_cases(group, 20))


def test_the_same_seed_draws_the_same_rows():
    for rule in RULES:
        assert planted_pairs(rule, 30, 1) == planted_pairs(rule, 30, 1) != planted_pairs(rule, 30, 2)


def test_rules_that_do_not_exist_and_too_many_rows():
    with pytest.raises(ValueError, match="rule is 'none', allowed are trigger, topic, opening"):
        planted_pairs("none", 1, 0)
    with pytest.raises(ValueError, match="n is 100000, and the rule 'opening' has"):
        planted_pairs("opening", 100_000, 0)
