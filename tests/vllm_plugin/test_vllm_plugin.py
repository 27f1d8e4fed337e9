"""How vLLM finds the plugin, and what it does where the plugin is not, or is not for this vLLM."""

import logging
import os
import subprocess
import sys

import pytest
import vllm
from vllm.config.lora import LoRAConfig
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

import mono_peft_vllm

PATCHED = [
    (WorkerLoRAManager, "_load_adapter"),
    (LoRAModelManager, "activate_adapter"),
    (LoRAConfig, "compute_hash"),
    (current_platform, "get_punica_wrapper"),
    (GPUModelRunner, "_get_prompt_logprobs_dict"),
]


def run(program, **environment):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_vllm_finds_and_calls_it():
    """In every process, without PEFT and without a GPU's context, as most have no MonoLoRA adapter."""
    program = """
import sys
import mono_peft_vllm
assert not {"torch", "peft", "vllm", "mono_peft"} & set(sys.modules)
from vllm.plugins import load_general_plugins
load_general_plugins()
import torch
from vllm.lora.worker_manager import WorkerLoRAManager
assert WorkerLoRAManager._load_adapter.serves_monolora
assert not {"peft", "mono_peft"} & set(sys.modules)
assert not torch.cuda.is_initialized()
"""
    result = run(program)
    assert result.returncode == 0, result.stderr


def test_called_again_it_changes_nothing():
    mono_peft_vllm.register()
    patched = [getattr(owner, name) for owner, name in PATCHED]
    mono_peft_vllm.register()
    assert [getattr(owner, name) for owner, name in PATCHED] == patched


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0.0", "dev"])
def test_other_versions_of_vllm_are_left_alone(monkeypatch, caplog, version):
    before = [getattr(owner, name) for owner, name in PATCHED]
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr("mono_peft_vllm.patches.install", lambda: pytest.fail("changed"))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        mono_peft_vllm.register()
    assert f"found {version}: they will be refused" in caplog.text
    assert [getattr(owner, name) for owner, name in PATCHED] == before


def test_a_graph_compiled_without_it_is_not_loaded():
    """vLLM finds stored graphs by this hash, and one made before the plugin was installed has no sigma."""
    program = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.config.lora import LoRAConfig
print(LoRAConfig(max_lora_rank=8).compute_hash())
"""
    without, *again = (
        run(program, VLLM_PLUGINS=plugins).stdout.split()[-1] for plugins in ("", "mono_peft", "mono_peft")
    )
    assert again[0] == again[1]
    assert again[0].startswith(f"{without}-mono_peft-")


def test_without_it_vllm_refuses_monolora(folder):
    program = f"""
import pathlib
from tests.vllm_plugin.conftest import engine, request
folder = pathlib.Path({str(folder)!r})
with engine(folder) as llm:
    assert llm.llm_engine.add_lora(request(folder, "lora"))
    for name in ("relu", "identity", "embedding", "head"):
        try:
            llm.llm_engine.add_lora(request(folder, name))
        except ValueError as error:
            print("refused", error)
"""
    result = run(program, VLLM_PLUGINS="")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("refused Missing required configuration fields: {'lora_alpha'}") == 4
