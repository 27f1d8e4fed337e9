"""Where Silence turns units before training, and how it lowers their biases after it."""

import copy
import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mono_peft import Silence
from mono_peft.certify import certify
from mono_peft.silent_start import lower_bias, separating_direction

ADAPTER = {"r": 4, "target_modules": ["q_proj", "down_proj"], "encoder_bias": True, "task_type": "CAUSAL_LM"}
LLAMA = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "eos_token_id": None,
}  # fmt: skip
TASK = [{"input_ids": torch.arange(3, 23).view(2, 10)}]
SILENT = [{"input_ids": torch.arange(45, 65).view(4, 5)}]  # other tokens than the task's


@pytest.fixture
def model(random_adapter):
    torch.manual_seed(0)
    return random_adapter(LlamaForCausalLM(LlamaConfig(**LLAMA)), init_weights=True, **ADAPTER)


def latents(model, batch):
    """A x + b of each adapted layer in a pass without the adapter's updates, by name: (tokens, r)."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if hasattr(module, "monolora_encoder"):
            encoder = module.monolora_encoder["default"]
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, name=name, encoder=encoder: found.update({name: encoder(args[0]).flatten(0, 1)})
                )
            )
    with torch.no_grad(), model.disable_adapter():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def trained(model, silence, steps=60):
    """The model after steps on the task with the hinge."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 2e-2)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**TASK[0], labels=TASK[0]["input_ids"]).loss
        loss.backward()
        silence.add_gradients(step)
        optimizer.step()
    return loss.item()


class TestStartApart:
    def test_units_fire_on_the_task_and_on_no_silent_row(self, model):
        before = {name: (z > 0) for name, z in latents(model, SILENT[0]).items()}
        assert all(fires.any() for fires in before.values())
        logits = model(**TASK[0]).logits
        silence = Silence(model, SILENT, margin=0.2)
        separated = silence.start_apart(TASK)
        assert list(separated) == list(silence.fired_by_module())
        assert all(share > 0.9 for share in separated.values())  # 20 and 20 points in 32 and 64 dimensions
        for z in latents(model, SILENT[0]).values():
            torch.testing.assert_close(z.amax(0), torch.full((4,), -0.2), atol=1e-4, rtol=0)
        for z in latents(model, TASK[0]).values():
            assert ((z > 0).float().mean(0) > 0.2).all()
            assert z.std(0).min() > 0.1
            # The units differ: the direction is not all there is of them.
            assert torch.linalg.matrix_rank(z - z.mean(0), rtol=1e-2) == 4
        assert torch.equal(model(**TASK[0]).logits, logits)  # B is zero

    def test_then_the_task_is_learnt_where_it_is_not_from_a_random_start(self, model):
        other = copy.deepcopy(model)
        ours, theirs = Silence(model, SILENT, weight=100.0), Silence(other, SILENT, weight=100.0)
        ours.start_apart(TASK)
        loss = trained(model, ours)
        assert loss < 0.8 * trained(other, theirs)
        assert sum(ours.fired_by_module().values()) <= sum(theirs.fired_by_module().values())

    def test_it_follows_from_the_seed_and_leaves_random_numbers_as_they_were(self, model):
        others = [copy.deepcopy(model) for _ in range(2)]
        state = torch.get_rng_state()
        for other, seed in zip([model, *others], (0, 0, 1), strict=True):
            Silence(other, SILENT, seed=seed).start_apart(TASK)
        assert torch.equal(torch.get_rng_state(), state)
        same, another = (
            [torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)]
            for other in others
        )
        assert all(same)
        assert not all(another)

    def test_texts_that_are_alike_get_a_silent_start_all_the_same(self, model):
        silence = Silence(model, SILENT)
        separated = silence.start_apart(SILENT)
        assert set(separated.values()) == {0.0}
        assert all((z < 0).all() for z in latents(model, SILENT[0]).values())

    def test_float64(self, model):
        model = model.double()
        silence = Silence(model, SILENT, margin=0.2)
        assert all(share > 0.9 for share in silence.start_apart(TASK).values())
        for z in latents(model, SILENT[0]).values():
            torch.testing.assert_close(z.amax(0), torch.full((4,), -0.2, dtype=torch.float64), atol=1e-9, rtol=0)

    def test_the_task_has_what_the_cache_leaves_of_the_memory(self, model, monkeypatch):
        silence = Silence(model, SILENT)
        sizes = []

        def room(descriptor, start, size):
            sizes.append(size)
            os.truncate(descriptor, size)

        monkeypatch.setattr("os.posix_fallocate", room)
        ours = copy.deepcopy(model)
        bounded = Silence(ours, SILENT, memory_budget=silence.cached_bytes + 20 * 4 * 32)
        assert sizes == []
        separated = bounded.start_apart(TASK)
        assert sizes == [20 * 4 * 64, 20 * 4 * 32, 20 * 4 * 64]  # all inputs of 20 tokens but the first
        assert separated == silence.start_apart(TASK)

    def test_a_trained_adapter_is_refused(self, random_adapter, llama, input_ids):
        model = random_adapter(llama, target_modules=["q_proj"], encoder_bias=True)
        silence = Silence(model, [{"input_ids": input_ids}])
        with pytest.raises(ValueError, match=r"q_proj, .*trained already .*B is not zero.*before training"):
            silence.start_apart([{"input_ids": input_ids}])

    def test_task_without_tokens(self, model):
        empty = {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "attention_mask": torch.zeros(1, 3)}
        with pytest.raises(ValueError, match="no token that counts"):
            Silence(model, SILENT).start_apart([empty])


class TestLowerBiases:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_trained_adapter_becomes_silent_bit_for_bit(self, model, dtype):
        silence = Silence(model, SILENT, weight=1e-3)
        trained(model, silence, steps=20)
        assert certify(model, SILENT).share < 1
        changed = model(**TASK[0]).logits
        lowered = silence.lower_biases()
        assert max(lowered.values()) > 0
        assert set(silence.fired_by_module().values()) == {0.0}
        model = model.eval().to(dtype)
        certificate = certify(model, SILENT, compared_prompts=4)
        assert (certificate.share, certificate.compared) == (1, 4)
        with torch.no_grad():
            logits = model(**SILENT[0]).logits
            with model.disable_adapter():
                assert torch.equal(logits, model(**SILENT[0]).logits)
                assert not torch.equal(changed.to(dtype), model(**TASK[0]).logits)

    def test_units_below_the_margin_stay(self, model):
        silence = Silence(model, SILENT, margin=0.3)
        before = {name: z.amax(0) for name, z in latents(model, SILENT[0]).items()}
        first = next(iter(before))
        encoder = model.get_submodule(first).monolora_encoder["default"]
        with torch.no_grad():
            encoder.bias[1] = -50.0
        lowered = silence.lower_biases()
        assert encoder.bias[1] == -50
        after = {name: z.amax(0) for name, z in latents(model, SILENT[0]).items()}
        for unit in (0, 2, 3):
            assert after[first][unit] == pytest.approx(min(-0.3, before[first][unit].item()), abs=1e-5)
        assert lowered[first] == pytest.approx(max(before[first][[0, 2, 3]].max().item() + 0.3, 0), abs=1e-5)
        assert silence.lower_biases() == pytest.approx(dict.fromkeys(lowered, 0.0), abs=1e-5)

    def test_biases_of_few_bits_are_rounded_down(self):
        torch.manual_seed(0)
        encoder = torch.nn.Linear(16, 300).to(torch.bfloat16)
        rows = 30 * torch.randn(40, 16)
        with torch.no_grad():
            lower_bias(encoder, rows, margin=0.0)
        highest = (rows.double() @ encoder.weight.double().t()).amax(0) + encoder.bias.double()
        assert highest.max() <= 1e-4
        assert highest.min() > -2

    def test_without_biases(self, random_adapter, llama, input_ids):
        model = random_adapter(llama, target_modules=["q_proj"], init_weights=True)
        silence = Silence(model, [{"input_ids": input_ids}])
        for method in (silence.lower_biases, lambda: silence.start_apart([{"input_ids": input_ids}])):
            with pytest.raises(ValueError, match=r"no bias b to set: .* needs MonoLoraConfig\(encoder_bias=True\)"):
                method()
        with pytest.raises(ValueError, match=r"no bias b to set: `lower_every` needs"):
            Silence(model, [{"input_ids": input_ids}], lower_every=1)


def test_repeated_rows_count_once_in_the_direction():
    """A row of the task that is there a thousand times does not turn the direction away from the others."""
    torch.manual_seed(0)
    silent, task = torch.randn(30, 8) - 1.5, torch.randn(30, 8) + 1.5
    once = separating_direction(silent, task, seed=0)
    often = separating_direction(silent, torch.cat([task, task[:1].expand(1000, 8)]), seed=0)
    assert torch.equal(once.vector, often.vector)
    assert once.separated == often.separated > 0.9
    assert once.height > 0
