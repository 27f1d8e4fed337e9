"""Kinds of features: how each is made from the features of frozen models. A new kind is one entry of `KINDS`.

`raw` are the features of a model as they are, `unit` the same L2-normalised, `relu` after ReLU, `sae` the latents of
a top-k sparse autoencoder of the normalised ones. The recipes call the raw features of SimCLR `poly`, and `ncl` are
those of a second model, of non-negative contrastive learning. The controls that a claim about `sae` and `ncl` must
survive: `poly_unit`, poly L2-normalised, from which the latents are computed (without rescaling, a small scale
regularises a probe of few steps by itself); `random_relu`, ReLU of a random projection of these (non-negative and as
wide as the latents, but nothing is learnt); and `random_mask`, poly with a random choice of dimensions kept in each
sample (as sparse as the latents).

    import torch
    from vision_bench import kinds

    kinds.KINDS["squared"] = kinds.of_base(lambda features, frozen: features.square())
    frozen = kinds.Frozen(train={kinds.BASE: torch.randn(100, 8)})
    make = kinds.maker("squared", frozen)
    print(make({kinds.BASE: torch.randn(10, 8)}).shape)  # torch.Size([10, 8])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from vision_bench import sae

BASE, NCL = "base", "ncl"  # the model whose features most kinds are made from, and the non-negative one of the recipes

Outputs = Mapping[str, torch.Tensor]  # features (n, d) of the same n images under each frozen model, by its name
Make = Callable[[Outputs], torch.Tensor]  # gives features (n, d') on the CPU


@dataclass(frozen=True)
class Frozen:
    """The frozen models and the autoencoder that kinds of features are made with; training images decide both.

    Args:
        train: features (n, d) of the training images under each frozen model, for kinds that are fitted to them.
        fit_encoder: trains an autoencoder of the L2-normalised features of `BASE`, or reads it; called once, if a
            kind of features needs it.
        seed: of what is drawn at random.
    """

    train: Outputs
    fit_encoder: Callable[[], sae.TopKAutoencoder] | None = None
    seed: int = 0

    @cached_property
    def encoder(self) -> sae.TopKAutoencoder:
        """The autoencoder, fitted when it is first asked for."""
        assert self.fit_encoder is not None, "this kind of features needs an autoencoder"
        with torch.enable_grad():  # which is off while features are made
            return self.fit_encoder()


Kind = Callable[[Frozen], Make]  # is called once for the models; what it returns makes training and test features


def of_base(function: Callable[[torch.Tensor, Frozen], torch.Tensor]) -> Kind:
    """The kind that a function of the features (n, d) of `BASE` makes."""
    return lambda frozen: lambda outputs: function(outputs[BASE], frozen)


def _random_relu(features: torch.Tensor, frozen: Frozen) -> torch.Tensor:
    """ReLU of a random projection of the normalised features, to as many dimensions as the autoencoder has latents."""
    shape = frozen.encoder.d_in, frozen.encoder.d_latent
    projection = torch.randn(shape, generator=torch.Generator().manual_seed(frozen.seed)) / shape[1] ** 0.5
    return F.relu(F.normalize(features) @ projection)


def _random_mask(features: torch.Tensor, frozen: Frozen) -> torch.Tensor:
    """Each sample keeps as large a share of its dimensions, drawn at random, as the autoencoder has active latents."""
    kept = round(frozen.encoder.k / frozen.encoder.d_latent * frozen.encoder.d_in)
    draws = torch.rand(features.shape, generator=torch.Generator().manual_seed(frozen.seed))
    return features * (draws.argsort(dim=1) < kept)


KINDS: dict[str, Kind] = {
    "raw": of_base(lambda features, frozen: features),
    "unit": of_base(lambda features, frozen: F.normalize(features)),
    "relu": of_base(lambda features, frozen: F.relu(features)),
    "sae": of_base(lambda features, frozen: sae.normalised_latents(frozen.encoder, features)),
    "poly": of_base(lambda features, frozen: features),
    "ncl": lambda frozen: lambda outputs: outputs[NCL],
    "poly_unit": of_base(lambda features, frozen: F.normalize(features)),
    "random_relu": of_base(_random_relu),
    "random_mask": of_base(_random_mask),
}


def maker(name: str, frozen: Frozen) -> Make:
    """The function that makes features of a kind from those of the frozen models.

    Raises:
        ValueError: `name` is not in `KINDS`.
    """
    if name not in KINDS:
        raise ValueError(f"{name!r} is no kind of features; there are {', '.join(KINDS)}.")
    kind = KINDS[name](frozen)

    @torch.no_grad()
    def make(outputs: Outputs) -> torch.Tensor:
        return kind(outputs)

    return make
