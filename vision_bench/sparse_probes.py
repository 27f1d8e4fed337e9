"""Linear classifiers for which it matters which axes the features have: with few dimensions, or an L1 penalty.

Both return `probe.Probes` of the features as given. Neither depends on one number that scales all features, nor on a
constant that is added to them.

    import torch
    from vision_bench.probe import probe_accuracy
    from vision_bench.sparse_probes import fit_k_sparse_probes

    labels = torch.arange(300) % 3
    features = torch.randn(300, 8) + 3 * torch.nn.functional.one_hot(labels, 8)
    probes = fit_k_sparse_probes(features, labels[None], 3, k=1)
    print(probe_accuracy(*probes, features, labels, topk=(1,))[1])
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from vision_bench.checks import CHUNK, PerProbe, check_features, check_finite, check_labels, vector
from vision_bench.probe import Probes

RIDGE = 1e-6  # of the mean variance of the chosen dimensions, on their covariance: two of them may be equal
TOLERANCE, MAX_ITERATIONS = 1e-2, 1000  # of the L1 penalty; the former is a share of its strength


@torch.no_grad()
def fit_k_sparse_probes(
    features: torch.Tensor, label_sets: torch.Tensor, num_classes: int, k: int, device: torch.device | str = "cpu"
) -> Probes:
    """For each class the least squares fit of its indicator by k dimensions (Gurnee et al. 2023, arXiv:2305.01610).

    The k dimensions of a class are those of the largest F statistic between its samples and the others, as of
    scikit-learn's `SelectKBest(f_classif, k)`. With C the covariance of the features, m their mean, p the share of the
    class and r the covariance of the features with its indicator, all of the chosen dimensions,
    w = (C + ridge)^-1 r and b = p - w m; a sample gets the class of the largest w x + b. The covariance of all
    features is computed once for all label sets.

    Args:
        features: (n, d) floating.
        label_sets: (sets, n) integer in [0, num_classes).
        num_classes: at least 2.
        k: dimensions of each class, in [1, d].
        device: where to compute, in float64.

    Raises:
        TypeError: features are not floating or labels not integer.
        ValueError: shapes do not fit, features are not finite, or labels or k are out of range.
    """
    n, d = check_features(features).shape
    label_sets = check_labels("label_sets", label_sets, num_classes, n, dims=2)
    if not 1 <= k <= d:
        raise ValueError(f"k is {k} for features of {d} dimensions; it must be in [1, {d}].")
    check_finite("features", features)
    mean, covariance = _moments(features, torch.device(device))
    variances = covariance.diagonal()
    weights = torch.zeros(len(label_sets), num_classes, d, dtype=torch.float64, device=device)
    biases = torch.empty(len(label_sets), num_classes, dtype=torch.float64, device=device)
    for i, labels in enumerate(label_sets):
        sums = torch.zeros(num_classes, d, dtype=torch.float64, device=device)
        for x, y in zip(features.split(CHUNK), labels.to(device).split(CHUNK), strict=True):
            sums.index_add_(0, y, x.to(sums) - mean)
        with_class = sums / n  # covariance of each dimension with each class's indicator
        # The F statistic of two groups grows with the squared correlation; a constant dimension has none.
        correlation = torch.where(variances > 0, with_class.square() / variances, 0.0)
        chosen = correlation.topk(k, dim=1).indices
        of_class = covariance[chosen[:, :, None], chosen[:, None, :]]
        ridge = RIDGE * of_class.diagonal(dim1=1, dim2=2).mean(dim=1)
        ridge = torch.where(ridge > 0, ridge, 1.0)[:, None, None] * torch.eye(k, dtype=torch.float64, device=device)
        solved = torch.linalg.solve(of_class + ridge, with_class.gather(1, chosen)[..., None])[..., 0]
        weights[i].scatter_(1, chosen, solved)
        shares = torch.bincount(labels.to(device), minlength=num_classes) / n
        biases[i] = shares - weights[i] @ mean
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return Probes(weights.to(dtype), biases.to(dtype))


@torch.no_grad()
def fit_l1_probes(
    features: torch.Tensor,
    label_sets: torch.Tensor,
    num_classes: int,
    strength: PerProbe,
    *,
    standardize: bool = False,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Probes:
    """Multinomial logistic regression with an L1 penalty, by FISTA with restarts (O'Donoghue & Candes 2015).

    Minimises mean cross entropy(W x + b) + s g |W|_1, b without a penalty, where g is the least penalty at which W is
    0: the largest absolute gradient in W at W = 0 and the b that is best there. So a strength s means the same
    whatever the scale of the features; scikit-learn's C is 1 / (n s g).

    Args:
        features, label_sets, num_classes: as in `fit_k_sparse_probes`.
        strength: s, at least 0; one number, or one for each label set.
        standardize: divide each feature by its standard deviation before.
        tolerance: the solution is taken when no entry of the generalised gradient exceeds this share of s g.
        max_iterations: passes over the features, after which the solution is taken with a warning.
        device: where to compute.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: as `fit_k_sparse_probes`, of which k is the strength here.
    """
    n, d = check_features(features).shape
    label_sets = check_labels("label_sets", label_sets, num_classes, n, dims=2)
    strengths = vector("strength", strength, len(label_sets)).tolist()
    check_finite("features", features)
    mean, covariance = _moments(features, torch.device(device))
    variances = covariance.diagonal()
    scale = variances.sqrt() if standardize else variances.mean().sqrt().expand(d)
    factor = torch.where(scale > 0, 1 / scale, 0.0)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    # Centred features leave the solution as it is, as b takes the difference, and the problem is better conditioned.
    x = (features.to(device, dtype) - mean.to(dtype)) * factor.to(dtype)
    # The Hessian of the cross entropy in the logits is at most 1/2.
    curvature = max(0.5 * float(torch.linalg.eigvalsh(covariance * factor * factor[:, None])[-1]), 0.5)
    weights, biases, unfinished = [], [], list[float]()
    for labels, s in zip(tqdm(label_sets, "L1 probes", disable=not progress), strengths, strict=True):
        w, b, violation = _fista(x, labels.to(device), num_classes, s, curvature, tolerance, max_iterations)
        weights.append(w * factor.to(dtype))
        biases.append(b - weights[-1] @ mean.to(dtype))
        unfinished += [violation] if violation > tolerance else []
    if unfinished:
        warnings.warn(
            f"{len(unfinished)} of {len(label_sets)} probes with an L1 penalty took {max_iterations} passes and are "
            f"within {max(unfinished):.2g} of the penalty instead of {tolerance:g}; give a larger max_iterations.",
            stacklevel=2,
        )
    return Probes(torch.stack(weights), torch.stack(biases))


def _fista(
    x: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    strength: float,
    curvature: float,
    tolerance: float,
    max_iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """W (c, d), b (c,) of one label set for centred x (n, d), and the largest violation as a share of the penalty."""
    n, d = x.shape
    targets = F.one_hot(labels, num_classes).to(x.dtype)
    shares = targets.mean(dim=0)
    largest = float(((shares - targets).T @ x).abs().max()) / n
    penalty = strength * largest
    w, b = x.new_zeros(num_classes, d), shares.clamp(min=1 / (10 * n)).log()
    ahead_w, ahead_b, momentum = w, b, 1.0
    violation = float("inf")
    for _ in range(max_iterations):
        error = torch.addmm(ahead_b, x, ahead_w.T).softmax(dim=1).sub_(targets).div_(n)
        next_w = F.softshrink(ahead_w - (error.T @ x) / curvature, penalty / curvature)
        next_b = ahead_b - error.sum(dim=0) / curvature
        step_w, step_b = next_w - w, next_b - b
        back_w, back_b = ahead_w - next_w, ahead_b - next_b
        moved = max(float(back_w.abs().max()), float(back_b.abs().max()))
        violation = curvature * moved / penalty if penalty else curvature * moved / max(largest, 1e-30)
        if float((back_w * step_w).sum() + (back_b * step_b).sum()) > 0:
            momentum = 1.0  # the step goes uphill: start again from here without momentum
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        share = (momentum - 1) / following
        ahead_w, ahead_b = next_w + share * step_w, next_b + share * step_b
        w, b, momentum = next_w, next_b, following
        if violation <= tolerance:
            break
    return w, b, violation


def _moments(features: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (d,) and covariance (d, d) in float64."""
    n, d = features.shape
    mean = torch.zeros(d, dtype=torch.float64, device=device)
    for part in features.split(CHUNK):
        mean += part.to(mean).sum(dim=0) / n
    covariance = torch.zeros(d, d, dtype=torch.float64, device=device)
    for part in features.split(CHUNK):
        centred = part.to(mean) - mean
        covariance.addmm_(centred.T, centred, alpha=1 / n)
    return mean, covariance
