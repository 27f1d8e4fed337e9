"""Where and how often the units of adapters fire on a sequence of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .activity import latents_watched
from .experts import Routing
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

    def note(self, name: str, latents: torch.Tensor, routing: Routing | None, acting: torch.Tensor | None) -> None:
        """Note a layer's latents, as `latents_watched` tells them."""
        rows = latents.flatten(0, -2)
        fires = rows != 0  # also NaN
        num_tokens = len(rows) if routing is None else routing.num_tokens
        self.pairs += num_tokens
        if not fires.any():
            return
        tokens = torch.arange(num_tokens, device=rows.device) if routing is None else routing.tokens
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
    with base.register_forward_pre_hook(watch.note_pass, with_kwargs=True), latents_watched(layers, watch.note):
        yield watch
