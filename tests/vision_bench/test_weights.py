"""Weights under the names of the model and under others, and what does not fit."""

import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from vision_bench import models, weights, zoo
from vision_bench.benchmark_settings import Settings

ARCHITECTURE = "test_efficientnet"


def original(num_classes=1000):
    torch.manual_seed(3)
    model = timm.create_model(ARCHITECTURE, num_classes=num_classes).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_()
    return model


def renamed(state):
    """Other names with the same last words, as another library's."""
    return {f"net.{place}.{name.rpartition('.')[2]}": tensor for place, (name, tensor) in enumerate(state.items())}


def written(path, state, order=True):
    metadata = {"order": json.dumps(list(state))} if order else None
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
    return path


@pytest.mark.parametrize("num_classes", [1000, 7, 0])
@pytest.mark.parametrize("other_names", [True, False])
def test_a_file_gives_the_features_of_the_model_that_it_is_of(tmp_path, num_classes, other_names):
    model = original(num_classes)
    state = renamed(model.state_dict()) if other_names else model.state_dict()
    frozen = zoo.load(f"{ARCHITECTURE}={written(tmp_path / 'w.safetensors', state)}")
    x = torch.randn(2, 3, 32, 32)
    model.reset_classifier(0)
    assert torch.equal(frozen.model(x), model(x))
    assert ("mapped in their order" in frozen.pretrained) == other_names
    assert models.fingerprint(frozen.model) == models.fingerprint(model)
    state[next(iter(state))][0, 0, 0, 0] += 1
    other = zoo.load(f"{ARCHITECTURE}={written(tmp_path / 'other.safetensors', state)}")
    assert models.fingerprint(other.model) != models.fingerprint(frozen.model)


def test_counters_of_batches_are_not_asked_for(tmp_path):
    state = {name: t for name, t in renamed(original().state_dict()).items() if "num_batches" not in name}
    assert weights.fitting(written(tmp_path / "w.safetensors", state), ARCHITECTURE).is_mapped


def changed(state, change):
    """A renamed state with something wrong in it."""
    names = list(state)
    weight, bias = (next(n for n in names[5:] if n.endswith(word)) for word in ("weight", "bias"))
    if change == "swapped":
        return {{weight: bias, bias: weight}.get(n, n): state[{weight: bias, bias: weight}.get(n, n)] for n in names}
    if change == "shape":
        return state | {bias: torch.zeros(3)}
    if change == "fewer":
        return {name: state[name] for name in names[1:]}
    return {({bias: "bn1.bias"}.get(n, n)): tensor for n, tensor in state.items()}  # a name of another


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "swapped",
            r"Nor can its names be mapped: in their order, tensor \d+ is net\.\d+\.bias .* and that of the mod",
        ),
        ("shape", r"tensor \d+ is net\.\d+\.bias \(3,\) and that of the model .*bias \(\d+,\)"),
        ("fewer", r"it has \d+ tensors, and the model has \d+ with its classifier and \d+ without"),
        ("a name of another", r"is bn1\.bias .* and that of the model"),
    ],
)
def test_names_are_mapped_only_if_all_agrees(tmp_path, change, message):
    state = changed(renamed(original().state_dict()), change)
    with pytest.raises(ValueError, match=message) as error:
        weights.fitting(written(tmp_path / "w.safetensors", state), ARCHITECTURE)
    assert re.search(
        r"does not fit test_efficientnet: it lacks \d+ tensors of the model \(.*, \.\.\.\) and", str(error.value)
    )


def test_the_order_must_be_known_and_what_does_not_fit_is_listed(tmp_path):
    state = original().state_dict()
    with pytest.raises(ValueError, match=r"into the file's metadata under 'order', so that they can be mapped"):
        weights.fitting(written(tmp_path / "a.safetensors", renamed(state), order=False), ARCHITECTURE)
    save_file(renamed(state), tmp_path / "b.safetensors", {"order": '["conv"]'})
    with pytest.raises(ValueError, match="Its metadata under 'order' are not the names of its tensors"):
        weights.fitting(tmp_path / "b.safetensors", ARCHITECTURE)
    state["conv_stem.weight"] = torch.zeros(2, 3, 3, 3)
    state["more.weight"] = torch.zeros(1)
    del state["bn1.bias"]
    shapes = (
        r"lacks 1 tensors of the model \(bn1\.bias\) and has 1 others \(more\.weight\) and has 1 of another shape "
    )
    with pytest.raises(ValueError, match=shapes + r"\(conv_stem\.weight \(2, 3, 3, 3\) for \(\d+, 3, 3, 3\)\)"):
        weights.fitting(written(tmp_path / "c.safetensors", state, order=False), ARCHITECTURE)


def test_weights_are_of_one_model():
    settings = Settings(models=["resnet18"], weights="w.safetensors", output_dir="runs")
    assert settings.model_names == ["resnet18=w.safetensors"]
    for names in ([], ["resnet18", "resnet34"]):
        with pytest.raises(ValueError, match=r"weights is w\.safetensors, the file of one model; name one, not"):
            Settings(models=names, random_init=["small_conv"], weights="w.safetensors", output_dir="runs")
