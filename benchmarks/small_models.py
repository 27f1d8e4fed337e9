"""Models with random weights that the benchmarks time, and adapters on them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from measuring import DEVICE, DTYPE
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mono_peft import MonoLoraConfig

ARMS = ("base", "LoRA", "MonoLoRA")
VOCABULARY = 1024  # small, so that a step is a cheap one
# Of SmolLM2-135M.
SMOLLM2_SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def llama(hidden: int, layers: int, wider: int = 4) -> LlamaForCausalLM:
    """A Llama with heads of 64 dimensions, whose intermediate size is `wider` times the hidden one, on `DEVICE`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=wider * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(DEVICE, DTYPE)


def with_adapters(base: nn.Module, **options: Any) -> dict[str, Any]:
    """The frozen base, and it with either adapter; B is not zero, so that every product counts.

    All read the same weights of the base, from the same memory.
    """
    models: dict[str, Any] = {"base": base.requires_grad_(False)}
    for name, config in (
        ("LoRA", LoraConfig(init_lora_weights=False, **options)),
        ("MonoLoRA", MonoLoraConfig(init_weights=False, **options)),
    ):
        weights = {id(parameter): parameter for parameter in base.parameters()}
        models[name] = get_peft_model(copy.deepcopy(base, weights), config, autocast_adapter_dtype=False)
    return models
