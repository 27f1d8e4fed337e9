"""Every experts class of the installed transformers: without an update it is the base's to the last bit."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from peft import inject_adapter_in_model
from torch import nn

from mono_peft import MonoLoraConfig

_DECORATED = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)
CLASSES = {
    name: f"transformers.models.{file.parent.name}.{file.stem}"
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
    for name in _DECORATED.findall(file.read_text())
}


class AnyConfig:
    """Sizes under whatever names the experts of a model look for."""

    _experts_implementation = "grouped_mm"
    moe_latent_size = None
    swiglu_alpha = 1.7

    def __getattr__(self, name):
        for part, value in (("act", "silu"), ("limit", 7.0), ("softcap", 7.0), ("eps", 1e-6), ("intermediate", 16)):
            if part in name:
                return value
        if "expert" in name:
            return 4
        if "hidden" in name:
            return 12
        raise AttributeError(name)


def test_there_are_many():
    assert len(CLASSES) > 40


@pytest.mark.parametrize("name", CLASSES)
def test_without_an_update_it_is_the_base(name):
    torch.manual_seed(0)
    experts = getattr(importlib.import_module(CLASSES[name]), name)(AnyConfig())
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.4)
    hidden, weights = torch.randn(9, 12), torch.rand(9, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    expected = experts(hidden, index, weights)
    targets = ["experts.gate_up_proj" if experts.has_gate else "experts.up_proj", "experts.down_proj"]
    model = nn.ModuleDict({"experts": experts})
    config = MonoLoraConfig(r=3, target_modules=[], target_parameters=targets)
    adapted = inject_adapter_in_model(config, model)["experts"]
    assert torch.equal(adapted(hidden, index, weights), expected)
    with torch.no_grad():
        adapted.down_proj.monolora_decoder["default"].weight.fill_(1)
    assert not torch.allclose(adapted(hidden, index, weights), expected)
