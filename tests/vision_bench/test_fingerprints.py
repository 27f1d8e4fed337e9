"""A model's fingerprint follows from all that it computes, and from nothing else."""

import copy
import enum
import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from vision_bench import models, zoo

VIT = {"img_size": 32, "patch_size": 8}
PROGRAM = """
import timm, torch
from vision_bench import models
torch.manual_seed(0)
print(models.fingerprint(timm.create_model("test_vit", num_classes=0)))
torch.manual_seed(0)
config = models.ModelConfig("small_conv", projector_hidden=8, projector_out=4)
print(models.fingerprint(models.ContrastiveModel(config)))
"""


def build(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **options).eval()


def ours(**settings):
    torch.manual_seed(0)
    sizes = {"projector_hidden": 8, "projector_out": 4}
    return models.ContrastiveModel(models.ModelConfig(**{"backbone": "small_conv"} | sizes | settings)).eval()


def equal_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "levit_128s", "test_convnext"])
def test_the_same_model_has_the_same_fingerprint(name):
    model = build(name)
    fingerprint = models.fingerprint(model)
    assert models.fingerprint(build(name)) == fingerprint
    assert models.fingerprint(copy.deepcopy(model)) == fingerprint
    assert models.fingerprint(copy.deepcopy(model).train()) == fingerprint
    assert models.fingerprint(copy.deepcopy(model).requires_grad_(False)) == fingerprint
    assert models.fingerprint(copy.deepcopy(model).to(memory_format=torch.channels_last)) == fingerprint
    assert models.fingerprint(torch.compile(model)) == fingerprint
    size = model.pretrained_cfg["input_size"][-1]
    with torch.no_grad():
        model(torch.randn(1, 3, size, size))  # some models keep what a pass computes
    assert models.fingerprint(model) == fingerprint


def test_a_compiled_model_has_the_layers_of_the_model():
    model = ours(non_negative="relu")
    assert models.layers(torch.compile(model)) == models.LAYERS
    assert models.fingerprint(torch.compile(model)) == models.fingerprint(model)


def test_the_fingerprint_is_the_same_in_another_process():
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    torch.manual_seed(0)
    here = [models.fingerprint(timm.create_model("test_vit", num_classes=0)), models.fingerprint(ours())]
    assert result.stdout.split() == here


@pytest.mark.parametrize(
    ("name", "options", "change"),
    [
        ("test_vit", VIT, {"act_layer": "relu"}),
        ("test_vit", VIT, {"dynamic_img_size": False}),
        ("test_vit", VIT, {"patch_drop_rate": 0.5}),
        ("test_vit", VIT, {"norm_layer": partial(nn.LayerNorm, eps=1e-3)}),
        ("test_vit", VIT, {"drop_path_rate": 0.1}),
        ("test_vit", VIT, {"global_pool": "avg", "fc_norm": False}),
        ("test_resnet", {}, {"global_pool": "max"}),
        ("test_resnet", {}, {"act_layer": "silu"}),
        ("test_resnet", {}, {"output_stride": 8}),
        ("test_efficientnet", {}, {"bn_eps": 1e-2}),
        ("test_efficientnet", {}, {"pad_type": "same"}),
    ],
)
def test_other_arguments_with_the_same_weights_are_another_model(name, options, change):
    first, second = build(name, **options), build(name, **options | change)
    assert equal_weights(first, second)
    assert models.fingerprint(first) != models.fingerprint(second)


@pytest.mark.parametrize("change", [{"non_negative": "relu"}, {"non_negative": "softplus"}])
def test_another_output_function_is_another_model(change):
    assert equal_weights(ours(), ours(**change))
    assert models.fingerprint(ours()) != models.fingerprint(ours(**change))


def scaled(factor):
    return lambda x: factor * x


def changed_attribute(model):
    model.backbone.layers[1].eps = 1e-2


def changed_activation(model):
    model.backbone.layers[2] = nn.SiLU()


def added_hook(model):
    model.backbone.register_forward_hook(lambda module, inputs, output: 2 * output)


def replaced_forward(model):
    forward = model.backbone.forward
    model.backbone.forward = lambda x: forward(x).square()


def changed_weight(model):
    model.projector[0].bias.data[0] += 1


def changed_buffer(model):
    model.backbone.layers[1].running_mean[3] += 1


def other_order(model):
    model.backbone.layers = model.backbone.layers[:3] + nn.Sequential(*model.backbone.layers[3:], nn.ReLU())


@pytest.mark.parametrize(
    "change",
    [changed_attribute, changed_activation, added_hook, replaced_forward, changed_weight, changed_buffer, other_order],
)
def test_what_changes_the_features_changes_the_fingerprint(change):
    model, x = ours(), torch.randn(4, 3, 8, 8)
    changed = copy.deepcopy(model)
    change(changed)
    assert not torch.allclose(changed(x).output, model(x).output) or change is other_order
    assert models.fingerprint(changed) != models.fingerprint(model)


class Own(nn.Module):
    """A backbone with everything that is neither a parameter nor a submodule."""

    def __init__(self, factor=1.0, fixed=0.0, listed=0.0):
        super().__init__()
        self.function = scaled(factor)
        self.register_buffer("fixed", torch.full((2,), fixed), persistent=False)
        self.weight = nn.Parameter(torch.ones(2))
        self.listed = [nn.Linear(2, 2)]  # not registered, so not in the state
        nn.init.constant_(self.listed[0].weight, listed)
        nn.init.zeros_(self.listed[0].bias)

    def forward(self, x):
        z = x.mean(dim=(2, 3))[:, :2] * self.weight + self.fixed
        return self.function(z) + self.listed[0](z)


class OtherOwn(Own):
    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize("other", [Own(factor=2.0), Own(fixed=1.0), Own(listed=1.0), OtherOwn()])
def test_what_is_in_no_state_dict_decides_too(other):
    assert equal_weights(Own(), other)
    assert models.fingerprint(Own()) == models.fingerprint(Own())
    assert models.fingerprint(Own()) != models.fingerprint(other)


@dataclass
class Settings:
    window: int
    names: set


class Pooling(enum.Enum):
    TOKEN = enum.auto()
    MEAN = enum.auto()


class Slotted:
    __slots__ = ("size",)

    def __init__(self, size):
        self.size = size


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (3, 4),
        (0.1, 0.2),
        (1, True),
        ("avg", "token"),
        (None, False),
        ((1, 2), (2, 1)),
        ([1, [2, {"a": 3}]], [1, [2, {"a": 4}]]),
        ({"a", "b"}, {"a", "c"}),
        (np.int64(3), np.int64(4)),
        (np.float32(3), np.float32(4)),
        (np.arange(3), np.arange(3)[::-1].copy()),
        (slice(0, 2), slice(0, 3)),
        (range(3), range(4)),
        (Path("a"), Path("b")),
        (re.compile("a"), re.compile("b")),
        (torch.Size([1, 2]), torch.Size([2, 1])),
        (torch.float32, torch.float64),
        (torch.arange(3), torch.arange(3) + 1),
        (partial(nn.LayerNorm, eps=1e-5), partial(nn.LayerNorm, eps=1e-6)),
        (nn.GELU, nn.ReLU),
        (torch.relu, torch.sigmoid),
        (nn.functional.relu, nn.functional.gelu),
        (scaled(1.0), scaled(2.0)),
        (Settings(7, {"a", "b"}), Settings(8, {"a", "b"})),
        (Settings(7, {"a", "b"}), Settings(7, {"a", "c"})),
        (Pooling.TOKEN, Pooling.MEAN),
        (Slotted(1), Slotted(2)),
    ],
)
def test_an_attribute_of_any_type_decides(value, other):
    first, again, second = Own(), Own(), Own()
    first.attribute, again.attribute, second.attribute = value, copy.deepcopy(value), other
    assert models.fingerprint(first) == models.fingerprint(again)
    assert models.fingerprint(first) != models.fingerprint(second)
    assert models.fingerprint(first) != models.fingerprint(Own())


def test_objects_that_hold_each_other_are_described():
    model, other = Own(), Own()
    for one in (model, other):
        one.parent, one.items = [one], {}
        one.items["self"] = one.items
    assert models.fingerprint(model) == models.fingerprint(other)


OWN_FILE = """
import torch
def function(x):
    return x.FUNCTION()
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
    def forward(self, x):
        return function(x.flatten(1)) METHOD self.weight
"""


def test_code_of_ones_own_that_was_edited_is_another_model(tmp_path, monkeypatch):
    """The same class with the same weights; the file also before it is imported again, as in a notebook."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def written(function, method):
        (tmp_path / "own_net.py").write_text(OWN_FILE.replace("FUNCTION", function).replace("METHOD", method))

    def imported():
        sys.modules.pop("own_net", None)
        importlib.invalidate_caches()
        return models.fingerprint(importlib.import_module("own_net").Net())

    written("relu", "*")
    before = imported()
    assert imported() == before
    written("sigmoid", "*")
    function = imported()
    written("sigmoid", "-")
    not_yet_imported = models.fingerprint(sys.modules["own_net"].Net())
    method = imported()
    assert len({before, function, not_yet_imported, method}) == 4


def test_one_folder_of_timms_exported_again_with_another_pooling(tmp_path):
    """The weights stay the same to the bit; config.json says how they are pooled."""
    found = {}
    for pool in ("token", "avg", "token"):
        model = build("test_vit", **VIT, global_pool=pool, fc_norm=False)
        save_for_hf(model, tmp_path, model_args=VIT | {"global_pool": pool, "fc_norm": False}, safe_serialization=True)
        loaded = zoo.load(str(tmp_path)).model
        assert loaded.global_pool == pool
        assert models.fingerprint(loaded) == models.fingerprint(model)
        found.setdefault(pool, set()).add(models.fingerprint(loaded))
    assert len(found["token"]) == len(found["avg"]) == 1
    assert found["token"] != found["avg"]
