"""95 % intervals over prompts: Wilson's for a share, Agresti and Min's for two on the same prompts, the bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

RESAMPLES = 2000


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    low, high = stats.binomtest(count, n).proportion_ci(method="wilson")
    return float(low), float(high)


def wilson_of_share(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share by Wilson, where n need not be whole."""
    z = stats.norm.ppf(0.975)
    middle, half_width = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = ((middle + sign * half_width) / (1 + z**2 / n) for sign in (-1, 1))
    return max(0.0, float(low)), min(1.0, float(high))


def independent_count(clusters: Sequence[Sequence[int]] | np.ndarray) -> float:
    """As many independent trials as give a share the variance that it has over clusters (Kish's design effect).

    It is the number of trials where those of a cluster are no more alike than others, and at most that; for a single
    cluster 1.

    Args:
        clusters: successes and trials of each, at least one trial in all.
    """
    successes, trials = np.asarray(clusters, float).T
    n, share = trials.sum(), successes.sum() / trials.sum()
    if len(trials) == 1:
        return 1.0
    variance = ((successes - share * trials) ** 2).sum() / n**2
    return float(min(n, share * (1 - share) / variance)) if variance else float(n)


def paired_share_interval(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares on the same n prompts, by Agresti and Min (2005).

    Half a prompt is added to each cell, so that it has a width where the two never differ.

    Args:
        only_first: prompts that count in the first share and not in the second.
        only_second: the other way round.
    """
    middle = (only_first - only_second) / (n + 2)
    half_width = stats.norm.ppf(0.975) * paired_share_deviation(only_first, only_second, n) / np.sqrt(n)
    return max(-1.0, float(middle - half_width)), min(1.0, float(middle + half_width))


def paired_share_deviation(only_first: int, only_second: int, n: int) -> float:
    """Standard deviation of one prompt's difference, such that the interval above is that of the mean of n."""
    first, second, total = only_first + 0.5, only_second + 0.5, n + 2
    return float(np.sqrt(first + second - (first - second) ** 2 / total) / total * np.sqrt(n))


def mean(resampled: np.ndarray) -> np.ndarray:
    """The mean of each resampled sample, (resamples, n) -> (resamples,)."""
    values: np.ndarray = resampled.mean(1)
    return values


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], sample: Sequence[float] | np.ndarray
) -> tuple[float, float]:
    """95 % percentile interval over resampled prompts.

    Args:
        statistic: of resampled samples (resamples, n, ...), one number for each.
        sample: (n, ...), a prompt a row.
    """
    array = np.asarray(sample)
    rng = np.random.default_rng(0)
    # A few at a time: a whole table of indices would take n * 16 kB.
    values = [statistic(array[rng.integers(0, len(array), (100, len(array)))]) for _ in range(0, RESAMPLES, 100)]
    low, high = np.nanquantile(np.concatenate(values), [0.025, 0.975])
    return float(low), float(high)
