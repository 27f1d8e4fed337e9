"""Time of a training step of the sparse autoencoder beside dense PyTorch, SAELens and dictionary_learning.

    pip install --target PEERS --no-deps sae-lens dictionary-learning "transformer-lens<3" einops jaxtyping \
        fancy_einsum simple-parsing docstring-parser better_abc
    OMP_NUM_THREADS=1 python benchmarks/sae_step.py --peers PEERS

One process; in every round each arm does one step on the same batch. The table has medians over the rounds of the CPU
time (other programs then change it little) and ratios to "dense": autograd, dense products, the same loss and
Adam(fused=True), nothing else, the fastest plain program. "Dense, all of it" adds what `vision_bench.sae.fit` does
beside: unit-norm decoder, gradient projection, AuxK. The peers do a step of their trainers. FVU is that of unseen
samples after `--quality_steps` steps on equal batches; the dense arms and ours start from equal weights, the peers
from their own and with losses of their own.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import NamedTuple

import torch
from measuring import machine, options_of, ratios, seconds
from torch.nn import functional as F

from vision_bench import sae
from vision_bench.geometric_median import geometric_median
from vision_bench.metrics import fraction_of_variance_unexplained

SIZES = ((2048, 2048, 256), (768, 12288, 32))
BATCH, LEARNING_RATE, NEVER = 256, 1e-3, 10**9


class Arm(NamedTuple):
    """One program: a step on a batch (b, d), and what it then makes of samples (n, d)."""

    step: Callable[[torch.Tensor], object]
    reconstruct: Callable[[torch.Tensor], torch.Tensor]


def samples(n: int, d: int, seed: int) -> torch.Tensor:
    """L2-normalised sparse sums of 2 d directions, of which each sample has 1 in 50, and noise."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(2 * d, d, generator=generator), dim=1)
    generator.manual_seed(seed)
    weights = torch.rand(n, 2 * d, generator=generator) * (torch.rand(n, 2 * d, generator=generator) < 0.02)
    return F.normalize(weights @ directions + 0.01 * torch.randn(n, d, generator=generator) + 0.02, dim=1)


def start(d: int, d_latent: int, k: int, dead: float) -> sae.TopKAutoencoder:
    """Equal weights for every arm; a share of the latents is turned off."""
    model = sae.TopKAutoencoder(d, d_latent, k, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.pre_bias.copy_(geometric_median(samples(1024, d, 1)))
        model.latent_bias[: int(dead * d_latent)] = -100
    return model.train()


def relative_error(error: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The loss of all arms but the peers': squares of the error by those of the sample, over the batch."""
    return (error.square().mean(1) / x.square().mean(1)).mean()


def dense(d: int, d_latent: int, k: int, whole: bool, dead: float = 0.0) -> Arm:
    """Autograd and dense products; `whole` with the unit-norm decoder, the projection of its gradient and AuxK."""
    model = start(d, d_latent, k, dead)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    is_dead = torch.arange(d_latent) < int(dead * d_latent)
    k_aux = min(2 ** round(torch.tensor(d / 2).log2().item()), int(is_dead.sum()))

    def latents(pre: torch.Tensor, kept: int) -> torch.Tensor:
        values, indices = pre.topk(kept, dim=1, sorted=False)
        return torch.zeros_like(pre).scatter(1, indices, values.relu())

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pre = (x - model.pre_bias) @ model.encoder.T + model.latent_bias
        return latents(pre, k) @ model.decoder + model.pre_bias, pre

    def step(x: torch.Tensor) -> None:
        reconstruction, pre = forward(x)
        loss = relative_error(reconstruction - x, x)
        if dead:
            aux = latents(pre.masked_fill(~is_dead, -torch.inf), k_aux) @ model.decoder
            loss = loss + sae.AUX_COEFFICIENT * relative_error((x - reconstruction).detach() - aux, x)
        loss.backward()
        gradient = model.decoder.grad
        if whole and gradient is not None:
            with torch.no_grad():
                gradient -= (gradient * model.decoder).sum(1, keepdim=True) * model.decoder
        optimizer.step()
        optimizer.zero_grad()
        if whole:
            with torch.no_grad():
                model.decoder.div_(model.decoder.norm(dim=1, keepdim=True))

    return Arm(step, lambda x: forward(x)[0])


def ours(d: int, d_latent: int, k: int, dead: float = 0.0) -> Arm:
    """A step of `fit`."""
    model = start(d, d_latent, k, dead)
    training = sae._Training(model, LEARNING_RATE, dead_after=NEVER, variance=1.0)
    training.idle[: int(dead * d_latent)] = NEVER
    return Arm(training.update, lambda x: model(x).reconstruction)


def ours_in_a_loop(d: int, d_latent: int, k: int) -> Arm:
    """The module in a loop of one's own."""
    model = start(d, d_latent, k, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(x: torch.Tensor) -> None:
        relative_error(model(x).reconstruction - x, x).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Arm(step, lambda x: model(x).reconstruction)


def without_init(name: str, **attributes: object) -> None:
    """Make a package importable without its __init__, which would import a whole stack of language models."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {name!r}")
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    package.__dict__.update(attributes)
    sys.modules[name] = package


def dictionary_learning(d: int, d_latent: int, k: int) -> Arm:
    """The step of TopKTrainer."""
    if "dictionary_learning" not in sys.modules:
        without_init("dictionary_learning")
        without_init("dictionary_learning.trainers")
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        NEVER, d, d_latent, k, layer=0, lm_name="none", lr=LEARNING_RATE, warmup_steps=0, seed=0, device="cpu"
    )
    count = iter(range(NEVER))
    return Arm(lambda x: trainer.update(next(count), x), lambda x: trainer.ae(x))


def saelens(d: int, d_latent: int, k: int) -> Arm:
    """The step of SAETrainer: forward with its losses, firing statistics, clipped gradient, Adam."""
    if "sae_lens" not in sys.modules:
        without_init("transformer_lens")
        without_init("sae_lens", __version__=version("sae-lens"), logger=logging.getLogger("sae_lens"))
        without_init("sae_lens.saes")
    from sae_lens import registry
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

    if "topk" not in registry.SAE_TRAINING_CLASS_REGISTRY:
        registry.register_sae_class("topk", TopKSAE, TopKSAEConfig)
        registry.register_sae_training_class("topk", TopKTrainingSAE, TopKTrainingSAEConfig)
    torch.manual_seed(0)
    model = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=d_latent, k=k)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    none_dead, since = torch.zeros(d_latent, dtype=torch.bool), torch.zeros(d_latent)

    def step(x: torch.Tensor) -> None:
        batch = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=none_dead, n_training_steps=0, is_logging_step=False
        )
        output = model.training_forward_pass(batch)
        with torch.no_grad():
            fired = output.feature_acts.bool().float().sum(-2).bool()
            since.add_(1)[fired] = 0
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Arm(step, lambda x: model(x))


def main() -> None:
    """Time the arms in turn and print a table of each size."""
    parser = options_of(__doc__)
    parser.add_argument("--peers", help="folder of the peers' packages")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quality_steps", type=int, default=40)
    options = parser.parse_args()
    if options.peers:
        sys.path.append(options.peers)
    builders: dict[str, Callable[[int, int, int], Arm]] = {
        "dense": partial(dense, whole=False),
        "dense, all of it": partial(dense, whole=True),
        "ours, `fit`": ours,
        "ours, own loop": ours_in_a_loop,
        "dense, all of it, a quarter dead": partial(dense, whole=True, dead=0.25),
        "ours, `fit`, a quarter dead": partial(ours, dead=0.25),
        "SAELens": saelens,
        "dictionary_learning": dictionary_learning,
    }
    peers = []
    for name in ("sae-lens", "dictionary-learning"):
        try:
            peers.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            peers.append(f"{name} not installed")
    print(
        f"{machine()}, {', '.join(peers)}, "
        f"{time.strftime('%Y-%m-%d')}; batch {BATCH}, median of {options.rounds} rounds\n"
    )
    print("| arm | d -> latents, k | ms | ratio to dense | per round | FVU |\n|---|---|---:|---:|---:|---:|")
    for d, d_latent, k in SIZES:
        arms = {}
        for name, build in builders.items():
            try:
                arms[name] = build(d, d_latent, k)
            except ImportError as error:
                print(f"| {name} | {d} -> {d_latent}, {k} | not run: {error} | | | |", flush=True)
        times: dict[str, list[float]] = {name: [] for name in arms}
        data = samples(16 * BATCH, d, 2).split(BATCH)
        steps = max(options.rounds + 3, options.quality_steps)
        for i in range(steps):
            for name, arm in arms.items():
                timed = 3 <= i < options.rounds + 3
                if i > 3 and not timed and "dead" in name:
                    continue
                duration = seconds(partial(arm.step, data[i % len(data)]), time.process_time)
                if timed:
                    times[name].append(duration)
        unseen = samples(2048, d, 3)
        medians = {name: median(values) for name, values in times.items()}
        for name, arm in arms.items():
            each = ratios(times, name, "dense")
            quality = "-"
            if "dead" not in name:
                with torch.no_grad():
                    quality = f"{fraction_of_variance_unexplained(arm.reconstruct(unseen), unseen):.4f}"
            print(
                f"| {name} | {d} -> {d_latent}, {k} | {1e3 * medians[name]:.1f} | "
                f"{medians[name] / medians['dense']:.2f} | {each[0]:.2f} to {each[-1]:.2f} | {quality} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
