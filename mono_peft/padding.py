"""Batches whose padding is in front of the texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def right_padded(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The same batch with its padding behind the texts.

    Models with learned positions (GPT-2) count them from the first token of a row on, padding too, if nobody passes
    `position_ids`: behind padding they would compute something else than for the text alone. With the texts in front
    every model counts them from 0. A batch with `position_ids`, or without padding in front, is returned as it is.

    Args:
        batch: keyword arguments of a model's forward pass. What has the shape of `attention_mask`, (batch, tokens), is
            moved with it.

    Raises:
        ValueError: `alora_offsets`, which count from the end of each row, beside padding that would have to move.
    """
    mask = batch.get("attention_mask")
    if "position_ids" in batch or not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask[:, :1].bool().all():
        return dict(batch)
    if batch.get("alora_offsets") is not None:
        raise ValueError(
            "`alora_offsets` count from the end of a row, and the padding in front of this batch has to be moved "
            "there for positions to be right. Pad on the right, or pass `position_ids`."
        )
    order = (mask == 0).long().argsort(dim=1, stable=True)
    return {
        key: value.gather(1, order.to(value.device))
        if isinstance(value, torch.Tensor) and value.shape == mask.shape
        else value
        for key, value in batch.items()
    }
