"""Noise on labels and on images, made once from a generator (section 3.1 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

INPUT_NOISES = ("gaussian", "uniform", "uniform_centred")


def check_labels(labels: torch.Tensor, num_classes: int) -> None:
    """Raise unless `labels` is one-dimensional, of an integer dtype, and within [0, num_classes).

    Raises:
        TypeError: the dtype is not an integer one.
        ValueError: the shape or a value is not allowed.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels has dtype {labels.dtype}; class indices are integers: labels.long().")
    if labels.ndim != 1:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; it must be (n,), one class index per sample.")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; it must be at least 1.")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ValueError(
            f"labels has values from {int(labels.min())} to {int(labels.max())}; with num_classes {num_classes} they "
            f"must be in [0, {num_classes - 1}]."
        )


def flip_labels(
    labels: torch.Tensor,
    noise_rate: float,
    num_classes: int,
    generator: torch.Generator,
    allow_true_class: bool = False,
) -> torch.Tensor:
    """Symmetric label noise: exactly round(noise_rate * n) samples, drawn without replacement, get another label.

    The new label is that of another class that has samples: one without samples would be wrong in every prediction,
    so that a learner easily leaves it out, and the noise would cost less than its rate says.

    Args:
        labels: (n,) of an integer dtype, in [0, num_classes).
        noise_rate: share of the samples that are corrupted, in [0, 1].
        num_classes: of which at least 2 must have samples if a label is to change.
        generator: of the samples and their new labels; on any device.
        allow_true_class: draw the new label from all c classes with samples, the true one included, so that a rate of
            r changes only about r (c - 1) / c of the labels.

    Returns:
        A new tensor (n,) int64 on the device of `labels`.

    Raises:
        TypeError: the labels are not integers.
        ValueError: a label, the rate or the number of classes is out of its range, or only one class has samples.
    """
    check_labels(labels, num_classes)
    if not 0 <= noise_rate <= 1:
        raise ValueError(f"noise_rate is {noise_rate}; it must be in [0, 1], 0.9 for 90 % of the labels.")
    flipped = round(noise_rate * len(labels))
    classes, positions = labels.long().unique(return_inverse=True)
    if flipped and len(classes) < 2 and not allow_true_class:
        raise ValueError(
            f"labels has samples of 1 class, with num_classes {num_classes}; a label can only change if there are "
            "samples of at least 2 classes."
        )
    device = generator.device
    chosen = torch.randperm(len(labels), generator=generator, device=device)[:flipped].to(labels.device)
    # An offset of 1 to len(classes) - 1 reaches each of the other classes with the same probability.
    lowest = 0 if allow_true_class else 1
    offset = torch.randint(lowest, len(classes), (flipped,), generator=generator, device=device) if flipped else chosen
    positions[chosen] = (positions[chosen] + offset.to(labels.device)) % max(1, len(classes))
    return classes[positions]


def add_input_noise(images: torch.Tensor, kind: str, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Noise on normalised images (section 3.1, Fig. 2): x + scale * e, nothing clamped.

    Args:
        images: of any shape and floating dtype, after normalisation.
        kind: distribution of e for each value: "gaussian" N(0, 1); "uniform" U[0, 1), as the official code, which
            also shifts the mean; "uniform_centred" U[-1, 1).
        scale: at least 0.
        generator: of e; on any device. e is drawn in float32.

    Returns:
        A new tensor of the shape, dtype and device of `images`.

    Raises:
        TypeError: the images are not floating-point.
        ValueError: the kind or the scale is not allowed.
    """
    if kind not in INPUT_NOISES:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, INPUT_NOISES))}.")
    if not (scale >= 0 and math.isfinite(scale)):
        raise ValueError(f"scale is {scale}; it must be a finite number of at least 0.")
    if not images.is_floating_point():
        raise TypeError(f"images has dtype {images.dtype}; noise is added to normalised, floating-point images.")
    draw = torch.randn if kind == "gaussian" else torch.rand
    noise = draw(images.shape, generator=generator, device=generator.device)
    if kind == "uniform_centred":
        noise = 2 * noise - 1
    return images + (scale * noise).to(images.device, images.dtype)


def add_pixel_noise(
    images: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    kind: str,
    scale: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Noise on the pixels that normalised images were made of: values in [0, 1], to which they are clamped afterwards.

    Args:
        images: (n, channels, h, w) floating-point, (pixels - mean) / std.
        mean, std: of each channel.
        kind, scale, generator: as in `add_input_noise`; the scale is in units of the pixels.

    Returns:
        The noisy pixels, normalised again: a new tensor of the shape, dtype and device of `images`.

    Raises:
        TypeError, ValueError: as `add_input_noise`.
    """
    shift, spread = (torch.as_tensor(v, dtype=images.dtype, device=images.device).view(-1, 1, 1) for v in (mean, std))
    pixels = add_input_noise(images * spread + shift, kind, scale, generator)
    return (pixels.clamp(0, 1) - shift) / spread
