"""sigma of `activation="topk"`: of the positive latents of a token, the k largest stay, all others become zero."""

from __future__ import annotations

import torch
from torch import nn


class TopK(nn.Module):
    """Keep the k largest latents of each position where they are positive, and make all others exactly zero.

    Of equal latents for which not all of k places are left, those of the lowest index stay, on every device. Where all
    latents are zero or negative, all become zero. A latent that is NaN stays, so that it does not go unseen.

    Args:
        k: positive.
        dim: of the latents that counts the units, negative.
    """

    def __init__(self, k: int, dim: int = -1) -> None:
        super().__init__()
        self.k, self.dim = k, dim

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of any shape and float dtype, with the gradient of those that stay."""
        return torch.relu(latents).masked_fill(~self.kept(latents.detach()), 0)

    def kept(self, latents: torch.Tensor) -> torch.Tensor:
        """Bool of the same shape, the k largest of each position, whether they are positive or not."""
        k = min(self.k, latents.shape[self.dim])
        least = latents.topk(k, self.dim).values.select(self.dim, k - 1).unsqueeze(self.dim)
        above = ~(latents <= least)  # also NaN
        equal = latents == least
        left = k - above.sum(self.dim, keepdim=True)
        return above | (equal & (equal.cumsum(self.dim) <= left))

    def extra_repr(self) -> str:
        return f"k={self.k}"
