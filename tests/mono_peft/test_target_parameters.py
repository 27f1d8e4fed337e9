"""`target_parameters`: what it names and refuses, and how experts' adapters are kept, saved, replaced and measured."""

import copy

import peft
import pytest
import torch
from accelerate import cpu_offload
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from mono_peft import (
    MonoLoraConfig,
    SparsityCallback,
    activation_sparsity,
    monolora_plus_param_groups,
    replace_adapter,
)
from mono_peft.layer import MonoLoraLayer

PEFT = Version(peft.__version__)
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mixtral():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4)).eval()


def config(targets=BOTH, **options):
    return MonoLoraConfig(**{"r": 4, "init_weights": False, "target_modules": []} | options, target_parameters=targets)


def adapted(base, targets=BOTH, seed=1, **options):
    torch.manual_seed(seed)
    return get_peft_model(base, config(targets, **options)).eval()


def adapted_names(model):
    return {n.partition("layers.")[2] for n, m in model.named_modules() if isinstance(m, MonoLoraLayer)}


class TestNames:
    def test_what_lora_names(self, mixtral):
        """Suffixes, whole names, one layer; together with modules, and beside modules of the model type's default."""
        experts = {f"{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")}
        attention = {f"{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")}
        whole = "model.layers.1.mlp.experts.down_proj"
        for targets, modules, expected in (
            (["down_proj", "gate_up_proj"], [], experts),
            (["0.mlp.experts.down_proj"], [], {"0.mlp.experts.down_proj"}),
            ([whole], [], {"1.mlp.experts.down_proj"}),
            (BOTH, ["q_proj", "v_proj"], experts | attention),
            (BOTH, None, experts | attention),
        ):
            model = copy.deepcopy(mixtral)
            assert adapted_names(inject_adapter_in_model(config(targets, target_modules=modules), model)) == expected

    def test_excluded_ones_stay_as_they_are(self, mixtral):
        for excluded in (["experts.down_proj"], r".*\.1\.mlp\.experts", ["1.mlp.experts"]):
            model = adapted(copy.deepcopy(mixtral), exclude_modules=excluded)
            names = adapted_names(model)
            assert 0 < len(names) < 4
            assert not [n for n in names if (n.startswith("1") if "1" in str(excluded) else n.endswith("down_proj"))]

    def test_unknown_names(self, mixtral):
        with pytest.raises(
            ValueError, match=r"mlp\.up_proj not found.*has: experts\.down_proj, experts\.gate_up_proj\."
        ):
            adapted(mixtral, ["mlp.up_proj", "down_proj"])
        assert adapted_names(mixtral) == set()

    @pytest.mark.parametrize(
        ("target", "reason"),
        [
            ("mlp.gate.weight", r"MixtralTopKRouter does not come through the experts interface of transformers"),
            ("q_proj.weight", r"it belongs to a layer; name 'q_proj' in `target_modules`"),
            ("input_layernorm.weight", r"MixtralRMSNorm does not come through the experts interface"),
        ],
    )
    def test_other_parameters_are_refused(self, mixtral, target, reason):
        with pytest.raises(TypeError, match=rf"target parameter 'model\.layers\.0\..*{target}': {reason}.*down_proj"):
            adapted(mixtral, [*BOTH, target])
        assert adapted_names(mixtral) == set()

    def test_a_bias_of_experts_is_refused(self, mixtral):
        experts = mixtral.model.layers[1].mlp.experts
        experts.down_proj_bias = nn.Parameter(torch.zeros(4, 16))
        with pytest.raises(
            TypeError, match=r"no stacked weight of the experts; MixtralExperts has gate_up_proj and do"
        ):
            adapted(mixtral, ["down_proj_bias"])

    def test_experts_past_the_interface_are_refused(self):
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 8, "intermediate_size_mlp": 8}
        llama4 = Llama4ForCausalLM(
            Llama4TextConfig(**sizes, **heads, num_hidden_layers=1, num_local_experts=2, pad_token_id=0)
        )
        with pytest.raises(
            TypeError, match=r"Llama4TextExperts does not come through the experts interface.*: none\."
        ):
            adapted(llama4, ["experts.down_proj"])

    def test_spread_experts_are_refused(self, mixtral):
        mixtral.model.layers[1].mlp.experts._is_expert_parallel = True
        with pytest.raises(TypeError, match=r"'model\.layers\.1\.mlp.*its experts are spread over processes"):
            adapted(mixtral)
        assert adapted_names(mixtral) == set()

    def test_quantised_experts_are_refused(self, mixtral):
        experts = mixtral.model.layers[0].mlp.experts
        experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
        with pytest.raises(TypeError, match=r"it is quantised or .* load the model unquantised"):
            adapted(mixtral)

    def test_a_parametrised_weight_is_refused(self, mixtral):
        class Half(nn.Module):
            def forward(self, weight):
                return weight / 2

        parametrize.register_parametrization(mixtral.model.layers[0].mlp.experts, "down_proj", Half())
        with pytest.raises(TypeError, match="it is quantised or parametrised"):
            adapted(mixtral, ["layers.0.mlp.experts.down_proj"])

    def test_a_parameter_of_the_model_itself_is_refused(self):
        model = nn.Linear(4, 4)
        with pytest.raises(TypeError, match="'weight': it lies in the model itself"):
            inject_adapter_in_model(config(["weight"]), model)

    def test_stacked_weights_are_no_modules(self, mixtral):
        with pytest.raises(ValueError, match=r"'down_proj', which is a bare .* `target_parameters`; .*experts\.down"):
            get_peft_model(mixtral, MonoLoraConfig(target_modules=["q_proj", "down_proj"]))


class TestConfiguration:
    def test_it_comes_from_lora_and_survives_saving(self, tmp_path):
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=BOTH)
        options = {k: v for k, v in lora.to_dict().items() if k not in ("peft_type", "auto_mapping", "peft_version")}
        ours = MonoLoraConfig(**options)
        assert ours.target_parameters == set(BOTH)
        ours.save_pretrained(tmp_path)
        assert MonoLoraConfig.from_pretrained(tmp_path).target_parameters == set(BOTH)
        assert MonoLoraConfig().target_parameters is None

    def test_what_has_no_meaning_is_refused(self):
        with pytest.raises(ValueError, match="`target_parameters` must be a list of names, got the string 'down"):
            MonoLoraConfig(target_parameters="down_proj")
        with pytest.raises(ValueError, match="`layers_to_transform` chooses among `target_modules` only"):
            MonoLoraConfig(target_modules=["q_proj"], target_parameters=BOTH, layers_to_transform=[0])


class TestAdapters:
    def test_of_different_weights(self, mixtral, tmp_path):
        """On its own, together, loaded in the other order, and one deleted; LoRA wants the same weights in all."""
        if Version("0.20") > PEFT:
            pytest.skip("older PEFT saves the tensors of all adapters in the file of one")
        model = adapted(mixtral, BOTH[:1])
        torch.manual_seed(2)
        model.add_adapter("second", config(BOTH[1:], r=2, activation="softplus"))
        alone = {}
        for name in ("default", "second"):
            model.set_adapter(name)
            alone[name] = model(IDS).logits
        model.save_pretrained(tmp_path)
        model.base_model.set_adapter(["default", "second"])
        together = model(IDS).logits
        assert not torch.allclose(together, alone["default"])

        loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "second", adapter_name="second")
        loaded.load_adapter(tmp_path, adapter_name="default")
        for name in ("default", "second"):
            loaded.set_adapter(name)
            assert torch.equal(loaded(IDS).logits, alone[name])
        loaded.base_model.set_adapter(["default", "second"])
        assert torch.equal(loaded(IDS).logits, together)
        loaded.set_adapter("default")
        loaded.delete_adapter("second")
        assert torch.equal(loaded(IDS).logits, alone["default"])

    def test_two_add_up(self, mixtral):
        """Of the last layer's down projection the update is linear in B, so that it can be told by itself."""
        target = ["1.mlp.experts.down_proj"]
        model = adapted(copy.deepcopy(mixtral), target)
        torch.manual_seed(2)
        model.add_adapter("second", config(target))
        hidden = {}
        model.base_model.model.model.layers[1].register_forward_hook(lambda m, x, y: hidden.update({active: y}))
        for active in ("default", "second", "both"):
            model.base_model.set_adapter(["default", "second"] if active == "both" else active)
            model(IDS)
        active = "none"
        with model.disable_adapter():
            model(IDS)
        updates = {name: hidden[name] - hidden["none"] for name in ("default", "second", "both")}
        torch.testing.assert_close(updates["both"], updates["default"] + updates["second"], rtol=1e-4, atol=1e-5)

    def test_the_scale(self, mixtral):
        model = adapted(mixtral)
        expected = model(IDS).logits
        layers = [m for m in model.modules() if isinstance(m, MonoLoraLayer)]
        for layer in layers:
            layer.set_scale("default", 0)
        with model.disable_adapter():
            base = model(IDS).logits
        assert torch.equal(model(IDS).logits, base)
        for layer in layers:
            layer.set_scale("default", 1)
        assert torch.equal(model(IDS).logits, expected)

    def test_names_of_rows_are_refused(self, mixtral):
        model = adapted(mixtral, target_modules=["q_proj"])
        with pytest.raises(ValueError, match="fused experts, which get the tokens of all rows in one list"):
            model(IDS, adapter_names=["default", "__base__", "default"])
        with pytest.raises(ValueError, match="fused experts"):
            model.generate(input_ids=IDS, adapter_names=["default"] * 3, max_new_tokens=2)

    def test_what_the_experts_compute_with_can_be_changed(self, mixtral):
        """The base's implementation is the user's; it neither stops the adapter nor is it changed by it."""
        model = adapted(mixtral)
        expected = model(IDS).logits
        base = model.get_base_model()
        base.set_experts_implementation("eager")
        assert torch.equal(model(IDS).logits, expected)
        assert base.config._experts_implementation == "eager"
        assert type(model.unload().model.layers[0].mlp.experts.config) is MixtralConfig

    def test_transformers_own_adapters(self, mixtral, tmp_path):
        if Version("0.19") > PEFT:
            pytest.skip("transformers 5.23 loads no adapters of mixtures of experts with PEFT 0.18")
        adapted(copy.deepcopy(mixtral)).save_pretrained(tmp_path / "adapter")
        expected = PeftModel.from_pretrained(copy.deepcopy(mixtral), tmp_path / "adapter").eval()(IDS).logits
        mixtral.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(mixtral.eval()(IDS).logits, expected)

    def test_offloaded_weights_are_there_when_they_are_used(self, mixtral):
        """accelerate's offloading puts weights in place around the call of their module."""
        model = adapted(mixtral)
        expected = model(IDS).logits
        cpu_offload(model, torch.device("cpu"))
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(model(IDS).logits, expected)

    def test_replacing(self, mixtral, tmp_path):
        other = adapted(copy.deepcopy(mixtral), seed=5)
        other.save_pretrained(tmp_path)
        model = adapted(mixtral)
        replace_adapter(model, tmp_path)
        assert torch.equal(model(IDS).logits, other(IDS).logits)
        fewer = adapted(copy.deepcopy(model.unload()), BOTH[:1])
        with pytest.raises(ValueError, match="tensors are missing on one side"):
            replace_adapter(fewer, tmp_path)

    def test_groups_of_lora_plus(self, mixtral):
        encoders, decoders = monolora_plus_param_groups(adapted(mixtral), 1e-3, 16)
        assert {tuple(p.shape) for p in encoders["params"]} == {(4, 4, 16), (4, 4, 24)}
        assert {tuple(p.shape) for p in decoders["params"]} == {(4, 48, 4), (4, 16, 4)}


class TestSaved:
    def test_names_and_shapes(self, mixtral, tmp_path):
        adapted(mixtral, r=3).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        start = "base_model.model.model.layers"
        shapes = {"gate_up_proj": ((4, 3, 16), (4, 48, 3)), "down_proj": ((4, 3, 24), (4, 16, 3))}
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            f"{start}.{layer}.mlp.experts.{name}.monolora_{part}.weight": shape
            for layer in (0, 1)
            for name, both in shapes.items()
            for part, shape in zip(("encoder", "decoder"), both, strict=True)
        }

    def test_a_file_that_does_not_fit(self, mixtral, tmp_path):
        if Version("0.21") > PEFT:
            pytest.skip("older PEFT warns of a file that does not fit")
        adapted(copy.deepcopy(mixtral)).save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if "down_proj" in name)
        save_file({n: t for n, t in tensors.items() if n != name}, file)
        with pytest.raises(ValueError, match=r"1 tensors are missing: model\.layers\.0\.mlp\.experts\.down_proj"):
            PeftModel.from_pretrained(copy.deepcopy(mixtral), tmp_path)
        save_file(tensors | {name: tensors[name][:3]}, file)
        with pytest.raises(RuntimeError, match="size mismatch"):
            PeftModel.from_pretrained(copy.deepcopy(mixtral), tmp_path)


class TestSparsity:
    @pytest.fixture
    def model(self, mixtral):
        return adapted(mixtral, ["gate_up_proj"], r=6, target_modules=["q_proj"])

    def by_hand(self, model, sequences):
        """Zeros and units that fired, token after token, of each layer's gate_up_proj, by module name."""
        zeros, latents, fired = {}, {}, {}
        for name, experts in model.named_modules():
            if not name.endswith(".experts"):
                continue
            encoder = experts.gate_up_proj.monolora_encoder.default.weight

            def count(module, args, name=f"{name}.gate_up_proj", encoder=encoder):
                for x, index in zip(*args[:2], strict=True):
                    for expert in index.tolist():
                        z = torch.relu(encoder[expert] @ x)
                        zeros[name] = zeros.get(name, 0) + int((z == 0).sum())
                        latents[name] = latents.get(name, 0) + 6
                        key = (name, expert)
                        fired[key] = fired.get(key, torch.zeros(6, dtype=torch.bool)) | (z != 0)

            experts.register_forward_pre_hook(count)
        for sequence in sequences:
            model(sequence[None])
        return {name: zeros[name] / latents[name] for name in zeros}, fired

    def test_it_equals_counting_by_hand(self, model):
        mask = (torch.arange(7) < torch.tensor([7, 2, 4])[:, None]).long()
        measured = activation_sparsity(model, [{"input_ids": IDS * mask, "attention_mask": mask}])
        shares, fired = self.by_hand(model, [row[m.bool()] for row, m in zip(IDS, mask, strict=True)])
        assert len(shares) == 2
        assert {n: measured.per_module[n] for n in shares} == pytest.approx(shares)

        only = activation_sparsity(model, [{"input_ids": IDS[:1, :1]}])
        assert len(only.per_module) == 4
        assert measured.dead < 1
        assert all(units.any() for units in fired.values())

    def test_experts_without_a_token_do_not_count(self, mixtral):
        model = adapted(mixtral, ["1.mlp.experts.gate_up_proj"], r=6)
        measured = activation_sparsity(model, [{"input_ids": IDS[:1, :1]}])
        assert measured.overall == pytest.approx(measured.dead)  # of one token, what is zero is dead
        assert 12 * measured.dead == pytest.approx(round(12 * measured.dead))  # 2 of 4 experts, 6 units each
        assert 0 < measured.dead < 1
        ((name, units),) = measured.dead_units.items()
        reached = set()
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda m, args: reached.update(args[1].experts.tolist()))
        latents = []
        layer.monolora_activation.default.register_forward_hook(lambda m, args, output: latents.append(output))
        model(IDS[:1, :1])
        fired = {
            6 * e + i
            for e, row in zip(sorted(reached), latents[0], strict=True)
            for i in row.nonzero().flatten().tolist()
        }
        assert set(units) == {6 * e + i for e in reached for i in range(6)} - fired
        model.base_model.model.model.layers[1].mlp.experts.gate_up_proj.monolora_encoder.default.weight.data.zero_()
        assert activation_sparsity(model, [{"input_ids": IDS}]).dead == 1

    def test_the_callback(self, model, tmp_path):
        rows = [{"input_ids": row, "labels": row} for row in IDS]
        arguments = TrainingArguments(str(tmp_path), max_steps=2, logging_steps=1, report_to=[], use_cpu=True)
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.add_callback(SparsityCallback(trainer, [{"input_ids": IDS}]))
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        assert all(0 < line["monolora_sparsity"] < 1 for line in lines)


def test_a_model_saved_with_its_base_name_loads_by_itself(mixtral, tmp_path):
    if Version("0.19") > PEFT:
        pytest.skip("transformers 5.23 loads no adapters of mixtures of experts with PEFT 0.18")
    mixtral.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
