"""What the probing recipes probe: features of frozen models, and the controls that a claim about them must survive.

`poly`: SimCLR's; `sae`: the latents of a top-k sparse autoencoder on them; `ncl`: those of non-negative contrastive
learning. Controls: `poly_unit`, poly L2-normalised, as what the latents are computed from (without `rescale` a small
scale regularises a probe of few steps by itself); `random_relu`, ReLU of a random projection of that (non-negative, as
wide as the latents, nothing learned); `random_mask`, poly with a random choice of dimensions kept in each sample (as
sparse as the latents).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from training_accuracies import CHANCE
from vision_ladder import METHODS, ProbingArguments, pretrained

from vision_bench import features, models, sae
from vision_bench.data import ImageSet
from vision_bench.metrics import MEASURED, chance_level, semantic_consistency
from vision_bench.models import ContrastiveModel
from vision_bench.runs import Run, device_name

FEATURES = ("poly", "sae", "ncl")
CONTROLS = ("poly_unit", "random_relu", "random_mask")


@dataclass(frozen=True)
class FrozenModels:
    """The models of one pretraining seed; every process has them."""

    seed: int
    contrastive: dict[str, ContrastiveModel]  # by method: "simclr" and "ncl"
    encoder: sae.TopKAutoencoder  # trained on L2-normalised features of "simclr"
    kept: int  # dimensions of a sample that random_mask leaves

    def features(self, name: str, made: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Features (n, d) on the CPU of one kind, a name in `FEATURES` or `CONTROLS`.

        Args:
            made: what "simclr" and "ncl" make of the n images, (n, d) each, as `cached` gives it.
        """
        if name == "ncl":
            return made["ncl"]
        poly = made["simclr"]
        if name == "poly":
            return poly
        if name == "poly_unit":
            return F.normalize(poly)
        if name == "sae":
            return sae.normalised_latents(self.encoder, poly)
        generator = torch.Generator().manual_seed(self.seed)
        if name == "random_relu":
            shape = self.encoder.d_in, self.encoder.d_latent
            projection = torch.randn(shape, generator=generator) / self.encoder.d_latent**0.5
            return F.relu(F.normalize(poly) @ projection)
        if name == "random_mask":
            return poly * (torch.rand(poly.shape, generator=generator).argsort(dim=1) < self.kept)
        raise ValueError(f"{name!r} is no kind of features; there are {', '.join(FEATURES + CONTROLS)}.")


def cached(
    script: ProbingArguments,
    contrastive: Mapping[str, ContrastiveModel],
    checkpoints: Mapping[str, str],
    seed: int,
    split: str,
    images: ImageSet,
) -> dict[str, torch.Tensor]:
    """Features (n, d) of a split under each model, from their shards where these exist. All processes make them.

    Args:
        checkpoints: the fingerprints of the models.
    """
    found = {}
    for method, model in contrastive.items():
        folder = Path(script.output_dir) / "features" / f"{method}-{seed}-{split}"
        of = features.extract(
            folder, model, images, split, [script.layer], progress=True, checkpoint=checkpoints[method]
        )
        found[method] = features.load(folder, script.layer, of)
    return found


def frozen_models(
    run: Run, script: ProbingArguments, seed: int, splits: Mapping[str, ImageSet], accelerator: Accelerator
) -> tuple[FrozenModels, dict[str, dict[str, torch.Tensor]]]:
    """The models of a seed, trained or loaded, and what they make of each split; adds rows of encoder and chance.

    Returns:
        The models, and by split the argument `made` of `FrozenModels.features`.
    """
    contrastive = {
        method: pretrained(script, method, seed, splits["train"], splits["test"], accelerator).model.to(
            accelerator.device
        )
        for method in METHODS
    }
    checkpoints = {method: models.fingerprint(model) for method, model in contrastive.items()}
    made = {split: cached(script, contrastive, checkpoints, seed, split, images) for split, images in splits.items()}
    train, test = (F.normalize(made[split]["simclr"]) for split in ("train", "test"))
    directions = train[train.any(dim=1)]  # a row of zeros has none
    encoder = sae.fit(
        directions,
        script.sae_latents or train.shape[1],
        script.sae_k,
        epochs=script.sae_epochs,
        learning_rate=script.sae_learning_rate,
        batch_size=min(256, len(directions)),
        seed=seed,
        accelerator=accelerator,
        checkpoint_dir=Path(script.output_dir) / "sae" / str(seed),
        progress=True,
    ).autoencoder
    if accelerator.is_main_process:
        measured = {"n": len(test), "seconds": 0.0, "device": device_name(accelerator.device)}
        if not run.find(CHANCE):
            level = chance_level(splits["test"].labels, splits["test"].num_classes)
            run.add(CHANCE, level, seed=None, **measured, split="test")
        for metric, value in zip(sae.QUALITY, sae.evaluate(encoder, test), strict=True):
            if not run.find(metric, seed=seed):
                run.add(metric, value, seed=seed, **measured)
    kept = round(script.sae_k / encoder.d_latent * encoder.d_in)
    return FrozenModels(seed, contrastive, encoder, kept), made


def seed_of(seeds: Sequence[int]) -> int | None:
    """The seed of a row that depends on the models alone: none where several seeds share them."""
    return seeds[0] if len(seeds) == 1 else None


def is_described(run: Run, name: str, seeds: Sequence[int]) -> bool:
    """Whether the run has the rows of `describe`; one of each seed, as there were for shared models, will do."""
    return all(
        run.find(metric, features=name, seed=seed_of(seeds))
        or all(run.find(metric, features=name, seed=seed) for seed in seeds)
        for metric in MEASURED
    )


def describe(
    run: Run, name: str, test: torch.Tensor, labels: torch.Tensor, seeds: Sequence[int], device: torch.device
) -> None:
    """Add the rows that say what features are, if the run lacks them: `MEASURED` on the test images.

    Models that several seeds share are measured once: copies for each seed would pass for an interval of no width.
    """
    if is_described(run, name, seeds):
        return
    start = time.monotonic()
    found = semantic_consistency(test, labels).summary
    measured = {"n": len(test), "seconds": time.monotonic() - start, "device": device_name(device)}
    seed = seed_of(seeds)
    for metric, value in found.items():
        if not run.find(metric, seed=seed, features=name):
            run.add(metric, value, seed=seed, **measured, features=name)
