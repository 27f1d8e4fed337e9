"""Our backbones as models of timm: the same bits, with and without this package, and what a folder says of itself."""

import json
import subprocess
import sys

import pytest
import timm
import torch

from vision_bench import features, models, timm_models
from vision_bench.data import load_images


@pytest.fixture(scope="module")
def images():
    return load_images("digits", "test", image_size=32).subset(torch.arange(12))


def trained(**settings):
    """A model whose statistics of normalisation are no longer the initial ones."""
    torch.manual_seed(0)
    model = models.ContrastiveModel(models.ModelConfig(projector_hidden=8, projector_out=4, **settings))
    model(torch.randn(16, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"backbone": "small_conv"},
        {"backbone": "test_resnet"},
        {"backbone": "test_resnet", "stem": "cifar", "stem_padding": 2},
        {"backbone": "resnet18", "stem": "cifar"},
        {"backbone": "test_vit", "backbone_options": {"img_size": 32, "patch_size": 8}},
        {"backbone": "mobilenetv3_small_050"},
    ],
    ids=["small_conv", "resnet", "cifar_padded", "cifar", "vit", "hidden_head"],
)
def test_timm_creates_the_backbone_bit_for_bit(settings, images, tmp_path):
    model = trained(**settings)
    timm_models.save(tmp_path / "backbone", model, images, {"epochs": 3})
    created = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True)
    made = features.embed(created, images.images, images.mean, images.std)
    ours = features.embed(model, images.images, images.mean, images.std, ["backbone"])
    assert list(made) == ["backbone"]
    assert torch.equal(made["backbone"], ours["backbone"])
    wanted = timm.data.resolve_model_data_config(created)
    assert (tuple(wanted["mean"]), tuple(wanted["std"])) == (images.mean, images.std)
    assert tuple(wanted["input_size"]) == (3, 32, 32)
    untrained = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=False).eval()
    assert not torch.equal(
        features.embed(untrained, images.images, images.mean, images.std)["backbone"], ours["backbone"]
    )


def test_a_network_of_timm_gets_a_new_classifier_and_small_conv_none(images, tmp_path):
    for name, settings in (("plain", {}), ("cifar", {"stem": "cifar"})):
        timm_models.save(tmp_path / name, trained(backbone="test_resnet", **settings), images, {})
        created = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True, num_classes=7)
        assert created(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    timm_models.save(tmp_path / "small", trained(backbone="small_conv"), images, {})
    with pytest.raises(ValueError, match="small_conv has 3 channels and no classifier"):
        timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True, num_classes=7)


def test_a_folder_is_normalised_as_the_training_says(images, tmp_path):
    said = {"mean": list(images.mean), "std": list(images.std), "image_size": [32, 32]}
    timm_models.save(tmp_path / "same", trained(backbone="test_resnet"), images, {"images": said})
    for name, value in (("mean", [0.5] * 3), ("std", [0.1] * 3), ("image_size", [64, 64])):
        with pytest.raises(ValueError, match=f"not as those that the model was trained on: {name} is"):
            timm_models.save(tmp_path / "f", trained(backbone="test_resnet"), images, {"images": said | {name: value}})
    assert not (tmp_path / "f").exists()


def test_a_network_of_timm_is_loaded_without_this_package(images, tmp_path):
    timm_models.save(tmp_path / "backbone", trained(backbone="test_resnet"), images, {})
    program = (
        "import sys, timm; "
        f"model = timm.create_model('local-dir:{tmp_path / 'backbone'}', pretrained=True); "
        "print(model.num_classes, 'vision_bench' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.split() == ["0", "False"]


def test_the_folder_says_what_was_trained_and_claims_no_weights_of_timms(images, tmp_path):
    timm_models.save(tmp_path / "f", trained(backbone="test_resnet", non_negative="relu"), images, {"data": "abc"})
    about = json.loads((tmp_path / "f" / "config.json").read_text())
    assert about["vision_bench_training"] == {"method": "NCL (relu)", "data": "abc"}
    assert about["architecture"] == "test_resnet"
    assert about["pretrained_cfg"]["tag"] == "vision_bench"
    assert about["pretrained_cfg"]["license"] is None
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]  # no temporary folder is left
    with pytest.raises(ValueError, match="exists and is not empty; choose another"):
        timm_models.save(tmp_path / "f", trained(backbone="test_resnet"), images, {})
