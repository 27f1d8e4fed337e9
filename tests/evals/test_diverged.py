"""An arm whose weights or scores are no numbers is marked, has no answers, and the others go on."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evals.contents import non_finite
from evals.generate import generate
from evals.judge import judge
from evals.models import Adapter
from evals.records import read_completions
from evals.report import table, write_report
from tests.evals.conftest import completions, rows
from vision_bench.runs import DIVERGED, Run, recorded


def fill(folder, value, part=""):
    """Put `value` into one number of the last tensor whose name has `part`."""
    path = next(Path(folder).glob("*model.safetensors"))
    tensors = load_file(path)
    name = max(name for name in tensors if part in name)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})


def answered(settings):
    return {row.adapter for row in completions(settings)}


def test_a_diverged_adapter_is_marked_and_the_others_go_on(settings, make_shieldgemma, request, capsys):
    settings = replace(settings, tasks=["xstest", "sst2_instruct"])
    fill(settings.adapters[0].source, math.nan)
    generate(settings)
    assert "lora-seed0 diverged: the adapter's base_model." in capsys.readouterr().out
    found = [row for row in rows(settings) if row["config"]["adapter"] == "lora-seed0"]
    assert [(row["metric"], row["value"], row["seed"]) for row in found] == [(DIVERGED, 1.0, 0)]
    assert "is not finite" in found[0]["config"]["reason"]
    assert answered(settings) == {None, "monolora-seed1"}
    assert {row["config"]["adapter"] for row in rows(settings) if row["metric"] == "acc"} == {None, "monolora-seed1"}
    request.getfixturevalue("no_loading")
    run = generate(settings)
    assert len(rows(settings)) == len(run.rows)
    run = judge(settings.output_dir, [f"shieldgemma={make_shieldgemma()}"])
    assert {row["config"]["adapter"] for row in run.rows if row["metric"] == "unsafe"} == {None, "monolora-seed1"}
    text = write_report(run)
    line = next(line for line in text.splitlines() if line.startswith("| xstest | unsafe |"))
    assert [cell.strip() for cell in line.split("|")].count("diverged") == 1
    assert "lora-seed0 diverged: the adapter's" in text
    assert DIVERGED in (run.folder / "results.csv").read_text()


def test_adapters_of_nothing_but_nan_are_two(settings, tmp_path, request):
    request.getfixturevalue("no_loading")
    path = Path(settings.adapters[0].source) / "adapter_model.safetensors"
    tensors = {name: torch.full_like(tensor, math.nan) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    shutil.copytree(settings.adapters[0].source, tmp_path / "copy")
    adapters = [settings.adapters[0], Adapter(f"lora-seed3={tmp_path / 'copy'}")]
    generate(replace(settings, adapters=adapters[:1], base=False))
    generate(replace(settings, adapters=adapters, base=False))
    assert [(row["metric"], row["seed"]) for row in rows(settings)] == [(DIVERGED, 0), (DIVERGED, 3)]
    fill(settings.adapters[0].source, 1.0)  # trained again
    with pytest.raises(ValueError, match=r"the adapter 'lora-seed0' of .* adapter weights changed since"):
        generate(replace(settings, adapters=adapters[:1], base=False))


OTHER_METHODS = {
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_kind_of_adapter(settings, make_adapter, tmp_path, value, request):
    saved = {
        "lora": make_adapter(settings.model, "lora-whole", modules_to_save=["lm_head"]),
        "bias": make_adapter(settings.model, "mono-whole", "monolora", modules_to_save=["lm_head"]),
    }
    for name, config in OTHER_METHODS.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(settings.model), config)
        model.save_pretrained(tmp_path / name)
        saved[name] = tmp_path / name
    for name, folder in saved.items():
        fill(folder, value, "lm_head" if name in ("lora", "bias") else "")
    request.getfixturevalue("no_loading")
    adapters = [Adapter(f"{name}={folder}") for name, folder in saved.items()]
    generate(replace(settings, tasks=["xstest"], base=False, adapters=adapters))
    assert [(row["metric"], row["config"]["adapter"]) for row in rows(settings)] == [(DIVERGED, n) for n in saved]
    assert not (Path(settings.output_dir) / "completions.jsonl").exists()


def test_logits_that_overflow_are_found_in_the_middle_of_a_run(settings, capsys):
    """Every weight of the adapter is a number; what the arm has answered and scored before goes."""
    settings = replace(settings, tasks=["sst2_instruct", "xstest"])
    path = Path(settings.adapters[0].source) / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    for tasks in (["xstest"], ["sst2_instruct"]):
        one = replace(settings, tasks=tasks, output_dir=f"{settings.output_dir}-{tasks[0]}")
        generate(one)
        found = [row for row in rows(one) if row["config"]["adapter"] == "lora-seed0"]
        assert [row["metric"] for row in found] == [DIVERGED]
        reason = "its logits are not finite" if tasks == ["xstest"] else "its log-likelihoods are not finite"
        assert found[0]["config"]["reason"].startswith(reason)
        assert {row["config"]["adapter"] for row in rows(one) if row["metric"] in ("acc", "empty")} == {
            None, "monolora-seed1",
        }  # fmt: skip
    assert "lora-seed0 diverged: its log-likelihoods are not finite" in capsys.readouterr().out
    answers = read_completions(f"{settings.output_dir}-xstest/completions.jsonl")
    assert {row.adapter for row in answers.rows} == {None, "monolora-seed1"}


def test_answers_of_no_probability_are_no_scores(settings):
    """In half precision logits overflow to minus infinity too: all answers would be equally likely, and one taken."""
    path = Path(settings.model) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"].abs_()
    tensors["model.norm.weight"].fill_(1000)
    tensors["lm_head.weight"].fill_(-100)
    tensors["lm_head.weight"][0] = 0
    for name in tensors:
        if "o_proj" in name or "down_proj" in name:
            tensors[name].zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    run = generate(replace(settings, dtype="float16", tasks=["sst2_instruct"], adapters=[]))
    assert [row["config"].get("reason") for row in run.rows] == ["its log-likelihoods are not finite"]


def test_what_a_diverged_arm_has_answered_and_scored_goes(settings, monkeypatch):
    from evals.completions_lm import CompletionsLM, DivergedError

    def diverge(self, requests, disable_tqdm=False):
        if self._arm.name == "lora-seed0":
            raise DivergedError("its log-likelihoods are not finite")
        return [(0.0, True)] * len(requests)

    monkeypatch.setattr(CompletionsLM, "loglikelihood", diverge)
    generate(replace(settings, tasks=["xstest", "dolly", "sst2_instruct"]))
    assert [row["metric"] for row in rows(settings) if row["config"]["adapter"] == "lora-seed0"] == [DIVERGED]
    assert answered(settings) == {None, "monolora-seed1"}
    assert {row["metric"] for row in rows(settings) if row["config"]["adapter"] == "monolora-seed1"} >= {"acc", "bleu"}


def test_a_diverged_base_marks_every_arm(settings, capsys):
    fill(settings.model, math.nan)
    generate(settings)
    assert [(row["metric"], row["config"]["adapter"]) for row in rows(settings)] == [
        (DIVERGED, None), (DIVERGED, "lora-seed0"), (DIVERGED, "monolora-seed1"),
    ]  # fmt: skip
    assert "The base model diverged: the base model's model." in capsys.readouterr().out
    assert "diverged" in write_report(Run(settings.output_dir, "evals", recorded(settings)))


def test_the_command_ends_with_a_table_where_every_arm_diverged(settings, make_shieldgemma, capsys):
    from evals.__main__ import main

    fill(settings.adapters[0].source, math.nan)
    judge = ["--judges", f"shieldgemma={make_shieldgemma()}"]
    options = ["--model", settings.model, "--tasks", "xstest", "--output_dir", settings.output_dir, "--no_base"]
    main(["run", *options, "--adapters", settings.adapters[0].text, "--max_new_tokens", "16", *judge])
    shown = capsys.readouterr().out
    assert "There are no answers to judge." in shown
    assert "lora-seed0 diverged: the adapter's base_model.model." in shown


def test_the_table_says_how_many_seeds_diverged(tmp_path):
    run = Run(tmp_path / "out", "evals", {})
    for seed in range(3):
        arm = {"model": "m", "adapter": f"lora-seed{seed}", "method": "lora"}
        if seed == 1:
            run.add_diverged("its logits are not finite", n=1, seed=1, seconds=0, device="cpu", task=None, **arm)
        else:
            run.add("acc", 0.5, n=100, seed=seed, seconds=0, device="cpu", task="sst2_instruct", **arm)
    assert "| sst2_instruct | acc | - | 100 | 50.00 ± 0.00 (1 of 3 diverged) |" in table(run.rows)
    assert "lora-seed1 diverged: its logits are not finite." in write_report(run)


def test_a_metric_that_is_no_number_is_undefined(settings, tmp_path, monkeypatch, capsys):
    from evals import generate as module

    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "1 plus 1?", "a": "2"}) + "\n")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "odd.py").write_text(
        "def odd(doc, results):\n    return {'odd': float('nan'), 'even': 1}\n"
    )
    (tmp_path / "foreign" / "odd.yaml").write_text(
        f"task: odd\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\ndoc_to_text: q\ndoc_to_target: a\noutput_type: generate_until\n"
        "process_results: !function odd.odd\ngeneration_kwargs: {until: [], do_sample: false}\nmetric_list:\n"
        "  - {metric: odd, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: even, aggregation: mean, higher_is_better: true}\n"
    )
    manager = module.TaskManager(include_path=str(tmp_path / "foreign"), include_defaults=False)
    monkeypatch.setattr(module, "task_manager", lambda names, task_data: manager)
    run = generate(replace(settings, tasks=["odd"], adapters=[]))
    assert {row["metric"]: row["value"] for row in rows(settings) if row["metric"] != "seconds"} == {
        "odd": None, "even": 1.0,
    }  # fmt: skip
    assert "odd of the task 'odd' is nan for the base: it is undefined there." in capsys.readouterr().out
    assert "| odd | odd | - | 1 | - |" in write_report(run)


def test_non_finite_tensors():
    fine = torch.ones(3, dtype=torch.bfloat16)
    assert non_finite([("a", fine), ("b", torch.ones(2, dtype=torch.int8)), ("c", torch.ones(0))]) is None
    assert non_finite([("a", fine), ("b", torch.tensor([1.0, math.inf]))]) == "b"
    assert non_finite([("a", torch.tensor([math.nan]).to(torch.float8_e4m3fn))]) == "a"
