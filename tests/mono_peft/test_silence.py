"""Silence: the hinge's gradient, which tokens and steps it is of, and where it is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

from mono_peft import MonoLoraConfig, Silence
from mono_peft.silenceable import NeverSilentError

ALL = {"target_modules": "all-linear"}


def base_inputs(base, ids, **inputs):
    """The input of each linear layer of the decoder in a pass of the base, by the layer's name: (tokens, in)."""
    found, handles = {}, []
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, name=name: found.update({name: args[0].flatten(0, 1)})
                )
            )
    with torch.no_grad():
        base(ids, **inputs)
    for handle in handles:
        handle.remove()
    return found


def hinge(model, inputs, margin):
    """The hinge by its definition, a module, a row and a unit at a time."""
    total = 0
    for name, x in inputs.items():
        a = model.get_submodule(f"base_model.model.{name}").monolora_encoder["default"].weight
        rows = [torch.stack([torch.relu(unit @ row + margin) for unit in a]).mean() for row in x]
        total = total + torch.stack(rows).mean()
    return total


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def encoders(model):
    return {n: p for n, p in model.named_parameters() if "monolora_encoder" in n}


def test_the_gradient_is_that_of_the_whole_loss(llama, random_adapter, input_ids):
    base = llama.double()
    task, silent = input_ids[:, :5], input_ids[:2]
    inputs = base_inputs(copy.deepcopy(base), silent)
    model = random_adapter(base, **ALL).train()
    silence = Silence(model, [{"input_ids": silent}], weight=3.0, margin=0.02, rows_per_step=100)

    loss = model(input_ids=task, labels=task).loss
    expected_hinge = hinge(model, inputs, 0.02)
    (loss + 3.0 * expected_hinge).backward()
    expected = gradients(model)
    model.zero_grad()
    model(input_ids=task, labels=task).loss.backward()
    task_only = gradients(model)
    silence.add_gradients(0)
    found = gradients(model)
    assert len(found) == 2 * 7 * 2
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-9)
        assert torch.equal(found[name], task_only[name]) == ("decoder" in name)
    assert silence.loss == pytest.approx(expected_hinge.item(), rel=1e-6)
    firing = [
        ((x @ encoder.double().T) > 0).any(1).double().mean().item()
        for (_, x), encoder in zip(inputs.items(), encoders(model).values(), strict=True)
    ]
    assert silence.fired == pytest.approx(sum(firing) / len(firing))


def test_without_a_gradient_of_the_task(llama, random_adapter, input_ids):
    """As at a step that does not use a module."""
    model = random_adapter(llama, **ALL)
    silence = Silence(model, [{"input_ids": input_ids}])
    silence.add_gradients(0)
    found = gradients(model)
    assert found.keys() == encoders(model).keys()
    silence.add_gradients(0)
    assert all(torch.allclose(p.grad, 2 * found[n]) for n, p in encoders(model).items())


def test_an_adapter_that_diverged_does_not_count_as_silent(llama, random_adapter, input_ids):
    model = random_adapter(llama, target_modules=["q_proj"])
    silence = Silence(model, [{"input_ids": input_ids}])
    with torch.no_grad():
        for encoder in encoders(model).values():
            encoder.fill_(torch.nan)
    silence.add_gradients(0)
    assert silence.fired == 1
    assert set(silence.fired_by_module().values()) == {1}


class TestTokens:
    def test_padding_and_tokens_left_out_do_not_count(self, llama, random_adapter, input_ids):
        model = random_adapter(llama, **ALL)
        padded = torch.cat([input_ids, torch.zeros(3, 4, dtype=torch.int64)], 1)
        attention = (torch.arange(13) < 9).long().expand(3, 13)
        silent = (torch.arange(13) >= 4).long().expand(3, 13)

        def found(**batch):
            model.zero_grad()
            silence = Silence(model, [batch], rows_per_step=100)
            silence.add_gradients(0)
            return gradients(model), silence.loss

        whole, loss = found(input_ids=input_ids)
        without_padding, same_loss = found(input_ids=padded, attention_mask=attention)
        assert same_loss == pytest.approx(loss, rel=1e-4)
        for name in whole:
            torch.testing.assert_close(without_padding[name], whole[name], rtol=1e-4, atol=1e-6)

        with model.disable_adapter():
            base = base_inputs(model.get_base_model(), input_ids)
        inputs = {
            name.removesuffix(".base_layer"): x.view(3, 9, -1)[:, 4:].flatten(0, 1)
            for name, x in base.items()
            if name.endswith(".base_layer")
        }
        _, loss = found(input_ids=padded, attention_mask=attention, silent_mask=silent)
        assert loss == pytest.approx(hinge(model, inputs, 0.1).item(), rel=1e-4)

    def test_the_cache_keeps_to_its_budget_and_to_the_batches_drawn(self, llama, random_adapter):
        model = random_adapter(llama, **ALL)
        batches = [{"input_ids": torch.full((1, 2), token)} for token in range(3, 90)]
        seen = []
        hook = model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
        silence = Silence(model, batches, rows_per_module=10)
        hook.remove()
        assert 5 <= len(seen) <= 10
        # Of 2 layers: q, k, v share one input, gate and up one; o has one of 32, down one of 64 numbers.
        assert silence.cached_bytes == 2 * 10 * (3 * 32 + 64) * 4

    def test_rows_are_those_of_the_seed_and_the_step(self, llama, random_adapter, input_ids):
        model = random_adapter(llama, **ALL)

        def found(step, seed=0):
            model.zero_grad()
            Silence(model, [{"input_ids": input_ids}], rows_per_step=5, seed=seed).add_gradients(step)
            return gradients(model)

        first = found(7)
        assert all(torch.equal(g, first[n]) for n, g in found(7).items())
        assert any(not torch.equal(g, first[n]) for n, g in found(8).items())
        assert any(not torch.equal(g, first[n]) for n, g in found(7, seed=1).items())

    def test_over_the_steps_every_row_has_its_turn(self, llama, random_adapter, input_ids):
        """The mean over many steps is the gradient on all rows."""
        model = random_adapter(llama, target_modules=["q_proj"])
        silence = Silence(model, [{"input_ids": input_ids}], rows_per_step=5, margin=10.0)  # every unit is above it
        for step in range(800):
            silence.add_gradients(step)
        mean = {n: g / 800 for n, g in gradients(model).items()}
        model.zero_grad()
        Silence(model, [{"input_ids": input_ids}], rows_per_step=100, margin=10.0).add_gradients(0)
        for name, gradient in gradients(model).items():
            assert (mean[name] - gradient).norm() < 0.1 * gradient.norm()

    def test_model_and_random_numbers_are_as_before(self, llama, random_adapter, input_ids):
        model = random_adapter(llama, **ALL)
        model.train()
        before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
        logits = model.eval()(input_ids).logits
        model.train()
        state = torch.get_rng_state()
        Silence(model, [{"input_ids": input_ids}]).add_gradients(0)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in model.modules())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name][0])
            assert parameter.requires_grad == before[name][1]
        assert torch.equal(model.eval()(input_ids).logits, logits)
        assert not any(module._forward_pre_hooks for module in model.modules())


class TestRefusals:
    @pytest.fixture
    def batches(self, input_ids):
        return [{"input_ids": input_ids}]

    @pytest.mark.parametrize("activation", ["sigmoid", "softplus", "identity"])
    def test_a_sigma_that_is_never_exactly_zero(self, llama, batches, random_adapter, activation):
        model = random_adapter(llama, activation=activation, **ALL)
        with pytest.raises(NeverSilentError, match=r"which is not exactly zero where A x <= 0.*activation='relu'"):
            Silence(model, batches)

    def test_lora(self, llama, batches):
        with pytest.raises(NeverSilentError, match=r"no active MonoLoRA adapter: only it has a half-space"):
            Silence(get_peft_model(llama, LoraConfig(**ALL)), batches)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weight": 0}, r"`weight` must be a positive, finite number, got 0"),
            ({"weight": float("nan")}, r"`weight` must be a positive"),
            ({"margin": -0.1}, r"`margin` must be a finite number that is not negative, got -0.1"),
            ({"rows_per_step": 0}, r"`rows_per_step` must be a positive integer, got 0"),
            ({"rows_per_module": 2.5}, r"`rows_per_module` must be a positive integer, got 2.5"),
            ({"seed": -1}, r"`seed` must be an integer from 0 to 2\^31 - 1, got -1"),
        ],
    )
    def test_options_out_of_range(self, llama, batches, random_adapter, options, message):
        with pytest.raises(ValueError, match=message):
            Silence(random_adapter(llama, **ALL), batches, **options)

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ([], r"no token that counts"),
            ([{"input_ids": torch.ones(1, 3).long(), "silent_mask": torch.zeros(1, 3)}], r"no token that counts"),
            ([{"text": ["a"]}], r"batch 0 has no `input_ids` of shape \(batch, tokens\)"),
            ([{"input_ids": torch.ones(3).long()}], r"batch 0 has no `input_ids` of shape"),
            ([{"input_ids": torch.tensor([[3, 100]])}], r"batch 0 has the token 100, and the model has 100 tokens"),
            ([{"input_ids": torch.tensor([[3, -100]])}], r"batch 0 has the token -100"),
            (
                [{"input_ids": torch.ones(1, 3).long(), "silent_mask": torch.ones(3)}],
                r"`silent_mask` of batch 0 must have the shape \(1, 3\), got \(3,\)",
            ),
        ],
    )
    def test_batches_that_do_not_fit(self, llama, random_adapter, batches, message):
        with pytest.raises(ValueError, match=message):
            Silence(random_adapter(llama, **ALL), batches)

    def test_adapters_that_are_not_on_linear_layers(self, llama, batches, random_adapter):
        model = random_adapter(llama, target_modules=["embed_tokens", "q_proj"])
        with pytest.raises(ValueError, match=r"embed_tokens is a MonoLoraEmbedding. Leave it out of `target_modules`"):
            Silence(model, batches)

    def test_frozen_adapters(self, llama, batches, random_adapter):
        model = random_adapter(llama, **ALL).requires_grad_(False)
        with pytest.raises(ValueError, match=r"default of .*q_proj is frozen.*`is_trainable=True`"):
            Silence(model, batches)

    def test_activated_adapters(self, llama, batches, random_adapter):
        with pytest.raises(ValueError, match=r"is an activated one, which is silent before its invocation tokens"):
            Silence(random_adapter(llama, alora_invocation_tokens=[5, 6], **ALL), batches)

    def test_more_that_is_trained_than_the_adapter(self, llama, batches, random_adapter):
        model = random_adapter(llama, target_modules=["q_proj"], modules_to_save=["norm"])
        with pytest.raises(ValueError, match=r"more than the adapters is trained, .*norm.*base's inputs change"):
            Silence(model, batches)

    def test_a_trained_head_is_told(self, llama, batches, random_adapter):
        model = random_adapter(llama, target_modules=["q_proj"], modules_to_save=["lm_head"])
        with pytest.warns(UserWarning, match=r"lm_head.* of the head are trained .* outputs are not"):
            Silence(model, batches)

    def test_an_encoder_and_a_decoder(self, batches, random_adapter):
        config = T5Config(vocab_size=100, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
        model = random_adapter(T5ForConditionalGeneration(config), task_type="SEQ_2_SEQ_LM", target_modules=["q"])
        with pytest.raises(ValueError, match=r"an encoder-decoder model has two texts a row"):
            Silence(model, batches)

    def test_a_base_that_computes_no_numbers(self, llama, batches, random_adapter):
        torch.nn.init.constant_(llama.model.layers[1].input_layernorm.weight, float("nan"))
        with pytest.raises(ValueError, match=r"NaN or infinity for .*layers.1.self_attn.q_proj on the silent"):
            Silence(random_adapter(llama, **ALL), batches)

    def test_a_module_that_is_not_called(self, llama, batches, random_adapter):
        llama.model.unused = torch.nn.Linear(8, 8)
        with pytest.raises(ValueError, match=r"unused is not called in the model's forward pass"):
            Silence(random_adapter(llama, target_modules=["unused", "q_proj"]), batches)


class TestRefusalsInTraining:
    @pytest.fixture
    def begin(self, llama, random_adapter, input_ids, tmp_path):
        """Begin the training of a model, `begin.model`, with Silence."""
        model = random_adapter(llama, **ALL)
        silence = Silence(model, [{"input_ids": input_ids}])

        def begin(trained=model, **options):
            trainer = Trainer(trained, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
            silence.attach(trainer)
            for name, value in options.items():  # which this machine would not take
                setattr(trainer.args, name, value)
            trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)

        begin.model = model
        return begin

    def test_nothing_is_wrong(self, begin):
        begin()

    def test_scaled_gradients(self, begin):
        with pytest.raises(ValueError, match=r"fp16 scales them: train with bf16=True"):
            begin(fp16=True)

    @pytest.mark.parametrize("optimizer", ["lomo", "adalomo", "galore_adamw_layerwise"])
    def test_optimizers_that_step_in_the_backward_pass(self, begin, optimizer):
        with pytest.raises(ValueError, match=rf"the optimizer {optimizer} steps in the backward pass"):
            begin(optim=optimizer)

    def test_sharded_gradients(self, begin, monkeypatch):
        state = SimpleNamespace(distributed_type=DistributedType.FSDP)
        monkeypatch.setattr("mono_peft.silenceable.AcceleratorState", lambda: state)
        with pytest.raises(ValueError, match=r"this is FSDP, with which it has not been run"):
            begin()

    def test_another_model(self, begin, llama):
        with pytest.raises(ValueError, match=r"the trainer trains another model .* build it with `trainer.model`"):
            begin(trained=copy.deepcopy(begin.model))

    def test_a_base_that_was_changed(self, begin, llama):
        with torch.no_grad():
            for parameter in llama.get_input_embeddings().parameters():
                parameter.copy_(torch.randn_like(parameter))
        with pytest.raises(ValueError, match=r"the base model was changed after Silence was built"):
            begin()


def test_rows_that_are_not_the_tokens(llama, random_adapter, input_ids):
    """A layer that sees fewer rows than tokens, here by pooling before it."""

    class Pooled(torch.nn.Module):
        def __init__(self, llama):
            super().__init__()
            self.llama, self.head = llama, torch.nn.Linear(32, 2)
            self.config = llama.config

        def get_input_embeddings(self):
            return self.llama.get_input_embeddings()

        def forward(self, input_ids):
            return self.head(self.llama.model(input_ids).last_hidden_state[:, -1])

    model = get_peft_model(Pooled(llama), MonoLoraConfig(r=4, target_modules=["head"]))
    with pytest.raises(ValueError, match=r"head sees 3 rows of a batch of 27 tokens"):
        Silence(model, [{"input_ids": input_ids}])


def test_rows_datasets_of_tokens_are_no_batches(llama, random_adapter):
    rows = Dataset.from_list([{"input_ids": [3, 4]}])
    with pytest.raises(ValueError, match=r"batch 0 has no `input_ids` of shape"):
        Silence(random_adapter(llama, **ALL), rows)


def test_two_active_adapters_on_a_layer(llama, random_adapter, input_ids):
    model = random_adapter(llama, **ALL)
    model.add_adapter("second", MonoLoraConfig(**ALL))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="two active adapters"):
        Silence(model, [{"input_ids": input_ids}])


def test_attached_twice(llama, random_adapter, input_ids):
    model = random_adapter(llama, **ALL)
    trainer = Trainer(model, TrainingArguments(report_to="none"))
    silence = Silence(model, [{"input_ids": input_ids}])
    silence.attach(trainer)
    with pytest.raises(ValueError, match="attached already"):
        silence.attach(trainer)


def test_one_batch_in_place_of_a_list(llama, random_adapter, input_ids):
    with pytest.raises(ValueError, match="put it in a list"):
        Silence(random_adapter(llama, **ALL), {"input_ids": input_ids})


def test_layers_compiled_in_place(llama, random_adapter, input_ids):
    model = random_adapter(llama, **ALL)
    model.base_model.model.model.layers[1].compile()
    with pytest.raises(ValueError, match=r"layers\.1 was compiled in place"):
        Silence(model, [{"input_ids": input_ids}])
