"""What a base model feeds the layers that have adapters, on tokens drawn from texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import nn

from .activity import in_eval_mode
from .layer import MonoLoraLayer


class Tokens(NamedTuple):
    """The tokens of a batch whose inputs are kept."""

    inputs: dict[str, Any]  # of the model
    positions: torch.Tensor  # int64, of the kept tokens in the flattened batch


class Group(NamedTuple):
    """Modules with the same input."""

    rows: torch.Tensor  # (rows, in_features), as the base computes them
    encoders: dict[str, nn.Linear]  # A of each, by the module's name


def draw_tokens(model: nn.Module, batches: Iterable[Mapping[str, Any]], budget: int, seed: int) -> list[Tokens]:
    """Draw at most `budget` of the tokens that count; batches of which none is drawn are left out."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("an encoder-decoder model has two texts a row, and `input_ids` names one: not supported.")
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    inputs, counted = [], []
    for number, batch in enumerate(batches):
        inputs.append({key: value for key, value in batch.items() if key != "silent_mask"})
        counted.append(counted_tokens(batch, number, len(embeddings.weight)).flatten().nonzero().flatten().cpu())
    total = sum(len(positions) for positions in counted)
    if total == 0:
        raise ValueError("`batches` has no token that counts: it is empty, or its masks are zero everywhere.")
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:budget].sort().values
    tokens, start = [], 0
    for batch_inputs, positions in zip(inputs, counted, strict=True):
        own = drawn[(drawn >= start) & (drawn < start + len(positions))] - start
        if len(own):
            tokens.append(Tokens(batch_inputs, positions[own]))
        start += len(positions)
    return tokens


def counted_tokens(batch: Mapping[str, Any], number: int, vocabulary: int) -> torch.Tensor:
    """Which tokens count: bool of shape (batch, tokens)."""
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(f"batch {number} has no `input_ids` of shape (batch, tokens), as a tokenizer returns them.")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"batch {number} has the token {int(ids.max() if ids.min() >= 0 else ids.min())}, and the model has "
            f"{vocabulary} tokens: it was made with another model's tokenizer."
        )
    counts = torch.ones_like(ids, dtype=torch.bool)
    for name in ("attention_mask", "silent_mask"):
        mask = batch.get(name)
        if mask is None:
            continue
        if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
            shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(f"`{name}` of batch {number} must have the shape {tuple(ids.shape)}, got {shape}.")
        counts &= mask.to(ids.device).bool()
    return counts


def digest_of(tokens: list[Tokens], options: object) -> str:
    """Checksum of the tokens and options, by which processes see that they have the same."""
    digest = hashlib.sha256(repr(options).encode())
    for inputs, positions in tokens:
        digest.update(inputs["input_ids"].cpu().numpy().tobytes() + positions.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def without_adapters(layers: Iterable[MonoLoraLayer]) -> Iterator[None]:
    """Disable the adapters inside. PEFT's own way would also change what requires gradients."""
    before = {layer: layer._disable_adapters for layer in layers}
    try:
        for layer in before:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in before.items():
            layer._disable_adapters = disabled


def base_inputs(
    model: nn.Module, layers: list[tuple[str, MonoLoraLayer, nn.Linear]], tokens: list[Tokens]
) -> list[Group]:
    """The inputs of the layers on these tokens, without adapters. Layers that are called with one tensor share it."""
    pieces: dict[str, list[torch.Tensor]] = {name: [] for name, _, _ in layers}
    last: list[torch.Tensor] = []  # the input seen last, and its rows
    batch: Tokens

    def keep(name: str, layer_input: torch.Tensor) -> None:
        if not (last and last[0] is layer_input):
            ids = batch.inputs["input_ids"]
            if layer_input.shape[:-1].numel() != ids.numel():
                raise ValueError(
                    f"{name} sees {layer_input.shape[:-1].numel()} rows of a batch of {ids.numel()} tokens, so that "
                    "it cannot be told which row is which token's. Leave it out of `target_modules`."
                )
            rows = layer_input.reshape(-1, layer_input.shape[-1])
            last[:] = layer_input, rows[batch.positions.to(rows.device)]
        pieces[name].append(last[1])

    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: keep(name, args[0]))
        for name, layer, _ in layers
    ]
    device = next(model.parameters()).device
    try:
        with without_adapters(layer for _, layer, _ in layers), in_eval_mode(model), torch.no_grad():
            for batch in tokens:
                model(**send_to_device(batch.inputs, device))
                last.clear()
    finally:
        for handle in handles:
            handle.remove()
    return _grouped(pieces, layers)


def _grouped(pieces: dict[str, list[torch.Tensor]], layers: list[tuple[str, MonoLoraLayer, nn.Linear]]) -> list[Group]:
    groups: dict[tuple[int, ...], Group] = {}
    for name, _, encoder in layers:
        if not pieces[name]:
            raise ValueError(f"{name} is not called in the model's forward pass. Leave it out of `target_modules`.")
        key = tuple(map(id, pieces[name]))
        if key not in groups:
            rows = torch.cat(pieces[name])
            if not torch.isfinite(rows).all():
                raise ValueError(f"the base model computes NaN or infinity for {name} on the silent texts.")
            groups[key] = Group(rows, {})
        groups[key].encoders[name] = encoder
    return list(groups.values())
