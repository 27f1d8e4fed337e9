"""Words into a sweep."""

import pytest

from vision_bench.corruption_sweep import parse
from vision_bench.features import InputNoise


def test_every_combination_with_the_clean_one_first():
    sweep = parse(["label_noise=0.2,0.8", "few_shots", "gaussian", "uniform=0.3", "rotated", "inverted", "folder=a/b"])
    assert sweep.label_noise == (0, 0.2, 0.8)
    assert sweep.few_shots == (1, 0.1)
    assert sweep.noises == (None, InputNoise("gaussian", 0.6), InputNoise("uniform", 0.3))
    tests = list(sweep.tests())
    assert tests[:6] == [
        "clean", "gaussian 0.6", "uniform 0.3", "rotated", "rotated + gaussian 0.6", "rotated + uniform 0.3"
    ]  # fmt: skip
    assert tests[6] == "inverted"
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
        ("inverted=3", "'inverted=3'; inverted takes no number"),
        ("folder", "write folder=PATH"),
        ("gaussian=0.3,0.3", "the same one stands there twice"),
    ],
)
def test_bad_words_are_named(word, message):
    with pytest.raises(ValueError, match=message):
        parse([word])
