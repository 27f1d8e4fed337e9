"""One random view of each image of a set, made when it is asked for, as images that any model may be given.

from vision_bench.data import load_images
from vision_bench.viewed_images import viewed

first, second = (viewed(load_images("digits", "train"), seed) for seed in (0, 1))
first.images[:2]  # uint8 (2, 3, 8, 8), the same whenever they are asked for
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch

from vision_bench.data import Images, ImageSet
from vision_bench.views import SimCLRViews, ViewParameters, check_settings

VERSION = 1  # of what a seed draws and how it is applied; images of another have another fingerprint


class ViewedImages(torch.utils.data.Dataset[torch.Tensor]):
    """Views of images, indexed as a uint8 tensor (n, 3, size, size) by a slice or a tensor of integers.

    Args:
        images: uint8 (n, 3, h, w), held or streamed.
        views: with mean 0 and standard deviation 1, so that what it gives is in [0, 1].
        parameters: of the views of all n images.
        device: where views are made and returned.
    """

    def __init__(
        self, images: Images, views: SimCLRViews, parameters: ViewParameters, device: torch.device | str
    ) -> None:
        self.images, self.views, self.parameters, self.device = images, views, parameters, device
        self.shape = torch.Size((len(images), 3, views.size, views.size))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        parameters = ViewParameters(*(values[index] for values in self.parameters))
        return (self.views.apply(self.images[index].to(self.device), parameters) * 255).round().to(torch.uint8)


def viewed(images: ImageSet, seed: int, device: torch.device | str = "cpu", **settings: Any) -> ImageSet:
    """The set with one view of each image in its place, drawn by the seed, rounded to uint8.

    The labels, the classes and the normalisation are those of the set. The fingerprint follows from its own, the seed
    and the settings: no image is decoded for it.

    Args:
        seed: of the parameters of all views, at least 0.
        device: where views are made and returned; on another one single values may be rounded otherwise.
        settings: of `SimCLRViews` other than size, mean and std; the views are square, as wide as the images.

    Raises:
        ValueError: a setting that `SimCLRViews` does not have or that is out of its range.
    """
    check_settings(settings)
    height, width = images.images.shape[-2:]
    views = SimCLRViews(width, (0.0,) * 3, (1.0,) * 3, **settings)
    parameters = views.draw(len(images), height, width, torch.Generator().manual_seed(seed))
    described = hashlib.blake2b(repr((VERSION, seed, views)).encode(), digest_size=8).digest()
    digests = images.digests ^ int.from_bytes(described, "big", signed=True)
    shown: Any = ViewedImages(images.images, views, parameters, device)
    return replace(images, images=shown, digests=digests, digested=shown)
