"""Paired tests against slow, obvious references."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from evals.paired import holm, paired_test, sign_flip_p_value


def test_mcnemars_test_is_the_sum_of_binomial_probabilities():
    first = [1] * 9 + [0] * 3 + [1, 0] * 20
    second = [0] * 9 + [1] * 3 + [1, 0] * 20
    test = paired_test(first, second)
    assert (test.test, test.n, test.only_first, test.only_second) == ("McNemar", 52, 9, 3)
    assert test.p_value == pytest.approx(2 * sum(math.comb(12, k) for k in range(4)) / 2**12)
    assert test.difference == pytest.approx(6 / 52)
    assert test.low < test.difference < test.high


def test_arms_that_never_differ_have_an_interval_and_no_finding():
    test = paired_test([1, 0, 1], [1, 0, 1])
    assert (test.difference, test.p_value) == (0, 1)
    assert test.low < 0 < test.high
    assert test.detectable > 0


def test_sign_flips_are_all_signs_of_few_differences():
    differences = np.array([0.5, -0.1, 0.3, 0.0, 0.8, 0.2])
    changed = differences[differences != 0]
    means = [np.mean(changed * signs) for signs in itertools.product([1, -1], repeat=len(changed))]
    expected = np.mean([abs(mean) >= abs(changed.mean()) - 1e-12 for mean in means])
    assert sign_flip_p_value(differences) == pytest.approx(expected)
    assert sign_flip_p_value([0.0, 0.0]) == 1


def test_sign_flips_of_many_differences_agree_with_students_t():
    rng = np.random.default_rng(3)
    first, second = rng.normal(0.15, 1, 400), rng.normal(0, 1, 400)
    test = paired_test(first.tolist(), second.tolist())
    assert test.test == "sign-flip"
    assert test.p_value == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.02)
    t = stats.ttest_rel(first, second).confidence_interval()
    assert (test.low, test.high) == pytest.approx((t.low, t.high), abs=0.03)


@pytest.mark.parametrize("kind", ["shares", "scores"])
def test_a_detectable_difference_is_found_in_four_of_five_samples(kind, monkeypatch):
    """Drawn anew with the true difference that the test called detectable."""
    monkeypatch.setattr("evals.paired.SIGN_FLIPS", 9)  # the interval is looked at
    rng = np.random.default_rng(0)
    n = 300

    def draw(difference):
        if kind == "scores":
            return rng.normal(difference, 1, n), np.zeros(n)
        # of ten prompts two differ, as often in favour of the one as of the other but for `difference`
        cell = rng.choice(3, n, p=[0.1 + difference / 2, 0.1 - difference / 2, 0.8])
        return (cell == 0).astype(float), (cell == 1).astype(float)

    detectable = np.mean([paired_test(*draw(0.0)).detectable for _ in range(10)])
    found = [paired_test(*draw(detectable)) for _ in range(300 if kind == "shares" else 40)]
    excluded = np.mean([test.low > 0 or test.high < 0 for test in found])
    assert 0.65 < excluded < 0.92


def test_holm_steps_down_and_never_decreases():
    p_values = [0.01, 0.04, 0.03, 0.005]
    assert holm(p_values) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("lists", [([], []), ([1.0], [1.0, 0.0])])
def test_lists_that_are_no_pairs_are_refused(lists):
    with pytest.raises(ValueError, match="two lists of one length"):
        paired_test(*lists)
