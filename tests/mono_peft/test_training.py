"""Training trains: the adapter and nothing else, to a lower loss; what is saved is what was trained."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from mono_peft import MonoLoraConfig


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


def trainer_for(base, rows, tokenizer, folder, callbacks=None, lora_dropout=0.1, **options):
    options = {"max_steps": 60, "learning_rate": 2e-2, "save_strategy": "no"} | options
    arguments = SFTConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, seed=3,
        per_device_train_batch_size=4, logging_steps=1, **options,
    )  # fmt: skip
    config = MonoLoraConfig(
        r=4, lora_alpha=8, lora_dropout=lora_dropout, task_type="CAUSAL_LM", target_modules="all-linear",
    )  # fmt: skip
    return SFTTrainer(
        base, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config, callbacks=callbacks
    )


def adapter_weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "monolora_" in n}


def test_only_the_adapter_moves_and_the_loss_falls(base, rows, make_tokenizer, tmp_path):
    frozen = {n: p.detach().clone() for n, p in base.named_parameters()}
    trainer = trainer_for(base, rows, make_tokenizer(), tmp_path)
    start = adapter_weights(trainer.model)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] <= 0.8 * losses[0]

    moved = adapter_weights(trainer.model)
    assert moved.keys() == start.keys()
    assert len(moved) == 2 * 7 * 2
    assert [n for n in moved if torch.equal(moved[n], start[n])] == []
    after = {
        n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in trainer.model.named_parameters()
    }
    assert all(torch.equal(after[n], frozen[n]) for n in frozen)

    trainer.save_model(tmp_path / "adapter")
    set_seed(0)
    fresh = LlamaForCausalLM(base.config)
    fresh.load_state_dict(frozen)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    ids = torch.randint(0, 400, (2, 8))
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


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
