"""Units switched off, scaled and pruned: equal to latents set to zero, and nothing is left of it afterwards."""

import copy
from collections import Counter

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_bases import ConvNet, Signals, Tokens, bert, gpt2, llama, mixtral, t5

from mono_peft import MonoLoraConfig
from mono_peft.layer import ACTIVATIONS, MonoLoraLayer
from mono_peft.units import Unit, ablated, prune, scaled

IDS = torch.randint(1, 50, (4, 6), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
BASES = {
    "llama": (llama, {"target_modules": "all-linear"}, {"input_ids": IDS}),
    "llama patterns": (
        llama,
        {"rank_pattern": {"layers.0.*v_proj": 3}, "alpha_pattern": {".*q_proj": 30}, "use_rslora": True},
        {"input_ids": IDS},
    ),
    "llama, bias of the encoder": (llama, {"encoder_bias": True}, {"input_ids": IDS}),
    "llama embedding": (llama, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}, {"input_ids": IDS}),
    "llama topk": (
        llama,
        {"target_modules": "all-linear", "activation": "topk", "k": 2, "encoder_bias": True},
        {"input_ids": IDS},
    ),
    "gpt2": (gpt2, {}, {"input_ids": IDS}),
    "bert": (bert, {"task_type": "SEQ_CLS"}, {"input_ids": IDS}),
    "t5": (t5, {"task_type": "SEQ_2_SEQ_LM"}, {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}),
    "convolutions": (ConvNet, {"target_modules": ["stem", "grouped", "head"]}, {"x": PIXELS}),
    "signals": (Signals, {"target_modules": ["signal", "volume"]}, {"x": PIXELS[:, :, 0]}),
    "table": (Tokens, {"target_modules": ["table"]}, {"x": IDS}),
}
every_base = pytest.mark.parametrize("kind", BASES)


def adapted(kind, **options):
    base, own, inputs = BASES[kind]
    torch.manual_seed(0)
    model = base()
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 40, "init_weights": False} | own | options
    return get_peft_model(model, MonoLoraConfig(**options)).eval(), inputs


def output(model, inputs):
    result = model(**inputs)
    return getattr(result, "logits", result)


def chosen_units(model, adapter="default"):
    """Two units of each second layer, one of the others."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, MonoLoraLayer)]
    return [Unit(n, i) for place, (n, m) in enumerate(layers) for i in range(m.r[adapter])[: 1 + place % 2]]


def with_latents(model, inputs, units, factor, adapter="default"):
    """The output where hooks multiply the units' latents, the slow and obvious way."""
    handles = []
    for module, index in units:
        layer = model.get_submodule(module)

        def hook(activation, args, latents, index=index, dim=layer.units_dim):
            factors = torch.ones(latents.shape[dim])
            factors[index] = factor
            return latents * factors.view(-1, *[1] * (-1 - dim))

        handles.append(layer.monolora_activation[adapter].register_forward_hook(hook))
    result = output(model, inputs)
    for handle in handles:
        handle.remove()
    return result


class TestSwitchedOffAndScaled:
    @every_base
    @pytest.mark.parametrize("gradient", [False, True])
    def test_it_equals_latents_that_are_multiplied(self, kind, gradient):
        model, inputs = adapted(kind)
        units = chosen_units(model)
        with torch.set_grad_enabled(gradient):
            plain = output(model, inputs)
            changes = [(0, ablated(model, units)), (-1.7, scaled(model, units, -1.7))]
            for factor, change in changes[kind == "llama topk" :]:  # others take the place of what is ablated there
                with change:
                    result = output(model, inputs)
                torch.testing.assert_close(result, with_latents(model, inputs, units, factor), rtol=1e-4, atol=1e-5)
                assert (result - plain).abs().max() > 1e-3
            assert torch.equal(output(model, inputs), plain)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_every_sigma(self, activation):
        model, inputs = adapted("llama", activation=activation)
        units = chosen_units(model)
        with torch.no_grad(), ablated(model, units):
            result = output(model, inputs)
        torch.testing.assert_close(result, with_latents(model, inputs, units, 0), rtol=1e-4, atol=1e-5)

    def test_all_units_off_is_the_base(self):
        model, inputs = adapted("llama")
        every = [
            Unit(n, i) for n, m in model.named_modules() if isinstance(m, MonoLoraLayer) for i in range(m.r["default"])
        ]
        with torch.no_grad(), ablated(model, every):
            result = output(model, inputs)
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(result, output(model, inputs))

    def test_training_inside_reaches_the_other_units_only(self):
        model, inputs = adapted("llama", target_modules=["q_proj"], init_weights=True)
        name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, MonoLoraLayer))
        layer.train()
        with ablated(model, [Unit(name, 1)]):
            assert type(layer(torch.randn(2, 16)).grad_fn).__name__ == "_ReluUpdateBackward"
            output(model, inputs).square().sum().backward()
        gradient = layer.monolora_decoder["default"].weight.grad
        assert (gradient[:, 1] == 0).all()
        assert (gradient[:, [0, 2, 3]] != 0).any(0).all()

    def test_a_backward_pass_that_ends_outside_raises(self):
        model, inputs = adapted("llama")
        with ablated(model, chosen_units(model)):
            loss = output(model, inputs).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_nothing_is_left_of_it_also_after_an_error_and_nested(self):
        model, _ = adapted("llama", lora_dropout=0.1)
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, MonoLoraLayer)]
        with torch.no_grad():  # bits that arithmetic would lose
            layers[0][1].monolora_decoder["default"].weight[0, :2] = torch.tensor([-0.0, float("inf")])
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        units = [Unit(name, i) for name, _ in layers for i in (0, 1)]
        with scaled(model, units, 1 / 3), ablated(model, units[:3]), scaled(model, units[2:], -5):
            inside = layers[0][1].monolora_decoder["default"].weight
            assert not inside[:, :2].any()
            assert not torch.equal(inside[:, 2:], torch.zeros_like(inside[:, 2:]))
        with pytest.raises(KeyError), ablated(model, units):
            raise KeyError
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), name

    def test_nested_scales_multiply_and_inner_ones_end_first(self):
        model, inputs = adapted("llama")
        units = chosen_units(model)
        with torch.no_grad(), scaled(model, units, 3):
            outer = output(model, inputs)
            with scaled(model, units[:1], 2):
                both = output(model, inputs)
            assert torch.equal(output(model, inputs), outer)
        with torch.no_grad(), scaled(model, units[:1], 6), scaled(model, units[1:], 3):
            torch.testing.assert_close(output(model, inputs), both)

    def test_the_adapter_is_named_where_there_are_several(self):
        model, inputs = adapted("llama")
        torch.manual_seed(5)
        model.add_adapter("wide", MonoLoraConfig(r=7, init_weights=False))
        name = chosen_units(model)[0].module
        unit = [Unit(name, 6)]
        with pytest.raises(ValueError, match=r"unit 6 of .* does not exist: it has the units 0 to 3"):
            ablated(model, unit).__enter__()
        with pytest.raises(ValueError, match="no MonoLoRA adapter 'narrow'"):
            ablated(model, unit, "narrow").__enter__()
        model.base_model.set_adapter(["default", "wide"])
        with pytest.raises(ValueError, match="the adapters default, wide are active: say by `adapter_name`"):
            ablated(model, unit).__enter__()
        with torch.no_grad(), ablated(model, unit, "wide"):
            result = output(model, inputs)
        with torch.no_grad():
            reference = with_latents(model, inputs, unit, 0, "wide")
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5)
        model.set_adapter("default")
        rows = {"adapter_names": ["default", "wide", "__base__", "wide"]}
        with torch.no_grad():
            plain = output(model, inputs | rows)
            with ablated(model, unit, "wide"):
                result = output(model, inputs | rows)
        assert [torch.equal(a, b) for a, b in zip(result, plain, strict=True)] == [True, False, True, False]

    def test_a_compiled_model_sees_it(self):
        model, inputs = adapted("llama")
        compiled = torch.compile(model, backend="aot_eager")
        units = chosen_units(model)
        with torch.no_grad():
            plain = output(compiled, inputs)
            with ablated(compiled, units):
                result = output(compiled, inputs)
            torch.testing.assert_close(result, with_latents(model, inputs, units, 0), rtol=1e-4, atol=1e-5)
            assert torch.equal(output(compiled, inputs), plain)

    def test_one_unit_of_one_expert(self):
        model, inputs, name = mixture()
        with torch.no_grad():
            plain = output(model, inputs)
            reference = copy.deepcopy(model)
            reference.get_submodule(name).monolora_decoder["default"].weight[2, :, 1] = 0
            with ablated(model, [Unit(name, 2 * 4 + 1)]):
                result = output(model, inputs)
        assert torch.equal(result, output(reference, inputs))
        assert not torch.equal(result, plain)


def mixture(**options):
    torch.manual_seed(0)
    options = {
        "target_modules": [],
        "target_parameters": ["mlp.experts.down_proj"],
        "r": 4,
        "encoder_bias": True,
    } | options
    model = get_peft_model(mixtral(), MonoLoraConfig(init_weights=False, **options)).eval()
    return model, {"input_ids": IDS}, "base_model.model.model.layers.0.mlp.experts.down_proj"


class TestPruned:
    @every_base
    @pytest.mark.parametrize("from_folder", [False, True])
    def test_it_equals_ablation(self, kind, from_folder, tmp_path):
        model, inputs = adapted(kind)
        units = chosen_units(model)
        with torch.no_grad(), ablated(model, units):
            expected = output(model, inputs)
        model.save_pretrained(tmp_path / "whole")
        prune(tmp_path / "whole" if from_folder else model, units, tmp_path / "pruned")
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(BASES[kind][0](), tmp_path / "pruned").eval()
        with torch.no_grad():
            torch.testing.assert_close(output(loaded, inputs), expected, rtol=1e-4, atol=1e-5)
        removed = Counter(unit.module for unit in units)
        for name, layer in model.named_modules():
            if isinstance(layer, MonoLoraLayer):
                small = loaded.get_submodule(name)
                assert small.r["default"] == layer.r["default"] - removed[name]
                assert small.scaling["default"] == pytest.approx(layer.scaling["default"], rel=1e-12)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_every_sigma_and_a_module_without_units(self, activation, tmp_path):
        model, inputs = adapted("llama", activation=activation, target_modules=["q_proj", "up_proj"])
        empty = "base_model.model.model.layers.1.mlp.up_proj"
        units = [*chosen_units(model), *(Unit(empty, i) for i in range(4))]
        with torch.no_grad(), ablated(model, units):
            expected = output(model, inputs)
        prune(model, units, tmp_path)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
        layer = loaded.get_submodule(empty)
        assert layer.r["default"] == 1
        x = torch.randn(3, 16)
        assert torch.equal(layer(x), layer.base_layer(x))
        with torch.no_grad():
            torch.testing.assert_close(output(loaded, inputs), expected, rtol=1e-4, atol=1e-5)

    def test_it_trains_on_is_saved_and_pruned_again(self, tmp_path):
        model, inputs = adapted("llama", task_type="CAUSAL_LM")
        name = "model.layers.0.self_attn.q_proj"  # without PEFT's prefix
        prune(model, [Unit(name, 0)], tmp_path / "once")
        prune(tmp_path / "once", [Unit(name, 2)], tmp_path / "twice")
        with torch.no_grad(), ablated(model, [Unit(name, 0), Unit(name, 3)]):
            expected = output(model, inputs)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(llama(), tmp_path / "twice", is_trainable=True)
        with torch.no_grad():
            torch.testing.assert_close(output(loaded.eval(), inputs), expected, rtol=1e-4, atol=1e-5)
        assert loaded.get_submodule(f"base_model.model.{name}").r["default"] == 2
        optimizer = torch.optim.SGD((p for p in loaded.parameters() if p.requires_grad), 0.1)
        loaded(**inputs, labels=IDS).loss.backward()
        optimizer.step()
        loaded.save_pretrained(tmp_path / "trained")
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(llama(), tmp_path / "trained").eval()
        assert torch.equal(output(again, inputs), output(loaded, inputs))

    def test_what_else_the_adapter_has_stays(self, tmp_path):
        model, inputs = adapted("llama", modules_to_save=["lm_head"], bias="monolora_only")
        torch.manual_seed(2)
        model.add_adapter("second", MonoLoraConfig(r=5, init_weights=False, target_modules=["k_proj"]))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        unit = [Unit("model.layers.1.self_attn.q_proj", 0)]
        prune(model, unit, tmp_path / "first")
        prune(model, [Unit("model.layers.1.self_attn.k_proj", 4)], tmp_path / "second", "second")
        with torch.no_grad(), ablated(model, unit):
            expected = output(model, inputs)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(llama(), tmp_path / "first").eval()
        with torch.no_grad():
            torch.testing.assert_close(output(loaded, inputs), expected, rtol=1e-4, atol=1e-5)
        torch.manual_seed(0)
        second = PeftModel.from_pretrained(llama(), tmp_path / "second")
        ranks = [m.r["default"] for m in second.modules() if isinstance(m, MonoLoraLayer)]
        assert ranks == [5, 4]

    @pytest.mark.parametrize("from_folder", [False, True])
    @pytest.mark.parametrize("encoder_bias", [False, True])
    def test_experts_with_unequal_numbers_of_units(self, from_folder, encoder_bias, tmp_path):
        model, inputs, name = mixture(encoder_bias=encoder_bias)
        units = [Unit(name, i) for i in (0, 2, 5, 8, 9, 10, 11, 13, 15)]  # 2, 1, 4 and 2 of the four experts
        with torch.no_grad(), ablated(model, units):
            expected = output(model, inputs)
        model.save_pretrained(tmp_path / "whole")
        prune(tmp_path / "whole" if from_folder else model, units, tmp_path / "pruned")
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(mixtral(), tmp_path / "pruned").eval()
        assert loaded.get_submodule(name).r["default"] == 3
        with torch.no_grad():
            torch.testing.assert_close(output(loaded, inputs), expected, rtol=1e-4, atol=1e-5)

    def test_a_layer_that_shapes_do_not_tell(self, tmp_path):
        model, inputs = adapted("table", r=50)
        model.save_pretrained(tmp_path / "whole")
        units = [Unit("base_model.model.table", 7)]
        with pytest.raises(ValueError, match=r"whether table is a linear layer or an embedding .* give `prune` the"):
            prune(tmp_path / "whole", units, tmp_path / "pruned")
        assert not (tmp_path / "pruned").exists()
        prune(model, units, tmp_path / "pruned")
        with torch.no_grad(), ablated(model, units):
            expected = output(model, inputs)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(Tokens(), tmp_path / "pruned").eval()
        torch.testing.assert_close(output(loaded, inputs), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("removed", [2, 5])
    def test_topk_lets_the_next_ones_in_and_keeps_k_places(self, removed, tmp_path):
        model, _ = adapted("llama topk", r=6, k=3)
        name = "model.layers.0.self_attn.q_proj"
        layer = model.get_submodule(f"base_model.model.{name}")
        x = torch.randn(40, 16, generator=torch.Generator().manual_seed(7))
        units = [Unit(name, i) for i in range(removed)]
        encoder, decoder = layer.monolora_encoder["default"], layer.monolora_decoder["default"].weight
        z = torch.relu(x @ encoder.weight[removed:].T + encoder.bias[removed:])
        z = torch.where(z >= z.topk(min(3, 6 - removed)).values[:, -1:], z, 0)
        expected = layer.base_layer(x) + layer.scaling["default"] * z @ decoder[:, removed:].T
        with ablated(model, units):
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        prune(model, units, tmp_path)
        torch.manual_seed(0)
        small = PeftModel.from_pretrained(llama(), tmp_path).eval().get_submodule(f"base_model.model.{name}")
        assert small.r["default"] == max(3, 6 - removed)
        torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)


class TestBadInput:
    @pytest.mark.parametrize(
        ("units", "message"),
        [
            (
                [Unit("model.layers.0.self_attn.q_proj", 4)],
                r"unit 4 of .* does not exist: it has the units 0 to 3",
            ),
            ([Unit("model.layers.0.self_attn.q_proj", -1)], "unit -1 of .* does not exist"),
            ([Unit("model.layers.0.self_attn.q_proj", True)], "unit True of .* does not exist"),
            ([Unit("q_proj", 0)], r"no module 'q_proj'; it has model.layers.0.self_attn.q_proj, "),
            (Unit("model.layers.0.self_attn.q_proj", 0), "must be a list of Unit.*got 'model.layers.0"),
            (["model.layers.0.self_attn.q_proj"], "must be a list of Unit"),
        ],
    )
    def test_units_that_do_not_exist(self, units, message, tmp_path):
        model, _ = adapted("llama", target_modules=["q_proj"])
        model.save_pretrained(tmp_path / "whole")
        for attempt in (
            lambda: ablated(model, units).__enter__(),
            lambda: scaled(model, units, 2).__enter__(),
            lambda: prune(model, units, tmp_path / "pruned"),
            lambda: prune(tmp_path / "whole", units, tmp_path / "pruned"),
        ):
            with pytest.raises(ValueError, match=message):
                attempt()
        assert not (tmp_path / "pruned").exists()

    @pytest.mark.parametrize("factor", [float("nan"), float("inf"), None, True])
    def test_factors(self, factor):
        model, _ = adapted("llama")
        with pytest.raises(ValueError, match="`factor` must be a finite number"):
            scaled(model, [], factor).__enter__()

    def test_adapters_of_other_kinds_and_none(self, tmp_path):
        model = get_peft_model(llama(), LoraConfig())
        model.save_pretrained(tmp_path / "lora")
        with pytest.raises(ValueError, match="no active MonoLoRA adapter"):
            ablated(model, []).__enter__()
        with pytest.raises(ValueError, match="holds a LORA adapter"):
            prune(tmp_path / "lora", [], tmp_path / "pruned")
        with pytest.raises(ValueError, match="no active MonoLoRA adapter"):
            prune(llama(), [], tmp_path / "pruned")

    def test_folders_that_cannot_be_read_or_written(self, tmp_path):
        model, _ = adapted("llama")
        model.save_pretrained(tmp_path / "whole")
        with pytest.raises(ValueError, match="holds an adapter already"):
            prune(tmp_path / "whole", [], tmp_path / "whole")
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            prune(tmp_path / "missing", [], tmp_path / "pruned")
        path = tmp_path / "whole" / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file({n: torch.full_like(t, float("nan")) for n, t in tensors.items()}, path)
        with pytest.raises(ValueError, match="NaN or infinity"):
            prune(tmp_path / "whole", [], tmp_path / "pruned")
        save_file({n: t[:1].clone() for n, t in tensors.items()}, path)
        with pytest.raises(ValueError, match="do not fit its configuration, by which r is 4"):
            prune(tmp_path / "whole", [], tmp_path / "pruned")
        assert not (tmp_path / "pruned").exists()

    def test_weights_out_of_reach(self):
        model, _ = adapted("llama")
        unit = chosen_units(model)[:1]
        layer = model.get_submodule(unit[0].module)
        layer.monolora_decoder["default"].to("meta")
        with pytest.raises(ValueError, match="sharded, offloaded or parametrised"):
            ablated(model, unit).__enter__()
