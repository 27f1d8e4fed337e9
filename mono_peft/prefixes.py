"""Tokens with the same inputs: in a causal model those with the same prefix, the text up to them and with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

_NUMBER_BITS = 128
_COUNTED = 4096  # numbers that an estimate is made of

_TEXT_KEYS = {"input_ids", "attention_mask", "silent_mask"}


def is_causal(model: nn.Module) -> bool:
    """Whether what a module sees at a token is known to depend on the tokens up to it alone.

    It is known where the model has attention layers that say so of themselves, as transformers' do, and all do. Rotary
    embeddings of the kinds "dynamic" and "longrope" are left out: they turn a token of a long text by other angles
    than one of a short text.
    """
    attentions = [module for module in model.modules() if hasattr(module, "is_causal")]
    configs = (getattr(attention, "config", None) for attention in attentions)
    kinds = (getattr(module, "rope_type", None) for module in model.modules())
    return (
        bool(attentions)
        and all(attention.is_causal for attention in attentions)
        and all(getattr(config, "is_causal", True) for config in configs)  # False makes transformers' masks two-sided
        and not any("dynamic" in repr(kind) or "longrope" in repr(kind) for kind in kinds)
    )


def is_text_only(batch: Mapping[str, Any]) -> bool:
    """Whether rows of a batch differ in their tokens and masks alone, and not in positions, images or the like."""
    return batch.keys() <= _TEXT_KEYS


def prefix_numbers(batch: Mapping[str, Any], counted: torch.Tensor, seed: int) -> Iterator[int]:
    """A number of each counted token of a batch padded on the right, in the order of the flattened batch.

    It is a 128-bit hash (BLAKE2b) of its row up to it, keyed by the seed: the same for the same prefix in whatever
    batch, and uniform from 0 to 2^128 - 1 otherwise. Tokens that are not attended to, inside of a row, are a part of
    the prefix as gaps.

    Args:
        batch: with `input_ids` and, perhaps, `attention_mask`, (batch, tokens).
        counted: bool, (batch, tokens).
        seed: 0 to 2^64 - 1.
    """
    ids, attended = batch["input_ids"], batch.get("attention_mask")
    if attended is not None:
        ids = ids.where(attended.to(ids.device).bool(), -1)
    empty = hashlib.blake2b(key=seed.to_bytes(8, "big"), digest_size=_NUMBER_BITS // 8)
    for row, counts in zip(ids.tolist(), counted.tolist(), strict=True):
        prefix = empty.copy()
        for token, count in zip(row, counts, strict=True):
            prefix.update(token.to_bytes(8, "big", signed=True))
            if count:
                yield int.from_bytes(prefix.digest(), "big")


class DistinctPrefixes:
    """Estimates how many distinct numbers of prefixes there are, from the lowest of them; exact for a few thousand."""

    def __init__(self) -> None:
        self._lowest: set[int] = set()
        self._highest = 2**_NUMBER_BITS  # that of the lowest which was left out

    def add(self, numbers: Iterable[int]) -> None:
        self._lowest.update(number for number in numbers if number < self._highest)
        if len(self._lowest) > 2 * _COUNTED:
            *lowest, self._highest = sorted(self._lowest)[: _COUNTED + 1]
            self._lowest = set(lowest)

    def estimate(self) -> int:
        """Of n uniform numbers, as many are below a bound as its share of their range times n."""
        return round(len(self._lowest) * 2**_NUMBER_BITS / self._highest)
