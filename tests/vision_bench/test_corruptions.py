"""Label noise is exact, uniform over the other classes and seeded; input noise has the distribution it names."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vision_bench.corruptions import add_input_noise, add_pixel_noise, flip_labels


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(0, 200),
    num_classes=st.integers(2, 12),
    rate=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_exactly_the_rounded_share_of_labels_changes(n, num_classes, rate, seed, data):
    dtype = data.draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))
    labels = torch.randint(num_classes, (n,), generator=seeded(seed), dtype=dtype)
    before = labels.clone()
    if labels.unique().numel() < 2 and round(rate * n):
        with pytest.raises(ValueError, match="samples of at least 2 classes"):
            flip_labels(labels, rate, num_classes, seeded(seed + 1))
        return
    noisy = flip_labels(labels, rate, num_classes, seeded(seed + 1))
    assert noisy.dtype == torch.int64
    assert noisy.shape == labels.shape
    assert int((noisy != labels).sum()) == round(rate * n)
    assert set(noisy.tolist()) <= set(labels.tolist())  # never a class without samples
    assert torch.equal(labels, before)
    assert torch.equal(noisy, flip_labels(labels, rate, num_classes, seeded(seed + 1)))


def test_new_labels_are_uniform_over_the_other_classes_and_samples_over_positions():
    n, num_classes = 60_000, 6
    labels = torch.arange(n) % num_classes
    noisy = flip_labels(labels, 0.5, num_classes, seeded())
    flipped = noisy != labels
    counts = torch.bincount(labels[flipped] * num_classes + noisy[flipped], minlength=num_classes**2)
    counts = counts.view(num_classes, num_classes)
    expected = n * 0.5 / num_classes / (num_classes - 1)
    assert bool((counts.diagonal() == 0).all())
    others = counts[~torch.eye(num_classes, dtype=torch.bool)]
    assert bool(((others - expected).abs() < 5 * expected**0.5).all())
    halves = flipped[: n // 2].sum(), flipped[n // 2 :].sum()
    assert abs(int(halves[0] - halves[1])) < 5 * (n / 4) ** 0.5


def test_classes_without_samples_are_never_drawn_and_the_others_alike():
    """As of a set that was filtered to 10 of 1,000 classes."""
    classes = torch.arange(10) * 100 + 7
    labels = classes[torch.arange(30_000) % 10]
    noisy = flip_labels(labels, 0.4, 1000, seeded())
    flipped = noisy != labels
    assert int(flipped.sum()) == 12_000
    assert torch.equal(noisy.unique(), classes)
    counts = torch.bincount(noisy[flipped], minlength=1000)[classes]
    assert bool(((counts - 1200).abs() < 5 * 1200**0.5).all())


def test_where_every_class_has_samples_the_noise_of_a_seed_is_the_offset_that_it_draws():
    labels = torch.arange(100) % 7
    generator = seeded(3)
    chosen = torch.randperm(100, generator=generator)[:40]
    expected = labels.clone()
    expected[chosen] = (labels[chosen] + torch.randint(1, 7, (40,), generator=generator)) % 7
    assert torch.equal(flip_labels(labels, 0.4, 7, seeded(3)), expected)


@pytest.mark.parametrize("rate", [np.float32(0.5), np.float64(0.5)])
def test_a_rate_may_be_any_number(rate):
    labels = torch.arange(40) % 4
    assert torch.equal(flip_labels(labels, rate, 4, seeded()), flip_labels(labels, 0.5, 4, seeded()))


def test_another_seed_gives_other_noise():
    labels = torch.arange(1000) % 10
    assert not torch.equal(flip_labels(labels, 0.3, 10, seeded(0)), flip_labels(labels, 0.3, 10, seeded(1)))


def test_the_true_class_may_be_drawn_where_that_is_asked_for():
    labels = torch.arange(50_000) % 10
    changed = flip_labels(labels, 1.0, 10, seeded(), allow_true_class=True) != labels
    assert changed.float().mean().item() == pytest.approx(0.9, abs=0.01)
    # One class leaves nothing else to draw.
    assert torch.equal(flip_labels(torch.zeros(5, dtype=torch.int64), 1.0, 1, seeded(), True), torch.zeros(5).long())


@pytest.mark.parametrize(
    ("labels", "rate", "num_classes", "error", "words"),
    [
        (torch.tensor([0.0, 1.0]), 0.1, 2, TypeError, "labels has dtype torch.float32"),
        (torch.tensor([True, False]), 0.1, 2, TypeError, "labels has dtype torch.bool"),
        (torch.tensor([0, 5]), 0.1, 5, ValueError, r"must be in \[0, 4\]"),
        (torch.tensor([-1, 1]), 0.1, 5, ValueError, "from -1 to 1"),
        (torch.tensor([[0, 1]]), 0.1, 5, ValueError, r"shape \(1, 2\)"),
        (torch.tensor([0, 1]), 1.5, 5, ValueError, "noise_rate is 1.5"),
        (torch.tensor([0, 1]), -0.1, 5, ValueError, "noise_rate is -0.1"),
        (torch.tensor([0, 1]), float("nan"), 5, ValueError, "noise_rate is nan"),
        (torch.tensor([0, 0]), 0.5, 1, ValueError, "at least 2 classes"),
        (torch.tensor([0, 0]), 0.5, 0, ValueError, "num_classes is 0"),
    ],
)
def test_bad_labels_and_rates_are_refused(labels, rate, num_classes, error, words):
    with pytest.raises(error, match=words):
        flip_labels(labels, rate, num_classes, seeded())


@pytest.mark.parametrize(
    ("kind", "mean", "std", "low", "high"),
    [
        ("gaussian", 0.0, 1.0, -10.0, 10.0),
        ("uniform", 0.5, 12**-0.5, 0.0, 1.0),
        ("uniform_centred", 0.0, 3**-0.5, -1.0, 1.0),
    ],
)
def test_input_noise_has_the_distribution_it_names(kind, mean, std, low, high):
    images = torch.randn(64, 3, 32, 32, generator=seeded(1), dtype=torch.float64)
    before = images.clone()
    noise = (add_input_noise(images, kind, 0.6, seeded()) - images) / 0.6
    assert torch.equal(images, before)
    assert noise.mean().item() == pytest.approx(mean, abs=0.01)
    assert noise.std().item() == pytest.approx(std, abs=0.01)
    assert low - 1e-6 <= noise.min().item() <= noise.max().item() <= high + 1e-6
    assert torch.equal(noise, (add_input_noise(images, kind, 0.6, seeded()) - images) / 0.6)
    assert torch.equal(add_input_noise(images, kind, 0.0, seeded()), images)
    assert add_input_noise(images.bfloat16(), kind, 0.6, seeded()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("images", "kind", "scale", "error", "words"),
    [
        (torch.zeros(1), "salt", 0.1, ValueError, "kind is 'salt'; it must be one of 'gaussian', 'uniform'"),
        (torch.zeros(1), "gaussian", -0.1, ValueError, "scale is -0.1"),
        (torch.zeros(1), "gaussian", float("inf"), ValueError, "scale is inf"),
        (torch.zeros(1, dtype=torch.uint8), "gaussian", 0.1, TypeError, "dtype torch.uint8"),
    ],
)
def test_bad_input_noise_is_refused(images, kind, scale, error, words):
    with pytest.raises(error, match=words):
        add_input_noise(images, kind, scale, seeded())


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_pixel_noise_is_added_to_clamped_pixels(kind):
    pixels = torch.rand(4, 3, 5, 6, generator=seeded(1))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    normalised = torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    before = normalised.clone()
    noisy = add_pixel_noise(normalised, mean, std, kind, 0.6, seeded())
    draw = torch.randn if kind == "gaussian" else torch.rand
    expected = (pixels + 0.6 * draw(pixels.shape, generator=seeded())).clamp(0, 1)
    back = torch.stack([noisy[:, c] * std[c] + mean[c] for c in range(3)], dim=1)
    torch.testing.assert_close(back, expected, rtol=0, atol=1e-6)
    assert bool((back.min() >= -1e-6) & (back.max() <= 1 + 1e-6))
    assert torch.equal(normalised, before)
    torch.testing.assert_close(add_pixel_noise(normalised, mean, std, kind, 0.0, seeded()), normalised)
