"""A linear layer and its adapter where no gradient is recorded: the same operations, past the calls of their modules.

y = x W^T + b + s sigma(x A^T + c) B^T, c the encoder's bias if it has one. A decoding step computes little in each of
some hundred layers, so that much of an adapter's time there is Python: calls of modules, and attributes, which
`nn.Module` looks up slowly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from . import sparse


def linear_forward(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """What calling the modules of `layer` one by one gives, bit for bit; None where they must be called.

    With topk, one token is decoded by its active units alone, which sums in another order and so rounds otherwise.

    Args:
        layer: a `MonoLoraLayer`. Its base is called if it is not plain (quantised, hooked).
        x: (..., in_features).

    Returns:
        (..., out_features) in the dtype of the base's output. None with several or no active adapters, an activated
        one, an encoder or decoder that is not linear, hooks on these or on all modules, dropout that acts, and in
        torch.compile, which has no such costs.
    """
    active = layer._active_adapter  # a list; half of the time here is look-ups, so that these are short
    if torch.compiler.is_compiling() or len(active) != 1 or _global_forward_hooks or _global_forward_pre_hooks:
        return None
    (name,) = active
    modules = layer._modules
    encoder = modules["monolora_encoder"]._modules.get(name)
    if encoder is None or name in layer.monolora_invocations:
        return None
    encoding, decoding = _plain_parameters(encoder), _plain_parameters(modules["monolora_decoder"]._modules[name])
    if encoding is None or decoding is None:
        return None
    dropout = modules["monolora_dropout"]._modules[name]
    if type(dropout) is not nn.Identity and (dropout.training or not _is_unhooked(dropout)):
        return None
    base, activation = modules["base_layer"], modules["monolora_activation"]._modules[name]
    weights = _plain_parameters(base)
    result = base(x) if weights is None else functional.linear(x, *weights)
    dtype = encoding[0].dtype
    latents = functional.linear(x if x.dtype == dtype else layer._cast_input_dtype(x, dtype), *encoding)
    unhooked = _is_unhooked(activation)
    if unhooked and type(activation) is nn.ReLU:
        unscaled = functional.linear(torch.relu(latents), *decoding)
    elif unhooked and sparse.gathers(latents, activation):
        unscaled = sparse.decoded(latents, activation.k, *decoding)
    else:
        unscaled = functional.linear(activation(latents), *decoding)
    if unscaled.dtype != result.dtype:  # a conversion that changes nothing takes time, too
        unscaled = unscaled.to(result.dtype)
    return torch.add(result, unscaled, alpha=layer.scaling[name])


def _plain_parameters(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """W and b, where calling `module` is `linear(x, W, b)` and nothing else; None also if they are kept elsewhere."""
    if type(module) is not nn.Linear or not _is_unhooked(module):
        return None
    parameters: Any = module._parameters  # FSDP1 takes them from there
    return (parameters["weight"], parameters["bias"]) if len(parameters) == 2 else None


def _is_unhooked(module: nn.Module) -> bool:
    """Whether a call without gradient runs the class's forward alone: no hooks, nor a `forward` set by accelerate."""
    attributes = module.__dict__
    return not (attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or "forward" in attributes)
