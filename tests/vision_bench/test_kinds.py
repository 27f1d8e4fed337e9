"""Kinds of features against what they are by definition, and one that is added from outside."""

import pytest
import torch
import torch.nn.functional as F

from vision_bench import kinds, sae


def frozen(seed=3, d=6, latents=10, k=4):
    torch.manual_seed(0)
    encoder = sae.TopKAutoencoder(d, latents, k)
    with torch.no_grad():
        encoder.decoder.normal_()
    train = {kinds.BASE: torch.randn(20, d), kinds.NCL: torch.rand(20, d)}
    return kinds.Frozen(train, lambda half: encoder, seed), encoder


OUTPUTS = {kinds.BASE: torch.randn(7, 6, generator=torch.Generator().manual_seed(1)), kinds.NCL: torch.rand(7, 6)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raw", OUTPUTS[kinds.BASE]),
        ("poly", OUTPUTS[kinds.BASE]),
        ("ncl", OUTPUTS[kinds.NCL]),
        ("relu", OUTPUTS[kinds.BASE].clamp(min=0)),
        ("unit", torch.stack([row / row.norm() for row in OUTPUTS[kinds.BASE]])),
        ("poly_unit", torch.stack([row / row.norm() for row in OUTPUTS[kinds.BASE]])),
    ],
)
def test_what_follows_from_the_features_alone(name, expected):
    assert torch.allclose(kinds.maker(name, frozen()[0])(OUTPUTS), expected)


def test_latents_and_the_random_controls_of_them():
    models, encoder = frozen()
    unit = F.normalize(OUTPUTS[kinds.BASE])
    latents = kinds.maker("sae", models)(OUTPUTS)
    assert torch.equal(latents, encoder.encode(unit).detach())
    assert not latents.requires_grad
    projection = torch.randn((6, 10), generator=torch.Generator().manual_seed(3)) / 10**0.5
    assert torch.allclose(kinds.maker("random_relu", models)(OUTPUTS), (unit @ projection).clamp(min=0))
    masked = kinds.maker("random_mask", models)(OUTPUTS)
    assert ((masked != 0).sum(dim=1) == round(4 / 10 * 6)).all()
    assert torch.equal(masked[masked != 0], OUTPUTS[kinds.BASE][masked != 0])
    again, other = (kinds.maker("random_mask", frozen(seed)[0])(OUTPUTS) for seed in (3, 4))
    assert torch.equal(masked, again)
    assert not torch.equal(masked, other)


def test_the_autoencoder_is_fitted_once_and_only_if_a_kind_needs_it():
    fitted = []

    def fit(half):
        assert torch.is_grad_enabled()  # features are made without gradients, an autoencoder with them
        fitted.append(half)
        return frozen()[1]

    models = kinds.Frozen({kinds.BASE: OUTPUTS[kinds.BASE]}, fit)
    kinds.maker("unit", models)(OUTPUTS)
    assert fitted == []
    for name in ("sae", "random_relu", "sae"):
        kinds.maker(name, models)(OUTPUTS)
    assert fitted == [None]
    for name in ("sae_frozen_decoder", "sae_frozen_encoder", "sae_frozen_decoder"):
        kinds.maker(name, models)(OUTPUTS)
    assert fitted == [None, "decoder", "encoder"]


def test_the_twin_of_a_kind_is_it_in_another_orthonormal_basis():
    models, _ = frozen()
    for name in ("raw", "sae", "random_mask", "pca"):
        features = kinds.maker(name, models)(OUTPUTS).double()
        make = kinds.maker(f"{name}_random_basis", models)
        twin = make(OUTPUTS).double()
        assert torch.allclose(twin @ twin.T, features @ features.T, atol=1e-5)  # every angle and distance
        assert (twin.abs() > 1e-4).double().mean() > 0.95  # no axis is left to itself
        # one matrix for all images, and another for another seed
        train = make(models.train).double()
        assert torch.allclose(twin @ train.T, features @ kinds.maker(name, models)(models.train).double().T, atol=1e-5)
        assert not torch.allclose(kinds.maker(f"{name}_random_basis", frozen(seed=4)[0])(OUTPUTS).double(), twin)


def test_the_random_basis_is_drawn_uniformly():
    corners = torch.stack([kinds.random_orthogonal(2, seed) for seed in range(400)])[:, 0]  # first rows
    angles = torch.atan2(corners[:, 1], corners[:, 0])
    counts = torch.histc(angles, 4, -torch.pi, torch.pi)
    assert ((counts - 100).abs() < 4 * 100**0.5).all()


@pytest.mark.parametrize(("d", "latents", "n"), [(6, 4, 20), (6, 10, 20), (6, 10, 5)])
def test_pca_is_as_wide_as_the_latents_where_there_are_so_many_components(d, latents, n):
    models, encoder = frozen(d=d, latents=latents, k=3)
    train, unit = F.normalize(models.train[kinds.BASE][:n]).double(), F.normalize(OUTPUTS[kinds.BASE]).double()
    models = kinds.Frozen({kinds.BASE: models.train[kinds.BASE][:n]}, lambda half: encoder)
    codes = kinds.maker("pca", models)(OUTPUTS).double()
    components = torch.linalg.svd(train - train.mean(dim=0), full_matrices=False).Vh[: min(latents, d, n - 1)]
    scores = (unit - train.mean(dim=0)) @ components.T
    kept = scores.abs() >= scores.abs().topk(3, dim=1).values[:, -1:]
    expected = torch.where(kept, scores, 0)
    assert codes.shape == expected.shape == (7, min(latents, d, n - 1))
    assert torch.allclose(codes.abs(), expected.abs(), atol=1e-5)  # the sign of a component is nothing
    assert ((codes != 0).sum(dim=1) == 3).all()


def test_a_kind_that_is_fitted_to_the_training_features_is_one_entry(monkeypatch):
    def centred(models):
        mean = models.train[kinds.BASE].mean(dim=0)
        return lambda outputs: outputs[kinds.BASE] - mean

    monkeypatch.setitem(kinds.KINDS, "centred", centred)
    models, _ = frozen()
    made = kinds.maker("centred", models)(models.train)
    assert torch.allclose(made.mean(dim=0), torch.zeros(6), atol=1e-6)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"'sift' is no kind of features; there are raw, unit, relu, sae, .*, poly"):
        kinds.maker("sift", frozen()[0])


def test_the_twin_of_an_unknown_kind_is_no_kind_and_there_is_no_twin_of_a_twin():
    for name in ("sift_random_basis", "raw_random_basis_random_basis"):
        with pytest.raises(ValueError, match=f"{name}' is no kind of features; .* such as raw_random_basis"):
            kinds.maker(name, frozen()[0])
