"""Activated adapters: from where on in a pass they act (activated LoRA, arXiv:2504.12397).

An activated adapter acts from the last occurrence of its invocation tokens in a row on. Before it the model is the
base, so that a key-value cache of the base serves the adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import nn

Offsets = Sequence[int | None]  # for each row, how many of its last tokens an adapter acts on; None: it is not invoked


class Invocations:
    """Where the activated adapters of one model act in the present pass; the model and its layers share one."""

    def __init__(self) -> None:
        self._present: _Pass | None = None
        # The last pass with gradients: activation checkpointing computes layers again in its backward pass.
        self._to_recompute: _Pass | None = None
        self._recomputed = self._ambiguous = False

    @contextmanager
    def watched(
        self, model: nn.Module, configs: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[None]:
        """Look at the token ids of each pass of `model` in a call of PeftModel's `forward` or `generate`.

        Args:
            model: the base model, which is called inside.
            configs: by the names of the adapters.
            args, kwargs: of the call, as PEFT hands them to `_enable_peft_forward_hooks`: with the token ids where the
                call is of `generate`, without them where it is of `forward`.
        """
        prompt = next((kwargs[name] for name in ("input_ids", "inputs") if kwargs.get(name) is not None), None)
        if prompt is None and args and isinstance(args[0], torch.Tensor):
            prompt = args[0]
        call = _Call(configs, kwargs.get("adapter_names"), kwargs.get("alora_offsets"), prompt)
        try:
            with model.register_forward_pre_hook(partial(self._begin, call), with_kwargs=True):
                yield
        finally:
            self._present = None

    def _begin(self, call: _Call, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._present = _Pass(call, args, kwargs)
        if model.training and torch.is_grad_enabled():
            self._ambiguous = self._to_recompute is not None and not self._recomputed
            self._to_recompute, self._recomputed = self._present, False

    def masked(self, adapter_name: str, latents: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The latents (batch, tokens, r) of an adapter with zeros where it does not act.

        Args:
            rows: (batch,) int64, which rows of the pass the latents are of; None: of all.

        Raises:
            RuntimeError: nobody has told the token ids of the pass.
            ValueError: the latents are not of the pass' rows and tokens.
        """
        return latents.masked_fill(~self.acting(adapter_name, latents, rows).unsqueeze(-1), 0)

    def acting(self, adapter_name: str, latents: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Bool of shape (batch, tokens): where the adapter acts; arguments and errors as of `masked`."""
        acting = self._current_pass().acting(adapter_name, latents)
        return acting if rows is None else acting[rows]

    def _current_pass(self) -> _Pass:
        if torch._C._current_graph_task_id() != -1 and self._to_recompute is not None:  # in a backward pass
            if self._ambiguous:
                self._to_recompute = None
                raise RuntimeError(
                    "Activation checkpointing computes layers again, and with an activated MonoLoRA adapter it cannot "
                    "tell of which forward pass: there were several since the last backward pass. Go backward after "
                    "each forward pass, or switch activation checkpointing off."
                )
            self._recomputed = True
            return self._to_recompute
        if self._present is None:
            raise RuntimeError(
                "An activated MonoLoRA adapter (`alora_invocation_tokens`) has to see the token ids of a pass, which "
                "only PeftModelForCausalLM shows it: call that model, and none inside it, or disable the adapter. "
                "transformers' own `load_adapter` cannot be used."
            )
        return self._present


@dataclass
class _Call:
    """What a call of `forward` or `generate` says about its passes."""

    configs: Mapping[str, Any]
    adapter_names: list[str] | None
    given: Offsets | None  # by the caller, or by PEFT, which looks for the tokens of one adapter
    prompt: torch.Tensor | None

    def __post_init__(self) -> None:
        if self.given is not None:
            self.given = [None if offset is None else int(offset) for offset in self.given]
        if self.prompt is not None and self.prompt.ndim == 1:
            self.prompt = self.prompt[None]

    def offsets(self, adapter_name: str, ids: torch.Tensor | None) -> Offsets:
        """Of the adapter in `ids` (rows, tokens), or as the caller has given them."""
        if ids is None or ids.is_floating_point():
            if self.given is None:
                raise ValueError(
                    "An activated MonoLoRA adapter looks for its invocation tokens in `input_ids`, and there are "
                    "none: pass them, or `alora_offsets`, for each row the number of last tokens to act on."
                )
            return self.given
        found: Offsets = calculate_alora_offsets(self.configs, adapter_name, ids, self.adapter_names)
        if self.given is None or self.given == found:
            return found
        # PEFT goes by PeftModel's active adapter, which `base_model.set_adapter` does not change.
        others = (n for n, c in self.configs.items() if c.alora_invocation_tokens and n != adapter_name)
        if any(self.given == calculate_alora_offsets(self.configs, n, ids) for n in others):
            return found
        return self.given


class _Pass:
    """One pass of a model: its tokens, and from where on in each row an adapter acts."""

    def __init__(self, call: _Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.call = call
        self.ids = kwargs.get("input_ids", args[0] if args else None)
        tokens = self.ids if self.ids is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            raise ValueError("A model with an activated MonoLoRA adapter needs `input_ids`.")
        self.rows, self.length = tokens.shape[:2]
        self.logits_to_keep = kwargs.get("logits_to_keep")
        cache = kwargs.get("past_key_values")
        self.seen = int(cache.get_seq_length()) if cache is not None else 0  # tokens of earlier passes
        self.attention_mask, self.position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        self._offsets: dict[str, torch.Tensor] = {}

    def acting(self, adapter_name: str, latents: torch.Tensor) -> torch.Tensor:
        """Bool of shape (rows, tokens) for the tokens of `latents`, which are the last ones of the pass."""
        tokens = latents.shape[1] if latents.ndim == 3 else 0
        if tokens not in (self.length, self.logits_to_keep):
            raise ValueError(
                f"An activated MonoLoRA adapter is on a layer that computes latents of shape {tuple(latents.shape)} "
                f"in a pass of {self.rows} rows of {self.length} tokens, so that it cannot tell where to act: leave "
                "layers that do not see every token of every row out, with `exclude_modules`."
            )
        if adapter_name not in self._offsets:
            self._offsets[adapter_name] = torch.tensor(self._counted(adapter_name), device=latents.device)
        offsets = self._offsets[adapter_name].to(latents.device)
        return torch.arange(tokens, device=latents.device) >= tokens - offsets[:, None]

    def _counted(self, adapter_name: str) -> list[int]:
        """For each row of the pass, how many of its last tokens the adapter acts on."""
        names, prompt = self.call.adapter_names, self.call.prompt
        self._check_unpacked()
        offsets = self.call.offsets(adapter_name, self.ids if prompt is None else prompt)
        if not offsets or self.rows % len(offsets) or (prompt is None and len(offsets) != self.rows):
            raise ValueError(f"`alora_offsets` are of {len(offsets)} rows, and the pass has {self.rows}.")
        own = [offset for i, offset in enumerate(offsets) if names is None or names[i] == adapter_name]
        if prompt is None and self.seen and None in own:
            raise ValueError(
                f"This pass continues a cache, and its tokens do not hold the invocation tokens of adapter "
                f"{adapter_name!r}: whether it was invoked before is not known. Pass `alora_offsets`, for each row "
                "the number of last tokens to act on; 0 is the base."
            )
        if own and not any(own):
            warnings.warn(
                f"No row holds the invocation tokens {self.call.configs[adapter_name].alora_invocation_tokens} of "
                f"adapter {adapter_name!r}: the model is the base there.",
                stacklevel=2,
            )
        # generate has looked at the prompt once, and its passes end at other places.
        later = 0 if prompt is None else self.seen + self.length - prompt.shape[1]
        counted = [max(0, offset + later) if offset else 0 for offset in offsets]
        return [number for number in counted for _ in range(self.rows // len(offsets))]  # generate repeats for beams

    def _check_unpacked(self) -> None:
        positions, mask = self.position_ids, self.attention_mask
        if self.call.prompt is not None or positions is None or positions.ndim != 2:
            return
        starts = positions == 0
        if mask is not None and mask.shape == positions.shape:
            starts &= mask.bool()
        if (starts.sum(1) > 1).any():
            raise ValueError(
                "A row of this batch holds several texts (its `position_ids` start anew), and an activated MonoLoRA "
                "adapter would act in the last of them only. Switch packing and `padding_free` off."
            )
