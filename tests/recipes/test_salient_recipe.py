"""The recipe of Fig. 4(c): its statistics against loops, a run of seconds, continuation and what it refuses."""

import itertools
import shutil

import numpy as np
import probing
import pytest
import salient_features
import torch
from salient_features import bootstrap, compared, main, salient_dimensions, within_class

from tests.recipes.conftest import PROBING, contents, keep_rows, rows
from vision_bench.probe import TRAINING
from vision_bench.runs import Run
from vision_bench.sweep import rows as rows_to_add

SMALL = [*PROBING, "--draws", "200"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pretrained_models):
    path = tmp_path_factory.mktemp("salient")
    shutil.copytree(pretrained_models, path / "models")
    main(["--output_dir", str(path), *SMALL])
    return path


def test_the_salient_dimension_and_its_consistency():
    features = torch.tensor([[3.0, 1, 0], [2, 0, 1], [0, 1, 0.5], [0, 4, 0], [0, -9, 1]])
    labels = torch.tensor([0, 0, 1, 1, 0])
    found = salient_dimensions(features, labels)
    assert found.dimension.tolist() == [0, 0, 1, 1, 1]
    # dimension 0 is active in samples 0 and 1, dimension 1 in 0, 2, 3, 4
    assert found.consistency.tolist() == [1, 1, 0.5, 0.5, 0.5]
    assert 0.5 < found.chance[0] < 1
    signed = salient_dimensions(features, labels, absolute=False)
    assert signed.dimension.tolist() == [0, 0, 1, 1, 2]
    assert signed.consistency[2].item() == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="1 of 6 test samples activate no dimension"):
        salient_dimensions(torch.cat([features, torch.zeros(1, 3)]), torch.tensor([0, 0, 1, 1, 0, 0]))


def test_bootstrap_draws_dimensions_not_samples():
    generator = torch.Generator().manual_seed(0)
    dimension = torch.randint(12, (300,), generator=generator) * 7  # gaps in the numbers
    values = torch.rand(100, generator=generator, dtype=torch.float64)
    right = torch.rand(300, generator=generator) < 0.3
    salient = salient_features.Salient(dimension, values[dimension], torch.zeros(300))
    drawn = bootstrap(salient, right, 4000, seed=0)
    rng, present = np.random.default_rng(1), dimension.unique().tolist()
    by_hand = []
    for _ in range(1500):
        again = rng.choice(present, len(present))
        members = [torch.nonzero(dimension == d).squeeze(1) for d in again]
        samples = torch.cat(members)
        of = values[dimension[samples]]
        by_hand.append([of[right[samples]].mean().item(), of[~right[samples]].mean().item()])
    assert drawn.shape == (4000, 2)
    for q in (0.025, 0.5, 0.975):
        assert np.quantile(drawn, q, axis=0) == pytest.approx(np.quantile(by_hand, q, axis=0), abs=0.03)


def test_within_class_compares_samples_of_one_class():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    right = torch.tensor([True, True, False, True, False, True])
    values = torch.tensor([0.9, 0.7, 0.5, 0.1, 0.2, 1.0], dtype=torch.float64)
    # class 0: 0.8 - 0.5 with weight 2 / 3; class 1: 0.1 - 0.2 with weight 1 / 2; class 2 has no wrong one
    assert within_class(values, right, labels) == pytest.approx((0.3 * 2 / 3 - 0.1 / 2) / (2 / 3 + 1 / 2))
    assert np.isnan(within_class(values, torch.ones(6, dtype=torch.bool), labels))


def test_every_kind_of_features_has_its_rows(folder):
    arms = {(name, seed) for name in ("poly", "sae", "ncl") for seed in (0, 1)}
    for metric in ("salient_difference", "salient_difference_within_class", "offline_probe_top1", "sparsity"):
        assert {(r["config"]["features"], r["seed"]) for r in rows(folder, metric)} == arms
    for metric in ("salient_consistency", "salient_chance"):
        found = {(r["config"]["features"], r["seed"], r["config"]["group"]): r for r in rows(folder, metric)}
        assert {key[:2] for key in found} == arms
        for name, seed in arms:
            right, wrong = found[name, seed, "right"], found[name, seed, "wrong"]
            assert right["n"] + wrong["n"] == 360
            (accuracy,) = [
                r for r in rows(folder, "offline_probe_top1") if (r["config"]["features"], r["seed"]) == (name, seed)
            ]
            assert accuracy["value"] == pytest.approx(right["n"] / 360)
    for row in rows(folder, "salient_consistency"):
        config = row["config"]
        assert config["low"] - 1e-9 <= row["value"] <= config["high"] + 1e-9
        assert sum(config["histogram"]) == pytest.approx(1, abs=1e-3)
        centre = sum((i + 0.5) / 1000 * share for i, share in enumerate(config["histogram"]))
        assert centre == pytest.approx(row["value"], abs=1e-3)
        if config["features"] == "poly":  # every dimension is active in every sample: the share of the largest class
            assert row["value"] == pytest.approx(37 / 360, abs=2e-3)
    assert all(row["config"]["noise_rate"] == 0.8 for row in rows(folder, "salient_difference"))


def test_table_and_picture(folder):
    text = (folder / "results.md").read_text()
    poly = next(line for line in text.splitlines() if line.startswith("| poly"))
    assert poly.endswith("does not: no difference |")
    assert "80 % wrong labels" in text
    assert "right - wrong within classes" in text
    assert (folder / "figure_4c.png").stat().st_size > 5000
    assert (folder / "figure_4c.pdf").read_bytes().startswith(b"%PDF")


def test_a_stopped_run_continues_to_the_same_rows(folder, tmp_path):
    stopped = tmp_path / "stopped"
    shutil.copytree(folder, stopped)
    keep_rows(stopped, lambda lines: lines[: len(lines) * 2 // 3])
    main(["--output_dir", str(stopped), *SMALL])

    assert contents(stopped) == contents(folder)


def test_same_settings_reprint_and_others_are_refused(folder, monkeypatch, capsys):
    before = (folder / "results.jsonl").read_bytes()
    monkeypatch.setattr(probing, "frozen_models", None)  # nothing is measured again
    main(["--output_dir", str(folder), *SMALL])
    assert "right - wrong" in capsys.readouterr().out
    assert (folder / "results.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match=r"another configuration .*noise_rate: 0.8 there, 0.5 now"):
        main(["--output_dir", str(folder), *SMALL, "--noise_rate", "0.5"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise_rate", "90"], r"noise_rate is 90.0; it must be in \[0, 1\]"),
        (["--draws", "10"], "draws is 10; the bounds of an interval need at least 100"),
        (["--sae_k", "99"], "sae_k is 99 for 32 latents"),
        (["--layer", "head"], "layer is 'head'; it must be one of"),
    ],
)
def test_bad_settings_are_named_before_training(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["--output_dir", str(tmp_path / "bad"), *SMALL, *arguments])
    assert not (tmp_path / "bad").exists()


def test_a_difference_within_classes_that_there_is_not_has_no_row(tmp_path):
    """Of each class all samples are right, or all are wrong."""
    config = {"seeds": [0, 1], "draws": 100, "noise_rate": 0.8, "absolute": True, "shared_pretraining": False}
    run = Run(tmp_path, "salient_features", {**config, "data": "digits", "backbone": "small_conv"})
    labels = torch.arange(40) % 2
    salient = salient_features.Salient(torch.arange(40), torch.rand(40).double(), torch.rand(40).double())
    measured = {"seconds": 0.0, "device": "cpu"}
    for name, seed in itertools.product(("poly", "sae", "ncl"), (0, 1)):
        (batch,) = rows_to_add(run, [compared(name, seed, salient, labels == 0, labels, 100)], torch.device("cpu"))
        run.add_rows(batch)
        for metric in ("semantic_consistency", "chance_consistency", "sparsity"):
            run.add(metric, 0.5, n=40, seed=seed, features=name, **measured)
        for metric, value in zip(TRAINING, (0.2, 0.1 + 0.2 * (name == "ncl")), strict=True):
            run.add(metric, value, n=40, seed=seed, features=name, **measured)
    run.add("chance_top1", 0.5, n=40, seed=None, **measured)
    assert not run.find("salient_difference_within_class")
    assert len(run.find("offline_probe_top1")) == 6
    assert "NaN" not in (tmp_path / "results.jsonl").read_text()
    run.add("salient_difference_within_class", 0.25, n=40, seed=1, features="sae", **measured)
    text = salient_features.report(run)
    assert "Chance level of top-1: 50.0 %." in text
    assert "**Warning: not trained.**" in text
    assert "\n- ncl (20.0 %, class means 30.0 %)\n" in text
    assert "| ncl | 50.0 ± 0.0 | 20.0 ± 0.0 (not trained) |" in text
    held_against = text.split("## What it must be held against")[1]
    lines = [line for line in held_against.splitlines() if line.startswith(("| poly |", "| sae |"))]
    assert [line.split(" | ")[4] for line in lines] == ["-", "+0.2500 (1 of 2 seeds)"]


def test_nothing_to_compare_is_said(folder):
    right = torch.ones(4, dtype=torch.bool)
    salient = salient_features.Salient(torch.zeros(4), torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match="sae, seed 3: 4 of 4 test samples are classified rightly"):
        compared("sae", 3, salient, right, torch.zeros(4), 100)
