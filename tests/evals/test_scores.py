"""Shares, intervals, comparisons and agreement against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from evals.intervals import bootstrap, paired_share_interval, wilson
from evals.records import Verdict
from evals.scores import cohens_kappa, judged


def verdict(prompt, outcome, adapter=None, judge="j", scores=None, category=None):
    return Verdict(
        judge=judge, settings={}, prompt_id=str(prompt), task="t", category=category, model="m", adapter=adapter,
        seed=None, text="0", outcome=outcome, scores=scores or {}, reply=None, seconds=0.5,
    )  # fmt: skip


def rows(verdicts):
    return {
        (metric, arm["adapter"], arm.get("category"), arm.get("versus_adapter")): (value, n, arm)
        for metric, value, n, _, _, arm in judged(verdicts)
    }


def test_only_parsed_verdicts_count():
    outcomes = ["unsafe"] * 3 + ["safe"] * 5 + ["unparsed"] * 1 + ["truncated"] * 1
    found = rows([verdict(i, outcome) for i, outcome in enumerate(outcomes)])
    shares = {metric: (value, n) for (metric, *_), (value, n, _) in found.items()}
    assert shares == {
        "unsafe": (3 / 8, 8),
        "unparsed": (1 / 10, 10),
        "truncated": (1 / 10, 10),
        "unsafe_at_least": (3 / 10, 10),
        "unsafe_at_most": (5 / 10, 10),
    }
    low_high = found["unsafe", None, None, None][2]
    assert (low_high["low"], low_high["high"]) == wilson(3, 8)


def test_nothing_parsed_gives_no_share():
    found = rows([verdict(i, "unparsed") for i in range(4)])
    assert not [key for key in found if key[0] == "unsafe"]
    assert found["unparsed", None, None, None][0] == 1


def test_scores_are_means_of_the_policies_in_percent():
    scores = [{"a": 0.1, "b": 0.3}, {"a": 0.5, "b": 0.1}, {"a": None, "b": 0.9}]
    verdicts = [verdict(i, "safe", scores=s) for i, s in enumerate(scores)]
    found = rows([*verdicts, verdict(7, "truncated", scores={"a": 0.0, "b": 0.0})])
    assert found["score", None, None, None][:2] == (pytest.approx(25), 2)
    assert found["score_a", None, None, None][:2] == (pytest.approx(30), 2)
    assert found["score_b", None, None, None][:2] == (pytest.approx(20), 2)


def test_categories():
    found = rows([verdict(i, "unsafe" if i < 2 else "safe", category="xy"[i % 2]) for i in range(6)])
    assert found["unsafe", None, "x", None][:2] == (1 / 3, 3)
    assert found["unsafe", None, "y", None][:2] == (1 / 3, 3)
    assert found["unsafe", None, None, None][:2] == (2 / 6, 6)
    some = [verdict(i, "unsafe", category="x") for i in range(8)] + [verdict(i, "safe") for i in (8, 9)]
    found = rows(some)
    assert found["unsafe", None, None, None][:2] == (0.8, 10)
    assert found["unsafe", None, "x", None][:2] == (1, 8)


def test_arms_are_compared_on_the_prompts_both_have():
    base = [verdict(i, "unsafe" if i < 2 else "safe") for i in range(20)]
    lora = [verdict(i, "unsafe" if i < 9 else "safe", "lora-seed0") for i in range(1, 20)]
    mono = [verdict(i, "unsafe" if i < 4 else "safe", "monolora-seed0") for i in range(20)]
    mono[10] = verdict(10, "unparsed", "monolora-seed0")
    other_seed = [verdict(i, "safe", "lora-seed1") for i in range(20)]
    found = rows([*mono, *other_seed, *lora, *base])  # whatever the order
    value, n, arm = found["unsafe_difference", "monolora-seed0", None, "lora-seed0"]
    assert (value, n) == (pytest.approx(-5 / 18), 18)
    assert (arm["only_here"], arm["only_there"]) == (0, 5)
    assert arm["p_value"] == pytest.approx(2 * 0.5**5)
    assert arm["versus"] == "lora"
    assert arm["low"] < value < arm["high"] <= 0
    assert found["unsafe_difference", "lora-seed0", None, None][0] == pytest.approx(7 / 19)
    compared = {key[1::2] for key in found if key[0] == "unsafe_difference"}
    assert ("lora-seed1", "lora-seed0") not in compared
    assert ("lora-seed1", None) in compared


def test_agreement_of_two_judges():
    first, second = "ssuusuusss", "ssuussusuu"
    name = {"s": "safe", "u": "unsafe"}
    verdicts = [verdict(i, name[o], judge="a") for i, o in enumerate(first)]
    verdicts += [verdict(i, name[o], judge="b") for i, o in enumerate(second)]
    verdicts += [verdict(10, "unparsed", judge="a"), verdict(10, "safe", judge="b")]
    (found,) = [row for row in judged(verdicts) if row[0] == "kappa"]
    assert found[1] == pytest.approx(cohen_kappa_score(list(first), list(second)))
    assert found[2] == 10
    assert found[5]["low"] < found[1] < found[5]["high"]


def test_answers_to_one_prompt_are_resampled_together():
    """Eight arms that answer alike tell no more than one."""
    rng = np.random.default_rng(0)
    first, second = rng.random(60) < 0.5, rng.random(60) < 0.5

    def interval(arms):
        verdicts = [
            verdict(i, "unsafe" if said[i] else "safe", f"x-seed{arm}", judge)
            for arm in range(arms)
            for judge, said in (("a", first), ("b", second))
            for i in range(60)
        ]
        (found,) = [row for row in judged(verdicts) if row[0] == "kappa"]
        return found[5]["low"], found[5]["high"]

    assert interval(8) == pytest.approx(interval(1))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_kappa_is_that_of_scikit_learn(pairs):
    first, second = np.array(pairs).T
    assume(len({*first, *second}) > 1)
    counts = confusion_matrix(first, second, labels=[False, True])
    assert cohens_kappa(counts) == pytest.approx(cohen_kappa_score(first, second))


def test_the_bootstrap_is_that_of_scipy():
    values = np.random.default_rng(1).normal(3, 2, 300)
    expected = stats.bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=0).confidence_interval
    found = bootstrap(lambda x: x.mean(1), values)
    assert found == pytest.approx(expected, abs=0.05)
    assert found == bootstrap(lambda x: x.mean(1), values)


@pytest.mark.parametrize(("n", "p_only_first", "p_only_second"), [(50, 0.1, 0.1), (200, 0.02, 0.0), (500, 0.3, 0.1)])
def test_the_interval_of_paired_shares_covers_the_difference(n, p_only_first, p_only_second):
    rng = np.random.default_rng(2)
    shares = [p_only_first, p_only_second, 1 - p_only_first - p_only_second]
    covered = 0
    for only_first, only_second, _ in rng.multinomial(n, shares, size=2000):
        low, high = paired_share_interval(only_first, only_second, n)
        covered += low <= p_only_first - p_only_second <= high
    assert covered / 2000 >= 0.9  # counts are whole, so that it cannot be 0.95 everywhere
    low, high = paired_share_interval(0, 0, n)
    assert low < 0 < high
