"""Features of frozen models: computed once, kept in shards whose header says what they are of.

A folder holds safetensors files, whose number of rows follows from the size of the images alone. With p processes of
an accelerate launch every process computes each p-th shard. Shards that exist already are kept, so that a pass that
was stopped continues, and no more than one shard is ever in memory.

    from vision_bench import features
    from vision_bench.data import load_images

    test = load_images("digits", "test")
    source = features.extract("runs/digits_features", model, test, "test")
    z = features.load("runs/digits_features", "output", source)  # (360, d)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from vision_bench import models, storage
from vision_bench.corruptions import InputNoise
from vision_bench.data import Images, ImageSet
from vision_bench.runs import differences

KIND = "feature shard"
SHARD_ROWS = 8192  # at most
SHARD_PIXELS = 2**23  # 8,192 images of 32 x 32 pixels, 167 of 224 x 224, which a CPU takes a minute or two for


@dataclass(frozen=True)
class Source:
    """The model, images and options that features follow from; every shard has them in its header."""

    checkpoint: str  # fingerprint of the model
    data: str  # fingerprint of the images
    split: str
    count: int  # of images
    image_size: tuple[int, int]  # their height and width in pixels
    layers: tuple[str, ...]  # of models.LAYERS
    normalised: bool  # rows L2-normalised
    mean: tuple[float, ...]  # of the channels, with which the images were normalised
    std: tuple[float, ...]
    noise: str | None  # on the images

    @property
    def shard_rows(self) -> int:
        """Rows of a shard but the last: fewer for larger images, as many on every machine."""
        height, width = self.image_size
        return min(SHARD_ROWS, max(32, SHARD_PIXELS // (height * width)))


def source(
    model: nn.Module,
    images: ImageSet,
    split: str,
    layers: Sequence[str] | None = None,
    normalised: bool = False,
    noise: InputNoise | None = None,
    checkpoint: str | None = None,
) -> Source:
    """Describe where the features of `images` under `model` come from; the arguments are those of `extract`.

    Raises:
        ValueError: a layer that the model does not have.
    """
    return Source(
        models.fingerprint(model) if checkpoint is None else checkpoint,
        images.fingerprint,
        split,
        len(images.images),
        (images.images.shape[2], images.images.shape[3]),
        tuple(sorted(_layers(model, layers))),
        normalised,
        tuple(images.mean),
        tuple(images.std),
        None if noise is None else str(noise),
    )


def extract(
    folder: str | Path,
    model: nn.Module,
    images: ImageSet,
    split: str,
    layers: Sequence[str] | None = None,
    normalised: bool = False,
    batch_size: int = 256,
    progress: bool = False,
    noise: InputNoise | None = None,
    checkpoint: str | None = None,
) -> Source:
    """Compute the shards that `folder` lacks, in one pass in eval mode, and return what they are of, for `load`.

    The model is moved to this process's device; its weights, buffers and mode are as before.

    Args:
        model: a `ContrastiveModel`, or any backbone that maps images (n, 3, h, w) to (n, d), as timm's with
            `num_classes=0`.
        images: their order is the order of the features.
        split: name of the split, for the header.
        layers: of `models.layers(model)`, by default the last: "output", or "backbone" of a plain backbone.
        normalised: L2-normalise the rows.
        batch_size: of the forward passes.
        progress: show a progress bar of this process's images in the main process.
        noise: on the images, after their normalisation.
        checkpoint: `models.fingerprint(model)` where the caller has it; for several passes of one model it is then
            computed once.

    Raises:
        FloatingPointError: a value is NaN or infinite; in every process. The shards before it stay.
        ValueError: a layer that the model does not have, features that are not (n, d) with one d, or the folder holds
            other features.
        OSError: a shard cannot be written; those before it stay.
    """
    state = PartialState()
    folder = Path(folder)
    header = source(model, images, split, layers, normalised, noise, checkpoint)
    model.to(state.device)
    lacking: dict[Path, range] = {}  # rows of the shards that this process computes
    for i, path in list(enumerate(_paths(folder, header)))[state.process_index :: state.num_processes]:
        if path.exists():
            _check(path, header)
        else:
            lacking[path] = range(i * header.shard_rows, min((i + 1) * header.shard_rows, header.count))
    not_finite = None
    is_shown = progress and state.is_main_process
    total = sum(map(len, lacking.values()))
    with tqdm(total=total, desc=f"features of {split}", unit="image", disable=not is_shown) as bar:
        for path, rows in lacking.items():
            pixels = images.images[rows.start : rows.stop]
            try:
                values = embed(
                    model, pixels, images.mean, images.std, header.layers, batch_size, noise, rows.start, bar.update
                )
            except FloatingPointError as error:
                not_finite = str(error)
                break
            if normalised:
                values = {layer: F.normalize(z) for layer, z in values.items()}
            storage.save(path, KIND, values, asdict(header))
    for reason in gather_object([not_finite]):  # which waits for all processes
        if reason is not None:
            raise FloatingPointError(f"{split}: {reason}")
    return header


@torch.no_grad()
def embed(
    model: nn.Module,
    images: Images,
    mean: Sequence[float] | torch.Tensor,
    std: Sequence[float] | torch.Tensor,
    layers: Sequence[str] | None = None,
    batch_size: int = 256,
    noise: InputNoise | None = None,
    first: int = 0,
    report: Callable[[int], object] | None = None,
) -> dict[str, torch.Tensor]:
    """Features (n, d) float32, on the CPU, of images (n, 3, h, w) uint8, by layer; computed in eval mode.

    Args:
        model, layers: as in `extract`. The model computes on the device on which it is.
        mean, std: of the data set's channels, for images in [0, 1].
        noise: on the images, after their normalisation.
        first: index of the first image in its set, from which its noise follows, and for errors.
        report: called after each batch with its number of images.

    Raises:
        FloatingPointError: a value is NaN or infinite; names the layer and the image.
        ValueError: a layer that the model does not have, or features that are not (n, d) with one d.
    """
    device = next(itertools.chain(model.parameters(), model.buffers(), [torch.empty(0)])).device
    was_training = model.training
    model.eval()
    parts: dict[str, list[torch.Tensor]] = {layer: [] for layer in _layers(model, layers)}
    try:
        for start in range(0, len(images), batch_size):
            x = normalise(images[start : start + batch_size].to(device), mean, std)
            if noise is not None:
                x = noise.add(x, first + start, mean, std)
            outputs = models.outputs(model, x)
            for layer, batches in parts.items():
                z = outputs[layer]
                shape = (len(x), batches[0].shape[1] if batches else z.shape[-1])
                if z.shape != shape:
                    raise ValueError(
                        f"the {layer} of the model gives features of the shape {tuple(z.shape)} for images "
                        f"of {tuple(x.shape)}; it must be (n, d){f', here {shape}' if batches else ''}, of the same d "
                        "for every batch. Models of timm give that with num_classes=0 and their pooling."
                    )
                batches.append(check_finite(z.float(), f"the {layer}", first + start).cpu())
            if report is not None:
                report(len(x))
    finally:
        model.train(was_training)
    return {layer: torch.cat(batches) for layer, batches in parts.items()}


def check_finite(values: torch.Tensor, name: str, first: int) -> torch.Tensor:
    """`values` (n, d) of n images, the first of which has the index `first`.

    Raises:
        FloatingPointError: a value is NaN or infinite, or so large that the norm of its row is, which would make a row
            of zeros of it wherever rows are normalised; names the image.
    """
    finite = torch.linalg.vector_norm(values, dim=1).isfinite()
    if not finite.all():
        image = first + int((~finite).nonzero()[0])
        raise FloatingPointError(
            f"{name} of image {image} has values that are NaN or infinite, or so large that their squares are"
        )
    return values


def normalise(
    images: torch.Tensor, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """uint8 images (n, 3, h, w) as float32 of about mean 0 and standard deviation 1 in each channel."""
    shift, scale = (torch.as_tensor(v, dtype=torch.float32, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images.float() / 255 - shift) / scale


def shards(folder: str | Path, layer: str, source: Source) -> Iterator[torch.Tensor]:
    """The features of one layer, a shard (rows, d) float32 at a time, in the order of the images.

    Raises:
        FileNotFoundError: a shard is missing; `extract` computes it.
        ValueError: the folder holds features of another source, or not those of `layer`.
    """
    if layer not in source.layers:
        raise ValueError(f"{folder} has the layers {', '.join(source.layers)}, not {layer!r}.")
    paths = _paths(Path(folder), source)
    for path in paths:
        _check(path, source)
    for path in paths:
        yield storage.load(path, KIND)[0][layer]


def missing(folder: str | Path, source: Source) -> bool:
    """Whether `extract` would have something to compute.

    Raises:
        ValueError: the folder holds features of another source.
    """
    paths = _paths(Path(folder), source)
    for path in paths:
        if path.exists():
            _check(path, source)
    return not all(path.exists() for path in paths)


def load(folder: str | Path, layer: str, source: Source) -> torch.Tensor:
    """The features of one layer as one tensor (count, d) float32; raises as `shards`."""
    result: torch.Tensor | None = None
    start = 0
    for part in shards(folder, layer, source):
        if result is None:
            result = part.new_empty(source.count, part.shape[1])
        if part.shape[1] != result.shape[1]:
            raise ValueError(f"{folder} has features of {result.shape[1]} and of {part.shape[1]} dimensions.")
        result[start : start + len(part)] = part
        start += len(part)
    assert result is not None
    assert start == source.count
    return result


def _layers(model: nn.Module, layers: Sequence[str] | None) -> list[str]:
    existing = models.layers(model)
    if layers is None:
        return [existing[-1]]
    unknown = [layer for layer in layers if layer not in existing]
    if unknown or not layers:
        raise ValueError(f"layers has {unknown or 'nothing'}; it must be of {', '.join(existing)}.")
    return list(layers)


def _paths(folder: Path, source: Source) -> list[Path]:
    number = -(-source.count // source.shard_rows)
    return [folder / f"{i:05d}-of-{number:05d}.safetensors" for i in range(number)]


def _check(path: Path, source: Source) -> None:
    header: dict[str, Any] = storage.read_header(path, KIND)
    expected = asdict(source)
    if changed := differences({name: header.get(name) for name in expected}, expected):
        raise ValueError(
            f"{path} holds other features ({changed}). Choose another folder, or delete this one to compute them anew."
        )
