"""The geometric median of points, from which the pre-bias of a sparse autoencoder starts."""

from __future__ import annotations

import torch


def geometric_median(points: torch.Tensor, iterations: int = 100, tolerance: float = 1e-6) -> torch.Tensor:
    """The point (d,) of least summed distance to the points (n, d), by Weiszfeld's iteration from their mean.

    Stops when a step is shorter than `tolerance` times the mean distance.
    """
    points = points.double()
    median = points.mean(dim=0)
    for _ in range(iterations):
        distances = (points - median).norm(dim=1)
        scale = distances.mean()
        if scale == 0:
            break
        weights = 1 / distances.clamp(min=1e-12 * scale.item())
        before, median = median, (weights @ points) / weights.sum()
        if (median - before).norm() <= tolerance * scale:
            break
    return median
