"""Labelled images by name: uint8 images, int64 labels and the names of the classes.

Names: "digits" (scikit-learn's), "cifar10", "cifar100", "imagenet100", the path of a folder, or the name of
an image data set on the Hugging Face hub. A folder, also as `root` of a named set, may hold parquet files
(`train.parquet`, or `train-00000-of-00004.parquet` and the other parts), a data set written by `save_to_disk`,
torchvision's CIFAR files, or one folder of images for each class (`train/CLASS/*.jpg`).
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vision_bench import image_files, image_sources
from vision_bench.checks import Range
from vision_bench.corruptions import check_labels, stratified_fraction
from vision_bench.image_files import CorruptImage, Images, Reading, StreamedImages, listed, resized
from vision_bench.image_sources import SPLIT_NAMES, existing_split

__all__ = [
    "CorruptImage", "ImageSet", "Images", "Reading", "Statistics", "StreamedImages", "load_images", "load_splits",
    "resized", "stratified_fraction",
]  # fmt: skip

Statistics = tuple[float, float, float]

# Mean and standard deviation of the training images' channels, in [0, 1]; ImageNet's for every set not listed.
IMAGENET_STATISTICS: tuple[Statistics, Statistics] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS: dict[str, tuple[Statistics, Statistics]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "digits": ((0.3054,) * 3, (0.3753,) * 3),
}
HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
NUM_CLASSES = {"cifar10": 10, "cifar100": 100}  # at most
# Of what a fingerprint is made and how images are decoded, and the beginning of every fingerprint; those of version 1
# have none, and were made of 256 images of a streamed set.
FINGERPRINT_VERSION = "2-"
DIGITS_TRAIN = 1437  # of 1,797: the last 360 are by other writers than most of the first

# The 100 classes of ImageNet-100, drawn by Tian et al. (2020) for CMC: imagenet100.txt of github.com/HobbitLong/CMC.
IMAGENET100 = tuple(
    """
    n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890 n03062245 n01773797
    n01735189 n07831146 n07753275 n03085013 n04485082 n02105505 n01983481 n02788148 n03530642 n04435653
    n02086910 n02859443 n13040303 n03594734 n02085620 n02099849 n01558993 n04493381 n02109047 n04111531
    n02877765 n04429376 n02009229 n01978455 n02106550 n01820546 n01692333 n07714571 n02974003 n02114855
    n03785016 n03764736 n03775546 n02087046 n07836838 n04099969 n04592741 n03891251 n02701002 n03379051
    n02259212 n07715103 n03947888 n04026417 n02326432 n03637318 n01980166 n02113799 n02086240 n03903868
    n02483362 n04127249 n02089973 n03017168 n02093428 n02804414 n02396427 n04418357 n02172182 n01729322
    n02113978 n03787032 n02089867 n02119022 n03777754 n04238763 n02231487 n03032252 n02138441 n02104029
    n03837869 n03494278 n04136333 n03794056 n03492542 n02018207 n04067472 n03930630 n03584829 n02123045
    n04229816 n02100583 n03642806 n04336792 n03259280 n02116738 n02108089 n03424325 n01855672 n02090622
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class ImageSet:
    """Images with labels. `dataclasses.replace` gives them other labels or images; other images are hashed anew.

    Raises:
        TypeError: the labels are not integers, or the images not uint8.
        ValueError: shapes do not fit, there is no image, or a label is not the index of a class.
    """

    images: Images  # uint8 (n, 3, h, w)
    labels: torch.Tensor  # (n,) int64
    class_names: list[str]
    mean: Statistics  # of the channels in [0, 1], to normalise with; of the training images in every split
    std: Statistics
    digests: torch.Tensor  # (n,) int64, of each image's file, or of its pixels without one; see image_files.digest
    class_numbers: tuple[int, ...]  # of each class where it comes from: 0, 1, ... unless classes were left out
    digested: Images | None = field(default=None, repr=False)  # the images that `digests` are of; None: `images`

    def __post_init__(self) -> None:
        check_labels(self.labels, len(self.class_names))
        if self.labels.dtype != torch.int64:
            raise TypeError(f"labels has dtype {self.labels.dtype}; it must be int64.")
        if isinstance(self.images, torch.Tensor) and self.images.dtype != torch.uint8:
            raise TypeError(f"images has dtype {self.images.dtype}; it must be uint8.")
        if len(self.images.shape) != 4 or self.images.shape[1] != 3 or len(self.images) != len(self.labels):
            raise ValueError(
                f"images has shape {tuple(self.images.shape)} for {len(self.labels)} labels; it must be (n, 3, h, w)."
            )
        if not len(self.labels):
            raise ValueError("images is empty; give at least one image.")
        if self.digested is not None and self.digested is not self.images:
            # Features of the images before would otherwise pass for those of these images.
            object.__setattr__(self, "digests", image_files.digests(self.images))
        object.__setattr__(self, "digested", self.images)
        assert self.digests.shape == self.labels.shape
        assert len(self.class_numbers) == len(self.class_names)

    @classmethod
    def of(
        cls,
        images: Images,
        labels: torch.Tensor,
        class_names: Sequence[str],
        statistics: tuple[Statistics, Statistics] = IMAGENET_STATISTICS,
        digests: torch.Tensor | None = None,
    ) -> ImageSet:
        """Make a set of images in memory; digests that are not given are computed. Raises: as the class."""
        if digests is None:
            digests = image_files.digests(images)
        return cls(images, labels, list(class_names), *statistics, digests, tuple(range(len(class_names))))

    @cached_property
    def fingerprint(self) -> str:
        """`FINGERPRINT_VERSION` and 16 hexadecimal digits: of every image, the size, labels and names of classes.

        Held and streamed images of the same files have the same one.
        """
        about = (tuple(self.images.shape), self.class_names)
        content = hashlib.blake2b(repr(about).encode(), digest_size=8)
        for values in (self.labels, self.digests):
            content.update(values.cpu().contiguous().numpy().data)
        return FINGERPRINT_VERSION + content.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def subset(self, indices: torch.Tensor) -> ImageSet:
        """The images at `indices` (m,) int64, in that order, with all class names."""
        images = self.images.subset(indices) if isinstance(self.images, StreamedImages) else self.images[indices]
        digests = self.digests[indices]
        return replace(self, images=images, labels=self.labels[indices], digests=digests, digested=None)

    def with_classes(self, classes: torch.Tensor) -> ImageSet:
        """Return the set with only the classes at `classes` (c,) int64, ascending; each image must be of one."""
        return replace(
            self,
            labels=torch.searchsorted(classes, self.labels),
            class_names=[self.class_names[index] for index in classes.tolist()],
            class_numbers=tuple(self.class_numbers[index] for index in classes.tolist()),
        )


def load_images(name: str, split: str, root: str | Path | None = None, **reading: Any) -> ImageSet:
    """A data set by name, see the top of this file. Every byte of its images is read once, for the fingerprint.

    Args:
        name: "digits", "cifar10", "cifar100", "imagenet100", a folder, or a name on the Hugging Face hub.
        split: "train" or "test", for which a split or folder called val, validation or valid serves too, and the
            other way round; or any split that the data set has; or "." for a folder that holds the folders of the
            classes itself, and for a set of `save_to_disk` without splits.
        root: folder that holds the named set; without it "cifar10", "cifar100" and other names are the hub's, through
            the cache of `datasets`. Required for "imagenet100".
        reading: of `Reading`: image_size, skip_corrupt, label_column, memory_limit, progress.

    Raises:
        TypeError: labels are not integers.
        ValueError: there is no such set or split, an image cannot be read, images differ in size, or a label is
            hidden (-1) or out of its range. The error names the file or the row.

    Example:
        >>> digits = load_images("digits", "train")
        >>> digits.images.shape, digits.labels[:3], digits.class_names[:3]
        (torch.Size([1437, 3, 8, 8]), tensor([0, 1, 2]), ['0', '1', '2'])
    """
    return _reader(name, split, root, Reading(**reading))()


def load_splits(
    name: str,
    root: str | Path | None = None,
    train_split: str = "train",
    test_split: str = "test",
    test_fraction: float | None = None,
    **reading: Any,
) -> tuple[ImageSet, ImageSet]:
    """Training and test images with the same classes.

    Classes that neither split has images of are dropped, and the others numbered anew. A warning says so by name; it
    also names classes without test images, and tells how many test images are training images too.

    Args:
        name, root: as in `load_images`.
        train_split, test_split: as `split` there.
        test_fraction: in (0, 1): this share of each class of the training split, the same at every call, is the test
            images instead of `test_split`, and the rest the training images. A set with one split needs no name of it.
        reading: as in `load_images`.

    Raises:
        TypeError: labels are not integers.
        ValueError: as `load_images`; the splits have other classes, a class has test images only, all test images are
            training images, or the fraction is not allowed.
    """
    splits = [train_split, test_split]
    if test_fraction is not None:
        Range(0, 1, example="0.2 for 20 % of the images").check(test_fraction=test_fraction)
        if splits.pop() != "test":
            raise ValueError(
                f"test_fraction is {test_fraction} and test_split {test_split!r}; give one of them, as the fraction "
                "is drawn from the training split."
            )
    try:
        readers = [_reader(name, split, root, Reading(**reading)) for split in splits]
    except image_sources.UnknownSplit as error:
        if test_fraction is not None and train_split == "train" and len(error.splits) == 1:
            warnings.warn(f"{name} has no split called train; {error.splits[0]}, its only one, is read.", stacklevel=2)
            return load_splits(name, root, error.splits[0], test_fraction=test_fraction, **reading)
        raise ValueError(
            f"{error} train_split and test_split name others, and test_fraction (in recipes test_from_train) draws "
            "the test images from the training split."
        ) from None
    if test_fraction is None:
        train, test = (read() for read in readers)
    else:
        whole = readers[0]()
        drawn = draw_fraction(whole, test_fraction, f"test_fraction is {test_fraction}")
        is_train = torch.ones(len(whole), dtype=torch.bool).index_fill(0, drawn, False)
        train, test = whole.subset(is_train.nonzero().squeeze(1)), whole.subset(drawn)
    train, test = _with_common_classes(train, test, name)
    if warn_of_training_images(test, train, f"test images of {name}") == len(test):
        raise ValueError(
            f"all test images of {name} are training images, with train_split {train_split!r} and test_split "
            f"{test_split!r}; choose another split, or give test_fraction."
        )
    return train, test


def draw_fraction(images: ImageSet, fraction: float, words: str) -> torch.Tensor:
    """Indices (m,) int64 of a share of each class, the same at every call.

    Raises:
        ValueError: a class is left with no image; begins with `words`.
    """
    try:
        return stratified_fraction(images.labels, fraction, torch.Generator().manual_seed(0), images.class_names)
    except ValueError as error:
        raise ValueError(f"{words} of {len(images)} images: {error}") from None


def find_images(name: str, split: str, root: str | Path | None, reading: Reading) -> image_sources.Source:
    """The encoded images of a set before they are read; arguments and errors are those of `load_images`."""
    folder = _folder(name, root)
    if folder is None:
        return image_sources.hugging_face(HUB_NAMES.get(name, name), split, reading)
    if image_sources.is_hugging_face(folder):
        return image_sources.hugging_face(folder, split, reading)
    classes = IMAGENET100 if name == "imagenet100" else None
    return image_sources.class_folders(folder, split, classes, reading.skip_corrupt)


def warn_of_training_images(test: ImageSet, train: ImageSet, words: str) -> int:
    """How many images of `test` have the file, or without files the pixels, of one in `train`; a warning says it."""
    count = int(torch.isin(test.digests, train.digests).sum())
    if count:
        warnings.warn(f"{count} of the {len(test)} {words} are training images too.", stacklevel=3)
    return count


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """For commands: a warning within is one line of the standard error, without the place in the code."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if os.environ.get("RANK", "0") == "0":  # the main process of a launch speaks for all
            print(f"Warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _reader(name: str, split: str, root: str | Path | None, reading: Reading) -> Callable[[], ImageSet]:
    """Return the function that reads the images of `load_images`; errors that need no image are raised here."""
    if name == "digits":
        if root is not None:
            raise ValueError(
                f"root (data_root in the commands) is {str(root)!r}, and digits have none; name the data set there."
            )
        return partial(_digits, split, reading.image_size)
    statistics = STATISTICS.get(name, IMAGENET_STATISTICS)
    folder = _folder(name, root)
    if folder is not None and any(folder.glob("cifar-10*-*")):
        pixels, labels, names = _torchvision_cifar(folder, name, split)
        return lambda: ImageSet.of(resized(pixels, reading.image_size), labels, names, statistics)
    source = find_images(name, split, root, reading)
    if len(source.class_names) > NUM_CLASSES.get(name, len(source.class_names)):
        raise ValueError(
            f"name is {name!r}, and {root} has {len(source.class_names)} classes: {listed(source.class_names)}. Give "
            "the name of the set that is there, or the path of the folder as the name."
        )

    def read() -> ImageSet:
        everything = torch.arange(len(source.encoded))
        images, digests, kept = image_files.read(source.encoded, everything, reading)
        return ImageSet.of(images, source.labels[kept], source.class_names, statistics, digests)

    return read


def _folder(name: str, root: str | Path | None) -> Path | None:
    """Return the folder of the files of a set, or None for a set of the hub."""
    named = name in HUB_NAMES or name == "imagenet100"  # whatever a folder here may be called
    folder = Path(root) if root is not None else Path(name) if not named and Path(name).is_dir() else None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"root (data_root in the commands) is {str(root)!r}, which is not a folder.")
    if name == "imagenet100" and folder is None:
        raise ValueError(
            "root is missing (data_root in the commands): imagenet100 is read from a folder with train/ and val/, "
            "each with wnids."
        )
    return folder


def _with_common_classes(train: ImageSet, test: ImageSet, name: str) -> tuple[ImageSet, ImageSet]:
    """Keep the classes that have training images, or raise an error that names the classes in question."""
    longer = max(train.class_names, test.class_names, key=len)
    if all(images.class_names == [str(number) for number in range(images.num_classes)] for images in (train, test)):
        # Labels without names: the highest number may have images in one split only.
        numbers = tuple(range(len(longer)))
        train, test = (replace(images, class_names=longer, class_numbers=numbers) for images in (train, test))
    if train.class_names != test.class_names:
        differences = [
            f"only the {words} split has {listed(alone)}"
            for words, one, other in (("training", train, test), ("test", test, train))
            if (alone := [name for name in one.class_names if name not in other.class_names])
        ]
        order = f"in another order: {listed(train.class_names)}; and {listed(test.class_names)}"
        raise ValueError(f"the splits of {name} have other classes: {'; '.join(differences) or order}.")
    trained, tested = (torch.bincount(part.labels, minlength=part.num_classes) > 0 for part in (train, test))

    def names(which: torch.Tensor) -> list[str]:
        return [train.class_names[index] for index in which.nonzero().squeeze(1).tolist()]

    untrained, untested, empty = names(tested & ~trained), names(trained & ~tested), names(~trained & ~tested)
    if untrained:
        raise ValueError(
            f"{len(untrained)} classes of {name} have test images and no training image: "
            f"{listed(untrained)}; leave their images out, or take other splits."
        )
    if untested:
        warnings.warn(
            f"{len(untested)} of the {train.num_classes} classes of {name} have no test image: {listed(untested)}",
            stacklevel=3,
        )
    if empty:
        warnings.warn(
            f"{len(empty)} of the {train.num_classes} classes of {name} have no image and are dropped: "
            f"{listed(empty)}",
            stacklevel=3,
        )
        kept = trained.nonzero().squeeze(1)
        train, test = train.with_classes(kept), test.with_classes(kept)
    return train, test


def _digits(split: str, image_size: int | None) -> ImageSet:
    """8 x 8 pixels of 17 grey levels (UCI, Alpaydin and Kaynak), in the order of scikit-learn."""
    from sklearn.datasets import load_digits

    split = existing_split(split, list(SPLIT_NAMES), "digits has the splits")
    grey, targets = load_digits(return_X_y=True)
    part = slice(None, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    pixels = torch.from_numpy(np.rint(grey[part] * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    images = resized(pixels.repeat(1, 3, 1, 1), image_size)
    labels = torch.from_numpy(targets[part].astype(np.int64))
    return ImageSet.of(images, labels, [str(digit) for digit in range(10)], STATISTICS["digits"])


def _torchvision_cifar(folder: Path, name: str, split: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Read the files of the original distribution, whose checksums torchvision compares before it opens them."""
    from torchvision.datasets import CIFAR10, CIFAR100

    sets = {"cifar10": CIFAR10, "cifar100": CIFAR100}
    if name not in sets:
        raise ValueError(f"name is {name!r}; {folder} holds CIFAR files, for which it must be cifar10 or cifar100.")
    split = existing_split(split, list(SPLIT_NAMES), f"{name} has the splits")
    try:
        cifar = sets[name](str(folder), train=split == "train")
    except RuntimeError as error:
        raise ValueError(f"{folder} does not hold {name} complete: {error}") from None
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(cifar.targets, dtype=torch.int64), list(cifar.classes)
