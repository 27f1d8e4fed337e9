"""Test images of another distribution, labelled with the classes of the training set (Fig. 2c).

Three synthetic shifts of any images; labelled folders and Hugging Face sets, such as ImageNet-Sketch and
ImageNet-Stylized, restricted to the classes of the training set; the arrays of CIFAR-C and CIFAR-10.1.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from vision_bench.data import SPLIT_NAMES, ImageSet, StreamedImages, load_images, resized

ANGLE = 25.0  # degrees, counter-clockwise
EROSION = 1 / 16  # of the side of the image, from each edge of a bright part
FINER = 4  # parts of a pixel in which the erosion is done
SEVERITIES = 5
# Of the 19 corruptions, those that are not of the benchmark but for validation (Hendrycks and Dietterich, 2019).
EXTRA_CORRUPTIONS = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
LABELS = "labels.npy"
DATA_ENDING, LABELS_ENDING = "_data.npy", "_labels.npy"
SHOWN = 10  # names in an error


def rotated(images: torch.Tensor) -> torch.Tensor:
    """uint8 (n, 3, h, w), turned by `ANGLE`, bilinear, black where there was nothing."""
    from torchvision.transforms.v2 import functional

    return functional.rotate(images, ANGLE, functional.InterpolationMode.BILINEAR)


def inverted(images: torch.Tensor) -> torch.Tensor:
    """uint8 (n, 3, h, w), the negative."""
    return 255 - images


def thinned(images: torch.Tensor) -> torch.Tensor:
    """uint8 (n, 3, h, w), bright parts eroded by `EROSION` of the shorter side from each edge.

    Enlarged bilinearly, each value replaced by the least one in a square, and averaged to pixels again.
    """
    pixels = images.float()
    fine = F.interpolate(pixels, scale_factor=FINER, mode="bilinear", align_corners=False)
    reach = max(1, round(EROSION * FINER * min(images.shape[-2:])))
    # Down the columns, then along the rows: of a square of k x k values 2 k are compared, not all.
    negative = F.max_pool2d(-fine, (2 * reach + 1, 1), stride=1, padding=(reach, 0))
    negative = F.max_pool2d(negative, (1, 2 * reach + 1), stride=1, padding=(0, reach))
    return F.avg_pool2d(-negative, FINER).round().to(torch.uint8)


SYNTHETIC: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rotated": rotated,
    "inverted": inverted,
    "thinned": thinned,
}


def synthetic(kind: str, images: ImageSet) -> ImageSet:
    """The same images after a synthetic shift, a name in `SYNTHETIC`. Raises ValueError for another name."""
    if kind not in SYNTHETIC:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(SYNTHETIC)}.")
    changed = torch.cat([SYNTHETIC[kind](images.images[start : start + 256]) for start in range(0, len(images), 256)])
    return ImageSet.of(changed, images.labels, images.class_names, (images.mean, images.std))


def load_shifted(
    place: str | Path,
    like: ImageSet,
    split: str | None = None,
    class_map: Mapping[str, str] | None = None,
    skip_corrupt: bool = False,
    label_column: str | None = None,
    memory_limit: int = 4 * 2**30,
    progress: bool = False,
) -> ImageSet:
    """The images of a folder or of a Hugging Face set whose class is one of the training set's.

    Args:
        place: a folder or the name of a Hugging Face set, as for `vision_bench.data.load_images`.
        like: the training images: the result has their classes, their size and their statistics.
        split: by default "." for a folder that holds the folders of the classes (`place/CLASS/*.jpg`), else "test".
        class_map: class of the training set by class of this one; classes that it does not name are left out. Without
            it the names must be the same; classes that the training set does not have are left out.
        skip_corrupt, label_column, memory_limit, progress: as in `load_images`.

    Raises:
        TypeError: labels are not integers.
        ValueError: as `load_images`; the map names classes that there are not, or a class of the training set is left
            without images, in which case the error lists these classes and those of the folder.
    """
    found = load_images(
        str(place),
        split or ("." if _has_class_folders(Path(place)) else "test"),
        image_size=_side(like),
        skip_corrupt=skip_corrupt,
        label_column=label_column,
        memory_limit=0,  # nothing is decoded before it is known to be wanted
        progress=progress,
    )
    labels = _labels_as(found, like, class_map, str(place))
    kept = (labels >= 0).nonzero().squeeze(1)
    assert isinstance(found.images, StreamedImages)
    images: StreamedImages | torch.Tensor = found.images.subset(kept)
    if images.shape.numel() <= memory_limit:
        starts = range(0, len(images), 1024)
        parts = [images[i : i + 1024] for i in tqdm(starts, desc=f"decoding {place}", disable=not progress)]
        images = torch.cat(parts)
    return ImageSet.of(images, labels[kept], like.class_names, (like.mean, like.std))


@dataclass(frozen=True)
class Corruptions:
    """The arrays of CIFAR-C; `load` reads those of a corruption and a severity."""

    files: dict[str, Path]  # by corruption
    labels: torch.Tensor  # (m,) int64, of the m images of each severity
    like: ImageSet
    fingerprint: str  # of the labels and of 256 images of each file

    def load(self, corruption: str, severity: int) -> ImageSet:
        """The m images of a corruption at a severity in 1 ... 5."""
        m = len(self.labels)
        array = _array(self.files[corruption])[(severity - 1) * m : severity * m]
        return _as_set(array, self.labels, self.like)


def load_corruptions(folder: str | Path, like: ImageSet) -> Corruptions:
    """What there is of CIFAR-10-C or CIFAR-100-C: `CORRUPTION.npy` and `labels.npy`, whose headers are checked.

    Args:
        folder: each `CORRUPTION.npy` is uint8 (5 m, h, w, 3), the same m test images at severity 1, then 2 to 5;
            `labels.npy` holds their 5 m labels.
        like: the training images: the result has their class names in their order, size and statistics.

    Raises:
        TypeError: labels are not integers.
        ValueError: a file is missing, not a plain array or not of such a shape, or classes do not fit.
    """
    folder = Path(folder)
    every = _labels_of(folder / LABELS)
    if len(every) % SEVERITIES or not torch.equal(every, every[: len(every) // SEVERITIES].repeat(SEVERITIES)):
        raise ValueError(
            f"{folder / LABELS} has {len(every)} labels, which are not those of the same images {SEVERITIES} times, "
            "once for each severity."
        )
    files = {path.stem: path for path in sorted(folder.glob("*.npy")) if path.name != LABELS}
    if not files:
        raise ValueError(f"{folder} has {LABELS} but no array of a corruption, such as fog.npy.")
    digest = hashlib.blake2b(every.numpy().tobytes(), digest_size=8)
    for name, path in files.items():
        array = _array(path)
        if len(array) != len(every):
            raise ValueError(f"{path} has {len(array)} images for the {len(every)} labels of {LABELS}.")
        digest.update(name.encode() + repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array[:: max(1, len(array) // 256)]).data)
    labels = every[: len(every) // SEVERITIES]
    _check_classes(labels, like, folder)
    return Corruptions(files, labels, like, digest.hexdigest())


def load_arrays(data: str | Path, like: ImageSet) -> ImageSet:
    """A test set such as CIFAR-10.1: `NAME_data.npy` uint8 (n, h, w, 3), with `NAME_labels.npy` beside it.

    Args:
        data: the first of the two files.
        like: as in `load_corruptions`.

    Raises:
        TypeError: labels are not integers.
        ValueError: a file is missing, not a plain array or not of such a shape, or classes do not fit.
    """
    data = Path(data)
    if not data.name.endswith(DATA_ENDING):
        raise ValueError(f"{data} must be called NAME{DATA_ENDING}, with NAME{LABELS_ENDING} beside it.")
    array = _array(data)
    labels = _labels_of(data.with_name(data.name.removesuffix(DATA_ENDING) + LABELS_ENDING))
    if len(array) != len(labels):
        raise ValueError(f"{data} has {len(array)} images for {len(labels)} labels.")
    _check_classes(labels, like, data)
    return _as_set(array, labels, like)


def _has_class_folders(folder: Path) -> bool:
    """Whether its folders hold images, not the splits of a data set."""
    if not folder.is_dir() or any(folder.glob("*/*.parquet")):
        return False
    there = {path.name for path in folder.iterdir() if path.is_dir()}
    return bool(there) and there.isdisjoint(itertools.chain(*SPLIT_NAMES.values()))


def _side(like: ImageSet) -> int:
    h, w = like.images.shape[-2:]
    if h != w:
        raise ValueError(f"the training images have {h} x {w} pixels; give image_size, so that all are squares.")
    return int(h)


def _labels_as(found: ImageSet, like: ImageSet, class_map: Mapping[str, str] | None, place: str) -> torch.Tensor:
    """Labels (n,) of `found` as classes of `like`, -1 for what it does not have."""
    ours = {name: index for index, name in enumerate(like.class_names)}
    if len(ours) < len(like.class_names):
        raise ValueError("the training set has several classes of the same name; shifted images cannot be matched.")
    if class_map is None:
        class_map = {name: name for name in found.class_names if name in ours}
    else:
        unknown = [name for name in class_map if name not in found.class_names]
        if unknown:
            raise ValueError(
                f"class_map has the classes {_listed(unknown)}; {place} has {_listed(found.class_names)}."
            )
        unknown = [name for name in class_map.values() if name not in ours]
        if unknown:
            raise ValueError(
                f"class_map leads to {_listed(unknown)}; the training set has the classes {_listed(list(ours))}."
            )
    targets = torch.tensor([ours[class_map[name]] if name in class_map else -1 for name in found.class_names])
    labels = targets[found.labels]
    counts = torch.bincount(labels[labels >= 0], minlength=len(ours)).tolist()
    empty = [name for name, count in zip(ours, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"{len(empty)} of the {len(ours)} classes of the training set are left without images of {place}: "
            f"{_listed(empty)}. It has the classes {_listed(found.class_names)}; a class_map says which is which."
        )
    return labels


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _read(path: Path) -> np.ndarray[Any, Any]:
    """A memory-mapped array. A pickled one, which may run any code when it is read, is refused."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a plain array of NumPy that can be read ({error}).") from None


def _array(path: Path) -> np.ndarray[Any, Any]:
    """Images (n, h, w, 3) uint8."""
    array = _read(path)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not len(array):
        raise ValueError(f"{path} is {array.dtype} {array.shape}; it must be uint8 (n, h, w, 3).")
    return array


def _labels_of(path: Path) -> torch.Tensor:
    """(n,) int64."""
    array = _read(path)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{path} has dtype {array.dtype}; labels are integers.")
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{path} has the shape {array.shape}; it must be (n,), one label for each image.")
    return torch.from_numpy(array.astype(np.int64))


def _check_classes(labels: torch.Tensor, like: ImageSet, place: Path) -> None:
    """Raise ValueError unless the labels are exactly the classes of the training set."""
    others = sorted({int(label) for label in labels.unique()} - set(range(like.num_classes)))
    if others:
        raise ValueError(
            f"{place} has the labels {_listed([str(label) for label in others])}; the training set has "
            f"{like.num_classes} classes, 0 to {like.num_classes - 1}."
        )
    counts = torch.bincount(labels, minlength=like.num_classes).tolist()
    empty = [name for name, count in zip(like.class_names, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"{len(empty)} of the {like.num_classes} classes of the training set are left without images of {place}: "
            f"{_listed(empty)}."
        )


def _as_set(array: np.ndarray[Any, Any], labels: torch.Tensor, like: ImageSet) -> ImageSet:
    images = torch.from_numpy(np.array(array)).permute(0, 3, 1, 2).contiguous()
    if images.shape[1:] != like.images.shape[1:]:
        images = resized(images, _side(like))
    return ImageSet.of(images, labels, like.class_names, (like.mean, like.std))
