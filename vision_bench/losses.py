"""Losses: InfoNCE over the views of all processes, the official activation bonus, symmetric cross entropy."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from vision_bench.checks import NOT_NEGATIVE, Range, check_counts
from vision_bench.corruptions import check_labels

LEAST_PROBABILITY, LOG_OF_ZERO = 1e-7, math.log(1e-4)  # of the reverse cross entropy


def info_nce(
    z1: torch.Tensor,
    z2: torch.Tensor,
    temperature: float,
    gather_gradient: bool = True,
    chunk_rows: int = 4096,
) -> torch.Tensor:
    """SimCLR's loss, a scalar, over the 2N views of all processes (Chen et al., 2020, eq. 1; eq. 1 of the paper).

    With unit rows z_i and the other view p(i) of the same image,
    L = 1 / 2N sum_i -log( exp(z_i . z_p(i) / t) / sum_{j != i} exp(z_i . z_j / t) ).

    Within an initialised torch.distributed group, N counts the images of all processes, of which each has the same
    number. Every process returns the loss of the whole batch, and its gradient is that of the sum of what the
    processes return, so that DistributedDataParallel's mean over processes is the gradient of one process with the
    whole batch.

    Similarities are computed in float32 (float64 for float64 input) for `chunk_rows` views at a time against all
    others: O(chunk_rows * 2N) values of memory beside the views. If one chunk does not hold all views of a process,
    they are computed again for the gradient. It can be differentiated once.

    Args:
        z1: (n, d) floating-point, the first view of each image; rows are L2-normalised here. A row of zeros, as a
            non-negative output may give, stays zero.
        z2: (n, d), the second view, in the same order.
        temperature: t > 0.
        gather_gradient: False holds the views of other processes constant, as the official code does: the gradient
            then lacks their share.
        chunk_rows: at least 1.

    Raises:
        TypeError: the views are not floating-point.
        ValueError: the shapes, the temperature or `chunk_rows` are not allowed, all processes together have fewer than
            two images, or processes have different numbers of them.

    Example:
        >>> z1, z2 = torch.randn(64, 128), torch.randn(64, 128)
        >>> loss = info_nce(z1, z2, temperature=0.2)
    """
    if not (z1.is_floating_point() and z2.is_floating_point()):
        raise TypeError(f"z1 and z2 have dtypes {z1.dtype} and {z2.dtype}; they must be floating-point.")
    if z1.ndim != 2 or z1.shape != z2.shape or 0 in z1.shape:
        raise ValueError(
            f"z1 and z2 have shapes {tuple(z1.shape)} and {tuple(z2.shape)}; both must be the same (n, d)."
        )
    Range(0, example="0.2 in the paper").check(temperature=temperature)
    check_counts(chunk_rows=chunk_rows)
    views = torch.cat([z1, z2])
    views = views.to(torch.promote_types(views.dtype, torch.float32))
    norms = torch.linalg.vector_norm(views, dim=1, keepdim=True)
    # A row of zeros is divided by 1: by a tiny number, its gradient would be of the order of that number's inverse.
    views = views / torch.where(norms > 0, norms, 1)
    loss: torch.Tensor = _InfoNCE.apply(views, temperature, gather_gradient, chunk_rows)
    return loss


class _InfoNCE(torch.autograd.Function):
    """L of `info_nce` for unit rows (2n, d), the first views and then the second ones.

    With similarities S = z z^T / t, which are symmetric, and l_i the log of the denominator of row i,
    2N dL/dS_ij = exp(S_ij - l_i) - [j = p(i)], and z_i appears in row i and in column i of S:
    dL/dz_i = 1 / (2N t) sum_j (exp(S_ij - l_i) + exp(S_ij - l_j) - 2 [j = p(i)]) z_j.
    So a process needs from the others their views and the logarithms l_j only.
    """

    @staticmethod
    def forward(
        ctx: Any, views: torch.Tensor, temperature: float, gather_gradient: bool, chunk_rows: int
    ) -> torch.Tensor:
        everything, first = _gather(views)
        if len(everything) < 4:
            raise ValueError("z1 has one image; InfoNCE compares with other images, give at least two.")
        own = len(views)
        rows = torch.arange(own, device=views.device)
        positives = first + rows.roll(own // 2)
        logarithms, numerators, chunks = [], [], []
        for start in range(0, own, chunk_rows):
            chunk = slice(start, start + chunk_rows)
            similarity = _similarity(views[chunk], everything, temperature, first + start)
            logarithms.append(similarity.logsumexp(dim=1))
            numerators.append(similarity.gather(1, positives[chunk, None]).squeeze(1))
            chunks.append(similarity)
            if own > chunk_rows:
                chunks.clear()
        logarithm = torch.cat(logarithms)
        losses = logarithm - torch.cat(numerators)
        all_logarithms, _ = _gather(logarithm)
        ctx.save_for_backward(views, everything, logarithm, all_logarithms, positives, *chunks)
        ctx.setting = temperature, gather_gradient, chunk_rows, first
        total = losses.sum()
        if _in_group():
            dist.all_reduce(total)
        return total / len(everything)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        views, everything, logarithm, all_logarithms, positives, *chunks = ctx.saved_tensors
        temperature, gather_gradient, chunk_rows, first = ctx.setting
        own = slice(first, first + len(views))
        gradients = []
        for start in range(0, len(views), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            similarity = chunks[0] if chunks else _similarity(views[chunk], everything, temperature, first + start)
            weights = (similarity - logarithm[chunk, None]).exp_()
            of_columns = (similarity - all_logarithms).exp_()
            if gather_gradient:
                weights += of_columns
            else:
                weights[:, own] += of_columns[:, own]
            weights.scatter_add_(1, positives[chunk, None], weights.new_full((len(weights), 1), -2))
            gradients.append(_product(weights, everything))
        # Processes return the same loss; the gradient is that of their sum.
        world = len(everything) / len(views)
        return torch.cat(gradients) * (gradient * world / (len(everything) * temperature)), None, None, None


def _similarity(rows: torch.Tensor, everything: torch.Tensor, temperature: float, first: int) -> torch.Tensor:
    """Similarities of rows first, first + 1, ... of `everything` with all of it; -inf for a row with itself."""
    similarity = _product(rows, everything.T).div_(temperature)
    similarity[:, first:].fill_diagonal_(-torch.inf)
    return similarity


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in their own dtype: autocast would take it in bfloat16, whose 8 bits are too few at a low temperature."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rows of all processes, in their order, and the index of this process's first one."""
    if not _in_group():
        return tensor, 0
    lengths = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
    if len({int(length) for length in lengths}) > 1:
        raise ValueError(
            f"processes have {[int(length) // 2 for length in lengths]} images; each must have the same number: drop "
            "the last, incomplete batch."
        )
    everything = [torch.empty_like(tensor) for _ in lengths]
    dist.all_gather(everything, tensor.contiguous())
    return torch.cat(everything), dist.get_rank() * len(tensor)


def activation_bonus(z: torch.Tensor) -> torch.Tensor:
    """Mean of |z| over the L2-normalised rows of z (n, d): the official code subtracts it from the loss of NCL.

    A scalar; its gradient for a row of zeros is that of the row divided by 1.
    """
    norms = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return (z / torch.where(norms > 0, norms, 1)).abs().mean()


def symmetric_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """alpha * CE + beta * reverse CE, mean over the samples (Wang et al., 2019; Fig. 6 of the paper).

    Reverse CE is -sum_c p_c log q_c with p the softmax of the logits, clamped to at least 1e-7, and q the one-hot
    label, clamped to at least 1e-4. The paper's setting for 100 classes is alpha 6.0, beta 0.1.

    Args:
        logits: (..., n, classes) floating-point.
        labels: (..., n) of an integer dtype, in [0, classes).
        alpha, beta: at least 0.

    Returns:
        (...), one loss for each of the leading indices: a scalar for logits (n, classes).

    Raises:
        TypeError: the labels are not integers.
        ValueError: shapes do not fit, a label is out of its range, or a weight is negative.
    """
    if logits.ndim < 2 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; they must be (..., n, classes) "
            "and (..., n)."
        )
    check_labels(labels.flatten(), logits.shape[-1])
    NOT_NEGATIVE.check(alpha=alpha, beta=beta)
    labels = labels.long().unsqueeze(-1)
    logarithms = logits.log_softmax(dim=-1)
    cross_entropy = -logarithms.gather(-1, labels).squeeze(-1)
    probabilities = logarithms.exp().clamp(min=LEAST_PROBABILITY, max=1)
    # log q is 0 for the label and LOG_OF_ZERO for every other class.
    wrong = probabilities.sum(dim=-1) - probabilities.gather(-1, labels).squeeze(-1)
    return (alpha * cross_entropy - beta * LOG_OF_ZERO * wrong).mean(dim=-1)
