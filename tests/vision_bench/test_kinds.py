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
    return kinds.Frozen(train, lambda: encoder, seed), encoder


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

    def fit():
        fitted.append(torch.is_grad_enabled())  # features are made without gradients, an autoencoder with them
        return frozen()[1]

    models = kinds.Frozen({kinds.BASE: OUTPUTS[kinds.BASE]}, fit)
    kinds.maker("unit", models)(OUTPUTS)
    assert fitted == []
    for name in ("sae", "random_relu", "sae"):
        kinds.maker(name, models)(OUTPUTS)
    assert fitted == [True]


def test_a_kind_that_is_fitted_to_the_training_features_is_one_entry(monkeypatch):
    def centred(models):
        mean = models.train[kinds.BASE].mean(dim=0)
        return lambda outputs: outputs[kinds.BASE] - mean

    monkeypatch.setitem(kinds.KINDS, "centred", centred)
    models, _ = frozen()
    made = kinds.maker("centred", models)(models.train)
    assert torch.allclose(made.mean(dim=0), torch.zeros(6), atol=1e-6)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'sift' is no kind of features; there are raw, unit, relu, sae, poly"):
        kinds.maker("sift", frozen()[0])
