"""The recipe of Fig. 2(a, b) at a size of seconds: rows against slow twins, continuation and what it refuses."""

import json
import shutil

import numpy as np
import probing
import pytest
import torch
from input_noise_probing import EXPERIMENT, main

from tests.recipes.conftest import ACCURACY, ARMS, contents, keep_rows, rows
from tests.recipes.conftest import CONTROLLED as SMALL
from tests.recipes.conftest import value as value_of
from vision_bench import features, learners, models
from vision_bench.corruptions import CONDITIONS, NORMALISED_IMAGES, Condition, Range
from vision_bench.data import load_images
from vision_bench.metrics import MEASURED
from vision_bench.probe import fit_linear_probes
from vision_bench.runs import Run

NOISE = ["--scales", "0.5", "2"]
SHARED = [*SMALL, "--noises", "gaussian", "--scales", "0.5", "--shared_pretraining"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pretrained_models):
    path = tmp_path_factory.mktemp("input_noise")
    shutil.copytree(pretrained_models, path / "models")
    main(["--output_dir", str(path), *SMALL, *NOISE])
    return path


def test_every_cell_has_a_row_and_noise_costs_accuracy(folder):
    cells = {("none", 0.0), *((noise, scale) for noise in ("uniform", "gaussian") for scale in (0.5, 2.0))}
    found = {
        (r["config"]["features"], r["config"]["noise"], r["config"]["scale"], r["seed"])
        for r in rows(folder, ACCURACY)
    }
    assert found == {(arm, *cell, seed) for arm in ARMS for cell in cells for seed in (0, 1)}
    assert len(rows(folder, ACCURACY)) == (len(ARMS) + 1) * 5 * 2
    assert all(0 <= row["value"] <= 1 and row["n"] == 360 for row in rows(folder, ACCURACY))
    assert all(row["config"]["noise_seed"] == row["seed"] for row in rows(folder, ACCURACY, noise="gaussian"))
    for arm in ("poly", "ncl", "sae"):
        for seed in (0, 1):
            clean = value(folder, features=arm, noise="none", seed=seed)
            assert clean > value(folder, features=arm, noise="gaussian", scale=2.0, seed=seed)
    assert (
        len({value(folder, features=arm, noise="gaussian", scale=0.5, seed=0) for arm in ("poly", "sae", "ncl")}) > 1
    )
    assert value(folder, features="poly", noise="none", seed=0) != value(folder, features="poly", noise="none", seed=1)


def value(folder, **arm):
    return value_of(folder, ACCURACY, **arm)


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
        noisy = normalised(test)
        for i, image in enumerate(noisy):  # the noise of each image has a seed of its own
            state = int(np.random.SeedSequence((seed, i)).generate_state(1)[0])
            image += 0.5 * torch.randn(image.shape, generator=torch.Generator().manual_seed(state))
        noisy = model(noisy).output
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
    path, tested, accuracy = tmp_path_factory.mktemp("shared"), [], learners.probe_accuracy

    def counted(weights, *rest, **more):
        tested.append(len(weights))
        return accuracy(weights, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learners, "probe_accuracy", counted)
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
    monkeypatch.setattr(probing, "frozen_models", lambda *rest: pytest.fail("nothing is left to measure"))
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

    def keep(lines):
        return [line for line in lines if '"noise": "gaussian"' not in line or '"seed": 0' not in line][:-3]

    keep_rows(stopped, keep)  # so that a set is not whole either
    passes, embed = [], features.embed
    monkeypatch.setattr(
        features, "embed", lambda model, *rest, **more: passes.append(model) or embed(model, *rest, **more)
    )
    main(["--output_dir", str(stopped), *SMALL, *NOISE])
    assert len(passes) == 3 * 2  # two scales and what was not whole, two models, however many probes

    assert contents(stopped) == contents(folder)


def test_same_settings_reprint_and_others_are_refused(folder, monkeypatch, capsys):
    before = (folder / "results.jsonl").read_bytes()
    monkeypatch.setattr(probing, "frozen_models", lambda *rest: pytest.fail("nothing is left to measure"))
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
        (["--arms", "sae", "poly", "sae"], "arms is .*; it takes poly and others, each once"),
        (["--arms", "sae"], "it takes poly and others"),
        (["--arms", "poly", "sift"], "'sift' is no kind of features; there are raw, unit, "),
        (["--scales", "0.1", "0.1"], "scales takes different numbers"),
        (["--decays", "-1"], "decays is"),
        (["--sae_k", "99"], "sae_k is 99 for 32 latents"),
    ],
)
def test_bad_settings_are_named_before_training(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["--output_dir", str(tmp_path / "bad"), *SMALL, *arguments])
    assert not (tmp_path / "bad").exists()


def test_a_noise_that_is_added_to_the_table_gets_rows_a_table_and_a_figure(folder, tmp_path, monkeypatch):
    def salt(images, scale, generator):
        return torch.where(torch.rand(images.shape, generator=generator) < scale, images.max(), images)

    monkeypatch.setitem(CONDITIONS, "salt", Condition(NORMALISED_IMAGES, salt, "share of white values", Range(0, 1)))
    command = ["--output_dir", str(tmp_path), *SMALL, "--checkpoints", str(folder / "models"), "--noises", "salt"]
    main([*command, "--scales", "0.9"])
    assert value(tmp_path, features="ncl", noise="salt", seed=0) < value(folder, features="ncl", noise="none", seed=0)
    assert "## Share of white values" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "figure_2_salt.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"scales has 2.0; for salt it must be in \(0, 1\)"):
        main([*command, "--scales", "2"])


def test_a_whole_run_lacks_no_cell_and_each_row_is_one(folder):
    described = json.loads((folder / "config.json").read_text())
    run = Run(folder, "input_noise_probing", described["config"], facts=described["facts"])
    assert run.lacking(EXPERIMENT.cells(run.config)) == []
    for removed in (run.rows[5], run.rows[-1]):
        shorter = Run(folder, "input_noise_probing", described["config"], facts=described["facts"], is_main=False)
        shorter.replace([row for row in run.rows if row is not removed])
        (cell,) = shorter.lacking(EXPERIMENT.cells(run.config))
        assert (cell.metric, cell.seed) == (removed["metric"], removed["seed"])
        assert cell.arm.items() <= removed["config"].items()


def test_rows_under_noise_of_one_stream_are_not_continued_with_other_noise(folder, tmp_path):
    """Before noise followed from the image, it was drawn in one stream for a seed; such folders do not say so."""
    shutil.copytree(folder, tmp_path / "older")
    path = tmp_path / "older" / "config.json"
    described = json.loads(path.read_text())
    assert described["config"].pop("noise_draw", "by image") == "by image"
    path.write_text(json.dumps(described))
    with pytest.raises(
        ValueError, match=r"another configuration \(noise_draw: 'in one stream' there, 'by image' now\)"
    ):
        main(["--output_dir", str(tmp_path / "older"), *SMALL, *NOISE])
