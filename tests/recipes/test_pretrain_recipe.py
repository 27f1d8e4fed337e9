"""The pretraining recipe at a size of seconds, and the configurations of the paper."""

from dataclasses import replace
from pathlib import Path

import label_noise_probing
import pretrain as recipe
import pytest
import torch
import vision
from filelock import FileLock
from pretrain import main

from tests.recipes.conftest import rows
from vision_bench.runs import parse

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
SMALL = ["--seeds", "0", "1", "--pretraining_epochs", "2", "--warmup_epochs", "1"]
SMALL += ["--projector_hidden", "32", "--projector_out", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrain")
    main(["--output_dir", str(path), *SMALL])
    return path


def test_every_model_has_its_rows_and_a_checkpoint(folder):
    arms = {(method, seed) for method in ("simclr", "ncl") for seed in (0, 1)}
    for metric in (*recipe.LOGGED, *recipe.MEASURED):
        found = [row for row in rows(folder) if row["metric"] == metric]
        assert {(row["config"]["method"], row["seed"]) for row in found} == arms
        assert len({row["value"] for row in found}) > 1 or metric == "live_dimensions"
    assert all((folder / "models" / f"{m}-{s}" / "model.safetensors").is_file() for m, s in arms)
    sparsity = {row["config"]["method"]: row["value"] for row in rows(folder) if row["metric"] == "sparsity"}
    assert sparsity["ncl"] > 0.2 > sparsity["simclr"]


def test_the_three_accuracies_have_columns_of_their_own(folder):
    header = (folder / "results.md").read_text().splitlines()[2]
    assert "| online probe train top1 | online probe validation top1 | knn validation top1 |" in header


def test_same_settings_reprint_and_others_are_refused(folder, capsys):
    before = (folder / "results.jsonl").read_bytes()
    main(["--output_dir", str(folder), *SMALL])
    assert (folder / "results.jsonl").read_bytes() == before
    assert "| simclr | 2 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another configuration"):
        main(["--output_dir", str(folder), *SMALL, "--temperature", "0.5"])


def test_a_model_that_diverges_is_marked_and_the_others_go_on(tmp_path, monkeypatch):
    real = vision.pretrain

    def diverging(folder, model_config, config, *rest, **named):
        if model_config.non_negative != "none" and config.seed == 1:
            config = replace(config, learning_rate=1e38, optimizer="sgd")
        return real(folder, model_config, config, *rest, **named)

    monkeypatch.setattr(vision, "pretrain", diverging)
    main(["--output_dir", str(tmp_path), *SMALL])
    (marked,) = [row for row in rows(tmp_path) if row["metric"] == "diverged"]
    assert (marked["config"]["method"], marked["seed"]) == ("ncl", 1)
    assert "diverged in epoch 1" in marked["config"]["reason"]
    others = [(row["config"]["method"], row["seed"]) for row in rows(tmp_path) if row["metric"] == "sparsity"]
    assert others == [("simclr", 0), ("ncl", 0), ("simclr", 1)]
    assert "| ncl | 1 (1 more diverged) |" in (tmp_path / "results.md").read_text()
    monkeypatch.setattr(vision, "pretrain", lambda *_, **__: pytest.fail("nothing is left to do"))
    main(["--output_dir", str(tmp_path), *SMALL])


def test_a_folder_that_another_process_holds_is_refused_before_training(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="Another process is working in"):
        main(["--output_dir", str(tmp_path), *SMALL])
    assert not (tmp_path / "models").exists()


def test_models_of_other_test_images_lend_no_accuracies(folder, tmp_path, monkeypatch):
    load = vision.load_splits

    def fewer(pretraining):
        splits = load(pretraining)
        return splits | {"test": splits["test"].subset(torch.arange(100))}

    monkeypatch.setattr(vision, "load_splits", fewer)
    with pytest.raises(ValueError, match="simclr, seed 0, was trained beside other test images"):
        main(["--output_dir", str(tmp_path), *SMALL, "--checkpoints", str(folder / "models")])


@pytest.mark.parametrize("name", ["cifar100", "imagenet100"])
def test_the_papers_configurations_serve_both_recipes(name):
    arguments = ["--config", str(CONFIGS / f"{name}.yaml"), "--output_dir", "x"]
    pretraining, _ = parse(
        [vision.PretrainingSettings, recipe.MethodsSettings], arguments, shared=[vision.ProbingSettings]
    )
    again, probing, *_, label_noise = parse(label_noise_probing.SETTINGS, arguments)
    for settings in (pretraining, again):
        assert settings.data == name
        assert (settings.projector_hidden, settings.projector_out, settings.backbone) == (16384, 2048, "resnet18")
        assert (settings.pretraining_epochs, settings.batch_size, settings.learning_rate) == (200, 256, 0.4)
        assert settings.model_config("simclr").non_negative == "none"
        assert settings.model_config("ncl").non_negative == "relu"
    assert probing.sae_k == 256
    assert label_noise.noise_rates == [i / 10 for i in range(10)]
    assert (probing.probe_optimizer, probing.probe_learning_rate, probing.probe_schedule) == (
        ("lars", 0.4, "cosine") if name == "cifar100" else ("sgd", 1.5, "step")
    )


def test_settings_of_other_recipes_are_refused(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("noise_rate: 0.3\n")
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path / "x"), "--config", str(path)])
    assert "sets noise_rate, which this recipe does not have" in capsys.readouterr().err
    for text, message in (("", "has no settings; it takes lines of NAME: VALUE"), ("a: [", "cannot be read (while")):
        path.write_text(text)
        with pytest.raises(SystemExit):
            main(["--output_dir", str(tmp_path / "x"), "--config", str(path)])
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"methods is \['moco'\]; it takes simclr, ncl"):
        main(["--output_dir", str(tmp_path / "x"), "--methods", "moco"])
    assert not (tmp_path / "x").exists()
