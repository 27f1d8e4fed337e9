"""sigma in vLLM's wrappers of kernels, for GPUs and CPUs, against loops over tokens."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from mono_peft_vllm.sigma import with_sigma


@pytest.mark.parametrize("options", [[], ["--compiled"]], ids=["eager", "compiled"])
def test_the_gpus_kernels_in_the_interpreter(options):
    program = Path(__file__).parent / "gpu_path.py"
    result = subprocess.run([sys.executable, str(program), *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def wrapper():
    """vLLM's wrapper for CPUs with three slots, of the adapters 11, 22 and 33."""
    config = types.SimpleNamespace(max_loras=3)
    wrapper = with_sigma(PunicaWrapperCPU)(64, 8, "cpu", lora_config=config)
    for slot, activation in enumerate(("relu", "identity", "sigmoid")):
        wrapper.fill_slot(slot, activation, adapts_logits=slot == 0)
    return wrapper


def map_rows(wrapper, tokens, requests):
    wrapper.update_metadata(LoRAMapping(tuple(tokens), tuple(requests), is_prefill=True), [11, 22, 33], 4, 100)


def test_logits_are_of_the_requests_adapters(wrapper):
    encoder, decoder = torch.randn(3, 1, 8, 16), torch.randn(3, 1, 20, 8)
    hidden = torch.randn(2, 16)
    update = torch.relu(hidden @ encoder[0, 0].T) @ decoder[0, 0].T  # of slot 0, which alone adapts the head
    map_rows(wrapper, [33] * 5 + [11], [33, 11])
    logits = torch.zeros(2, 20)
    wrapper.add_lora_logits(logits, hidden, encoder, decoder * torch.tensor([1, 0, 0]).view(3, 1, 1, 1), 1.0)
    assert not logits[0].any()
    assert torch.allclose(logits[1], update[1], atol=1e-5)
    map_rows(wrapper, [33] * 5 + [22], [33, 22])
    logits = torch.zeros(5, 20)
    wrapper.add_lora_logits(logits, torch.randn(5, 16), encoder, decoder, 1.0)
    assert not logits.any()


@pytest.mark.parametrize("tokens", [[0, 0, 0], [22, 22, 22], [11, 0, 33, 33, 22, 11]])
def test_rows_without_adapter_stay_as_they_are(wrapper, tokens):
    """vLLM's own products give them the adapter of the last slot."""
    sizes = (12, 4)
    encoders = tuple(torch.randn(3, 1, 8, 16) for _ in sizes)
    decoders = tuple(torch.randn(3, 1, size, 8) for size in sizes)
    x, y = torch.randn(len(tokens), 16), torch.randn(len(tokens), 16)
    map_rows(wrapper, tokens, tokens)
    expected = y.clone()
    for row, number in enumerate(tokens):
        if number:
            slot = (11, 22, 33).index(number)
            sigma = (torch.relu, lambda z: z, torch.sigmoid)[slot]
            parts = [decoders[i][slot, 0] @ sigma(encoders[i][slot, 0] @ x[row]) for i in range(len(sizes))]
            expected[row] += torch.cat(parts)
    got = y.clone()
    wrapper.add_lora_linear(got, x, encoders, decoders, 1.0, sizes)
    assert torch.allclose(got, expected, atol=1e-5)
    without = [row for row, number in enumerate(tokens) if not number]
    assert torch.equal(got[without], y[without])
