"""What units write, read through the unembedding, and which units are alike.

A unit whose layer writes to the residual stream adds s b l to it, l being its latent. Were nothing between, the logits
would change by W (N(h + s b l) - N(h)), W the unembedding and N the final norm (the logit lens, nostalgebraist 2020).
N is taken as linear around a residual h of usual size: it divides by that size, and by nothing that depends on b.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .layer import MonoLoraLayer
from .stream import Stream

_LARGE = 1e4  # a length beside which a norm's epsilon is nothing
_CELLS = 2**25  # numbers of one piece of a product, 128 MiB


class LogitChanges(NamedTuple):
    """The tokens whose logits units change most; each (units, tokens), sorted by size."""

    raised: torch.Tensor  # int64, token ids
    raised_by: torch.Tensor  # float32, at a latent of 1
    lowered: torch.Tensor
    lowered_by: torch.Tensor  # negative


class Unembedding:
    """The final norm and the unembedding of a model, linear around residuals of the size that was measured."""

    def __init__(self, model: Any, stream: Stream) -> None:
        head = model.get_output_embeddings()
        self.head: Any = head.get_base_layer() if isinstance(head, MonoLoraLayer) else head
        self.norm = stream.final_norm
        weight = self.head.weight
        self.device, self.dtype = weight.device, weight.dtype if weight.is_floating_point() else torch.float32
        self.sizes: list[float] = []  # of the residuals of each batch
        self.centres = False  # whether the norm takes the mean of a vector away
        if self.norm is not None:
            ones = torch.full((1, weight.shape[-1]), _LARGE, device=self.device, dtype=self.dtype)
            self.centres = bool(self._normed(ones).abs().max() < 1e-2)

    @contextmanager
    def measuring(self, model: nn.Module) -> Iterator[None]:
        """Measure the size of the residuals in the passes inside: the root of the mean square, as the norm has it."""
        if self.norm is None:
            yield
            return
        masks: list[torch.Tensor] = []

        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            masks[:] = [kwargs["attention_mask"]]

        def measure(module: nn.Module, args: Any) -> None:
            kept = args[0].detach().float()[masks[0].to(args[0].device).bool()]
            self.sizes.append(float(self._size(kept).mean()))

        with model.register_forward_pre_hook(keep, with_kwargs=True), self.norm.register_forward_pre_hook(measure):
            yield

    def _size(self, vectors: torch.Tensor) -> torch.Tensor:
        """The root of the mean square of each vector, around its mean where the norm takes that away."""
        if self.centres:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        return vectors.square().mean(-1, keepdim=True).sqrt()

    @torch.no_grad()
    def _normed(self, vectors: torch.Tensor) -> torch.Tensor:
        """N(vectors) - N(0), without what the norm adds to each."""
        assert self.norm is not None
        zeros = torch.zeros_like(vectors[:1])
        normed: torch.Tensor = self.norm(vectors) - self.norm(zeros)
        return normed

    @torch.no_grad()
    def changes(self, vectors: torch.Tensor, tokens: int) -> LogitChanges:
        """The tokens whose logits change most where these are added to the residual stream.

        Args:
            vectors: (n, hidden).
            tokens: how many of each side.
        """
        pieces = []
        vocabulary = self.head.weight.shape[0]
        for piece in vectors.to(self.device).float().split(max(1, _CELLS // vocabulary)):
            if self.norm is not None:
                size = self._size(piece)
                long = (piece / size.clamp(min=1e-30) * _LARGE).to(self.dtype)
                piece = self._normed(long).float() * size / (sum(self.sizes) / len(self.sizes))
            # Scaled to a size at which no dtype under- or overflows.
            length = piece.abs().amax(-1, keepdim=True).clamp(min=1e-30)
            logits = self.head((piece / length).to(self.dtype)).float()
            if getattr(self.head, "bias", None) is not None:
                logits = logits - self.head.bias.float()
            logits = logits * length
            highest, lowest = logits.topk(tokens), logits.topk(tokens, largest=False)
            pieces.append((highest.indices, highest.values, lowest.indices, lowest.values))
        return LogitChanges(*(torch.cat(part).cpu() for part in zip(*pieces, strict=True)))


@torch.no_grad()
def nearest(vectors: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors of largest cosine to each, but for itself.

    Args:
        vectors: (n, size).
        count: how many; fewer where there are not so many others.

    Returns:
        (n, count) int64, their rows; (n, count) float32, the cosines, sorted.
    """
    unit = nn.functional.normalize(vectors.float(), dim=-1)
    count = min(count, len(unit) - 1)
    rows = torch.arange(len(unit), device=unit.device)
    found = []
    for piece in rows.split(max(1, _CELLS // len(unit))):
        cosines = unit[piece] @ unit.T
        cosines[torch.arange(len(piece), device=unit.device), piece] = -2
        found.append(cosines.topk(count))
    return torch.cat([part.indices for part in found]).cpu(), torch.cat([part.values for part in found]).cpu()
