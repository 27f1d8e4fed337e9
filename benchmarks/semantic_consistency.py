"""Semantic consistency beside a loop over dimensions: time, memory and equality.

    python benchmarks/semantic_consistency.py

10,000 samples, 2,048 dimensions, 100 classes. "Loop" is the definition done with care: rows normalised and absolute
values taken once, then one mask and one bincount for each dimension. "Official" is the loop as published, which takes
the absolute value of the whole matrix for each dimension; timed for `--official` dimensions and scaled up. Ours also
computes the chance level, which doubles its counting. Features are half-rectified Gaussians (density 1/2), the case
with the most active samples that a non-negative method gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from measuring import in_turn, machine, options_of, ratios, spread

from vision_bench.metrics import semantic_consistency

EPS = 1e-5


def loop(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The share of the most frequent class among the active samples of each dimension."""
    active = torch.nn.functional.normalize(features, dim=1).abs() > EPS
    shares = torch.full((features.shape[1],), float("nan"))
    for dimension in range(features.shape[1]):
        chosen = labels[active[:, dimension]]
        if len(chosen):
            shares[dimension] = chosen.bincount().max() / len(chosen)
    return shares


def official(features: torch.Tensor, labels: torch.Tensor, dimensions: int) -> torch.Tensor:
    """The same of the first dimensions, as published."""
    normalised = torch.nn.functional.normalize(features, dim=1)
    shares = []
    for dimension in range(dimensions):
        counts = labels[normalised.abs()[:, dimension] > EPS].bincount()
        shares.append((counts / counts.sum()).max())
    return torch.stack(shares)


def main() -> None:
    """Time, compare and print."""
    parser = options_of(__doc__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--official", type=int, default=16, help="dimensions of which the official loop is timed")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(options.samples, options.dimensions, generator=generator).relu()
    labels = torch.randint(options.classes, (options.samples,), generator=generator)

    arms: dict[str, Callable[[], object]] = {
        "ours": partial(semantic_consistency, features, labels),
        "loop": partial(loop, features, labels),
        "official": partial(official, features, labels, options.official),
    }
    times = in_turn(arms, options.rounds, clock=time.process_time)
    times["official"] = [value * options.dimensions / options.official for value in times["official"]]
    ours, looped = semantic_consistency(features, labels), loop(features, labels)
    published = official(features, labels, options.official)
    difference = max(
        (ours.per_dimension - looped).abs().max().item(),
        (ours.per_dimension[: options.official] - published).abs().max().item(),
    )
    print(
        f"{options.samples} x {options.dimensions}, {options.classes} classes, median of {options.rounds} rounds, "
        f"{machine()}:"
    )
    for name, values in times.items():
        print(
            f"  {name:9} {median(values):8.3f} s, {median(ratios(times, name, 'ours')):6.1f} times ours "
            f"{spread(times, name, 'ours')}"
        )
    print(f"  largest difference of a dimension {difference:.1e}; mean {ours.mean:.4f}, chance {ours.chance:.4f}")


if __name__ == "__main__":
    main()
