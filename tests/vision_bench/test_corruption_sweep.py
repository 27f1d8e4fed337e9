"""Words into a sweep, and the synthetic shifts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vision_bench.corruption_sweep import parse
from vision_bench.data import load_images
from vision_bench.features import InputNoise
from vision_bench.shifts import SHIFTS, shifted, thin


def test_every_combination_with_the_clean_one_first():
    sweep = parse(["label_noise=0.2,0.8", "few_shots", "gaussian", "uniform=0.3", "rotate=45", "invert", "folder=a/b"])
    assert sweep.label_noise == (0, 0.2, 0.8)
    assert sweep.few_shots == (1, 0.1)
    assert sweep.noises == (None, InputNoise("gaussian", 0.6), InputNoise("uniform", 0.3))
    tests = list(sweep.tests())
    assert tests[:6] == [
        "clean", "gaussian 0.6", "uniform 0.3", "rotate 45", "rotate 45 + gaussian 0.6", "rotate 45 + uniform 0.3"
    ]  # fmt: skip
    assert tests[6] == "invert"
    assert tests[9] == "folder a/b"
    assert len(tests) == 3 * 4
    assert list(parse([]).tests()) == ["clean"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("gausian=0.6", "'gausian=0.6', which is unknown; there are label_noise, .* folder. Do you mean gaussian?"),
        ("fog", "'fog', which is unknown; there are label_noise"),
        ("label_noise=1.5", r"label_noise=1.5; it must be in \(0, 1\]"),
        ("label_noise=nan", r"label_noise=nan; it must be in \(0, 1\]"),
        ("few_shots=1", r"few_shots=1; it must be in \(0, 1\)"),
        ("gaussian=-1", "gaussian=-1; it must be above 0"),
        ("gaussian=inf", "gaussian=inf; it must be finite"),
        ("gaussian=a,b", "gaussian='a,b'; write numbers with commas"),
        ("thin=0.5", "thin=0.5; it must be a whole number"),
        ("invert=3", "invert=3; it must be left out"),
        ("folder", "write folder=PATH"),
        ("rotate=30,30", "the same one stands there twice"),
    ],
)
def test_bad_words_are_named(word, message):
    with pytest.raises(ValueError, match=message):
        parse([word])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(4, 9), st.integers(4, 9), st.integers(0, 2**31))
def test_thin_is_the_least_of_a_neighbourhood(pixels, height, width, seed):
    images = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(seed)).byte()
    found = thin(images, pixels)
    for y in range(height):
        for x in range(width):
            least = images[:, :, y : y + pixels + 1, x : x + pixels + 1].amin(dim=(2, 3))
            assert torch.equal(found[:, :, y, x], least)


def test_shifts_keep_the_labels_and_change_images_and_fingerprint():
    test = load_images("digits", "test")
    fingerprints = {test.fingerprint}
    for name, (_, number) in SHIFTS.items():
        moved = shifted(test, name, number)
        assert torch.equal(moved.labels, test.labels)
        assert moved.images[:5].dtype == torch.uint8
        assert moved.images[:5].shape == (5, 3, 8, 8)
        assert not torch.equal(moved.images[:5], test.images[:5])
        assert torch.equal(moved.images[torch.tensor([3, 1])], moved.images[:4][[3, 1]])
        fingerprints.add(moved.fingerprint)
    assert len(fingerprints) == 1 + len(SHIFTS)
    assert torch.equal(shifted(test, "rotate", 90).images[:9], test.images[:9].rot90(1, (2, 3)))
    assert torch.equal(shifted(test, "invert", 1).images[:9], 255 - test.images[:9])
