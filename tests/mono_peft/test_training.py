"""Training trains: the adapter and nothing else, to a lower loss; what is saved is what was trained."""

import copy
import math
from unittest.mock import MagicMock

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.generation.vllm_generation import VLLMGeneration

from mono_peft import MonoLoraConfig, monolora_plus_param_groups


@pytest.fixture
def base():
    set_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=None, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def rows():
    colours = {"grass": "green", "snow": "white", "coal": "black", "blood": "red"}
    return Dataset.from_list([{"prompt": f"{k} is", "completion": f" {v}"} for k, v in colours.items()])


def trainer_for(
    base, rows, tokenizer, folder, callbacks=None, lora_dropout=0.1, alora_invocation_tokens=None, **options
):
    options = {"max_steps": 60, "learning_rate": 2e-2, "save_strategy": "no"} | options
    arguments = SFTConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, seed=3,
        per_device_train_batch_size=4, logging_steps=1, **options,
    )  # fmt: skip
    config = MonoLoraConfig(
        r=4, lora_alpha=8, lora_dropout=lora_dropout, task_type="CAUSAL_LM", target_modules="all-linear",
        alora_invocation_tokens=alora_invocation_tokens,
    )  # fmt: skip
    return SFTTrainer(
        base, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config, callbacks=callbacks
    )


def adapter_weights(model, also=()):
    return {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if p.requires_grad and any(part in n for part in ("monolora_", *also))
    }


def frozen_parameters(model):
    return {
        n.replace(".base_layer", "").removeprefix("base_model.model."): p.detach().clone()
        for n, p in model.named_parameters()
        if not p.requires_grad
    }


def check_training(trainer, tmp_path, fresh, inputs, key="loss", also_moved=()):
    """Train: the loss falls to 0.8 or less, the adapter moves and nothing else, and what is saved gives the same."""
    start, frozen = adapter_weights(trainer.model, also_moved), frozen_parameters(trainer.model)
    trainer.train()
    losses = [line[key] for line in trainer.state.log_history if key in line]
    assert losses[-1] <= 0.8 * losses[0]
    moved = adapter_weights(trainer.model, also_moved)
    assert len(start) > 0
    assert [n for n in start if torch.equal(moved[n], start[n])] == []
    after = frozen_parameters(trainer.model)
    assert after.keys() == frozen.keys()
    assert all(torch.equal(after[n], frozen[n]) for n in frozen)
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_sft_on_prompts_and_completions(base, rows, make_tokenizer, tmp_path):
    trainer = trainer_for(copy.deepcopy(base), rows, make_tokenizer(), tmp_path)
    assert len(adapter_weights(trainer.model)) == 2 * 7 * 2
    check_training(trainer, tmp_path, base, {"input_ids": torch.randint(0, 400, (2, 8))})


def test_sft_of_an_activated_adapter(base, rows, make_tokenizer, tmp_path):
    """The answer follows " is", which invokes it; activation checkpointing is on by default."""
    tokenizer = make_tokenizer()
    trainer = trainer_for(
        copy.deepcopy(base), rows, tokenizer, tmp_path, alora_invocation_tokens=tokenizer(" is").input_ids
    )
    assert trainer.args.gradient_checkpointing
    check_training(trainer, tmp_path, base, dict(tokenizer("the snow is white", return_tensors="pt")))


def test_a_resumed_run_equals_an_uninterrupted_one(base, rows, make_tokenizer, tmp_path):
    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    whole = trainer_for(copy.deepcopy(base), rows, make_tokenizer(), tmp_path / "whole", **options)
    whole.train()
    stopped = trainer_for(
        copy.deepcopy(base), rows, make_tokenizer(), tmp_path / "cut", callbacks=[StopAt()], **options
    )
    stopped.train()
    assert stopped.state.global_step == 5
    resumed = trainer_for(base, rows, make_tokenizer(), tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    expected, found = adapter_weights(whole.model), adapter_weights(resumed.model)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert not all(torch.equal(adapter_weights(stopped.model)[n], expected[n]) for n in expected)


def test_activation_checkpointing_leaves_the_gradients_alone(base, rows, make_tokenizer, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        trainer = trainer_for(
            copy.deepcopy(base), rows, make_tokenizer(), tmp_path, gradient_checkpointing=checkpointing, lora_dropout=0
        )
        for name, parameter in trainer.model.named_parameters():
            if "monolora_decoder" in name:  # zero at first, and A's gradient with it
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(4))
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * 7 * 2
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient)


def arguments(config_class, folder, **options):
    options = {"max_steps": 60, "learning_rate": 2e-2, "per_device_train_batch_size": 4} | options
    return config_class(
        str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, seed=3, save_strategy="no",
        logging_steps=1, **options,
    )  # fmt: skip


ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
QUESTIONS = {"grass?": "green", "snow?": "white", "coal?": "black", "blood?": "red"}


@pytest.mark.parametrize("packing", [False, True])
def test_sft_on_conversations(base, make_tokenizer, tmp_path, packing):
    rows = Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in QUESTIONS.items()
        ]
    )
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    options = {"assistant_only_loss": not packing, "packing": packing, "max_length": 32}
    trainer = SFTTrainer(
        copy.deepcopy(base), arguments(SFTConfig, tmp_path, **options), train_dataset=rows,
        processing_class=tokenizer, peft_config=MonoLoraConfig(**ADAPTER),
    )  # fmt: skip
    check_training(trainer, tmp_path, base, {"input_ids": torch.randint(0, 400, (2, 8))})


def test_dpo_against_the_disabled_adapter(base, make_tokenizer, tmp_path):
    rows = Dataset.from_list([{"prompt": q, "chosen": f" {a}", "rejected": " blue"} for q, a in QUESTIONS.items()])
    trainer = DPOTrainer(
        copy.deepcopy(base), args=arguments(DPOConfig, tmp_path, max_steps=30, beta=0.5), train_dataset=rows,
        processing_class=make_tokenizer(), peft_config=MonoLoraConfig(**ADAPTER),
    )  # fmt: skip
    assert trainer.ref_model is None  # the reference is the base, with the adapter disabled
    check_training(trainer, tmp_path, base, {"input_ids": torch.randint(0, 400, (2, 8))})
    first = next(line for line in trainer.state.log_history if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)  # B is zero: policy and reference are equal


def test_reward_model_with_its_head(make_tokenizer, tmp_path):
    set_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=None, eos_token_id=1, num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    base = LlamaForSequenceClassification(config)
    rows = Dataset.from_list([{"chosen": f"{q} {a}", "rejected": f"{q} blue"} for q, a in QUESTIONS.items()])
    adapter = MonoLoraConfig(**ADAPTER | {"task_type": "SEQ_CLS", "modules_to_save": ["score"]})
    trainer = RewardTrainer(
        copy.deepcopy(base), args=arguments(RewardConfig, tmp_path, max_steps=30, max_length=32), train_dataset=rows,
        processing_class=make_tokenizer(), peft_config=adapter,
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(2, 400, (2, 8))}
    check_training(trainer, tmp_path, base, inputs, also_moved=("modules_to_save",))


def test_grpo_without_vllm(base, make_tokenizer, tmp_path):
    def reward(completion_ids, **kwargs):
        return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]

    rows = Dataset.from_list([{"prompt": q} for q in QUESTIONS] * 8)
    options = {"num_generations": 16, "max_completion_length": 6, "max_steps": 60, "learning_rate": 5e-2, "beta": 0.0}
    trainer = GRPOTrainer(
        copy.deepcopy(base), reward, args=arguments(GRPOConfig, tmp_path, per_device_train_batch_size=32, **options),
        train_dataset=rows, processing_class=make_tokenizer(), peft_config=MonoLoraConfig(**ADAPTER),
    )  # fmt: skip
    start, frozen = adapter_weights(trainer.model), frozen_parameters(trainer.model)
    trainer.train()
    moved = adapter_weights(trainer.model)
    assert [n for n in start if torch.equal(moved[n], start[n])] == []
    after = frozen_parameters(trainer.model)
    assert all(torch.equal(after[n], frozen[n]) for n in frozen)
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(rewards[-5:]) > 1.2 * sum(rewards[:5])
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.randint(0, 400, (2, 8))
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_trl_sends_no_weights_of_ours_to_vllm(base, make_tokenizer, mode):
    class Generation(VLLMGeneration):
        def _init_vllm(self):  # in place of a vLLM, which is not installed
            self.vllm_client = self.llm = MagicMock()

    for config in (LoraConfig(r=4), MonoLoraConfig(r=4)):
        model = get_peft_model(copy.deepcopy(base), config)
        generation = Generation(model, Accelerator(cpu=True), make_tokenizer(), mode=mode)
        if isinstance(config, LoraConfig):
            generation.sync_weights()
            assert generation.llm.mock_calls != []
        else:
            with pytest.raises(NotImplementedError, match=r"train with `use_vllm=False`"):
                generation.sync_weights()
            assert generation.llm.mock_calls == []


def test_the_plain_trainer(base, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    rows = [tokenizer(f"{q} {a}") for q, a in QUESTIONS.items()]
    trainer = Trainer(
        get_peft_model(copy.deepcopy(base), MonoLoraConfig(**ADAPTER)),
        arguments(TrainingArguments, tmp_path),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    check_training(trainer, tmp_path, base, {"input_ids": torch.randint(0, 400, (2, 8))})


def test_a_loop_on_accelerate(base, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    accelerator = Accelerator(cpu=True)
    model = get_peft_model(copy.deepcopy(base), MonoLoraConfig(**ADAPTER))
    start = adapter_weights(model)
    optimizer = torch.optim.AdamW(monolora_plus_param_groups(model, 5e-3, 4))
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.tensor([tokenizer(f"{q} {a}")["input_ids"][:6] for q, a in QUESTIONS.items()])
    losses = []
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] <= 0.8 * losses[0]
    unwrapped = accelerator.unwrap_model(model)
    moved = adapter_weights(unwrapped)
    assert [n for n in start if torch.equal(moved[n], start[n])] == []
    unwrapped.save_pretrained(tmp_path, state_dict=accelerator.get_state_dict(model))
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded.eval()(ids).logits, unwrapped.eval()(ids).logits)
