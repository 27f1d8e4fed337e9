"""The sparse products of `vision_bench.sae`, and their gradients: only active latents are decoded and differentiated.

No gradient is computed that nobody asks for: none in x, and that of b_pre through the encoder is one product of a
vector, -(sum over the batch of the gradient in the pre-activations) W_enc.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Share of active latents up to which sparse products were faster than dense ones on a CPU (benchmarks/sae_step.py);
# on a GPU, where they were not measured, all products are dense.
SPARSE_SHARE = 1 / 8


class Active:
    """Which k latents of each sample are active: the pattern of a sparse (b, d_latent) matrix with nnz = b k entries.

    Args:
        latents: (b, k) int64, of each sample.
        d_latent: number of columns.
    """

    def __init__(self, latents: torch.Tensor, d_latent: int) -> None:
        b, self.k = latents.shape
        self.columns, self.shape = latents.reshape(-1), (b, d_latent)  # (nnz,), sample by sample
        self.offsets = torch.arange(0, b * self.k + 1, self.k, device=latents.device)  # where each sample starts
        self.sparse = latents.device.type == "cpu" and self.k <= SPARSE_SHARE * d_latent

    @cached_property
    def flat(self) -> torch.Tensor:
        """(nnz,) indices into the flattened matrix."""
        rows = torch.arange(self.shape[0], device=self.columns.device)
        return rows.repeat_interleave(self.k) * self.shape[1] + self.columns

    @cached_property
    def _transposed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latent by latent: which of the nnz entries, their samples, and where the entries of each latent start."""
        order = self.columns.argsort()
        counts = torch.bincount(self.columns, minlength=self.shape[1])
        return order, order // self.k, counts.cumsum(0) - counts

    def dense(self, values: torch.Tensor) -> torch.Tensor:
        """A (b, d_latent) of the values (nnz,), zero elsewhere. Differentiable in the values."""
        zeros = values.new_zeros(self.shape[0] * self.shape[1])
        return zeros.scatter(0, self.flat, values).view(self.shape)

    def times(self, values: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """A @ matrix, for a matrix (d_latent, d)."""
        if not self.sparse:
            return self.dense(values) @ matrix
        return F.embedding_bag(self.columns, matrix, self.offsets[:-1], mode="sum", per_sample_weights=values)

    def transposed_times(self, values: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """A^T @ matrix, for a matrix (b, d)."""
        if not self.sparse:
            return self.dense(values).T @ matrix
        order, samples, offsets = self._transposed
        return F.embedding_bag(samples, matrix, offsets, mode="sum", per_sample_weights=values[order])

    def of_product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The active entries (nnz,) of left @ right^T, for left (b, d) and right (d_latent, d)."""
        if not self.sparse:
            return (left @ right.T).view(-1)[self.flat]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse")  # "in beta state", once a process
            zeros = left.new_zeros(len(self.columns))
            pattern = torch.sparse_csr_tensor(self.offsets, self.columns, zeros, self.shape, check_invariants=False)
            return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


class Encode(torch.autograd.Function):
    """The active entries (nnz,) of the pre-activations (x - b_pre) W_enc^T + b_enc, which the caller computed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        pre_bias: torch.Tensor,
        encoder: torch.Tensor,
        latent_bias: torch.Tensor,
        preactivations: torch.Tensor,
        active: Active,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, pre_bias, encoder)
        ctx.active = active
        return preactivations.view(-1)[active.flat]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, pre_bias, encoder = ctx.saved_tensors
        active = ctx.active
        for_x = active.times(gradient, encoder) if ctx.needs_input_grad[0] else None
        for_encoder = active.transposed_times(gradient, x - pre_bias) if ctx.needs_input_grad[2] else None
        for_latents = gradient.new_zeros(active.shape[1]).index_add_(0, active.columns, gradient)
        for_pre_bias = -(for_latents @ encoder) if ctx.needs_input_grad[1] else None
        return for_x, for_pre_bias, for_encoder, for_latents, None, None


class Decode(torch.autograd.Function):
    """Multiplies latents, whose active entries are `values` (nnz,), by W_dec."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, decoder: torch.Tensor, active: Active) -> torch.Tensor:
        ctx.save_for_backward(values, decoder)
        ctx.active = active
        return active.times(values, decoder)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, decoder = ctx.saved_tensors
        gradient = gradient.contiguous()
        for_values = ctx.active.of_product(gradient, decoder) if ctx.needs_input_grad[0] else None
        for_decoder = ctx.active.transposed_times(values, gradient) if ctx.needs_input_grad[1] else None
        return for_values, for_decoder, None
