"""Base, LoRA and MonoLoRA in one batch of vLLM equal transformers and PEFT."""

import random

import pytest

from tests.vllm.conftest import ADAPTERS, assert_equal, engine, generate, prompts, request

IN_LAYERS = [name for name in ADAPTERS if "embedding" not in name and name != "head"]


@pytest.fixture(scope="module")
def llm(folder):
    with engine(folder) as llm:
        yield llm


def test_every_activation_and_pattern_beside_lora_and_the_base(llm, folder, reference):
    batch = [(name, prompt) for prompt in prompts(2) for name in ("base", *IN_LAYERS)]
    answers = generate(llm, folder, batch, 12, prompt_logs=True)
    assert_equal(answers, batch, reference, 12)
    by_adapter = {name: tokens for (name, _), (tokens, _, _) in zip(batch, answers, strict=True)}
    assert len({tuple(tokens) for tokens in by_adapter.values()}) == len(by_adapter)  # each adapter has a say
