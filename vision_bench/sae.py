"""Top-k sparse autoencoder of features and its training (Gao et al. 2024, arXiv:2406.04093).

    latents = ReLU(TopK((x - b_pre) W_enc^T + b_enc)),  reconstruction = latents W_dec + b_pre

Only the active latents are decoded and back-propagated: of a step's products the one that finds the active latents is
dense, all others are sparse. No gradient is computed that nobody asks for: none in x, and that of b_pre through the
encoder is one product of a vector, -(sum over the batch of the gradient in the pre-activations) W_enc.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from tqdm.auto import tqdm

from vision_bench import storage
from vision_bench.runs import locked

if TYPE_CHECKING:
    from accelerate import Accelerator

KIND, CHECKPOINT_KIND = "sparse autoencoder", "sparse autoencoder in training"
CHECKPOINT = "checkpoint.safetensors"
QUALITY = ("sae_fvu", "sae_l0", "sae_dead_share")  # the fields of `Quality`, as rows of results name them
MEDIAN_ROWS = 4096  # of the features, for the initial b_pre
CHUNK = 4096  # rows of a pass over all features
# Share of active latents up to which sparse products were faster than dense ones on a CPU (benchmarks/sae_step.py);
# on a GPU, where they were not measured, all products are dense.
SPARSE_SHARE = 1 / 8


class Active:
    """Which latents of which samples are active: the pattern of a sparse (b, d_latent) matrix, row by row.

    Args:
        columns: (nnz,) int64, the latents of the first sample, then those of the second, ...
        offsets: (b + 1,) int64, where the latents of each sample start; the last is nnz.
        d_latent: number of columns.
    """

    def __init__(self, columns: torch.Tensor, offsets: torch.Tensor, d_latent: int) -> None:
        self.columns, self.offsets = columns, offsets
        self.shape = (len(offsets) - 1, d_latent)
        self.sparse = columns.device.type == "cpu" and len(columns) <= SPARSE_SHARE * self.shape[0] * d_latent

    @classmethod
    def of_rows(cls, columns: torch.Tensor, d_latent: int) -> Active:
        """The pattern of (b, k) indices, the same number for each sample."""
        b, k = columns.shape
        return cls(columns.reshape(-1), torch.arange(0, b * k + 1, k, device=columns.device), d_latent)

    @classmethod
    def of_flat(cls, flat: torch.Tensor, b: int, d_latent: int) -> Active:
        """The pattern of (nnz,) indices into a flattened (b, d_latent) matrix."""
        flat = flat.sort().values
        ends = torch.bincount(flat // d_latent, minlength=b).cumsum(0)
        return cls(flat % d_latent, F.pad(ends, (1, 0)), d_latent)

    @cached_property
    def flat(self) -> torch.Tensor:
        """(nnz,) indices into the flattened matrix."""
        rows = torch.arange(self.shape[0], device=self.columns.device)
        return (
            rows.repeat_interleave(self.offsets.diff(), output_size=len(self.columns)) * self.shape[1] + self.columns
        )

    @cached_property
    def _transposed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latent by latent: which of the nnz entries, their samples, and where the entries of each latent start."""
        order = self.columns.argsort()
        counts = torch.bincount(self.columns, minlength=self.shape[1])
        return order, self.flat[order] // self.shape[1], counts.cumsum(0) - counts

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


class _Encode(torch.autograd.Function):
    """The active entries (nnz,) of the pre-activations (x - b_pre) W_enc^T + b_enc, which are given."""

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


class _Decode(torch.autograd.Function):
    """Latents with the active entries `values` (nnz,), times W_dec."""

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


class Output:
    """What `TopKAutoencoder.forward` returns.

    Attributes:
        reconstruction: (b, d_in).
        values: (nnz,) the active latents, at least 0.
        active: which latents they are.
        preactivations: (b, d_latent), detached.
    """

    def __init__(
        self, reconstruction: torch.Tensor, values: torch.Tensor, active: Active, preactivations: torch.Tensor
    ) -> None:
        self.reconstruction, self.values, self.active = reconstruction, values, active
        self.preactivations = preactivations

    @cached_property
    def latents(self) -> torch.Tensor:
        """(b, d_latent), at least 0, differentiable. Made when asked for: training needs only the active ones."""
        return self.active.dense(self.values)


class TopKAutoencoder(nn.Module):
    """Sparse autoencoder that keeps the k largest latents of a sample, where they are positive.

    The rows of the decoder start as random unit vectors, the encoder as its transpose and the biases at 0; `fit` puts
    b_pre at the geometric median. In a training loop of your own, call `project_decoder_gradient` before and
    `normalize_decoder` after each step of the optimiser to keep the rows of the decoder at norm 1.

    Args:
        d_in: size of a feature vector.
        d_latent: number of latents.
        k: latents kept, in [1, d_latent].
        batch_topk: keep the k b largest of a whole batch of b samples in training mode, and in eval mode all above a
            threshold that `estimate_threshold` sets (Bussmann et al. 2024, arXiv:2412.06410).
        generator: of the initial decoder; torch's own by default.

    Attributes:
        pre_bias: b_pre (d_in,).
        encoder: W_enc (d_latent, d_in).
        latent_bias: b_enc (d_latent,).
        decoder: W_dec (d_latent, d_in).
        threshold: scalar, of BatchTopK; NaN before it is estimated.

    Raises:
        ValueError: a size is out of its range.
    """

    threshold: torch.Tensor

    def __init__(
        self, d_in: int, d_latent: int, k: int, batch_topk: bool = False, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        for name, size in (("d_in", d_in), ("d_latent", d_latent)):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1.")
        if not 1 <= k <= d_latent:
            raise ValueError(f"k is {k} for d_latent {d_latent}; it must be in [1, {d_latent}].")
        self.d_in, self.d_latent, self.k, self.batch_topk = d_in, d_latent, k, batch_topk
        rows = F.normalize(torch.randn(d_latent, d_in, generator=generator), dim=1)
        self.pre_bias = nn.Parameter(torch.zeros(d_in))
        self.encoder = nn.Parameter(rows.clone())
        self.latent_bias = nn.Parameter(torch.zeros(d_latent))
        self.decoder = nn.Parameter(rows)
        self.register_buffer("threshold", torch.tensor(float("nan")))

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_latent={self.d_latent}, k={self.k}, batch_topk={self.batch_topk}"

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents (b, d_latent), at least 0 and mostly 0, of x (b, d_in)."""
        values, active, _ = self._encode(x)
        return active.dense(values)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Reconstruction (b, d_in) of latents (b, d_latent)."""
        return latents @ self.decoder + self.pre_bias

    def forward(self, x: torch.Tensor) -> Output:
        """Reconstruct x (b, d_in).

        Raises:
            ValueError: x has another shape.
            RuntimeError: BatchTopK in eval mode has no threshold yet.
        """
        values, active, preactivations = self._encode(x)
        return Output(_Decode.apply(values, self.decoder, active) + self.pre_bias, values, active, preactivations)

    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, Active, torch.Tensor]:
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise ValueError(f"x has the shape {tuple(x.shape)}; it must be (b, {self.d_in}).")
        x = x.to(self.encoder.dtype)
        with torch.no_grad():
            preactivations = torch.addmm(self.latent_bias, x - self.pre_bias, self.encoder.T)
            active = self._select(preactivations)
        kept = _Encode.apply(x, self.pre_bias, self.encoder, self.latent_bias, preactivations, active)
        return kept.relu(), active, preactivations

    def _select(self, preactivations: torch.Tensor) -> Active:
        b = len(preactivations)
        if not self.batch_topk:
            return Active.of_rows(preactivations.topk(self.k, dim=1, sorted=False).indices, self.d_latent)
        flat = preactivations.view(-1)
        if self.training:
            return Active.of_flat(flat.topk(self.k * b, sorted=False).indices, b, self.d_latent)
        if self.threshold.isnan():
            raise RuntimeError("BatchTopK has no threshold yet; call estimate_threshold(features) before eval mode.")
        return Active.of_flat((flat > self.threshold.clamp(min=0)).nonzero().squeeze(1), b, self.d_latent)

    def auxiliary_error(self, x: torch.Tensor, output: Output, dead: torch.Tensor, k_aux: int) -> torch.Tensor:
        """AuxK: what the k_aux largest dead latents leave unexplained of the residual x - reconstruction, (b, d_in).

        The residual is a constant here, and the dead latents are decoded without b_pre, which it does not contain.

        Args:
            x: (b, d_in), the input of `output`.
            dead: (d_latent,) bool, at least one of them True.
            k_aux: latents used, at most as many as are dead.
        """
        candidates = dead.nonzero().squeeze(1)
        encoder, latent_bias, decoder = (
            parameter.index_select(0, candidates) for parameter in (self.encoder, self.latent_bias, self.decoder)
        )
        preactivations = output.preactivations[:, candidates]
        chosen = preactivations.topk(min(k_aux, len(candidates)), dim=1, sorted=False).indices
        active = Active.of_rows(chosen, len(candidates))
        values = _Encode.apply(x, self.pre_bias, encoder, latent_bias, preactivations, active).relu()
        return (x - output.reconstruction).detach() - _Decode.apply(values, decoder, active)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale the rows of the decoder to norm 1."""
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True).clamp(min=torch.finfo(self.decoder.dtype).tiny))

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from the decoder's gradient the component along each row, which only changes its norm."""
        if self.decoder.grad is None:
            return
        # A few rows at a time: the products of all of them would be as large as the decoder.
        for gradient, rows in zip(self.decoder.grad.split(256), self.decoder.split(256), strict=True):
            gradient.addcmul_(rows, torch.linalg.vecdot(gradient, rows)[:, None], value=-1)

    @torch.no_grad()
    def estimate_threshold(self, features: torch.Tensor | Sequence[torch.Tensor], batch_size: int = 256) -> None:
        """BatchTopK's threshold: the smallest positive latent kept in a batch, averaged over batches of features."""
        rows = _Rows(features)
        least = []
        for start in range(0, rows.n, batch_size):
            x = rows.take(np.arange(start, min(start + batch_size, rows.n))).to(self.encoder)
            kept = torch.addmm(self.latent_bias, x - self.pre_bias, self.encoder.T).relu_().view(-1)
            kept = kept.topk(self.k * len(x), sorted=False).values
            if kept.any():
                least.append(kept[kept > 0].min())
        self.threshold.copy_(torch.stack(least).mean() if least else torch.zeros(()))


class NoVariance(ValueError):
    """Features that are all equal, on which no autoencoder can be trained or measured."""


class Quality(NamedTuple):
    """How well an autoencoder does on features, in eval mode."""

    fvu: float  # fraction of variance unexplained: 0 is perfect, 1 as good as the mean
    l0: float  # mean number of latents above 0 of a sample
    dead_share: float  # share of latents that are above 0 for no sample


class Fit(NamedTuple):
    """A trained autoencoder, in eval mode, and rows of its training.

    A row holds `step`, `epoch`, and since the row before: `loss` (without AuxK), `fvu`, `l0` (means over the batches),
    and `dead_share` (latents above 0 for none of the last `dead_after` samples).
    """

    autoencoder: TopKAutoencoder
    log: list[dict[str, float]]


def fit(
    features: torch.Tensor | Sequence[torch.Tensor],
    d_latent: int,
    k: int,
    *,
    epochs: int = 100,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    batch_topk: bool = False,
    aux_coefficient: float = 1 / 32,
    k_aux: int | None = None,
    dead_after: int | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    device: torch.device | str | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 1000,
    log_every: int | None = None,
    progress: bool = False,
) -> Fit:
    """Train a top-k autoencoder with Adam on the mean over samples of MSE / mean(x^2).

    Every epoch takes a new random order of all samples and leaves its last incomplete batch out.

    Args:
        features: (n, d) floating, normalised as those that will be encoded; or shards (n_i, d) of them, as
            `vision_bench.features.shards` yields: memory-mapped tensors stay on disk, only batches are read.
        d_latent: number of latents.
        k: latents kept for a sample, in [1, d_latent].
        epochs: passes over the features, at least 1.
        batch_size: samples of a step over all processes, in [1, n].
        learning_rate: of Adam, above 0.
        batch_topk: see `TopKAutoencoder`; the batch is that of one process.
        aux_coefficient: weight of AuxK, the loss of reconstructing the residual by dead latents; 0 turns it off.
        k_aux: dead latents used for it, by default the power of two nearest to d / 2, at most d_latent.
        dead_after: samples after which a latent that was not above 0 counts as dead, by default one epoch's.
        seed: of the initial weights and the order.
        accelerator: trains on all its processes, each on its share of every batch; the gradients are averaged.
        device: where to train without an accelerator, by default where the features are.
        checkpoint_dir: folder, which all processes see, of a checkpoint to continue from if there is one, and to
            write; by default none.
        checkpoint_every: steps between checkpoints, at least 1.
        log_every: steps between rows of the log, by default an epoch.
        progress: show a progress bar.

    Raises:
        TypeError: features are not floating.
        ValueError: a setting is out of range, features are not finite, a row of them is 0 or all are equal, there are
            fewer samples than a batch, the checkpoint is of other settings or features, or of more epochs, or another
            process is training in its folder.
        FloatingPointError: the training diverged: the loss or a weight is NaN or infinite. The checkpoint before it
            stays.
        OSError: the checkpoint cannot be written.
    """
    rows = _Rows(features)
    autoencoder = TopKAutoencoder(rows.d, d_latent, k, batch_topk, torch.Generator().manual_seed(seed))
    processes, rank = (accelerator.num_processes, accelerator.process_index) if accelerator is not None else (1, 0)
    if not 1 <= batch_size <= rows.n:
        raise ValueError(f"batch_size is {batch_size} for {rows.n} samples; it must be in [1, {rows.n}].")
    if batch_size % processes:
        raise ValueError(f"batch_size is {batch_size} for {processes} processes; it must be a multiple of them.")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate}; it must be above 0 and finite.")
    if not aux_coefficient >= 0:
        raise ValueError(f"aux_coefficient is {aux_coefficient}; it must be at least 0.")
    k_aux = min(d_latent, 2 ** max(round(np.log2(rows.d / 2)), 0)) if k_aux is None else k_aux
    dead_after = rows.n if dead_after is None else dead_after
    steps_per_epoch = rows.n // batch_size
    log_every = steps_per_epoch if log_every is None else log_every
    for name, number in {
        "epochs": epochs, "k_aux": k_aux, "dead_after": dead_after, "checkpoint_every": checkpoint_every,
        "log_every": log_every,
    }.items():  # fmt: skip
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1.")
    variance = rows.check()

    if accelerator is not None:
        device = accelerator.device
    autoencoder.to(device=rows.device if device is None else device, dtype=rows.dtype)
    training = _Training(autoencoder, learning_rate, dead_after)
    settings = {
        "d_in": rows.d, "d_latent": d_latent, "k": k, "batch_topk": batch_topk, "batch_size": batch_size,
        "learning_rate": learning_rate, "aux_coefficient": aux_coefficient, "k_aux": k_aux, "dead_after": dead_after,
        "seed": seed, "log_every": log_every, "features": rows.fingerprint(),
    }  # fmt: skip
    total = epochs * steps_per_epoch
    checkpoint = None if checkpoint_dir is None else Path(checkpoint_dir) / CHECKPOINT
    with ExitStack() as held:
        if checkpoint is not None and rank == 0 and _steps(checkpoint) < total:
            held.enter_context(locked(checkpoint.parent))
        if checkpoint is not None and checkpoint.exists():
            training.load(checkpoint, settings)
        else:
            subset = np.random.default_rng([seed, 0]).permutation(rows.n)[:MEDIAN_ROWS]
            with torch.no_grad():
                autoencoder.pre_bias.copy_(geometric_median(rows.take(np.sort(subset))))
        if training.step > total:
            raise ValueError(
                f"epochs is {epochs}, {total} steps, and {checkpoint} was trained for {training.step}; ask for at "
                "least as many, or choose another checkpoint_dir."
            )
        autoencoder.train()
        share = batch_size // processes
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        bar = tqdm(total=total, initial=training.step, desc=f"SAE {d_latent}, k {k}", disable=not progress or rank > 0)
        for step in range(training.step, total):
            epoch, within = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng([seed, 1, epoch]).permutation(rows.n), epoch
            start = within * batch_size + rank * share
            x = rows.take(order[start : start + share]).to(autoencoder.decoder)
            training.update(x, variance, aux_coefficient, k_aux, accelerator)
            is_last = training.step == total
            if is_last or training.step % log_every == 0 or training.step % checkpoint_every == 0:
                training.check(learning_rate)
            if is_last or training.step % log_every == 0:
                training.write_row(epoch)
            if checkpoint is not None and rank == 0 and (is_last or training.step % checkpoint_every == 0):
                training.save(checkpoint, settings)
            bar.update()
        bar.close()
    if accelerator is not None:
        accelerator.wait_for_everyone()
    if batch_topk:
        autoencoder.estimate_threshold(features, share)
    return Fit(autoencoder.eval(), training.log)


def _steps(checkpoint: Path) -> int:
    """The steps that a checkpoint was trained for, 0 if there is none."""
    return int(storage.read_header(checkpoint, CHECKPOINT_KIND)["step"]) if checkpoint.exists() else 0


class _Training:
    """Everything that changes from step to step."""

    def __init__(self, autoencoder: TopKAutoencoder, learning_rate: float, dead_after: int) -> None:
        self.autoencoder, self.dead_after = autoencoder, dead_after
        self.optimizer = torch.optim.Adam(autoencoder.parameters(), lr=learning_rate, fused=True)
        self.step = 0
        device = autoencoder.decoder.device
        self.idle = torch.zeros(autoencoder.d_latent, dtype=torch.int64, device=device)  # samples since above 0
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, fvu, l0, steps since the last row
        self.log: list[dict[str, float]] = []

    def update(
        self,
        x: torch.Tensor,
        variance: float,
        aux_coefficient: float,
        k_aux: int,
        accelerator: Accelerator | None,
    ) -> None:
        """One step on x (b, d_in), this process' share of the batch."""
        model = self.autoencoder
        output = model(x)
        power = x.square().mean(dim=1)
        squares = (output.reconstruction - x).square().mean(dim=1)
        loss = (squares / power).mean()
        dead = self.idle >= self.dead_after
        total = loss
        if aux_coefficient > 0 and dead.any():
            missed = model.auxiliary_error(x, output, dead, k_aux).square().mean(dim=1)
            total = loss + aux_coefficient * (missed / power).mean()
        total.backward()
        if accelerator is not None and accelerator.num_processes > 1:
            for parameter in model.parameters():
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
        model.project_decoder_gradient()
        self.optimizer.step()
        self.optimizer.zero_grad()
        model.normalize_decoder()
        self.step += 1

        with torch.no_grad():
            above = output.values > 0
            fired = torch.zeros_like(self.idle).index_add_(0, output.active.columns, above.long())
            fvu = squares.mean() * x.shape[1] / variance
            measured = torch.stack([loss.double(), fvu.double(), above.sum() / len(x), torch.ones_like(self.sums[3])])
            processes = 1
            if accelerator is not None:
                processes = accelerator.num_processes
                fired, measured = accelerator.reduce(fired, "sum"), accelerator.reduce(measured, "mean")
            self.idle = torch.where(fired > 0, 0, self.idle + len(x) * processes)
            self.sums += measured

    def check(self, learning_rate: float) -> None:
        """Raise FloatingPointError if a weight, or the loss since the last row, is NaN or infinite."""
        broken = storage.non_finite({"the loss": self.sums, **dict(self.autoencoder.named_parameters())})
        if broken is not None:
            raise FloatingPointError(
                f"The training of the autoencoder diverged before step {self.step}: {broken} is NaN or infinite. "
                f"Lower learning_rate (here {learning_rate:g}; in recipes sae_learning_rate)."
            )

    def write_row(self, epoch: int) -> None:
        loss, fvu, l0 = (self.sums[:3] / self.sums[3]).tolist()
        dead = (self.idle >= self.dead_after).double().mean().item()
        row = {"step": self.step, "epoch": epoch, "loss": loss, "fvu": fvu, "l0": l0, "dead_share": dead}
        self.log.append(row)
        self.sums.zero_()

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.autoencoder.state_dict().items()}
        for name, parameter in self.autoencoder.named_parameters():
            for key, tensor in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = tensor
        tensors |= {"idle": self.idle, "sums": self.sums}
        storage.save(path, CHECKPOINT_KIND, tensors, {"step": self.step, "log": self.log, "settings": settings})

    def load(self, path: Path, settings: dict[str, Any]) -> None:
        tensors, header = storage.load(path, CHECKPOINT_KIND)
        there = header["settings"]
        changed = [
            f"{name}: {there.get(name)!r} there, {value!r} now"
            for name, value in settings.items()
            if there.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{path} is of other settings or features ({'; '.join(changed)}). Choose another checkpoint_dir, or "
                "repeat the old settings to continue that training."
            )
        model = self.autoencoder
        model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
        for name, parameter in model.named_parameters():
            prefix = f"optimizer.{name}."
            state = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            self.optimizer.state[parameter] = {key: value.to(parameter.device).clone() for key, value in state.items()}
        self.idle.copy_(tensors["idle"])
        self.sums.copy_(tensors["sums"])
        self.step, self.log = header["step"], header["log"]


@torch.no_grad()
def evaluate(
    autoencoder: TopKAutoencoder, features: torch.Tensor | Sequence[torch.Tensor], batch_size: int = 1024
) -> Quality:
    """Quality on features (n, d) or shards of them, in eval mode; the mode it was in is restored.

    Rows of zeros, as normalisation leaves them of an image without active features, count as any other row.

    Raises:
        TypeError, ValueError: as `fit`, for the features.
    """
    rows = _Rows(features)
    variance = rows.check(zeros=True)
    was_training = autoencoder.training
    autoencoder.eval()
    error = count = 0.0
    fired = torch.zeros(autoencoder.d_latent, dtype=torch.int64, device=autoencoder.decoder.device)
    try:
        for start in range(0, rows.n, batch_size):
            x = rows.take(np.arange(start, min(start + batch_size, rows.n))).to(autoencoder.decoder)
            output = autoencoder(x)
            error += (output.reconstruction - x).double().square().sum().item()
            above = (output.values > 0).long()
            count += above.sum().item()
            fired.index_add_(0, output.active.columns, above)
    finally:
        autoencoder.train(was_training)
    return Quality(error / (variance * rows.n), count / rows.n, (fired == 0).double().mean().item())


@torch.no_grad()
def normalised_latents(autoencoder: TopKAutoencoder, features: torch.Tensor) -> torch.Tensor:
    """Latents (n, d_latent), on the CPU, of features (n, d) once their rows are L2-normalised."""
    parts = F.normalize(features).split(CHUNK)
    return torch.cat([autoencoder.encode(part.to(autoencoder.decoder)).cpu() for part in parts])


def save(path: str | Path, autoencoder: TopKAutoencoder, **header: Any) -> None:
    """Write an autoencoder to one safetensors file, whole or not at all.

    Args:
        header: what it was trained on and how, JSON-serialisable; returned by `load`.
    """
    sizes = {name: getattr(autoencoder, name) for name in ("d_in", "d_latent", "k", "batch_topk")}
    storage.save(path, KIND, autoencoder.state_dict(), {"sizes": sizes, "trained": header})


def load(path: str | Path) -> tuple[TopKAutoencoder, dict[str, Any]]:
    """The autoencoder of `save`, in eval mode on the CPU, and its header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    tensors, header = storage.load(path, KIND)
    autoencoder = TopKAutoencoder(**header["sizes"]).to(tensors["decoder"].dtype)
    autoencoder.load_state_dict(tensors)
    return autoencoder.eval(), header["trained"]


def geometric_median(points: torch.Tensor, iterations: int = 100, tolerance: float = 1e-6) -> torch.Tensor:
    """The point (d,) of least summed distance to the points (n, d), by Weiszfeld's iteration from their mean.

    Stops when a step is shorter than `tolerance` times the mean distance.
    """
    points = points.double()
    median = points.mean(dim=0)
    for _ in range(iterations):
        distances = (points - median).norm(dim=1)
        scale = distances.mean()
        if scale == 0:
            break
        weights = 1 / distances.clamp(min=1e-12 * scale.item())
        before, median = median, (weights @ points) / weights.sum()
        if (median - before).norm() <= tolerance * scale:
            break
    return median


class _Rows:
    """Features (n, d) in one or several tensors, read a batch at a time."""

    def __init__(self, features: torch.Tensor | Sequence[torch.Tensor]) -> None:
        self.shards = [features] if isinstance(features, torch.Tensor) else list(features)
        if not self.shards:
            raise ValueError("features has no shards; give at least one tensor (n, d).")
        for shard in self.shards:
            if shard.ndim != 2 or not shard.numel() or shard.shape[1] != self.shards[0].shape[1]:
                shapes = ", ".join(str(tuple(s.shape)) for s in self.shards)
                raise ValueError(f"features has the shapes {shapes}; they must be (n, d), not empty, of one d.")
            if not shard.is_floating_point():
                raise TypeError(f"features is {shard.dtype}; it must be floating, such as float32.")
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        self.n, self.d = int(self.starts[-1]), self.shards[0].shape[1]
        self.device = self.shards[0].device
        self.dtype = torch.float64 if self.shards[0].dtype == torch.float64 else torch.float32

    def take(self, indices: np.ndarray) -> torch.Tensor:
        """The rows (b, d) of these indices, in `dtype`."""
        shard_of = np.searchsorted(self.starts, indices, side="right") - 1
        result = torch.empty(len(indices), self.d, dtype=self.dtype, device=self.device)
        for i in np.unique(shard_of):
            here = np.flatnonzero(shard_of == i)
            rows = torch.from_numpy(indices[here] - self.starts[i]).to(self.device)
            result[torch.from_numpy(here).to(self.device)] = self.shards[i].detach()[rows].to(result)
        return result

    def check(self, zeros: bool = False) -> float:
        """The mean squared distance from the mean; raises ValueError for rows that cannot be trained on, or measured.

        `zeros` allows rows of zeros, which only a loss relative to their size cannot do with.
        """
        mean = torch.zeros(self.d, dtype=torch.float64, device=self.device)
        for start, chunk in self._chunks():
            finite, power = chunk.isfinite().all(dim=1), chunk.any(dim=1)
            if not finite.all():
                row = start + int((~finite).nonzero()[0])
                raise ValueError(f"features has NaN or infinite values, first in row {row}; extract them again.")
            if not zeros and not power.all():
                row = start + int((~power).nonzero()[0])
                raise ValueError(f"features has a row of zeros, first {row}: the loss is relative; leave them out.")
            mean += chunk.double().sum(dim=0) / self.n
        variance = sum((chunk.double() - mean).square().sum().item() for _, chunk in self._chunks()) / self.n
        if not variance > 1e-12 * mean.square().sum().item():
            raise NoVariance("features has equal rows only; there is no variance to explain")
        return variance

    def _chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        for start, shard in zip(self.starts[:-1], self.shards, strict=True):
            for first in range(0, len(shard), CHUNK):
                yield int(start) + first, shard[first : first + CHUNK].detach()

    def fingerprint(self) -> str:
        """Of the shape and all rows, in whatever shards they are."""
        digest = hashlib.sha256(json.dumps([self.n, self.d, str(self.dtype)]).encode())
        for _, chunk in self._chunks():
            digest.update(chunk.to(self.dtype).cpu().contiguous().numpy().data)
        return digest.hexdigest()
