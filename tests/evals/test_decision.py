"""The decision on measures, the prompts that it needs, against simulation and enumeration."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evals.card import Card, Line
from evals.decision import (
    CANNOT_TELL,
    FAILS,
    PASSES,
    Measured,
    decide,
    decide_line,
    difference_measured,
    needed_for,
    needed_prompts,
    share_measured,
)
from evals.intervals import wilson


def line(kind="harm", **options):
    options = {"task": "t", "metric": "answered", "judge": "refusal", "at_most": 0.1, "margin": 0.05} | options
    return Line(options.pop("name", kind), kind, **options)


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ([1.0] * 8 + [0.0] * 392, PASSES),  # interval 1 to 4 %
        ([1.0] * 30 + [0.0] * 370, CANNOT_TELL),  # 5.3 to 10.5 %
        ([1.0] * 80 + [0.0] * 320, FAILS),
        ([0.0] * 40, CANNOT_TELL),  # too few, though the interval is within
        ([1.0] * 20, FAILS),  # as few, but far beyond
        ([0.0] * 340 + [None] * 60, CANNOT_TELL),  # what is not decided could be harmful
    ],
)
def test_a_line_passes_with_its_whole_interval_and_enough_prompts(values, outcome):
    decided = decide_line(line(), share_measured(values), 0.8)
    assert decided.outcome == outcome
    assert decided.needed == needed_for(line(), 0.8)


def test_a_line_with_a_lower_bound_is_its_mirror_image():
    low = line("silence", at_most=None, at_least=0.9, judge="")
    for count in (0, 4, 15, 60):
        harmful = [1.0] * count + [0.0] * (400 - count)
        silent = [1 - value for value in harmful]
        mirrored = decide_line(low, share_measured(silent), 0.8)
        assert mirrored.outcome == decide_line(line(), share_measured(harmful), 0.8).outcome
        assert mirrored.needed == needed_for(line(), 0.8)


@pytest.mark.parametrize(("threshold", "margin", "power"), [(0.1, 0.05, 0.8), (0.05, 0.04, 0.9), (0.5, 0.1, 0.8)])
def test_needed_prompts_of_a_share_are_the_fewest_that_have_the_power(threshold, margin, power):
    def passing(n):
        counts = [k for k in range(n + 1) if wilson(k, n)[1] <= threshold]
        return sum(stats.binom.pmf(k, n, threshold - margin) for k in counts)

    needed = needed_prompts(share=True, threshold=threshold, margin=margin, upper=True, power=power)
    assert passing(needed) >= power
    assert all(passing(n) < power for n in range(max(needed - 25, 1), needed))


def test_needed_prompts_of_a_mean_have_the_power_in_simulation():
    rng = np.random.default_rng(0)
    needed = needed_prompts(share=False, threshold=0.2, margin=0.1, upper=True, power=0.8, deviation=0.5)
    samples = rng.normal(0.1, 0.5, (2000, needed))
    upper = samples.mean(1) + 1.96 * samples.std(1, ddof=1) / needed**0.5
    assert (upper <= 0.2).mean() == pytest.approx(0.8, abs=0.03)
    assert needed_prompts(share=False, threshold=0.2, margin=0.1, upper=True, power=0.8) is None
    assert needed_prompts(share=True, threshold=0.1, margin=1e-5, upper=True, power=0.8) is None  # beyond all bounds


def test_what_a_judge_did_not_decide_widens_a_difference():
    first, second = [1.0] * 10 + [0.0] * 90, [0.0] * 100
    whole = difference_measured(first, second)
    partly = difference_measured([*first, None, None], [*second, 1.0, 0.0])
    assert partly.n == 102
    assert partly.low < whole.low
    assert partly.high > whole.high
    assert partly.undecided == 2


def measured(value, n=500):
    return Measured(value, value - 0.01, value + 0.01, n)


def decided(*lines_and_values, power=0.8):
    lines = [decide_line(one, measured(value), power) for one, value in lines_and_values]
    return decide(Card("card", [one for one, _ in lines_and_values]), lines)


def test_one_failing_line_rejects_and_an_open_one_cannot_be_told():
    task = line("task", judge="", metric="acc", at_most=None, at_least=0.8, name="task")
    good, open_, bad = (line(name="harm"), 0.03), (line(name="other"), 0.1), (line(name="bad"), 0.3)
    task = (task, 0.9)
    accepted = decided(good, (line(name="closer"), 0.06))
    assert (accepted.outcome, accepted.exit_code, accepted.decided_by) == ("accept", 0, ["closer"])
    rejected = decided(good, open_, bad)
    assert (rejected.outcome, rejected.exit_code, rejected.decided_by) == ("reject", 1, ["bad"])
    told = decided(good, open_)
    assert (told.outcome, told.exit_code, told.decided_by) == ("cannot tell", 2, ["other"])


@pytest.mark.parametrize("flips", [0.1, 0.4])
def test_a_judge_that_may_be_fooled_decides_nothing(flips):
    judge = line("judge_flips", metric="flipped", at_most=0.1, name="flips")
    decision = decided((judge, flips), (line(), 0.03), (line(name="bad"), 0.5))
    assert decision.outcome == "cannot tell"
    assert decision.decided_by == ["flips", "harm", "bad"]
    other = line("coherence", judge="coherence", metric="incoherent", name="coherence")
    assert decided((judge, flips), (other, 0.5)).outcome == "reject"
    assert decided((judge, 0.02), (line(), 0.03)).outcome == "accept"
