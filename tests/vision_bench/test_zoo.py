"""Models by name: what is loaded, what is said of its weights, and what is refused before any work."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from vision_bench import models, timm_models, zoo
from vision_bench.data import load_images


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of timm's with weights in safetensors."""
    folder = tmp_path_factory.mktemp("zoo") / "resnet"
    torch.manual_seed(0)
    save_for_hf(timm.create_model("test_resnet", num_classes=10), folder, safe_serialization=True)
    return folder


def checkpoint(folder, **settings):
    torch.manual_seed(1)
    model = models.ContrastiveModel(models.ModelConfig("small_conv", projector_hidden=8, projector_out=4, **settings))
    models.save(folder / "model.safetensors", model, {"config": {"epochs": 12, "seed": 3}, "data": "0123"})
    return model.eval()


def test_a_folder_of_timms_and_its_file_give_the_same_features(saved):
    x = torch.randn(2, 3, 32, 32)
    names = [str(saved), f"local-dir:{saved}", f"test_resnet={saved / 'model.safetensors'}"]
    found = [zoo.load(name) for name in names]
    reference = timm.create_model(f"local-dir:{saved}", pretrained=True, num_classes=0).eval()
    for frozen in found:
        assert torch.equal(frozen.model(x), reference(x))
        assert not frozen.model.training
        assert frozen.image_size == 160
        assert frozen.statistics == ((0.5,) * 3, (0.5,) * 3)
        assert "whatever they were trained on" in frozen.pretrained
    assert len({models.fingerprint(frozen.model) for frozen in found}) == 1


def test_checkpoints_of_ours_by_file_folder_and_export(tmp_path):
    model = checkpoint(tmp_path / "ncl", non_negative="relu")
    timm_models.save(
        tmp_path / "exported",
        model,
        load_images("digits", "test"),
        models.load(tmp_path / "ncl" / "model.safetensors")[1],
    )
    x = torch.randn(2, 3, 8, 8)
    for name in ("ncl", "ncl/model.safetensors", "exported"):
        frozen = zoo.load(str(tmp_path / name))
        assert frozen.pretrained == (
            "self-supervised, NCL (relu), 12 epochs, seed 3, without labels on images of the fingerprint 0123"
        )
        assert torch.equal(models.outputs(frozen.model, x)["backbone"], model(x).backbone)
    assert zoo.load(str(tmp_path / "ncl")).image_size is None
    assert zoo.load(str(tmp_path / "exported")).image_size == 8


def test_random_weights_are_the_same_each_time_and_said_to_be_random():
    state = torch.get_rng_state()
    first, second = zoo.load("test_resnet", random=True), zoo.load("test_resnet", random=True)
    assert models.fingerprint(first.model) == models.fingerprint(second.model)
    assert first.pretrained == "nothing: random initialisation, seed 0"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "has no model 'resnet19'; near it: resnet18, "),
        ("resnet18.foo", r"no weights 'resnet18.foo'; it has resnet18.a1_in1k, .* for resnet18"),
        ("zzzqqq", r"timm.list_models\(\) has the names"),
        ("small_conv", "no pretrained weights of 'small_conv'.*--random_init small_conv"),
        ("test_mambaout", "no pretrained weights of 'test_mambaout'.*--random_init test_mambaout"),
        ("resnet18", r"weights of resnet18 cannot be had .* Offline: fetch them .*HF_HOME .* give its path"),
        ("hf-hub:timm/resnet18.a1_in1k", "weights of hf-hub:timm/resnet18.a1_in1k cannot be had"),
        ("timm/resnet18", "no file or folder timm/resnet18. A model of the hub is written hf-hub:timm/resnet18"),
        ("local-dir:nowhere", "no file or folder nowhere"),
        ("weights.safetensors", "no file or folder weights.safetensors"),
        ("http:model", "'http:model' is no name of a model: Unknown model source 'http'"),
        ("resnet18=weights.pth", r"weights.pth is not a .safetensors file, .* may run code"),
        ("resnet18=weights.safetensors", "there is no file weights.safetensors"),
        ("resnet19=weights.safetensors", "there is no file weights.safetensors"),
    ],
)
def test_what_cannot_be_had_is_explained(name, message):
    with pytest.raises(ValueError, match=message):
        zoo.load(name)


def test_weights_that_do_not_fit_are_refused_and_never_left_random(saved, tmp_path):
    with pytest.raises(ValueError, match="does not fit test_vit: it lacks 78 tensors of the model"):
        zoo.load(f"test_vit={saved / 'model.safetensors'}")
    with pytest.raises(ValueError, match=r"has weights but not which model they are of. Write MODEL="):
        zoo.load(str(saved / "model.safetensors"))
    tensors = load_file(saved / "model.safetensors")
    tensors.pop("conv1.0.weight")
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_text((saved / "config.json").read_text())
    save_file(tensors, cut / "model.safetensors")
    with pytest.raises(ValueError, match=r"cannot be built with its weights: .*conv1\.0\.weight"):
        zoo.load(str(cut))
    with pytest.raises(ValueError, match=r"lacks 1 tensors of the model \(conv1.0.weight"):
        zoo.load(f"test_resnet={cut / 'model.safetensors'}")
    (cut / "model.safetensors").write_bytes(b"torn")
    for name in (str(cut), f"test_resnet={cut / 'model.safetensors'}", str(cut / "model.safetensors")):
        with pytest.raises(ValueError, match="header too small"):
            zoo.load(name)
    (cut / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not a configuration of timm's"):
        zoo.load(str(cut))


def test_pickles_are_not_opened(tmp_path):
    save_for_hf(timm.create_model("test_resnet"), tmp_path / "pickled")
    assert (tmp_path / "pickled" / "pytorch_model.bin").exists()
    with pytest.raises(ValueError, match=r"has no model.safetensors; save the weights with safe_serialization=True"):
        zoo.load(str(tmp_path / "pickled"))
    with pytest.raises(ValueError, match=r"not a .safetensors file"):
        zoo.load(str(tmp_path / "pickled" / "pytorch_model.bin"))
