"""The batched toy model against a plain autograd loop, Elhage et al.'s geometries, and probes against torch's own."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from vision_bench.superposition import (
    accuracy,
    classify,
    fit_probes,
    flip_labels,
    geometry,
    sample,
    train,
)


def train_plainly(n, m, sparsity, seed, importance, activation, steps, batch_size, learning_rate):
    """One model by autograd and torch.optim.Adam on the same random numbers."""
    generator = np.random.default_rng(seed)
    start = generator.standard_normal((m, n), dtype=np.float32) * np.sqrt(2 / (n + m), dtype=np.float32)
    weight, bias = nn.Parameter(torch.from_numpy(start)), nn.Parameter(torch.zeros(n))
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        u = torch.from_numpy(generator.random((n, batch_size), dtype=np.float32)).T
        x = torch.relu(u - sparsity) / (1 - sparsity)
        output = x @ weight.T @ weight + bias
        output = torch.relu(output) if activation == "relu" else output
        loss = (importance ** torch.arange(n) * (x - output) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return weight.detach(), bias.detach()


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_training_equals_a_plain_loop(activation):
    shared = {"importance": 0.8, "activation": activation, "steps": 100, "batch_size": 64, "learning_rate": 5e-3}
    models = train(8, 3, [0.0, 0.7], [3, 5], **shared)
    assert models.weight.shape == (2, 2, 3, 8)
    assert models.bias.shape == (2, 2, 8)
    for i, sparsity in enumerate((0.0, 0.7)):
        for j, seed in enumerate((3, 5)):
            weight, bias = train_plainly(8, 3, sparsity, seed, **shared)
            torch.testing.assert_close(models.weight[i, j], weight, rtol=0, atol=1e-5)
            torch.testing.assert_close(models.bias[i, j], bias, rtol=0, atol=1e-5)


def test_a_model_does_not_depend_on_what_it_is_trained_beside():
    setting = {"importance": 0.7, "steps": 150, "batch_size": 64}
    together = train(20, 5, [0.0, 0.5, 0.9, 0.99], [0, 1, 2], **setting)
    for i, sparsity in enumerate((0.0, 0.5, 0.9, 0.99)):
        for j in range(3):
            alone = train(20, 5, [sparsity], [j], **setting)
            torch.testing.assert_close(together.weight[i, j], alone.weight[0, 0], rtol=0, atol=1e-5)
            torch.testing.assert_close(together.bias[i, j], alone.bias[0, 0], rtol=0, atol=1e-5)
    again = train(20, 5, [0.5], [1], **setting)
    assert torch.equal(again.weight, train(20, 5, [0.5], [1], **setting).weight)
    assert not torch.allclose(again.weight, train(20, 5, [0.5], [2], **setting).weight)


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    models = train(6, 2, [0.5], [0], steps=2, batch_size=8)
    classify(models.weight, 0.5, 50, [0], n_test=50, epochs=1, noise_rate=0.5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_dense_features_are_kept_one_by_one():
    models = train(20, 5, [0.0], [0, 1], importance=0.7, steps=2500, batch_size=256)
    found = geometry(models.weight[0])
    expected = torch.diag((torch.arange(20) < 5).float())
    torch.testing.assert_close(found.gram, expected.expand(2, 20, 20), rtol=0, atol=0.03)
    assert found.represented.tolist() == [5, 5]
    assert found.superposition.tolist() == [0, 0]
    torch.testing.assert_close(found.features_per_dimension, torch.ones(2), rtol=0, atol=0.01)


@pytest.mark.slow
def test_dense_features_give_a_diagonal_gram():
    gram = geometry(train(20, 5, [0.0], range(5), importance=0.7).weight[0]).gram
    torch.testing.assert_close(gram, torch.diag((torch.arange(20) < 5).float()).expand(5, 20, 20), rtol=0, atol=0.01)


def test_sparse_equal_features_form_antipodal_pairs():
    found = geometry(train(50, 25, [0.99], [0], batch_size=256).weight[0])
    norms = found.gram.diagonal(dim1=-2, dim2=-1).sqrt()
    cosines = (found.gram / norms[:, :, None] / norms[:, None, :])[0]
    opposite = cosines < -0.97
    assert (opposite.sum(dim=1) == 1).all()  # 25 pairs
    assert torch.equal(opposite, opposite.T)
    assert cosines.masked_fill(opposite | torch.eye(50, dtype=torch.bool), 0).abs().max() < 0.05
    torch.testing.assert_close(norms, torch.ones(1, 50), rtol=0, atol=0.05)
    assert found.represented.item() == 50
    assert found.superposition.item() == 1


def test_no_active_feature_leaves_the_weights_alone():
    models = train(6, 2, [1.0], [0], steps=20, batch_size=8)
    start = np.random.default_rng(0).standard_normal((2, 6), dtype=np.float32) * np.float32(0.5)
    torch.testing.assert_close(models.weight[0, 0], torch.from_numpy(start))


def test_geometry_of_known_encoders():
    mono = torch.eye(2, 4)
    pairs = torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1]])
    partly = torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, 0]])
    found = geometry(torch.stack([mono, pairs, partly]))
    assert found.represented.tolist() == [2, 4, 3]
    assert found.features_per_dimension.tolist() == [1, 2, 1.5]
    assert found.superposition.tolist() == pytest.approx([0, 1, 2 / 3])


def test_samples_follow_the_definition():
    x, labels = sample(40_000, 3, 0.8, np.random.default_rng(0))
    assert (x.dtype, labels.dtype, x.shape) == (torch.float32, torch.int64, (40_000, 3))
    assert x.any(dim=1).all()
    assert torch.equal(x.gather(1, labels[:, None])[:, 0], x.amax(dim=1))
    active = x[x > 0]
    expected = 0.2 / (1 - 0.8**3)  # P(active | some active)
    assert active.numel() / x.numel() == pytest.approx(expected, abs=0.008)
    assert active.mean().item() == pytest.approx(0.5, abs=0.01)
    assert active.max() <= 1
    assert torch.bincount(labels).float().div(40_000).sub(1 / 3).abs().max() < 0.012


@pytest.mark.parametrize(("flips", "kept"), [("others", 0.4), ("all", 0.4 + 0.6 / 5)])
def test_flipped_labels(flips, kept):
    labels = torch.arange(5).repeat(8000)
    flipped = flip_labels(labels, 0.6, 5, np.random.default_rng(0), flips)
    assert (flipped == labels).float().mean().item() == pytest.approx(kept, abs=0.01)
    shift = torch.bincount((flipped - labels) % 5, minlength=5)[1:] / len(labels)
    torch.testing.assert_close(shift, torch.full((4,), (1 - kept) / 4), rtol=0, atol=0.01)
    assert torch.equal(flip_labels(labels, 0.0, 5, np.random.default_rng(0), flips), labels)


def test_flips_without_signal_warn():
    labels = torch.zeros(10, dtype=torch.int64)
    with pytest.warns(UserWarning, match="the order of methods means nothing"):
        flip_labels(labels, 0.9, 10, np.random.default_rng(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flip_labels(labels, 0.9, 11, np.random.default_rng(0))
        flip_labels(labels, 0.9, 10, np.random.default_rng(0), "all")


def test_probes_equal_torch_one_by_one():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 90, 4, generator=generator)
    labels = torch.randint(5, (3, 90), generator=generator)
    # 5 classes do not divide 17 or 90 - 5 * 17: a gradient of exactly 0 would leave Adam's first step to rounding.
    weight, bias = fit_probes(features, labels, 5, np.random.default_rng(7), epochs=3, batch_size=17)
    right = accuracy((weight, bias), features, labels)
    for k in range(3):
        layer = nn.Linear(4, 5)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        order = np.random.default_rng(7)
        for _ in range(3):
            for batch in torch.from_numpy(order.permutation(90)).split(17):
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(features[k, batch]), labels[k, batch]).backward()
                optimizer.step()
        torch.testing.assert_close(weight[k], layer.weight.detach().T, rtol=0, atol=1e-5)
        torch.testing.assert_close(bias[k, 0], layer.bias.detach(), rtol=0, atol=1e-5)
        predicted = layer(features[k]).argmax(dim=1)
        assert right[k].item() == pytest.approx((predicted == labels[k]).float().mean().item(), abs=1e-6)


def test_classification_ranks_encoders_and_noise():
    everything, blind = torch.eye(12).repeat(2, 1, 1), torch.zeros(2, 12, 12)
    found = classify(torch.stack([everything, blind]), 0.5, 3000, [0, 1], 0.5, input_noises=(0.0, 1.0), n_test=2000)
    assert found.clean.shape == found.label_noise.shape == (2, 2)
    assert found.input_noise.shape == (2, 2, 2)
    assert (found.clean[0] > 0.75).all()
    assert (found.label_noise[0] < found.clean[0]).all()
    torch.testing.assert_close(found.input_noise[0], found.clean)
    assert (found.input_noise[1, 0] < found.clean[0] - 0.2).all()
    assert (found.clean[1] < 0.15).all()  # chance is 1/12
    again = classify(everything[None, 1:], 0.5, 3000, [1], 0.5, input_noises=(0.0, 1.0), n_test=2000)
    torch.testing.assert_close(again.clean[0, 0], found.clean[0, 1], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_dims": 7}, "n_dims is 7; it must be in .1, n_features., and n_features is 6"),
        ({"n_dims": 0}, "n_dims is 0"),
        ({"sparsities": [0.5, 1.5]}, "sparsities has 1.5; it must be in .0, 1."),
        ({"sparsities": []}, "sparsities and seeds must each have a value"),
        ({"importance": 0}, "importance is 0"),
        ({"activation": "gelu"}, "activation is 'gelu'; it must be one of 'relu', 'linear'"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_bad_training_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        train(**({"n_features": 6, "n_dims": 2, "sparsities": [0.5], "seeds": [0]} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_samples": 5}, "5 samples for 6 classes"),
        ({"sparsity": 1.0}, "sparsity is 1.0; it must be in .0, 1.,"),
        ({"noise_rate": 1.1}, "noise_rate has 1.1"),
        ({"flips": "some"}, "flips is 'some'"),
        ({"input_noises": [-0.1]}, "input_noises has -0.1"),
        ({"seeds": [0, 1]}, "encoders has 1 seeds and seeds 2"),
        ({"n_test": 0}, "n_test is 0"),
    ],
)
def test_bad_classification_input_is_named(change, message):
    good = {"encoders": torch.eye(2, 6)[None, None], "sparsity": 0.5, "n_samples": 60, "seeds": [0], "noise_rate": 0.5}
    with pytest.raises(ValueError, match=message):
        classify(**(good | change))
