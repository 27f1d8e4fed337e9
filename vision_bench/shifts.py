"""Synthetic shifts of the distribution: what becomes of uint8 images (n, 3, h, w), by a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from vision_bench.data import Images, ImageSet


def rotate(images: torch.Tensor, degrees: float) -> torch.Tensor:
    """Turned anticlockwise about the centre, bilinear, black where nothing was."""
    from torchvision.transforms.v2 import functional

    return functional.rotate(images, degrees, functional.InterpolationMode.BILINEAR)


def invert(images: torch.Tensor, _: float) -> torch.Tensor:
    """Bright for dark in each channel."""
    return 255 - images


def thin(images: torch.Tensor, pixels: float) -> torch.Tensor:
    """Bright strokes lose `pixels` of their width: the least of a pixel and its neighbours to the right and below."""
    size = int(pixels) + 1
    padded = F.pad(255 - images.float(), (0, size - 1, 0, size - 1))
    return (255 - F.max_pool2d(padded, size, stride=1)).to(torch.uint8)


SHIFTS: dict[str, tuple[Callable[[torch.Tensor, float], torch.Tensor], float]] = {  # and the number by default
    "rotate": (rotate, 30.0),
    "invert": (invert, 1.0),
    "thin": (thin, 1.0),
}


@dataclass(frozen=True)
class _Shifted:
    """Images that are shifted when they are indexed, so that streamed ones stay streamed."""

    images: Images
    shift: Callable[[torch.Tensor, float], torch.Tensor]
    number: float

    @property
    def shape(self) -> torch.Size:
        return self.images.shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any, /) -> torch.Tensor:
        return self.shift(self.images[index], self.number)


def shifted(images: ImageSet, name: str, number: float) -> ImageSet:
    """A labelled set after a shift of `SHIFTS`."""
    moved = _Shifted(images.images, SHIFTS[name][0], number)
    return replace(images, images=moved, fingerprint=f"{images.fingerprint} {name} {number:g}")
