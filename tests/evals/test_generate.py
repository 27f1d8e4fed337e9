"""Generation equals plain greedy decoding one prompt at a time, for every arm."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals import generate as module
from evals.answers import answer_log_likelihoods
from evals.generate import generate
from evals.prompts import SST2_ANSWERS, encode_answer, sst2_prompt
from evals.registry import TASK_FOLDERS
from evals.tasks.data import sst2
from tests.evals.conftest import NEW_TOKENS, completions, rows


def arm(settings, row):
    """The arm's model, loaded for it alone."""
    base = AutoModelForCausalLM.from_pretrained(settings.model)
    sources = {adapter.name: adapter.source for adapter in settings.adapters}
    return base if row is None else PeftModel.from_pretrained(base, sources[row]).eval()


def answer(model, tokenizer, prompt):
    """Greedy decoding of one prompt, token by token and without a cache."""
    text = prompt
    if tokenizer.chat_template is not None:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text)["input_ids"]
    new = []
    with torch.no_grad():
        while len(new) < NEW_TOKENS and tokenizer.eos_token_id not in new:
            new.append(model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    reason = "stop" if tokenizer.eos_token_id in new else "length"
    return tokenizer.decode(new, skip_special_tokens=True), reason


def test_every_arm_answers_as_it_would_alone(settings):
    generate(settings)
    found = completions(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    arms = [None, "lora-seed0", "monolora-seed1"]
    models = {name: arm(settings, name) for name in arms}
    assert Counter((row.adapter, row.task) for row in found) == {
        (name, task): count for name in arms for task, count in (("beavertails_eval", 14), ("xstest", 2), ("dolly", 6))
    }
    for row in found:
        assert (row.response, row.finish_reason) == answer(models[row.adapter], tokenizer, row.prompt), row
        assert row.seed == {None: None, "lora-seed0": 0, "monolora-seed1": 1}[row.adapter]
        assert row.model == settings.model
        checksums = row.generation.pop("checksums")
        assert ("adapter weights" in checksums, len(checksums)) == (row.adapter is not None, 7 if row.adapter else 5)
        assert row.generation == {
            "do_sample": False,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "max_gen_toks": NEW_TOKENS,
            "until": [],
            "end_token_ids": [1],
            "dtype": "float32",
            "load_in_4bit": False,
            "chat_template": True,
            "tokenizer": "model",
            "thinking": "off",
        }
    assert {row.finish_reason for row in found} == {"stop", "length"}, "the model does both"
    by_arm = [[row.response for row in found if row.adapter == name] for name in arms]
    assert by_arm[0] != by_arm[1] != by_arm[2] != by_arm[0]
    assert all(row.references for row in found if row.task == "dolly")
    assert {row.category for row in found if row.task == "xstest"} == {"safe", "unsafe"}


def test_metrics_become_rows(settings):
    generate(settings)
    found = {(r["metric"], r["config"]["task"], r["config"]["adapter"]): r for r in rows(settings)}
    assert len(found) == len(rows(settings)) == 3 * (2 + 2 + 5 + 2)
    row = found["acc", "sst2_instruct", "monolora-seed1"]
    assert (row["seed"], row["n"], row["config"]["method"], row["config"]["max_new_tokens"]) == (
        1,
        12,
        "monolora",
        NEW_TOKENS,
    )
    blank = [r.response.strip() == "" for r in completions(settings) if (r.task, r.adapter) == ("xstest", None)]
    assert found["empty", "xstest", None]["value"] == sum(blank) / len(blank)
    assert found["bleu", "dolly", None]["n"] == 6


def recipes_accuracy(model, tokenizer):
    """The share of sentences whose right word has the larger log-likelihood, as the recipe computes it."""
    docs = list(sst2()["test"])
    encoded = [encode_answer(tokenizer, sst2_prompt(d["sentence"]), word) for d in docs for word in SST2_ANSWERS]
    scores = answer_log_likelihoods(model, encoded, tokenizer.pad_token_id)
    right = scores.view(-1, 2).argmax(1) == torch.tensor([d["label"] for d in docs])
    return right.double().mean().item()


@pytest.mark.parametrize("template", [True, "qwen3", "llama3_2", "gptoss", "gemma3", "qwen2_5", None])
def test_the_accuracy_is_the_recipes(settings, make_tokenizer, template):
    tokenizer = make_tokenizer(chat=template is not None)
    if isinstance(template, str):
        tokenizer.bos_token = "<s>"
        tokenizer.chat_template = files("trl").joinpath(f"chat_templates/{template}.jinja").read_text()
    tokenizer.save_pretrained(settings.model)
    if template is None:
        os.remove(f"{settings.model}/chat_template.jinja")
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    generate(replace(settings, tasks=["sst2_instruct"], adapters=settings.adapters[1:], base=False))
    value = next(row["value"] for row in rows(settings) if row["metric"] == "acc")
    assert value == recipes_accuracy(arm(settings, "monolora-seed1"), tokenizer)
    assert 0 < value < 1


def test_log_likelihoods_of_half_precision_are_not_rounded(settings, monkeypatch):
    values, real = [], HFLM._loglikelihood_tokens

    def kept(self, requests, *args, **options):
        found = real(self, requests, *args, **options)
        values.extend(value for value, _ in found)
        return found

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", kept)
    generate(replace(settings, tasks=["sst2_instruct"], adapters=[], dtype="bfloat16", batch_size=1))
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    docs = [doc["sentence"] for doc in sst2()["test"]]
    encoded = [encode_answer(tokenizer, sst2_prompt(sentence), word) for sentence in docs for word in SST2_ANSWERS]
    expected = answer_log_likelihoods(model, encoded, tokenizer.pad_token_id, batch_size=1)
    assert sorted(values) == pytest.approx(sorted(expected.tolist()), abs=6e-3)  # rounded, they differ by 0.03


def test_a_prompt_has_the_control_tokens_of_the_template_and_no_others(settings):
    """As in training; this tokenizer begins every text with a token that its template does not write."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    begin = tokenizer.convert_tokens_to_ids("<|user|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|user|> $A", None, [("<|user|>", begin)])
    tokenizer.save_pretrained(settings.model)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    assert tokenizer("a")["input_ids"][0] == begin
    generate(replace(settings, tasks=["xstest", "sst2_instruct"], adapters=[]))
    model = arm(settings, None)
    for row in completions(settings):
        message = [{"role": "user", "content": row.prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        assert ids.count(begin) == 1
        new = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(ids) :]
        assert row.response == tokenizer.decode(new, skip_special_tokens=True)
    value = next(row["value"] for row in rows(settings) if row["metric"] == "acc")
    assert value == recipes_accuracy(model, tokenizer)


def test_answers_are_scored_as_the_template_writes_them(settings, make_tokenizer, monkeypatch):
    scored = []
    real = HFLM.loglikelihood
    monkeypatch.setattr(
        HFLM,
        "loglikelihood",
        lambda self, requests, **options: scored.extend(r.args for r in requests) or real(self, requests, **options),
    )
    generate(replace(settings, tasks=["sst2_instruct"], adapters=[]))
    tokenizer = make_tokenizer(chat=True)
    message = [{"role": "user", "content": sst2_prompt('a "gripping film 0')}]
    whole = tokenizer.apply_chat_template([*message, {"role": "assistant", "content": "negative"}], tokenize=False)
    assert whole.startswith("".join(scored[0]))
    assert scored[0][1] == "negative"


def test_other_tasks_run_in_the_same_call(settings, tmp_path, monkeypatch):
    """A group of a few-shot task with filters and repeats and a multiple-choice task, as lm-eval has them."""
    rows_of_task = [{"q": f"{i} plus 1?", "a": str(i + 1), "category": 3} for i in range(5)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of_task))
    (tmp_path / "foreign").mkdir()
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/sums.jsonl}}}}\ntest_split: test\n"
        "doc_to_text: q\n"
    )
    (tmp_path / "foreign" / "sums.yaml").write_text(
        "task: sums\n" + common + "output_type: generate_until\ndoc_to_target: a\nrepeats: 2\nnum_fewshot: 1\n"
        'fewshot_split: test\ngeneration_kwargs: {until: ["\\n", e], do_sample: false}\nfilter_list:\n'
        '  - {name: strict, filter: [{function: regex, regex_pattern: "(\\\\d+)"}, {function: take_first}]}\n'
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    (tmp_path / "foreign" / "choice.yaml").write_text(
        "task: choice\n" + common + "output_type: multiple_choice\ndoc_to_choice: ['1', '2', '3', '4', '5']\n"
        "doc_to_target: a\nmetric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    (tmp_path / "foreign" / "both.yaml").write_text(
        "group: both\ntask: [sums, choice]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    )
    folders = [str(TASK_FOLDERS[0]), str(tmp_path / "foreign")]
    manager = module.TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(module, "task_manager", lambda names, task_data: manager)
    generate(replace(settings, tasks=["xstest", "both"], adapters=settings.adapters[:1]))
    found = {(r["metric"], r["config"]["task"], r["config"]["adapter"]): r["n"] for r in rows(settings)}
    for adapter in (None, "lora-seed0"):
        assert found["acc", "choice", adapter] == 5
        assert found["exact_match (strict)", "sums", adapter] == 5
        assert found["acc", "both", adapter] >= 5
        assert found["empty", "xstest", adapter] == 2
    sums = [row for row in completions(settings) if (row.task, row.adapter) == ("sums", None)]
    assert sorted(row.prompt_id for row in sums) == sorted(f"{i}{again}" for i in range(5) for again in ("", "#2"))
    assert all("e" not in row.response and row.category is None for row in sums)
    assert all("plus 1?" in row.prompt for row in sums)


@pytest.mark.slow
def test_a_4_bit_base_answers(settings):
    pytest.importorskip("bitsandbytes")
    generate(replace(settings, tasks=["xstest"], load_in_4bit=True, dtype="float32"))
    found = completions(settings)
    assert len(found) == 3 * 2
    assert all(row.generation["load_in_4bit"] for row in found)
    assert {row.adapter for row in found} == {None, "lora-seed0", "monolora-seed1"}
