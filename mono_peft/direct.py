"""A linear layer and its adapter where no gradient is recorded: the same operations, past the calls of their modules.

y = x W^T + b + s sigma(x A^T) B^T. A decoding step computes little in each of some hundred layers, so that much of an
adapter's time there is Python: calls of modules, and attributes, which `nn.Module` looks up slowly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks


def linear_forward(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """What calling the modules of `layer` one by one gives, bit for bit; None where they must be called.

    Args:
        layer: a `MonoLoraLayer`. Its base is called if it is not plain (quantised, hooked).
        x: (..., in_features).

    Returns:
        (..., out_features) in the dtype of the base's output. None with several or no active adapters, an encoder or
        decoder that is not linear, hooks on these or on all modules, dropout that acts, and in torch.compile, which
        has no such costs.
    """
    active = layer._active_adapter  # a list; half of the time here is look-ups, so that these are short
    if torch.compiler.is_compiling() or len(active) != 1 or _global_forward_hooks or _global_forward_pre_hooks:
        return None
    (name,) = active
    modules = layer._modules
    encoder = modules["monolora_encoder"]._modules.get(name)
    if encoder is None:
        return None
    a, b = _plain_weight(encoder), _plain_weight(modules["monolora_decoder"]._modules[name])
    dropout = modules["monolora_dropout"]._modules[name]
    if (
        a is None
        or b is None
        or not (type(dropout) is nn.Identity or (_is_unhooked(dropout) and not dropout.training))
    ):
        return None
    base, activation = modules["base_layer"], modules["monolora_activation"]._modules[name]
    weight = _plain_weight(base)
    result = base(x) if weight is None else functional.linear(x, weight, base._parameters["bias"])
    latents = functional.linear(x if x.dtype == a.dtype else layer._cast_input_dtype(x, a.dtype), a)
    is_relu = type(activation) is nn.ReLU and _is_unhooked(activation)
    unscaled = functional.linear(torch.relu(latents) if is_relu else activation(latents), b)
    if unscaled.dtype != result.dtype:  # a conversion that changes nothing takes time, too
        unscaled = unscaled.to(result.dtype)
    return torch.add(result, unscaled, alpha=layer.scaling[name])


def _plain_weight(module: nn.Module) -> torch.Tensor | None:
    """W, where calling `module` is `linear(x, W, b)` and nothing else; None also if somebody keeps W elsewhere."""
    if type(module) is not nn.Linear or not _is_unhooked(module):
        return None
    return module._parameters.get("weight")  # FSDP1 and pruning take it from there


def _is_unhooked(module: nn.Module) -> bool:
    """Whether a call without gradient runs the class's forward alone: no hooks, nor a `forward` set by accelerate."""
    attributes = module.__dict__
    return not (attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or "forward" in attributes)
