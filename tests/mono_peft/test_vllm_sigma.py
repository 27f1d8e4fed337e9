"""What the plugin for vLLM has of sigma, as far as it needs no vLLM; `tests/vllm_plugin` has the rest."""

import subprocess
import sys

import pytest
import torch

from mono_peft.layer import ACTIVATIONS
from mono_peft_vllm.sigma import SIGMAS


def test_every_activation_can_be_served():
    assert SIGMAS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sigma_is_the_same_function(activation):
    z = torch.linspace(-9, 9, 301)
    assert torch.equal(SIGMAS[activation](z), ACTIVATIONS[activation]()(z))


def test_the_plugin_is_found_and_light():
    """vLLM imports it in each of its processes."""
    program = """
import sys
from importlib.metadata import entry_points
(plugin,) = entry_points(group="vllm.general_plugins", name="mono_peft")
assert plugin.load().__name__ == "register"
print(sorted({"torch", "peft", "mono_peft", "transformers"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
