"""The update of a top-k adapter by the active units alone: in training, and for one token without gradients.

z = A x + b has all r units, of which each token keeps k. s B sigma(z) and all gradients are sums over these pairs of a
token and a unit, so that of the six products of an adapter's step one remains a product with an r x in matrix.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.nn import functional

from . import fused
from .topk import TopK, is_eager_on_cpu, largest

# Share of active units up to which this was faster than dense products on a CPU, in benchmarks/topk_step.py. For
# several tokens without gradients the dense decoder was as fast, and on a GPU nothing was measured.
LARGEST_SHARE = 1 / 16
_DTYPES = (torch.float32, torch.float64)  # of torch's sampled product


def is_faster(x: torch.Tensor, encoder: Any, activation: Any, decoder: Any) -> bool:
    """Whether `topk_update` may take the place of calling these modules one by one, and takes less time."""
    return (
        type(activation) is TopK
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype in _DTYPES
        and activation.k <= LARGEST_SHARE * encoder.out_features
        and fused.runs_as_written(x, (encoder, activation, decoder))
        and all(fused.is_plain_linear(module, x.dtype) for module in (encoder, decoder))
        and decoder.bias is None
    )


def topk_update(x: torch.Tensor, encoder: Any, activation: Any, decoder: Any, scaling: float) -> torch.Tensor:
    """s B sigma(A x + b), where `is_faster`.

    Args:
        x: (..., in_features).
        scaling: s.

    Returns:
        (..., out_features).
    """
    result: torch.Tensor = _TopKUpdate.apply(x, encoder.weight, decoder.weight, encoder.bias, activation.k, scaling)
    return result


def gathers(latents: torch.Tensor, activation: Any) -> bool:
    """Whether `decoded` takes less time than the dense decoder for these latents (..., r), without gradients."""
    r = latents.shape[-1]
    few = type(activation) is TopK and activation.k <= LARGEST_SHARE * r
    return few and latents.numel() == r and is_eager_on_cpu(latents)


def decoded(latents: torch.Tensor, k: int, decoder: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """B sigma(z) of the latents (..., r) of one token, (..., out_features), by the k columns of B that are active."""
    values, units = largest(latents, k)
    return functional.linear(torch.relu(values), decoder.index_select(1, units.view(-1)), bias)


class _Pairs:
    """Pairs of a token and an active unit as a sparse (tokens, r) matrix with k entries a row.

    Args:
        units: (tokens, k) int64.
        r: number of columns.
    """

    def __init__(self, units: torch.Tensor, r: int) -> None:
        self.tokens, self.k = units.shape
        self.units, self.r = units.reshape(-1), r
        self.starts = torch.arange(0, len(self.units) + 1, self.k)  # of the tokens, and the end

    def times(self, values: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """The sparse matrix of the values (tokens k,) times a matrix (r, d)."""
        return functional.embedding_bag(self.units, matrix, self.starts[:-1], mode="sum", per_sample_weights=values)

    def transposed_times(self, *products: tuple[torch.Tensor, torch.Tensor] | None) -> list[torch.Tensor | None]:
        """The transpose with the values (tokens k,) times a matrix (tokens, d): (r, d) for each such pair."""
        order = self.units.argsort()
        counts = torch.bincount(self.units, minlength=self.r)
        tokens, starts = order // self.k, counts.cumsum(0) - counts
        return [
            None
            if product is None
            else functional.embedding_bag(tokens, product[1], starts, mode="sum", per_sample_weights=product[0][order])
            for product in products
        ]

    def entries(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The entries (tokens k,) of left right^T, for left (tokens, d) and right (r, d), in these places."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse")  # "in beta state", once a process
            zeros, shape = left.new_zeros(len(self.units)), (self.tokens, self.r)
            places = torch.sparse_csr_tensor(self.starts, self.units, zeros, shape, check_invariants=False)
            return torch.sparse.sampled_addmm(places, left, right.t(), beta=0.0).values()


class _TopKUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        encoder: torch.Tensor,
        decoder: torch.Tensor,
        bias: torch.Tensor | None,
        k: int,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        values, units = largest(functional.linear(rows, encoder, bias), k)
        pairs, values = _Pairs(units, len(encoder)), values.reshape(-1).clamp(min=0)
        ctx.save_for_backward(x, encoder, decoder, bias, values)
        ctx.options = pairs, k, scaling
        ctx.observer = None  # the layer may set one: see `MonoLoraLayer.observer`
        return pairs.times(values * scaling, decoder.t().contiguous()).view(*x.shape[:-1], len(decoder))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, encoder, decoder, bias, values = ctx.saved_tensors
        pairs, k, scaling = ctx.options
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            inputs = [tensor for tensor in (x, encoder, decoder, bias) if tensor is not None and tensor.requires_grad]
            latents = TopK(k)(functional.linear(x, encoder, bias)) * scaling
            update = functional.linear(latents, decoder)
            found = iter(torch.autograd.grad(update, inputs, gradient, create_graph=True))
            needed = ctx.needs_input_grad[:4]
            return (*(next(found) if is_needed else None for is_needed in needed), None, None)
        rows, outer = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        inner = pairs.entries(outer, decoder.t().contiguous()).mul_(scaling).masked_fill_(values <= 0, 0)
        if ctx.observer is not None:
            ctx.observer(*(tensor.view(-1, k) for tensor in (values, inner, pairs.units)))
        for_x = pairs.times(inner, encoder).view(x.shape) if ctx.needs_input_grad[0] else None
        for_encoder, for_decoder = pairs.transposed_times(
            (inner, rows) if ctx.needs_input_grad[1] else None,
            (values * scaling, outer) if ctx.needs_input_grad[2] else None,
        )
        for_decoder = None if for_decoder is None else for_decoder.t()
        for_bias = None
        if ctx.needs_input_grad[3]:
            for_bias = torch.zeros_like(bias).index_add_(0, pairs.units, inner)
        return for_x, for_encoder, for_decoder, for_bias, None, None
