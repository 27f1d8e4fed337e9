"""Evaluation during training: what is logged and kept, and that the training is the one without it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from evals.callback import EvalsCallback
from evals.compare import compare
from evals.records import read_completions
from mono_peft import MonoLoraConfig
from tests.conftest import rows as rows_of_folder

ROWS = Dataset.from_list([{"prompt": f"{i} is", "completion": f" number {i}"} for i in range(16)])


class Watch(TrainerCallback):
    """What a logger of `report_to` would see."""

    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append((state.global_step, dict(logs)))


def trainer_of(model, folder, watch=None, **options):
    options = {"max_steps": 4, "gradient_checkpointing": True} | options
    training = SFTConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, per_device_train_batch_size=2,
        logging_steps=1, learning_rate=1e-2, seed=3, **{"save_strategy": "no"} | options,
    )  # fmt: skip
    peft_config = MonoLoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model), training, train_dataset=ROWS, peft_config=peft_config,
        processing_class=AutoTokenizer.from_pretrained(model), callbacks=[watch] if watch else None,
    )  # fmt: skip


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_measures_are_logged_and_the_training_is_as_without_them(talking_model, eval_data, tmp_path):
    alone = trainer_of(talking_model, tmp_path / "alone")
    alone.train()
    watch = Watch()
    trainer = trainer_of(talking_model, tmp_path / "out", watch)
    own = trainer.model.get_base_model().generation_config
    options = {"judges": ["refusal", "coherence"], "max_new_tokens": 6, "batch_size": 8}
    trainer.add_callback(EvalsCallback(trainer, ["xstest", "sst2_instruct"], every=3, **options))
    trainer.train()
    assert losses(trainer) == losses(alone)
    for name, parameter in alone.model.state_dict().items():
        assert torch.equal(parameter, trainer.model.state_dict()[name])
    assert trainer.model.get_base_model().generation_config is own
    assert trainer.model.training

    measured = [(step, line) for step, line in watch.lines if "eval_sst2_instruct_acc" in line]
    assert [step for step, _ in measured] == [0, 3, 4]  # before, every third, at the end
    assert {"eval_xstest_refusal_answered", "eval_xstest_coherence_incoherent", "eval_xstest_empty"} <= set(
        measured[0][1]
    )
    assert not any("entropy" in name or "token_accuracy" in name for _, line in measured for name in line)
    assert "mean_token_accuracy" in next(
        line for line in trainer.state.log_history if line["step"] == 3 and "loss" in line
    )
    folder = tmp_path / "out" / "evals"
    answers = read_completions(folder / "completions.jsonl").rows
    assert {row.adapter for row in answers} == {"step-0", "step-3", "step-4"}
    row = next(r for r in rows_of_folder(folder) if r["config"]["adapter"] == "step-4" and r["metric"] == "acc")
    assert row["value"] == measured[2][1]["eval_sst2_instruct_acc"]
    assert set(compare([f"{folder}:step-0", f"{folder}:step-4"]).rows["task"]) == {"xstest", "sst2_instruct"}


def test_the_answers_at_a_step_are_those_of_the_adapter_saved_there(talking_model, eval_data, tmp_path):
    from evals.generate import GenerateSettings, generate

    trainer = trainer_of(talking_model, tmp_path / "out", save_strategy="steps", save_steps=2)
    trainer.add_callback(EvalsCallback(trainer, ["beavertails_eval"], every=2, max_new_tokens=6, limit=8))
    trainer.train()
    adapter = f"saved={tmp_path / 'out' / 'checkpoint-2'}"
    settings = GenerateSettings(
        str(talking_model), ["beavertails_eval"], str(tmp_path / "again"), [adapter], max_new_tokens=6, limit=8
    )
    generate(settings)
    again = {
        r.prompt_id: r.response for r in read_completions(tmp_path / "again" / "completions.jsonl").rows if r.adapter
    }
    during = read_completions(tmp_path / "out" / "evals" / "completions.jsonl").rows
    assert {r.prompt_id: r.response for r in during if r.adapter == "step-2"} == again

    # A training that continues there makes the later steps anew, one that starts again all of them.
    trainer = trainer_of(talking_model, tmp_path / "out", save_strategy="steps", save_steps=2)
    trainer.add_callback(EvalsCallback(trainer, ["beavertails_eval"], every=2, max_new_tokens=6, limit=8))
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    rows = read_completions(tmp_path / "out" / "evals" / "completions.jsonl").rows
    assert [r.adapter for r in rows] == ["step-0"] * 8 + ["step-2"] * 8 + ["step-4"] * 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 0}, "`every` is 0"),
        ({"tasks": ["sst"]}, "'sst', which is no task"),
        ({"judges": ["nobody"]}, "--judges has 'nobody'"),
        ({"max_new_tokens": 1024}, "has 512 tokens"),
    ],
)
def test_bad_settings_are_refused_before_the_training(talking_model, eval_data, tmp_path, changes, message):
    trainer = trainer_of(talking_model, tmp_path / "out")
    options = {"tasks": ["xstest"], "every": 2, "max_new_tokens": 4} | changes
    with pytest.raises(ValueError, match=message):
        EvalsCallback(trainer, **options)


@pytest.mark.parametrize("sharding", ["FSDP", "DeepSpeed ZeRO-3"])
def test_sharded_weights_are_refused(talking_model, tmp_path, sharding, monkeypatch):
    trainer = trainer_of(talking_model, tmp_path / "out")
    if sharding == "FSDP":
        trainer.is_fsdp_enabled = True
    else:
        plugin = SimpleNamespace(zero_stage=3)
        monkeypatch.setattr(trainer.accelerator, "state", SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(ValueError, match=rf"sharded \({sharding}\)"):
        EvalsCallback(trainer, ["xstest"], every=1)


def test_a_model_that_diverges_is_marked_and_trained_on(talking_model, eval_data, tmp_path, capsys):
    trainer = trainer_of(talking_model, tmp_path / "out", max_steps=2)

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))

    trainer.add_callback(Spoil())
    trainer.add_callback(EvalsCallback(trainer, ["beavertails_eval"], every=1, max_new_tokens=4, limit=4))
    trainer.train()
    assert "step-1 diverged" in capsys.readouterr().out
    assert trainer.state.global_step == 2
