"""The hinge that keeps A x below zero on rows, and its gradient in closed form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from .sharded import whole

_PART = 2**26  # numbers of rows, or of their latents, that are computed with at a time


class Hinge(NamedTuple):
    """The hinge of a module on the rows of a step."""

    gradients: list[torch.Tensor]  # of the weighted hinge, for A (r, in) and, where there is one, b (r,)
    mean: torch.Tensor  # over rows and units, without the weight
    fired: torch.Tensor  # share of the rows on which a unit fires or is NaN


def hinges_of(rows: torch.Tensor, encoders: list[nn.Linear], weight: float, margin: float) -> list[Hinge]:
    """The hinges weight * mean of relu(A x + b + margin) over rows x and units, of modules with the same inputs.

    Args:
        rows: (rows, in_features), on any device.
        encoders: A and, where it has one, b of each module, (r, in_features) and (r,); of FSDP's shards too.
    """
    matrices = [whole(encoder.weight) for encoder in encoders]
    units = [len(matrix) for matrix in matrices]
    dtype, device = torch.promote_types(matrices[0].dtype, torch.float32), matrices[0].device
    x = rows.to(device, dtype)
    latents = torch.cat(matrices).to(dtype) @ x.t()  # (units of all modules, rows)
    for encoder, latent in zip(encoders, latents.split(units), strict=True):
        if encoder.bias is not None:
            latent += whole(encoder.bias).to(dtype)[:, None]
    above = (latents + margin).clamp_(min=0)
    counted = (above > 0).to(dtype)
    parts = (tensor.split(units) for tensor in (above, latents, counted @ x, counted))
    hinges = []
    for encoder, hinge, latent, gradient, count in zip(encoders, *parts, strict=True):
        factor = weight / hinge.numel()
        gradients = [gradient.mul_(factor)] + ([] if encoder.bias is None else [count.sum(1).mul_(factor)])
        hinges.append(Hinge(gradients, hinge.mean(), (~(latent <= 0)).any(0).float().mean()))
    return hinges


def latents_in_parts(
    rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """A x + b of all cached rows x, (rows, r) in parts, in the dtype and on the device of A.

    Args:
        rows: (rows, in_features), of any dtype and on any device; a part of them is there as A's dtype, no more.
        matrix, bias: A (r, in_features) and b (r,).
    """
    for part in rows.split(max(1, _PART // max(matrix.shape))):
        yield linear(part.to(matrix.device, matrix.dtype), matrix, bias)
