"""The table of conditions: words that name what the command measures, and rows that are added from outside."""

import csv

import pytest
import torch

from vision_bench import figures
from vision_bench.__main__ import main
from vision_bench.benchmark_settings import Shift, parse_conditions
from vision_bench.corruptions import (
    CONDITIONS,
    NORMALISED_IMAGES,
    UINT8_IMAGES,
    Condition,
    InputNoise,
    Range,
    add_input_noise,
    noise_names,
    shift_names,
)


def test_every_combination_with_the_clean_one_first():
    conditions = parse_conditions(
        ["label_noise=0.2,0.8", "few_shots", "gaussian", "uniform=0.3", "rotated", "inverted", "folder=a/b"]
    )
    assert conditions.label_noise == (0, 0.2, 0.8)
    assert conditions.few_shots == (1, 0.1)
    assert conditions.noises == (None, InputNoise("gaussian", 0.6), InputNoise("uniform", 0.3))
    tests = list(conditions.tests())
    assert tests[:6] == [
        "clean", "gaussian 0.6", "uniform 0.3", "rotated", "rotated + gaussian 0.6", "rotated + uniform 0.3"
    ]  # fmt: skip
    assert tests[6] == "inverted"
    assert tests[9] == "folder a/b"
    assert len(tests) == 3 * 4
    assert list(parse_conditions([]).tests()) == ["clean"]


def test_a_shift_may_have_strengths():
    conditions = parse_conditions(["rotated", "rotated=45,-10"])
    assert conditions.shifts == (None, Shift("rotated"), Shift("rotated", 45), Shift("rotated", -10))
    assert list(conditions.tests()) == ["clean", "rotated", "rotated 45", "rotated -10"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("gausian=0.6", "'gausian=0.6', which is unknown; there are label_noise, .* folder. Do you mean gaussian?"),
        ("fog", "'fog', which is unknown; there are label_noise"),
        ("label_noise=1.5", r"label_noise=1.5; it must be in \(0, 1\]"),
        ("label_noise=nan", r"label_noise=nan; it must be in \(0, 1\]"),
        ("few_shots=1", r"few_shots=1; it must be in \(0, 1\)"),
        ("gaussian=-1", "gaussian=-1; it must be above 0"),
        ("gaussian=inf", "gaussian=inf; it must be above 0 and finite"),
        ("gaussian=a,b", "gaussian='a,b'; write numbers with commas"),
        ("rotated=200", r"rotated=200; it must be in \(-180, 180\]"),
        ("thinned=a", "thinned='a'; write numbers with commas"),
        ("inverted=3", "'inverted=3'; inverted takes no number"),
        ("folder", "write folder=PATH"),
        ("gaussian=0.3,0.3", "the same one stands there twice"),
    ],
)
def test_bad_words_are_named(word, message):
    with pytest.raises(ValueError, match=message):
        parse_conditions([word])


def salt(images, scale, generator):
    return torch.where(torch.rand(images.shape, generator=generator) < scale, 3.0, images)


def brightened(images, amount=20):
    return (images.int() + int(amount)).clamp(0, 255).to(torch.uint8)


@pytest.fixture
def registered(monkeypatch):
    """A kind of input noise and a shift with a strength, as another package would add them: one row each."""
    noise = Condition(NORMALISED_IMAGES, salt, "share of white values", Range(0, 1, True), (0.2,))
    monkeypatch.setitem(CONDITIONS, "salt", noise)
    monkeypatch.setitem(CONDITIONS, "brightened", Condition(UINT8_IMAGES, brightened, "added", Range(0, 256), (90,)))


def test_a_noise_and_a_shift_of_another_package_are_measured_and_drawn(registered, tmp_path, monkeypatch):
    drawn, draw = [], figures.robustness_dots
    monkeypatch.setattr(figures, "robustness_dots", lambda *shown: drawn.append(shown) or draw(*shown))
    command = ["--random_init", "small_conv", "--limit", "200", "--seeds", "0", "--probe_epochs", "20"]
    command += ["--features", "raw", "--output_dir", str(tmp_path)]
    main([*command, "--corruptions", "salt", "brightened", "brightened=200"])
    with (tmp_path / "results.csv").open() as file:
        accuracies = {cell["test"]: float(cell["top1"]) for cell in csv.DictReader(file)}
    single = ["clean", "salt 0.2", "brightened 90", "brightened 200"]
    assert list(accuracies) == [
        "clean", "salt 0.2", "brightened 90", "brightened 90 + salt 0.2", "brightened 200", "brightened 200 + salt 0.2"
    ]  # fmt: skip
    assert accuracies["brightened 200"] < accuracies["clean"]
    ((panels, learner),) = drawn
    assert learner == "linear probes"
    assert list(panels["small_conv (random)"]["raw"]) == single
    assert "| salt 0.2 | brightened 90 |" in (tmp_path / "results.md").read_text()
    with pytest.raises(SystemExit, match=r"brightened=300; it must be in \(0, 256\)"):
        main([*command, "--corruptions", "brightened=300"])


def test_errors_and_names_follow_from_the_table(registered):
    assert noise_names()[-1] == "salt"
    assert shift_names()[-1] == "brightened"
    with pytest.raises(ValueError, match=r"there are .*, salt, brightened, folder. Do you mean salt?"):
        parse_conditions(["sallt"])
    with pytest.raises(ValueError, match=r"scale is 1.5; for salt it must be in \(0, 1\]"):
        add_input_noise(torch.zeros(1), "salt", 1.5, torch.Generator())
