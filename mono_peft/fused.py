"""The frozen linear layer and its ReLU adapter as one autograd function: the same numbers, less traffic and memory.

y = x W^T + b + s relu(z) B^T with z = (m * x) A^T / (1 - p) + c, m the elements that dropout keeps, c the encoder's
bias. Neither the update nor its gradient exists as a matrix of its own, both are added into the base's. Of dropout, m
alone is kept for the backward pass, a byte an element.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.modules import module as torch_module

_DRAWS = 2**16  # values of a 16-bit number
# In this range 16 bits round neither p nor 1 - p by more than a thousandth of it; a rate outside takes the plain path.
_DROPOUT_RATES = (0.01, 0.99)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)


def is_safe(
    x: torch.Tensor,
    base: nn.Module,
    dropout: nn.Module,
    encoder: nn.Module,
    activation: nn.Module,
    decoder: nn.Module,
) -> bool:
    """Whether `relu_update` may take the place of calling these modules one by one.

    It may not where somebody else acts on a module's call (hooks of accelerate, DeepSpeed, or our own measurements),
    where weights are not plain tensors (quantised, sharded), where dtypes are mixed, where dropout is too rare or too
    likely for its 16 bits, or under autocast, torch.compile and torch.func, which work on the single operations.
    """
    if type(activation) is not nn.ReLU or type(dropout) not in (nn.Dropout, nn.Identity):
        return False
    lowest, highest = _DROPOUT_RATES
    if dropout.training and type(dropout) is nn.Dropout and not lowest <= dropout.p <= highest:
        return False
    if x.device.type not in ("cpu", "cuda") or not runs_as_written(x, (base, dropout, encoder, activation, decoder)):
        return False
    if not all(is_plain_linear(module, x.dtype) for module in (base, encoder, decoder)):
        return False
    if decoder._parameters["bias"] is not None:
        return False
    return not any(parameter.requires_grad for parameter in base._parameters.values() if parameter is not None)


def runs_as_written(x: torch.Tensor, modules: Iterable[nn.Module]) -> bool:
    """Whether calling `modules` on x runs their classes' forward alone: no hooks, autocast, compile or torch.func."""
    if torch.is_autocast_enabled(x.device.type) or any(_GLOBAL_HOOKS):
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    for module in modules:
        attributes = module.__dict__
        if "forward" in attributes or any(attributes[hooks] for hooks in _HOOKS):
            return False
    return True


def is_plain_linear(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `module` is `nn.Linear` with parameters of this dtype that are whole and on this process."""
    if type(module) is not nn.Linear:
        return False
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if type(weight) is not nn.Parameter or weight.dtype != dtype or hasattr(weight, "ds_id"):
        return False
    return bias is None or bias.dtype == dtype


def relu_update(
    x: torch.Tensor,
    base: nn.Module,
    dropout: nn.Module,
    encoder: nn.Module,
    decoder: nn.Module,
    scaling: float,
) -> torch.Tensor:
    """The base's output for x of shape (..., in_features) plus s B relu(A dropout(x)), where `is_safe`.

    Dropout's probability is rounded to a multiple of 2^-16, and what is kept is scaled up by that probability, so that
    the expectation of the input stays as it is. The result is a tensor of its own, which may be modified in place.
    """
    dropped = round(getattr(dropout, "p", 0.0) * _DRAWS) if dropout.training else 0
    keep = _kept_elements(x, dropped) if dropped else None
    result: torch.Tensor = _ReluUpdate.apply(
        x,
        base.weight,
        base.bias,
        encoder.weight,
        decoder.weight,
        encoder.bias,
        keep,
        scaling,
        _DRAWS / (_DRAWS - dropped),
    )
    return result


def _kept_elements(x: torch.Tensor, dropped: int) -> torch.Tensor:
    """Int8 tensor of x's shape, 0 with probability dropped / 2^16, else 1: four 16-bit numbers from a 64-bit draw.

    Several times cheaper than a Bernoulli draw for each element, which costs as much as the base layer's product. And
    int8, because torch converts it to floats five times as fast as bool.
    """
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    draws.random_(-(2**63), None)
    keep = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return torch.ge(draws.view(torch.int16)[: x.numel()].view(x.shape), dropped - _DRAWS // 2, out=keep)


class _ReluUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        encoder: torch.Tensor,
        decoder: torch.Tensor,
        encoder_bias: torch.Tensor | None,
        keep: torch.Tensor | None,
        scaling: float,
        rescale: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # Autograd lets nobody modify a view from a custom function in place, so that the view is what is written to.
        result = x.new_empty(*x.shape[:-1], len(weight))
        result_rows = result.view(len(rows), len(weight))
        if bias is None:
            torch.mm(rows, weight.t(), out=result_rows)
        else:
            torch.addmm(bias, rows, weight.t(), out=result_rows)
        seen = rows if keep is None else keep.view(rows.shape).to(x.dtype).mul_(rows)
        latents = seen @ encoder.t()
        if keep is not None:
            latents *= rescale
        if encoder_bias is not None:
            latents += encoder_bias
        latents.clamp_(min=0)
        result_rows.addmm_(latents, decoder.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, bias, encoder, decoder, encoder_bias, keep, latents)
        ctx.factors = scaling, rescale
        ctx.observer = None  # the layer may set one: see `MonoLoraLayer.observer`
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, _, encoder, decoder, _, keep, latents = ctx.saved_tensors
        scaling, rescale = ctx.factors
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            return _differentiable_gradients(ctx, gradient)
        rows, outer = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        # The products have r rows, and not r columns, where that is several times faster.
        decoder_gradient = (latents.t() @ outer).mul_(scaling).t() if ctx.needs_input_grad[4] else None
        inner = outer @ decoder.t().contiguous().t()
        inner.mul_(scaling * rescale).masked_fill_(latents <= 0, 0)
        if ctx.observer is not None:
            ctx.observer(latents, inner if rescale == 1 else inner / rescale)
        bias_gradient = inner.sum(0).div_(rescale) if ctx.needs_input_grad[5] else None
        x_gradient = outer @ weight if ctx.needs_input_grad[0] else None
        seen = rows
        if keep is None:
            if x_gradient is not None:
                x_gradient.addmm_(inner, encoder)
        else:
            mask = keep.view(rows.shape).to(x.dtype)
            if x_gradient is not None:
                x_gradient.addcmul_(inner @ encoder, mask)
            seen = mask.mul_(rows)
        encoder_gradient = inner.t() @ seen if ctx.needs_input_grad[3] else None
        x_gradient = x_gradient.view(x.shape) if x_gradient is not None else None
        return x_gradient, None, None, encoder_gradient, decoder_gradient, bias_gradient, None, None, None


def _differentiable_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Compute the same gradients by operations that autograd can differentiate once more."""
    x, weight, bias, encoder, decoder, encoder_bias, keep, _ = ctx.saved_tensors
    scaling, rescale = ctx.factors
    with torch.enable_grad():
        seen = x if keep is None else x * keep * rescale
        latents = functional.relu(functional.linear(seen, encoder, encoder_bias)) * scaling
        result = functional.linear(x, weight, bias) + functional.linear(latents, decoder)
        places = [i for i in (0, 3, 4, 5) if ctx.needs_input_grad[i]]
        inputs = [ctx.saved_tensors[i] for i in places]
        values = torch.autograd.grad(result, inputs, gradient, create_graph=True)
    gradients: list[torch.Tensor | None] = [None] * 9
    for i, value in zip(places, values, strict=True):
        gradients[i] = value
    return tuple(gradients)
