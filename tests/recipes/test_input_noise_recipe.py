"""The recipe of Fig. 2(a, b) at a size of seconds: rows against slow twins, continuation and what it refuses."""

import json
import shutil

import input_noise_probing
import pytest
import shifted
import torch
from input_noise_probing import main

from vision_bench import models
from vision_bench.data import load_images
from vision_bench.probe import fit_linear_probes

SMALL = ["--seeds", "0", "1", "--pretraining_epochs", "2", "--warmup_epochs", "1", "--projector_hidden", "32"]
SMALL += ["--projector_out", "32", "--sae_k", "4", "--sae_epochs", "4", "--probe_epochs", "4"]
SMALL += ["--decays", "1e-3", "0.1"]
NOISE = ["--scales", "0.5", "2"]
SHARED = [*SMALL, "--noises", "gaussian", "--scales", "0.5", "--shared_pretraining"]
MEASURED = ("semantic_consistency", "chance_consistency", "sparsity", "live_dimensions")
ARMS = {"poly", "sae", "ncl", "poly_decay", "poly_unit", "random_relu", "random_mask"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("input_noise")
    main(["--output_dir", str(path), *SMALL, *NOISE])
    return path


def rows(folder, metric="offline_probe_top1", **arm):
    lines = (folder / "results.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["metric"] == metric]
    return [r for r in found if all((r["config"] | {"seed": r["seed"]}).get(k) == v for k, v in arm.items())]


def value(folder, **arm):
    (row,) = rows(folder, **arm)
    return row["value"]


def test_every_cell_has_a_row_and_noise_costs_accuracy(folder):
    cells = {("none", 0.0), *((noise, scale) for noise in ("uniform", "gaussian") for scale in (0.5, 2.0))}
    found = {(r["config"]["features"], r["config"]["noise"], r["config"]["scale"], r["seed"]) for r in rows(folder)}
    assert found == {(arm, *cell, seed) for arm in ARMS for cell in cells for seed in (0, 1)}
    assert len(rows(folder)) == (len(ARMS) + 1) * 5 * 2
    assert all(0 <= row["value"] <= 1 and row["n"] == 360 for row in rows(folder))
    assert all(row["config"]["noise_seed"] == row["seed"] for row in rows(folder, noise="gaussian"))
    for arm in ("poly", "ncl", "sae"):
        for seed in (0, 1):
            clean = value(folder, features=arm, noise="none", seed=seed)
            assert clean > value(folder, features=arm, noise="gaussian", scale=2.0, seed=seed)
    assert (
        len({value(folder, features=arm, noise="gaussian", scale=0.5, seed=0) for arm in ("poly", "sae", "ncl")}) > 1
    )
    assert value(folder, features="poly", noise="none", seed=0) != value(folder, features="poly", noise="none", seed=1)


def by_hand(folder, model_name, seed):
    """Accuracy under Gaussian noise of 0.5, of the noise and the probe of a seed."""
    train, test = load_images("digits", "train"), load_images("digits", "test")
    model, _ = models.load(folder / "models" / model_name / "model.safetensors")
    model.eval()

    def normalised(images):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images.mean, images.std))
        return (images.images / 255 - mean) / std

    with torch.no_grad():
        clean = model(normalised(train)).output
        noise = torch.Generator().manual_seed(seed)
        parts = [x + 0.5 * torch.randn(x.shape, generator=noise) for x in normalised(test).split(256)]
        noisy = torch.cat([model(x).output for x in parts])
    weights, biases = fit_linear_probes(clean, train.labels[None], 10, epochs=4, seeds=seed)
    right = (noisy @ weights[0].T + biases[0]).argmax(dim=1) == test.labels
    return pytest.approx(right.double().mean().item(), abs=1.1 / 360)  # an image may lie on the border


@pytest.mark.parametrize(("arm", "method"), [("poly", "simclr"), ("ncl", "ncl")])
def test_rows_equal_noise_added_and_probed_by_hand(folder, arm, method):
    found = value(folder, features=arm, noise="gaussian", scale=0.5, seed=1)
    assert found == by_hand(folder, f"{method}-1", 1)


@pytest.fixture(scope="module")
def shared(folder, tmp_path_factory):
    """A run whose seeds share the models of the first, and how many probes were tested at a time."""
    path, tested, accuracy = tmp_path_factory.mktemp("shared"), [], shifted.probe_accuracy

    def counted(weights, *rest, **more):
        tested.append(len(weights))
        return accuracy(weights, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shifted, "probe_accuracy", counted)
        main(["--output_dir", str(path), *SHARED, "--checkpoints", str(folder / "models")])
    return path, tested


def test_seeds_that_share_models_are_tested_each_with_its_own_noise(folder, shared):
    path, tested = shared
    for arm, method in (("poly", "simclr"), ("ncl", "ncl")):
        for seed in (0, 1):
            assert value(path, features=arm, noise="gaussian", seed=seed) == by_hand(folder, f"{method}-0", seed)
    # Without noise both seeds at once, with it one; poly_decay has two weight decays.
    assert sorted(tested) == sorted([2] * 6 + [4] + 2 * ([1] * 6 + [2]))


def test_what_shared_models_make_is_measured_once_and_has_no_interval(shared, tmp_path, monkeypatch):
    path, _ = shared
    for metric in MEASURED:
        assert sorted((r["config"]["features"], r["seed"]) for r in rows(path, metric)) == sorted(
            (arm, None) for arm in ARMS
        )
    lines = [line for line in (path / "results.md").read_text().splitlines() if line.startswith("| ncl |")]
    assert ["±" in cell for cell in lines[0].split("|")[2:-1]] == [True]  # on the training labels
    assert ["±" in cell for cell in lines[1].split("|")[2:-1]] == [True, True, False, False, False, False]
    monkeypatch.setattr(shifted, "frozen_models", lambda *rest: pytest.fail("nothing is left to measure"))
    main(["--output_dir", str(path), *SHARED])
    # A row of each seed, as there were before, is whole too.
    old = tmp_path / "old"
    shutil.copytree(path, old)
    there = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    there = [r | {"seed": s} for r in there for s in ((0, 1) if r["seed"] is None else (r["seed"],))]
    (old / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in there))
    main(["--output_dir", str(old), *SHARED])
    assert len(rows(old, "sparsity")) == len(ARMS) * 2


def test_the_table_has_gains_growth_and_what_the_features_are(folder):
    table = (folder / "results.md").read_text()
    for words in ("## Scale s of uniform noise in [0, s)", "## Standard deviation of Gaussian noise"):
        assert words in table
    clean, noisy = (
        {
            name: [value(folder, features=name, noise=noise, scale=scale, seed=s) for s in (0, 1)]
            for name in ("poly", "ncl")
        }
        for noise, scale in (("none", 0.0), ("gaussian", 2.0))
    )
    gains = [100 * (noisy["ncl"][s] - noisy["poly"][s]) for s in (0, 1)]
    growth = [gains[s] - 100 * (clean["ncl"][s] - clean["poly"][s]) for s in (0, 1)]
    gaussian = table.split("## Standard deviation of Gaussian noise")[1].splitlines()
    accuracy_line, gain_line, growth_line = (line for line in gaussian if line.startswith("| ncl |"))
    assert accuracy_line.split("|")[4].split("±")[0].strip() == f"{100 * sum(noisy['ncl']) / 2:.1f}"
    assert gain_line.split("|")[4].split("±")[0].strip() == f"{sum(gains) / 2:+.1f}"
    assert growth_line.split("|")[3].split("±")[0].strip() == f"{sum(growth) / 2:+.1f}"
    assert "| ncl over random_relu |" in table
    for metric in MEASURED:
        assert len(rows(folder, metric)) == len(ARMS) * 2
    assert "| features | none | 0.5 | 2 | semantic consistency |" in table


def test_pictures_are_left(folder):
    for name in ("figure_1b", "figure_2_uniform", "figure_2_gaussian"):
        assert (folder / f"{name}.png").stat().st_size > 5000
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_a_stopped_run_continues_to_the_same_rows_with_a_pass_for_each_noise(folder, tmp_path, monkeypatch):
    stopped = tmp_path / "stopped"
    shutil.copytree(folder, stopped)
    whole = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in whole if '"noise": "gaussian"' not in line or '"seed": 0' not in line]
    (stopped / "results.jsonl").write_text("".join(kept[:-3]))  # and a set is not whole
    passes, embed = [], shifted.embed
    monkeypatch.setattr(
        shifted, "embed", lambda model, *rest, **more: passes.append(model) or embed(model, *rest, **more)
    )
    main(["--output_dir", str(stopped), *SMALL, *NOISE])
    assert len(passes) == 3 * 2  # two scales and what was not whole, two models, however many probes

    def found(path):
        return {(json.dumps(r["config"], sort_keys=True), r["seed"], r["metric"], r["value"]) for r in lines(path)}

    def lines(path):
        return map(json.loads, (path / "results.jsonl").read_text().splitlines())

    assert found(stopped) == found(folder)


def test_same_settings_reprint_and_others_are_refused(folder, monkeypatch, capsys):
    before = (folder / "results.jsonl").read_bytes()
    monkeypatch.setattr(shifted, "frozen_models", lambda *rest: pytest.fail("nothing is left to measure"))
    main(["--output_dir", str(folder), *SMALL, *NOISE])
    assert "Points gained over poly" in capsys.readouterr().out
    assert (folder / "results.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="another configuration"):
        main(["--output_dir", str(folder), *SMALL, "--scales", "0.5"])


def test_pixel_noise_and_shared_pretraining(folder, tmp_path):
    more = ["--noise_space", "pixel", "--noises", "uniform_centred", "--shared_pretraining"]
    main(["--output_dir", str(tmp_path), *SMALL, *NOISE, *more, "--checkpoints", str(folder / "models")])
    clean = {"features": "poly", "noise": "none", "seed": 0}
    assert value(tmp_path, **clean) == value(folder, **clean)
    one, other = (value(tmp_path, features="poly", noise="uniform_centred", scale=0.5, seed=s) for s in (0, 1))
    assert one != other
    assert "to pixels in [0, 1], then clamped" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "figure_2_uniform_centred.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noises", "salt"], r"noises is \['salt'\]; it takes gaussian, uniform, uniform_centred, each once"),
        (["--noises", "gaussian", "gaussian"], "each once"),
        (["--noise_space", "fourier"], "noise_space is 'fourier'; it takes normalised, pixel"),
        (["--scales", "-0.1"], r"scales is \[-0.1\]; it takes finite numbers of at least 0"),
        (["--scales", "inf"], "it takes finite numbers"),
        (["--scales", "0"], "one of them above"),
        (["--scales", "0.1", "0.1"], "scales takes different numbers"),
        (["--decays", "-1"], "decays is"),
        (["--sae_k", "99"], "sae_k is 99 for 32 latents"),
    ],
)
def test_bad_settings_are_named_before_training(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["--output_dir", str(tmp_path / "bad"), *SMALL, *arguments])
    assert not (tmp_path / "bad").exists()


def test_the_noise_of_a_seed_is_the_same_for_every_model(monkeypatch):
    images = load_images("digits", "test")
    x = torch.randn(4, 3, 8, 8)
    for space in input_noise_probing.SPACES:
        make = [input_noise_probing.noise_of(space, images, "gaussian", 0.3, seed) for seed in (5, 5, 6)]
        first, second, other = (add(x) for add in make)
        assert torch.equal(first, second)
        assert not torch.equal(first, other)
