"""What `generate` refuses before any weight is loaded, and prompts that do not fit."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from evals.generate import GenerateSettings, generate
from evals.models import Adapter
from tests.evals.conftest import completions


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
