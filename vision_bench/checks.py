"""Checks of features, labels and settings that several modules are given."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

CHUNK = 8192  # rows of a pass over all features

PerProbe = float | Sequence[float] | torch.Tensor


class Range(NamedTuple):
    """Numbers above `low` and below `high`; `high` is one of them if the range is closed, `low` if it begins there."""

    low: float
    high: float = math.inf
    closed: bool = False
    example: str = ""  # that explains the number, for errors
    begins: bool = False

    def __contains__(self, number: Any) -> bool:
        above = self.low < number or (self.begins and number == self.low)
        return above and (number < self.high or (self.closed and number == self.high))

    def __str__(self) -> str:
        ends = f"in {'[' if self.begins else '('}{self.low:g}, {self.high:g}{']' if self.closed else ')'}"
        words = f"{'at least' if self.begins else 'above'} {self.low:g} and finite" if self.high == math.inf else ends
        return f"{words}, {self.example}" if self.example else words

    def check(self, **settings: float) -> None:
        """Raise ValueError unless the settings, by their names, are in the range."""
        for name, number in settings.items():
            if number not in self:
                raise ValueError(f"{name} is {number}; it must be {self}.")


POSITIVE, NOT_NEGATIVE = Range(0), Range(0, begins=True)
SHARE = Range(0, 1, begins=True)  # of which there must be a rest


def chunks(views: torch.Tensor) -> Iterator[torch.Tensor]:
    """All rows of features (views, n, d), some thousand at a time."""
    for part in views:
        yield from part.split(CHUNK)


def check_features(features: torch.Tensor, dims: tuple[int, ...] = (2,)) -> torch.Tensor:
    """Features with as many dimensions as one of `dims`, none of size 0; raises ValueError, TypeError for others."""
    features = torch.as_tensor(features)
    if features.ndim not in dims or not features.numel():
        shapes = " or ".join({2: "(n, d)", 3: "(views, n, d)"}[dim] for dim in dims)
        raise ValueError(f"features has the shape {tuple(features.shape)}; it must be {shapes}, none of them 0.")
    if not features.is_floating_point():
        raise TypeError(f"features is {features.dtype}; it must be floating, such as float32.")
    return features


def check_labels(name: str, labels: torch.Tensor, num_classes: int | None, n: int, dims: int) -> torch.Tensor:
    """Labels (k, n) or (n,) in [0, num_classes) as int64; raises ValueError, TypeError for others."""
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} is {labels.dtype}; it must be integer, the index of the class.")
    if labels.ndim != dims or labels.shape[-1] != n or not labels.numel():
        shape = f"(k, {n})" if dims == 2 else f"({n},)"
        raise ValueError(f"{name} has the shape {tuple(labels.shape)} for {n} samples; it must be {shape}.")
    if num_classes is not None and num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; it must be at least 2.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        allowed = "at least 0" if num_classes is None else f"in [0, {num_classes - 1}] for num_classes {num_classes}"
        raise ValueError(f"{name} has values from {low} to {high}; they must be {allowed}.")
    return labels.long()


def check_finite(name: str, features: torch.Tensor) -> None:
    """Raise ValueError for features (n, d) or (views, n, d) with NaN or infinite values."""
    start = 0
    for chunk in chunks(features if features.ndim == 3 else features[None]):
        finite = chunk.isfinite().all(dim=1)
        if not finite.all():
            row = (start + int((~finite).nonzero()[0])) % features.shape[-2]
            raise ValueError(f"{name} has NaN or infinite values, first in row {row}; extract them again.")
        start += len(chunk)


def vector(name: str, value: PerProbe, k: int) -> torch.Tensor:
    """The setting as a vector (k,) of float64; raises ValueError if one is below 0 or not finite."""
    vector = torch.as_tensor(value, dtype=torch.float64)
    if vector.ndim > 1 or (vector.ndim == 1 and len(vector) != k):
        raise ValueError(f"{name} has the shape {tuple(vector.shape)}; give one number or {k}, one for each probe.")
    if not (vector >= 0).all() or not vector.isfinite().all():
        raise ValueError(f"{name} has {vector.min().item():g}; it must be at least 0 and finite.")
    return vector.expand(k).clone()


def check_name(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of the names allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def check_counts(least: int = 1, **counts: int | None) -> None:
    """Raise ValueError unless the settings, by their names, are at least `least`; None is passed over."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise ValueError(f"{name} is {count}; it must be at least {least}.")
