"""Sparsity and dead units, against counting one sequence at a time."""

import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from mono_peft import DivergedError, MonoLoraConfig, SparsityCallback, activation_sparsity


@pytest.fixture
def model(llama):
    torch.manual_seed(1)
    return get_peft_model(llama, MonoLoraConfig(r=6, init_weights=False, lora_dropout=0.5))


def padded(input_ids, lengths):
    mask = (torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": input_ids * mask, "attention_mask": mask}


def count_one_at_a_time(model, batch):
    """Zeros of relu(A x) by module, from the inputs of the layers, one unpadded sequence at a time."""
    inputs = {}
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "monolora_encoder")}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda m, args, name=name: inputs.setdefault(name, []).append(args[0]))
    model.eval()
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        model(row[mask.bool()][None])
    latents = {
        name: (torch.cat([x[0] for x in inputs[name]]) @ layer.monolora_encoder.default.weight.T).clamp(min=0)
        for name, layer in layers.items()
    }
    zero = {name: (z == 0).double().mean().item() for name, z in latents.items()}
    dead = {name: (z == 0).all(0).nonzero().flatten().tolist() for name, z in latents.items()}
    return zero, {name: units for name, units in dead.items() if units}


def adapted_layers(model):
    return [layer for layer in model.modules() if hasattr(layer, "monolora_encoder")]


def test_it_equals_counting_by_hand(model, input_ids):
    for layer in adapted_layers(model):
        layer.monolora_encoder.default.weight.data[2] = 0
    batch = padded(input_ids, [9, 4, 6])
    measured = activation_sparsity(model, [batch])
    zero, dead = count_one_at_a_time(model, batch)
    assert measured.per_module.keys() == zero.keys()
    assert measured.per_module == pytest.approx(zero)
    assert measured.overall == pytest.approx(sum(zero.values()) / len(zero))
    assert measured.dead_units == dead
    assert measured.dead == sum(map(len, dead.values())) / sum(layer.r["default"] for layer in adapted_layers(model))
    assert all(2 in units for units in dead.values())
    assert 0 < measured.overall < 1


def test_batches_can_be_split_in_any_way(model, input_ids):
    batch = padded(input_ids, [9, 4, 6])
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(3)]
    assert activation_sparsity(model, rows) == activation_sparsity(model, [batch])


def test_padding_does_not_count(model, input_ids):
    short = padded(input_ids, [9, 4, 6])
    longer = {name: nn.functional.pad(value, (0, 20)) for name, value in short.items()}
    left = {name: nn.functional.pad(value, (5, 0)) for name, value in short.items()}
    expected = activation_sparsity(model, [short])
    assert activation_sparsity(model, [longer]).overall == pytest.approx(expected.overall)
    assert activation_sparsity(model, [left]).overall == pytest.approx(expected.overall)


def test_dead_units_are_found(model, input_ids):
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    before = activation_sparsity(model, [{"input_ids": input_ids}])
    layer.monolora_encoder.default.weight.data[:] = 0
    after = activation_sparsity(model, [{"input_ids": input_ids}])
    assert after.per_module[next(n for n in after.per_module if "1.self_attn.v" in n)] == 1
    assert after.dead >= 6 / 24
    assert after.dead > before.dead


def test_smooth_activations_have_no_zeros(llama, input_ids):
    model = get_peft_model(llama, MonoLoraConfig(activation="sigmoid", init_weights=False))
    assert activation_sparsity(model, [{"input_ids": input_ids}]).overall == 0


def test_the_model_is_left_as_it_was(model, input_ids):
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    weights = {n: v.clone() for n, v in model.state_dict().items()}
    activation_sparsity(model, [{"input_ids": input_ids, "labels": input_ids}])
    with pytest.raises(ValueError, match="input_ids"):
        activation_sparsity(model, [{"input_ids": input_ids}, {}])
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(weights[n], v) for n, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_active_adapters_only(model, input_ids):
    one = activation_sparsity(model, [{"input_ids": input_ids}])
    model.add_adapter("other", MonoLoraConfig(r=2, init_weights=False))
    assert activation_sparsity(model, [{"input_ids": input_ids}]) == one
    model.base_model.set_adapter(["default", "other"])
    both = activation_sparsity(model, [{"input_ids": input_ids}])
    assert {name.rpartition(" ")[2] for name in both.per_module} == {"(default)", "(other)"}


def test_bad_input(llama, model, input_ids):
    with pytest.raises(ValueError, match="holds no token that counts"):
        activation_sparsity(model, [])
    with pytest.raises(ValueError, match="holds no token that counts"):
        activation_sparsity(model, [padded(input_ids, [0, 0, 0])])
    with model.disable_adapter(), pytest.raises(ValueError, match="no active MonoLoRA adapter"):
        activation_sparsity(model, [{"input_ids": input_ids}])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["monolora_encoder", "monolora_decoder"])
def test_weights_that_are_not_finite_have_no_sparsity(model, input_ids, part, value):
    """ReLU hides an encoder of -infinity, and no latent shows a broken decoder of the last layer."""
    model.get_submodule(f"base_model.model.model.layers.1.self_attn.v_proj.{part}.default").weight.data[0, 0] = value
    with pytest.raises(DivergedError, match=rf"1 tensors .* NaN or infinity .*1\.self_attn\.v_proj\.{part}"):
        activation_sparsity(model, [{"input_ids": input_ids}])
    assert issubclass(DivergedError, ValueError)
    assert not any(m._forward_hooks for m in model.modules())


def test_broken_weights_of_an_adapter_that_is_not_active_do_not_matter(model, input_ids):
    expected = activation_sparsity(model, [{"input_ids": input_ids}])
    model.add_adapter("other", MonoLoraConfig(r=2, init_weights=False))
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.data.fill_(float("nan"))
    assert activation_sparsity(model, [{"input_ids": input_ids}]) == expected


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_have_no_sparsity(llama, input_ids, activation, value):
    model = get_peft_model(llama, MonoLoraConfig(activation=activation, init_weights=False))
    llama.model.norm.weight.data.fill_(value)  # behind every adapter, so that all is well
    assert activation_sparsity(model, [{"input_ids": input_ids}]).overall < 1
    llama.model.embed_tokens.weight.data[input_ids[1, 3], 5] = value
    with pytest.raises(DivergedError, match=r"latents of .*layers\.0\.self_attn\.q_proj hold NaN or infinity"):
        activation_sparsity(model, [{"input_ids": input_ids}])


def test_padding_may_be_nan(input_ids):
    class PerToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(100, 8), nn.Linear(8, 3)

        def forward(self, input_ids, attention_mask):
            return self.head(self.table(input_ids))

    model = get_peft_model(PerToken(), MonoLoraConfig(target_modules=["head"]))
    batch = padded(input_ids, [9, 4, 6])
    expected = activation_sparsity(model, [batch])
    model.base_model.model.table.weight.data[0] = float("nan")  # the padding token's
    assert activation_sparsity(model, [batch]) == expected
    batch["attention_mask"][1, 4] = 1
    with pytest.raises(DivergedError, match="head hold NaN"):
        activation_sparsity(model, [batch])


@pytest.mark.parametrize("mask", [torch.ones(3, 1, 9, 9), {"full_attention": torch.ones(3, 9)}])
def test_masks_that_do_not_name_tokens(model, input_ids, mask):
    with pytest.raises(ValueError, match=r"must have the shape \(batch, tokens\) to tell padding apart, got"):
        activation_sparsity(model, [{"input_ids": input_ids, "attention_mask": mask}])


def test_encoder_decoder_models_without_padding_only(input_ids):
    config = T5Config(vocab_size=100, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = get_peft_model(T5ForConditionalGeneration(config), MonoLoraConfig(init_weights=False))
    batch = {"input_ids": input_ids, "labels": input_ids, "attention_mask": torch.ones_like(input_ids)}
    assert 0 < activation_sparsity(model, [batch]).overall < 1
    batch["attention_mask"][0, -1] = 0
    with pytest.raises(ValueError, match="encoder-decoder model has other tokens in each half"):
        activation_sparsity(model, [batch])


def test_a_compiled_model_is_measured_as_its_original(model, input_ids):
    batch = {"input_ids": input_ids}
    assert activation_sparsity(torch.compile(model), [batch]) == activation_sparsity(model, [batch])


def test_lora_has_nothing_to_measure(llama, input_ids):
    model = get_peft_model(llama, LoraConfig())
    with pytest.raises(ValueError, match="LoRA has no activation, its sparsity is 0"):
        activation_sparsity(model, [{"input_ids": input_ids}])


def test_the_callback_reaches_the_loggers(model, input_ids, tmp_path):
    logged = []

    class Logger(TrainerCallback):  # stands in line before the callback, as the loggers of `report_to` do
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(dict(logs))

    arguments = TrainingArguments(
        tmp_path, max_steps=4, logging_steps=2, per_device_train_batch_size=3, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": input_ids.tolist(), "labels": input_ids.tolist()})
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=[Logger()])
    batch = padded(input_ids, [9, 4, 6])
    trainer.add_callback(SparsityCallback(trainer, [batch]))
    trainer.train()
    final = activation_sparsity(model, [batch])
    with_loss = [line for line in logged if "loss" in line]
    assert len(with_loss) == 2
    assert with_loss[-1]["monolora_sparsity"] == final.overall
    assert with_loss[-1]["monolora_dead"] == final.dead
    assert all("monolora_sparsity" not in line for line in logged if "loss" not in line)
    history = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["monolora_sparsity"] for line in history] == [line["monolora_sparsity"] for line in with_loss]


def test_the_callback_warns_of_a_dead_module_at_a_save(model, input_ids, tmp_path):
    batch = padded(input_ids, [9, 4, 6])

    def train_a_step():
        data = Dataset.from_dict({"input_ids": input_ids.tolist(), "labels": input_ids.tolist()})
        arguments = TrainingArguments(
            tmp_path, max_steps=1, use_cpu=True, report_to="none", save_steps=1, disable_tqdm=True, learning_rate=1e-9
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.add_callback(SparsityCallback(trainer, [batch]))
        trainer.train()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*MonoLoRA modules are dead")
        train_a_step()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "monolora_encoder" in n).zero_()
    modules = list(activation_sparsity(model, [batch]).per_module)
    with pytest.warns(UserWarning, match=rf"1 of {len(modules)} MonoLoRA modules are dead.*\({modules[0]}\)"):
        train_a_step()


def test_the_callback_logs_no_number_of_a_diverged_adapter(model, input_ids, tmp_path):
    data = Dataset.from_dict({"input_ids": input_ids.tolist(), "labels": input_ids.tolist()})
    arguments = TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to="none", save_steps=2, logging_steps=1, disable_tqdm=True
    )

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                next(p for n, p in model.named_parameters() if "monolora_decoder" in n).data.fill_(float("nan"))

    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Break()])
    trainer.add_callback(SparsityCallback(trainer, [padded(input_ids, [9, 4, 6])]))
    with pytest.warns(UserWarning, match=r"no sparsity at step 2: 1 tensors of this adapter hold NaN") as warned:
        trainer.train()
    assert len([w for w in warned if "no sparsity at step 2" in str(w.message)]) == 2  # the line and the save
    first, second = [line for line in trainer.state.log_history if "loss" in line]
    assert 0 < first["monolora_sparsity"] < 1
    assert not {"monolora_sparsity", "monolora_dead"} & second.keys()
    assert trainer.state.global_step == 2
