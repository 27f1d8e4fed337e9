"""MonoLoRA inside PEFT: injection, several adapters, saving and loading, and what is refused."""

import copy

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from timm.layers import Conv2dSame
from torch import nn

from mono_peft import MonoLoraConfig, MonoLoraLayer


def adapted_names(model):
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, MonoLoraLayer)}


class TestInjection:
    def test_the_adapted_model_starts_equal_to_the_base(self, llama, input_ids):
        expected = llama(input_ids).logits
        model = get_peft_model(llama, MonoLoraConfig(task_type="CAUSAL_LM"))
        assert torch.equal(model(input_ids).logits, expected)

    def test_default_targets_are_those_of_lora(self, random_adapter, llama):
        assert adapted_names(random_adapter(llama)) == {"q_proj", "v_proj"}

    def test_all_linear(self, random_adapter, llama):
        model = random_adapter(llama, target_modules="all-linear")
        projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert adapted_names(model) == projections

    def test_conv1d(self, random_adapter, gpt2, input_ids):
        expected = gpt2(input_ids).logits
        model = random_adapter(gpt2, target_modules=["c_attn", "c_fc", "c_proj"])
        layer = model.base_model.model.transformer.h[0].attn.c_attn
        assert layer.monolora_encoder.default.weight.shape == (4, 32)
        assert layer.monolora_decoder.default.weight.shape == (96, 4)
        assert not torch.allclose(model(input_ids).logits, expected)

    def test_patterns_and_layers(self, random_adapter, llama):
        model = random_adapter(
            llama,
            target_modules=["q_proj", "v_proj"],
            layers_to_transform=[1],
            rank_pattern={"q_proj": 2},
            alpha_pattern={"v_proj": 16},
        )
        layers = model.base_model.model.model.layers
        assert not isinstance(layers[0].self_attn.q_proj, MonoLoraLayer)
        attention = layers[1].self_attn
        assert (attention.q_proj.r["default"], attention.v_proj.r["default"]) == (2, 4)
        assert (attention.q_proj.scaling["default"], attention.v_proj.scaling["default"]) == (8 / 2, 16 / 4)

    def test_excluded_modules(self, random_adapter, llama):
        model = random_adapter(llama, target_modules="all-linear", exclude_modules=["q_proj", r"mlp.down_proj"])
        assert adapted_names(model) == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}

    def test_only_adapter_weights_require_gradients(self, llama):
        model = get_peft_model(llama, MonoLoraConfig())
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == {name for name, _ in model.named_parameters() if "monolora_" in name}
        assert len(trainable) == 2 * 2 * 2

    def test_inject_adapter_in_model(self, random_adapter, llama, input_ids):
        wrapped = random_adapter(copy.deepcopy(llama))
        tensors = get_peft_model_state_dict(wrapped)
        assert len(tensors) == 8
        assert all("default" not in name for name in tensors)
        model = inject_adapter_in_model(MonoLoraConfig(r=4, target_modules=["q_proj", "v_proj"]), llama).eval()
        tensors = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
        assert not set_peft_model_state_dict(model, tensors).unexpected_keys
        assert torch.equal(model(input_ids).logits, wrapped(input_ids).logits)

    def test_targets_that_match_nothing(self, llama):
        message = r"Target modules query, value not found .* This model has: down_proj, .*q_proj, up_proj, v_proj"
        with pytest.raises(ValueError, match=message):
            get_peft_model(llama, MonoLoraConfig(target_modules=["query", "value"]))
        with pytest.raises(ValueError, match=r"Target modules 'query\.\*' not found"):
            get_peft_model(llama, MonoLoraConfig(target_modules="query.*"))

    def test_one_target_of_several_that_matches_nothing_is_warned_about(self, llama):
        with pytest.warns(UserWarning, match="`target_modules` match no module and are ignored: w1"):
            get_peft_model(llama, MonoLoraConfig(target_modules=["q_proj", "w1"]))

    @pytest.mark.parametrize(
        ("target", "reason"),
        [
            ("norm", "it is a LlamaRMSNorm"),
            ("self_attn", "it is a LlamaAttention"),
        ],
    )
    def test_a_layer_that_cannot_be_adapted_leaves_the_model_as_it_was(self, llama, target, reason):
        before = [name for name, _ in llama.named_modules()]
        with pytest.raises(TypeError, match=f"cannot adapt the target module '.*{target}': {reason}"):
            get_peft_model(llama, MonoLoraConfig(target_modules=["q_proj", target]))
        assert [name for name, _ in llama.named_modules()] == before
        assert adapted_names(llama) == set()

    @pytest.mark.parametrize(
        ("layer", "reason"),
        [
            (nn.ConvTranspose2d(3, 4, 3), "it is a ConvTranspose2d"),
            (nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), "it pads with padding_mode='circular'"),
            (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "it pads with padding_mode='reflect'"),
            (nn.Conv3d(3, 4, 3, padding=1, padding_mode="replicate"), "it pads with padding_mode='replicate'"),
            (Conv2dSame(3, 4, 3), "Conv2dSame has a forward of its own"),
        ],
    )
    def test_convolutions_that_cannot_be_adapted(self, layer, reason):
        with pytest.raises(TypeError, match=f"'0': {reason}"):
            get_peft_model(nn.Sequential(layer), MonoLoraConfig(target_modules=["0"]))

    def test_separate_experts(self):
        model = nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 4)}) for _ in range(2))})
        assert adapted_names(inject_adapter_in_model(MonoLoraConfig(target_modules=["w1"]), model)) == {"w1"}

    def test_multihead_attention_cannot_be_adapted(self):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
        with pytest.raises(
            TypeError, match="'attention': it gives its weights to a fused function, which LoRA merges"
        ):
            get_peft_model(model, MonoLoraConfig(target_modules=["attention"]))

    def test_multihead_attention_bypasses_its_projection(self):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
        with pytest.raises(TypeError, match=r"'attention\.out_proj': MultiheadAttention\.forward reads its weight"):
            get_peft_model(model, MonoLoraConfig(target_modules=["out_proj"]))

    def test_all_linear_stops_before_such_a_projection(self):
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2)})
        with pytest.raises(TypeError, match=r"'attention\.out_proj'.* can be adapted: a\."):
            inject_adapter_in_model(MonoLoraConfig(target_modules="all-linear"), model)
        assert type(model["a"]) is nn.Linear
        config = MonoLoraConfig(target_modules="all-linear", exclude_modules=["out_proj"])
        assert adapted_names(inject_adapter_in_model(config, model)) == {"a"}

    def test_tensor_parallel_layers_are_refused(self, llama):
        llama.model.layers[0].self_attn.q_proj._hf_tp_plan = "colwise"
        with pytest.raises(TypeError, match="sharded by tensor parallelism, and sigma needs the whole of A x"):
            get_peft_model(llama, MonoLoraConfig())

    def test_layers_that_do_not_exist(self, llama):
        config = MonoLoraConfig(target_modules=["q_proj"], layers_to_transform=[7])
        with pytest.raises(ValueError, match=r"q_proj not found in layers_to_transform=\[7\] of the base model"):
            get_peft_model(llama, config)

    def test_bias_trains_and_is_saved_or_is_refused(self, tmp_path):
        from peft.tuners.tuners_utils import BaseTuner

        base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        config = MonoLoraConfig(target_modules=["0"], bias="lora_only")
        if not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            with pytest.raises(ValueError, match=r"needs peft >= 0\.21"):
                get_peft_model(base, config)
            return
        model = get_peft_model(base, config)
        bias = model.base_model.model[0].base_layer.bias
        assert bias.requires_grad
        assert not model.base_model.model[1].bias.requires_grad
        bias.data.fill_(7)
        model.save_pretrained(tmp_path)
        fresh = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tmp_path)
        assert torch.equal(fresh.base_model.model[0].base_layer.bias, torch.full((4,), 7.0))


class TestSeveralAdapters:
    @pytest.fixture
    def two(self, random_adapter, llama):
        model = random_adapter(llama, "first")
        torch.manual_seed(5)
        model.add_adapter("second", MonoLoraConfig(r=2, activation="sigmoid", init_weights=False))
        return model.eval()

    def test_a_pattern_that_also_matches_inside_the_first(self, random_adapter, llama):
        model = random_adapter(llama, "first", target_modules=r".*proj.*")
        model.add_adapter("second", MonoLoraConfig(target_modules=r".*proj.*"))
        assert len([n for n, _ in model.named_parameters() if ".second." in n]) == 2 * 7 * 2

    def test_offsets_without_an_activated_adapter(self, two, input_ids):
        with pytest.raises(ValueError, match="`alora_offsets` is for activated adapters"):
            two(input_ids, alora_offsets=[1, 2, 3])

    def test_switching_and_disabling(self, two, llama, input_ids):
        first = two(input_ids).logits
        two.set_adapter("second")
        second = two(input_ids).logits
        assert not torch.allclose(first, second)
        two.set_adapter("first")
        assert torch.equal(two(input_ids).logits, first)
        with two.disable_adapter():
            base = two(input_ids).logits
        assert torch.equal(two.unload()(input_ids).logits, base)
        assert not torch.allclose(base, first)

    def test_an_added_adapter_does_not_train_before_it_is_active(self, two):
        trains = {n: p.requires_grad for n, p in two.named_parameters() if "monolora_" in n}
        assert {n for n, t in trains.items() if t} == {n for n in trains if ".first." in n}
        two.set_adapter("second")
        trains = {n: p.requires_grad for n, p in two.named_parameters() if "monolora_" in n}
        assert {n for n, t in trains.items() if t} == {n for n in trains if ".second." in n}

    def test_both_active_adds_their_updates(self, two):
        layer = two.base_model.model.model.layers[0].self_attn.q_proj
        x = torch.randn(3, 32)
        two.base_model.set_adapter(["first", "second"])
        expected = layer.base_layer(x) + layer.update("first", x) + layer.update("second", x)
        torch.testing.assert_close(layer(x), expected)

    def test_deleting(self, two, input_ids):
        second = two
        second.set_adapter("second")
        expected = second(input_ids).logits
        second.delete_adapter("first")
        assert list(second.peft_config) == ["second"]
        assert not [name for name in second.state_dict() if ".first." in name]
        layer = second.base_model.model.model.layers[0].self_attn.q_proj
        for attribute in layer.adapter_layer_names + layer.other_param_names:
            assert list(getattr(layer, attribute)) == ([] if attribute == "monolora_invocations" else ["second"])
        assert torch.equal(second(input_ids).logits, expected)

    def test_two_adapters_of_one_name(self, two):
        with pytest.raises(ValueError, match=r"already exists|adapter named 'first' already"):
            two.add_adapter("first", MonoLoraConfig())

    def test_another_method_in_one_model(self, two):
        with pytest.raises(ValueError, match=r"different peft types|same type"):
            two.add_adapter("lora", LoraConfig())

    def test_helpers_for_linear_methods_refuse(self, two, llama):
        with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
            get_peft_model(llama, MonoLoraConfig(), mixed=True)
        scaled = rescale_adapter_scale(two, 2)
        with pytest.raises(ValueError, match="only supported for models with `LoraLayer`"), scaled:
            pass

    def test_rows_of_a_batch_with_their_own_adapters(self, two, input_ids):
        one_at_a_time = []
        for name, row in zip(["second", "__base__", "first"], input_ids, strict=True):
            if name == "__base__":
                with two.disable_adapter():
                    one_at_a_time.append(two(row[None]).logits)
            else:
                two.set_adapter(name)
                one_at_a_time.append(two(row[None]).logits)
        mixed = two(input_ids, adapter_names=["second", "__base__", "first"]).logits
        torch.testing.assert_close(mixed, torch.cat(one_at_a_time))
        assert not any(module._forward_pre_hooks for module in two.modules())

    @pytest.mark.parametrize("beams", [1, 2])
    def test_generating_with_an_adapter_per_row(self, two, input_ids, beams):
        options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
        mixed = two.generate(input_ids=input_ids, adapter_names=["first", "second", "first"], **options)
        two.set_adapter("second")
        alone = two.generate(input_ids=input_ids[1:2], **options)
        assert torch.equal(mixed[1:2, : alone.shape[1]], alone)

    def test_wrong_adapter_names(self, two, input_ids):
        with pytest.raises(ValueError, match=r"non-existing adapter\(s\): third; this model has first, second"):
            two(input_ids, adapter_names=["first", "third", "first"])
        with pytest.raises(ValueError, match="number of inputs, but got 2 and 3 respectively"):
            two(input_ids, adapter_names=["first", "second"])
        two.train()
        with pytest.raises(ValueError, match="training mode"):
            two(input_ids, adapter_names=["first"] * 3)


class TestMerging:
    @pytest.mark.parametrize("action", ["merge_adapter", "merge_and_unload", "add_weighted_adapter", "layer"])
    def test_it_is_refused_and_the_model_is_untouched(self, random_adapter, llama, input_ids, action):
        model = random_adapter(llama)
        expected, before = model(input_ids).logits, {n: v.clone() for n, v in model.state_dict().items()}
        call = {
            "layer": model.base_model.model.model.layers[0].self_attn.q_proj.merge,
            "add_weighted_adapter": lambda: model.add_weighted_adapter(["default"], [1.0], "merged"),
        }.get(action) or getattr(model, action)
        with pytest.raises(NotImplementedError, match="merge"):
            call()
        assert torch.equal(model(input_ids).logits, expected)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) for n in before)
        assert list(model.peft_config) == ["default"]

    def test_the_message_says_why_and_what_to_do(self, random_adapter, llama):
        with pytest.raises(NotImplementedError, match=r"not linear in x.*PeftModel\.from_pretrained.*LoraConfig"):
            random_adapter(llama).merge_and_unload()

    def test_unmerging_warns_once(self, random_adapter, llama):
        model = random_adapter(llama)
        with pytest.warns(UserWarning, match="never merged") as warned:
            model.unmerge_adapter()
        assert len(warned) == 1
