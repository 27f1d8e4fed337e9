"""The recipe of Fig. 1(a) and 4(a, b): what it shows is what the features say, continuation and what it refuses."""

import itertools
import shutil

import probing
import pytest
import torch
from top_activated_samples import class_accuracies, main, report, study

from tests.recipes.conftest import PROBING, contents, keep_rows, rows
from vision_bench import figures
from vision_bench.data import ImageSet, load_images
from vision_bench.metrics import MEASURED
from vision_bench.probe import TRAINING, Probes
from vision_bench.runs import Run
from vision_bench.sweep import Fitted, Training
from vision_bench.sweep import rows as rows_to_add

SMALL = [*PROBING, "--sae_k", "8", "--samples", "4", "--dimensions", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pretrained_models):
    path = tmp_path_factory.mktemp("top")
    shutil.copytree(pretrained_models, path / "models")
    main(["--output_dir", str(path), *SMALL])
    return path


def test_classes_stand_in_the_order_of_the_seeds_even_if_two_are_one(folder):
    lines = (folder / "results.md").read_text().splitlines()
    for features, rank in itertools.product(("poly", "sae", "ncl"), ("worst", "best")):
        found = [row for row in rows(folder, "class_dimension_purity") if row["config"]["rank"] == rank]
        classes = {r["seed"]: r["config"]["class_name"] for r in found if r["config"]["features"] == features}
        (line,) = (line for line in lines if line.startswith(f"| {features}, {rank} class |"))
        assert line.endswith(f" | {classes[0]}, {classes[1]} |")


def test_class_accuracies():
    predicted, labels = torch.tensor([0, 1, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 3])
    found = class_accuracies(predicted, labels, 4)
    assert found[[0, 1, 3]].tolist() == [0.5, 1, 1]
    assert found[2].isnan()


def test_rows_name_the_images_and_their_purity(folder):
    test = load_images("digits", "test")
    for metric, count in (("random_dimension_purity", 3 * 2), ("class_dimension_purity", 3 * 2 * 2)):
        found = rows(folder, metric)
        assert len(found) == count
        for row in found:
            samples = row["config"]["samples_shown"]
            assert len(set(samples)) == row["n"] == 4
            shown = test.labels[samples].tolist()
            assert row["value"] == pytest.approx(max(map(shown.count, shown)) / 4)
    for row in rows(folder, "top_purity"):
        assert 0.1 < row["value"] <= 1
    by_chance = {(r["config"]["features"], r["seed"]): r["value"] for r in rows(folder, "chance_top_purity")}
    assert all(row["value"] > by_chance[row["config"]["features"], row["seed"]] for row in rows(folder, "top_purity"))
    for row in rows(folder, "class_dimension_purity"):
        others = rows(folder, "class_dimension_purity")
        best = [r for r in others if r["config"]["rank"] == "best" and r["seed"] == row["seed"]]
        best = [r for r in best if r["config"]["features"] == row["config"]["features"]]
        assert row["config"]["class_accuracy"] <= best[0]["config"]["class_accuracy"]


def test_the_images_are_those_with_the_largest_values(folder):
    """From the cached features, without the recipe's code."""
    from safetensors.torch import load_file

    shards = sorted((folder / "features" / "ncl-0-test").glob("*.safetensors"))
    features = torch.cat([load_file(shard)["output"] for shard in shards]).float()
    normalised = features / features.norm(dim=1, keepdim=True)
    checked = 0
    for row in rows(folder, "random_dimension_purity"):
        if row["config"]["features"] == "ncl" and row["seed"] == 0:
            values = normalised[:, row["config"]["dimension"]]
            least = values[row["config"]["samples_shown"]].min()
            assert int((values > least).sum()) <= 3
            checked += 1
    assert checked == 1


def test_a_correlation_that_there_is_not_has_no_row(tmp_path, recwarn):
    """All classes as accurate and their dimensions as pure as each other, in one of two seeds or in both."""
    config = {"seeds": [0, 1], "samples": 2, "dimensions": 1, "noise_rate": 0.8, "shared_pretraining": False}
    run = Run(tmp_path, "top_activated_samples", {**config, "data": "digits", "backbone": "small_conv"})
    labels = torch.arange(6) % 3
    images = ImageSet.of(torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8), labels, ("a", "b", "c"))
    features, measured = torch.eye(3)[labels] + 0.1, {"seconds": 0.0, "device": "cpu"}
    for name, seed in itertools.product(("poly", "sae", "ncl"), (0, 1)):
        weights = torch.eye(3)
        weights[2, 2] = -1.0 if name == "ncl" else 1.0  # NCL's probe gets the last class wrong
        fitted = Fitted([Training(0.8, seed=seed)], Probes(weights[None], torch.zeros(1, 3)), [([0.5, 0.5], 6)], [{}])
        (batch,) = rows_to_add(run, [study(config, images, name, fitted, features, labels)], torch.device("cpu"))
        run.add_rows(batch)
        for metric in (*MEASURED, *TRAINING):
            run.add(metric, 0.5, n=6, seed=seed, features=name, **measured)
    run.add("chance_top1", 0.4, n=6, seed=None, **measured)
    accuracies = [row["value"] for row in run.find("offline_probe_top1", seed=0)]
    assert accuracies == pytest.approx([1.0, 1.0, 2 / 3])
    assert not run.find("accuracy_purity_correlation")
    assert len(run.find("offline_probe_top1")) == 6  # the row that says that the kind of features is complete
    assert "NaN" not in (tmp_path / "results.jsonl").read_text()
    assert not recwarn.list
    run.add("accuracy_purity_correlation", 0.25, n=3, seed=1, features="sae", **measured)
    text = report(run)
    assert "Chance level of top-1: 40.0 %." in text
    lines = [line for line in text.splitlines() if line.startswith(("| poly |", "| sae |"))]
    assert [line.split(" | ")[6] for line in lines] == ["-", "+0.25 (1 of 2 seeds)"]


def test_table_and_pictures(folder):
    text = (folder / "results.md").read_text()
    assert "| ncl, best class |" in text
    assert "correlation of accuracy and purity" in text
    for name in ("figure_1a", "figure_4ab"):
        assert (folder / f"{name}.png").stat().st_size > 20_000
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_a_grid_names_classes_and_marks_the_most_frequent():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    one = figures.ImageGrid("dimension 1", images, ["maple_tree", "sea", "sea", "a_very_long_name_of_a_class"])
    figure = figures.image_grids({"poly": [one]})
    axes = [ax for ax in figure.subfigs[0].axes if ax.get_visible()]
    assert [ax.get_title() for ax in axes] == ["maple tree", "sea", "sea", "a very long n…"]
    assert [ax.spines["top"].get_linewidth() > 1 for ax in axes] == [False, True, True, False]
    assert figures.readable("tench, Tinca tinca") == "tench"


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
    assert "purity" in capsys.readouterr().out
    assert (folder / "results.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match=r"another configuration .*samples: 4 there, 5 now"):
        main(["--output_dir", str(folder), *SMALL, "--samples", "5"])


def test_what_shared_models_show_is_measured_once_and_has_no_interval(folder, tmp_path, monkeypatch):
    command = ["--output_dir", str(tmp_path), *SMALL, "--shared_pretraining"]
    main([*command, "--checkpoints", str(folder / "models")])
    for metric in ("top_purity", "shown_dimensions", "semantic_consistency"):
        assert [row["seed"] for row in rows(tmp_path, metric)] == [None] * 3
    for metric in ("chance_top_purity", "offline_probe_top1"):  # of shuffled labels, and of probes
        assert {row["seed"] for row in rows(tmp_path, metric)} == {0, 1}
    line = next(line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("| ncl |"))
    assert ["±" in cell for cell in line.split("|")[2:-1]] == [False, True, False, True, True, True] + [False] * 4
    monkeypatch.setattr(probing, "frozen_models", None)  # nothing is measured again
    main(command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "1"], "samples is 1; the purity of fewer than 2 images"),
        (["--samples", "361"], "samples is 361 for 360 test images"),
        (["--dimensions", "0"], "dimensions is 0; it must be at least 1"),
        (["--noise_rate", "-1"], r"noise_rate is -1.0; it must be in \[0, 1\]"),
    ],
)
def test_bad_settings_are_named_before_training(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["--output_dir", str(tmp_path / "bad"), *SMALL, *arguments])
    assert not (tmp_path / "bad").exists()
