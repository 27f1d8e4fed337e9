"""The toy model of section 4.2 (Elhage et al., 2022): linear features with and without superposition, and how they
bear noise.

A sample has n features, each 0 with probability S (the sparsity), otherwise uniform on (0, 1). The encoder keeps m of
the dimensions, h = W x, and is trained to reconstruct x from h. Without superposition W^T W is diagonal with m ones;
with it more than m features share the m dimensions. Which feature is the largest is then classified from frozen h.

Everything is float32 on the CPU. Random numbers come from local generators, one for each seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from vision_bench.checks import Range, check_counts, check_name

ACTIVATIONS = ("relu", "linear")
FLIPS = ("others", "all")


class ToyModels(NamedTuple):
    """Trained models, one for each pair of a sparsity and a seed."""

    weight: torch.Tensor  # W, (sparsities, seeds, m, n)
    bias: torch.Tensor  # b of the reconstruction, (sparsities, seeds, n)


class Geometry(NamedTuple):
    """How encoders (..., m, n) arrange n features in m dimensions."""

    gram: torch.Tensor  # W^T W, (..., n, n)
    represented: torch.Tensor  # number of features with a norm |W_i| above 1/2, (...)
    features_per_dimension: torch.Tensor  # |W|_F^2 / m, (...): at most 1 without superposition, Elhage's 1 / D*
    superposition: torch.Tensor  # share of the represented features with interference above 0.1, (...)


class Accuracies(NamedTuple):
    """Test accuracy of linear probes on frozen features, in [0, 1]."""

    clean: torch.Tensor  # trained and tested without noise, (encoders, seeds)
    label_noise: torch.Tensor  # trained with label noise, tested without, (encoders, seeds)
    input_noise: torch.Tensor  # trained without, tested with input noise, (levels, encoders, seeds)


def train(
    n_features: int,
    n_dims: int,
    sparsities: Sequence[float],
    seeds: Sequence[int],
    importance: float = 1.0,
    activation: str = "relu",
    steps: int = 4000,
    batch_size: int = 512,
    learning_rate: float = 1e-2,
    progress: bool = False,
) -> ToyModels:
    """Train a toy model for every (sparsity, seed) at once: x' = activation(W^T W x + b), importance-weighted MSE.

    Adam minimises mean_i,batch I_i (x_i - x'_i)^2, I_i = importance^i, on fresh samples at every step, with a learning
    rate that falls linearly to 0 (constant in Elhage et al.; W^T W then keeps the noise of the last steps). Models of
    equal seed see the same uniform numbers at every sparsity, and none depends on what it is trained beside.

    Args:
        n_features: n >= 1.
        n_dims: m in [1, n].
        sparsities: S of the samples, each in [0, 1].
        seeds: of the initial W and the samples.
        importance: ratio of one feature's weight in the loss to the one before it, in (0, 1].
        activation: "relu", or "linear", which learns the m most important features and never superposes.
        steps, batch_size, learning_rate: of Adam.
        progress: show a progress bar.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> models = train(n_features=6, n_dims=3, sparsities=[0.0, 0.9], seeds=[0, 1], steps=500)
        >>> geometry(models.weight).features_per_dimension  # (2, 2), of each sparsity and seed
    """
    _check_sizes(n_features, n_dims, steps=steps, batch_size=batch_size)
    for sparsity in sparsities:
        _check_range("sparsities", sparsity, 0, 1)
    check_name("activation", activation, ACTIVATIONS)
    Range(0, 1, True, "1 for equally important features").check(importance=importance)
    if not sparsities or not seeds:
        raise ValueError("sparsities and seeds must each have a value.")

    generators = [np.random.default_rng(seed) for seed in seeds]
    shape = (n_dims, n_features)
    start = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])
    weight = torch.from_numpy(start * np.sqrt(2 / sum(shape), dtype=np.float32)).repeat(len(sparsities), 1, 1)
    bias = torch.zeros(len(weight), n_features, 1)
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate, fused=True)
    weights_of_loss = (2 / (n_features * batch_size) * importance ** torch.arange(n_features)).float()

    # max(u - S, 0) / (1 - S) of a uniform u is 0 with probability S and otherwise uniform: one number per feature.
    active = 1 - torch.tensor(sparsities, dtype=torch.float32).view(-1, 1, 1, 1)
    scale = torch.where(active > 0, 1 / active, 0.0)
    shift = (1 - active) * scale
    uniform = np.empty((len(seeds), n_features, batch_size), dtype=np.float32)
    u = torch.from_numpy(uniform)
    x = torch.empty(len(sparsities), *u.shape)
    samples = x.view(len(weight), n_features, batch_size)
    buffers = torch.empty_like(samples), torch.empty_like(samples)
    for step in tqdm(range(steps), desc=f"toy models ({len(weight)})", disable=not progress):
        for generator, row in zip(generators, uniform, strict=True):
            generator.random(out=row, dtype=np.float32)
        torch.mul(u, scale, out=x).sub_(shift).clamp_(min=0)
        weight.grad, bias.grad = _gradients(weight, bias, samples, weights_of_loss, activation, buffers)
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimizer.step()
    cells = (len(sparsities), len(seeds))
    return ToyModels(weight.view(*cells, *shape), bias.view(*cells, n_features))


def _gradients(
    weight: torch.Tensor,
    bias: torch.Tensor,
    x: torch.Tensor,
    weights_of_loss: torch.Tensor,
    activation: str,
    buffers: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients in weight and bias of sum_i,batch weights_of_loss_i / 2 (x_i - x'_i)^2.

    By hand, because autograd takes about twice the time and memory. Shapes: weight (cells, m, n), bias (cells, n, 1),
    x and the buffers, whose content is lost, (cells, n, batch).
    """
    output, error = buffers
    hidden = torch.bmm(weight, x)
    torch.baddbmm(bias, weight.transpose(1, 2), hidden, out=output)
    torch.sub(output, x, out=error)
    if activation == "relu":
        error *= output.gt_(0)
    weight_gradient = torch.bmm(hidden, error.transpose(1, 2)) * weights_of_loss
    hidden_gradient = torch.bmm(weight * weights_of_loss, error, out=hidden)
    weight_gradient += torch.bmm(hidden_gradient, x.transpose(1, 2))
    return weight_gradient, error.sum(dim=2, keepdim=True) * weights_of_loss[:, None]


def geometry(weight: torch.Tensor) -> Geometry:
    """Measures of superposition of encoders of shape (..., m, n).

    The interference of feature i is sum_{j != i} (W_i . W_j)^2 / |W_i|^2: 0 if its direction is its own, about 1 if
    another feature has the opposite one.
    """
    gram = weight.transpose(-1, -2) @ weight
    squares = gram.diagonal(dim1=-2, dim2=-1)
    represented = squares > 0.25
    others = gram.square().sum(dim=-1) - squares.square()
    shared = represented & (others > 0.1 * squares)
    return Geometry(
        gram=gram,
        represented=represented.sum(dim=-1),
        features_per_dimension=squares.sum(dim=-1) / weight.shape[-2],
        superposition=shared.sum(dim=-1) / represented.sum(dim=-1).clamp(min=1),
    )


def sample(
    count: int, n_features: int, sparsity: float, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples (count, n) float32 and their labels argmax_i x_i (count,) int64, section 4.2.

    Samples without an active feature have no largest one and are drawn anew. (An argmax would call them class 0, which
    at high sparsity makes a majority class of them.)

    Raises:
        ValueError: `sparsity` is not in [0, 1).
    """
    Range(0, 1, example="at 1 no sample has a largest feature", begins=True).check(sparsity=sparsity)
    kept, missing = [], count
    while missing > 0:
        size = int(missing / (1 - sparsity**n_features)) + 1
        drawn = generator.random((size, n_features), dtype=np.float32)
        drawn = np.maximum(drawn - np.float32(sparsity), 0) / np.float32(1 - sparsity)
        kept.append(drawn[drawn.any(axis=1)][:missing])
        missing -= len(kept[-1])
    x = torch.from_numpy(np.concatenate(kept))
    return x, x.argmax(dim=1)


def flip_labels(
    labels: torch.Tensor, noise_rate: float, n_classes: int, generator: np.random.Generator, flips: str = "others"
) -> torch.Tensor:
    """Each label replaced with probability `noise_rate` by a uniformly drawn one, section 4.2.

    Labels are replaced independently of each other; `corruptions.flip_labels` replaces an exact number of them.

    Args:
        labels: (count,) int64.
        noise_rate: in [0, 1].
        flips: "others" draws from the other classes, as the paper; "all" may draw the true class again. The first
            has no signal left at a rate of (n_classes - 1) / n_classes, and the wrong signal above: it warns.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check_range("noise_rate", noise_rate, 0, 1)
    check_name("flips", flips, FLIPS)
    others = (n_classes - 1) / n_classes
    if flips == "others" and noise_rate >= others:
        warnings.warn(
            f"noise_rate {noise_rate} with flips to the other of {n_classes} classes leaves the true label no more "
            f"likely than each other: the order of methods means nothing there. Stay below {others:.4g}.",
            stacklevel=2,
        )
    flipped = generator.random(len(labels)) < noise_rate
    offset = generator.integers(1 if flips == "others" else 0, n_classes, len(labels))
    return (labels + torch.from_numpy(offset * flipped)) % n_classes


def fit_probes(
    features: torch.Tensor,
    labels: torch.Tensor,
    n_classes: int,
    generator: np.random.Generator,
    epochs: int = 10,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
    progress: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear classifiers by cross entropy, Adam from zero without weight decay, all of them in one pass.

    Args:
        features: (k, count, m) float32.
        labels: (k, count) int64 in [0, n_classes).
        generator: of the order of the samples, the same for all classifiers.

    Returns:
        Weights (k, m, n_classes) and biases (k, 1, n_classes).

    Raises:
        ValueError: there are fewer samples than classes.
    """
    k, count, n_dims = features.shape
    _check_samples(count, n_classes)
    weight, bias = torch.zeros(k, n_dims, n_classes), torch.zeros(k, 1, n_classes)
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate, fused=True)
    for _ in tqdm(range(epochs), desc=f"probes ({k} x {count})", disable=not progress):
        for batch in torch.from_numpy(generator.permutation(count)).split(batch_size):
            x, y = features.index_select(1, batch), labels.index_select(1, batch)
            # Gradient of the cross entropy in the logits: softmax - onehot.
            error = torch.baddbmm(bias, x, weight).softmax(dim=2)
            error.scatter_add_(2, y[..., None], torch.full((k, len(batch), 1), -1.0))
            weight.grad, bias.grad = torch.bmm(x.transpose(1, 2), error) / len(batch), error.mean(dim=1, keepdim=True)
            optimizer.step()
    return weight, bias


def accuracy(probes: tuple[torch.Tensor, torch.Tensor], features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Share of right answers (k,) of the classifiers of `fit_probes`: features (k, count, m), labels (k, count)."""
    weight, bias = probes
    return (torch.baddbmm(bias, features, weight).argmax(dim=2) == labels).float().mean(dim=1)


def classify(
    encoders: torch.Tensor,
    sparsity: float,
    n_samples: int,
    seeds: Sequence[int],
    noise_rate: float = 0.9,
    flips: str = "others",
    input_noises: Sequence[float] = (0.1, 0.3, 0.5),
    n_test: int = 10_000,
    epochs: int = 10,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
    progress: bool = False,
) -> Accuracies:
    """Robustness of frozen features W x to noise in a classification of the largest feature (Fig. 5b).

    All encoders see the same samples, flips and input noise for a seed. The probes of all encoders, seeds and of clean
    and noisy labels are trained in one pass.

    Args:
        encoders: W of shape (encoders, seeds, m, n), n classes.
        sparsity: of the samples that are classified, in [0, 1).
        n_samples: for training, at least n.
        seeds: of the samples and the noise.
        noise_rate, flips: of the training labels, see `flip_labels`.
        input_noises: standard deviations of Gaussian noise added to every feature of the test samples, each >= 0.
        n_test: samples for testing.
        epochs, batch_size, learning_rate: see `fit_probes`.
        progress: show a progress bar.

    Raises:
        ValueError: an argument is out of its range.
    """
    arms, n_seeds, n_dims, n_features = encoders.shape
    _check_sizes(n_features, n_dims, n_test=n_test, epochs=epochs, batch_size=batch_size)
    _check_samples(n_samples, n_features)
    for level in input_noises:
        _check_range("input_noises", level, 0, float("inf"))
    if n_seeds != len(seeds):
        raise ValueError(f"encoders has {n_seeds} seeds and seeds {len(seeds)}; give one encoder for each seed.")

    drawn = []
    for seed in seeds:
        generator = np.random.default_rng([seed, 1])  # a stream beside the one that trained an encoder of this seed
        x, clean = sample(n_samples, n_features, sparsity, generator)
        noisy = flip_labels(clean, noise_rate, n_features, generator, flips)
        test, answers = sample(n_test, n_features, sparsity, generator)
        noise = torch.from_numpy(generator.standard_normal(test.shape, dtype=np.float32))
        drawn.append((x, clean, noisy, test, answers, noise))
    x, clean, noisy, test, answers, noise = map(torch.stack, zip(*drawn, strict=True))

    def encode(samples: torch.Tensor) -> torch.Tensor:
        """(seeds, count, n) -> (encoders * seeds, count, m)"""
        return (samples @ encoders.transpose(-1, -2)).flatten(0, 1)

    features = encode(x)
    labels = torch.cat([clean] * arms + [noisy] * arms)
    order = np.random.default_rng(0)
    probes = fit_probes(
        features.repeat(2, 1, 1), labels, n_features, order, epochs, batch_size, learning_rate, progress
    )
    (clean_weight, noisy_weight), (clean_bias, noisy_bias) = (part.chunk(2) for part in probes)

    answers = answers.repeat(arms, 1)
    measured = [accuracy((clean_weight, clean_bias), encode(test), answers)]
    measured += [accuracy((noisy_weight, noisy_bias), encode(test), answers)]
    measured += [accuracy((clean_weight, clean_bias), encode(test + level * noise), answers) for level in input_noises]
    table = torch.stack(measured).view(-1, arms, n_seeds)
    return Accuracies(clean=table[0], label_noise=table[1], input_noise=table[2:])


def _check_sizes(n_features: int, n_dims: int, **counts: int) -> None:
    if not 1 <= n_dims <= n_features:
        raise ValueError(f"n_dims is {n_dims}; it must be in [1, n_features], and n_features is {n_features}.")
    check_counts(**counts)


def _check_samples(count: int, n_classes: int) -> None:
    if count < n_classes:
        raise ValueError(f"{count} samples for {n_classes} classes; give at least one for each class.")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} has {value}; it must be in [{low:g}, {high:g}].")
