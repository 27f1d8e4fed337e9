"""SimCLR's augmented views as tensor operations on a whole batch, with random numbers of its own for every image.

Crop, resize and flip are one `grid_sample`. Brightness, contrast, saturation, hue, greyscale and the normalisation are
one affine map of colours for each image: x -> M x + o. Hue turns the plane of chrominance in YIQ. Brightness scales;
contrast blends with the mean luma of the image, saturation and greyscale with the luma of each pixel; hue and
saturation keep the luma, and grey is a fixed point of both: so the four commute, and torchvision's random order of
them changes nothing but where it clips. torchvision clamps to [0, 1] after each of them, this file once at the end;
and its hue is that of HSV. docs/deviations.md has the difference in figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from vision_bench.checks import check_counts

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow; torchvision's tensors have 0.2989 for red
_YIQ = torch.tensor([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)], dtype=torch.float64)
# A turn of the chrominance by an angle a is, in RGB, luma + cos a * chrominance + sin a * quarter turn. From red over
# yellow to green, the direction of HSV's hue, is clockwise in the (I, Q) plane.
_KEPT_LUMA, _KEPT_CHROMINANCE, _QUARTER_TURN = (
    (torch.linalg.inv(_YIQ) @ torch.tensor(plane, dtype=torch.float64) @ _YIQ).float()
    for plane in (
        [[1, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0, 0, 0], [0, 0, 1], [0, -1, 0]],
    )
)
_CROP_TRIES = 10  # as torchvision


class ViewParameters(NamedTuple):
    """Random parameters of the views of n images; floats are float32. `SimCLRViews.apply` takes any values."""

    top: torch.Tensor  # (n,) int64, of the crop, in pixels
    left: torch.Tensor  # (n,) int64
    height: torch.Tensor  # (n,) int64, at least 1
    width: torch.Tensor  # (n,) int64, at least 1
    flip: torch.Tensor  # (n,) bool, left to right
    brightness: torch.Tensor  # (n,) factor, 1 for none
    contrast: torch.Tensor  # (n,) factor, 1 for none
    saturation: torch.Tensor  # (n,) factor, 1 for none
    hue: torch.Tensor  # (n,) turns in [-0.5, 0.5], 0 for none; positive as in HSV from red to yellow
    greyscale: torch.Tensor  # (n,) bool
    blur: torch.Tensor  # (n,) standard deviation of the Gaussian in pixels, 0 for none


@dataclass(eq=False)
class SimCLRViews:
    """Two random views of each image of a batch (Chen et al., 2020); the defaults are the paper's for CIFAR.

    Raises:
        ValueError: a setting is out of its range.

    Example:
        >>> images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
        >>> views = SimCLRViews(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        >>> first, second = views(images, torch.Generator().manual_seed(0))
    """

    size: int  # side of the square views in pixels
    mean: Sequence[float]  # of the channels, for images in [0, 1]: views are normalised with it and with `std`
    std: Sequence[float]
    _: KW_ONLY
    crop_scale: Sequence[float] = (0.08, 1.0)  # share of the image's area that a crop has, from and to, in (0, 1]
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3)  # width over height of a crop, from and to
    flip_probability: float = 0.5  # in [0, 1], as all probabilities
    jitter_probability: float = 0.8  # with which all four of the following are applied together, else none
    brightness: float = 0.8  # factors are uniform in [max(0, 1 - value), 1 + value]
    contrast: float = 0.8  # as brightness
    saturation: float = 0.8  # as brightness
    hue: float = 0.2  # uniform in [-value, value], at most 0.5, in turns
    greyscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: Sequence[float] = (0.1, 2.0)  # pixels of the view, from and to, above 0; cut at three times the latter

    def __post_init__(self) -> None:
        check_counts(size=self.size)
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise ValueError(
                f"mean is {self.mean} and std {self.std}; both have three values, one a channel, std above 0."
            )
        for name, top in (("crop_scale", 1.0), ("crop_ratio", math.inf), ("blur_sigma", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise ValueError(f"{name} is {(low, high)}; it must be two ascending numbers in (0, {top}].")
        tops = dict.fromkeys(
            ("flip_probability", "jitter_probability", "greyscale_probability", "blur_probability"), 1.0
        )
        tops |= {"brightness": math.inf, "contrast": math.inf, "saturation": math.inf, "hue": 0.5}
        for name, top in tops.items():
            if not 0 <= getattr(self, name) <= top:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, {top:g}].")

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Two views (n, 3, size, size) float32 of each image, normalised; arguments and errors as `apply`, `draw`."""
        height, width = images.shape[-2:]
        first, second = (self.draw(len(images), height, width, generator) for _ in range(2))
        return self.apply(images, first), self.apply(images, second)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> ViewParameters:
        """Parameters for `count` images of height x width pixels, on the generator's device."""
        device = generator.device
        uniform = torch.rand(2 * _CROP_TRIES + 11, count, generator=generator, device=device)
        areas, ratios, rest = uniform.split([_CROP_TRIES, _CROP_TRIES, 11])
        top, left, flip, jittered, brightness, contrast, saturation, hue, grey, blurred, sigma = rest

        # The first of ten crops that fits, as torchvision's RandomResizedCrop; if none does, the largest central one.
        low, high = self.crop_scale
        area = height * width * (low + (high - low) * areas)
        low, high = (math.log(ratio) for ratio in self.crop_ratio)
        ratio = torch.exp(low + (high - low) * ratios)
        widths, heights = torch.sqrt(area * ratio).round().long(), torch.sqrt(area / ratio).round().long()
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        first = fits.to(torch.uint8).argmax(dim=0, keepdim=True)
        any_fits = fits.any(dim=0)
        whole_height, whole_width = self._whole(height, width)
        crop_height = torch.where(any_fits, heights.gather(0, first)[0], whole_height)
        crop_width = torch.where(any_fits, widths.gather(0, first)[0], whole_width)
        free_height, free_width = height - crop_height, width - crop_width
        # A product that rounds to free + 1 would lie outside.
        crop_top = torch.minimum((top * (free_height + 1)).long(), free_height)
        crop_left = torch.minimum((left * (free_width + 1)).long(), free_width)

        jitters = jittered < self.jitter_probability

        def factor(uniform: torch.Tensor, strength: float) -> torch.Tensor:
            lowest = max(0.0, 1 - strength)
            return torch.where(jitters, lowest + (1 + strength - lowest) * uniform, 1.0)

        low, high = self.blur_sigma
        return ViewParameters(
            top=torch.where(any_fits, crop_top, (height - whole_height) // 2),
            left=torch.where(any_fits, crop_left, (width - whole_width) // 2),
            height=crop_height,
            width=crop_width,
            flip=flip < self.flip_probability,
            brightness=factor(brightness, self.brightness),
            contrast=factor(contrast, self.contrast),
            saturation=factor(saturation, self.saturation),
            hue=torch.where(jitters, self.hue * (2 * hue - 1), 0.0),
            greyscale=grey < self.greyscale_probability,
            blur=torch.where(blurred < self.blur_probability, low + (high - low) * sigma, 0.0),
        )

    def apply(self, images: torch.Tensor, parameters: ViewParameters) -> torch.Tensor:
        """One view of each image.

        Args:
            images: (n, 3, h, w), uint8, or floating-point in [0, 1]; on any device.
            parameters: of n images; moved to that device if they are elsewhere.

        Returns:
            (n, 3, size, size) float32, normalised; before that within [0, 1].

        Raises:
            ValueError: the shape or the dtype of the images is another, or the parameters are of another number.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ValueError(
                f"images has shape {tuple(images.shape)} and dtype {images.dtype}; it must be (n, 3, h, w), uint8 or "
                "floating-point in [0, 1]."
            )
        if len(images) != len(parameters.top):
            raise ValueError(f"parameters are of {len(parameters.top)} images; images has {len(images)}.")
        levels = 255.0 if images.dtype == torch.uint8 else 1.0
        parameters = ViewParameters(*(values.to(images.device) for values in parameters))
        views = self._crop(images.float(), parameters)
        views = self._colour(views, levels, parameters)
        blurred = parameters.blur > 0
        radius = math.ceil(3 * self.blur_sigma[1])
        if views.device.type == "cpu":
            views[blurred] = _blur(views[blurred], parameters.blur[blurred], radius)
            return views
        # Picking those to blur would make the host wait for the device.
        return torch.where(blurred[:, None, None, None], _blur(views, parameters.blur, radius), views)

    def _whole(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the largest crop with an allowed ratio."""
        low, high = self.crop_ratio
        if width / height < low:
            return round(width / low), width
        if width / height > high:
            return height, round(height * high)
        return height, width

    def _crop(self, images: torch.Tensor, parameters: ViewParameters) -> torch.Tensor:
        """Crop, bilinear resize and flip of float images (n, 3, h, w)."""
        n, _, height, width = images.shape
        centres = (torch.arange(self.size, device=images.device) + 0.5) / self.size
        across = torch.where(parameters.flip[:, None], 1 - centres, centres)
        axes = (
            (parameters.left, parameters.width, width, across),
            (parameters.top, parameters.height, height, centres.expand(n, -1)),
        )
        grid = images.new_empty(n, self.size, self.size, 2)
        for axis, (start, extent, length, share) in enumerate(axes):
            start, extent = start[:, None].float(), extent[:, None].float()
            # In pixels from the centre of the crop's first one; what lies beyond its last does not leak in.
            inside = torch.clamp(share * extent - 0.5, min=torch.zeros_like(extent), max=extent - 1)
            position = (inside + start + 0.5) * (2 / length) - 1
            grid[..., axis] = position[:, None, :] if axis == 0 else position[:, :, None]
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def _colour(self, views: torch.Tensor, levels: float, parameters: ViewParameters) -> torch.Tensor:
        """Jitter and greyscale of (n, 3, s, s) in [0, levels], clamped, then normalised."""
        device = views.device
        luma = torch.tensor(LUMA, device=device)
        std = torch.tensor(self.std, device=device)
        mean = torch.tensor(self.mean, device=device)
        matrix = _hue_matrices(parameters.hue)
        saturation = torch.where(parameters.greyscale, 0.0, parameters.saturation)[:, None, None]
        # Saturation, and greyscale as none of it: s I + (1 - s) 1 luma^T after the rotation, which keeps the luma.
        matrix = saturation * matrix + (1 - saturation) * luma
        brightness, contrast = parameters.brightness, parameters.contrast
        average = views.mean(dim=(2, 3)) @ luma / levels
        offset = (brightness * (1 - contrast) * average)[:, None] - mean
        matrix = matrix * (brightness * contrast / levels)[:, None, None]
        matrix, offset = matrix / std[:, None], offset / std
        flat = torch.baddbmm(offset[:, :, None], matrix, views.flatten(2))
        lowest, highest = (-mean / std)[:, None], ((1 - mean) / std)[:, None]
        return torch.clamp(flat, min=lowest, max=highest).view_as(views)


def check_settings(views: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of `SimCLRViews` that it does not have or that are out of their range."""
    try:
        SimCLRViews(8, (0.5,) * 3, (0.5,) * 3, **views)
    except TypeError as error:
        raise ValueError(f"views is {views}, settings of SimCLRViews other than size, mean, std: {error}") from None


def _hue_matrices(turns: torch.Tensor) -> torch.Tensor:
    """(n,) turns -> (n, 3, 3): rotations of the chrominance plane of YIQ, in RGB."""
    luma, chrominance, quarter = (m.to(turns.device) for m in (_KEPT_LUMA, _KEPT_CHROMINANCE, _QUARTER_TURN))
    angle = (2 * math.pi * turns)[:, None, None]
    return luma + angle.cos() * chrominance + angle.sin() * quarter


def _blur(views: torch.Tensor, sigma: torch.Tensor, radius: int) -> torch.Tensor:
    """Gaussian of each image (m, c, s, s) with its sigma (m,), cut at `radius` pixels; edges are reflected.

    As products with band matrices (m, s, s), one for each axis: faster than convolutions with a kernel for each image.
    """
    m, channels, size, _ = views.shape
    radius = min(radius, size - 1)
    offsets = torch.arange(-radius, radius + 1, device=views.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]).square())
    kernel /= kernel.sum(dim=1, keepdim=True)
    source = (torch.arange(size, device=views.device)[:, None] + offsets).abs()
    source = torch.where(source > size - 1, 2 * (size - 1) - source, source)
    band = torch.zeros(m, size, size, device=views.device)
    band.scatter_add_(2, source.expand(m, -1, -1), kernel[:, None, :].expand(-1, size, -1))
    across = torch.bmm(views.reshape(m, channels * size, size), band.transpose(1, 2)).view_as(views)
    return torch.matmul(band[:, None], across)
