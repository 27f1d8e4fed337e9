"""Top-k sparse autoencoder of features and its training (Gao et al. 2024, arXiv:2406.04093).

    latents = ReLU(TopK((x - b_pre) W_enc^T + b_enc)),  reconstruction = latents W_dec + b_pre

Of a training step's products the one that finds the active latents is dense, all others are sparse (`sae_kernels`).
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from vision_bench import storage
from vision_bench.checks import POSITIVE, check_counts, check_features, check_finite, check_name
from vision_bench.geometric_median import geometric_median
from vision_bench.runs import locked
from vision_bench.sae_kernels import Active, Decode, Encode

CHECKPOINT_KIND = "sparse autoencoder in training"
CHECKPOINT = "autoencoder.safetensors"
HALVES = ("encoder", "decoder")  # the weights of which one may stay random
QUALITY = ("sae_fvu", "sae_l0", "sae_dead_share")  # the fields of `Quality`, as rows of results name them
MEDIAN_ROWS = 4096  # of the features, for the initial b_pre
CHUNK = 4096  # rows of a pass over all features
AUX_COEFFICIENT = 1 / 32  # weight of AuxK in the loss, as in Gao et al.


@dataclass
class Output:
    """What `TopKAutoencoder.forward` returns."""

    reconstruction: torch.Tensor  # (b, d_in)
    values: torch.Tensor  # (nnz,), the active latents, at least 0
    active: Active  # which latents they are
    preactivations: torch.Tensor  # (b, d_latent), detached

    @cached_property
    def latents(self) -> torch.Tensor:
        """(b, d_latent), at least 0, differentiable; computed when asked for: training needs the active ones only."""
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
        generator: of the initial decoder; torch's own by default.

    Attributes:
        pre_bias: b_pre (d_in,).
        encoder: W_enc (d_latent, d_in).
        latent_bias: b_enc (d_latent,).
        decoder: W_dec (d_latent, d_in).

    Example:
        >>> output = TopKAutoencoder(d_in=64, d_latent=256, k=16)(torch.randn(8, 64))
        >>> output.reconstruction.shape, output.latents.shape
        (torch.Size([8, 64]), torch.Size([8, 256]))

    Raises:
        ValueError: a size is out of its range.
    """

    def __init__(self, d_in: int, d_latent: int, k: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_counts(d_in=d_in, d_latent=d_latent)
        if not 1 <= k <= d_latent:
            raise ValueError(f"k is {k} for d_latent {d_latent}; it must be in [1, {d_latent}].")
        self.d_in, self.d_latent, self.k = d_in, d_latent, k
        rows = F.normalize(torch.randn(d_latent, d_in, generator=generator), dim=1)
        self.pre_bias = nn.Parameter(torch.zeros(d_in))
        self.encoder = nn.Parameter(rows.clone())
        self.latent_bias = nn.Parameter(torch.zeros(d_latent))
        self.decoder = nn.Parameter(rows)

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
        """
        values, active, preactivations = self._encode(x)
        return Output(Decode.apply(values, self.decoder, active) + self.pre_bias, values, active, preactivations)

    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, Active, torch.Tensor]:
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise ValueError(f"x has the shape {tuple(x.shape)}; it must be (b, {self.d_in}).")
        x = x.to(self.encoder.dtype)
        with torch.no_grad():
            preactivations = torch.addmm(self.latent_bias, x - self.pre_bias, self.encoder.T)
            active = Active(preactivations.topk(self.k, dim=1, sorted=False).indices, self.d_latent)
        kept = Encode.apply(x, self.pre_bias, self.encoder, self.latent_bias, preactivations, active)
        return kept.relu(), active, preactivations

    def auxiliary_error(self, x: torch.Tensor, output: Output, dead: torch.Tensor, k_aux: int) -> torch.Tensor:
        """AuxK: what the k_aux largest dead latents leave unexplained of the residual x - reconstruction, (b, d_in).

        The residual is a constant here, and the dead latents are decoded without b_pre, which it does not contain.

        Args:
            x: (b, d_in), the input of `output`.
            dead: (d_latent,) bool, at least one of them True.
            k_aux: latents used, at most as many as are dead.
        """
        candidates = dead.nonzero().squeeze(1)
        parameters = (self.encoder, self.latent_bias, self.decoder)
        encoder, latent_bias, decoder = (parameter.index_select(0, candidates) for parameter in parameters)
        preactivations = output.preactivations[:, candidates]
        chosen = preactivations.topk(min(k_aux, len(candidates)), dim=1, sorted=False).indices
        active = Active(chosen, len(candidates))
        values = Encode.apply(x, self.pre_bias, encoder, latent_bias, preactivations, active).relu()
        return (x - output.reconstruction).detach() - Decode.apply(values, decoder, active)

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


class NoVariance(ValueError):
    """Features that are all equal, on which no autoencoder can be trained or measured."""


class Quality(NamedTuple):
    """Quality of the reconstruction of features."""

    fvu: float  # fraction of variance unexplained: 0 is perfect, 1 as good as the mean
    l0: float  # mean number of latents above 0 of a sample
    dead_share: float  # share of latents that are above 0 for no sample


class Fit(NamedTuple):
    """A trained autoencoder and rows of its training."""

    autoencoder: TopKAutoencoder
    # `step`, `epoch`, and since the row before the means of `loss` (without AuxK), `fvu` and `l0`, and `dead_share`
    log: list[dict[str, float]]


def fit(
    features: torch.Tensor,
    d_latent: int,
    k: int,
    *,
    epochs: int = 100,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
    frozen: str | None = None,
    accelerator: Accelerator | None = None,
    device: torch.device | str | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 1000,
    log_every: int | None = None,
    progress: bool = False,
) -> Fit:
    """Train a top-k autoencoder with Adam on the mean over samples of MSE / mean(x^2).

    Every epoch takes a new random order of all samples and leaves its last incomplete batch out. A latent that was
    above 0 for no sample of an epoch is dead; AuxK lets dead latents reconstruct the residual, with the weight
    `AUX_COEFFICIENT` and as many of them as the power of two nearest to d / 2.

    Args:
        features: (n, d) floating, normalised as those that will be encoded. Only batches are copied, so that a
            memory-mapped tensor stays on disk.
        d_latent: number of latents.
        k: latents kept for a sample, in [1, d_latent].
        epochs: passes over the features, at least 1.
        batch_size: samples of a step over all processes, in [1, n].
        learning_rate: of Adam, above 0.
        seed: of the initial weights and the order.
        frozen: "encoder" or "decoder", which keeps its random initial weights as a control; all else is trained.
        accelerator: trains on all its processes, each on its share of every batch; the gradients are averaged.
        device: where to train without an accelerator, by default where the features are.
        checkpoint_dir: folder, which all processes see, of a checkpoint to continue from if there is one, and to
            write; by default none.
        checkpoint_every: steps between checkpoints, at least 1.
        log_every: steps between rows of the log, by default an epoch.
        progress: show a progress bar.

    Raises:
        TypeError: features are not floating.
        ValueError: a setting is out of range, features are not finite, a row of them is 0 or all are equal, the
            checkpoint is of other settings, features or more epochs, or another process is training in its folder.
        FloatingPointError: the loss or a weight is NaN or infinite. The checkpoint before it stays.
        OSError: the checkpoint cannot be written.

    Example:
        >>> autoencoder, log = fit(F.normalize(torch.randn(2000, 64)), d_latent=256, k=16, epochs=2)
        >>> log[-1]["fvu"]  # the share of the variance that the reconstruction leaves unexplained
    """
    n, d = check_features(features).shape
    features = features.detach()
    autoencoder = TopKAutoencoder(d, d_latent, k, torch.Generator().manual_seed(seed))
    if frozen is not None:
        check_name("frozen", frozen, HALVES)
        getattr(autoencoder, frozen).requires_grad_(False)
    processes, rank = (accelerator.num_processes, accelerator.process_index) if accelerator is not None else (1, 0)
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size is {batch_size} for {n} samples; it must be in [1, {n}].")
    if batch_size % processes:
        raise ValueError(f"batch_size is {batch_size} for {processes} processes; it must be a multiple of them.")
    POSITIVE.check(learning_rate=learning_rate)
    steps_per_epoch = n // batch_size
    log_every = steps_per_epoch if log_every is None else log_every
    check_counts(epochs=epochs, checkpoint_every=checkpoint_every, log_every=log_every)
    variance = _variance(features)

    if accelerator is not None:
        device = accelerator.device
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    autoencoder.to(device=features.device if device is None else device, dtype=dtype)
    training = _Training(autoencoder, learning_rate, n, variance, accelerator)
    settings = {
        "d_latent": d_latent, "k": k, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
        "frozen": frozen, "log_every": log_every, "features": storage.fingerprint({"features": features}),
    }  # fmt: skip
    total = epochs * steps_per_epoch
    checkpoint = None if checkpoint_dir is None else Path(checkpoint_dir) / CHECKPOINT
    with ExitStack() as held:
        if checkpoint is not None and rank == 0 and _steps(checkpoint) < total:
            held.enter_context(locked(checkpoint.parent))
        if checkpoint is not None and checkpoint.exists():
            training.load(checkpoint, settings)
        else:
            subset = np.sort(np.random.default_rng((seed, 0)).permutation(n)[:MEDIAN_ROWS])
            with torch.no_grad():
                autoencoder.pre_bias.copy_(geometric_median(features[torch.from_numpy(subset).to(features.device)]))
        if training.step > total:
            raise ValueError(
                f"epochs is {epochs}, {total} steps, and {checkpoint} was trained for {training.step}; ask for at "
                "least as many, or choose another checkpoint_dir."
            )
        autoencoder.train()
        share = batch_size // processes
        steps, quiet = range(training.step, total), not progress or rank > 0
        for step in tqdm(steps, f"SAE {d_latent}, k {k}", total, initial=training.step, disable=quiet):
            epoch, within = divmod(step, steps_per_epoch)
            if within == 0 or step == steps.start:
                order = torch.from_numpy(np.random.default_rng((seed, 1, epoch)).permutation(n)).to(features.device)
            start = within * batch_size + rank * share
            training.update(features[order[start : start + share]].to(autoencoder.decoder))
            is_last = training.step == total
            logs, saves = (is_last or training.step % every == 0 for every in (log_every, checkpoint_every))
            if logs or saves:
                training.check()
            if logs:
                training.write_row(epoch)
            if saves and checkpoint is not None and rank == 0:
                training.save(checkpoint, settings)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return Fit(autoencoder.eval(), training.log)


def auxiliary_latents(autoencoder: TopKAutoencoder) -> int:
    """How many dead latents AuxK takes: the power of two nearest to d / 2."""
    return min(autoencoder.d_latent, 2 ** max(round(math.log2(autoencoder.d_in / 2)), 0))


def _steps(checkpoint: Path) -> int:
    """The steps that a checkpoint was trained for, 0 if there is none."""
    return int(storage.read_header(checkpoint, CHECKPOINT_KIND)["step"]) if checkpoint.exists() else 0


@dataclass
class _Training:
    """Everything that changes from step to step."""

    autoencoder: TopKAutoencoder
    learning_rate: float
    dead_after: int  # samples after which a latent that was not above 0 is dead
    variance: float  # of the features, for the log
    accelerator: Accelerator | None = None

    def __post_init__(self) -> None:
        self.processes = 1 if self.accelerator is None else self.accelerator.num_processes
        self.trained = [parameter for parameter in self.autoencoder.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=self.learning_rate, fused=True)
        self.step = 0
        device = self.autoencoder.decoder.device
        self.idle = torch.zeros(self.autoencoder.d_latent, dtype=torch.int64, device=device)  # samples since above 0
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, fvu, l0, steps since the last row
        self.log: list[dict[str, float]] = []

    def update(self, x: torch.Tensor) -> None:
        """One step on x (b, d), this process' share of the batch."""
        model = self.autoencoder
        output = model(x)
        power = x.square().mean(dim=1)
        squares = (output.reconstruction - x).square().mean(dim=1)
        total = loss = (squares / power).mean()
        dead = self.idle >= self.dead_after
        if dead.any():
            missed = model.auxiliary_error(x, output, dead, auxiliary_latents(model)).square().mean(dim=1)
            total = loss + AUX_COEFFICIENT * (missed / power).mean()
        total.backward()
        for parameter in self.trained:
            parameter.grad = self._reduced(parameter.grad, "mean")
        model.project_decoder_gradient()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if model.decoder.requires_grad:
            model.normalize_decoder()
        self.step += 1

        with torch.no_grad():
            above = output.values > 0
            fired = torch.zeros_like(self.idle).index_add_(0, output.active.columns, above.long())
            fvu = squares.mean() * x.shape[1] / self.variance
            measured = torch.stack([loss.double(), fvu.double(), above.sum() / len(x), torch.ones_like(self.sums[3])])
            self.idle = torch.where(self._reduced(fired, "sum") > 0, 0, self.idle + len(x) * self.processes)
            self.sums += self._reduced(measured, "mean")

    def _reduced(self, tensor: torch.Tensor | None, how: str) -> Any:
        """The tensor over all processes."""
        return tensor if self.accelerator is None else self.accelerator.reduce(tensor, how)

    def check(self) -> None:
        """Raise FloatingPointError if a weight, or the loss since the last row, is NaN or infinite."""
        broken = storage.non_finite({"the loss": self.sums, **dict(self.autoencoder.named_parameters())})
        if broken is not None:
            raise FloatingPointError(
                f"The training of the autoencoder diverged before step {self.step}: {broken} is NaN or infinite. "
                f"Lower learning_rate (here {self.optimizer.param_groups[0]['lr']:g}; in recipes sae_learning_rate)."
            )

    def write_row(self, epoch: int) -> None:
        loss, fvu, l0 = (self.sums[:3] / self.sums[3]).tolist()
        dead = (self.idle >= self.dead_after).double().mean().item()
        self.log.append({"step": self.step, "epoch": epoch, "loss": loss, "fvu": fvu, "l0": l0, "dead_share": dead})
        self.sums.zero_()

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        tensors = storage.prefixed("model.", self.autoencoder.state_dict()) | storage.optimizer_state(self.optimizer)
        header = {"step": self.step, "log": self.log, "settings": settings}
        storage.save(path, CHECKPOINT_KIND, tensors | {"idle": self.idle, "sums": self.sums}, header)

    def load(self, path: Path, settings: dict[str, Any]) -> None:
        tensors, header = storage.load(path, CHECKPOINT_KIND)
        storage.refuse_another(path, header["settings"], settings)
        self.autoencoder.load_state_dict(storage.without_prefix("model.", tensors))
        storage.load_optimizer_state(self.optimizer, tensors)
        self.idle.copy_(tensors["idle"])
        self.sums.copy_(tensors["sums"])
        self.step, self.log = header["step"], header["log"]


@torch.no_grad()
def evaluate(autoencoder: TopKAutoencoder, features: torch.Tensor, batch_size: int = 1024) -> Quality:
    """Quality on features (n, d).

    Rows of zeros, as normalisation leaves them of an image without active features, count as any other row.

    Raises:
        TypeError, ValueError: as `fit`, for the features.
    """
    variance = _variance(check_features(features), zeros=True)
    error = count = 0.0
    fired = torch.zeros(autoencoder.d_latent, dtype=torch.int64, device=autoencoder.decoder.device)
    for part in features.detach().split(batch_size):
        x = part.to(autoencoder.decoder)
        output = autoencoder(x)
        error += (output.reconstruction - x).double().square().sum().item()
        above = (output.values > 0).long()
        count += above.sum().item()
        fired.index_add_(0, output.active.columns, above)
    n = len(features)
    return Quality(error / (variance * n), count / n, (fired == 0).double().mean().item())


@torch.no_grad()
def normalised_latents(autoencoder: TopKAutoencoder, features: torch.Tensor) -> torch.Tensor:
    """Latents (n, d_latent), on the CPU, of features (n, d) once their rows are L2-normalised."""
    parts = F.normalize(features).split(CHUNK)
    return torch.cat([autoencoder.encode(part.to(autoencoder.decoder)).cpu() for part in parts])


def _variance(features: torch.Tensor, zeros: bool = False) -> float:
    """The mean squared distance from the mean; raises ValueError for rows that cannot be trained on, or measured.

    `zeros` allows rows of zeros, which only a loss relative to their size cannot do with.
    """
    check_finite("features", features)
    empty = (~features.any(dim=1)).nonzero()
    if len(empty) and not zeros:
        raise ValueError(f"features has a row of zeros, first {int(empty[0])}: the loss is relative; leave them out.")
    chunks = features.detach().split(CHUNK)
    mean = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for chunk in chunks:
        mean += chunk.double().sum(dim=0) / len(features)
    variance = sum((chunk.double() - mean).square().sum().item() for chunk in chunks) / len(features)
    if not variance > 1e-12 * mean.square().sum().item():
        raise NoVariance("features has equal rows only; there is no variance to explain")
    return variance
