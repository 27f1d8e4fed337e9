"""sigma between an adapter's two products, for each token that of its adapter.

vLLM computes B (A x) of a batch whose tokens belong to different adapters by a "punica wrapper": `add_shrink` gives
A x, `add_expand` multiplies by B. The adapters on the device have a slot each, and a token has the index of its slot,
or -1. The classes here go ahead of a platform's wrapper and apply sigma to what `add_expand` gets; s is in B.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

# mono_peft.layer.ACTIVATIONS as functions, here because that needs PEFT. LoRA adapters have "identity", code 0.
SIGMAS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": operator.pos,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}
CODES = {activation: code for code, activation in enumerate(SIGMAS)}


class SigmaMixin:
    """Ahead of a wrapper of LoRA's kernels on a GPU or XPU.

    The activations of the slots are numbers in a tensor on the device that is written in place. Compiled code and CUDA
    graphs, which are made before an adapter is loaded, read today's; no branch in Python may depend on them.
    """

    # What says which adapter a token has, and the same of a request.
    of_tokens_and_requests: tuple[tuple[str, str], ...] = (
        ("_token_lora_indices", "_sampler_indices"),
        ("token_mapping_meta", "prompt_mapping_meta"),
    )
    serves_topk = False  # the sort that it takes would be in the graph of every model, with or without such an adapter
    _token_lora_indices: torch.Tensor  # int64, the slot of each token or -1, and unused places after the last token
    _sampler_indices: torch.Tensor  # the same of each request
    sampler_indices: torch.Tensor  # those in use
    _slot_of_all: int | None = None  # the slot that all rows of logits are of, while that is so
    prompt_mapping_meta: Any  # what the kernels know of `_sampler_indices`
    add_lora_linear: Callable[..., None]

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)  # type: ignore[call-arg]
        slots = kwargs["lora_config"].max_loras
        # One more than the slots: the index -1, of tokens without adapter, is the last.
        self._codes = torch.zeros(slots + 1, dtype=torch.long, device=device)

    def fill_slot(self, slot: int, activation: str, adapts_logits: bool, k: int | None = None) -> None:
        """Say which sigma the adapter in a slot has, and whether it adapts the output head.

        Args:
            activation: a key of `SIGMAS`, or "topk" where `serves_topk`.
            k: of "topk".
        """
        self._codes[slot] = CODES[activation]

    def _sigma(self, latents: torch.Tensor) -> torch.Tensor:
        """sigma of A x, (tokens, r) or (slices, tokens, r); rows may follow that belong to no token."""
        codes = self._codes[self._token_lora_indices[: latents.shape[-2]]].unsqueeze(-1)
        result = latents
        for activation, code in CODES.items():
            if code:
                result = torch.where(codes == code, SIGMAS[activation](latents), result)
        return result

    def add_expand(self, y: torch.Tensor, x: Any, *args: Any, **kwargs: Any) -> None:
        # Not after `add_shrink`: with fully sharded adapters, the sum over ranks that makes A x comes in between.
        latents = tuple(map(self._sigma, x)) if isinstance(x, tuple) else self._sigma(x)
        super().add_expand(y, latents, *args, **kwargs)  # type: ignore[misc]

    def add_lora_embedding(self, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        super().add_lora_embedding(y, self._sigma(x), *args, **kwargs)  # type: ignore[misc]

    def add_lora_logits(
        self, y: torch.Tensor, x: torch.Tensor, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, **kwargs: Any
    ) -> None:
        """The output head as a linear layer whose rows are requests; vLLM's own does not come by `add_expand`."""
        x, sizes = x.view(-1, x.shape[-1]), (lora_b_stacked.shape[-2],)
        if self._slot_of_all is not None:
            self._set_requests(torch.full((len(x),), self._slot_of_all, device=x.device))
        with self._requests_as_tokens():
            self.add_lora_linear(y.view(-1, y.shape[-1]), x, (lora_a_stacked,), (lora_b_stacked,), scale, sizes)

    @contextmanager
    def all_requests_of(self, slot: int) -> Iterator[None]:
        """Inside, all rows of logits are of the adapter in a slot, or of none for -1."""
        kept, self._slot_of_all = self.sampler_indices.clone(), slot
        try:
            yield
        finally:
            self._slot_of_all = None
            self._set_requests(kept)

    def _set_requests(self, indices: torch.Tensor) -> None:
        self._sampler_indices[: len(indices)].copy_(indices)
        self.prompt_mapping_meta.prepare_tensors(indices)  # as many as rows, as kernels go by their number

    @contextmanager
    def _requests_as_tokens(self) -> Iterator[None]:
        kept = {token: getattr(self, token) for token, _ in self.of_tokens_and_requests}
        for token, request in self.of_tokens_and_requests:
            setattr(self, token, getattr(self, request))
        try:
            yield
        finally:
            for token, value in kept.items():
                setattr(self, token, value)


class PerSlotMixin(SigmaMixin):
    """Ahead of vLLM's wrapper for CPUs, with a product for each slot.

    vLLM's own copies A and B for every token. It also takes the last slot's for tokens without adapter, by index -1.
    """

    of_tokens_and_requests = (("_token_rows", "_request_rows"),)
    serves_topk = True
    token_lora_indices: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sigmas: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}  # of the slots that have another than x
        self._adapting_logits: set[int] = set()
        self._token_rows: list[tuple[int, Any]] = []
        self._request_rows: list[tuple[int, Any]] = []

    def fill_slot(self, slot: int, activation: str, adapts_logits: bool, k: int | None = None) -> None:
        self._sigmas.pop(slot, None)
        if k is not None:
            from mono_peft.topk import TopK  # brings PEFT, which has read the adapter

            # The places of A that the adapter leaves empty are latents of zero, which topk keeps as zeros.
            self._sigmas[slot] = TopK(k)
        elif activation != "identity":
            self._sigmas[slot] = SIGMAS[activation]
        (self._adapting_logits.add if adapts_logits else self._adapting_logits.discard)(slot)

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)  # type: ignore[misc]
        self._token_rows = rows_of_slots(self.token_lora_indices)
        self._request_rows = rows_of_slots(self.sampler_indices)

    def _sigma(self, latents: torch.Tensor) -> torch.Tensor:
        for slot, rows in self._token_rows:
            if slot in self._sigmas:
                latents[..., rows, :] = self._sigmas[slot](latents[..., rows, :])
        return latents

    def _apply_shrink(self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
        for slot, rows in self._token_rows:
            y[rows] = scale * (x[rows].to(y.dtype) @ w_t_all[slot, 0].to(y.dtype).T)

    def _apply_expand(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        w_t_all: torch.Tensor,
        y_offset: int,
        y_slice_size: int,
        add_inputs: bool = True,
    ) -> None:
        columns = y[:, y_offset : y_offset + y_slice_size]
        for slot, rows in self._token_rows:
            update = (x[rows].to(y.dtype) @ w_t_all[slot, 0].to(y.dtype).T)[:, : columns.shape[1]]
            columns[rows] = columns[rows] + update if add_inputs else update

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        self._apply_expand(y, self._sigma(x), lora_b_stacked, 0, lora_b_stacked.shape[-2], add_inputs)

    def add_lora_logits(self, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if {slot for slot, _ in self._request_rows} & self._adapting_logits:
            super().add_lora_logits(y, x, *args, **kwargs)

    @contextmanager
    def all_requests_of(self, slot: int) -> Iterator[None]:
        kept = self._request_rows
        self._request_rows = [(slot, slice(None))] if slot >= 0 else []
        try:
            yield
        finally:
            self._request_rows = kept


def rows_of_slots(indices: torch.Tensor) -> list[tuple[int, Any]]:
    """The slots in use and the rows of each, as an index; `slice(None)` where all are of one slot.

    Args:
        indices: int64 of shape (rows,), the slot of each row or -1.
    """
    slots = indices.unique().tolist()
    if len(slots) == 1:
        return [(slot, slice(None)) for slot in slots if slot >= 0]
    return [(slot, (indices == slot).nonzero().squeeze(1)) for slot in slots if slot >= 0]


def with_sigma(wrapper: type) -> type:
    """The wrapper class of a platform with sigma; as it is on platforms that have none of the three known ones."""
    mixins = {"PunicaWrapperCPU": PerSlotMixin, "PunicaWrapperGPU": SigmaMixin, "PunicaWrapperXPU": SigmaMixin}
    mixin = mixins.get(wrapper.__name__)
    return type(f"Mono{wrapper.__name__}", (mixin, wrapper), {"__module__": __name__}) if mixin else wrapper
