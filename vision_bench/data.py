"""Labelled images by name: uint8 images, int64 labels and the names of the classes.

Names: "digits" (scikit-learn's, embedded), "cifar10", "cifar100", "imagenet100", the path of a folder, or the name of
an image data set on the Hugging Face hub. A folder, also as `root` of a named set, may hold parquet files
(`train-*.parquet`), a data set written by `save_to_disk`, torchvision's CIFAR files, or one folder of images for each
class (`train/CLASS/*.jpg`).
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from vision_bench.corruptions import check_labels

Statistics = tuple[float, float, float]
T = TypeVar("T")

# Mean and standard deviation of the training images' channels, in [0, 1]; ImageNet's for every set not listed.
IMAGENET_STATISTICS: tuple[Statistics, Statistics] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS: dict[str, tuple[Statistics, Statistics]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "digits": ((0.3054,) * 3, (0.3753,) * 3),
}
HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
# What a split is called elsewhere, in the order of preference.
SPLIT_NAMES = {"train": ("train", "training"), "test": ("test", "val", "validation", "valid")}
LABEL_COLUMNS = ("label", "fine_label", "labels")
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


class Images(Protocol):
    """uint8 images (n, 3, h, w): a tensor, or `StreamedImages`, which is indexed like one."""

    @property
    def shape(self) -> torch.Size: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class ImageSet:
    """Images with labels.

    Raises:
        TypeError: the labels are not integers, or the images not uint8.
        ValueError: shapes do not fit, there is no image, or a label is not the index of a class.
    """

    images: Images  # uint8 (n, 3, h, w)
    labels: torch.Tensor  # (n,) int64
    class_names: list[str]
    mean: Statistics  # of the channels in [0, 1], to normalise with; of the training images in every split
    std: Statistics
    fingerprint: str  # 16 hexadecimal digits that follow from images and labels

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

    @classmethod
    def of(
        cls,
        images: Images,
        labels: torch.Tensor,
        class_names: Sequence[str],
        statistics: tuple[Statistics, Statistics] = IMAGENET_STATISTICS,
    ) -> ImageSet:
        """Of images and labels at hand, with their fingerprint. Raises: as the class."""
        return cls(images, labels, list(class_names), *statistics, fingerprint=_fingerprint(images, labels))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def subset(self, indices: torch.Tensor) -> ImageSet:
        """The images at `indices` (m,) int64, in that order, with all class names."""
        images = self.images.subset(indices) if isinstance(self.images, StreamedImages) else self.images[indices]
        return ImageSet.of(images, self.labels[indices], self.class_names, (self.mean, self.std))


class _Encoded(Protocol):
    """Encoded images, one at an index, and where each of them is."""

    def __len__(self) -> int: ...

    def encoded(self, index: int) -> bytes: ...

    def where(self, index: int) -> str: ...


@dataclass(frozen=True)
class _Files:
    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()

    def where(self, index: int) -> str:
        return self.paths[index]


@dataclass(frozen=True)
class _Rows:
    name: str
    column: str
    rows: Any  # datasets.Dataset with the encoded images as its only column

    def __len__(self) -> int:
        return len(self.rows)

    def encoded(self, index: int) -> bytes:
        image = self.rows[index][self.column]
        if image["bytes"] is not None:
            return bytes(image["bytes"])
        return Path(image["path"]).read_bytes()

    def where(self, index: int) -> str:
        return f"row {index} of {self.name}"


class StreamedImages(torch.utils.data.Dataset[torch.Tensor]):
    """Images that are read and decoded when they are indexed, for sets that do not fit into memory.

    Indexed as a uint8 tensor (n, 3, h, w): by an integer, a slice, or a list or tensor of integers. For decoding in
    worker processes: `DataLoader(images, batch_size=None, sampler=BatchSampler(...), num_workers=...)`. Within a
    process, torch.get_num_threads() images are decoded at a time.

    Raises, when indexed:
        ValueError: an image cannot be read or has another size than the first one; the error names it.
    """

    def __init__(self, source: _Encoded, image_size: int | None, indices: torch.Tensor | None = None) -> None:
        self.source = source
        self.image_size = image_size
        self.indices = torch.arange(len(source)) if indices is None else indices
        first = _decode(source, int(self.indices[0]), image_size)
        self.shape = torch.Size((len(self.indices), *first.shape))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | slice | Sequence[int] | torch.Tensor) -> torch.Tensor:
        if isinstance(index, Sequence):
            index = torch.tensor(index, dtype=torch.int64)
        chosen = self.indices[index]
        if chosen.ndim == 0:
            return self._read(int(chosen))
        if not len(chosen):
            return torch.empty(0, *self.shape[1:], dtype=torch.uint8)
        return torch.stack(list(_map(self._read, chosen.tolist())))

    def subset(self, indices: torch.Tensor) -> StreamedImages:
        return StreamedImages(self.source, self.image_size, self.indices[indices])

    def _read(self, index: int) -> torch.Tensor:
        return _same_shape(_decode(self.source, index, self.image_size), self.shape, self.source.where(index))


def load_images(
    name: str,
    split: str,
    root: str | Path | None = None,
    image_size: int | None = None,
    skip_corrupt: bool = False,
    label_column: str | None = None,
    memory_limit: int = 4 * 2**30,
    progress: bool = False,
) -> ImageSet:
    """A data set by name, see the top of this file.

    Args:
        name: "digits", "cifar10", "cifar100", "imagenet100", a folder, or a name on the Hugging Face hub.
        split: "train" or "test", for which a split or folder called val, validation or valid serves too, and the
            other way round; or any split that the data set has; or "." for a folder that holds the folders of the
            classes itself.
        root: folder that holds the named set; without it "cifar10", "cifar100" and other names are the hub's, through
            the cache of `datasets`. Required for "imagenet100".
        image_size: resize the shorter side of every image to it, bicubic, and crop the square at the centre. None
            keeps the images, which must then have one size.
        skip_corrupt: leave out images that cannot be decoded, with a warning that names them, instead of an error. A
            streamed set is decoded once for that.
        label_column: of a Hugging Face set; found by itself if it is called label, fine_label or labels, or if only
            one column holds class labels.
        memory_limit: a set of more bytes is streamed, see `StreamedImages`; a smaller one is one uint8 tensor.
        progress: show a progress bar while decoding.

    Raises:
        TypeError: labels are not integers.
        ValueError: there is no such set or split, an image cannot be read, images differ in size, or a label is out of
            its range. The error names the file or the row.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size is {image_size}; it must be at least 1 pixel, or None.")
    statistics = STATISTICS.get(name, IMAGENET_STATISTICS)
    if name == "digits":
        return _digits(split, image_size)
    named = name in HUB_NAMES or name == "imagenet100"  # whatever a folder here may be called
    folder = Path(root) if root is not None else Path(name) if not named and Path(name).is_dir() else None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"root is {str(root)!r}, which is not a folder.")
    if name == "imagenet100" and folder is None:
        raise ValueError("root is missing: imagenet100 is read from a folder with train/ and val/, each with wnids.")

    if folder is not None and any(folder.glob("cifar-10*-*")):
        images, labels, names = _torchvision_cifar(folder, name, split)
        return ImageSet.of(resized(images, image_size), labels, names, statistics)
    source: _Encoded
    if folder is None:
        source, labels, names = _hugging_face(HUB_NAMES.get(name, name), split, label_column)
    elif _parquet_files(folder) or any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        source, labels, names = _hugging_face(folder, split, label_column)
    else:
        source, labels, names = _class_folders(folder, split, IMAGENET100 if name == "imagenet100" else None)
    check_labels(labels, len(names))

    shape = _first_readable(source, image_size, skip_corrupt).shape
    if len(source) * shape.numel() > memory_limit:
        kept = torch.arange(len(source))
        if skip_corrupt:
            kept = torch.tensor([i for i, _ in _decoded(source, image_size, True, progress)])
        return ImageSet.of(StreamedImages(source, image_size, kept), labels[kept], names, statistics)
    images, read = torch.empty(len(source), *shape, dtype=torch.uint8), list[int]()
    for index, image in _decoded(source, image_size, skip_corrupt, progress):
        images[len(read)] = _same_shape(image, images.shape, source.where(index))
        read.append(index)
    return ImageSet.of(images[: len(read)], labels[torch.tensor(read)], names, statistics)


def stratified_fraction(labels: torch.Tensor, fraction: float, generator: torch.Generator) -> torch.Tensor:
    """Indices of a share of the samples, drawn without replacement from each class: round(fraction * n_c) of n_c.

    Args:
        labels: (n,) of an integer dtype, at least 0.
        fraction: in (0, 1]; 1 takes every sample.
        generator: of the draw.

    Returns:
        (m,) int64, ascending, on the device of `labels`.

    Raises:
        TypeError: the labels are not integers.
        ValueError: the fraction is out of its range, or a class with samples would be left with none.
    """
    check_labels(labels, int(labels.max()) + 1 if labels.numel() and int(labels.max()) >= 0 else 1)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be in (0, 1], 0.1 for 10 % of the samples.")
    order = torch.randperm(len(labels), generator=generator, device=generator.device).to(labels.device)
    chosen = []
    for index, count in enumerate(torch.bincount(labels).tolist()):
        wanted = round(fraction * count)
        if count and not wanted:
            raise ValueError(
                f"fraction is {fraction}: class {index} has {count} samples and would be left with none; take "
                f"at least {1 / count:.3g}."
            )
        chosen.append(order[labels[order] == index][:wanted])
    return torch.cat(chosen).sort().values


def _digits(split: str, image_size: int | None) -> ImageSet:
    """8 x 8 pixels of 17 grey levels (UCI, Alpaydin and Kaynak), in the order of scikit-learn."""
    from sklearn.datasets import load_digits

    split = _of_these(_names_of(split), list(SPLIT_NAMES), "digits has the splits")
    grey, targets = load_digits(return_X_y=True)
    part = slice(None, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    pixels = torch.from_numpy(np.rint(grey[part] * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    images = resized(pixels.repeat(1, 3, 1, 1), image_size)
    labels = torch.from_numpy(targets[part].astype(np.int64))
    return ImageSet.of(images, labels, [str(digit) for digit in range(10)], STATISTICS["digits"])


def _torchvision_cifar(folder: Path, name: str, split: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """From the files of the original distribution, whose checksums torchvision compares before it opens them."""
    from torchvision.datasets import CIFAR10, CIFAR100

    sets = {"cifar10": CIFAR10, "cifar100": CIFAR100}
    if name not in sets:
        raise ValueError(f"name is {name!r}; {folder} holds CIFAR files, for which it must be cifar10 or cifar100.")
    split = _of_these(_names_of(split), list(SPLIT_NAMES), f"{name} has the splits")
    try:
        found = sets[name](str(folder), train=split == "train")
    except RuntimeError as error:
        raise ValueError(f"{folder} does not hold {name} complete: {error}") from None
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(found.targets, dtype=torch.int64), list(found.classes)


def _hugging_face(place: str | Path, split: str, label_column: str | None) -> tuple[_Rows, torch.Tensor, list[str]]:
    """A set of the hub (str), or a folder of parquet files or of `save_to_disk` (Path)."""
    import datasets

    aliases = _names_of(split)
    if isinstance(place, Path) and _parquet_files(place):
        files: dict[str, list[str]] = {}
        for path in _parquet_files(place):
            kind = path.stem.replace("_", "-").split("-")[0]
            files.setdefault(kind, []).append(str(path))
        wanted = files[_of_these(aliases, list(files), f"{place} has parquet files of the splits")]
        rows = datasets.load_dataset("parquet", data_files=wanted, split="train")
    elif isinstance(place, Path):
        saved = datasets.load_from_disk(str(place))
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[_of_these(aliases, list(saved), f"{place} has the splits")]
        rows = saved
    else:
        # The errors of `datasets` that say a set is not there; offline they are ConnectionError.
        absent = (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError)
        try:
            given = datasets.load_dataset(place)
        except absent as error:
            raise ValueError(
                f"name is {place!r}, which is neither digits, cifar10, cifar100, imagenet100, nor a folder, nor can "
                f"the hub give it ({error}). Offline, point root at its files."
            ) from error
        rows = given[_of_these(aliases, list(given), f"{place} has the splits")]
    features = rows.features
    images = [c for c, kind in features.items() if isinstance(kind, datasets.Image)]
    images = images or [c for c in ("image", "img") if c in features]
    if len(images) != 1:
        raise ValueError(f"{place} has {len(images)} columns of images among {', '.join(features)}; one is needed.")
    label = label_column or next((c for c in LABEL_COLUMNS if c in features), None)
    classes = [c for c, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if label is None and len(classes) == 1:
        label = classes[0]
    if label not in features:
        raise ValueError(f"label_column is {label!r}; {place} has the columns {', '.join(features)}.")
    values = np.asarray(rows[label][:])
    if values.dtype.kind not in "iu":
        raise TypeError(
            f"column {label!r} of {place} has dtype {values.dtype}; labels are integers without gaps (for names: "
            "class_encode_column of datasets)."
        )
    labels = torch.from_numpy(values.astype(np.int64))
    if isinstance(features[label], datasets.ClassLabel):
        class_names = list(features[label].names)
    else:
        class_names = [str(index) for index in range(int(labels.max()) + 1)]
    rows = rows.select_columns(images).cast_column(images[0], datasets.Image(decode=False))
    return _Rows(f"{place} ({split})", images[0], rows), labels, class_names


def _parquet_files(folder: Path) -> list[Path]:
    """In the folder, or one below it as in the hub's layout; the files of millions of images are not walked."""
    return sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")])


def _class_folders(folder: Path, split: str, classes: Sequence[str] | None) -> tuple[_Files, torch.Tensor, list[str]]:
    """folder/split/class/image: all classes, or the given ones, numbered in alphabetical order."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    place = folder / (split if split == "." else _of_these(_names_of(split), there, f"{folder} has the folders"))
    found = sorted(path.name for path in place.iterdir() if path.is_dir())
    names = sorted(classes) if classes is not None else found
    missing = [name for name in names if name not in found]
    if missing or not names:
        raise ValueError(f"{place} has {len(found)} folders of classes; missing: {', '.join(missing) or 'all'}.")
    try:
        samples = make_dataset(str(place), {name: index for index, name in enumerate(names)}, IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise ValueError(f"{place}: {error}") from None
    return _Files([path for path, _ in samples]), torch.tensor([index for _, index in samples]), names


def _names_of(split: str) -> list[str]:
    """`split` and what else it may be called."""
    others = next((names for names in SPLIT_NAMES.values() if split in names), ())
    return [split, *others]


def _of_these(wanted: Sequence[str], there: Sequence[str], words: str) -> str:
    for name in wanted:
        if name in there:
            return name
    raise ValueError(f"split is {wanted[0]!r}; {words} {', '.join(there) or 'none'}.")


def _decode(source: _Encoded, index: int, image_size: int | None) -> torch.Tensor:
    """One image as uint8 (3, h, w), resized and cropped."""
    from torchvision.transforms.v2 import functional

    where = source.where(index)
    try:
        image: Image.Image = Image.open(io.BytesIO(source.encoded(index)))
        image.load()
    # What Pillow raises for broken files depends on their format.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CorruptImage(
            f"{where} is not a readable image ({error}); skip_corrupt leaves such images out."
        ) from None
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{where} has mode {image.mode}, of more than 8 bits; convert it to 8 bits per channel.")
    image = image.convert("RGB")
    if image_size is not None:
        image = functional.resize(image, [image_size], functional.InterpolationMode.BICUBIC)
        image = functional.center_crop(image, [image_size, image_size])
    return functional.pil_to_tensor(image)


class CorruptImage(ValueError):
    """A file or row that should be an image and cannot be decoded."""


def _decoded(
    source: _Encoded, image_size: int | None, skip_corrupt: bool, progress: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """Every readable image with its index; at the end a warning that names those left out."""

    def read(index: int) -> torch.Tensor | CorruptImage:
        try:
            return _decode(source, index, image_size)
        except CorruptImage as error:
            return error

    corrupt = []
    with tqdm(total=len(source), desc="decoding images", unit="image", disable=not progress) as bar:
        for start in range(0, len(source), 1024):
            indices = range(start, min(start + 1024, len(source)))
            for index, image in zip(indices, _map(read, indices), strict=True):
                if isinstance(image, torch.Tensor):
                    yield index, image
                elif not skip_corrupt:
                    raise image
                else:
                    corrupt.append(source.where(index))
            bar.update(len(indices))
    if corrupt:
        shown = ", ".join(corrupt[:10]) + (", ..." if len(corrupt) > 10 else "")
        warnings.warn(
            f"{len(corrupt)} of {len(source)} images cannot be decoded and are left out: {shown}", stacklevel=3
        )


def _map(function: Callable[[int], T], indices: Sequence[int]) -> Iterable[T]:
    """`function` of each index, in order, in as many threads as torch uses."""
    threads = torch.get_num_threads()
    if threads == 1:  # a single worker thread would only contend with this one
        return map(function, indices)
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, indices))


def _first_readable(source: _Encoded, image_size: int | None, skip_corrupt: bool) -> torch.Tensor:
    for index in range(len(source)):
        try:
            return _decode(source, index, image_size)
        except CorruptImage:
            if not skip_corrupt:
                raise
    raise ValueError("the data set has no readable image.")


def _same_shape(image: torch.Tensor, shape: torch.Size, where: str) -> torch.Tensor:
    if image.shape != shape[1:]:
        raise ValueError(
            f"{where} has {image.shape[1]} x {image.shape[2]} pixels and the first image {shape[2]} x {shape[3]}; "
            "give image_size, the side of a square to which all are resized."
        )
    return image


def resized(images: torch.Tensor, image_size: int | None) -> torch.Tensor:
    """uint8 (n, 3, h, w) with the shorter side resized, bicubic, then the square at the centre; None: as they are."""
    if image_size is None:
        return images
    from torchvision.transforms.v2 import functional

    images = functional.resize(images, [image_size], functional.InterpolationMode.BICUBIC, antialias=True)
    return functional.center_crop(images, [image_size, image_size])


def _fingerprint(images: Images, labels: torch.Tensor) -> str:
    """Of all pixels and labels; of streamed images, of the labels, the shape and 256 images evenly spaced."""
    digest = hashlib.blake2b(repr(tuple(images.shape)).encode(), digest_size=8)
    digest.update(labels.cpu().contiguous().numpy().tobytes())
    if isinstance(images, torch.Tensor):
        for part in images.split(4096):
            digest.update(part.cpu().contiguous().numpy())
    elif isinstance(images, StreamedImages):
        for index in images.indices[:: max(1, len(images) // 256)].tolist():
            digest.update(images.source.encoded(index))
    return digest.hexdigest()
