"""Generation equals plain greedy decoding one prompt at a time, for every arm, whatever was interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals import generate as module
from evals.answers import answer_log_likelihoods
from evals.generate import GenerateSettings, generate
from evals.models import Adapter
from evals.prompts import SST2_ANSWERS, encode_answer, sst2_prompt
from evals.records import read_completions
from evals.registry import TASK_FOLDERS
from evals.tasks.data import sst2
from vision_bench.runs import LineAppender, read_rows

NEW_TOKENS = 16  # of `settings`


def completions(settings):
    return read_completions(f"{settings.output_dir}/completions.jsonl").rows


def rows(settings):
    return read_rows(Path(settings.output_dir) / "results.jsonl")


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


# --- interrupted, repeated, extended ---------------------------------------------------------------------------------


def test_what_is_there_is_not_done_again(settings, request):
    generate(replace(settings, tasks=["xstest"], adapters=settings.adapters[:1]))
    generate(settings)
    first = completions(settings), rows(settings)
    assert len(first[0]) == 3 * 22
    request.getfixturevalue("no_loading")
    other = Adapter(f"other/lora-seed0={settings.adapters[0].source}")
    with pytest.raises(ValueError, match=r"as that of 'lora-seed0' does; tell them apart with NAME=FOLDER"):
        generate(replace(settings, adapters=[other]))
    generate(settings)
    assert (completions(settings), rows(settings)) == first


def test_a_run_that_broke_off_ends_as_if_it_had_not(settings, tmp_path, monkeypatch, capsys):
    generate(replace(settings, output_dir=str(tmp_path / "whole")))
    append, calls = LineAppender.append, []

    def break_off(self, new):
        append(self, new)
        calls.append(self.path.name)
        if calls.count("completions.jsonl") == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LineAppender, "append", break_off)
        with pytest.raises(KeyboardInterrupt):
            generate(settings)
    path = tmp_path / "out" / "completions.jsonl"
    before = path.read_bytes()
    assert before.count(b"\n") == 4 + 4 + 4 + 2 + 2 + 4
    path.write_bytes(before[:-5])  # and the last line was cut
    generate(settings)
    assert "the last line, 20, is cut after" in capsys.readouterr().out
    assert path.read_bytes().startswith(before[: before[:-1].rindex(b"\n") + 1])

    def by_key(folder):
        return {row.key: row for row in read_completions(tmp_path / folder / "completions.jsonl").rows}

    def values(folder):
        found = read_rows(tmp_path / folder / "results.jsonl")
        return {
            (r["metric"], r["config"]["task"], r["config"]["adapter"]): r["value"]
            for r in found
            if r["metric"] != "seconds"
        }

    assert by_key("out") == by_key("whole")
    assert values("out") == values("whole")


def test_a_run_killed_between_two_rows_of_a_task_writes_the_others(settings):
    settings = replace(settings, tasks=["dolly"], adapters=[])
    generate(settings)
    path = f"{settings.output_dir}/results.jsonl"
    whole = rows(settings)
    with open(path, "w") as file:
        file.write(json.dumps(whole[0]) + "\n")
    generate(settings)
    assert [(r["metric"], r["value"]) for r in rows(settings)][:-1] == [(r["metric"], r["value"]) for r in whole][:-1]


@pytest.mark.slow
def test_kill_9_and_resume(settings, tmp_path):
    """The program is killed again and again, and at the end every prompt was answered once and as if never killed."""
    whole = replace(settings, output_dir=str(tmp_path / "whole"), tasks=["beavertails_eval", "dolly"])
    generate(whole)
    program = (
        "import time, vision_bench.runs as c\n"
        "real = c.LineAppender.append\n"
        "def slowly(self, rows):\n    real(self, rows)\n    print('batch', flush=True)\n    time.sleep(0.3)\n"
        "c.LineAppender.append = slowly\n"
        "from evals.__main__ import main\nmain()\n"
    )
    adapters = [adapter.text for adapter in settings.adapters]
    options = ["--model", settings.model, "--tasks", *whole.tasks, "--output_dir", settings.output_dir]
    options += ["--adapters", *adapters, "--max_new_tokens", str(NEW_TOKENS), "--batch_size", "4"]
    for batches in (2, 5, 1000):
        process = subprocess.Popen(
            [sys.executable, "-c", program, "generate", *options], stdout=subprocess.PIPE, text=True
        )
        for _, line in zip(range(batches), iter(process.stdout.readline, ""), strict=False):
            last = line
        if batches < 1000:
            process.send_signal(signal.SIGKILL)
        process.stdout.close()
        code = process.wait(300)
        assert code == (-signal.SIGKILL if batches < 1000 else 0), last
    assert {row.key: row for row in completions(settings)} == {row.key: row for row in completions(whole)}


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_loading")
class TestBeforeAnythingIsLoaded:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model": "meta-llama/Llama-2-7b-chat-hf"}, r"Cannot load the model 'meta-llama.*`hf auth login`"),
            ({"adapters": [Adapter("x=no/adapter")]}, r"Cannot load adapter_model.safetensors of the adapter 'no/ad"),
            ({"tasks": ["xtest"]}, r"--tasks has 'xtest', which is no task\. Like it: .*xstest.* Ours are advbench, "),
            (
                {"adapters": [Adapter("a/lora-seed0=x"), Adapter("b/lora-seed0=y")]},
                r"has 'b/lora-seed0', whose name says method 'lora' and seed 0, as that of 'a/lora-seed0' does",
            ),
            ({"max_new_tokens": 512}, r"asks for 512 new tokens, but the context of .* has 512 tokens.*at most 256"),
            ({"max_new_tokens": None}, r"asks for 512 new tokens"),
        ],
    )
    def test_what_cannot_be_had(self, settings, change, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            generate(replace(settings, **change))
        assert not (tmp_path / "out").exists()

    def test_data_that_is_not_there(self, settings, eval_data):
        (eval_data / "xstest" / "xstest_prompts.csv").unlink()
        with pytest.raises(ValueError, match=r"has no xstest/xstest_prompts\.csv"):
            generate(settings)

    @pytest.mark.slow
    def test_data_of_other_tasks_that_cannot_be_had(self, settings):
        with pytest.raises(ValueError, match=r"Cannot load the data of the task 'gsm8k' \(.*needs network access"):
            generate(replace(settings, tasks=["gsm8k"]))

    def test_a_completions_file_with_an_error(self, settings, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "completions.jsonl").write_text('{"prompt_id": "0"}\n')
        with pytest.raises(ValueError, match=r"completions\.jsonl, line 1 \(prompt_id '0'\) lacks adapter, category"):
            generate(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 0}, r"--limit is 0, allowed is 1 or more"),
        ({"batch_size": -1}, r"--batch_size is -1"),
        ({"dtype": "int8"}, r"--dtype is 'int8', allowed are auto, float32"),
        ({"tasks": []}, r"--tasks is empty"),
        ({"tasks": ["xstest", "xstest"]}, r"--tasks has xstest more than once"),
        ({"adapters": [Adapter("a=x"), Adapter("a=y")]}, r"--adapters has a more than once"),
        ({"base": False}, r"--no_base without --adapters"),
    ],
)
def test_settings(change, message):
    with pytest.raises(ValueError, match=message):
        GenerateSettings(**({"model": "m", "tasks": ["xstest"], "output_dir": "o"} | change))


def test_other_settings_or_data_are_refused_and_nothing_is_lost(settings, eval_data):
    settings = replace(settings, tasks=["xstest"], adapters=[])
    generate(settings)
    before = completions(settings)
    with pytest.raises(ValueError, match=r"another configuration \(max_new_tokens: 16 there, 8 now\)"):
        generate(replace(settings, max_new_tokens=8))
    os.remove(f"{settings.output_dir}/results.jsonl")  # killed before the first row of metrics
    with pytest.raises(ValueError, match=r"another configuration \(max_new_tokens: 16 there, 8 now\)"):
        generate(replace(settings, max_new_tokens=8))
    (eval_data / "xstest" / "xstest_prompts.csv").write_text("id,prompt,label\n7,changed,safe\n")
    with pytest.raises(ValueError, match=r"data or settings of the task 'xstest' changed since"):
        generate(settings)
    assert completions(settings) == before


def test_prompts_that_do_not_fit_are_reported_and_marked(settings, eval_data, capsys):
    (eval_data / "xstest" / "xstest_prompts.csv").write_text(f"id,prompt,label\n1,{'kill ' * 300},safe\n2,kill,safe\n")
    generate(replace(settings, tasks=["xstest"], adapters=[]))
    assert "1 of 2 prompts do not fit the context of 512 tokens" in capsys.readouterr().out
    marks = {row.prompt_id: row.generation.get("prompt_tokens_cut") for row in completions(settings)}
    assert marks["1"] > 500
    assert marks["2"] is None


# --- the command -----------------------------------------------------------------------------------------------------


def test_help_is_quick_and_errors_are_one_line(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "evals"]
    shown = subprocess.run([*command, "generate", "--help"], capture_output=True, text=True, check=True)
    assert "--adapters" in shown.stdout
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert not {"lm_eval", "peft", "transformers.modeling_utils", "matplotlib"} & imported
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert not {"torch", "transformers", "pandas", "numpy"} & imported


def test_the_command_passes_everything_on(settings, monkeypatch, capsys):
    from evals.__main__ import main

    seen = []
    monkeypatch.setattr(module, "generate", lambda s: seen.append(s) or type("Run", (), {"folder": "out"}))
    options = "--model m --tasks a b --output_dir o --adapters n=x y --no_base --limit 3 --max_new_tokens 4"
    options += " --batch_size 5 --dtype float32 --load_in_4bit --thinking on --thought_markers <a> </a>"
    main(["generate", *options.split()])
    adapters = [Adapter("n=x"), Adapter("y")]
    modes = ("float32", True, "on", ["<a>", "</a>"])
    assert seen == [GenerateSettings("m", ["a", "b"], "o", adapters, False, 3, 4, 5, *modes)]
    main(["generate", "--model", "m", "--tasks", "a", "--output_dir", "o", "--adapters"])  # a shell's empty list
    assert seen[1] == GenerateSettings("m", ["a"], "o")
    with pytest.raises(SystemExit, match=r"Error: --limit is 0, allowed is 1 or more"):
        main(["generate", "--model", "m", "--tasks", "a", "--output_dir", "o", "--limit", "0"])


def test_one_yaml_file_serves_all_commands_and_the_command_line_goes_before_it(monkeypatch, tmp_path, capsys):
    from evals.__main__ import main

    (tmp_path / "safety.yaml").write_text(
        "model: m\ntasks: [a]\noutput_dir: o\nadapters: [n=x]\nlimit: 3\njudges: [offline]\n"
        "task_data: {dolly_rows: 2}\n"
    )
    seen = []
    monkeypatch.setattr(module, "generate", lambda s: seen.append(s) or type("Run", (), {"folder": "out"}))
    main(["generate", "--config", str(tmp_path / "safety.yaml"), "--limit", "4"])
    assert seen == [GenerateSettings("m", ["a"], "o", [Adapter("n=x")], limit=4, task_data={"dolly_rows": 2})]
    monkeypatch.setattr("evals.judge.judge", lambda folder, **options: pytest.exit(f"{folder} {options['judges']}", 0))
    with pytest.raises(pytest.exit.Exception, match=r"o \['offline'\]"):
        main(["judge", "--config", str(tmp_path / "safety.yaml")])
    with pytest.raises(SystemExit):
        main(["generate", "--model", "m", "--tasks", "a", "--output_dir", "o", "--adapters", "a="])
    assert "--adapters has 'a='; write FOLDER or NAME=FOLDER." in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(talking_model, eval_data, request):
    request.getfixturevalue("no_loading")
    from evals.__main__ import main

    command = ["generate", "--model", str(talking_model), "--tasks", "xstest", "--max_new_tokens", "2"]
    with pytest.raises(SystemExit, match=r"Error: .*/proc/nowhere"):
        main([*command, "--output_dir", "/proc/nowhere"])
