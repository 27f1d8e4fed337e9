"""Models by name: what is loaded, what is said of its weights, and what is refused before any work."""

import re
import shutil

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


IMAGES = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "image_size": [16, 16]}


def test_a_checkpoint_says_how_its_images_are_normalised_and_how_large_they_are(tmp_path):
    model = checkpoint(tmp_path)
    with pytest.warns(UserWarning, match="is of an older version and does not say with which mean and deviation"):
        old = zoo.load(str(tmp_path))
    assert (old.statistics, old.image_size) == (None, None)
    models.save(tmp_path / "model.safetensors", model, {"images": IMAGES})
    for name in (tmp_path, tmp_path / "model.safetensors", f"local-dir:{tmp_path}"):
        found = zoo.load(str(name))
        assert found.statistics == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert found.image_size == 16
    models.save(tmp_path / "model.safetensors", model, {"images": IMAGES | {"image_size": [16, 24]}})
    assert zoo.load(str(tmp_path)).image_size is None  # no square


@pytest.mark.parametrize("place", ["lr=0.1", "resnet18=0.1/a=b", "sweep/lr=0.1,wd=0"])
def test_a_path_may_have_an_equals_sign(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = checkpoint(tmp_path / place)
    x = torch.randn(2, 3, 8, 8)
    for name in (place, str(tmp_path / place), f"./{place}", f"local-dir:{place}", f"{place}/model.safetensors"):
        assert torch.equal(zoo.load(name).model(x).output, model(x).output)
    for missing in ("runs/lr=0.2", "runs/lr=0.2/model.safetensors", r"C:\runs\lr=0.1", "local-dir:lr=0.2"):
        with pytest.raises(ValueError, match="there is no file or folder"):
            zoo.load(missing)


def test_weights_of_a_timm_model_may_lie_in_a_path_with_an_equals_sign(saved, tmp_path):
    place = tmp_path / "lr=0.1,wd=0"
    shutil.copytree(saved, place)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(zoo.load(f"test_resnet={place}/model.safetensors").model(x), zoo.load(str(saved)).model(x))


def test_a_name_that_is_a_model_and_a_folder_is_refused(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "test_resnet")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is a model of timm and a file or folder here. Write ./test_resnet for"):
        zoo.load("test_resnet")
    assert zoo.load("./test_resnet").pretrained.startswith("weights in test_resnet")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, saved, tmp_path):
    model = checkpoint(tmp_path / "ours")
    model.projector[2].bias.data[1] = value
    models.save(tmp_path / "ours" / "model.safetensors", model, {"images": IMAGES})
    tensors = load_file(saved / "model.safetensors")
    tensors["layer1.0.bn1.running_var"][0] = value
    shutil.copytree(saved, tmp_path / "timms")
    save_file(tensors, tmp_path / "timms" / "model.safetensors")
    file = tmp_path / "timms" / "model.safetensors"
    for name, tensor in (("ours", r"projector\.2\.bias"), ("timms", r"layer1\.0\.bn1\.running_var")):
        with pytest.raises(
            ValueError, match=f"has NaN or infinite weights, first in {tensor}: nothing can be measured"
        ):
            zoo.load(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"first in layer1\.0\.bn1\.running_var"):
        zoo.load(f"test_resnet={file}")


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
        ("resnet19=weights.safetensors", "has no model 'resnet19'"),
        ("lr=0.1", "has no model 'lr'"),
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


def test_the_lines_that_are_printed_convert_pickled_weights(tmp_path):
    model = timm.create_model("test_resnet", num_classes=0).eval()
    x = torch.randn(2, 3, 32, 32)
    path = tmp_path / "it's lr=0.1" / "weights.pth"
    path.parent.mkdir()
    state = model.state_dict()
    state["conv1.0.weight"] = state["conv1.0.weight"].to(memory_format=torch.channels_last)  # not contiguous
    torch.save(state, path)
    torch.save({"state_dict": model.state_dict()}, path.with_name("deeper.pt"))
    for name, key in (("weights.pth", ""), ("deeper.pt", "['state_dict']")):
        given = f"test_resnet={path.with_name(name)}"
        with pytest.raises(ValueError, match="not opened: they may run code") as error:
            zoo.load(given)
        sentence, *lines = str(error.value).split("\n")
        converted = re.search(r"name the model as (.*) then\. ", sentence).group(1)
        assert "write a key such as ['state_dict'] behind torch.load(...)" in sentence
        assert len(lines) == 2
        exec("\n".join(lines).replace("True)", f"True){key}"), {})
        assert torch.equal(zoo.load(converted).model(x), model(x))
    with pytest.raises(ValueError, match=r"name the model as MODEL=.*weights\.safetensors then"):
        zoo.load(str(path))


def test_pickles_are_not_opened(tmp_path):
    save_for_hf(timm.create_model("test_resnet"), tmp_path / "pickled")
    assert (tmp_path / "pickled" / "pytorch_model.bin").exists()
    with pytest.raises(
        ValueError, match=r"has no model.safetensors; save the weights with safe_serialization=True"
    ) as e:
        zoo.load(str(tmp_path / "pickled"))
    exec("\n".join(str(e.value).split("\n")[1:]), {})
    assert zoo.load(str(tmp_path / "pickled")).model.num_classes == 0
    with pytest.raises(ValueError, match=r"not a .safetensors file"):
        zoo.load(str(tmp_path / "pickled" / "pytorch_model.bin"))
