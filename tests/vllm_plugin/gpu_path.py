"""vLLM's wrapper for GPUs with sigma, its Triton kernels in Triton's interpreter, on the CPU: a program with asserts.

`python gpu_path.py` compares with a loop over tokens; `--compiled` does so under torch.compile, and asserts that other
adapters, another mapping and other lengths need no second graph. The interpreter has to be chosen before Triton is
imported, so this has a process of its own.
"""
# ruff: noqa: E402, what is set before an import is for it

import os
import sys
import types

os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": ""}

import triton.backends

# A driver that vLLM finds, so that it takes Triton's kernels on a machine without a GPU.
triton.backends.backends["cpu"] = types.SimpleNamespace(driver=object())
import torch
import vllm.triton_utils

assert vllm.triton_utils.HAS_TRITON
triton.backends.backends.pop("cpu")

from vllm.lora.layers import LoRAMapping
from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from mono_peft_vllm.sigma import SIGMAS, with_sigma

for module in (lora_expand_op, lora_shrink_op):
    if hasattr(module, "supports_pdl"):
        module.supports_pdl = lambda device: False

SLOTS, RANK, INPUTS, OUTPUTS = 3, 16, 64, (32, 16, 16)
ADAPTERS = [11, 22, 33]  # the number of the adapter in each slot
TOKENS = [0, 11, 11, 22, 33, 0, 22, 22, 33, 11, 0, 33]  # the number of each token's adapter, 0 for none
TOLERANCE = 4e-3  # of float16

generator = torch.Generator().manual_seed(0)


def random(*shape):
    return 0.2 * torch.randn(*shape, generator=generator)


encoders = tuple(random(SLOTS, 1, RANK, INPUTS).half() for _ in OUTPUTS)
decoders = tuple(random(SLOTS, 1, size, RANK).half() for size in OUTPUTS)
base = random(sum(OUTPUTS), INPUTS).half()
config = types.SimpleNamespace(max_loras=SLOTS, specialize_active_lora=False)
wrapper = with_sigma(PunicaWrapperGPU)(64, 8, "cpu", lora_config=config)


def fill(activations):
    for slot, activation in enumerate(activations):
        wrapper.fill_slot(slot, activation, True)


def map_rows(tokens, requests):
    wrapper.update_metadata(LoRAMapping(tuple(tokens), tuple(requests), is_prefill=True), ADAPTERS, SLOTS + 1, 100)


def updates(x, tokens, activations):
    """What the adapters add, by a loop over tokens and slices."""
    result = torch.zeros(len(x), sum(OUTPUTS))
    for row, number in enumerate(tokens):
        if number:
            slot = ADAPTERS.index(number)
            parts = [
                decoders[i][slot, 0].float() @ SIGMAS[activations[slot]](encoders[i][slot, 0].float() @ x[row].float())
                for i in range(len(OUTPUTS))
            ]
            result[row] = torch.cat(parts)
    return result


def assert_near(got, expected):
    assert expected.abs().max() > 0.5
    difference = (got.float() - expected).abs().max()
    assert difference < TOLERANCE * expected.abs().max(), difference


def eager():
    activations = ("relu", "identity", "softplus")
    fill(activations)
    requests = TOKENS[::-1]
    map_rows(TOKENS, requests)
    x, y = random(len(TOKENS), INPUTS).half(), random(len(TOKENS), sum(OUTPUTS)).half()
    without = [row for row, number in enumerate(TOKENS) if not number]
    expected = updates(x, TOKENS, activations)

    got = y.clone()
    wrapper.add_lora_linear(got, x, encoders, decoders, 1.0, OUTPUTS)
    assert_near(got, y.float() + expected)
    assert torch.equal(got[without], y[without])

    got = y[:, : OUTPUTS[0]].clone()
    wrapper.add_lora_logits(got, x, encoders[0], decoders[0], 1.0)
    assert_near(got, y[:, : OUTPUTS[0]].float() + updates(x, requests, activations)[:, : OUTPUTS[0]])

    for slot in (2, -1):  # of one request, whatever the batch has
        got = y[:, : OUTPUTS[0]].clone()
        with wrapper.all_requests_of(slot):
            wrapper.add_lora_logits(got, x, encoders[0], decoders[0], 1.0)
        of_slot = updates(x, [ADAPTERS[slot] if slot >= 0 else 0] * len(x), activations)[:, : OUTPUTS[0]]
        assert_near(got, y[:, : OUTPUTS[0]].float() + of_slot)
    got = y[:, : OUTPUTS[0]].clone()
    wrapper.add_lora_logits(got, x, encoders[0], decoders[0], 1.0)  # and the batch's again afterwards
    assert_near(got, y[:, : OUTPUTS[0]].float() + updates(x, requests, activations)[:, : OUTPUTS[0]])

    looked_up = random(len(TOKENS), RANK).half()
    got = y[:, : OUTPUTS[0]].clone()
    wrapper.add_lora_embedding(got, looked_up, decoders[0])
    expected = y[:, : OUTPUTS[0]].float()
    for row, number in enumerate(TOKENS):
        if number:
            slot = ADAPTERS.index(number)
            expected[row] += decoders[0][slot, 0].float() @ SIGMAS[activations[slot]](looked_up[row].float())
    assert_near(got, expected)


def compiled():
    from torch._inductor.compile_fx import compile_fx

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return compile_fx(graph, inputs)

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def layer(x):
        y = x @ base.T
        wrapper.add_lora_linear(y, x, encoders, decoders, 1.0, OUTPUTS)
        return 2 * y

    for activations, tokens in (
        (("identity", "identity", "identity"), TOKENS),  # as when vLLM warms up, before an adapter is loaded
        (("relu", "identity", "softplus"), TOKENS),
        (("sigmoid", "relu2", "relu6"), TOKENS[::-1]),
        (("sigmoid", "relu2", "relu6"), TOKENS[:7]),
    ):
        fill(activations)
        map_rows(tokens, tokens)
        x = random(len(tokens), INPUTS).half()
        assert_near(layer(x), 2 * ((x @ base.T).float() + updates(x, tokens, activations)))
    assert len(graphs) == 1, len(graphs)


if __name__ == "__main__":
    compiled() if "--compiled" in sys.argv else eager()
