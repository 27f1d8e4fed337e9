"""Metrics against loops written as the definitions read."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vision_bench import metrics


def consistency_by_loop(features, labels, eps, min_support=1, absolute=True):
    """One dimension after the other, as the official code does it."""
    normalised = torch.nn.functional.normalize(features, dim=1)
    shares = []
    for dimension in range(features.shape[1]):
        column = normalised[:, dimension]
        chosen = labels[(column.abs() if absolute else column) > eps]
        shares.append(float("nan") if len(chosen) < min_support else chosen.bincount().max().item() / len(chosen))
    return torch.tensor(shares, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60),
    d=st.integers(1, 20),
    classes=st.integers(1, 7),
    zeros=st.floats(0, 1),
    eps=st.sampled_from([0.0, 1e-5, 0.1]),
    min_support=st.integers(1, 5),
    absolute=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_semantic_consistency_equals_a_loop_over_dimensions(n, d, classes, zeros, eps, min_support, absolute, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=generator) * (torch.rand(n, d, generator=generator) >= zeros)
    labels = torch.randint(classes, (n,), generator=generator)
    before = features.clone()
    found = metrics.semantic_consistency(features, labels, eps, min_support, absolute)
    expected = consistency_by_loop(features, labels, eps, min_support, absolute)
    torch.testing.assert_close(found.per_dimension, expected, rtol=0, atol=1e-6, equal_nan=True)
    assert found.mean == pytest.approx(expected.nanmean().item(), abs=1e-6, nan_ok=True)
    normalised = torch.nn.functional.normalize(features, dim=1)
    active = (normalised.abs() if absolute else normalised) > eps
    assert torch.equal(found.support, active.sum(dim=0))
    assert found.live_dimensions == int(active.any(dim=0).sum())
    assert found.sparsity == pytest.approx(1 - active.float().mean().item(), abs=1e-6)
    assert torch.equal(features, before)


def test_chunks_of_dimensions_change_nothing(monkeypatch):
    features, labels = torch.randn(50, 33).relu(), torch.arange(50) % 5
    whole = metrics.semantic_consistency(features, labels)
    monkeypatch.setattr(metrics, "_CHUNK_VALUES", 50 * 4)
    monkeypatch.setattr(metrics, "_BLOCK_VALUES", 7 * 4)
    parts = metrics.semantic_consistency(features, labels)
    assert torch.equal(whole.per_dimension, parts.per_dimension)
    assert whole.chance == parts.chance
    assert torch.equal(metrics.support(features), whole.support)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-5, 0.1, 0.2])
def test_values_at_the_threshold_count_as_in_normalised_rows(dtype, eps):
    """Values within three units in the last place of eps times the norm of their row."""
    features = torch.zeros(500, 8, dtype=dtype)
    features[:, 0] = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=dtype) * 100
    for _ in range(80):  # the values are a part of the norm
        norms = torch.linalg.vector_norm(features, dim=1)
        for offset in range(-3, 4):
            features[:, 4 + offset] = eps * norms * (1 + offset * torch.finfo(dtype).eps)
    active = torch.nn.functional.normalize(features, dim=1) > torch.tensor(eps, dtype=dtype)
    assert 0 < int(active[:, 1:].sum()) < active[:, 1:].numel()
    assert torch.equal(metrics.support(features, eps), active.sum(dim=0))


@pytest.mark.parametrize("d", [1, 7, 8, 21])
def test_classes_of_any_size_are_counted_in_full(d):
    labels = torch.repeat_interleave(torch.tensor([0, 2, 3, 5]), torch.tensor([255, 256, 1, 1300]))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    features = (torch.rand(len(labels), d, generator=torch.Generator().manual_seed(1)) < 0.97).float()
    found = metrics.semantic_consistency(features, labels)
    torch.testing.assert_close(found.per_dimension, consistency_by_loop(features, labels, 1e-5), rtol=0, atol=1e-6)


def test_chance_is_what_shuffled_labels_give():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 400, generator=generator).clamp(min=1.5) - 1.5
    features *= torch.linspace(0, 1, 400) > 0.3
    labels = torch.randint(4, (300,), generator=generator).clamp(max=2)
    found = metrics.semantic_consistency(features, labels, min_support=2)
    shuffled = []
    for _ in range(20):
        order = torch.randperm(300, generator=generator)
        shuffled.append(metrics.semantic_consistency(features, labels[order], min_support=2).mean)
    assert found.chance == pytest.approx(sum(shuffled) / len(shuffled), abs=0.01)
    assert found.chance == metrics.semantic_consistency(features, labels, min_support=2).chance


def test_one_dimension_per_class_is_perfectly_consistent_and_a_dense_one_at_chance():
    labels = torch.arange(1000) % 10
    pure = metrics.semantic_consistency(torch.nn.functional.one_hot(labels).float(), labels)
    assert pure.mean == 1
    assert pure.sparsity == pytest.approx(0.9)
    assert 0.1 < pure.chance < 0.3
    dense = metrics.semantic_consistency(torch.ones(1000, 4), labels)
    assert dense.mean == pytest.approx(0.1)
    assert dense.chance == pytest.approx(0.1)


def test_a_dimension_that_fires_once_is_pure_by_chance_and_minimum_support_leaves_it_out():
    features, labels = torch.zeros(100, 3), torch.arange(100) % 10
    features[5, 0] = 1
    features[:, 1] = 1
    found = metrics.semantic_consistency(features, labels)
    assert found.per_dimension[:2].tolist() == [1, 0.1]
    assert found.chance == pytest.approx(0.55)
    supported = metrics.semantic_consistency(features, labels, min_support=2)
    assert supported.mean == pytest.approx(0.1)
    assert supported.per_dimension.isnan().tolist() == [True, False, True]
    assert supported.live_dimensions == 2


def test_scaling_rows_changes_nothing_and_eps_acts_on_normalised_rows():
    features, labels = torch.rand(40, 8) + 0.1, torch.arange(40) % 4
    features[:, 0] = 1e-7
    for scale in (1e-6, 1e6):
        found = metrics.semantic_consistency(features * scale, labels)
        assert found.live_dimensions == 7
    assert math.isnan(metrics.semantic_consistency(torch.zeros(4, 2), torch.arange(4)).mean)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), d=st.integers(1, 40), dtype=st.sampled_from(["float32", "float64", "bfloat16"]))
def test_effective_rank_is_the_entropy_of_the_singular_values(n, d, dtype):
    features = torch.randn(n, d).to(getattr(torch, dtype))
    values = torch.linalg.svdvals(torch.nn.functional.normalize(features.double(), dim=1))
    shares = values / values.sum()
    expected = -(shares * torch.log(shares.clamp(min=1e-300))).sum().item()
    # The norms of float32 features are taken in float32.
    assert metrics.effective_rank(features) == pytest.approx(expected, abs=1e-5)


def test_effective_rank_of_known_spectra():
    assert metrics.effective_rank(torch.eye(20)) == pytest.approx(math.log(20))
    assert metrics.effective_rank(torch.ones(5000, 30)) == pytest.approx(0, abs=1e-9)
    low = torch.randn(300, 4, dtype=torch.float64) @ torch.randn(4, 200, dtype=torch.float64)
    assert metrics.effective_rank(low) <= math.log(4) + 1e-9


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), d=st.integers(1, 12), dead=st.integers(0, 3))
def test_dimensions_of_zeros_are_dead(n, d, dead):
    features = torch.randn(n, d + dead)
    features[:, d:] = 0
    assert metrics.live_dimensions(features) == d
    assert metrics.dead_share(features) == pytest.approx(dead / (d + dead))
    assert metrics.sparsity(features) == pytest.approx(dead / (d + dead), abs=1e-3 + 1 / n)


def test_variance_unexplained():
    target = torch.randn(50, 7) + 3
    assert metrics.fraction_of_variance_unexplained(target, target) == 0
    mean = target.mean(dim=0).expand_as(target)
    assert metrics.fraction_of_variance_unexplained(mean, target) == pytest.approx(1)
    half = (target + mean) / 2
    assert metrics.fraction_of_variance_unexplained(half, target) == pytest.approx(0.25, abs=1e-6)
    with pytest.raises(ValueError, match="does not vary"):
        metrics.fraction_of_variance_unexplained(mean, mean)
    with pytest.raises(ValueError, match=r"shape \(7,\)"):
        metrics.fraction_of_variance_unexplained(target[0], target)


def bad(row, value):
    features = torch.ones(6, 3)
    features[row] = value
    return features


@pytest.mark.parametrize(
    ("features", "labels", "options", "error", "words"),
    [
        (bad(2, float("nan")), torch.zeros(6).long(), {}, ValueError, "NaN or infinite values in 1 of 6 rows"),
        (bad(0, float("inf")), torch.zeros(6).long(), {}, ValueError, "NaN or infinite values in 1 of 6 rows"),
        (torch.ones(6, 3), torch.zeros(6), {}, TypeError, "labels has dtype torch.float32"),
        (torch.ones(6, 3), torch.zeros(5).long(), {}, ValueError, "6 rows and labels 5"),
        (torch.ones(6, 3), torch.full((6,), -1), {}, ValueError, "from -1 to -1"),
        (torch.ones(6, 3).int(), torch.zeros(6).long(), {}, TypeError, "features has dtype torch.int32"),
        (torch.ones(6), torch.zeros(6).long(), {}, ValueError, r"shape \(6,\)"),
        (torch.ones(0, 3), torch.zeros(0).long(), {}, ValueError, r"shape \(0, 3\)"),
        (torch.ones(6, 3), torch.zeros(6).long(), {"eps": -1}, ValueError, "eps is -1"),
        (torch.ones(6, 3), torch.zeros(6).long(), {"min_support": 0}, ValueError, "min_support is 0"),
    ],
)
def test_bad_features_and_labels_are_refused(features, labels, options, error, words):
    with pytest.raises(error, match=words):
        metrics.semantic_consistency(features, labels, **options)


def test_nan_features_are_refused_by_every_metric():
    for metric in (metrics.sparsity, metrics.dead_share, metrics.effective_rank):
        with pytest.raises(ValueError, match="NaN"):
            metric(bad(1, float("nan")))


def test_the_chance_of_each_dimension_is_a_mean_over_shuffles():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(60, 6, generator=generator) * (torch.rand(60, 6, generator=generator) < 0.3)
    features[:, 5] = 0
    labels = torch.arange(60) % 3
    found = metrics.semantic_consistency(features, labels, shuffles=400)
    assert found.chance_per_dimension[5].isnan()
    assert found.chance == pytest.approx(found.chance_per_dimension[:5].mean().item())
    by_hand = torch.zeros(5)
    for seed in range(400):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        by_hand += consistency_by_loop(features, labels[order], 1e-5)[:5] / 400
    assert found.chance_per_dimension[:5].tolist() == pytest.approx(by_hand.tolist(), abs=0.015)
    with pytest.raises(ValueError, match="shuffles is 0; it must be at least 1"):
        metrics.semantic_consistency(features, labels, shuffles=0)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 30), d=st.integers(1, 8), k=st.integers(1, 9), zeros=st.floats(0, 1), seed=st.integers(0, 2**31)
)
def test_top_activated_equals_sorting_each_dimension(n, d, k, zeros, seed):
    k = min(n, k)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=generator) * (torch.rand(n, d, generator=generator) >= zeros)
    labels = torch.randint(4, (n,), generator=generator)
    found = metrics.top_activated(features, k)
    pure = metrics.purity(found, labels)
    normalised = torch.nn.functional.normalize(features, dim=1)
    for dimension in range(d):
        values = normalised[:, dimension].tolist()
        expected = sorted((i for i in range(n) if values[i] > 1e-5), key=lambda i: -values[i])[:k]
        kept = [i for i in found[dimension].tolist() if i >= 0]
        assert [values[i] for i in kept] == pytest.approx([values[i] for i in expected])
        assert found[dimension].tolist()[len(kept) :] == [-1] * (k - len(kept))
        shown = [int(labels[i]) for i in kept]
        share = max(shown.count(label) for label in shown) / len(shown) if shown else float("nan")
        assert pure[dimension].item() == pytest.approx(share, nan_ok=True)


def test_top_activated_in_chunks_is_the_same_and_k_has_a_range(monkeypatch):
    features = torch.randn(40, 21, generator=torch.Generator().manual_seed(0))
    whole = metrics.top_activated(features, 5)
    monkeypatch.setattr(metrics, "_CHUNK_VALUES", 40 * 4)
    assert torch.equal(metrics.top_activated(features, 5), whole)
    for k in (0, 41):
        with pytest.raises(ValueError, match=rf"k is {k} for 40 samples; it must be in \[1, 40\]"):
            metrics.top_activated(features, k)
