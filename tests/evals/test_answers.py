"""Log-likelihoods in padded batches equal those of one sequence at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import evals.answers
from evals.answers import answer_log_likelihoods
from evals.prompts import EncodedAnswer


def one_at_a_time(model, answers):
    values = []
    for answer in answers:
        logits = model(torch.tensor([answer.input_ids])).logits[0].double()
        log_probs = logits.log_softmax(-1)
        tokens = list(zip(answer.input_ids, answer.completion_mask, strict=True))
        values.append(sum(log_probs[i - 1, t].item() for i, (t, m) in enumerate(tokens) if m and i > 0))
    return torch.tensor(values)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=9),
    batch_size=st.integers(1, 10),
    data=st.data(),
)
def test_batches_do_not_matter(model, lengths, batch_size, data):
    answers = [
        EncodedAnswer(
            data.draw(st.lists(st.integers(0, 49), min_size=prompt + answer, max_size=prompt + answer)),
            [0] * prompt + [1] * answer,
        )
        for prompt, answer in lengths
    ]
    with torch.no_grad():
        expected = one_at_a_time(model, answers)
    found = answer_log_likelihoods(model, answers, pad_token_id=0, batch_size=batch_size)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    assert (found <= 0).all()


def test_batches_of_long_rows_are_smaller(model, monkeypatch):
    monkeypatch.setattr(evals.answers, "MOST_TOKENS", 20)
    answers = [EncodedAnswer([n] * n, [0] + [1] * (n - 1)) for n in (3, 30, 7, 6, 2, 9, 2, 2)]
    shapes = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = answer_log_likelihoods(model, answers, pad_token_id=0, batch_size=3)
    handle.remove()
    assert shapes == [(1, 30), (2, 9), (3, 6), (2, 2)]  # rows by length: 30, 9 7, 6 3 2, 2 2
    with torch.no_grad():
        torch.testing.assert_close(found, one_at_a_time(model, answers).float(), rtol=1e-5, atol=1e-5)


def test_dropout_is_off_and_the_mode_is_put_back(model):
    answers = [EncodedAnswer([1, 2, 3, 4], [0, 0, 1, 1])]
    noisy = torch.nn.Sequential(torch.nn.Dropout(0.5))
    model.add_module("noisy", noisy)
    model.train()
    model.lm_head.eval()  # each module has its own mode
    answer_log_likelihoods(model, answers, pad_token_id=0)
    assert model.training
    assert noisy.training
    assert not model.lm_head.training
    model.eval()
    assert answer_log_likelihoods(model, answers, pad_token_id=0) <= 0
