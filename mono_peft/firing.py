"""Where and how often the units of adapters fire on a sequence of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .experts import MonoLoraExpertsProjection, Routing
from .layer import MonoLoraLayer


class Firing(NamedTuple):
    """Where an adapter acts first on a prompt: first in the order of computation."""

    module: str
    unit: int
    token: int  # position in the prompt and the response behind it, from 0
    token_id: int


class Watch:
    """Notes, in the passes over a sequence, where latents are not exactly zero."""

    def start(self, sequence: torch.Tensor) -> None:
        """Forget all, and expect passes over (1, tokens), or over parts of it, in order."""
        self.sequence = sequence[0]
        self.end = 0  # tokens of the passes so far
        self.pairs = self.pairs_fired = 0
        self.first: Firing | None = None

    def note_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Follow the position: a hook of the model, before its forward pass."""
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.end += ids.shape[1]

    def note(self, name: str, latents: torch.Tensor, tokens: torch.Tensor, num_tokens: int) -> None:
        """Note a module's latents (rows, r), whose row i is of the token `tokens[i]` of the last `num_tokens`."""
        fires = latents != 0  # also NaN
        self.pairs += num_tokens
        if not fires.any():
            return
        row, unit = fires.nonzero()[0].tolist()
        self.pairs_fired += len(tokens[fires.any(1)].unique())
        if self.first is None:
            position = self.end - num_tokens + int(tokens[row])
            self.first = Firing(name, unit, position, int(self.sequence[position]))


@contextmanager
def watched(model: Any, layers: list[tuple[str, MonoLoraLayer, str]]) -> Iterator[Watch]:
    """Attach a `Watch` to the activations of the layers."""
    watch = Watch()
    watch.start(torch.zeros(1, 0, dtype=torch.int64))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    handles = [base.register_forward_pre_hook(watch.note_pass, with_kwargs=True)]
    for name, layer, adapter in layers:
        activation = layer.monolora_activation[adapter]
        if isinstance(layer, MonoLoraExpertsProjection):
            hook, note_routing = _routed_hook(watch, name)
            handles.append(layer.register_forward_pre_hook(note_routing))
        else:
            hook = _row_hook(watch, name, layer, adapter)
        handles.append(activation.register_forward_hook(hook))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _row_hook(watch: Watch, name: str, layer: MonoLoraLayer, adapter: str) -> Callable[..., None]:
    invocations = layer.monolora_invocations.get(adapter)

    def hook(module: nn.Module, args: Any, latents: torch.Tensor) -> None:
        if invocations is not None:  # an activated adapter, which adds nothing before its invocation tokens
            latents = invocations.masked(adapter, latents)
        rows = latents.flatten(0, -2)
        watch.note(name, rows, torch.arange(len(rows), device=rows.device), len(rows))

    return hook


def _routed_hook(watch: Watch, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """A hook of the activation, and one of the layer that tells it the routing before."""
    routing: Routing

    def note_routing(module: nn.Module, args: Any) -> None:
        nonlocal routing
        _, routing = args

    def hook(module: nn.Module, args: Any, latents: torch.Tensor) -> None:
        watch.note(name, latents, routing.tokens, routing.num_tokens)

    return hook, note_routing
