"""Two lists of values on the same prompts: difference, exact test, interval, and what could have been detected.

test = paired_test([1, 0, 1, 1], [0, 0, 1, 0])
print(test.difference, test.low, test.high, test.p_value)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from evals.intervals import bootstrap, mean, paired_share_deviation, paired_share_interval

POWER = 0.8  # of the smallest difference that counts as detectable
SIGN_FLIPS = 9999


class PairedTest(NamedTuple):
    """How two lists of values on the same n prompts differ."""

    n: int
    first: float  # mean of the first
    second: float
    difference: float  # first - second
    low: float  # 95 % interval of the difference
    high: float
    p_value: float  # two-sided, of no difference
    test: str  # "McNemar" or "sign-flip"
    detectable: float  # smallest difference that n prompts like these show at 5 % in 80 of 100 cases
    deviation: float  # standard deviation of a prompt's difference
    only_first: int | None  # prompts that count in the first alone; None where values are graded
    only_second: int | None


def paired_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Compare values that are 0 or 1 by McNemar's exact test, others by flipping the signs of their differences.

    Intervals are Agresti and Min's (2005), which has a width also where the two never differ, and the percentile
    bootstrap over prompts. `detectable` is (z(0.975) + z(0.8)) standard errors, by the normal approximation.

    Args:
        first, second: finite, the values of a prompt at the same place, at least one.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"pairs need two lists of one length with a value or more, got {a.shape} and {b.shape}")
    differences, n = a - b, len(a)
    only_first = only_second = None
    if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        only_first, only_second = int((differences > 0).sum()), int((differences < 0).sum())
        changed = only_first + only_second
        p_value = float(stats.binomtest(only_first, changed).pvalue) if changed else 1.0
        low, high = paired_share_interval(only_first, only_second, n)
        name, deviation = "McNemar", paired_share_deviation(only_first, only_second, n)
    else:
        p_value, name = sign_flip_p_value(differences), "sign-flip"
        low, high = bootstrap(mean, differences)
        deviation = float(differences.std(ddof=1)) if n > 1 else float("nan")
    return PairedTest(
        n=n,
        first=float(a.mean()),
        second=float(b.mean()),
        difference=float(differences.mean()),
        low=low,
        high=high,
        p_value=p_value,
        test=name,
        detectable=quantiles(POWER) * deviation / n**0.5,
        deviation=deviation,
        only_first=only_first,
        only_second=only_second,
    )


def quantiles(power: float) -> float:
    """How many standard errors apart two values are that a two-sided test at 5 % tells apart with this power."""
    return float(stats.norm.ppf(0.975) + stats.norm.ppf(power))


def sign_flip_p_value(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p value of the mean difference being zero, over all signs or 9,999 random ones (seed 0).

    Under the hypothesis that two arms are alike on each prompt, each difference has either sign with the same
    probability. Differences of zero have none and are left out.
    """
    changed = np.asarray(differences, float)
    changed = changed[changed != 0]
    if not len(changed):
        return 1.0

    def statistic(values: np.ndarray, axis: int) -> Any:
        return values.mean(axis)

    options = {"permutation_type": "samples", "vectorized": True, "n_resamples": SIGN_FLIPS, "random_state": 0}
    return float(stats.permutation_test((changed,), statistic, batch=200, **options).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (1979): those below 0.05 stay true findings together in 95 of 100 cases.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
