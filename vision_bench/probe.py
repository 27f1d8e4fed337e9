"""Linear probes and nearest neighbours on frozen features.

`fit_linear_probes` trains every probe of a sweep (noise rates x seeds x losses x weight decays) in one pass over
cached features. With X a batch (b, d) and the k weight matrices stacked to (k c, d), a step is two products for all
probes, X W^T and E^T X. E, the gradient of the losses in the logits, is formed by hand: no autograd, no copies of X.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from vision_bench.checks import CHUNK, PerProbe, check_features, check_finite, check_labels, check_name, chunks, vector
from vision_bench.corruptions import seed_of
from vision_bench.losses import LEAST_PROBABILITY, LOG_OF_ZERO

OPTIMIZERS = ("lars", "sgd")
SCHEDULES = ("cosine", "step", "constant")
TRUST_COEFFICIENT, LARS_EPS = 0.02, 1e-8
NORM = 8.0  # root of the mean square norm of rescaled features; by docs/measurements/gains_of_scale.md
TRAINING = ("probe_training_top1", "class_means_training_top1")  # of `training_accuracy`, as rows of results name them
NEIGHBOUR_CHUNK = 1024  # rows whose neighbours are sought at once, among a chunk of the others


class Probes(NamedTuple):
    """k linear classifiers of raw features: logits of probe i are x @ weights[i].T + biases[i]."""

    weights: torch.Tensor  # (k, num_classes, d)
    biases: torch.Tensor  # (k, num_classes)


@torch.no_grad()
def fit_linear_probes(
    features: torch.Tensor,
    label_sets: torch.Tensor,
    num_classes: int,
    *,
    epochs: int = 50,
    batch_size: int = 256,
    optimizer: str = "lars",
    learning_rate: PerProbe = 0.4,
    weight_decay: PerProbe = 0.0,
    momentum: float = 0.9,
    schedule: str = "cosine",
    milestones: Sequence[float] = (0.6, 0.8),
    alpha: PerProbe = 1.0,
    beta: PerProbe = 0.0,
    standardize: bool = False,
    rescale: bool = True,
    norm: float = NORM,
    seeds: int | Sequence[int] = 0,
    order_seed: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Probes:
    """Train k linear classifiers at once. Each is what it would be if trained alone with its seed and settings.

    The defaults are the paper's for CIFAR-100; for ImageNet-100 they are `optimizer="sgd", learning_rate=1.5,
    schedule="step"`. A setting of type `PerProbe` is one number for all probes or k of them. As the official code
    does, every epoch takes a new random order and leaves its last incomplete batch out.

    Args:
        features: (n, d) floating, or (views, n, d) cached augmentations of which one is drawn for each sample and
            epoch. Only batches are copied, so a memory-mapped tensor stays on disk. float64 trains in float64, all
            others in float32.
        label_sets: (k, n) integer in [0, num_classes), one row for each probe.
        num_classes: at least 2.
        epochs: passes over the features, at least 1.
        batch_size: in [1, n].
        optimizer: "lars" as timm's `Lars(trust_coeff=0.02, trust_clip=True)` with the norms of each probe (its
            weight is always adapted, its bias neither adapted nor decayed), or "sgd" (bias not decayed).
        learning_rate, weight_decay: at least 0.
        momentum: in [0, 1).
        schedule: "cosine" to 0, per step; "step", a tenth at each of the `milestones`; or "constant".
        milestones: shares of the epochs, each in (0, 1).
        alpha, beta: at least 0; the loss is `losses.symmetric_cross_entropy`, by default plain cross entropy.
        standardize: train on (x - mean) / standard deviation of each feature. The result is for raw features all
            the same; a feature that is constant gets the weight 0.
        rescale: train on features times one number, by which the root of the mean square norm of a row is `norm`, so
            that learning rate and weight decay mean the same whatever the scale: the logits for c x are those for x.
            The result is for the features as given. False is the paper's protocol, in which the scale of the
            features decides how fast a probe learns and how strongly its weights decay.
        norm: above 0; unused without `rescale`.
        seeds: of the initial weights, and of the order of the samples and views unless `order_seed` is given. Probes
            of equal seed start equal.
        order_seed: the same order for all probes: one read of the features a step whatever the seeds.
        device: where to train, by default where the features are.
        progress: show a progress bar.

    Raises:
        TypeError: features are not floating or labels not integer.
        ValueError: shapes do not fit, features are not finite, or labels or a setting are out of range.
        FloatingPointError: the training of a probe diverged: a weight or bias is NaN or infinite.

    Example:
        >>> features, labels = torch.randn(500, 16), torch.randint(10, (500,))
        >>> probes = fit_linear_probes(features, torch.stack([labels, labels]), 10, weight_decay=[0.0, 1e-2])
        >>> probe_accuracy(*probes, features, labels)[1]  # top-1 accuracy of both probes
    """
    views = check_features(features, dims=(2, 3))
    views = views if views.ndim == 3 else views[None]
    _, n, d = views.shape
    labels = check_labels("label_sets", label_sets, num_classes, n, dims=2)
    k = len(labels)
    settings = {"learning_rate": learning_rate, "weight_decay": weight_decay, "alpha": alpha, "beta": beta}
    vectors = {name: vector(name, value, k) for name, value in settings.items()}
    seeds = [seeds] * k if isinstance(seeds, int) else list(seeds)
    if len(seeds) != k:
        raise ValueError(
            f"seeds has {len(seeds)} values for {k} rows of label_sets; give one for each row or a number."
        )
    if min([*seeds, order_seed or 0], default=0) < 0:
        raise ValueError(f"seeds are {seeds}, order_seed {order_seed}; they must be at least 0.")
    check_name("optimizer", optimizer, OPTIMIZERS)
    check_name("schedule", schedule, SCHEDULES)
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; it must be at least 1.")
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size is {batch_size} for {n} samples; it must be in [1, {n}].")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; it must be in [0, 1).")
    if not 0 < norm < math.inf:
        raise ValueError(f"norm is {norm}; it must be above 0 and finite.")
    if any(not 0 < milestone < 1 for milestone in milestones):
        raise ValueError(f"milestones are {tuple(milestones)}; they are shares of the epochs, each in (0, 1).")
    check_finite("features", views)

    device = views.device if device is None else torch.device(device)
    dtype = torch.float64 if views.dtype == torch.float64 else torch.float32
    shift, factor = (part.to(device, dtype) for part in _scaling(views, standardize, norm if rescale else None))

    # Probes of one seed see the same batches: one product for all of them, one for each seed otherwise.
    keys = [seed if order_seed is None else order_seed for seed in seeds]
    groups = []
    for key in dict.fromkeys(keys):
        members = [i for i in range(k) if keys[i] == key]
        generator = torch.Generator().manual_seed(order_stream(key))
        own = {name: values[members].to(device, dtype) for name, values in vectors.items()}
        start = _initial([seeds[i] for i in members], num_classes, d, dtype, device)
        group = _Group(*start, labels[members].to(device), optimizer == "lars", momentum, **own)
        groups.append((generator, group, members))

    steps = n // batch_size
    bar = tqdm(total=epochs * steps, desc=f"probes ({k} x {n})", unit="step", disable=not progress)
    for epoch in range(epochs):
        orders = [
            (
                torch.randperm(n, generator=generator).to(views.device),
                torch.randint(len(views), (n,), generator=generator).to(views.device),
            )
            for generator, _, _ in groups
        ]
        for step in range(steps):
            share = _schedule(schedule, milestones, epoch, epochs, step / steps)
            for (order, view), (_, group, _) in zip(orders, groups, strict=True):
                batch = order[step * batch_size : (step + 1) * batch_size]
                x = views[0].index_select(0, batch) if len(views) == 1 else views[view[batch], batch]
                group.step((x.to(device, dtype) - shift) * factor, batch.to(device), share)
            bar.update()
    bar.close()

    weights = torch.empty(k, num_classes, d, dtype=dtype, device=device)
    biases = torch.empty(k, num_classes, dtype=dtype, device=device)
    for _, group, members in groups:
        weights[members], biases[members] = group.weights, group.biases
    weights *= factor  # from the features of the training to those that were given
    biases -= weights @ shift
    if diverged := _not_finite(weights, biases):
        raise FloatingPointError(
            f"the weights of {len(diverged)} of {k} probes, first {diverged[0]}, are NaN or infinite: their training "
            "diverged; lower learning_rate (in recipes probe_learning_rate)"
        )
    return Probes(weights, biases)


def order_stream(seed: int) -> int:
    """The seed of the order in which probes of a seed see the samples.

    Wrong labels drawn with the same seed would otherwise come from the same permutation, and all of them first.
    """
    return seed_of(seed, 1)


@dataclass
class _Group:
    """Probes that see the same batches, and their optimiser."""

    weights: torch.Tensor  # (k, num_classes, d)
    biases: torch.Tensor  # (k, num_classes)
    labels: torch.Tensor  # (k, n)
    adaptive: bool  # whether the optimiser is LARS
    momentum: float
    learning_rate: torch.Tensor  # (k,), as the following
    weight_decay: torch.Tensor
    alpha: torch.Tensor
    beta: torch.Tensor

    def __post_init__(self) -> None:
        self.decays = bool(self.weight_decay.any())
        self.plain = bool((self.alpha == 1).all() and (self.beta == 0).all())
        self.gradient = torch.empty_like(self.weights)
        self.weight_momentum = torch.zeros_like(self.weights)
        self.bias_momentum = torch.zeros_like(self.biases)

    def step(self, x: torch.Tensor, samples: torch.Tensor, factor: float) -> None:
        """One step on the rows x (b, d) of `samples` (b,), with `factor` times the learning rates."""
        k, c, d = self.weights.shape
        logits = torch.addmm(self.biases.view(-1), x, self.weights.view(k * c, d).T)
        error = self._gradient_in_logits(logits.view(-1, k, c), self.labels[:, samples].T).div_(len(x))
        torch.mm(error.view(-1, k * c).T, x, out=self.gradient.view(k * c, d))
        rate = self.learning_rate * factor
        ratio = torch.ones_like(rate)
        if self.adaptive:
            norm, slope = self.weights.flatten(1).norm(dim=1), self.gradient.flatten(1).norm(dim=1)
            ratio = TRUST_COEFFICIENT * norm / (slope + norm * self.weight_decay + LARS_EPS)
            ratio = torch.where((norm > 0) & (slope > 0), ratio, 1.0).div(rate).clamp(max=1)
        if self.decays:
            self.gradient.addcmul_(self.weights, self.weight_decay[:, None, None])
        self.weight_momentum.mul_(self.momentum).addcmul_(self.gradient, ratio[:, None, None])
        self.weights.addcmul_(self.weight_momentum, -rate[:, None, None])
        self.bias_momentum.mul_(self.momentum).add_(error.sum(dim=0))
        self.biases.addcmul_(self.bias_momentum, -rate[:, None])

    def _gradient_in_logits(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Gradient of each sample's loss in its logits (b, k, c), for labels (b, k).

        The loss is `losses.symmetric_cross_entropy`. Cross entropy: p - onehot. Reverse cross entropy has the slope
        g_c = -log 1e-4 in the p_c of the wrong classes (0 where p_c is clamped), hence p_c (g_c - sum p g).
        """
        p = logits.softmax(dim=2)
        y = labels[..., None]
        if self.plain:
            return p.scatter_add_(2, y, torch.full_like(y, -1.0, dtype=p.dtype))
        slope = (p >= LEAST_PROBABILITY).to(p.dtype).mul_(-LOG_OF_ZERO).scatter_(2, y, 0.0)
        slope = p * (slope - (p * slope).sum(dim=2, keepdim=True))
        entropy = p.scatter_add_(2, y, torch.full_like(y, -1.0, dtype=p.dtype))
        return entropy.mul_(self.alpha[:, None]).addcmul_(slope, self.beta[:, None])


@torch.no_grad()
def probe_accuracy(
    weights: torch.Tensor,
    biases: torch.Tensor,
    features: torch.Tensor,
    labels: torch.Tensor,
    topk: Sequence[int] = (1, 5),
) -> dict[int, torch.Tensor]:
    """For each t of `topk` a tensor (k,): the shares of samples whose label is among a probe's t largest logits.

    Args:
        weights: (k, num_classes, d).
        biases: (k, num_classes).
        features: (n, d) floating, raw as those the probes were fitted on.
        labels: integer in [0, num_classes), (n,) for all or (k, n), of each.
        topk: each in [1, num_classes].

    Raises:
        TypeError: features are not floating or labels not integer.
        ValueError: shapes do not fit, features or labels are out of range, or a probe is not finite.
    """
    features = check_features(features)
    k, c, d = weights.shape
    if biases.shape != (k, c):
        raise ValueError(f"biases has the shape {tuple(biases.shape)} for weights {(k, c, d)}; it must be {(k, c)}.")
    if features.shape[1] != d:
        raise ValueError(f"features has {features.shape[1]} columns and the weights have {d}; they must be equal.")
    if not topk or any(not 1 <= t <= c for t in topk):
        raise ValueError(f"topk is {tuple(topk)} for {c} classes; every value must be in [1, {c}].")
    _check_finite_probes(weights, biases)
    labels = check_labels("labels", labels, c, len(features), dims=2 if torch.as_tensor(labels).ndim == 2 else 1)
    if labels.ndim == 2 and len(labels) != k:
        raise ValueError(f"labels are of {len(labels)} probes and the weights of {k}; give those of each, or of all.")
    check_finite("features", features)
    hits = _hits(weights, biases, features, labels.expand(k, -1), topk)
    return {t: row.double() / len(features) for t, row in zip(topk, hits, strict=True)}


def _hits(
    weights: torch.Tensor,
    biases: torch.Tensor,
    features: torch.Tensor,
    label_sets: torch.Tensor,
    topk: Sequence[int] = (1,),
) -> torch.Tensor:
    """Count the labels (k, n) of each probe that are among its t largest logits, (len(topk), k) int64."""
    hits = torch.zeros(len(topk), len(weights), dtype=torch.long, device=weights.device)
    for start in range(0, len(features), CHUNK):
        x = features[start : start + CHUNK].to(weights)
        y = label_sets[:, start : start + CHUNK, None].to(weights.device)
        for i in range(len(weights)):  # all probes at once would need k times the memory
            right = (x @ weights[i].T + biases[i]).topk(max(topk), dim=1).indices == y[i]
            hits[:, i] += torch.stack([right[:, :t].sum() for t in topk])
    return hits


@torch.no_grad()
def training_accuracy(
    probes: Probes, features: torch.Tensor, label_sets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-1 accuracy of each probe on the labels that it was trained on, and that of class means, both (k,) float64.

    The second classifier is linear too and needs no training: it gives a sample the class whose mean, by the same
    labels, is nearest. A probe that fits its labels less often is not trained.

    Args:
        probes: k of them.
        features: (n, d) floating, on which the probes were fitted.
        label_sets: (k, n) integer in [0, num_classes), with which they were fitted.

    Raises:
        TypeError: features are not floating or labels not integer.
        ValueError: shapes do not fit, features or labels are out of range, or a probe is not finite.
    """
    weights, biases = probes
    k, num_classes, d = weights.shape
    features = check_features(features)
    label_sets = check_labels("label_sets", label_sets, num_classes, len(features), dims=2)
    if len(label_sets) != k or features.shape[1] != d:
        raise ValueError(
            f"label_sets has the shape {tuple(label_sets.shape)} and features {tuple(features.shape)}; {k} probes of "
            f"{d} features need ({k}, n) and (n, {d})."
        )
    _check_finite_probes(weights, biases)
    check_finite("features", features)
    own = _hits(weights, biases, features, label_sets)[0].double() / len(features)
    by_means = [_hits(*_class_means(features, labels, weights), features, labels[None])[0] for labels in label_sets]
    return own, torch.cat(by_means).double() / len(features)


def _not_finite(weights: torch.Tensor, biases: torch.Tensor) -> list[int]:
    """List the probes whose weights (k, c, d) or biases (k, c) hold NaN or an infinity."""
    return (~(weights.isfinite().all(dim=(1, 2)) & biases.isfinite().all(dim=1))).nonzero().squeeze(1).tolist()


def _check_finite_probes(weights: torch.Tensor, biases: torch.Tensor) -> None:
    if diverged := _not_finite(weights, biases):
        raise ValueError(
            f"probe {diverged[0]} has weights or biases that are NaN or infinite, and so no accuracy; fit it again."
        )


def _class_means(features: torch.Tensor, labels: torch.Tensor, like: torch.Tensor) -> Probes:
    """The classifier of the nearest class mean in float64, with the shape of one of the weights (k, c, d) `like`.

    Logits are x m - |m|^2 / 2, and minus infinity for a class without samples.
    """
    sums = like.new_zeros(like.shape[1:], dtype=torch.float64)
    for x, y in zip(features.split(CHUNK), labels.to(like.device).split(CHUNK), strict=True):
        sums.index_add_(0, y, x.to(sums))
    counts = torch.bincount(labels.to(like.device), minlength=len(sums))
    means = sums / counts.clamp(min=1)[:, None]
    biases = torch.where(counts > 0, means.square().sum(dim=1) / -2, -torch.inf)
    return Probes(means[None], biases[None])


@torch.no_grad()
def knn_accuracy(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    validation: torch.Tensor,
    validation_labels: torch.Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 accuracy, in [0, 1], of the k nearest neighbours by cosine, each with the vote exp(cosine / temperature).

    Args:
        train, validation: (n, d) and (m, d), floating.
        train_labels, validation_labels: (n,) and (m,), integer, at least 0.
        k: neighbours, in [1, n].
        temperature: above 0.

    Raises:
        TypeError: features are not floating or labels not integer.
        ValueError: shapes do not fit, or a value is out of range.
    """
    train, validation = check_features(train), check_features(validation)
    if train.shape[1] != validation.shape[1]:
        raise ValueError(f"train has {train.shape[1]} columns and validation {validation.shape[1]}; give equal ones.")
    if not 1 <= k <= len(train):
        raise ValueError(f"k is {k} for {len(train)} training samples; it must be in [1, {len(train)}].")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0.")
    train_labels = check_labels("train_labels", train_labels, None, len(train), dims=1).to(train.device)
    right_answers = check_labels("validation_labels", validation_labels, None, len(validation), dims=1)
    check_finite("train", train)
    check_finite("validation", validation)
    classes = 1 + max(int(train_labels.max()), int(right_answers.max()))
    dtype = torch.float64 if train.dtype == torch.float64 else torch.float32
    hits = 0
    for asked, answers in zip(validation.split(NEIGHBOUR_CHUNK), right_answers.split(NEIGHBOUR_CHUNK), strict=True):
        asked = F.normalize(asked.to(train.device, dtype), dim=1)
        cosines, voters = asked.new_empty(len(asked), 0), train_labels.new_empty(len(asked), 0)
        for chunk, labels in zip(train.split(CHUNK), train_labels.split(CHUNK), strict=True):
            cosines = torch.cat([cosines, asked @ F.normalize(chunk.to(dtype), dim=1).T], 1)
            voters = torch.cat([voters, labels.expand(len(asked), -1)], 1)
            cosines, nearest = cosines.topk(min(k, cosines.shape[1]), dim=1)
            voters = voters.gather(1, nearest)
        # Relative to the nearest: exp(1 / temperature) may overflow.
        votes = ((cosines - cosines[:, :1]) / temperature).exp()
        scores = votes.new_zeros(len(asked), classes).scatter_add_(1, voters, votes)
        hits += int((scores.argmax(dim=1) == answers.to(train.device)).sum())
    return hits / len(validation)


def _initial(seeds: Sequence[int], num_classes: int, d: int, dtype: torch.dtype, device: torch.device) -> Probes:
    """Draw as nn.Linear does, uniform within 1 / sqrt(d): the weight, then the bias, on the CPU in float32."""
    weights, biases = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        weights.append((2 * torch.rand(num_classes, d, generator=generator) - 1) / math.sqrt(d))
        biases.append((2 * torch.rand(num_classes, generator=generator) - 1) / math.sqrt(d))
    return Probes(torch.stack(weights).to(device, dtype), torch.stack(biases).to(device, dtype))


def _schedule(schedule: str, milestones: Sequence[float], epoch: int, epochs: int, within: float) -> float:
    """Factor of the learning rate at the share `within` of an epoch."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (epoch + within) / epochs))
    return 0.1 ** sum(epoch >= milestone * epochs for milestone in milestones) if schedule == "step" else 1.0


def _scaling(views: torch.Tensor, standardize: bool, norm: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift and factor, (d,) in float64, of the features (x - shift) * factor that probes are trained on.

    Statistics are over all views and samples. A feature that does not vary has the factor 0 if standardised. `norm`
    None leaves the norm of the rows.
    """
    count = views.shape[0] * views.shape[1]
    shift = torch.zeros(views.shape[2], dtype=torch.float64, device=views.device)
    factor = torch.ones_like(shift)
    if not (standardize or norm):
        return shift, factor
    if standardize:
        for chunk in chunks(views):
            shift += chunk.double().sum(dim=0) / count
    square = torch.zeros_like(shift)  # the mean of each feature's square after the shift
    for chunk in chunks(views):
        square += (chunk.double() - shift).square().sum(dim=0) / count
    if standardize:
        constant = square <= (1e-6 * shift.abs()).square()
        factor = torch.where(constant, 0.0, square.rsqrt())
    present = (square * factor.square()).sum().sqrt()
    return shift, factor * (norm / present if norm and present > 0 else 1.0)
