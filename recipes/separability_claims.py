"""The claims of section 4.3 and appendix B as predicates on a grid of sparsities, for recipes/separability.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vision_bench.separability import criterion, crossing, moments

GRID = np.arange(0, 1, 0.005)  # sparsities
RATES, NOISES = np.linspace(0.01, 0.49, 25), np.geomspace(0.01, 10, 25)


def distribution_claims(ties: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """(theorem, claim, whether it holds) on `GRID` for one tie rule, where the criterion does not matter."""
    rate, sigma = RATES[:, None], NOISES[:, None]
    u, v, _ = moments(GRID, ties=ties)
    flipped, blurred = moments(GRID, rate, 0, ties), moments(GRID, 0, sigma, ties)
    closer = (v.means < u.means).all(axis=0)
    yield (
        "4.1",
        "v has smaller means, yet D(v) > D(u)",
        closer & (np.diff(v.means, axis=0) > np.diff(u.means, axis=0))[0],
    )
    for y in (0, 1):
        yield "4.1", f"equal variances, y = {y}", np.isclose(u.variances[y], v.variances[y], rtol=0, atol=1e-12)

    def equal(noisy: np.ndarray, formula: np.ndarray) -> np.ndarray:
        close = np.isclose(noisy, formula, rtol=0, atol=1e-12)
        return close.reshape(-1, len(GRID)).all(axis=0)

    distance, variance, mean, shifted = (np.ones(len(GRID), dtype=bool) for _ in range(4))
    for clean, noisy, blur, factor in ((u, flipped.mono, blurred.mono, 1), (v, flipped.poly, blurred.poly, 2)):
        gap, variances = clean.means[1] - clean.means[0], clean.variances[:, None]
        mixed = (1 - rate) * variances + rate * variances[::-1] + rate * (1 - rate) * gap**2
        distance &= equal(noisy.means[1] - noisy.means[0], (1 - 2 * rate) * gap)
        variance &= equal(noisy.variances, mixed)
        mean &= equal(blur.means, clean.means[:, None])
        shifted &= equal(blur.variances, variances + factor * sigma**2)
    yield "B.5", "D shrinks to (1 - 2 eta) D", distance
    yield "B.6", "variances mix with 1 - eta, eta", variance
    yield "B.7", "input noise leaves the means", mean
    yield "B.8", "input noise adds sigma^2, 2 sigma^2", shifted


def criterion_claims(ties: str, kind: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """(theorem, claim, whether it holds) on `GRID` for one tie rule and criterion."""
    clean = criterion(moments(GRID, ties=ties), kind)
    yield "4.1", "poly ahead without noise", clean.poly > clean.mono
    for theorem, noise, arguments in (
        ("4.2", "label", (RATES[:, None], 0)),
        ("B.9", "input", (0, NOISES[:, None])),
    ):
        noisy = criterion(moments(GRID, *arguments, ties), kind)
        drops = (clean.mono - noisy.mono, clean.poly - noisy.poly)
        if kind != "difference":  # ratios are compared relative to their start
            drops = (drops[0] / clean.mono, drops[1] / clean.poly)
        yield theorem, f"mono falls more slowly ({noise} noise)", (drops[0] <= drops[1] + 1e-12).all(axis=0)
        overtakes = [crossing(sparsity, noise, kind, ties) is not None for sparsity in GRID]
        yield theorem, f"mono overtakes ({noise} noise)", np.array(overtakes)


def verdict(holds: np.ndarray) -> str:
    """'holds', 'fails', or the ranges of sparsity in which the claim holds, to the step of `GRID`."""
    if holds.all() or not holds.any():
        return "holds" if holds.all() else "fails"
    edges = np.flatnonzero(np.diff(np.concatenate([[0], holds.astype(int), [0]])))
    ranges = [
        f"S = {GRID[first]:.3g}" if first == last - 1 else f"{GRID[first]:.3g} <= S <= {GRID[last - 1]:.3g}"
        for first, last in edges.reshape(-1, 2)
    ]
    return "only " + " and ".join(ranges)
