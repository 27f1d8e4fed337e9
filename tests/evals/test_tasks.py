"""The lm-eval tasks: their data from the documented folder, their prompts, and their metrics."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval.api.metrics import bleu
from lm_eval.tasks import TaskManager

import evals
from evals.prompts import dolly_held_out, dolly_prompt, sst2_prompt
from evals.tasks import metrics

FOLDER = Path(evals.__file__).parent / "tasks"
REAL = ("beavertails_eval", "xstest", "advbench")
SAFETY = (*REAL, "strongreject", "jailbreakbench", "harmbench", "wildguardtest")


def load(name):
    return TaskManager(include_path=str(FOLDER), include_defaults=False).load([name])["tasks"][name]


def docs(name):
    return list(load(name).test_docs())


# --- data ------------------------------------------------------------------------------------------------------------


def test_files_are_read_as_published(eval_data):
    assert docs("sst2_instruct")[0] == {"sentence": 'a "gripping film 0', "label": 1}
    assert docs("advbench")[1] == {"prompt": 'Do, "more"', "prompt_id": "1"}
    assert docs("xstest") == [
        {"prompt_id": "7", "prompt": "kill, it", "category": "safe"},
        {"prompt_id": "9", "prompt": "kill", "category": "unsafe"},
    ]
    assert docs("beavertails_eval")[3] == {"prompt": "{{harm}} 3 " * 4, "category": "b", "prompt_id": "3"}


def test_pairs_standard_behaviours_and_agreed_prompts(eval_data):
    assert docs("strongreject") == [{"prompt_id": "0", "prompt": "Do, harm", "category": "Hate"}]
    assert docs("jailbreakbench") == [
        {"prompt_id": "unsafe-0", "prompt": "Rob", "category": "unsafe"},
        {"prompt_id": "safe-0", "prompt": "Rub", "category": "safe"},
    ]
    assert docs("harmbench") == [{"prompt_id": "forge", "prompt": "Forge a coin", "category": "illegal"}]
    assert docs("wildguardtest") == [
        {"prompt_id": "0", "prompt": "Rob", "category": "unsafe"},
        {"prompt_id": "1", "prompt": "Rub", "category": "safe"},
    ]


def test_some_prompts_are_spread_over_the_set(eval_data):
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata={"safety_prompts": 2})
    prompts = {name: manager.load([name])["tasks"][name].test_docs()["prompt_id"] for name in SAFETY}
    whole = {name: [doc["prompt_id"] for doc in docs(name)] for name in SAFETY}
    assert prompts["beavertails_eval"] == [
        whole["beavertails_eval"][i] for i in (0, len(whole["beavertails_eval"]) // 2)
    ]
    assert all(prompts[name] == ids for name, ids in whole.items() if len(ids) <= 2)


def test_a_gated_set_asks_for_the_login(eval_data, monkeypatch):
    monkeypatch.delenv("MONO_EVAL_DATA")
    with pytest.raises(ValueError, match=r"Cannot load hf://datasets/allenai/wildguardmix.*hf auth login"):
        load("wildguardtest")


@pytest.mark.parametrize("name", SAFETY)
def test_the_prompt_is_the_text_as_written_and_greedy_with_512_tokens(eval_data, name):
    task = load(name)
    for doc in task.test_docs():
        assert task.doc_to_text(doc) == doc["prompt"]  # braces in it are no template
        assert task.doc_to_target(doc) == ""
    options = task.get_config("generation_kwargs")
    assert (options["do_sample"], options["max_gen_toks"], options["until"]) == (False, 512, [])


def test_dolly_keeps_the_same_rows_apart_in_any_order(eval_data):
    task = load("dolly")
    rows = [{"instruction": f"Question {i}?", "context": " about it\n" * (i % 2), "n": str(i)} for i in range(60)]
    held_out = [row for row in rows if dolly_held_out(row)]
    assert 0 < len(held_out) < 15
    assert [(task.doc_to_text(doc), task.doc_to_target(doc)) for doc in task.test_docs()] == [
        (dolly_prompt(row), row["n"]) for row in held_out
    ]
    assert dolly_prompt(rows[1]) == "Question 1?\n\nabout it"
    assert dolly_prompt(rows[2]) == "Question 2?"
    assert dolly_held_out({"instruction": f" {held_out[0]['instruction']} ", "context": "other"})


def test_the_sentiment_task_asks_as_the_recipe_does(eval_data):
    task = load("sst2_instruct")
    doc = next(iter(task.test_docs()))
    assert task.doc_to_text(doc) == sst2_prompt(doc["sentence"])
    assert task.doc_to_choice(doc) == ["negative", "positive"]
    assert task.doc_to_target(doc) == doc["label"]


@pytest.mark.skipif("MONO_TEST_DATA" not in os.environ, reason="MONO_TEST_DATA is not set")
def test_the_real_sets_are_whole(monkeypatch):
    monkeypatch.setenv("MONO_EVAL_DATA", os.environ["MONO_TEST_DATA"])
    counts = {name: len(docs(name)) for name in (*REAL, "sst2_instruct", "dolly")}
    assert counts == {"beavertails_eval": 700, "xstest": 450, "advbench": 520, "sst2_instruct": 872, "dolly": 982}
    xstest = [doc["category"] for doc in docs("xstest")]
    assert (xstest.count("safe"), xstest.count("unsafe")) == (250, 200)
    categories = [doc["category"] for doc in docs("beavertails_eval")]
    assert len(set(categories)) == 14
    assert {categories.count(category) for category in categories} == {50}


def test_errors_of_the_data_folder(eval_data, monkeypatch):
    (eval_data / "advbench" / "harmful_behaviors.csv").write_text("prompt\nx\n")
    with pytest.raises(ValueError, match=r"harmful_behaviors\.csv lacks the column\(s\) goal; it has prompt"):
        load("advbench")
    (eval_data / "beavertails" / "BeaverTails-Evaluation.json").write_text("{no json")
    with pytest.raises(ValueError, match=r"Cannot load .*BeaverTails-Evaluation\.json \(.*\)\. Restore the file"):
        load("beavertails_eval")
    (eval_data / "xstest" / "xstest_prompts.csv").unlink()
    with pytest.raises(ValueError, match=r"MONO_EVAL_DATA is '.*', which has no xstest/xstest_prompts\.csv; put the"):
        load("xstest")
    (eval_data / "dolly15k" / "older.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has older\.jsonl\.gz, rows\.jsonl for dolly15k/\*\.jsonl\*: leave one"):
        load("dolly")
    monkeypatch.delenv("MONO_EVAL_DATA")
    with pytest.raises(
        ValueError, match=r"Cannot load stanfordnlp/sst2 .*offline, set MONO_EVAL_DATA to a folder with"
    ):
        load("sst2_instruct")


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_empty():
    assert metrics.empty({}, [" \n"]) == {"empty": 1}
    assert metrics.empty({}, ["no"]) == {"empty": 0}


def longest_common(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def f_measure(overlap, predicted, reference):
    return 200 * overlap / (predicted + reference)


def test_rouge_against_its_definition():
    answer, reference = "the dog sat on a mat and sat", "a dog sat on the red mat"
    found = metrics.overlap({"response": reference}, [answer])
    a, b = answer.split(), reference.split()
    unigrams = sum(min(a.count(word), b.count(word)) for word in set(b))
    pairs_a, pairs_b = list(itertools.pairwise(a)), list(itertools.pairwise(b))
    bigrams = sum(min(pairs_a.count(pair), pairs_b.count(pair)) for pair in set(pairs_b))
    assert found["rouge1"] == pytest.approx(f_measure(unigrams, len(a), len(b)))
    assert found["rouge2"] == pytest.approx(f_measure(bigrams, len(pairs_a), len(pairs_b)))
    assert found["rougeL"] == pytest.approx(f_measure(longest_common(a, b), len(a), len(b)))


def test_bleu_takes_the_reference_first():
    reference, answer = "a dog sat on the red mat today", "a dog sat on the red mat"
    pairs = [metrics.overlap({"response": reference}, [answer])["bleu"]] * 3
    # All n-grams of the answer are in the reference, so only the brevity penalty is left.
    assert bleu(pairs) == pytest.approx(100 * 2.718281828 ** (1 - 8 / 7))


# --- as files of an installed package --------------------------------------------------------------------------------


@pytest.mark.slow
def test_plain_lm_eval_takes_the_folder(eval_data, talking_model, tmp_path):
    program = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--device",
        "cpu",
        "--include_path",
        str(FOLDER),
    ]
    model = ["--model_args", f"pretrained={talking_model},dtype=float32", "--tasks", "sst2_instruct,xstest"]
    result = subprocess.run(
        [*program, *model, "--gen_kwargs", "max_gen_toks=8", "--apply_chat_template", "--output_path", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent.parent)},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "|sst2_instruct|" in result.stdout.replace(" ", "")
    assert "|xstest|" in result.stdout.replace(" ", "")
