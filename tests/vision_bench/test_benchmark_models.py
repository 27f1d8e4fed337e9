"""`python -m vision_bench`: what belongs to which model, and what becomes of models whose features are not finite."""

import json
import shutil
from dataclasses import replace

import pytest
import timm
import torch
from odd_models import Odd
from timm.models import register_model, save_for_hf
from torchvision.transforms.v2.functional import to_pil_image

from tests.conftest import rows
from vision_bench import features, models, pretrain, storage, timm_models, zoo
from vision_bench.__main__ import main
from vision_bench.benchmark_settings import FEATURES
from vision_bench.data import load_images
from vision_bench.runs import DIVERGED
from vision_bench.subjects import limited
from vision_bench.sweep import ACCURACY

QUICK = ["--limit", "200", "--seeds", "0", "--probe_epochs", "4", "--sae_epochs", "2"]
CORRUPTIONS = ["--corruptions", "gaussian=0.5,2", "rotated"]
VIT = {"img_size": 8, "patch_size": 2}


@pytest.fixture
def hashes(monkeypatch):
    """How many tensors each call of `storage.fingerprint` hashed, of those for weights, which are several."""
    calls, fingerprint = [], storage.fingerprint

    def counted(tensors):
        calls.extend([len(tensors)] if len(tensors) > 1 else [])
        return fingerprint(tensors)

    monkeypatch.setattr(storage, "fingerprint", counted)
    return calls


def test_weights_are_hashed_and_read_once_in_a_run(tmp_path, hashes, monkeypatch):
    loaded, load = [], zoo.load
    monkeypatch.setattr(zoo, "load", lambda name, random=False: loaded.append(name) or load(name, random))
    command = ["--random_init", "small_conv", "test_efficientnet", "--image_size", "32", *QUICK, *CORRUPTIONS]
    command += ["--features", "raw", "sae", "--output_dir", str(tmp_path)]
    main(command)
    assert len(rows(tmp_path, "sparsity", features="raw")) == 2 * 6  # six passes over test images for each model
    assert len(hashes) == len(loaded) == 2
    main([*command, "--resume"])
    assert len(hashes) == 4


def test_token_and_average_pooling_of_one_set_of_weights_are_two_models(tmp_path):
    folders = {pool: tmp_path / pool for pool in ("token", "avg")}
    for pool, folder in folders.items():
        torch.manual_seed(0)
        options = VIT | {"global_pool": pool, "fc_norm": False}
        model = timm.create_model("test_vit", num_classes=0, **options)
        save_for_hf(model, folder, model_args=options, safe_serialization=True)
    assert (folders["token"] / "model.safetensors").read_bytes() == (folders["avg"] / "model.safetensors").read_bytes()
    output = tmp_path / "run"
    command = ["--image_size", "8", "--features", "raw", "--output_dir", str(output), *QUICK, "--corruptions"]
    main([*map(str, folders.values()), *command])
    token, avg = (rows(output, "semantic_consistency", model=str(folder))[0] for folder in folders.values())
    assert token["value"] != avg["value"]
    # exported again to the same folder it gets features of its own
    shutil.copytree(folders["avg"], folders["token"], dirs_exist_ok=True)
    main([str(folders["token"]), *command[:-1], "--resume", "--corruptions"])
    again = rows(output, "semantic_consistency", model=str(folders["token"]))
    assert [row["value"] for row in again] == [token["value"]]  # that of avg, which has the rows already
    assert json.loads((output / "results.json").read_text())["table"][0]["semantic_consistency"] == avg["value"]


def test_a_model_that_is_replaced_during_a_run_gives_no_features(tmp_path, monkeypatch):
    config = models.ModelConfig("small_conv", projector_hidden=8, projector_out=4)
    found = [models.ContrastiveModel(config) for _ in range(2)]
    path = tmp_path / "m" / "model.safetensors"
    models.save(path, found[0], {"images": pretrain.training.described(load_images("digits", "test"))})
    extract = features.extract

    def replaced(*arguments, **named):
        models.save(path, found[1], {})
        return extract(*arguments, **named)

    monkeypatch.setattr(features, "extract", replaced)
    command = [str(path.parent), "--features", "raw", "--corruptions", *QUICK, "--output_dir", str(tmp_path / "run")]
    main(command)
    (cached,) = (tmp_path / "run" / "cache").glob("m_test_clean*")
    test = load_images("digits", "test")
    test = limited(test, 200)
    expected = features.embed(found[0], test.images, test.mean, test.std, ["output"])["output"]
    (shard,) = cached.glob("*.safetensors")
    assert torch.equal(storage.load(shard, features.KIND)[0]["output"], expected)


def photographs(folder, split, images):
    for index, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
        path = folder / split / images.class_names[label] / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(path)


def test_a_checkpoint_is_measured_alike_whatever_way_its_images_are_named(tmp_path):
    """By name digits have their own mean and deviation, by path ImageNet's: the checkpoint's count."""
    sets = {split: load_images("digits", split) for split in ("train", "test")}
    for split, images in sets.items():
        photographs(tmp_path / "photos", split, images.subset(torch.arange(0, len(images), 3)))
    by_path = load_images(str(tmp_path / "photos"), "train")
    assert by_path.mean != sets["train"].mean
    trained_on = replace(by_path, mean=sets["train"].mean, std=sets["train"].std)
    config = pretrain.PretrainConfig(epochs=1, batch_size=64, warmup_epochs=0)
    model_config = models.ModelConfig("small_conv", projector_hidden=8, projector_out=4)
    model, _ = pretrain.pretrain(tmp_path / "model", model_config, config, trained_on)
    training = models.load(tmp_path / "model" / "model.safetensors")[1]
    timm_models.save(tmp_path / "exported", model, trained_on, training)
    with pytest.raises(ValueError, match=r"images are not as those that the model was trained on: mean is \[0.485"):
        timm_models.save(tmp_path / "other", model, by_path, training)
    command = ["--dataset", str(tmp_path / "photos"), "--features", "raw", "--layer", "backbone", *QUICK]
    for name in ("model", "exported"):
        main([str(tmp_path / name), *command, "--corruptions", "--output_dir", str(tmp_path / f"run {name}")])
    found = [rows(tmp_path / f"run {name}", "semantic_consistency")[0] for name in ("model", "exported")]
    assert found[0]["value"] == pytest.approx(found[1]["value"], abs=1e-6)
    assert found[0]["config"]["pretrained"].endswith("(all training images, of which those here are a part)")
    test = limited(load_images(str(tmp_path / "photos"), "test"), 200)
    expected = features.embed(model, test.images, sets["train"].mean, sets["train"].std, ["backbone"])["backbone"]
    (shard,) = (tmp_path / "run model" / "cache").glob("model_test_clean*/*.safetensors")
    assert torch.equal(storage.load(shard, features.KIND)[0]["backbone"], expected)
    assert training["images"] == {"mean": [0.3054] * 3, "std": [0.3753] * 3, "image_size": [8, 8]}


@register_model
def overflows_under_noise(pretrained, **kwargs):
    return Odd(lambda x: x.flatten(1) * torch.where(x.flatten(1).amax(dim=1) > 6, torch.inf, 1.0)[:, None])


@register_model
def always_infinite(pretrained, **kwargs):
    return Odd(lambda x: x.flatten(1) / 0)


@register_model
def constant_features(pretrained, **kwargs):
    return Odd(lambda x: torch.ones(len(x), 12))


@register_model
def zeros_for_dark_images(pretrained, **kwargs):
    """A few rows of zeros among the test features, as a non-negative output gives them."""
    return Odd(lambda x: x.flatten(1)[:, 60:] * (x.mean(dim=(1, 2, 3)) > -0.2)[:, None])


def test_models_that_are_not_finite_are_marked_and_the_others_measured(tmp_path, monkeypatch):
    names = ["always_infinite", "overflows_under_noise", "small_conv"]
    command = [
        "--random_init",
        *names,
        "--features",
        "raw",
        "sae",
        *QUICK,
        *CORRUPTIONS,
        "--output_dir",
        str(tmp_path),
    ]
    main(command)
    marked = rows(tmp_path, DIVERGED)
    assert {(row["config"]["model"], row["config"]["features"]) for row in marked} == {
        (name, kind) for name in names[:2] for kind in ("raw", "sae")
    }
    reasons = {row["config"]["model"]: row["config"]["reason"] for row in marked}
    assert reasons["always_infinite"].startswith("train: the backbone of image 0 has values that are NaN or infinite")
    assert reasons["overflows_under_noise"].startswith("test, gaussian 2: the backbone of image ")
    assert {row["config"]["model"] for row in rows(tmp_path, ACCURACY)} == {"small_conv"}
    text = (tmp_path / "results.md").read_text()
    for name in names[:2]:
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} (random) | sae "))
        assert line.count("| diverged ") == 6
        assert f"{name} (random), raw, sae: diverged, so that nothing could be measured: {reasons[name]}." in text
    assert {cell["model"] for cell in json.loads((tmp_path / "results.json").read_text())["table"]} == {
        "small_conv (random)"
    }
    assert (tmp_path / "robustness.png").stat().st_size > 5000
    before = (tmp_path / "results.jsonl").read_bytes()
    monkeypatch.setattr(features, "extract", lambda *_, **__: pytest.fail("features of what diverged"))
    main([*command, "--resume"])
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert (tmp_path / "results.md").read_text() == text


def test_a_run_in_which_everything_diverged_ends_with_its_table(tmp_path):
    command = [*QUICK, "--corruptions", "--output_dir", str(tmp_path)]
    main(["--random_init", "small_conv", "--features", "raw", *command])
    assert (tmp_path / "robustness.png").exists()
    main(["--random_init", "always_infinite", "--resume", *command])
    text = (tmp_path / "results.md").read_text()
    assert text.count("| diverged |") == len(FEATURES)
    assert "Sparse autoencoders" not in text  # of which there is none
    assert not list(tmp_path.glob("robustness.*"))  # the old figure is of another model
    assert json.loads((tmp_path / "results.json").read_text())["table"] == []


def test_features_on_which_no_autoencoder_can_be_trained_do_not_end_the_run(tmp_path):
    command = ["--random_init", "constant_features", "small_conv", "--features", "raw", "sae", "--corruptions", *QUICK]
    main([*command, "--output_dir", str(tmp_path)])
    (marked,) = rows(tmp_path, DIVERGED)
    assert (marked["config"]["model"], marked["config"]["features"]) == ("constant_features", "sae")
    assert "there is no variance to explain" in marked["config"]["reason"]
    assert rows(tmp_path, ACCURACY, model="constant_features", features="raw")


def test_rows_of_zeros_among_test_features_do_not_end_the_run(tmp_path):
    command = ["--random_init", "zeros_for_dark_images", "--corruptions", *QUICK, "--output_dir", str(tmp_path)]
    main(command)
    (shard,) = (tmp_path / "cache").glob("zeros_for_dark_images_test_clean*/*.safetensors")
    test = storage.load(shard, features.KIND)[0]["backbone"]
    assert 0 < (~test.any(dim=1)).sum() < len(test) / 2
    (unexplained,) = rows(tmp_path, "sae_fvu")
    assert 0 < unexplained["value"] < 2
    assert "| zeros_for_dark_images (random) | sae |" in (tmp_path / "results.md").read_text()


def test_a_checkpoint_that_diverged_is_refused_before_any_work(tmp_path):
    model = models.ContrastiveModel(models.ModelConfig("small_conv", projector_hidden=8, projector_out=4))
    model.backbone.layers[0].weight.data[0, 0, 0, 0] = torch.nan
    models.save(tmp_path / "lr=1e10" / "model.safetensors", model, {})
    with pytest.raises(
        SystemExit, match=r"Error: .*lr=1e10 has NaN or infinite weights, first in backbone\.layers\.0"
    ):
        main([str(tmp_path / "lr=1e10"), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
