"""Kinds of features: how each is made from the features of frozen models. A new kind is one entry of `KINDS`.

`raw` are the features of a model as they are, `unit` the same L2-normalised, `relu` after ReLU, `sae` the latents of
a top-k sparse autoencoder of the normalised ones. The recipes call the raw features of SimCLR `poly`, and `ncl` are
those of a second model, of non-negative contrastive learning. The controls that a claim about `sae` and `ncl` must
survive:

- `poly_unit`, poly L2-normalised, from which the latents are computed (without rescaling, a small scale regularises a
  probe of few steps by itself).
- `random_relu`, ReLU of a random projection of these (non-negative and as wide as the latents, but nothing is learnt).
- `random_mask`, poly with a random choice of dimensions kept in each sample (as sparse as the latents).
- `pca`, the scores of principal components of the normalised features: as many components as the autoencoder has
  latents, or as there are if it has more, and of each sample the k scores of largest magnitude (as sparse as the
  latents are, but a linear and orthonormal code).
- `sae_frozen_decoder` and `sae_frozen_encoder`, the latents of an autoencoder of which this half keeps its random
  weights; all else is trained as for `sae`.
- `simclr_head`, `ncl_head` and `csr`, what heads make of the features that are trained without labels on augmented
  views of the training images (`heads`).
- KIND`_random_basis`, the twin of any kind: its features times an orthogonal matrix, one for all images, drawn
  uniformly by the seed. All distances and angles stay as they are, and no axis means anything (docs/basis.md).

    import torch
    from vision_bench import kinds

    kinds.KINDS["squared"] = kinds.of_base(lambda features, frozen: features.square())
    frozen = kinds.Frozen(train={kinds.BASE: torch.randn(100, 8)})
    make = kinds.maker("squared", frozen)
    print(make({kinds.BASE: torch.randn(10, 8)}).shape)  # torch.Size([10, 8])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from scipy.stats import ortho_group

from vision_bench import sae
from vision_bench.heads import HEADS, Head

BASE, NCL = "base", "ncl"  # the model whose features most kinds are made from, and the non-negative one of the recipes
RANDOM_BASIS = "_random_basis"  # behind the name of a kind: its twin
# The kinds that are latents of an autoencoder, and which half of it stays random.
AUTOENCODERS = {"sae": None, "sae_frozen_decoder": "decoder", "sae_frozen_encoder": "encoder"}
CSR = "csr"  # the head that is an autoencoder, too

Outputs = Mapping[str, torch.Tensor]  # features (n, d) of the same n images under each frozen model, by its name
Make = Callable[[Outputs], torch.Tensor]  # gives features (n, d') on the CPU


@dataclass(frozen=True)
class Frozen:
    """The frozen models and the autoencoder that kinds of features are made with; training images decide both.

    Args:
        train: features (n, d) of the training images under each frozen model, for kinds that are fitted to them.
        fit_autoencoder: trains an autoencoder of the `directions` of `BASE`, or reads it, given which half of it
            keeps its random weights ("encoder", "decoder" or None); called once for each that a kind needs.
        seed: of what is drawn at random.
        heads: the trained heads of `BASE` by their names, of `heads.HEADS`, for the kinds of these names.
    """

    train: Outputs
    fit_autoencoder: Callable[[str | None], sae.TopKAutoencoder] | None = None
    seed: int = 0
    heads: Mapping[str, Head] = field(default_factory=dict)
    _fitted: dict[str | None, sae.TopKAutoencoder] = field(default_factory=dict, init=False, repr=False)

    def autoencoder(self, frozen: str | None = None) -> sae.TopKAutoencoder:
        """The autoencoder, by the half that stays random; it is fitted when it is first asked for."""
        if frozen not in self._fitted:
            assert self.fit_autoencoder is not None, "this kind of features needs an autoencoder"
            with torch.enable_grad():  # which is off while features are made
                self._fitted[frozen] = self.fit_autoencoder(frozen)
        return self._fitted[frozen]

    def latents_of(self, kind: str) -> sae.TopKAutoencoder:
        """The autoencoder whose latents a kind is, for which `has_latents` holds."""
        return self.heads[CSR].autoencoder if kind == CSR else self.autoencoder(AUTOENCODERS[kind])


Kind = Callable[[Frozen], Make]  # is called once for the models; what it returns makes training and test features


def of_base(function: Callable[[torch.Tensor, Frozen], torch.Tensor]) -> Kind:
    """The kind that a function of the features (n, d) of `BASE` makes."""
    return lambda frozen: lambda outputs: function(outputs[BASE], frozen)


def in_random_basis(kind: Kind) -> Kind:
    """The twin of a kind: its features times a random orthogonal matrix.

    For d dimensions the matrix is drawn once, in time O(d^3) and with a memory of several times 8 d^2 bytes; the
    features of n samples are then multiplied by it, n d^2 multiplications.
    """

    def of_models(frozen: Frozen) -> Make:
        make = kind(frozen)

        @cache
        def basis(d: int, dtype: torch.dtype) -> torch.Tensor:
            return random_orthogonal(d, frozen.seed).to(dtype)

        def turned(outputs: Outputs) -> torch.Tensor:
            features = make(outputs)
            return features @ basis(features.shape[1], features.dtype)

        return turned

    return of_models


def random_orthogonal(d: int, seed: int) -> torch.Tensor:
    """An orthogonal matrix (d, d) in float64 on the CPU, drawn uniformly (Haar's measure) by the seed."""
    return torch.from_numpy(ortho_group.rvs(d, random_state=seed))


def directions(features: torch.Tensor) -> torch.Tensor:
    """The L2-normalised rows of features (n, d), without rows of zeros, which have no direction."""
    return F.normalize(features[features.any(dim=1)])


def _of_head(name: str) -> Kind:
    """What a head makes of the features."""
    return of_base(lambda features, frozen: frozen.heads[name](features))


def _latents(half: str | None) -> Kind:
    """The latents of the normalised features, of an autoencoder with this half random."""
    return of_base(lambda features, frozen: sae.normalised_latents(frozen.autoencoder(half), features))


def _pca(frozen: Frozen) -> Make:
    """Scores of principal components of the normalised features, of which each sample keeps the largest."""
    from sklearn.decomposition import PCA  # takes half a second to import

    autoencoder, train = frozen.autoencoder(), directions(frozen.train[BASE])
    width = min(autoencoder.d_latent, train.shape[1], len(train) - 1)  # others have no variance
    pca = PCA(width, svd_solver="covariance_eigh").fit(train.numpy())

    def make(outputs: Outputs) -> torch.Tensor:
        scores = torch.from_numpy(pca.transform(F.normalize(outputs[BASE]).numpy()))
        kept = scores.abs().topk(min(autoencoder.k, width), dim=1).indices
        return torch.zeros_like(scores).scatter(1, kept, scores.gather(1, kept))

    return make


def _random_relu(features: torch.Tensor, frozen: Frozen) -> torch.Tensor:
    """ReLU of a random projection of the normalised features, to as many dimensions as the autoencoder has latents."""
    shape = frozen.autoencoder().d_in, frozen.autoencoder().d_latent
    projection = torch.randn(shape, generator=torch.Generator().manual_seed(frozen.seed)) / shape[1] ** 0.5
    return F.relu(F.normalize(features) @ projection)


def _random_mask(features: torch.Tensor, frozen: Frozen) -> torch.Tensor:
    """Each sample keeps as large a share of its dimensions, drawn at random, as the autoencoder has active latents."""
    autoencoder = frozen.autoencoder()
    kept = round(autoencoder.k / autoencoder.d_latent * autoencoder.d_in)
    draws = torch.rand(features.shape, generator=torch.Generator().manual_seed(frozen.seed))
    return features * (draws.argsort(dim=1) < kept)


# The controls at an autoencoder's width and k: with `AUTOENCODERS` all kinds that need one.
AT_ITS_SIZE = ("random_relu", "random_mask", "pca")
KINDS: dict[str, Kind] = {
    "raw": of_base(lambda features, frozen: features),
    "unit": of_base(lambda features, frozen: F.normalize(features)),
    "relu": of_base(lambda features, frozen: F.relu(features)),
    **{name: _latents(half) for name, half in AUTOENCODERS.items()},
    "poly": of_base(lambda features, frozen: features),
    "ncl": lambda frozen: lambda outputs: outputs[NCL],
    "poly_unit": of_base(lambda features, frozen: F.normalize(features)),
    "random_relu": of_base(_random_relu),
    "random_mask": of_base(_random_mask),
    "pca": _pca,
    **{name: _of_head(name) for name in HEADS},
}


def find(name: str) -> Kind:
    """The kind of a name of `KINDS`, or of one with `RANDOM_BASIS` behind it.

    Raises:
        ValueError: there is none.
    """
    base = name.removesuffix(RANDOM_BASIS)
    if base not in KINDS:
        raise ValueError(
            f"{name!r} is no kind of features; there are {', '.join(KINDS)}, and the twin of each, such as "
            f"raw{RANDOM_BASIS}."
        )
    return KINDS[name] if name in KINDS else in_random_basis(KINDS[base])


def needs_autoencoder(name: str) -> bool:
    """Whether a kind, or the one that it is the twin of, is made with an autoencoder."""
    return name.removesuffix(RANDOM_BASIS) in (*AUTOENCODERS, *AT_ITS_SIZE)


def has_latents(name: str) -> bool:
    """Whether the features of a kind are the latents of an autoencoder."""
    return name in (*AUTOENCODERS, CSR)


def is_drawn(name: str) -> bool:
    """Whether the seed of `Frozen` decides the features of a kind; of `pca` an autoencoder decides the size alone."""
    return name.endswith(RANDOM_BASIS) or head_of(name) is not None or (needs_autoencoder(name) and name != "pca")


def head_of(name: str) -> str | None:
    """The head that a kind, or the one that it is the twin of, is made with; None for others."""
    base = name.removesuffix(RANDOM_BASIS)
    return base if base in HEADS else None


def maker(name: str, frozen: Frozen) -> Make:
    """The function that makes features of a kind from those of the frozen models.

    Raises:
        ValueError: there is no kind of this name.
    """
    kind = find(name)(frozen)

    @torch.no_grad()
    def make(outputs: Outputs) -> torch.Tensor:
        return kind(outputs)

    return make
