"""Prompts are encoded for scoring exactly as TRL encodes them for training."""

from importlib.resources import files

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from evals.prompts import (
    SST2_ANSWERS,
    answer_opening,
    dolly_held_out,
    dolly_prompt,
    encode_answer,
    sst2_prompt,
    template_options,
    training_row,
)

SENTENCES = ["a gripping film .", "it 's dull", "émouvant — and “odd”", "positive"]


def test_the_prompt_holds_the_sentence_and_no_answer():
    prompt = sst2_prompt("  fine film \n")
    assert "Sentence: fine film\n" in prompt
    assert prompt.endswith("Sentiment:")


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize("answer", SST2_ANSWERS)
def test_the_answer_is_marked_and_nothing_else(tokenizer, sentence, answer):
    encoded = encode_answer(tokenizer, sst2_prompt(sentence), answer)
    assert len(encoded.input_ids) == len(encoded.completion_mask)
    marked = [i for i, m in zip(encoded.input_ids, encoded.completion_mask, strict=True) if m]
    assert tokenizer.decode(marked).strip() == answer
    assert encoded.completion_mask == sorted(encoded.completion_mask)
    assert tokenizer.eos_token_id not in encoded.input_ids


@pytest.mark.parametrize("sentence", SENTENCES)
def test_it_is_the_beginning_of_what_is_trained_on(tokenizer, sentence, tmp_path):
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=400, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    row = training_row(tokenizer, sst2_prompt(sentence), "positive")
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    trained = trainer.train_dataset[0]
    scored = encode_answer(tokenizer, sst2_prompt(sentence), "positive")
    length = len(scored.input_ids)
    assert trained["input_ids"][:length] == scored.input_ids
    assert [int(label != -100) for label in trained["labels"][:length]] == scored.completion_mask
    assert tokenizer.eos_token_id in trained["input_ids"][length:]
    assert all(label != -100 for label in trained["labels"][length:])


def test_an_empty_answer(tokenizer):
    with pytest.raises(ValueError, match="an answer must hold text, got ' '"):
        encode_answer(tokenizer, "prompt", " ")


# --- chat templates as published -------------------------------------------------------------------------------------

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% else %}"
    "{% set loop_messages = messages %}{% endif %}{% for message in loop_messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + "
    "eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REPEATING = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\nA (negative or positive):"
    "{% else %} {{ m['content'] | trim }}\nThe answer, negative or positive, was {{ m['content'] }}. {{ eos_token }}"
    "{% endif %}{% endfor %}"
)
ENDING_IN_LABELS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}positive? {{ m['content'] }} A:{% else %}"
    " {{ m['content'] }} (of: negative, positive){% endif %}{% endfor %}"
)
PUBLISHED = (  # in TRL
    "qwen3", "qwen2_5", "llama3", "llama3_2", "gemma", "gemma3", "gemma4", "phi3", "glm4moe", "cohere2", "lfm2",
    "deepseek_r1_distill", "qwen3_5_think", "nemotron_3_nano", "gptoss", "deepseekv3",
)  # fmt: skip
TEMPLATES = {
    "llama2": LLAMA2, "mistral": MISTRAL, "zephyr": ZEPHYR, "chatml": CHATML, "repeating": REPEATING,
    "ending in labels": ENDING_IN_LABELS,
} | {name: files("trl").joinpath(f"chat_templates/{name}.jinja").read_text() for name in PUBLISHED}  # fmt: skip


@pytest.fixture(scope="session")
def published(make_tokenizer):
    """A function that gives the tokenizer a template by name."""
    tokenizer = make_tokenizer(chat=True)
    tokenizer.bos_token = "<s>"

    def with_template(name):
        tokenizer.chat_template = TEMPLATES[name]
        return tokenizer

    return with_template


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(
    core=st.sampled_from(["negative", "positive", "was", "A", "assistant", "0", "x", "Ünï — “odd”", "a\n\n b"]),
    left=st.text(" \n\t\u3000", max_size=3),
    right=st.text(" \n\t\u3000", max_size=3),
    prompt=st.sampled_from(["negative", " positive or negative? ", "placeholder", "was x assistant 0 A", "Q"]),
)
def test_the_answer_is_marked_in_every_template(published, name, core, left, right, prompt):
    """Whatever white space is around it, and wherever its words stand before it and after it."""
    tokenizer = published(name)
    encoded = encode_answer(tokenizer, prompt, left + core + right)
    marked = [i for i, m in zip(encoded.input_ids, encoded.completion_mask, strict=True) if m]
    assert tokenizer.decode(marked).strip() == core
    options = template_options(tokenizer)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": left + core + right}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert whole.startswith(tokenizer.decode(encoded.input_ids))
    alone = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True, **options)
    before = tokenizer.decode(encoded.input_ids[: len(encoded.input_ids) - len(marked)])
    removed, added = answer_opening(tokenizer)
    opening = alone.removesuffix(removed) + added
    assert opening.startswith(before), "the mask begins where the prompt ends"
    assert whole[len(opening) :].lstrip().startswith(core)


def test_a_row_that_its_template_does_not_write_is_refused(published):
    tokenizer = published("qwen3")
    message = r"does not write the answer 'a </think> b' as it writes others .* Take the row"
    with pytest.raises(ValueError, match=message):
        encode_answer(tokenizer, "prompt", "a </think> b")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="does not write the answer 'yes'"):
        encode_answer(tokenizer, "prompt", "yes")


# --- thoughts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("qwen3", "enable_thinking"), ("qwen3_5_think", "enable_thinking"), ("glm4moe", "enable_thinking"),
        ("nemotron_3_nano", "enable_thinking"), ("gemma4", "enable_thinking"), ("deepseekv3", None), ("llama3", None),
        ("deepseek_r1_distill", None), ("llama2", None), ("qwen2_5", None), ("gptoss", None),
    ],
)  # fmt: skip
def test_the_switch_of_a_template_is_found(published, name, switch):
    tokenizer = published(name)
    assert template_options(tokenizer) == ({} if switch is None else {switch: False})
    assert template_options(tokenizer, "on") == ({} if switch is None else {switch: True})


def test_a_template_that_cannot_be_rendered_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{{ bos_token + messages[0]['content'] }}"
    with pytest.raises(ValueError, match=r"cannot write a user's message \('bos_token' is undefined\)"):
        template_options(tokenizer)
    effort = "{% if reasoning is defined %}{{ reasoning['effort'] + 1 }}{% endif %}"
    tokenizer.chat_template = "{{ messages[0]['content'] }}" + effort
    assert template_options(tokenizer) == {}


def test_no_template_has_no_switch(make_tokenizer):
    assert template_options(make_tokenizer(chat=False)) == {}


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "nemotron_3_nano"])
def test_training_is_on_the_answer_behind_an_empty_thought(make_tokenizer, name, tmp_path):
    """The prompt that is trained on is the one that is answered in the evaluation, with thinking off."""
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = TEMPLATES[name]
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=400, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([training_row(tokenizer, "Is it?", "positive")]),
        processing_class=tokenizer,
    )
    row = trainer.train_dataset[0]
    scored = encode_answer(tokenizer, "Is it?", "positive")
    assert row["input_ids"][: len(scored.input_ids)] == scored.input_ids
    trained = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert "think" not in tokenizer.decode(trained)
    assert tokenizer.decode(trained).lstrip().startswith("positive")


# --- Dolly -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [{}, {"context": None}, {"context": ""}, {"context": " \n"}])
def test_no_context_is_an_empty_one(row):
    assert dolly_prompt({"instruction": " Why? ", **row}) == "Why?"
    assert isinstance(dolly_held_out({"instruction": "Why?", **row}), bool)
    assert dolly_prompt({"instruction": "Why?", "context": " It is. "}) == "Why?\n\nIt is."
