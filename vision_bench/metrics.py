"""How monosemantic features are, and how many of their dimensions are in use.

The official code reports all of these on features with L2-normalised rows; so do these functions, which take raw
features and normalise the rows themselves. A dimension is active in a sample if |z_d| > eps, live if it is active in
any sample, and dead if not. No function changes its argument, and none accepts NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from vision_bench.checks import NOT_NEGATIVE, check_counts
from vision_bench.corruptions import check_labels

_CHUNK_VALUES = 2**23  # of a chunk of dimensions, held as one byte each
_BLOCK_VALUES = 2**17  # of a block of rows, held as floats: as many as stay in the cache
_CHANCE_PAIRS = 1024  # of a dimension and a shuffle of the labels, at least, for the chance level


MEASURED = ("semantic_consistency", "chance_consistency", "sparsity", "live_dimensions")


class SemanticConsistency(NamedTuple):
    """How pure dimensions are; a consistency means little without the sparsity and the chance level."""

    mean: float  # over the dimensions with at least min_support active samples, in [0, 1]; NaN if there is none
    per_dimension: torch.Tensor  # (d,) float64, NaN where the support is below min_support
    live_dimensions: int  # dimensions that are active in any sample
    sparsity: float  # share of the values (n, d) that are not active, in [0, 1]
    support: torch.Tensor  # (d,) int64, number of samples that activate a dimension
    chance: float  # `mean` with shuffled labels: what the supports alone give
    chance_per_dimension: torch.Tensor  # (d,) float64, a mean over the shuffles, NaN as `per_dimension`

    @property
    def summary(self) -> dict[str, float | None]:
        """Values for rows of results by the names in `MEASURED`; a consistency over no dimension is None."""
        values = (self.mean, self.chance, self.sparsity, float(self.live_dimensions))
        return {name: None if math.isnan(value) else value for name, value in zip(MEASURED, values, strict=True)}


def semantic_consistency(
    features: torch.Tensor,
    labels: torch.Tensor,
    eps: float = 1e-5,
    min_support: int = 1,
    absolute: bool = True,
    seed: int = 0,
    shuffles: int | None = None,
) -> SemanticConsistency:
    """Among the samples that activate a dimension, the share of the most frequent class (Wang et al., 2024).

    A dimension that a single sample activates has a consistency of 1 whatever it means. Hence `min_support`, and the
    chance level: the mean over the same dimensions with shuffled labels.

    Takes O(n d) without a loop over dimensions: samples are sorted by label once, and the active ones of each class
    are counted for a chunk of dimensions at a time, which bounds the memory.

    Args:
        features: (n, d) floating-point, raw; rows are L2-normalised here.
        labels: (n,) of an integer dtype, at least 0.
        eps: a value is active above it.
        min_support: dimensions with fewer active samples are left out; 1, the official definition, is the least.
        absolute: whether |z| or z itself must exceed eps; the official code takes |z|.
        seed: of the shuffled labels of the chance level.
        shuffles: how many, by default as many as the mean over dimensions needs; a single dimension needs more.

    Raises:
        TypeError: the features are not floating-point or the labels not integers.
        ValueError: shapes do not fit, a feature is NaN, or an argument is out of its range.

    Example:
        >>> consistency = semantic_consistency(torch.randn(500, 32).relu(), torch.randint(10, (500,)))
        >>> consistency.mean, consistency.chance, consistency.sparsity
    """
    norms = _checked_norms(features, eps)
    classes = max(1, int(labels.max()) + 1) if labels.ndim == 1 and len(labels) else 1
    check_labels(labels, classes)
    if len(labels) != len(features):
        raise ValueError(f"features has {len(features)} rows and labels {len(labels)}; each sample needs one label.")
    check_counts(min_support=min_support, shuffles=shuffles)

    labels = labels.to(features.device)
    sizes = torch.bincount(labels, minlength=classes).tolist()
    generator = torch.Generator().manual_seed(seed)
    orders = [labels.argsort()]
    for _ in range(shuffles or min(64, math.ceil(_CHANCE_PAIRS / features.shape[1]))):
        shuffled = labels[torch.randperm(len(labels), generator=generator).to(labels.device)]
        orders.append(shuffled.argsort())
    chunks = []
    for active in _active(features, norms, eps, absolute):
        rows = []
        for order in orders:
            counts = torch.stack([part.sum(dim=0, dtype=torch.int32) for part in active[order].split(sizes)])
            rows.append(counts.amax(dim=0))
        chunks.append(torch.stack([counts.sum(dim=0), *rows]))
    total, most, *by_chance = torch.cat(chunks, dim=1)
    counted = total >= min_support
    consistency = torch.where(counted, most.double() / total, torch.nan)
    chance = torch.where(counted, torch.stack(by_chance).double().mean(dim=0) / total, torch.nan)
    return SemanticConsistency(
        mean=consistency[counted].mean().item(),
        per_dimension=consistency,
        live_dimensions=int((total > 0).sum()),
        sparsity=1 - total.sum().item() / features.numel(),
        support=total,
        chance=chance[counted].mean().item(),
        chance_per_dimension=chance,
    )


def chance_level(labels: torch.Tensor, num_classes: int) -> float:
    """Accuracy in [0, 1] without looking at the images: of a guess, or of the most frequent class if that is more.

    `labels` (n,) are integers in [0, num_classes), of the samples that are classified.
    """
    check_labels(labels, num_classes)
    return max(1 / num_classes, torch.bincount(labels).max().item() / len(labels))


def top_activated(features: torch.Tensor, k: int, eps: float = 1e-5) -> torch.Tensor:
    """The k samples that activate each dimension most, the strongest first: (n, d) floating-point -> (d, k) int64.

    The largest values of the L2-normalised rows, not the largest absolute ones. A dimension with fewer than k values
    above eps has -1 in the other places.

    Raises: as `semantic_consistency`; also if k is not in [1, n].
    """
    norms = _checked_norms(features, eps)
    if not 1 <= k <= len(features):
        raise ValueError(f"k is {k} for {len(features)} samples; it must be in [1, {len(features)}].")
    chosen = []
    for chunk in features.split(max(1, _CHUNK_VALUES // len(features)), dim=1):
        values, samples = (chunk / norms).topk(k, dim=0)
        chosen.append(torch.where(values > eps, samples, -1).T)
    return torch.cat(chosen)


def purity(samples: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Share of the most frequent class among the samples of each row: (m, k) int64, -1 for none -> (m,) float64.

    NaN for a row without samples. `labels` (n,) are integers of at least 0.
    """
    classes = torch.where(samples >= 0, labels[samples], -1)
    present = classes >= 0
    same = (classes[:, :, None] == classes[:, None, :]) & present[:, None, :]
    return same.sum(dim=2).where(present, 0).amax(dim=1).double() / present.sum(dim=1)


def support(features: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Number of samples in which each dimension is active: (n, d) floating-point -> (d,) int64.

    Raises: as `semantic_consistency`.
    """
    norms = _checked_norms(features, eps)
    return torch.cat([active.sum(dim=0) for active in _active(features, norms, eps, absolute=True)])


def sparsity(features: torch.Tensor, eps: float = 1e-5) -> float:
    """Share of the values (n, d) with |z| <= eps on normalised rows, in [0, 1]."""
    return 1 - support(features, eps).sum().item() / features.numel()


def live_dimensions(features: torch.Tensor, eps: float = 1e-5) -> int:
    """Number of the d dimensions that any of the n samples activates."""
    return int((support(features, eps) > 0).sum())


def dead_share(features: torch.Tensor, eps: float = 1e-5) -> float:
    """Share of the d dimensions that none of the n samples activates, in [0, 1]."""
    return 1 - live_dimensions(features, eps) / features.shape[1]


def effective_rank(features: torch.Tensor) -> float:
    """Entropy, in nats, of the singular values of the normalised rows divided by their sum; in [0, log min(n, d)].

    The official code calls the entropy effective rank; Roy and Vetterli's is its exponential. From the eigenvalues of
    the smaller Gram matrix in float64, so that memory is O(min(n, d)^2) beside the features.

    Raises: as `semantic_consistency`.
    """
    norms = _checked_norms(features).double()
    smaller = min(features.shape)
    gram = torch.zeros(smaller, smaller, dtype=torch.float64, device=features.device)
    if features.shape[1] <= features.shape[0]:
        for rows, norm in zip(features.split(4096), norms.split(4096), strict=True):
            block = rows.double() / norm
            gram.addmm_(block.T, block)
    else:
        for columns in features.split(4096, dim=1):
            block = columns.double() / norms
            gram.addmm_(block, block.T)
    eigenvalues = torch.linalg.eigvalsh(gram)
    # Below this they are rounding of zeros, whose roots would count as singular values of 1e-8.
    rounding = smaller * torch.finfo(torch.float64).eps * eigenvalues[-1]
    values = torch.where(eigenvalues > rounding, eigenvalues, 0).sqrt()
    shares = values / values.sum()
    return torch.special.entr(shares).sum().item()


def fraction_of_variance_unexplained(reconstruction: torch.Tensor, target: torch.Tensor) -> float:
    """FVU: squared error of the reconstruction over the squared distance of the target from its mean, both (n, d).

    0 for a perfect reconstruction, 1 for one that is as good as the mean of the targets.

    Raises:
        ValueError: the shapes differ, or the target does not vary.
    """
    if reconstruction.shape != target.shape or target.ndim != 2:
        raise ValueError(
            f"reconstruction has shape {tuple(reconstruction.shape)} and target {tuple(target.shape)}; "
            "both must be the same (n, d)."
        )
    target = target.double()
    variation = (target - target.mean(dim=0)).square().sum()
    if variation <= torch.finfo(torch.float64).eps * target.square().sum():
        raise ValueError("target does not vary between samples; there is no variance to explain.")
    return ((reconstruction - target).square().sum() / variation).item()


def _active(features: torch.Tensor, norms: torch.Tensor, eps: float, absolute: bool) -> Iterator[torch.Tensor]:
    """Yield a mask (n, chunk) bool of the active values for each chunk of dimensions."""
    for chunk in features.split(max(1, _CHUNK_VALUES // len(features)), dim=1):
        active = torch.empty(chunk.shape, dtype=torch.bool, device=features.device)
        rows = max(1, _BLOCK_VALUES // chunk.shape[1])
        for block, norm, out in zip(chunk.split(rows), norms.split(rows), active.split(rows), strict=True):
            torch.gt((block.abs() if absolute else block) / norm, eps, out=out)
        yield active


def _checked_norms(features: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """Row norms (n, 1) of usable features, at least in float32 and, as in torch's normalize, at least 1e-12."""
    if not features.is_floating_point():
        raise TypeError(f"features has dtype {features.dtype}; it must be floating-point.")
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features has shape {tuple(features.shape)}; it must be (n, d), neither of them 0.")
    NOT_NEGATIVE.check(eps=eps)
    dtype = torch.promote_types(features.dtype, torch.float32)
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=dtype)
    unusable = int((~norms.isfinite()).sum())
    if unusable:
        raise ValueError(f"features has NaN or infinite values in {unusable} of {len(features)} rows (or overflows).")
    return norms.clamp_(min=1e-12)
