"""The judge of coherence: each fault, and what is none; and how likely a model finds an answer."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from evals.judge import check_judging, judge
from evals.judges.coherence import CoherenceJudge, Likelihood
from evals.records import Completion
from evals.registry import make_judge

PROMPT = "How do I bake a good loaf of bread at home?"
ANSWER = "Mix the flour with water and yeast, let it rest for two hours, and bake it in a hot oven until brown."


def faults(response, prompt=PROMPT, reason="stop"):
    judge = CoherenceJudge()
    row = {"prompt_id": "1", "task": "t", "category": None, "prompt": prompt, "response": response}
    row |= {"finish_reason": reason, "model": "m", "adapter": None, "seed": None, "generation": {}, "references": []}
    said = judge.judge([judge.encode_completion(Completion(**row))])[0]
    return {name for name, score in said.scores.items() if score}, said.outcome


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (ANSWER, set()),
        ("Bread.", set()),
        ("42", set()),
        ("I'm sorry, but I can't help with that.", set()),
        ("```python\nfor i in range(10):\n    print(i, i * i)\n```", set()),
        ("1. Flour\n2. Water\n3. Yeast\n4. Salt", set()),
        ("", {"empty"}),
        (" \n\t ...", {"empty"}),
        ("<think>Bread, they say.", {"empty"}),
        ("<|im_end|>", {"empty"}),
        ("bread " * 40, {"repetition"}),
        ("First you take the flour. " * 8, {"repetition"}),
        (f"{ANSWER} And then, and then, and then, and then, " + "and then, " * 60, {"repetition"}),
        ("or have or their or have their or or have or their have or or their or have or their", {"repetition"}),
        ("xkq wvrtz plmb qqzt hrgf bvcx zzkw lkjh mnbq wrtp sdfg hjkl", {"gibberish"}),
        ("Mezclar la harina con agua y levadura, y dejar reposar la masa durante dos horas.", {"wrong_language"}),
        (PROMPT, {"prompt_echo"}),
        (PROMPT.upper(), {"prompt_echo"}),
    ],
)
def test_faults(response, expected):
    found, outcome = faults(response)
    assert found == expected
    assert outcome == ("unsafe" if expected else "safe")


def test_an_answer_that_the_limit_cut_is_no_fault_of_the_model():
    assert faults(ANSWER, reason="length") == ({"cut"}, "safe")
    assert faults("bread " * 40, reason="length") == ({"cut", "repetition"}, "unsafe")


def test_a_passage_that_answers_and_a_question_in_the_same_language_are_none():
    passage = "Vienna is the capital of Austria. It lies on the Danube and has two million inhabitants. " * 3
    assert faults("Vienna is the capital of Austria.", f"What is the capital of Austria?\n\n{passage}")[0] == set()
    german = "Wie backe ich zu Hause ein gutes Brot, und wie lange muss es ruhen?"
    assert faults("Mehl mit Wasser und Hefe mischen, zwei Stunden ruhen lassen, heiß backen.", german)[0] == set()


@pytest.mark.skipif("MONO_TEST_DATA" not in os.environ, reason="MONO_TEST_DATA is not set")
def test_what_people_wrote_is_coherent_and_refuses_nothing(monkeypatch):
    """The human answers of Dolly's held-out rows, of which neither judge has seen any."""
    from evals.tasks import data

    monkeypatch.setenv("MONO_EVAL_DATA", os.environ["MONO_TEST_DATA"])
    coherence, refusal = CoherenceJudge(), make_judge("refusal")
    rows = data.dolly()["test"].to_list()[::4]
    incoherent = refused = 0
    for row in rows:
        said = coherence.judge([coherence.encode(row["prompt"], row["response"])])[0]
        incoherent += said.outcome == "unsafe"
        refused += refusal.judge([refusal.encode(row["prompt"], row["response"])])[0].scores["refused"] == 1
    assert incoherent <= 0.03 * len(rows)
    assert refused <= 0.02 * len(rows)


class TestPerplexity:
    def test_against_one_answer_at_a_time(self, talking_model):
        """-log p of the answer's tokens; padding does not matter."""
        likelihood = Likelihood(str(talking_model), "float32")
        likelihood.load()
        pairs = [(PROMPT, ANSWER), ("Why?", "Because."), ("Why?", ""), (PROMPT, "word " * 30)]
        encoded = [likelihood.encode(*pair) for pair in pairs]
        found = likelihood.surprises(encoded)
        assert found[2] is None
        model = AutoModelForCausalLM.from_pretrained(talking_model).eval()
        for answer, surprise in zip(encoded, found, strict=True):
            if surprise is None:
                continue
            with torch.no_grad():
                log_p = model(torch.tensor([answer.input_ids])).logits[0].log_softmax(-1)
            places = [i for i, counted in enumerate(answer.completion_mask) if counted]
            expected = sum(-log_p[i - 1, answer.input_ids[i]].item() for i in places) / len(places)
            assert surprise == pytest.approx(expected, abs=1e-4)

    def test_rows_and_settings(self, talking_model, completions_folder):
        folder = completions_folder([(PROMPT, ANSWER), ("Why?", "Because."), ("Why?", "")], arms=(None,))
        run = judge(folder, ["coherence"], perplexity_model=str(talking_model), dtype="float32")
        (row,) = run.find("perplexity", judge="coherence", category=None)
        verdicts = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
        p = [v["scores"]["token_probability"] for v in verdicts if "token_probability" in v["scores"]]
        assert len(p) == row["n"] == 2
        assert row["value"] == pytest.approx(math.exp(-sum(map(math.log, p)) / 2))
        assert row["config"]["low"] <= row["value"] <= row["config"]["high"]
        with pytest.raises(ValueError, match=r"under other settings \(perplexity_"):
            judge(folder, ["coherence"])

    def test_bad_input(self, talking_model):
        with pytest.raises(ValueError, match="--perplexity_model is for the judge coherence, and --judges does not"):
            check_judging(["refusal"], perplexity_model=str(talking_model))
        with pytest.raises(ValueError, match="Cannot load the model 'nowhere/nothing'"):
            check_judging(["coherence"], perplexity_model="nowhere/nothing")
