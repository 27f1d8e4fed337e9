"""Test images of another distribution, labelled with the classes of the training set (Fig. 2c).

Shifts of any images, by the table of `vision_bench.corruptions`; labelled folders and Hugging Face sets, such as
ImageNet-Sketch and ImageNet-Stylized, restricted to the classes of the training set; the arrays of CIFAR-C and
CIFAR-10.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from vision_bench import image_files
from vision_bench.corruptions import CONDITIONS, shift_names
from vision_bench.data import ImageSet, find_images, warn_of_training_images
from vision_bench.image_files import Reading, in_threads, listed, resized
from vision_bench.image_sources import Source, has_class_folders

SEVERITIES = 5
# Of the 19 corruptions, those that are not of the benchmark but for validation (Hendrycks and Dietterich, 2019).
EXTRA_CORRUPTIONS = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
LABELS = "labels.npy"
CHUNK = 1024  # images
DATA_ENDING, LABELS_ENDING = "_data.npy", "_labels.npy"


def synthetic(kind: str, images: ImageSet, strength: float | None = None) -> ImageSet:
    """Change images by a condition of the table that acts on uint8 images, such as "rotated".

    Args:
        strength: the number of the condition; by default the one that its function has.

    Raises:
        ValueError: there is no such condition, it takes no number, or the number is out of its range.
    """
    if kind not in shift_names():
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(shift_names())}.")
    condition = CONDITIONS[kind]
    if strength is not None and (condition.range is None or strength not in condition.range):
        allowed = f"for {kind} it must be {condition.range}" if condition.range else f"{kind} takes none"
        raise ValueError(f"strength is {strength}; {allowed}.")
    numbers = () if strength is None else (strength,)
    parts = [images.images[start : start + 256] for start in range(0, len(images), 256)]
    return replace(images, images=torch.cat([condition.function(part, *numbers) for part in parts]))


def load_shifted(
    place: str | Path,
    like: ImageSet,
    split: str | None = None,
    class_map: Mapping[str, str] | None = None,
    **reading: Any,
) -> ImageSet:
    """The images of a folder or of a Hugging Face set whose class is one of the training set's.

    Args:
        place: a folder or the name of a Hugging Face set, as for `vision_bench.data.load_images`.
        like: the training images: the result has their classes, their size and their statistics.
        split: by default "." for a folder that holds the folders of the classes (`place/CLASS/*.jpg`), else "test".
        class_map: class of the training set by class of this one; classes that it does not name are left out. Without
            it the names must be the same; classes that the training set does not have are left out.
        reading: as in `load_images`, but for the image size, which is that of the training set.

    Raises:
        TypeError: labels are not integers.
        ValueError: as `load_images`; the map names classes that there are not; a class of the training set is left
            without images, in which case the error lists these classes and those of the folder; or all images are
            training images.
    """
    options = Reading(image_size=_side(like), **reading)
    split = split or ("." if has_class_folders(Path(place)) else "test")
    source = find_images(str(place), split, None, options)
    labels = _labels_as(source, like, class_map, str(place))
    matched = (labels >= 0).nonzero().squeeze(1)
    _check_every_class(labels[matched], like, place, source.class_names)
    images, digests, kept = image_files.read(source.encoded, matched, options)
    _check_every_class(labels[kept], like, place, source.class_names)
    shifted = replace(like, images=images, labels=labels[kept], digests=digests, digested=None)
    if warn_of_training_images(shifted, like, f"images of {place}") == len(shifted):
        raise ValueError(f"all {len(shifted)} images of {place} are training images; give others.")
    return shifted


@dataclass(frozen=True)
class Corruptions:
    """The arrays of CIFAR-C; `load` reads those of a corruption and a severity."""

    files: dict[str, Path]  # by corruption
    labels: torch.Tensor  # (m,) int64, of the m images of each severity
    like: ImageSet
    fingerprint: str  # of the labels and of all images of each file

    def load(self, corruption: str, severity: int) -> ImageSet:
        """The m images of a corruption at a severity in 1 ... 5."""
        m = len(self.labels)
        array = _array(self.files[corruption])[(severity - 1) * m : severity * m]
        return _as_set(array, self.labels, self.like)


def load_corruptions(folder: str | Path, like: ImageSet, progress: bool = False) -> Corruptions:
    """Open the corruptions of CIFAR-10-C or CIFAR-100-C in a folder: `CORRUPTION.npy` and `labels.npy`.

    Args:
        folder: each `CORRUPTION.npy` is uint8 (5 m, h, w, 3), the same m test images at severity 1, then 2 to 5;
            `labels.npy` holds their 5 m labels.
        like: the training images: the result has their classes, size and statistics. Labels are the numbers that
            these classes had before any were dropped.
        progress: show a progress bar while reading.

    Raises:
        TypeError: labels are not integers.
        ValueError: a file is missing, not a plain array or not of such a shape, or classes do not fit.
    """
    folder = Path(folder)
    repeated = _labels_of(folder / LABELS)
    numbers = repeated[: len(repeated) // SEVERITIES]  # of the classes, of the images of a severity
    if not torch.equal(repeated, numbers.repeat(SEVERITIES)):
        raise ValueError(
            f"{folder / LABELS} has {len(repeated)} labels, which are not those of the same images {SEVERITIES} "
            "times, once for each severity."
        )
    files = {path.stem: path for path in sorted(folder.glob("*.npy")) if path.name != LABELS}
    if not files:
        raise ValueError(f"{folder} has {LABELS} but no array of a corruption, such as fog.npy.")
    arrays = {name: _array(path) for name, path in files.items()}
    for name, array in arrays.items():
        if len(array) != len(repeated):
            raise ValueError(f"{files[name]} has {len(array)} images for the {len(repeated)} labels of {LABELS}.")
    labels = _classes_of(numbers, like, folder)
    names = list(files)
    content = in_threads(lambda index: _content(arrays[names[index]]), range(len(names)))
    hashed = list(tqdm(content, desc=f"hashing {folder}", total=len(names), unit="file", disable=not progress))
    described = repr((labels.tolist(), names, hashed)).encode()
    return Corruptions(files, labels, like, hashlib.blake2b(described, digest_size=8).hexdigest())


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
    images = _as_set(array, _classes_of(labels, like, data), like)
    warn_of_training_images(images, like, f"images of {data}")
    return images


def _side(like: ImageSet) -> int:
    h, w = like.images.shape[-2:]
    if h != w:
        raise ValueError(f"the training images have {h} x {w} pixels; give image_size, so that all are squares.")
    return int(h)


def _labels_as(source: Source, like: ImageSet, class_map: Mapping[str, str] | None, place: str) -> torch.Tensor:
    """Labels (n,) of a source as classes of `like`, -1 for classes that it does not have."""
    indices = {name: index for index, name in enumerate(like.class_names)}
    if len(indices) < len(like.class_names):
        raise ValueError("the training set has several classes of the same name; shifted images cannot be matched.")
    if class_map is None:
        class_map = {name: name for name in source.class_names if name in indices}
    else:
        unknown = [name for name in class_map if name not in source.class_names]
        if unknown:
            raise ValueError(f"class_map has the classes {listed(unknown)}; {place} has {listed(source.class_names)}.")
        unknown = [name for name in class_map.values() if name not in indices]
        if unknown:
            raise ValueError(
                f"class_map leads to {listed(unknown)}; the training set has the classes {listed(list(indices))}."
            )
    targets = torch.tensor([indices[class_map[name]] if name in class_map else -1 for name in source.class_names])
    return targets[source.labels]


def _check_every_class(labels: torch.Tensor, like: ImageSet, place: str | Path, names: Sequence[str] = ()) -> None:
    """Raise ValueError unless there is an image of every class of the training set.

    Args:
        names: of the classes of `place`, for the error, if they have names.
    """
    counts = torch.bincount(labels, minlength=like.num_classes).tolist()
    empty = [name for name, count in zip(like.class_names, counts, strict=True) if not count]
    if empty:
        advice = f" It has the classes {listed(names)}; a class_map says which is which." if names else ""
        raise ValueError(
            f"{len(empty)} of the {like.num_classes} classes of the training set are left without images of {place}: "
            f"{listed(empty)}.{advice}"
        )


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


def _content(array: np.ndarray[Any, Any]) -> str:
    """Hash of shape and pixels, read in parts."""
    content = hashlib.blake2b(repr(array.shape).encode())
    for start in range(0, len(array), CHUNK):
        content.update(np.ascontiguousarray(array[start : start + CHUNK]).data)
    return content.hexdigest()


def _labels_of(path: Path) -> torch.Tensor:
    """Labels (n,) int64 of a file."""
    array = _read(path)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{path} has dtype {array.dtype}; labels are integers.")
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{path} has the shape {array.shape}; it must be (n,), one label for each image.")
    return torch.from_numpy(array.astype(np.int64))


def _classes_of(numbers: torch.Tensor, like: ImageSet, place: Path) -> torch.Tensor:
    """Labels (n,) of arrays, which number all classes of a data set, as the classes of the training set.

    Raises:
        ValueError: the labels are not exactly the classes of the training set; it names them.
    """
    classes = {number: index for index, number in enumerate(like.class_numbers)}
    others = [str(number) for number in numbers.unique().tolist() if number not in classes]
    if others:
        expected = [f"{number} ({name})" for number, name in zip(classes, like.class_names, strict=True)]
        raise ValueError(
            f"{place} has the labels {listed(others)}; the training set has {len(expected)} classes: "
            f"{listed(expected)}."
        )
    labels = torch.tensor([classes[number] for number in numbers.tolist()])
    _check_every_class(labels, like, place)
    return labels


def _as_set(array: np.ndarray[Any, Any], labels: torch.Tensor, like: ImageSet) -> ImageSet:
    images = torch.from_numpy(np.array(array)).permute(0, 3, 1, 2).contiguous()
    if images.shape[1:] != like.images.shape[1:]:
        images = resized(images, _side(like))
    return replace(like, images=images, labels=labels)
