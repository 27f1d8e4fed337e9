"""Single units of an adapter: switched off or scaled for a while, or taken out of it for good.

Unit i of a layer is row i of A with column i of B: it adds s b_i sigma(a_i x) to the layer's output.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from .activity import active_adapters
from .config import MonoLoraConfig
from .experts import MonoLoraExpertsProjection
from .layer import MonoLoraEmbedding, MonoLoraLayer
from .loading import adapter_tensors
from .names import PREFIX
from .state_dicts import check_finite
from .targets import listed

_PEFT_PREFIX = "base_model.model."  # of the names in a PeftModel and in files; a unit may be named without it
_ENCODER, _ENCODER_BIAS, _DECODER = f".{PREFIX}encoder.weight", f".{PREFIX}encoder.bias", f".{PREFIX}decoder.weight"
_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Unit(NamedTuple):
    """One latent of an adapted layer."""

    module: str  # name of the layer in the model, such as "base_model.model.model.layers.0.mlp.up_proj"
    index: int  # type: ignore[assignment]  # 0 to r - 1; under fused experts unit i of expert e is e * r + i


class _Layout(Enum):
    """Where A and B of a kind of layer keep their units."""

    ROWS = "rows"  # A is (r, in, *kernel), B (out, r, ...)
    TABLE = "table"  # A is (tokens, r), B (out, r)
    EXPERTS = "experts"  # A is (experts, r, in), B (experts, out, r)

    def fits(self, encoder: torch.Size, decoder: torch.Size, r: int) -> bool:
        """Whether A and B of these shapes may be of this kind."""
        if self is _Layout.EXPERTS:
            return len(encoder) == len(decoder) == 3 and (decoder[0], r, decoder[2]) == (encoder[0], encoder[1], r)
        of_encoder = encoder[0] if self is _Layout.ROWS else encoder[-1] if len(encoder) == 2 else None
        return of_encoder == r and decoder[1] == r and all(length == 1 for length in decoder[2:])

    def places(self, indices: torch.Tensor, r: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What A and B are indexed by to get the units `indices`, (n,) int64."""
        every = slice(None)
        if self is _Layout.EXPERTS:
            experts, within = indices // r, indices % r
            return (experts, within), (experts, every, within)
        return (indices,) if self is _Layout.ROWS else (every, indices), (every, indices)


@contextmanager
def ablated(model: nn.Module, units: Iterable[Unit], adapter_name: str | None = None) -> Iterator[None]:
    """Switch units off inside: the model is the one that `prune` would write without them:

        with ablated(model, [Unit("base_model.model.model.layers.0.self_attn.q_proj", 3)]):
            loss = model(**batch).loss

    Inside, the units' rows of A and columns of B are zero; afterwards, also after an error, they hold the bits that
    they held before, so that what an optimizer does to them inside is undone. Whatever computes the model sees it:
    fused, quantised, compiled, with an adapter for each row. A backward pass has to end inside as well, or autograd
    raises. With `activation="topk"` the next largest latents take the places of the units; `scaled` by 0 keeps these
    places empty.

    Args:
        model: with a MonoLoRA adapter.
        units: of which each is switched off; the module may be named without "base_model.model.".
        adapter_name: of the adapter that they are of; None: of the only active one.

    Raises:
        ValueError: a unit or the adapter does not exist, several adapters are active and none is named, or weights
            are sharded or offloaded.
    """
    with _changed(model, units, adapter_name, lambda kept: torch.zeros_like(kept), also_encoder=True):
        yield


@contextmanager
def scaled(model: nn.Module, units: Iterable[Unit], factor: float, adapter_name: str | None = None) -> Iterator[None]:
    """Multiply what units add to their layers' outputs by `factor` inside, by their columns of B.

    Args:
        model, units, adapter_name: as of `ablated`, and so is what holds inside and afterwards.
        factor: a finite number; 0 adds nothing, -1 the opposite.

    Raises:
        ValueError: as `ablated`, or the factor is not finite.
    """
    if isinstance(factor, bool) or not isinstance(factor, Real) or not math.isfinite(factor):
        raise ValueError(f"`factor` must be a finite number, got {factor!r}.")
    with _changed(model, units, adapter_name, lambda kept: kept * float(factor), also_encoder=False):
        yield


@contextmanager
def _changed(
    model: nn.Module, units: Iterable[Unit], adapter_name: str | None, change: Any, also_encoder: bool
) -> Iterator[None]:
    layers, adapter = _layers_of(model, adapter_name)
    indices_by_module = _checked(units, {name: _number_of_units(layer, adapter) for name, layer in layers.items()})
    parts: list[tuple[torch.Tensor, tuple[Any, ...], torch.Tensor]] = []
    for name, indices in indices_by_module.items():
        layer = layers[name]
        encoder: Any = layer.monolora_encoder[adapter]
        decoder: Any = layer.monolora_decoder[adapter]
        of_encoder, of_decoder = _layout_of(layer).places(torch.tensor(indices), layer.r[adapter])
        places = [(decoder.weight, of_decoder)]
        if also_encoder:
            bias = getattr(encoder, "bias", None)
            places += [(encoder.weight, of_encoder)] + ([] if bias is None else [(bias, of_encoder)])
        for parameter, place in places:
            _check_plain(name, parameter)
            parts.append((parameter, place, parameter.detach()[place].clone()))
    try:
        with torch.no_grad():
            for parameter, place, kept in parts:
                parameter[place] = change(kept)
        yield
    finally:
        with torch.no_grad():
            for parameter, place, kept in parts:
                parameter[place] = kept


def _layers_of(model: nn.Module, adapter_name: str | None) -> tuple[dict[str, MonoLoraLayer], str]:
    """The layers that have the adapter, by their names without PEFT's prefix, and the adapter's name."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile gave
    if adapter_name is None:
        names = {adapter for _, _, adapter in active_adapters(model)}
        if len(names) != 1:
            raise ValueError(
                f"the adapters {listed(names)} are active: say by `adapter_name` which one the units are of."
                if names
                else "the model has no active MonoLoRA adapter, whose units could be changed: load one with "
                "PeftModel.from_pretrained, enable it, or name it. LoRA's directions are units of none."
            )
        (adapter_name,) = names
    layers = {
        name.removeprefix(_PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, MonoLoraLayer) and adapter_name in module.monolora_encoder
    }
    if not layers:
        raise ValueError(f"the model has no MonoLoRA adapter {adapter_name!r}.")
    return layers, adapter_name


def _layout_of(layer: MonoLoraLayer) -> _Layout:
    if isinstance(layer, MonoLoraExpertsProjection):
        return _Layout.EXPERTS
    return _Layout.TABLE if isinstance(layer, MonoLoraEmbedding) else _Layout.ROWS


def _number_of_units(layer: MonoLoraLayer, adapter: str) -> int:
    experts = layer.num_experts if isinstance(layer, MonoLoraExpertsProjection) else 1
    return experts * layer.r[adapter]


def _check_plain(name: str, parameter: Any) -> None:
    if (
        type(parameter) is not nn.Parameter
        or hasattr(parameter, "ds_id")
        or parameter.is_meta
        or not parameter.numel()
    ):
        raise ValueError(
            f"the adapter's weights of {name} are sharded, offloaded or parametrised, so that single units of them "
            "are out of reach here: load the model on one device without FSDP or DeepSpeed."
        )


def _checked(units: Iterable[Unit], numbers: Mapping[str, int]) -> dict[str, list[int]]:
    """The indices of units by the names of their modules, without PEFT's prefix, each once and sorted.

    Raises:
        ValueError: a unit does not exist; `numbers` has the number of units of each module.
    """
    indices: dict[str, set[int]] = defaultdict(set)
    for unit in units:
        if not isinstance(unit, tuple) or len(unit) != 2 or not isinstance(unit[0], str):
            raise ValueError(f"`units` must be a list of Unit(module, index), got {unit!r} in it.")
        module, index = unit
        name = module.removeprefix(_PEFT_PREFIX)
        if name not in numbers:
            raise ValueError(f"the adapter has no module {module!r}; it has {listed(numbers)}.")
        if not isinstance(index, Integral) or isinstance(index, bool) or not 0 <= index < numbers[name]:
            raise ValueError(f"unit {index!r} of {module} does not exist: it has the units 0 to {numbers[name] - 1}.")
        indices[name].add(int(index))
    return {name: sorted(chosen) for name, chosen in indices.items()}


def prune(
    adapter: nn.Module | str | os.PathLike[str],
    units: Iterable[Unit],
    output: str | os.PathLike[str],
    adapter_name: str | None = None,
) -> None:
    """Write an adapter without these units, whose outputs are those of `ablated` to rounding:

        prune("my-adapter", units, "my-pruned-adapter")
        model = PeftModel.from_pretrained(base, "my-pruned-adapter")

    The rows of A and the columns of B go. The ranks that are left stand in `rank_pattern`, and in `alpha_pattern` what
    keeps each scale s as it was. The rank of a module is at least 1, with `activation="topk"` at least k, and that of
    fused experts is the largest of any expert; what is lacking is filled up with units of zeros, which add exactly
    nothing. The remaining units keep their order, and have new indices.

    Args:
        adapter: a model of PEFT with the adapter, or the adapter's folder or name on the hub.
        units: to leave out; as of `ablated`.
        output: the folder to write to, made if need be.
        adapter_name: of the adapter in the model; None: the only active one.

    Raises:
        ValueError: a unit does not exist, the adapter is not MonoLoRA's, cannot be read or holds NaN, its file does
            not tell what kind of layer a module is, or `output` holds an adapter already. Nothing is written then.
    """
    if (Path(output) / _FILES[0]).exists():
        raise ValueError(f"{output} holds an adapter already: name another folder.")
    if not isinstance(adapter, nn.Module):
        _prune_saved(str(adapter), units, Path(output), {})
        return
    layers, adapter_name = _layers_of(adapter, adapter_name)
    adapter = getattr(adapter, "_orig_mod", adapter)
    if not isinstance(adapter, PeftModel):
        raise ValueError(f"a {type(adapter).__name__} is no PeftModel, which knows how to save its adapter.")
    units = list(units)
    _checked(units, {name: _number_of_units(layer, adapter_name) for name, layer in layers.items()})
    with TemporaryDirectory() as folder:
        adapter.save_pretrained(folder, selected_adapters=[adapter_name])
        saved = folder if adapter_name == "default" else os.path.join(folder, adapter_name)
        _prune_saved(saved, units, Path(output), {name: _layout_of(layer) for name, layer in layers.items()})


def _prune_saved(adapter: str, units: Iterable[Unit], output: Path, layouts: Mapping[str, _Layout]) -> None:
    """`layouts` are those of a model's layers; where there is none, they are told by the shapes in the file."""
    config = MonoLoraConfig.from_pretrained(adapter)
    tensors = adapter_tensors(adapter)
    check_finite(tensors)
    keys = {k.removesuffix(_ENCODER).removeprefix(_PEFT_PREFIX): k for k in tensors if k.endswith(_ENCODER)}
    keys = {name: key.removesuffix(_ENCODER) for name, key in keys.items()}
    numbers, fitting = {}, {}
    for name, key in keys.items():
        shapes = tensors[key + _ENCODER].shape, tensors[key + _DECODER].shape
        rank = config.rank_and_scale(name)[0]
        fitting[name] = [layouts[name]] if name in layouts else [kind for kind in _Layout if kind.fits(*shapes, rank)]
        if not fitting[name]:
            raise ValueError(f"the weights of {name} in {adapter} do not fit its configuration, by which r is {rank}.")
        numbers[name] = shapes[0][0] * rank if fitting[name] == [_Layout.EXPERTS] else rank
    ranks, alphas = {}, {}
    for name, indices in _checked(units, numbers).items():
        if len(fitting[name]) > 1:
            raise ValueError(
                f"the shapes in {adapter} do not tell whether {name} is a linear layer or an embedding of as many "
                "tokens as its r: load the adapter on its base, and give `prune` the model."
            )
        rank, scale = config.rank_and_scale(name)
        pattern = f"^{re.escape(name)}"
        ranks[pattern] = new = _take_out(tensors, keys[name], fitting[name][0], set(indices), rank, config.k or 1)
        alphas[pattern] = scale * (math.sqrt(new) if config.use_rslora else new)
    # The first pattern that matches a name counts.
    config.rank_pattern = ranks | {k: v for k, v in config.rank_pattern.items() if k not in ranks}
    config.alpha_pattern = alphas | {k: v for k, v in config.alpha_pattern.items() if k not in alphas}
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / _FILES[1], metadata={"format": "pt"})
    config.save_pretrained(str(output))  # last: a folder without it is no adapter


def _take_out(
    tensors: dict[str, torch.Tensor], key: str, layout: _Layout, indices: set[int], rank: int, least: int
) -> int:
    """Take units out of the tensors of a module, whose names start with `key`; return its new rank."""
    dims = {_ENCODER: 1 if layout is _Layout.TABLE else 0, _ENCODER_BIAS: 0, _DECODER: 1}
    experts = len(tensors[key + _ENCODER]) if layout is _Layout.EXPERTS else 1
    kept = [[i for i in range(rank) if expert * rank + i not in indices] for expert in range(experts)]
    new = max(least, *map(len, kept))
    for name, dim in dims.items():
        if key + name not in tensors:
            continue
        tensor = tensors[key + name]
        if layout is _Layout.EXPERTS:
            parts = [_selected(part, dim, chosen, new) for part, chosen in zip(tensor, kept, strict=True)]
            tensors[key + name] = torch.stack(parts)
        else:
            tensors[key + name] = _selected(tensor, dim, kept[0], new)
    return new


def _selected(tensor: torch.Tensor, dim: int, indices: list[int], length: int) -> torch.Tensor:
    """The slices `indices` of a dimension, and slices of zeros behind them up to `length`."""
    shape = [*tensor.shape]
    shape[dim] = length
    result = tensor.new_zeros(shape)
    result.narrow(dim, 0, len(indices)).copy_(tensor.index_select(dim, torch.tensor(indices, dtype=torch.int64)))
    return result
