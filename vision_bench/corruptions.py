"""What may be wrong with training labels and with test images, and the one table of it (section 3.1 of the paper).

    from vision_bench.corruptions import CONDITIONS, NORMALISED_IMAGES, Condition, Range, add_input_noise

    def salt(images, scale, generator):
        return torch.where(torch.rand(images.shape, generator=generator) < scale, images.max(), images)

    CONDITIONS["salt"] = Condition(NORMALISED_IMAGES, salt, "share of white values", Range(0, 1), numbers=(0.1,))
    noisy = add_input_noise(torch.randn(8, 3, 32, 32), "salt", 0.1, torch.Generator().manual_seed(0))

A condition of the table is known to `python -m vision_bench`, to the recipes, to their help, errors and figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.transforms.v2.functional import InterpolationMode, rotate

from vision_bench.checks import NOT_NEGATIVE, Range, check_counts, check_name

# What a condition changes; its function then is
TRAINING_LABELS = "training labels"  # (labels, share, num_classes, generator) -> labels
TRAINING_IMAGES = "training images"  # (labels, share, generator) -> indices of the images that are left
NORMALISED_IMAGES = "normalised test images"  # (images, scale, generator) -> images: input noise
UINT8_IMAGES = "uint8 test images"  # (images) or (images, strength) -> images: a shift

NORMALISED, PIXEL = SPACES = ("normalised", "pixel")  # where input noise is added
FOLDER = "folder"  # the word for a shift whose images are in a folder of their own
CLEAN = "clean"


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, for a stream of random numbers that is like no other."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


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
    check_counts(num_classes=num_classes)
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
    return _flipped(labels, noise_rate, num_classes, generator, lowest=0 if allow_true_class else 1)


def pair_flips(labels: torch.Tensor, noise_rate: float, num_classes: int, generator: torch.Generator) -> torch.Tensor:
    """Pair flips: exactly round(noise_rate * n) samples, drawn without replacement, get the label of the next class.

    The next class of i is i + 1, and of the last one the first (Han et al., 2018, arXiv:1804.06872); classes without
    samples are passed over. From a rate of 0.5 on, wrong labels are as many as right ones, which nothing tells apart.

    Args, returns and raises: as `flip_labels`.
    """
    return _flipped(labels, noise_rate, num_classes, generator, lowest=1, highest=1)


def _flipped(
    labels: torch.Tensor,
    noise_rate: float,
    num_classes: int,
    generator: torch.Generator,
    lowest: int,
    highest: int | None = None,
) -> torch.Tensor:
    """Labels of which some are moved to another class that has samples, as `flip_labels` says.

    Args:
        lowest, highest: by how many of the classes with samples a label is moved, drawn from there to there; None:
            by one less than there are, so that each of the other classes is reached with the same probability.
    """
    check_labels(labels, num_classes)
    Range(0, 1, True, "0.9 for 90 % of the labels", begins=True).check(noise_rate=noise_rate)
    flipped = round(noise_rate * len(labels))
    classes, positions = labels.long().unique(return_inverse=True)
    if flipped and len(classes) <= lowest:
        raise ValueError(
            f"labels has samples of 1 class, with num_classes {num_classes}; a label can only change if there are "
            "samples of at least 2 classes."
        )
    chosen = torch.randperm(len(labels), generator=generator, device=generator.device)[:flipped].to(labels.device)
    if flipped:
        end = len(classes) if highest is None else highest + 1
        offsets = torch.randint(lowest, end, (flipped,), generator=generator, device=generator.device)
        positions[chosen] = (positions[chosen] + offsets.to(labels.device)) % len(classes)
    return classes[positions]


def stratified_fraction(
    labels: torch.Tensor, fraction: float, generator: torch.Generator, class_names: Sequence[str] | None = None
) -> torch.Tensor:
    """Indices of a share of the samples, drawn without replacement from each class: round(fraction * n_c) of n_c.

    Args:
        labels: (n,) of an integer dtype, at least 0.
        fraction: in (0, 1]; 1 takes every sample.
        generator: of the draw.
        class_names: for the error, by default the labels.

    Returns:
        (m,) int64, ascending, on the device of `labels`.

    Raises:
        TypeError: the labels are not integers.
        ValueError: the fraction is out of its range, or a class with samples would be left with none.
    """
    check_labels(labels, int(labels.max()) + 1 if labels.numel() and int(labels.max()) >= 0 else 1)
    Range(0, 1, True, "0.1 for 10 % of the samples").check(fraction=fraction)
    order = torch.randperm(len(labels), generator=generator, device=generator.device).to(labels.device)
    chosen = []
    for index, count in enumerate(torch.bincount(labels).tolist()):
        size = round(fraction * count)
        if count and not size:
            name = index if class_names is None else class_names[index]
            raise ValueError(
                f"fraction is {fraction}: class {name} has {count} samples and would be left with none; take "
                f"at least {1 / count:.3g}."
            )
        chosen.append(order[labels[order] == index][:size])
    return torch.cat(chosen).sort().values


def gaussian(images: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Images of any shape plus scale * e, with e of N(0, 1) for each value, drawn in float32."""
    return images + (scale * torch.randn(images.shape, generator=generator, device=generator.device)).to(images)


def uniform(images: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Images of any shape plus scale * e, with e of U[0, 1) for each value, drawn in float32."""
    return images + (scale * torch.rand(images.shape, generator=generator, device=generator.device)).to(images)


def uniform_centred(images: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Images of any shape plus scale * e, with e of U[-1, 1) for each value, drawn in float32."""
    e = 2 * torch.rand(images.shape, generator=generator, device=generator.device) - 1
    return images + (scale * e).to(images)


def rotated(images: torch.Tensor, degrees: float = 25.0) -> torch.Tensor:
    """uint8 images (n, 3, h, w), turned counter-clockwise, bilinear, black where there was nothing."""
    return rotate(images, degrees, InterpolationMode.BILINEAR)


def inverted(images: torch.Tensor) -> torch.Tensor:
    """uint8 images (n, 3, h, w), the negative."""
    return 255 - images


def thinned(images: torch.Tensor, erosion: float = 1 / 16) -> torch.Tensor:
    """uint8 images (n, 3, h, w), bright parts eroded from each edge by a share of the shorter side of the image.

    Each pixel is enlarged bilinearly to 4 x 4, each value replaced by the least one in a square, and averaged again.
    """
    finer = 4
    fine = F.interpolate(images.float(), scale_factor=finer, mode="bilinear", align_corners=False)
    reach = max(1, round(erosion * finer * min(images.shape[-2:])))
    # Down the columns, then along the rows: of a square of k x k values 2 k are compared, not all.
    negative = F.max_pool2d(-fine, (2 * reach + 1, 1), stride=1, padding=(reach, 0))
    negative = F.max_pool2d(negative, (1, 2 * reach + 1), stride=1, padding=(0, reach))
    return F.avg_pool2d(-negative, finer).round().to(torch.uint8)


@dataclass(frozen=True)
class Condition:
    """A row of the table: one way in which training data or test images are not as they should be.

    Args:
        changes: `TRAINING_LABELS`, `TRAINING_IMAGES`, `NORMALISED_IMAGES` or `UINT8_IMAGES`; decides the arguments of
            `function`.
        function: makes the change.
        label: of the axis of a figure that shows the number, or of a bar where there is none.
        range: of the number; None where the condition takes none.
        numbers: those that are measured where none is named. Empty: the function's own default is.
    """

    changes: str
    function: Callable[..., torch.Tensor]
    label: str
    range: Range | None = None
    numbers: tuple[float, ...] = ()


CONDITIONS: dict[str, Condition] = {
    "label_noise": Condition(
        TRAINING_LABELS, flip_labels, "wrong labels, %", Range(0, 1, True, "0.4 for 40 % wrong labels"), (0.4, 0.8)
    ),
    "pair_flips": Condition(
        TRAINING_LABELS, pair_flips, "labels of the next class, %", Range(0, 1, True, "0.4 for 40 %"), (0.4,)
    ),
    "few_shots": Condition(
        TRAINING_IMAGES,
        stratified_fraction,
        "training images, %",
        Range(0, 1, example="0.1 for 10 % of the training images"),
        (0.1,),
    ),
    "gaussian": Condition(NORMALISED_IMAGES, gaussian, "standard deviation of Gaussian noise", Range(0), (0.6,)),
    "uniform": Condition(NORMALISED_IMAGES, uniform, "scale s of uniform noise in [0, s)", Range(0), (0.6,)),
    "uniform_centred": Condition(
        NORMALISED_IMAGES, uniform_centred, "scale s of uniform noise in [-s, s)", Range(0), (0.6,)
    ),
    "rotated": Condition(UINT8_IMAGES, rotated, "rotation, degrees", Range(-180, 180, True)),
    "inverted": Condition(UINT8_IMAGES, inverted, "negative"),
    "thinned": Condition(UINT8_IMAGES, thinned, "erosion, share of the side", Range(0, 0.5)),
}


def noise_names() -> tuple[str, ...]:
    """The kinds of input noise: the conditions of the table that change `NORMALISED_IMAGES`."""
    return tuple(name for name, condition in CONDITIONS.items() if condition.changes == NORMALISED_IMAGES)


def shift_names() -> tuple[str, ...]:
    """The synthetic shifts: the conditions of the table that change `UINT8_IMAGES`."""
    return tuple(name for name, condition in CONDITIONS.items() if condition.changes == UINT8_IMAGES)


def add_input_noise(images: torch.Tensor, kind: str, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Noise on normalised images (section 3.1, Fig. 2): of the kinds here x + scale * e, nothing clamped.

    Args:
        images: of any shape and floating dtype, after normalisation.
        kind: distribution of e for each value: "gaussian" N(0, 1); "uniform" U[0, 1), as the official code, which
            also shifts the mean; "uniform_centred" U[-1, 1); or another condition that changes `NORMALISED_IMAGES`.
        scale: at least 0, and in the range of the kind; 0 changes nothing.
        generator: of e; on any device. e is drawn in float32.

    Returns:
        A new tensor of the shape, dtype and device of `images`.

    Raises:
        TypeError: the images are not floating-point.
        ValueError: the kind or the scale is not allowed.
    """
    check_name("kind", kind, noise_names())
    NOT_NEGATIVE.check(scale=scale)
    allowed = CONDITIONS[kind].range
    if scale and allowed is not None and scale not in allowed:
        raise ValueError(f"scale is {scale}; for {kind} it must be {allowed}.")
    if not images.is_floating_point():
        raise TypeError(f"images has dtype {images.dtype}; noise is added to normalised, floating-point images.")
    return CONDITIONS[kind].function(images, scale, generator)


def add_pixel_noise(
    images: torch.Tensor,
    mean: Sequence[float] | torch.Tensor,
    std: Sequence[float] | torch.Tensor,
    kind: str,
    scale: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Noise on the pixels that normalised images were made of: values in [0, 1], to which they are clamped afterwards.

    Args:
        images: (..., channels, h, w) floating-point, (pixels - mean) / std.
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


@dataclass(frozen=True)
class InputNoise:
    """Noise on images that follows from its seed and the index of the image alone, whatever the batches.

        noise = InputNoise("gaussian", 0.6, seed=1)
        noisy = noise.add(normalised, first=0, mean=train.mean, std=train.std)

    Args:
        kind: a condition that changes `NORMALISED_IMAGES`.
        scale: as in `add_input_noise`.
        seed: of all images.
        space: "normalised", added after normalisation; or "pixel", to the values in [0, 1] that normalised images were
            made of, which are clamped to [0, 1] afterwards and normalised again.
    """

    kind: str
    scale: float
    seed: int = 0
    space: str = NORMALISED

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise ValueError(f"space is {self.space!r}; it must be one of {', '.join(SPACES)}.")

    def __str__(self) -> str:
        return f"{self.kind} {self.scale:g} seed {self.seed}" + (" on pixels" if self.space == PIXEL else "")

    def add(
        self,
        images: torch.Tensor,
        first: int,
        mean: Sequence[float] | torch.Tensor,
        std: Sequence[float] | torch.Tensor,
    ) -> torch.Tensor:
        """The noisy images, a new tensor.

        Args:
            images: (b, channels, h, w) floating-point, (pixels - mean) / std.
            first: index of the first of them in its set.
            mean, std: of each channel.
        """
        noisy = torch.empty_like(images)
        for index, image in enumerate(images):
            generator = torch.Generator().manual_seed(seed_of(self.seed, first + index))
            if self.space == PIXEL:
                noisy[index] = add_pixel_noise(image, mean, std, self.kind, self.scale, generator)
            else:
                noisy[index] = add_input_noise(image, self.kind, self.scale, generator)
        return noisy
