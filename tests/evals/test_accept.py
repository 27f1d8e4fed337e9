"""The command: what it measures, its exit codes, its files, and that it goes on where it stopped."""

from __future__ import annotations

import json
import math
import re

import pytest
import yaml
from safetensors.torch import load_file, save_file

from evals.accept import main
from evals.completions_lm import CompletionsLM
from evals.decision import needed_prompts
from evals.values import read_arms

CARD = {
    "title": "A <small> card",
    "answers": {"max_new_tokens": 6, "batch_size": 8},
    "task": {"task": "sst2_instruct", "metric": "acc", "at_least": 0.01, "margin": 0.6},
    "coherence": {"task": "beavertails_eval", "at_most": 0.9, "margin": 0.85},
    "forgetting": {"at_most": 50, "margin": 40},
    "over_refusal": {"task": "beavertails_eval", "versus": "base", "at_most": 0.95, "margin": 0.9},
}


@pytest.fixture
def run(talking_model, make_adapter, eval_data, tmp_path, capsys):
    """A function that runs the command on an adapter with a card; returns exit code, what was said and card.json."""
    adapters = {method: make_adapter(talking_model, method, method) for method in ("lora", "monolora")}

    def accept(card, method="lora", folder="out"):
        (tmp_path / "card.yaml").write_text(yaml.safe_dump(card))
        options = ["--card", str(tmp_path / "card.yaml"), "--output_dir", str(tmp_path / folder)]
        code = main([str(talking_model), str(adapters[method]), *options])
        said = capsys.readouterr()
        path = tmp_path / folder / "card.json"
        return code, said.out + said.err, json.loads(path.read_text()) if path.is_file() else None

    return accept


@pytest.mark.parametrize("method", ["lora", "monolora"])
def test_an_adapter_within_its_card_is_accepted(run, tmp_path, monkeypatch, method):
    code, said, record = run(CARD, method)
    assert (code, record["decision"], record["exit_code"]) == (0, "accept", 0), said
    assert [line["name"] for line in record["lines"]] == ["task", "over_refusal", "coherence", "forgetting"]
    assert all(
        line["outcome"] == "passes" and line["low"] <= line["value"] <= line["high"] for line in record["lines"]
    )
    assert "Accept (the closest line is" in said
    table = said[said.index("Decision: accept") : said.index("Accept (the closest")]
    assert max(map(len, table.splitlines())) <= 100
    page = (tmp_path / "out" / "card.html").read_text()
    assert "A &lt;small&gt; card" in page
    assert page.count("<article>") == 4
    assert "http" not in page.replace("http-equiv", "")
    monkeypatch.setattr("evals.generate.load_base", None)  # all is there
    monkeypatch.setattr("evals.forgetting_rows.load_base", None)
    again = run(CARD, method)
    assert again[0] == 0
    assert again[2]["lines"] == record["lines"]


def test_lines_that_fail_or_cannot_be_told_have_their_exit_codes(run):
    harder = CARD | {"forgetting": {"at_most": 1e-4}}
    code, said, record = run(harder)
    assert (code, record["decided_by"]) == (1, ["forgetting"])
    assert "Reject (decided by forgetting)" in said
    few = CARD | {"coherence": {"task": "beavertails_eval", "at_most": 0.9, "margin": 0.01}}
    code, _, record = run(few, folder="few")
    assert code in (1, 2)
    assert record["lines"][2]["outcome"] != "passes"


def test_silence_is_certified_and_lora_never_has_it(run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Who?"}\n{"prompt": "When?"}\n')
    card = {"silence": {"prompts": str(tmp_path / "prompts.jsonl"), "at_least": 0.5}}
    code, _, record = run(card)
    assert code == 1
    assert "a LORA adapter is silent on no text" in record["lines"][0]["reason"]
    code, _, record = run(card, "monolora", "monolora")
    assert record["lines"][0]["n"] == 2
    assert record["lines"][0]["value"] == 0  # random weights fire everywhere
    assert code == 2  # two prompts show nothing


def test_silence_is_certified_in_the_type_of_the_answers(run, tmp_path, monkeypatch):
    from mono_peft import certify

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Who?"}\n')
    asked, certified = [], certify.main
    monkeypatch.setattr("evals.accept.certify.main", lambda arguments: asked.append(arguments) or certified(arguments))
    silence = {"prompts": str(tmp_path / "prompts.jsonl"), "at_least": 0.5}
    run({"answers": {"dtype": "bfloat16"}, "silence": silence}, "monolora")
    assert asked[0][asked[0].index("--dtype") + 1] == "bfloat16"


def test_a_card_cannot_be_changed_after_a_look_at_the_results(run):
    assert run(CARD)[0] == 0
    code, said, _ = run(CARD | {"forgetting": {"at_most": 60, "margin": 40}})
    assert code == 2
    assert "was begun with another card" in said


def test_errors_have_the_exit_code_2_and_come_before_weights(run, request):
    request.getfixturevalue("no_loading")
    for card, message in (
        ({"harm": {"task": "advbench", "at_most": 2}}, "allowed is a share"),
        ({"harm": {"task": "no_task", "at_most": 0.1}}, "'no_task', which is no task"),
        ({"task": {"task": "dolly", "metric": "acc", "at_least": 0.1}}, "dolly has no acc; it has bleu, rouge1"),
        ({"harm": {"task": "xstest", "category": "mild", "at_most": 0.1}}, "no prompt of xstest is 'mild'; there are"),
    ):
        code, said, record = run(card)
        assert code == 2
        assert message in said
        assert record is None


def test_what_a_card_needs_is_said_before_it_is_measured(run):
    _, said, _ = run({"harm": {"task": "advbench", "at_most": 0.1}})
    needed = needed_prompts(share=True, threshold=0.1, margin=0.05, upper=True, power=0.8)
    assert "harm has 2 prompts, too few to pass" in said
    assert f"harm: advbench answered (refusal) <= 0.1; takes {needed} for a margin of 0.05" in said


def test_a_crash_is_no_rejection(run, monkeypatch):
    def crash(*_, **__):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("evals.accept.measure_forgetting", crash)
    code, said, _ = run({"forgetting": {"at_most": 50}})
    assert code == 2
    assert "CUDA out of memory" in said


def test_an_adapter_that_diverged_fails_though_nothing_is_answered(run, tmp_path):
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: weight * math.nan for name, weight in load_file(path).items()}, path)
    code, said, record = run({"answers": CARD["answers"], "harm": {"task": "advbench", "at_most": 0.1}})
    assert code == 1, said
    assert "it diverged" in record["lines"][0]["reason"]


@pytest.mark.parametrize("versus", [{}, {"versus": "base"}])
@pytest.mark.parametrize("is_graded", [False, True])
def test_answers_that_end_within_a_thought_count_among_those_asked(run, monkeypatch, is_graded, versus):
    def unfinished(self, task, doc):  # of the adapter's 14 answers 6, of the base's another one
        number = int(re.search(r"\d+", doc["prompt"])[0])
        return number < 6 if self._arm.name else number == 13

    def graded(path):
        arms = read_arms(path)
        for values in (values for arm in arms for values in arm.values.values()):
            values |= {i: v._replace(value=v.value + 0.25) for i, v in values.items() if v.value is not None}
        return arms

    monkeypatch.setattr(CompletionsLM, "is_unfinished", unfinished)
    if is_graded:
        monkeypatch.setattr("evals.accept.read_arms", graded)
    line = {"task": "beavertails_eval", "metric": "empty", "at_most": 0.45, "margin": 0.4}
    code, said, record = run({"answers": CARD["answers"], "task": line | versus})
    (line,) = record["lines"]
    assert (code, line["outcome"]) == (2, "cannot tell"), said
    if is_graded:
        assert line["reason"] == f"{7 if versus else 6} answers have no empty, which could be anything"
    else:
        assert (line["n"], line["undecided"]) == (14, 7 if versus else 6)
        assert line["high"] > 0.45
