"""Does a unit prefer a group of texts? Rates with intervals, what chance gives, and one number for its preference.

Texts are what is drawn, and so each counts as one: tokens of a text depend on one another. If a unit took no notice of
the groups, a group's mean would be that of as many texts drawn from all without replacement: it is expected to be the
mean over all texts ("chance"), with a variance and a skewness that are known exactly. Its tail is then taken as that
of the gamma distribution with these three moments (Pearson III). A normal one would take it for more than chance where
a unit fires in two texts only, both of a small group.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import torch

from .inventory import ModuleStatistics

CONFIDENCE = 0.95
_LEAST_SKEWNESS = 0.01  # below, the tail is that of the normal distribution
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


class Rates(NamedTuple):
    """Of units in groups: (G, r) each, all in [0, 1], and what chance gives, (r,)."""

    rate: torch.Tensor
    low: torch.Tensor  # 95 % interval
    high: torch.Tensor
    chance: torch.Tensor


class Preference(NamedTuple):
    """Which group each unit prefers, and how much; each (r,)."""

    group: torch.Tensor  # int64, of the largest mean strength
    # (a - b) / (a + b), a the mean strength in that group, b in the texts of the others: 0 to 1. For class
    # preference of single units: Morcos et al., 2018, arXiv:1803.06959.
    selectivity: torch.Tensor
    z: torch.Tensor  # of the mean strength in that group against chance: the normal deviate with the same tail
    strength: torch.Tensor  # (G, r), mean over texts of the mean strength over their tokens


def rates_of_texts(statistics: ModuleStatistics, texts: torch.Tensor) -> Rates:
    """The share of a group's texts in which a unit fires, with Wilson's interval.

    Args:
        texts: (G,), how many each group has.
    """
    fired = statistics.texts_fired.double()
    low, high = _wilson(fired, texts[:, None])
    return Rates(fired / texts[:, None], low, high, fired.sum(0) / texts.sum())


def rates_of_tokens(statistics: ModuleStatistics, texts: torch.Tensor) -> Rates:
    """The share of a text's tokens on which a unit fires, as a mean over texts with a normal interval.

    Where it fires in no text, or on every token of all, the interval is Wilson's for such texts, which holds as well.
    One text tells of no spread: its interval is 0 to 1.
    """
    mean, error = _mean_and_error(statistics.share, statistics.share_squared, texts[:, None])
    low, high = (mean - _Z * error).clamp(min=0), (mean + _Z * error).clamp(max=1)
    never, always = _wilson(torch.zeros_like(mean), texts[:, None])[1], _wilson(texts[:, None], texts[:, None])[0]
    high = torch.where(mean == 0, never, high)
    low = torch.where(mean == 1, always, low)
    is_one = texts[:, None] < 2
    low, high = low.masked_fill(is_one, 0), high.masked_fill(is_one, 1)
    return Rates(mean, low, high, statistics.share.sum(0) / texts.sum())


def preference(statistics: ModuleStatistics, texts: torch.Tensor) -> Preference:
    """Which group each unit prefers; with one group there is nothing to prefer, and all is 0."""
    total, n = statistics.strength, texts.sum()
    strength = total / texts[:, None]
    group = strength.argmax(0)
    inside = strength.gather(0, group[None])[0]
    in_group = total.gather(0, group[None])[0]
    outside = (total.sum(0) - in_group) / (n - texts[group]).clamp(min=1)
    selectivity = torch.where(inside > 0, (inside - outside) / (inside + outside), 0)
    if len(texts) == 1:
        return Preference(group, torch.zeros_like(selectivity), torch.zeros_like(selectivity), strength)
    return Preference(group, selectivity, _deviate(statistics, in_group, texts[group].double(), float(n)), strength)


def _deviate(statistics: ModuleStatistics, total: torch.Tensor, m: torch.Tensor, n: float) -> torch.Tensor:
    """The normal deviate with the tail of a sum over m of n texts, drawn without replacement; all of shape (r,)."""
    sums = statistics.strength.sum(0), statistics.strength_squared.sum(0), statistics.strength_cubed
    mean = sums[0] / n
    squares = (sums[1] - n * mean.square()).clamp(min=0)  # of the deviations from the mean
    cubes = sums[2] - 3 * mean * sums[1] + 2 * n * mean.pow(3)
    one = m / n  # the probability that a text is drawn; then two, three texts
    two = one * (m - 1) / max(n - 1, 1)
    three = two * (m - 2) / max(n - 2, 1)
    deviation = (squares * (one - two)).sqrt()
    is_spread = deviation > 1e-9 * (mean.abs() + 1e-300)
    deviation = deviation.where(is_spread, 1)
    z = (total - m * mean) / deviation
    skewness = cubes * (one - 3 * two + 2 * three) / deviation.pow(3)
    is_skewed = skewness.abs() > _LEAST_SKEWNESS
    shape = 4 / skewness.where(is_skewed, 1).square()
    at = (shape + z * shape.sqrt() * skewness.sign()).clamp(min=0)
    upper, lower = torch.special.gammaincc(shape, at), torch.special.gammainc(shape, at)
    tail = torch.where(skewness > 0, upper, lower).clamp(1e-300, 1 - 1e-15)
    return torch.where(is_spread, torch.where(is_skewed, -torch.special.ndtri(tail), z), 0)


def beyond_chance(comparisons: int) -> float:
    """The z beyond which one of so many comparisons falls by chance with a probability of 5 % (Bonferroni)."""
    return NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / max(comparisons, 1))


def _mean_and_error(total: torch.Tensor, squared: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = total / n
    variance = (squared - n * mean.square()).clamp(min=0) / (n - 1).clamp(min=1)
    return mean, (variance / n).sqrt()


def _wilson(successes: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Wilson's interval of a share."""
    share = successes / n
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * (share * (1 - share) / n + _Z**2 / (4 * n**2)).sqrt()
    return (middle - half).clamp(min=0), (middle + half).clamp(max=1)
