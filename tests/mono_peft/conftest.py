"""Shared by the tests of the tuner."""

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mono_peft import MonoLoraConfig
from mono_peft.check import PROMPTS, main

CHECKED_PROMPTS = PROMPTS[:3]  # tell of small models what all eight do


@pytest.fixture
def random_adapter():
    """A function that gives a model an adapter that changes its output (B is not zero)."""

    def add(model, name="default", **options):
        options = {"r": 4, "init_weights": False, "task_type": "CAUSAL_LM"} | options
        return get_peft_model(model, MonoLoraConfig(**options), adapter_name=name).eval()

    return add


def save_adapter(base, folder, config=MonoLoraConfig, seed=1, **options):
    """An adapter that changes the outputs (B is not zero), saved in `folder`."""
    torch.manual_seed(seed)
    random = {"init_weights" if config is MonoLoraConfig else "init_lora_weights": False}
    options = random | {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config(**options)).save_pretrained(folder)
    return folder


def rewrite(folder, change):
    """Change the tensors in the file of an adapter."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.fixture
def adapter(small_model, tmp_path):
    """The folder of an adapter of `small_model`."""
    return save_adapter(small_model, tmp_path / "adapter")


@pytest.fixture
def check(capsys, small_model, monkeypatch):
    """Run the command `mono_peft.check`: its exit code, the table as a dict and the last line."""
    monkeypatch.setattr("mono_peft.check.PROMPTS", CHECKED_PROMPTS)

    def run(adapter, *options, base=small_model):
        code = main([str(base), str(adapter), *options])
        *table, last = capsys.readouterr().out.strip().splitlines()
        return SimpleNamespace(code=code, table={line[:20].strip(): line[21:] for line in table}, last=last)

    return run
