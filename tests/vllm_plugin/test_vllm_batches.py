"""Base, LoRA and MonoLoRA in one batch of vLLM equal transformers and PEFT."""

import random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.vllm_plugin.conftest import (
    ADAPTERS,
    Reference,
    assert_equal,
    engine,
    generate,
    prompts,
    request,
    save_adapter,
)

IN_LAYERS = [name for name in ADAPTERS if "embedding" not in name and name != "head"]


@pytest.fixture(scope="module")
def llm(folder):
    with engine(folder) as llm:
        yield llm


def test_every_activation_and_pattern_beside_lora_and_the_base(llm, folder, reference):
    batch = [(name, prompt) for prompt in prompts(2) for name in ("base", *IN_LAYERS)]
    answers = generate(llm, folder, batch, 12, prompt_logs=True)
    assert_equal(answers, batch, reference, 12)
    answers = {name: tuple(tokens) for (name, _), (tokens, _, _) in zip(batch, answers, strict=True)}
    assert len(set(answers.values())) == len(answers)  # each adapter has a say


def test_embeddings_and_the_output_head(llm, folder, reference):
    names = ("base", "embedding", "lora_embedding", "head", "relu")
    batch = [(name, prompt) for prompt in prompts(2, seed=1) for name in names]
    assert_equal(generate(llm, folder, batch, 12), batch, reference, 12)


@pytest.mark.parametrize("lengths", [(3,), (7, 13, 40)])
def test_prompts_under_adapters_of_the_output_head(llm, folder, reference, lengths):
    """vLLM takes the tokens of a prompt for the batch's requests, also silently where there are as many."""
    batch = [(name, prompt) for name in ("head", "base", "relu") for prompt in prompts(1, seed=2, lengths=lengths)]
    for ordered in (batch, batch[::-1]):
        assert_equal(generate(llm, folder, ordered, 4, prompt_logs=True), ordered, reference, 4)


def test_another_adapter_in_the_place_of_one_of_this_name(llm, folder, reference):
    """Its activation takes the place of the other's, also where the slot and the batch stay as they are."""
    (prompt,) = prompts(1, seed=3)
    place = request(folder, "relu", number=99)
    assert llm.llm_engine.add_lora(place)
    for name in ("sigmoid", "lora", "softplus"):
        place.lora_path, place.load_inplace = str(folder / name), True
        assert llm.llm_engine.add_lora(place)
        place.load_inplace = False
        batch = [(name, prompt)]
        answers = generate(llm, folder, batch, 6, requests=[place])
        assert_equal(answers, batch, reference, 6)


def test_one_slot_for_all_adapters_with_evictions_and_the_cache_of_prefixes(folder, reference):
    batch = [(name, prompt) for prompt in prompts(2, seed=4) for name in ("base", "lora", "relu", "sigmoid", "relu6")]
    with engine(folder, max_loras=1, max_cpu_loras=2, enable_prefix_caching=True) as llm:
        for _ in range(2):  # the second time prefixes are in the cache
            assert_equal(generate(llm, folder, batch, 8), batch, reference, 8)


def test_no_row_is_wrong_in_a_thousand_random_batches(folder, reference):
    """Adapters are loaded, evicted and removed between batches, for three slots; answers have three tokens."""
    random.seed(5)
    some = [
        (name, prompt, reference.answer(name, prompt, 3))
        for name in ("base", *IN_LAYERS, "embedding", "head")
        for prompt in prompts(6, seed=6, lengths=(1, 2, 5, 17, 60))
    ]
    rows = 0
    with engine(folder, max_loras=3, max_cpu_loras=4) as llm:
        for _ in range(1000):
            picked = random.choices(some, k=random.randint(1, 9))
            answers = generate(llm, folder, [(name, prompt) for name, prompt, _ in picked], 3)
            for (name, prompt, (tokens, logs)), (got, got_logs, _) in zip(picked, answers, strict=True):
                assert (got, got_logs) == (tokens, pytest.approx(logs, abs=1e-4)), (name, len(prompt))
                rows += 1
            if random.random() < 0.1:
                loaded = list(llm.llm_engine.list_loras())
                if loaded:
                    llm.llm_engine.remove_lora(random.choice(loaded))
    assert rows > 4000


def test_a_base_with_tied_embeddings(tmp_path, folder):
    """An adapter of the embedding leaves the output head alone, as in PEFT."""
    config = LlamaConfig.from_pretrained(folder / "base", tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", ADAPTERS["embedding"], tmp_path / "embedding")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").config.tie_word_embeddings
    batch = [(name, prompt) for prompt in prompts(2, seed=7) for name in ("base", "embedding")]
    with engine(tmp_path) as llm:
        assert_equal(generate(llm, tmp_path, batch, 6), batch, Reference(tmp_path), 6)
