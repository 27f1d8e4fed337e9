"""sigma of `activation="topk"`: of the positive latents of a token, the k largest stay, all others become zero."""

from __future__ import annotations

import torch
from torch import nn


class TopK(nn.Module):
    """Keep the k largest latents of each position where they are positive, and make all others exactly zero.

    Of equal latents for which not all of k places are left, those of the lowest index stay, on every device. Where all
    latents are zero or negative, all become zero. A latent that is NaN counts as the largest, so that it does not go
    unseen.

    Args:
        k: positive.
        dim: of the latents that counts the units, negative.
    """

    def __init__(self, k: int, dim: int = -1) -> None:
        super().__init__()
        self.k, self.dim = k, dim

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of any shape and float dtype, with the gradient of those that stay."""
        if self.dim != -1 or not is_eager_on_cpu(latents):
            return torch.relu(latents).masked_fill(~_kept(latents.detach(), self.k, self.dim), 0)
        values, units = largest(latents, self.k)
        return torch.zeros_like(latents).scatter(-1, units, torch.relu(values))

    def extra_repr(self) -> str:
        return f"k={self.k}"


def is_eager_on_cpu(latents: torch.Tensor) -> bool:
    """Whether a branch in Python may depend on values, and does not make a GPU wait."""
    return (
        latents.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def largest(latents: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest latents (..., k) of the last dimension, of either sign, and the units (..., k) that they are of.

    torch does not say which of equal numbers it takes. Where that matters, which is rare, `_kept` chooses.
    """
    r = latents.shape[-1]
    k = min(k, r)
    values, units = latents.topk(min(k + 1, r), -1)
    if k == r:
        return values, units
    values, next_value, units = values[..., :k], values[..., k], units[..., :k]
    tied = (values[..., -1] == next_value) & (next_value > 0)
    if tied.any():
        units = units.clone()
        units[tied] = _kept(latents.detach()[tied], k, -1).nonzero()[:, 1].view(-1, k)
        values = latents.gather(-1, units)
    return values, units


def _kept(latents: torch.Tensor, k: int, dim: int) -> torch.Tensor:
    """Bool of the same shape: the k largest of each position, of either sign, of equal ones those of lowest index."""
    k = min(k, latents.shape[dim])
    least = latents.topk(k, dim).values.select(dim, k - 1).unsqueeze(dim)
    above = ~(latents <= least)  # also NaN
    equal = latents == least
    left = k - above.sum(dim, keepdim=True)
    return above | (equal & (equal.cumsum(dim) <= left))
