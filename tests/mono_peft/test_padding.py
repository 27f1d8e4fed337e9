"""Padding in front of texts, for models that count positions from the start of a row."""

import pytest
import torch
from small_bases import gpt2

from mono_peft import Silence, activation_sparsity
from mono_peft.padding import right_padded

TEXTS = [[5, 9, 30, 12, 7], [8, 3, 44]]
ALONE = [{"input_ids": torch.tensor([text])} for text in TEXTS]


def padded(side):
    rows = [([0] * (5 - len(t)), t) for t in TEXTS]
    ids = [pad + text if side == "left" else text + pad for pad, text in rows]
    marks = [[0] * len(p) + [1] * len(t) if side == "left" else [1] * len(t) + [0] * len(p) for p, t in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(marks)}


@pytest.fixture
def model(random_adapter):
    torch.manual_seed(0)
    return random_adapter(gpt2(), target_modules=["c_attn", "c_fc"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_learned_positions(model, side):
    """What is measured of padded texts is what is measured of each alone."""
    expected, found = activation_sparsity(model, ALONE), activation_sparsity(model, [padded(side)])
    assert found.per_module == pytest.approx(expected.per_module)

    def gradients(batches):
        model.zero_grad()
        Silence(model, batches, rows_per_step=100).add_gradients(0)
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(ALONE), gradients([padded(side)])
    assert len(found) == 4
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_what_else_has_the_shape_of_the_mask_moves_along():
    batch = padded("left") | {"silent_mask": torch.tensor([[0, 1, 1, 1, 1], [7, 7, 0, 1, 1]]), "labels": torch.ones(2)}
    moved = right_padded(batch)
    assert moved["input_ids"].tolist() == padded("right")["input_ids"].tolist()
    assert moved["attention_mask"].tolist() == padded("right")["attention_mask"].tolist()
    assert moved["silent_mask"].tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 7, 7]]
    assert moved["labels"] is batch["labels"]


def test_positions_that_are_given_are_kept():
    batch = padded("left") | {"position_ids": torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])}
    assert right_padded(batch) == batch


def test_offsets_from_the_end():
    with pytest.raises(ValueError, match=r"`alora_offsets` count from the end of a row.*Pad on the right"):
        right_padded(padded("left") | {"alora_offsets": [2, 2]})
