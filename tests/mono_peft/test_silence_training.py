"""Silence in trainers: what it adds once a step, resumed, accumulated, logged, and that the adapter becomes silent."""

import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from datasets import Dataset
from peft import get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from mono_peft import MonoLoraConfig, Silence
from mono_peft.certify import certify

COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red"}
SILENT = ["a sentence about films", "positive", "negative films"]
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LLAMA = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture
def base():
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer(chat=True)


@pytest.fixture
def batches(tokenizer):
    return [tokenizer(SILENT, padding=True, return_tensors="pt")]


def with_responses(base, tokenizer, new_tokens):
    """A batch of the silent texts, each followed by what the base says to it."""
    sequences = []
    for text in SILENT:
        inputs = tokenizer(text, return_tensors="pt")
        sequences.append(base.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)[0])
    return tokenizer.pad({"input_ids": sequences}, return_tensors="pt")


@pytest.fixture
def rows():
    return Dataset.from_list([{"prompt": f"{k} is", "completion": f" {v}"} for k, v in COLOURS.items()])


def arguments(config_class, folder, **options):
    options = {"max_steps": 30, "learning_rate": 2e-2, "per_device_train_batch_size": 4, "logging_steps": 1} | options
    return config_class(
        str(folder), **{"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "seed": 3,
        "save_strategy": "no"} | options,
    )  # fmt: skip


def sft(
    base,
    rows,
    tokenizer,
    folder,
    batches,
    callbacks=None,
    dropout=0.0,
    bias=False,
    silence=(("rows_per_step", 8),),
    **options,
):
    trainer = SFTTrainer(
        copy.deepcopy(base), arguments(SFTConfig, folder, **options), train_dataset=rows, processing_class=tokenizer,
        peft_config=MonoLoraConfig(**ADAPTER, lora_dropout=dropout, encoder_bias=bias), callbacks=callbacks,
    )  # fmt: skip
    if batches is not None:
        Silence(trainer.model, batches, **dict(silence)).attach(trainer)
    return trainer


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def logged(trainer, key):
    return [line[key] for line in trainer.state.log_history if key in line]


def test_the_adapter_learns_the_task_and_becomes_silent(base, rows, tokenizer, batches, tmp_path):
    silent = [with_responses(base, tokenizer, 4)]
    trainer = sft(base, rows, tokenizer, tmp_path, silent, silence={"rows_per_step": 100}, max_steps=80, dropout=0.1)
    assert certify(trainer.model, batches).share == 0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    assert [str(line.message) for line in told if "not silent" in str(line.message)] == []
    losses, hinges, fired = (logged(trainer, key) for key in ("loss", "silence_loss", "silence_fired"))
    assert len(losses) == len(hinges) == len(fired) == 80
    assert losses[-1] < 0.5 * losses[0]
    assert hinges[-1] < 0.05 * hinges[0]
    assert fired[0] > 0.5
    assert fired[-1] == 0
    certificate = certify(trainer.model, batches, response_tokens=4)
    assert certificate.share == 1
    assert certificate.compared == 3

    # Without Silence the same training changes these texts.
    control = sft(base, rows, tokenizer, tmp_path, None, max_steps=80, dropout=0.1)
    control.train()
    assert certify(control.model, batches).share == 0

    # The same in bfloat16, and where the task is, the adapter acts.
    model = trainer.model.eval()
    task = tokenizer("grass is", return_tensors="pt")
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        for text in SILENT:
            inputs = tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                logits = model(**inputs).logits
                generated = model.generate(**inputs, do_sample=False, max_new_tokens=4)
                with model.disable_adapter():
                    assert torch.equal(logits, model(**inputs).logits)
                    assert torch.equal(generated, model.generate(**inputs, do_sample=False, max_new_tokens=4))
        with torch.no_grad(), model.disable_adapter():
            without = model(**task).logits
        assert not torch.equal(model(**task).logits, without)


def test_a_resumed_run_equals_an_uninterrupted_one(base, rows, tokenizer, batches, tmp_path):
    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5, "dropout": 0.1}
    whole = sft(base, rows, tokenizer, tmp_path / "whole", batches, **options)
    whole.train()
    stopped = sft(base, rows, tokenizer, tmp_path / "cut", batches, callbacks=[StopAt()], **options)
    stopped.train()
    assert stopped.state.global_step == 5
    resumed = sft(base, rows, tokenizer, tmp_path / "cut", batches, **options)
    resumed.train(resume_from_checkpoint=True)
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert logged(resumed, "silence_loss") == logged(whole, "silence_loss")
    without = sft(base, rows, tokenizer, tmp_path / "without", None, **options)
    without.train()
    assert not any(torch.equal(weights(without)[n], expected[n]) for n in expected if "encoder" in n)


class FiredRows(TrainerCallback):
    """Shares of the cached rows on which a unit fires, after each step."""

    def __init__(self):
        self.silence, self.shares = None, []

    def on_step_end(self, args, state, control, **kwargs):
        self.shares.append(max(self.silence.fired_by_module().values()))


def test_biases_lowered_in_training_keep_every_cached_row_silent(base, rows, tokenizer, batches, tmp_path):
    fired = FiredRows()
    options = {"silence": {"weight": 1e-3, "lower_every": 3}, "bias": True, "max_steps": 8}
    trainer = sft(base, rows, tokenizer, tmp_path, batches, callbacks=[fired], **options)
    fired.silence = trainer.callback_handler.callbacks[0]
    trainer.train()
    assert [share == 0 for share in fired.shares] == [step % 3 == 0 for step in range(1, 8)] + [True]
    assert certify(trainer.model, batches).share == 1  # the end is no third step
    encoders = [p for name, p in trainer.model.named_parameters() if "monolora_decoder" in name]
    assert all(parameter.any() for parameter in encoders)


def test_lowered_and_resumed_is_lowered_in_one_go(base, rows, tokenizer, batches, tmp_path):
    options = {"silence": {"weight": 1, "lower_every": 2}, "bias": True, "max_steps": 8, "save_steps": 4}
    whole = sft(base, rows, tokenizer, tmp_path, batches, save_strategy="steps", **options)
    whole.train()
    resumed = sft(base, rows, tokenizer, tmp_path, batches, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    others = weights(resumed)
    assert all(torch.equal(parameter, others[name]) for name, parameter in weights(whole).items())


def test_the_last_checkpoint_is_the_trained_adapter(base, rows, tokenizer, batches, tmp_path):
    options = {"silence": {"weight": 1e-3, "lower_every": 3}, "bias": True, "max_steps": 4, "save_steps": 4}
    trainer = sft(base, rows, tokenizer, tmp_path, batches, save_strategy="steps", **options)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    trained = weights(trainer)
    assert all(torch.equal(saved[name.replace(".default", "")], parameter) for name, parameter in trained.items())


def test_deepspeed_would_undo_what_is_lowered(base, rows, tokenizer, batches, tmp_path, monkeypatch):
    trainer = sft(base, rows, tokenizer, tmp_path, batches, bias=True, silence={"lower_every": 1})
    state = SimpleNamespace(num_processes=1, distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr("mono_peft.silence.AcceleratorState", lambda: state)
    monkeypatch.setattr("mono_peft.silenceable.AcceleratorState", lambda: state)
    with pytest.raises(ValueError, match=r"undo what `lower_every` does to b .* call `lower_biases` after training"):
        trainer.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_gradients_get_the_hinge_once(base, rows, tokenizer, batches, tmp_path, checkpointing):
    options = {"max_steps": 6, "max_grad_norm": 0, "optim": "sgd", "learning_rate": 0.1}
    whole = sft(base, rows, tokenizer, tmp_path, batches, **options)
    whole.train()
    halves = sft(
        base, rows, tokenizer, tmp_path, batches, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing, **options,
    )  # fmt: skip
    halves.train()
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(halves)[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_added_in_the_backward_pass_it_is_the_same(base, rows, tokenizer, batches, tmp_path, monkeypatch, bias):
    """The way that DeepSpeed needs, here without it: tests/distributed/test_silence_launch.py launches that."""
    options = {"max_steps": 6, "max_grad_norm": 0, "bias": bias}
    whole = sft(base, rows, tokenizer, tmp_path, batches, **options)
    whole.train()
    deepspeed = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, num_processes=1)
    monkeypatch.setattr("mono_peft.silence.AcceleratorState", lambda: deepspeed)
    monkeypatch.setattr(Silence, "add_gradients", None)
    halves = sft(
        base, rows, tokenizer, tmp_path, batches, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        gradient_checkpointing=True, **options,
    )  # fmt: skip
    halves.train()
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(halves)[name], weight, rtol=1e-4, atol=1e-5)
    for measure in ("silence_loss", "silence_fired"):
        assert logged(halves, measure) == pytest.approx(logged(whole, measure), rel=1e-4)
    assert not any(p._backward_hooks for p in halves.model.parameters())


def test_deepspeed_that_clips_is_told(base, rows, tokenizer, batches, tmp_path, monkeypatch):
    deepspeed = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, num_processes=1)
    monkeypatch.setattr("mono_peft.silence.AcceleratorState", lambda: deepspeed)
    trainer = sft(base, rows, tokenizer, tmp_path, batches)
    trainer.callback_handler.optimizer = SimpleNamespace(optimizer=SimpleNamespace(clip_grad=1.0))
    with pytest.warns(UserWarning, match=r"DeepSpeed clips the task's gradient and the hinge's together"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_what_is_logged_reaches_loggers(base, rows, tokenizer, batches, tmp_path):
    lines = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            lines.append(dict(logs))

    trainer = sft(base, rows, tokenizer, tmp_path, batches, callbacks=[Logger()], max_steps=3, logging_steps=2)
    trainer.train()
    lines = [line for line in lines if "loss" in line]
    assert [sorted(line.keys() & {"silence_loss", "silence_fired"}) for line in lines] == [
        ["silence_fired", "silence_loss"]
    ]
    assert lines[0]["silence_loss"] == logged(trainer, "silence_loss")[0]
    assert 0 < lines[0]["silence_fired"] <= 1


def test_texts_that_cannot_be_silent_are_told(base, rows, tokenizer, tmp_path):
    """Some of the task's own texts, with a weight that the task outweighs."""
    batches = [tokenizer(["grass is green", "snow is white"], padding=True, return_tensors="pt")]
    trainer = sft(base, rows, tokenizer, tmp_path, None, max_steps=10)
    silence = Silence(trainer.model, batches, weight=1e-6)
    silence.attach(trainer)
    with (
        pytest.warns(UserWarning, match=r"units fire on [\d.]+% of the pairs of a module and a cached row, most in"),
        pytest.warns(UserWarning, match=r"2 of 4 training rows that were compared have prompts that are kept silent"),
    ):
        trainer.train()
    shares = silence.fired_by_module()
    assert len(shares) == 14
    model = trainer.model.eval()
    for name in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        name, found = f"base_model.model.model.{name}", []
        layer = model.get_submodule(name)
        handle = layer.register_forward_pre_hook(lambda m, args, found=found: found.append(args[0]))
        with torch.no_grad(), model.disable_adapter():
            model(**batches[0])
        handle.remove()
        x = found[0][batches[0]["attention_mask"].bool()]
        fires = (layer.monolora_encoder["default"](x) > 0).any(1)
        assert shares[name] == pytest.approx(fires.float().mean().item())
        assert shares[name] > 0


def test_the_tasks_own_texts_are_refused(base, rows, tokenizer, tmp_path):
    batches = [tokenizer([f"{k} is {v}" for k, v in COLOURS.items()], padding=True, return_tensors="pt")]
    trainer = sft(base, rows, tokenizer, tmp_path, batches)
    with pytest.raises(ValueError, match=r"the prompts of all 4 training rows that were compared are kept silent"):
        trainer.train()


@pytest.mark.parametrize("is_frozen", [False, True])
def test_another_adapter_than_the_one_that_is_kept_silent(base, rows, tokenizer, batches, tmp_path, is_frozen):
    trainer = sft(base, rows, tokenizer, tmp_path, batches)
    if is_frozen:
        trainer.model.set_requires_grad("default", False)
    else:
        trainer.model.add_adapter("second", MonoLoraConfig(**ADAPTER))
        trainer.model.set_adapter("second")
    with pytest.raises(ValueError, match=r"is frozen" if is_frozen else r"not those that were when Silence was built"):
        trainer.train()


def test_bfloat16(base, rows, tokenizer, batches, tmp_path):
    """Autocast, which a base of float32 computes in bfloat16 by."""
    trainer = sft(base, rows, tokenizer, tmp_path, batches, bf16=True, max_steps=40)
    trainer.train()
    assert logged(trainer, "silence_loss")[-1] < 0.2 * logged(trainer, "silence_loss")[0]


def check_trainer(trainer, batches):
    """Train with Silence; the hinge falls, the loss stays a number."""
    Silence(trainer.model, batches).attach(trainer)
    trainer.train()
    hinges = logged(trainer, "silence_loss")
    assert len(hinges) == trainer.args.max_steps
    assert hinges[-1] < 0.3 * hinges[0]
    assert all(map(math.isfinite, logged(trainer, "loss")))


def test_dpo(base, tokenizer, batches, tmp_path):
    rows = Dataset.from_list(
        [{"prompt": f"{k} is", "chosen": f" {v}", "rejected": " blue"} for k, v in COLOURS.items()]
    )
    trainer = DPOTrainer(
        base, args=arguments(DPOConfig, tmp_path), train_dataset=rows, processing_class=tokenizer,
        peft_config=MonoLoraConfig(**ADAPTER),
    )  # fmt: skip
    check_trainer(trainer, batches)


def test_reward(tokenizer, batches, tmp_path):
    """The head trains too, behind the body that stays the base on silent texts."""
    set_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=1))
    rows = Dataset.from_list([{"chosen": f"{k} is {v}", "rejected": f"{k} is blue"} for k, v in COLOURS.items()])
    adapter = MonoLoraConfig(**ADAPTER | {"task_type": "SEQ_CLS", "modules_to_save": ["score"]})
    trainer = RewardTrainer(
        base, args=arguments(RewardConfig, tmp_path, max_length=32), train_dataset=rows, processing_class=tokenizer,
        peft_config=adapter,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"score.* of the head are trained beside the adapter"):
        check_trainer(trainer, batches)


def test_grpo(base, tokenizer, batches, tmp_path):
    def reward(completion_ids, **kwargs):
        return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]

    rows = Dataset.from_list([{"prompt": f"{k} is"} for k in COLOURS] * 4)
    options = {"num_generations": 4, "max_completion_length": 4, "per_device_train_batch_size": 8, "beta": 0.0}
    trainer = GRPOTrainer(
        base, reward, args=arguments(GRPOConfig, tmp_path, **options), train_dataset=rows, processing_class=tokenizer,
        peft_config=MonoLoraConfig(**ADAPTER),
    )  # fmt: skip
    check_trainer(trainer, batches)


@pytest.mark.slow
def test_a_quantised_base(rows, tokenizer, batches, tmp_path):
    set_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**LLAMA | {"hidden_size": 64}))
    base.save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    quantised = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    model = get_peft_model(prepare_model_for_kbit_training(quantised), MonoLoraConfig(**ADAPTER))
    trainer = SFTTrainer(
        model, arguments(SFTConfig, tmp_path, max_steps=60), train_dataset=rows, processing_class=tokenizer
    )
    check_trainer(trainer, batches)
    assert certify(trainer.model, batches).share == 1
