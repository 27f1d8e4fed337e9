"""Without a gradient, a linear layer past the calls of its modules equals the modules called one by one."""

import copy
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.nn.utils import prune
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from mono_peft import MonoLoraConfig, activation_sparsity, direct
from mono_peft.layer import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def adapted(base=None, adapter_dtype=None, **options):
    """A model of one adapted layer in evaluation, and the layer."""
    options = {"r": 3, "lora_alpha": 5, "init_weights": False, "target_modules": ["0"]} | options
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(base or nn.Linear(6, 5)), MonoLoraConfig(**options)).eval()
    layer = model.base_model.model[0]
    for module in (layer.monolora_encoder, layer.monolora_decoder):
        module.to(adapter_dtype)
    return model, layer


def one_by_one(layer, x, names=("default",)):
    """The modules one by one, each called."""
    result = layer.base_layer(x)
    for name in names:
        encoder = layer.monolora_encoder[name]
        latents = layer.monolora_activation[name](encoder(layer.monolora_dropout[name](x.to(encoder.weight.dtype))))
        update = layer.monolora_decoder[name](latents)
        result = torch.add(result, update.to(result.dtype), alpha=layer.scaling[name])
    return result


@contextmanager
def counted_calls():
    """The modules that are called, through which the short way does not go."""
    called = []
    original = nn.Module._call_impl

    def call(module, *args, **kwargs):
        called.append(module)
        return original(module, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__call__", call)
        yield called


def called_modules(layer, x):
    with torch.no_grad(), counted_calls() as called:
        layer(x)
    return called


@settings(max_examples=80, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
    adapter_dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    transposed=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
    mode=st.sampled_from([torch.no_grad, torch.inference_mode]),
    autocast=st.sampled_from([None, torch.bfloat16, torch.float16]),
)
def test_it_equals_the_modules_one_by_one(
    lead, sizes, activation, dtype, adapter_dtype, bias, transposed, dropout, mode, autocast
):
    d_in, d_out, r = sizes
    base = nn.Linear(d_in, d_out, bias=bias).to(dtype)
    _, layer = adapted(base, adapter_dtype, r=r, activation=activation, lora_dropout=dropout)
    x = torch.randn(*lead, d_in).to(dtype)
    if transposed:
        x = torch.randn(d_in, *lead).to(dtype).movedim(0, -1)
    kept = x.clone()
    with mode(), nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        assert direct.linear_forward(layer, x) is not None
        result, expected = layer(x), one_by_one(layer, x)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(x, kept)
    assert not result.requires_grad


def test_it_calls_no_module_but_the_layer():
    _, layer = adapted()
    assert called_modules(layer, torch.randn(2, 6)) == [layer]


def test_what_it_read_may_change_between_calls():
    """Nothing is remembered: weights, dtypes, scales, adapters and bases are those of the moment."""
    model, layer = adapted()
    x = torch.randn(4, 6)

    def replace_weight():
        layer.monolora_encoder.default.weight = nn.Parameter(torch.randn(3, 6))

    def add_second():
        model.add_adapter(
            "second", MonoLoraConfig(target_modules=["0"], r=2, init_weights=False, activation="sigmoid")
        )
        model.set_adapter("second")

    changes = [
        (lambda: None, ["default"]),
        (lambda: layer.set_scale("default", 3), ["default"]),
        (replace_weight, ["default"]),
        (lambda: layer.monolora_decoder.default.weight.data.mul_(2), ["default"]),
        (add_second, ["second"]),
        (lambda: model.base_model.set_adapter(["default", "second"]), ["default", "second"]),
        (lambda: model.delete_adapter("default"), ["second"]),
        (lambda: model.to(torch.float64), ["second"]),
        (lambda: setattr(layer, "base_layer", nn.Linear(6, 5).double()), ["second"]),
    ]
    seen = []
    for change, names in changes:
        change()
        with torch.no_grad():
            x = x.to(layer.base_layer.weight.dtype)
            result = layer(x)
            torch.testing.assert_close(result, one_by_one(layer, x, names), rtol=0, atol=0)
        seen.append(result.double())
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


def test_disabled_and_unknown_adapters_leave_the_base():
    model, layer = adapted()
    x = torch.randn(4, 6)
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(layer(x), layer.base_layer(x))
        layer._active_adapter = ["elsewhere"]  # an adapter of other layers
        assert torch.equal(layer(x), layer.base_layer(x))


def test_adapters_by_row():
    model, layer = adapted()
    model.add_adapter("second", MonoLoraConfig(target_modules=["0"], r=2, init_weights=False))
    x = torch.randn(3, 6)
    with torch.no_grad():
        result = model(x, adapter_names=["default", "second", "__base__"])
        expected = [
            one_by_one(layer, row[None], names) for row, names in zip(x, (["default"], ["second"], []), strict=True)
        ]
    torch.testing.assert_close(result, torch.cat(expected))


PARTS = ("monolora_encoder", "monolora_decoder", "monolora_activation", "monolora_dropout")


def hook(module):
    module.register_forward_hook(lambda module, args, output: output + 1)


def pre_hook(module):
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def own_forward(module):  # as accelerate does
    old = module.forward
    module.forward = lambda x: old(x) + 1


@pytest.mark.parametrize("change", [hook, pre_hook, own_forward])
@pytest.mark.parametrize("part", ["base_layer", *PARTS])
def test_hooks_act(part, change):
    _, layer = adapted(lora_dropout=0.3)
    x = torch.randn(4, 6)
    with torch.no_grad():
        before = layer(x)
        change(layer.base_layer if part == "base_layer" else getattr(layer, part).default)
        torch.testing.assert_close(layer(x), one_by_one(layer, x), rtol=0, atol=0)
        assert not torch.equal(layer(x), before)


def test_hooks_on_all_modules_act():
    _, layer = adapted()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    with torch.no_grad():
        layer(torch.randn(4, 6))
    handle.remove()
    expected = [layer.base_layer, *(getattr(layer, part).default for part in PARTS[:3]), layer]
    assert {id(module) for module in expected} <= {id(module) for module in seen}


def test_sparsity_is_measured_as_before():
    model, layer = adapted()
    x = torch.randn(50, 6)
    latents = torch.relu(x @ layer.monolora_encoder.default.weight.T)
    assert activation_sparsity(model, [{"input": x}]).overall == pytest.approx((latents == 0).float().mean().item())


def test_dropout_that_acts_is_drawn():
    """Also in a layer in evaluation whose dropout alone is in training mode, as for Monte Carlo dropout."""
    _, layer = adapted(lora_dropout=0.5)
    x = torch.randn(4, 6)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
        layer.monolora_dropout.train()
        torch.manual_seed(1)
        first = layer(x)
        assert not torch.equal(layer(x), first)
        torch.manual_seed(1)
        torch.testing.assert_close(one_by_one(layer, x), first, rtol=0, atol=0)


class OwnForward(nn.Linear):
    """Stands for a quantised layer, which computes in its own way."""

    def forward(self, x):
        return super().forward(x) + 1


def test_adapters_that_were_given_a_bias_use_it():
    _, layer = adapted()
    layer.monolora_encoder.default, layer.monolora_decoder.default = nn.Linear(6, 3), nn.Linear(3, 5)
    x = torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), one_by_one(layer, x), rtol=0, atol=0)


@pytest.mark.parametrize("base", [OwnForward(6, 5), Conv1D(5, 6)])
def test_a_base_that_is_not_plain_is_called(base):
    _, layer = adapted(base)
    x = torch.randn(4, 6)
    called = called_modules(layer, x)
    assert called[:2] == [layer, layer.base_layer]
    assert layer.monolora_encoder.default not in called
    with torch.no_grad():
        torch.testing.assert_close(layer(x), one_by_one(layer, x), rtol=0, atol=0)


def test_weights_kept_elsewhere_or_computed_are_used():
    _, layer = adapted()
    nn.utils.parametrizations.weight_norm(layer.monolora_encoder.default)
    prune.random_unstructured(layer.monolora_decoder.default, "weight", 0.5)
    weight = layer.base_layer.weight  # as FSDP1 does
    del layer.base_layer._parameters["weight"]
    layer.base_layer.weight = weight.data * 2
    x = torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), one_by_one(layer, x), rtol=0, atol=0)


def test_a_trained_base_and_an_input_with_a_gradient():
    _, layer = adapted()
    layer.base_layer.requires_grad_(True)
    x = torch.randn(4, 6, requires_grad=True)
    with torch.no_grad():
        result = layer(x)
    assert not result.requires_grad
    torch.testing.assert_close(result, layer(x).detach())  # with a gradient the modules are called


def test_mixed_dtypes_are_refused_where_casting_is_switched_off():
    model, layer = adapted(nn.Linear(6, 5).to(torch.bfloat16))
    x = torch.randn(4, 6).to(torch.bfloat16)
    with torch.no_grad(), disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        layer(x)


def test_functions_of_torch_func():
    _, layer = adapted()
    x = torch.randn(4, 6)
    names = [name for name, _ in layer.named_parameters()]
    many = {name: torch.randn(3, *layer.get_parameter(name).shape) for name in names}
    decoder = {"monolora_decoder.default.weight": many["monolora_decoder.default.weight"]}
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
        for weights in (many, decoder):

            def call(one):
                return torch.func.functional_call(layer, one, (x,))

            each = [call({name: weight[i] for name, weight in weights.items()}) for i in range(3)]
            torch.testing.assert_close(torch.vmap(call)(weights), torch.stack(each))


@pytest.mark.parametrize("adapter", ["MonoLoRA", "LoRA"])
@pytest.mark.parametrize("batch", [1, 3])
def test_compiled_generation_with_a_static_cache_gives_equal_tokens(adapter, batch):
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    options = {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM"}
    config = {
        "MonoLoRA": lambda: MonoLoraConfig(**options, init_weights=False),
        "LoRA": lambda: LoraConfig(**options, init_lora_weights=False),
    }[adapter]()
    model = get_peft_model(copy.deepcopy(base), config).eval()
    ids = torch.randint(1, 64, (batch, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
    length = {"max_new_tokens": 8, "min_new_tokens": 8}
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    eager = model.generate(**inputs, **length)
    torch._dynamo.utils.counters.clear()
    compiled = model.generate(**inputs, **length, cache_implementation="static", compile_config=compile_config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch.equal(eager, compiled)
    with model.disable_adapter():
        assert not torch.equal(eager, model.generate(**inputs, **length))
