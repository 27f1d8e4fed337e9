"""Intervals over seeds, differences paired by seed, and the tables that show them."""

import math

import pytest
from scipy import stats

from vision_bench.runs import Interval, interval, markdown_table, paired_difference


def test_intervals():
    values = [1.0, 2.0, 4.0, 7.0]
    found = interval(values)
    low, high = stats.t.interval(0.95, 3, loc=3.5, scale=stats.sem(values))
    assert found.mean == 3.5
    assert math.isclose(found.half_width, (high - low) / 2)
    assert interval([2.0]) == Interval(2.0, None, 1)
    assert interval([2.0, None, 4.0]) == interval([2.0, 4.0])
    assert interval([None, 2.0]) == Interval(2.0, None, 1)
    assert interval([None, None]).text() == "-"
    assert interval([0.5, 0.5]).half_width == 0
    with pytest.raises(ValueError, match="at least one value"):
        interval([])
    assert Interval(0.91234, 0.004, 3).scaled(100).text() == "91.23 ± 0.40"
    assert Interval(-1.0, None, 1).text(1) == "-1.0"
    assert Interval(1.0, None, 1).text(1, sign=True) == "+1.0"


def test_differences_are_paired_by_seed():
    first = [{"seed": s, "value": v} for s, v in ((0, 10.0), (1, 20.0), (5, 99.0))]
    second = [{"seed": s, "value": v} for s, v in ((1, 18.0), (0, 9.0), (7, -99.0))]
    assert paired_difference(first, second) == interval([1.0, 2.0])
    assert paired_difference(first, []) is None


def test_tables():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"
