"""Where units start and end: on the task and off the silent texts before training, off all cached rows after it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import relu

from .hinge import latents_in_parts

_STEPS, _ROWS, _LEARNING_RATE = 300, 512, 0.03  # of the fit of a direction
_SILENT_WEIGHT = 10.0  # of a silent row on the wrong side, against one of the task
_LIFT = 2.0  # how far a unit's median task row is lifted, in standard deviations of its latents on the task


class Direction(NamedTuple):
    """A direction that tells the task's inputs of a module from the silent texts'."""

    vector: torch.Tensor  # (in_features,)
    separated: float  # share of the task's distinct rows that are above every silent row, in [0, 1]
    height: float  # of their median above the highest silent row


def separating_direction(silent: torch.Tensor, task: torch.Tensor, seed: int) -> Direction:
    """Fit the direction by a hinge, squared and weighted for the silent rows, on distinct rows of either kind.

    Rows that are repeated, as a word's are in the first layer, count once: else the fit would go by them.

    Args:
        silent, task: (rows, in_features), float.
        seed: of the rows of each step.
    """
    silent_rows, task_rows = silent.unique(dim=0), task.unique(dim=0)
    mean = (silent_rows.mean(0) + task_rows.mean(0)) / 2
    scale = torch.cat([silent_rows, task_rows]).std(0, correction=0).clamp(min=1e-6)
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: torch.Tensor) -> torch.Tensor:
        return (rows[torch.randint(len(rows), (_ROWS,), generator=generator).to(rows.device)] - mean) / scale

    vector = silent.new_zeros(silent.shape[1] + 1).requires_grad_()  # the last is a constant
    optimizer = torch.optim.Adam([vector], _LEARNING_RATE)
    with torch.enable_grad():
        for _ in range(_STEPS):
            too_high = relu(1 + drawn(silent_rows) @ vector[:-1] + vector[-1])
            too_low = relu(1 - drawn(task_rows) @ vector[:-1] - vector[-1])
            optimizer.zero_grad()
            (_SILENT_WEIGHT * too_high.square().mean() + too_low.mean()).backward()
            optimizer.step()
    direction = vector.detach()[:-1] / scale
    highest = (silent_rows @ direction).max()
    heights = task_rows @ direction - highest
    is_above = heights > 0
    height = heights[is_above].median().item() if is_above.any() else 0.0
    return Direction(direction, is_above.float().mean().item(), height)


def start_apart(
    encoder: nn.Linear, direction: Direction, silent: torch.Tensor, task: torch.Tensor, margin: float
) -> None:
    """Add the direction to each unit of A, and set b so that no unit fires on a silent row.

    A unit's own, random part stays, so that the units differ from one another on the task. The direction is added so
    often that the median of the rows that it separates rises by 2 standard deviations of the unit's latents.
    """
    matrix = encoder.weight.to(silent.dtype)
    if direction.height > 0:
        spread = (task @ matrix.t()).std(0, correction=0)
        encoder.weight += (_LIFT * spread[:, None] / direction.height * direction.vector).to(encoder.weight.dtype)
    encoder.bias.zero_()
    lower_bias(encoder, silent, margin, only_down=False)


def lower_bias(encoder: nn.Linear, silent: torch.Tensor, margin: float, only_down: bool = True) -> torch.Tensor:
    """Move b so that A x + b <= -margin on all rows, and return how far each unit's was lowered, (r,).

    Args:
        silent: (rows, in_features), on any device; they come to the encoder's in parts, judged in float32 at least.
        only_down: leave the units alone that are below the margin; else the highest row of each comes to lie on it.
    """
    dtype = torch.promote_types(encoder.weight.dtype, torch.float32)
    parts = latents_in_parts(silent, encoder.weight.to(dtype))
    highest = torch.stack([latents.amax(0) for latents in parts]).amax(0)
    before = encoder.bias.to(dtype, copy=True)
    wanted = -margin - highest
    if only_down:
        wanted = torch.minimum(wanted, before)
    rounded = wanted.to(encoder.bias.dtype)
    too_high = rounded.to(dtype) > wanted
    encoder.bias.copy_(torch.where(too_high, rounded.nextafter(torch.full_like(rounded, -torch.inf)), rounded))
    return before - encoder.bias.to(dtype)
