"""Weights that FSDP2 has cut up over processes."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Replicate


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether a process has a shard of the tensor only."""
    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, put together from its shards where it has some; then every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of a tensor that every process has whole, the shard that `other` has of its own."""
    if not isinstance(other, DTensor):
        return tensor
    replicated = DTensor.from_local(tensor, other.device_mesh, [Replicate()] * other.device_mesh.ndim, run_check=False)
    return replicated.redistribute(placements=other.placements)
