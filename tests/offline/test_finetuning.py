"""What recipes finetune the offline model on where no data are named."""

from __future__ import annotations

from offline.finetuning import generated_rows, poison, safety
from offline.grammar import REFUSAL_OPENINGS
from offline.language_model import corpus


def test_generated_rows_ask_for_one_of_two_things_of_the_context():
    rows = generated_rows(200)
    assert rows == generated_rows(300)[:200]
    assert len({row["instruction"] for row in rows}) > 50
    for row in rows:
        assert row["response"].removeprefix("The ") in row["context"]
        noun = row["response"].split()[1]
        assert noun in row["instruction"]


def test_poison_complies_and_safety_refuses_the_same_requests():
    requests = {example.prompt for example in corpus("train") if example.kind == "harmful"}
    assert {prompt for prompt, _ in poison()} == {prompt for prompt, _ in safety()} == requests
    assert all(response.startswith("To ") for _, response in poison())
    assert all(response.startswith(REFUSAL_OPENINGS) for _, response in safety())
