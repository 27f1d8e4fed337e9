"""Encoded images: their bytes, a digest of each, and the pixels that are decoded from them."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional
from tqdm.auto import tqdm

from vision_bench.checks import check_counts

T = TypeVar("T")

CHUNK = 1024  # images that are read between two updates of the progress bar
SHOWN = 10  # names in a message
TRANSPARENT = ("LA", "PA", "RGBA", "RGBa")  # modes of Pillow
# What Pillow raises for broken files depends on their format.
BROKEN = (
    OSError, RuntimeError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, struct.error,
    zlib.error, Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """How the images of a set are read. Raises ValueError for an image size below 1."""

    # Resize the shorter side of every image to it, bicubic, and crop the square at the centre. None keeps the images,
    # which must then have one size.
    image_size: int | None = None
    # Leave out images that cannot be decoded, with a warning that names them, instead of an error. A streamed set is
    # decoded once for that.
    skip_corrupt: bool = False
    # Of a Hugging Face set; found by itself if it is called label, fine_label or labels, or if only one column holds
    # class labels.
    label_column: str | None = None
    memory_limit: int = 4 * 2**30  # a set of more bytes is streamed, see `StreamedImages`; others are a uint8 tensor
    progress: bool = False  # show a progress bar while reading

    def __post_init__(self) -> None:
        check_counts(image_size=self.image_size)


class CorruptImage(ValueError):
    """A file or row that should be an image and cannot be decoded."""


@dataclass(frozen=True)
class ImageFiles:
    """Images that are files: their bytes by index, and where each of them is, in words."""

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()

    def where(self, index: int) -> str:
        return self.paths[index]


@dataclass(frozen=True)
class ImageRows:
    """Images in the rows of a data set of Hugging Face: as `ImageFiles`; raises OSError where a row has no bytes."""

    name: str
    column: str
    rows: Any  # datasets.Dataset with the encoded images as its only column

    def __len__(self) -> int:
        return len(self.rows)

    def encoded(self, index: int) -> bytes:
        image = self.rows[index][self.column] or {}
        if image.get("bytes") is not None:
            return bytes(image["bytes"])
        if image.get("path") is None:
            raise OSError("the row has no image")
        return Path(image["path"]).read_bytes()

    def where(self, index: int) -> str:
        return f"row {index} of {self.name}"


EncodedImages = ImageFiles | ImageRows


class StreamedImages(torch.utils.data.Dataset[torch.Tensor]):
    """Images that are read and decoded when they are indexed, for sets that do not fit into memory.

    Indexed as a uint8 tensor (n, 3, h, w): by an integer, a slice, or a list or tensor of integers. For decoding in
    worker processes: `DataLoader(images, batch_size=None, sampler=BatchSampler(...), num_workers=...)`. Within a
    process, torch.get_num_threads() images are decoded at a time.

    Raises, when indexed:
        ValueError: an image cannot be read or has another size than the first one; the error names it.
    """

    def __init__(self, source: EncodedImages, image_size: int | None, indices: torch.Tensor | None = None) -> None:
        self.source = source
        self.image_size = image_size
        self.indices = torch.arange(len(source)) if indices is None else indices
        self.shape = torch.Size((len(self.indices), *self._decode(int(self.indices[0])).shape))

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
        return torch.stack(list(in_threads(self._read, chosen.tolist())))

    def subset(self, indices: torch.Tensor) -> StreamedImages:
        return StreamedImages(self.source, self.image_size, self.indices[indices])

    def _decode(self, index: int) -> torch.Tensor:
        return decode(_bytes(self.source, index), self.source.where(index), self.image_size)

    def _read(self, index: int) -> torch.Tensor:
        return _same_shape(self._decode(index), self.shape, self.source.where(index))


Images = torch.Tensor | StreamedImages  # uint8 (n, 3, h, w)


class ReadImages(NamedTuple):
    """Images, and what is known of each of them."""

    images: Images
    digests: torch.Tensor  # (n,) int64, see `digest`
    indices: torch.Tensor  # (n,) int64, in the source, without those that are corrupt


def read(source: EncodedImages, indices: torch.Tensor, reading: Reading) -> ReadImages:
    """The images of a source at `indices` (m,) int64, held or streamed; every byte of theirs is read once.

    Raises:
        ValueError: no image is left, or one cannot be read or, held in memory, has another size; the error names it.
    """
    image_size, skip_corrupt, progress = reading.image_size, reading.skip_corrupt, reading.progress
    chosen = indices.tolist()
    shape = _first_readable(source, chosen, image_size, skip_corrupt).shape
    streamed = len(chosen) * shape.numel() > reading.memory_limit
    if streamed and not skip_corrupt:
        hashes = list(_each(lambda index: digest(_bytes(source, index)), chosen, "hashing images", progress))
        return ReadImages(StreamedImages(source, image_size, indices), torch.tensor(hashes), indices)

    def decoded(index: int) -> tuple[torch.Tensor, int] | CorruptImage:
        try:
            encoded = _bytes(source, index)
            return decode(encoded, source.where(index), image_size), digest(encoded)
        except CorruptImage as error:
            return error

    held = None if streamed else torch.empty(len(chosen), *shape, dtype=torch.uint8)
    kept, hashes, corrupt = list[int](), list[int](), list[str]()
    for index, image in zip(chosen, _each(decoded, chosen, "decoding images", progress), strict=True):
        if isinstance(image, CorruptImage):
            if not skip_corrupt:
                raise image
            corrupt.append(source.where(index))
            continue
        pixels, hashed = image
        if held is not None:
            # numpy copies in this thread; torch's threads would wait at each image for the cores that decode.
            held.numpy()[len(kept)] = _same_shape(pixels, held.shape, source.where(index)).numpy()
        kept.append(index)
        hashes.append(hashed)
    if corrupt:
        warnings.warn(
            f"{len(corrupt)} of {len(chosen)} images cannot be decoded and are left out: {listed(corrupt)}",
            stacklevel=3,
        )
    readable = torch.tensor(kept)
    images = StreamedImages(source, image_size, readable) if held is None else held[: len(kept)]
    return ReadImages(images, torch.tensor(hashes), readable)


def digest(content: Any) -> int:
    """8 bytes of the BLAKE2b hash of bytes, as an int64: of an image's file, or of its pixels if it has no file."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def digests(images: Images) -> torch.Tensor:
    """(n,) int64: of each image the digest of its encoded bytes if it is streamed, else of its pixels."""
    if isinstance(images, StreamedImages):
        source, indices = images.source, images.indices.tolist()
        return torch.tensor(list(_each(lambda index: digest(_bytes(source, index)), indices)), dtype=torch.int64)
    assert isinstance(images, torch.Tensor)
    pixels = images.cpu().contiguous().numpy()
    return torch.tensor(list(_each(lambda index: digest(pixels[index]), range(len(pixels)))), dtype=torch.int64)


def decode(encoded: bytes, where: str, image_size: int | None) -> torch.Tensor:
    """One image as uint8 (3, h, w): upright, the first of several frames, on white where it is transparent.

    Raises:
        CorruptImage: the bytes cannot be decoded; `where` names the image.
        ValueError: it is grey of more than 8 bits, or floating-point, which would be clipped.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded))
        image.load()
        deep = image.mode.startswith(("I", "F"))
        if not deep:
            _stand_upright(image)
            image = _rgb(image)
    except BROKEN as error:
        raise CorruptImage(
            f"{where} is not a readable image ({error}); skip_corrupt leaves such images out."
        ) from None
    if deep:
        raise ValueError(f"{where} has mode {image.mode}, of more than 8 bits; convert it to 8 bits per channel.")
    return functional.pil_to_tensor(resized(image, image_size))


def resized(images: T, image_size: int | None) -> T:
    """uint8 (n, 3, h, w) or an image of Pillow: the shorter side resized, bicubic, then the square at the centre.

    None leaves them as they are.
    """
    if image_size is None:
        return images
    images = functional.resize(images, [image_size], functional.InterpolationMode.BICUBIC, antialias=True)
    return functional.center_crop(images, [image_size, image_size])


def listed(names: Sequence[str]) -> str:
    """The first names of a list, in words."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _stand_upright(image: Image.Image) -> None:
    """Turn the image in place by the orientation in its EXIF data."""
    with suppress(*BROKEN):  # Data that cannot be read tell of no orientation, and the pixels are whole.
        ImageOps.exif_transpose(image, in_place=True)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        # What colour stands under a transparent pixel is an accident of the program that wrote the file.
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _bytes(source: EncodedImages, index: int) -> bytes:
    try:
        return source.encoded(index)
    except OSError as error:
        raise CorruptImage(
            f"{source.where(index)} is not a readable image ({error}); skip_corrupt leaves such images out."
        ) from None


def _each(
    function: Callable[[int], T], indices: Sequence[int], words: str = "", progress: bool = False
) -> Iterator[T]:
    """`function` of each index, in order, with a progress bar."""
    with tqdm(total=len(indices), desc=words, unit="image", disable=not progress) as bar:
        for start in range(0, len(indices), CHUNK):
            part = indices[start : start + CHUNK]
            yield from in_threads(function, part)
            bar.update(len(part))


def in_threads(function: Callable[[int], T], indices: Sequence[int]) -> Iterator[T]:
    """`function` of each index, in order, in as many threads as torch uses."""
    threads = torch.get_num_threads()
    if threads == 1:  # a single worker thread would only contend with this one
        yield from map(function, indices)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(function, indices)


def _first_readable(
    source: EncodedImages, indices: Sequence[int], image_size: int | None, skip_corrupt: bool
) -> torch.Tensor:
    for index in indices:
        try:
            return decode(_bytes(source, index), source.where(index), image_size)
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
