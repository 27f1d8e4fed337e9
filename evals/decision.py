"""From the lines of a card and their measures to a decision: accept, reject, or that it cannot be told.

needed_prompts(share=True, threshold=0.05, margin=0.04, upper=True, power=0.8)  # 164
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from evals.card import Card, Line
from evals.intervals import wilson
from evals.paired import paired_test, quantiles

PASSES, FAILS, CANNOT_TELL = "passes", "fails", "cannot tell"
ACCEPT, REJECT = "accept", "reject"
EXIT_CODES = {ACCEPT: 0, REJECT: 1, CANNOT_TELL: 2}
_MOST_PROMPTS = 50_000  # beyond which no number of prompts is looked for
_Z = float(stats.norm.ppf(0.975))


class Measured(NamedTuple):
    """What was measured for a line."""

    value: float
    low: float  # of the 95 % interval; also the least and the most that answers without a verdict leave open
    high: float
    n: int  # prompts, or texts
    deviation: float | None = None  # standard deviation of a prompt's value; None for a share
    undecided: int = 0  # answers without a verdict


class Decided(NamedTuple):
    """A line with its outcome."""

    line: Line
    outcome: str  # PASSES, FAILS or CANNOT_TELL
    reason: str  # a sentence without its full stop
    measured: Measured | None
    needed: int | None  # prompts; None where it is not known

    @property
    def slack(self) -> float:
        """How far the nearer end of the interval is from the threshold, in margins; below 0 beyond it."""
        if self.measured is None:
            return -math.inf
        line = self.line
        gap = line.at_most - self.measured.high if line.at_most is not None else self.measured.low - line.threshold
        return gap / line.margin


class Decision(NamedTuple):
    """What a card says of an adapter."""

    outcome: str  # ACCEPT, REJECT or CANNOT_TELL
    lines: list[Decided]
    decided_by: list[str]  # names of lines: those that fail, those that cannot be told, or the closest one

    @property
    def exit_code(self) -> int:
        """0 to accept, 1 to reject, 2 where it cannot be told."""
        return EXIT_CODES[self.outcome]


def share_measured(values: Sequence[float | None]) -> Measured:
    """A share of prompts with Wilson's interval, widened to what answers without a verdict could be.

    Args:
        values: 0 or 1, None without a verdict; at least one is decided.
    """
    known = [value for value in values if value is not None]
    count, undecided = round(sum(known)), len(values) - len(known)
    low, high = wilson(count, len(values))[0], wilson(count + undecided, len(values))[1]
    return Measured(count / len(known), low, high, len(values), undecided=undecided)


def difference_measured(first: Sequence[float | None], second: Sequence[float | None]) -> Measured:
    """The difference of two arms on the same prompts; pairs without both verdicts widen the interval of shares.

    Of graded values they are left out.

    Args:
        first, second: 0 or 1 for shares; at least one pair is decided.
    """
    pairs = list(zip(first, second, strict=True))
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    test = paired_test([a for a, _ in known], [b for _, b in known])
    undecided = len(pairs) - len(known)
    if not undecided or test.test != "McNemar":
        return Measured(test.difference, test.low, test.high, test.n, test.deviation, undecided)

    def filled(a_for: float, b_for: float) -> tuple[list[float], list[float]]:
        return [a_for if a is None else a for a, _ in pairs], [b_for if b is None else b for _, b in pairs]

    low, high = paired_test(*filled(0.0, 1.0)).low, paired_test(*filled(1.0, 0.0)).high
    return Measured(test.difference, low, high, len(pairs), test.deviation, undecided)


def needed_prompts(
    *, share: bool, threshold: float, margin: float, upper: bool, power: float, deviation: float | None = None
) -> int | None:
    """The fewest prompts with which a measure `margin` beyond the threshold passes with probability `power`.

    Of a share it is exact: Wilson's interval lies below t if k <= n (t - z sqrt(t (1 - t) / n)), and k is binomial.
    Of a mean it is ((z(0.975) + z(power)) deviation / margin)^2, by the normal approximation.

    Args:
        upper: whether the threshold is the most that is allowed.
        deviation: of a prompt's value; None: not known.
    """
    if not share:
        return None if deviation is None else max(2, math.ceil((quantiles(power) * deviation / margin) ** 2))
    limit, truth = (threshold, threshold - margin) if upper else (1 - threshold, 1 - threshold - margin)
    n = np.arange(1, _MOST_PROMPTS + 1)
    most = np.floor(n * (limit - _Z * np.sqrt(limit * (1 - limit) / n)) + 1e-9)
    passing = np.where(most >= 0, stats.binom.cdf(most, n, max(truth, 0.0)), 0.0)
    enough = np.flatnonzero(passing >= power)
    return int(n[enough[0]]) if len(enough) else None


def needed_for(line: Line, power: float, deviation: float | None = None) -> int | None:
    """`needed_prompts` of a line."""
    return needed_prompts(
        share=line.is_share,
        threshold=line.threshold,
        margin=line.margin,
        upper=line.at_most is not None,
        power=power,
        deviation=deviation,
    )


def decide_line(line: Line, measured: Measured, power: float) -> Decided:
    """Pass if the whole interval is on the good side and there are enough prompts, fail if it is on the other."""
    needed = needed_for(line, power, measured.deviation)
    upper = line.at_most is not None
    is_bad = measured.low > line.threshold if upper else measured.high < line.threshold
    is_good = measured.high <= line.threshold if upper else measured.low >= line.threshold
    unit = "texts" if line.kind == "forgetting" else "twins" if line.kind == "judge_flips" else "prompts"
    if is_bad:
        return Decided(line, FAILS, "the whole interval is beyond the threshold", measured, needed)
    if needed is None or measured.n < needed:
        wanted = f"at least {needed}" if needed is not None else f"more than {_MOST_PROMPTS:,}"
        reason = f"{measured.n} {unit} are too few: a margin of {line.margin:g} takes {wanted}"
        return Decided(line, CANNOT_TELL, reason, measured, needed)
    if not is_good:
        open_ = f", with {measured.undecided} answers that the judge did not decide" if measured.undecided else ""
        return Decided(line, CANNOT_TELL, f"the interval has the threshold within{open_}", measured, needed)
    return Decided(line, PASSES, "the whole interval is within the threshold", measured, needed)


def decide(card: Card, lines: Sequence[Decided]) -> Decision:
    """Reject if a line fails, accept if all pass; a judge that is too easily fooled decides none of its lines."""
    fooled = {d.line.judge for d in lines if d.line.kind == "judge_flips" and d.outcome != PASSES}
    decided = []
    for one in lines:
        if one.line.kind == "judge_flips" and one.outcome == FAILS:
            one = one._replace(outcome=CANNOT_TELL, reason="the judge is too easily fooled")
        elif one.line.judge in fooled and one.line.kind != "judge_flips":
            one = one._replace(outcome=CANNOT_TELL, reason=f"{one.line.judge} may be too easily fooled")
        decided.append(one)
    for outcome, said in ((REJECT, FAILS), (CANNOT_TELL, CANNOT_TELL)):
        if names := [one.line.name for one in decided if one.outcome == said]:
            return Decision(outcome, decided, names)
    return Decision(ACCEPT, decided, [min(decided, key=lambda one: one.slack).line.name])
