"""One adapter's weights in the place of another's, without a new compilation."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights

from .config import MonoLoraConfig
from .state_dicts import check_finite

# What else than its tensors makes an adapter's function.
_FUNCTION = (
    "r",
    "monolora_alpha",
    "activation",
    "k",
    "encoder_bias",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
)


def replace_adapter(model: PeftModel, path: str | os.PathLike[str], adapter_name: str = "default", **hub: Any) -> None:
    """Copy the saved adapter at `path` over the weights of `adapter_name`, in place; the name stays:

        replace_adapter(model, "runs/second_adapter")

    Nothing but the values of tensors changes, so that a model under `torch.compile` is not compiled anew. This is what
    PEFT's `hotswap_adapter`, which supports LoRA only, is for. Everything is checked before the first value changes.

    Args:
        model: a PeftModel with the adapter `adapter_name`, or what `torch.compile` made of it.
        path: a folder written by `save_pretrained`, or a name on the Hugging Face hub.
        hub: further arguments of `PeftConfig.from_pretrained` for a hub name, such as `revision`.

    Raises:
        ValueError: there is no such adapter, or the two differ in rank, scale, activation, adapted modules or shapes,
            or the file holds NaN.
    """
    model = getattr(model, "_orig_mod", model)
    if adapter_name not in model.peft_config:
        raise ValueError(f"The model has no adapter {adapter_name!r} to replace; it has {sorted(model.peft_config)}.")
    old, new = model.peft_config[adapter_name], MonoLoraConfig.from_pretrained(path, **hub)
    for name in _FUNCTION:
        if getattr(old, name) != getattr(new, name):
            raise ValueError(
                f"Cannot replace adapter {adapter_name!r} in place: `{name}` is {getattr(old, name)!r} there and "
                f"{getattr(new, name)!r} in {path}. Use `load_adapter` with another name, and `set_adapter`."
            )
    # These share their memory with the model's parameters.
    current = get_peft_model_state_dict(model, adapter_name=adapter_name)
    saved = load_peft_weights(str(path), device="cpu", **hub)
    differing = [
        name
        for name in sorted(current.keys() | saved.keys())
        if name not in current or name not in saved or current[name].shape != saved[name].shape
    ]
    if differing:
        raise ValueError(
            f"Cannot replace adapter {adapter_name!r} in place: {len(differing)} tensors are missing on one side or "
            f"have other shapes, the first is {differing[0]}. The two must adapt the same modules of one base model."
        )
    check_finite(saved)
    with torch.no_grad():
        for name, tensor in saved.items():
            current[name].copy_(tensor)
