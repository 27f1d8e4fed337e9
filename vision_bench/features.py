"""Features of frozen models: computed once, kept in shards whose header says what they are of.

A folder holds safetensors files of `SHARD_ROWS` rows. Every process of an accelerate launch computes each so-many-th
shard, the shards do not depend on how many processes there are, and those that exist already are kept: a stopped pass
continues, and no more than one shard is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from tqdm.auto import tqdm

from vision_bench import models, storage

if TYPE_CHECKING:
    from vision_bench.data import Images, ImageSet

KIND = "feature shard"
SHARD_ROWS = 8192


@dataclass(frozen=True)
class Source:
    """What gives features their meaning; stands in the header of every shard."""

    checkpoint: str  # fingerprint of the model
    data: str  # fingerprint of the images
    split: str
    count: int  # of images
    layers: tuple[str, ...]  # of models.LAYERS
    normalised: bool  # rows L2-normalised


def source(
    model: models.ContrastiveModel,
    images: ImageSet,
    split: str,
    layers: Sequence[str] = ("output",),
    normalised: bool = False,
) -> Source:
    """What the features of `images` under `model` are of. Raises ValueError for a layer that models do not have."""
    unknown = [layer for layer in layers if layer not in models.LAYERS]
    if unknown or not layers:
        raise ValueError(f"layers has {unknown or 'nothing'}; it must be of {', '.join(models.LAYERS)}.")
    return Source(
        models.fingerprint(model), images.fingerprint, split, len(images.images), tuple(sorted(layers)), normalised
    )


def extract(
    folder: str | Path,
    model: models.ContrastiveModel,
    images: ImageSet,
    split: str,
    layers: Sequence[str] = ("output",),
    normalised: bool = False,
    batch_size: int = 256,
    progress: bool = False,
) -> Source:
    """Compute the shards that `folder` lacks, in one pass in eval mode, and return what they are of, for `load`.

    The model is moved to this process's device; its weights, buffers and mode are as before.

    Args:
        images: their order is the order of the features.
        split: name of the split, for the header.
        layers: of "backbone", "projector", "output".
        normalised: L2-normalise the rows.
        batch_size: of the forward passes.
        progress: show a progress bar in the main process.

    Raises:
        ValueError: a layer that models do not have, or the folder holds other features.
        OSError: a shard cannot be written; those before it stay.
    """
    state = PartialState()
    folder = Path(folder)
    wanted = source(model, images, split, layers, normalised)
    model.to(state.device)
    paths = _paths(folder, wanted.count)
    mine = []
    for i in range(state.process_index, len(paths), state.num_processes):
        if paths[i].exists():
            _check(paths[i], wanted)
        else:
            mine.append(i)
    for i in tqdm(mine, desc=f"features of {split}", unit="shard", disable=not (progress and state.is_main_process)):
        rows = images.images[i * SHARD_ROWS : (i + 1) * SHARD_ROWS]
        made = embed(model, rows, images.mean, images.std, wanted.layers, batch_size)
        if normalised:
            made = {layer: F.normalize(values) for layer, values in made.items()}
        storage.save(paths[i], KIND, made, asdict(wanted))
    state.wait_for_everyone()
    return wanted


@torch.no_grad()
def embed(
    model: models.ContrastiveModel,
    images: Images,
    mean: Sequence[float] | torch.Tensor,
    std: Sequence[float] | torch.Tensor,
    layers: Sequence[str] = ("output",),
    batch_size: int = 256,
    perturb: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Features (n, d) float32, on the CPU, of images (n, 3, h, w) uint8, by layer; computed in eval mode.

    Args:
        mean, std: of the data set's channels, for images in [0, 1].
        perturb: what becomes of the normalised images (b, 3, h, w) float32, batch after batch in their order.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    try:
        for start in range(0, len(images), batch_size):
            inputs = normalise(images[start : start + batch_size].to(device), mean, std)
            made = model(inputs if perturb is None else perturb(inputs))
            for layer in layers:
                parts[layer].append(getattr(made, layer).float().cpu())
    finally:
        model.train(was_training)
    return {layer: torch.cat(values) for layer, values in parts.items()}


def normalise(
    images: torch.Tensor, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """uint8 images (n, 3, h, w) as float32 of about mean 0 and standard deviation 1 in each channel."""
    shift, scale = (torch.as_tensor(v, dtype=torch.float32, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images.float() / 255 - shift) / scale


def shards(folder: str | Path, layer: str, wanted: Source) -> Iterator[torch.Tensor]:
    """The features of one layer, a shard (rows, d) float32 at a time, in the order of the images.

    Raises:
        FileNotFoundError: a shard is missing; `extract` computes it.
        ValueError: the folder holds other features than `wanted`, or not those of `layer`.
    """
    if layer not in wanted.layers:
        raise ValueError(f"{folder} has the layers {', '.join(wanted.layers)}, not {layer!r}.")
    paths = _paths(Path(folder), wanted.count)
    for path in paths:
        _check(path, wanted)
    for path in paths:
        yield storage.load(path, KIND)[0][layer]


def load(folder: str | Path, layer: str, wanted: Source) -> torch.Tensor:
    """The features of one layer as one tensor (count, d) float32; raises as `shards`."""
    result: torch.Tensor | None = None
    start = 0
    for part in shards(folder, layer, wanted):
        if result is None:
            result = part.new_empty(wanted.count, part.shape[1])
        result[start : start + len(part)] = part
        start += len(part)
    assert result is not None
    assert start == wanted.count
    return result


def _paths(folder: Path, count: int) -> list[Path]:
    number = -(-count // SHARD_ROWS)
    return [folder / f"{i:05d}-of-{number:05d}.safetensors" for i in range(number)]


def _check(path: Path, wanted: Source) -> None:
    there: dict[str, Any] = storage.read_header(path, KIND)
    now = asdict(wanted) | {"layers": list(wanted.layers)}  # as JSON has it
    changed = [f"{k}: {there.get(k)!r} there, {now[k]!r} wanted" for k in now if there.get(k) != now[k]]
    if changed:
        raise ValueError(
            f"{path} holds other features ({'; '.join(changed)}). Choose another folder, or delete this one to "
            "compute them anew."
        )
