"""Prompts are encoded for scoring exactly as TRL encodes them for training."""

import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from evals.prompts import SST2_ANSWERS, encode_answer, sst2_prompt, training_row

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
