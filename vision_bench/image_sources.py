"""Where the images of a split are: parquet files, data sets of Hugging Face, and folders of classes."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from vision_bench.corruptions import check_labels
from vision_bench.image_files import EncodedImages, ImageFiles, ImageRows, Reading, in_threads, listed
from vision_bench.runs import file_checksum

# What a split is called elsewhere, in the order of preference.
SPLIT_NAMES = {"train": ("train", "training"), "test": ("test", "val", "validation", "valid")}
ALL_SPLIT_NAMES = [name for names in SPLIT_NAMES.values() for name in names]
MOST_CLASSES = 1_000_000  # of labels without names
LABEL_COLUMNS = ("label", "fine_label", "labels")
# Files of a split: SPLIT-00000-of-00004.parquet, also with a hash; in a folder of its name 0000 or part-0-ab.parquet.
SHARD = re.compile(r"(?P<split>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})(-[0-9a-f]+)?")
NUMBERED = re.compile(r"(part[-.])?\d+([-.].*)?")
# Beside names with a dot, what programs leave in folders: of macOS archives, Synology's thumbnails, and ext4.
HIDDEN = ("__MACOSX", "@eaDir", "lost+found")
# What Pillow opens only to tell what it is, or by running another program.
NO_IMAGES = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
# Images that Pillow reads with a plugin or not at all.
OTHER_FORMATS = (
    ".heic", ".heif", ".hif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
)  # fmt: skip


class UnknownSplit(ValueError):
    """A data set does not have a split, but others."""

    def __init__(self, message: str, splits: Sequence[str]) -> None:
        super().__init__(message)
        self.splits = list(splits)


class Source(NamedTuple):
    """The images of a split before they are read."""

    encoded: EncodedImages
    labels: torch.Tensor  # (n,) int64
    class_names: list[str]


def hugging_face(place: str | Path, split: str, reading: Reading) -> Source:
    """A set of the hub (str), or a folder of parquet files or of `save_to_disk` (Path).

    Raises:
        TypeError: the labels are not integers.
        ValueError: there is no such set, split or column, or labels are hidden or out of their range.
    """
    import datasets

    rows, split = _rows(place, split, reading.progress)
    features = rows.features
    images = [c for c, kind in features.items() if isinstance(kind, datasets.Image)]
    images = images or [c for c in ("image", "img") if c in features]
    if len(images) != 1:
        raise ValueError(f"{place} has {len(images)} columns of images among {', '.join(features)}; one is needed.")
    label = reading.label_column or next((c for c in LABEL_COLUMNS if c in features), None)
    classes = [c for c, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if label is None and len(classes) == 1:
        label = classes[0]
    if label not in features:
        raise ValueError(f"label_column is {label!r}; {place} has the columns {', '.join(features)}.")
    labels = integer_labels(rows[label][:], f"column {label!r} of {place} (split {split})")
    if isinstance(features[label], datasets.ClassLabel):
        class_names = list(features[label].names)
    elif int(labels.max()) < MOST_CLASSES:
        class_names = [str(index) for index in range(int(labels.max()) + 1)]
    else:
        raise ValueError(
            f"column {label!r} of {place} has values up to {int(labels.max())}, which are no numbers of classes "
            f"(below {MOST_CLASSES}); number them with class_encode_column of datasets."
        )
    rows = rows.select_columns(images).cast_column(images[0], datasets.Image(decode=False))
    check_labels(labels, len(class_names))
    return Source(ImageRows(f"{place} ({split})", images[0], rows), labels, class_names)


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder holds parquet files or a data set of `save_to_disk`."""
    return bool(_parquet_files(folder)) or any(
        (folder / name).exists() for name in ("dataset_dict.json", "state.json")
    )


def class_folders(folder: Path, split: str, classes: Sequence[str] | None, skip_corrupt: bool) -> Source:
    """folder/split/class/image: all classes, or those in `classes`, in alphabetical order; of numbers in theirs.

    Hidden files and folders do not count. A warning names the files that are not images, classes that hold several
    folders of images, and classes whose names differ in case only.

    Raises:
        ValueError: there is no such split or class, a class has no image, a format cannot be read, or a link leads
            back to a folder that it is in.
    """
    if split != "." and split not in _folders_in(folder) and has_class_folders(folder):
        raise UnknownSplit(
            f"split is {split!r}; {folder} has the folders {listed(_folders_in(folder))}; if these are classes, the "
            "split is '.'.",
            splits=[],
        )
    place = folder
    if split != ".":
        place = folder / existing_split(split, _folders_in(folder), f"{folder} has the folders")
    folders = _folders_in(place)
    if all(name.isdecimal() for name in folders):
        folders.sort(key=int)
    names = sorted(classes) if classes is not None else folders
    missing = [name for name in names if name not in folders]
    if missing or not names:
        raise ValueError(f"{place} has {len(folders)} folders of classes; missing: {', '.join(missing) or 'all'}.")
    spellings = Counter(name.casefold() for name in names)
    alike = [name for name in names if spellings[name.casefold()] > 1]
    if alike:
        warnings.warn(f"{place} has classes whose names differ in case only: {listed(alike)}", stacklevel=4)
    paths, labels = _class_files(place, names, skip_corrupt)
    return Source(ImageFiles(paths), torch.tensor(labels), names)


def _class_files(place: Path, names: Sequence[str], skip_corrupt: bool) -> tuple[list[str], list[int]]:
    """Paths of the images of each class, and the numbers of their classes."""
    readable = _image_suffixes()
    paths, labels = list[str](), list[int]()
    unreadable, nested = list[str](), list[str]()
    others = [entry.name for entry in os.scandir(place) if not entry.is_dir() and not _is_hidden(entry.name)]
    parents = {str(parent) for parent in (place.resolve(), *place.resolve().parents)}
    for index, name in enumerate(names):
        inner, branches = str(place / name) + os.sep, set[str]()  # names of the folders in it that have images
        for path in _files_below(inner, parents):
            suffix = os.path.splitext(path)[1].lower()
            if suffix in readable:
                paths.append(path)
                labels.append(index)
                branches.add(path[len(inner) :].rpartition(os.sep)[0].partition(os.sep)[0])
            else:
                (unreadable if suffix in OTHER_FORMATS else others).append(os.path.relpath(path, place))
        if len(branches) > 1:
            nested.append(name)
    if unreadable and not skip_corrupt:
        raise ValueError(
            f"{place} has {len(unreadable)} images in formats that Pillow cannot read here: {listed(unreadable)}. "
            "Convert them to PNG or JPEG, register a plugin of Pillow, or leave them out with skip_corrupt."
        )
    left_out = sorted([*unreadable, *others])
    if left_out:
        warnings.warn(
            f"{len(left_out)} files in {place} are not read as images and are left out: {listed(left_out)}",
            stacklevel=5,
        )
    empty = [names[index] for index in sorted(set(range(len(names))) - set(labels))]
    if empty:
        raise ValueError(
            f"{place} has {len(empty)} classes without an image: {listed(empty)}. Delete their folders, in all splits."
        )
    if nested:
        warnings.warn(
            f"{place}: the class folders {listed(nested)} have images in folders of their own, which all count as "
            "the class of the outermost folder.",
            stacklevel=5,
        )
    return paths, labels


def existing_split(split: str, splits: Sequence[str], words: str) -> str:
    """Return the name of `split` among the splits of a set; raises UnknownSplit with their names."""
    for name in _split_names(split):
        if name in splits:
            return name
    raise UnknownSplit(f"split is {split!r}; {words} {listed(splits) or 'none'}.", splits)


def _split_names(split: str) -> list[str]:
    """`split` and what else it may be called."""
    return [split, *(name for names in SPLIT_NAMES.values() if split in names for name in names if name != split)]


def has_class_folders(folder: Path) -> bool:
    """Whether the folders in a folder hold images, not the splits of a data set."""
    if not folder.is_dir() or any(folder.glob("*/*.parquet")):
        return False
    folders = _folders_in(folder)
    return bool(folders) and set(folders).isdisjoint(ALL_SPLIT_NAMES)


def _rows(place: str | Path, split: str, progress: bool) -> tuple[Any, str]:
    """A datasets.Dataset, and the name of its split."""
    import datasets

    if isinstance(place, Path) and _parquet_files(place):
        name, files = _parquet_split(place, split)
        # The name of the configuration is a part of the path in the cache, which otherwise follows from the time of
        # change alone: other files with the same time would be taken for these.
        checksums = in_threads(lambda index: file_checksum(files[index]), range(len(files)))
        bar = tqdm(checksums, desc=f"hashing {place}", total=len(files), unit="file", disable=not progress)
        content = hashlib.sha256(" ".join(bar).encode()).hexdigest()[:16]
        return datasets.load_dataset("parquet", name=content, data_files=files, split="train"), name
    if isinstance(place, Path):
        splits = datasets.load_from_disk(str(place))
        if isinstance(splits, datasets.Dataset):
            name = str(splits.split or "train")
            if split == ".":
                return splits, name
            splits = {name: splits}
    else:
        # The errors of `datasets` that say a set is not there; offline they are ConnectionError.
        absent = (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError)
        try:
            splits = datasets.load_dataset(place)
        except absent as error:
            raise ValueError(
                f"name is {place!r}, which is neither digits, cifar10, cifar100, imagenet100, nor a folder, nor can "
                f"the hub give it ({error}). Offline, point root (data_root) at its files."
            ) from error
    name = existing_split(split, list(splits), f"{place} has the splits")
    return splits[name], name


def integer_labels(values: Any, where: str) -> torch.Tensor:
    """(n,) int64. Raises TypeError for labels that are not integers, and ValueError for hidden ones."""
    missing = sum(value is None for value in values)
    if missing:
        raise TypeError(f"{where}: {missing} of {len(values)} labels are missing; a label is an integer.")
    if any(isinstance(value, list) for value in values[:1]):
        raise TypeError(f"{where} has lists; an image has one label, an integer.")
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"{where} has dtype {array.dtype}; labels are integers (for names: class_encode_column of datasets)."
        )
    labels = torch.from_numpy(array.astype(np.int64))
    hidden = int((labels == -1).sum())
    if hidden:
        raise ValueError(
            f"{where} has labels from {int(labels.min())} to {int(labels.max())}: {hidden} of {len(labels)} are "
            "-1, which hides the class. Take a split with labels (train_split, test_split: often validation), or draw "
            "the test images from the training split (test_fraction, in recipes test_from_train)."
        )
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(
            f"{where} has labels from {int(labels.min())} to {int(labels.max())}; the number of a class is at least 0."
        )
    return labels


def _parquet_files(folder: Path) -> list[Path]:
    """List the parquet files of a folder and its direct subfolders; deeper ones may hold millions of images."""
    paths = sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")])
    return [path for path in paths if not any(map(_is_hidden, path.relative_to(folder).parts))]


def _parquet_split(folder: Path, split: str) -> tuple[str, list[str]]:
    """Name and files of a split: SPLIT.parquet, SPLIT-00000-of-00004.parquet and its other parts, or SPLIT/*.parquet.

    Raises:
        ValueError: no file, or files that may be different versions of the split, or parts of them are missing.
    """
    files: dict[str, list[Path]] = {}
    for path in _parquet_files(folder):
        shard = SHARD.fullmatch(path.stem)
        name = shard["split"] if shard else path.stem
        if path.parent != folder and path.parent.name in ALL_SPLIT_NAMES and name not in ALL_SPLIT_NAMES:
            name = path.parent.name
        files.setdefault(name, []).append(path)
    names = _split_names(split)
    near = [name for name in files if re.match(rf"({'|'.join(map(re.escape, names))})[-_. ]", name)]
    if set(files).isdisjoint(names) and len(near) == 1:
        warnings.warn(f"{folder} has no split called {split}; {near[0]} is read instead.", stacklevel=5)
        split = near[0]
    name = existing_split(split, list(files), f"{folder} has parquet files of the splits")
    paths = files[name]
    shards = [SHARD.fullmatch(path.stem) for path in paths]
    parts = [int(shard["part"]) for shard in shards if shard]
    versions = {
        (path.parent, shard["parts"] if shard else "" if NUMBERED.fullmatch(path.stem) else path.stem)
        for path, shard in zip(paths, shards, strict=True)
    }
    if len(versions) > 1 or len(set(parts)) < len(parts):
        raise ValueError(
            f"{folder} has several files that may be the split {name!r}: "
            f"{listed([str(path.relative_to(folder)) for path in paths])}. Leave those of one version in the folder."
        )
    count = int(shards[0]["parts"]) if shards[0] else 0
    missing = [str(part) for part in range(count) if part not in parts]
    if missing:
        raise ValueError(
            f"{folder} has {len(parts)} of {count} files of the split {name!r}; parts {listed(missing)} are missing."
        )
    return name, [str(path) for path in paths]


def _image_suffixes() -> set[str]:
    """Return the suffixes, in lower case, of the formats that Pillow and its registered plugins decode."""
    suffixes = Image.registered_extensions().items()  # which loads the plugins first
    return {suffix.lower() for suffix, kind in suffixes if kind in Image.OPEN and kind not in NO_IMAGES}


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN


def _folders_in(folder: Path) -> list[str]:
    """Names in alphabetical order, without hidden folders."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_hidden(entry.name))


def _files_below(folder: str, parents: set[str]) -> Iterator[str]:
    """Paths in alphabetical order, those of a folder before those of the folders in it; links are followed.

    Args:
        parents: real paths of the folders that this one is in, to which no link may lead.
    """
    real = os.path.realpath(folder)
    if real in parents:
        raise ValueError(f"{folder} is a link to a folder that it is in, {real}; remove the link.")
    entries = sorted((entry for entry in os.scandir(folder) if not _is_hidden(entry.name)), key=lambda e: e.name)
    yield from (entry.path for entry in entries if not entry.is_dir())
    for entry in entries:
        if entry.is_dir():
            yield from _files_below(entry.path, parents | {real})
