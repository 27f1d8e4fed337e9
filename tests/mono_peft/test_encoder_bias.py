"""`encoder_bias`: sigma(A x + b) against its definition, and what else has to know of b."""

import copy
import json

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_bases import MLP, ConvNet, Tokens, mixtral
from torch import nn
from transformers import AutoModelForCausalLM

from mono_peft import (
    DivergedError,
    MonoLoraConfig,
    Silence,
    activation_sparsity,
    fused,
    monolora_plus_param_groups,
    replace_adapter,
)
from mono_peft.certify import certify
from mono_peft.layer import ACTIVATIONS, MonoLoraLayer
from tests.mono_peft.conftest import rewrite, save_adapter


def adapted(base, **options):
    """A layer with an adapter whose b is not zero."""
    options = {"r": 3, "lora_alpha": 5, "init_weights": False, "target_modules": ["0"], "encoder_bias": True} | options
    model = get_peft_model(nn.Sequential(base), MonoLoraConfig(**options), autocast_adapter_dtype=False)
    return model, model.base_model.model[0]


def biases(model):
    return {n: p for n, p in model.named_parameters() if "monolora_encoder" in n and n.endswith(".bias")}


@settings(max_examples=60, deadline=None)
@given(
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    lead=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    dropout=st.sampled_from([0.0, 0.3]),
    base_bias=st.booleans(),
    input_gradient=st.booleans(),
)
def test_forward_and_gradients_equal_the_reference(activation, lead, sizes, dropout, base_bias, input_gradient):
    """By whatever path: fused in training where it is possible, direct without gradients."""
    torch.manual_seed(0)
    d_in, d_out, r = sizes
    base = nn.Linear(d_in, d_out, bias=base_bias).double()
    _, layer = adapted(base, r=r, activation=activation, lora_dropout=dropout)
    encoder, decoder = layer.monolora_encoder.default, layer.monolora_decoder.default
    x = torch.randn(*lead, d_in, dtype=torch.float64, requires_grad=input_gradient)
    A, b, B = (p.detach().clone().requires_grad_() for p in (encoder.weight, encoder.bias, decoder.weight))
    y = x.detach().clone().requires_grad_()
    expected = base(y) + 5 / r * ACTIVATIONS[activation]()(y @ A.T + b) @ B.T
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-10)
    if dropout:
        layer.train()
        torch.manual_seed(1)
        state = torch.get_rng_state()
        seen = torch.ones_like(y)
        if type(layer(x).grad_fn).__name__ == "_ReluUpdateBackward":
            torch.set_rng_state(state)
            dropped = round(0.3 * 2**16)
            seen = fused._kept_elements(y, dropped).double() / (1 - dropped / 2**16)
        else:
            torch.set_rng_state(state)
            seen = layer.monolora_dropout.default(seen)
        torch.set_rng_state(state)
        expected = base(y) + 5 / r * ACTIVATIONS[activation]()((seen * y) @ A.T + b) @ B.T
    result = layer(x)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-10)
    direction = torch.randn_like(result)
    (result * direction).sum().backward()
    (expected * direction).sum().backward()
    for ours, theirs in ((encoder.weight, A), (encoder.bias, b), (decoder.weight, B)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    if input_gradient:
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)


def test_it_is_fused_and_has_gradients_of_second_order():
    torch.manual_seed(0)
    _, layer = adapted(nn.Linear(4, 3).double(), r=2)
    encoder = layer.monolora_encoder.default
    weights = (encoder.weight, encoder.bias, layer.monolora_decoder.default.weight)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert type(layer(x).grad_fn).__name__ == "_ReluUpdateBackward"
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *weights))
    assert torch.autograd.gradgradcheck(lambda *_: layer(x), (x, *weights))


def test_what_is_not_b_of_this_dtype_is_left_to_the_modules():
    _, layer = adapted(nn.Linear(4, 3))
    x = torch.randn(5, 4)
    layer.monolora_decoder.default = nn.Linear(3, 3)  # a decoder that was given a bias
    expected = layer.base_layer(x) + layer.update("default", x)
    torch.testing.assert_close(layer(x), expected)
    assert type(layer(x).grad_fn).__name__ != "_ReluUpdateBackward"


def test_the_shifted_half_space_of_a_convolution():
    torch.manual_seed(0)
    _, layer = adapted(nn.Conv1d(2, 4, 3, padding=1).double())
    encoder, x = layer.monolora_encoder.default, torch.randn(5, 2, 7, dtype=torch.float64)
    latents = nn.functional.conv1d(x, encoder.weight, padding=1) + encoder.bias[:, None]
    expected = layer.base_layer(x) + 5 / 3 * nn.functional.conv1d(
        latents.clamp(min=0), layer.monolora_decoder.default.weight
    )
    torch.testing.assert_close(layer(x), expected)


def test_each_expert_has_a_bias_of_its_own():
    """A module at a time: zero all but one expert's b and compare with a shift of that expert's latents alone."""
    torch.manual_seed(0)
    options = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "encoder_bias": True}
    model = get_peft_model(mixtral(), MonoLoraConfig(r=3, init_weights=False, **options)).eval()
    layers = [m for m in model.modules() if isinstance(m, MonoLoraLayer)]
    encoder = layers[0].monolora_encoder["default"]
    assert encoder.bias.shape == encoder.weight.shape[:2]
    seen = {}
    layers[0].monolora_activation["default"].register_forward_pre_hook(lambda m, args: seen.update(latents=args[0]))
    layers[0].register_forward_pre_hook(lambda m, args: seen.update(x=args[0], routing=args[1]))
    model(input_ids=torch.randint(1, 50, (2, 6)))
    experts = seen["routing"].experts.tolist()
    assert len(set(experts)) > 1
    for row, latents, expert in zip(seen["x"], seen["latents"], experts, strict=True):
        expected = encoder.weight[expert] @ row + encoder.bias[expert]
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init_weights", [True, "gaussian"])
def test_b_is_zero_at_the_start_and_learns(init_weights):
    torch.manual_seed(0)
    model, layer = adapted(nn.Linear(6, 5), init_weights=init_weights)
    bias = layer.monolora_encoder.default.bias
    assert bias.shape == (3,)
    assert not bias.any()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B is zero, and moves first
        model(torch.randn(20, 6)).square().mean().backward()
        optimizer.step()
    assert bias.any()


def test_an_adapter_without_it_has_no_bias_and_is_saved_as_before(tmp_path):
    config = MonoLoraConfig(target_modules=["below"])
    assert config.format_version == 1  # which every mono_peft reads
    model = get_peft_model(MLP(), config)
    assert not biases(model)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert names == {f"base_model.model.below.monolora_{part}.weight" for part in ("encoder", "decoder")}
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    old = {key: value for key, value in stored.items() if key != "encoder_bias"}  # a file of an older mono_peft
    (tmp_path / "adapter_config.json").write_text(json.dumps(old))
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert (loaded.encoder_bias, loaded.format_version) == (False, 1)


def test_an_adapter_with_it_says_so_to_older_versions(tmp_path):
    model = get_peft_model(MLP(), MonoLoraConfig(target_modules=["below"], encoder_bias=True))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["format_version"] == 2
    assert "base_model.model.below.monolora_encoder.bias" in load_file(tmp_path / "adapter_model.safetensors")


@pytest.mark.skipif(Version("0.21") > Version(peft.__version__), reason="older PEFT warns only")
@pytest.mark.parametrize(("has", "wanted"), [(True, False), (False, True)])
def test_a_file_that_does_not_fit_the_option(tmp_path, has, wanted):
    options = {"target_modules": ["below"]}
    get_peft_model(MLP(), MonoLoraConfig(**options, encoder_bias=has)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"encoder_bias": wanted}))
    with pytest.raises(ValueError, match="1 tensors belong to no module" if has else "1 tensors are missing"):
        PeftModel.from_pretrained(MLP(), tmp_path)


@pytest.mark.skipif(Version("0.20") > Version(peft.__version__), reason="transformers' integration asks for PEFT 0.20")
def test_transformers_loads_it(small_model, input_ids, tmp_path):
    adapter = save_adapter(small_model, tmp_path / "adapter", encoder_bias=True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_model), adapter).eval()
    assert all(bias.any() for bias in biases(model).values())
    theirs = AutoModelForCausalLM.from_pretrained(small_model)
    theirs.load_adapter(str(adapter))
    assert torch.equal(theirs.eval()(input_ids).logits, model(input_ids).logits)


@pytest.mark.skipif(Version("0.21") > Version(peft.__version__), reason="`bias` needs PEFT 0.21")
def test_the_biases_of_the_base_and_of_the_encoders_are_kept_apart(tmp_path):
    options = {"target_modules": ["below", "above"], "init_weights": False}
    config = MonoLoraConfig(**options, encoder_bias=True, bias="all")
    model = get_peft_model(MLP(), config, adapter_name="both")
    model.add_adapter("plain", MonoLoraConfig(**options, encoder_bias=True))
    of_base = {"below.base_layer.bias", "above.base_layer.bias", "head.bias"}
    trained = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n in trained if ".plain." in n]
    assert {n for n in trained if "monolora_" not in n} == of_base
    assert len(trained) == 3 + 2 * 3
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    saved = {n.removeprefix("base_model.model.") for n in load_file(tmp_path / "both" / "adapter_model.safetensors")}
    assert saved == {n.replace(".both", "") for n in trained}


def test_what_cannot_have_it():
    base = Tokens()
    names = list(base.state_dict())
    with pytest.raises(ValueError, match="'table' cannot have `encoder_bias=True`: A of an embedding has r numbers"):
        get_peft_model(base, MonoLoraConfig(target_modules=["table", "head"], encoder_bias=True))
    assert list(base.state_dict()) == names
    with pytest.raises(ValueError, match="`encoder_bias` must be True or False, got 1"):
        MonoLoraConfig(encoder_bias=1)


@pytest.mark.parametrize("base", [MLP, ConvNet])
def test_learning_rates_and_weight_decay(base):
    modules = ["below"] if base is MLP else ["stem"]
    model = get_peft_model(base(), MonoLoraConfig(target_modules=modules, encoder_bias=True, modules_to_save=["head"]))
    groups = monolora_plus_param_groups(model, 1e-3, 16, weight_decay=0.1)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    named = {n: found[id(p)] for n, p in model.named_parameters() if p.requires_grad}
    expected = {"encoder.default.weight": (1e-3, 0.1), "encoder.default.bias": (1e-3, 0.0)}
    expected |= {"decoder.default.weight": (16e-3, 0.1), "head.modules_to_save.default.bias": (16e-3, 0.0)}
    for ending, setting in expected.items():
        assert [value for name, value in named.items() if name.endswith(ending)] == [setting]


class TestSilence:
    def test_the_gradient_is_that_of_the_hinge(self, llama, random_adapter, input_ids):
        """Against autograd through the hinge's definition, on the inputs that the base feeds the layers."""
        base = llama.double()
        inputs, handles = {}, []
        for name, module in base.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                hook = module.register_forward_pre_hook(
                    lambda m, args, n=name: inputs.update({n: args[0].flatten(0, 1)})
                )
                handles.append(hook)
        with torch.no_grad():
            base(input_ids)
        for handle in handles:
            handle.remove()
        model = random_adapter(copy.deepcopy(base), target_modules="all-linear", encoder_bias=True)
        silence = Silence(model, [{"input_ids": input_ids}], weight=3.0, margin=0.02, rows_per_step=100)
        silence.add_gradients(0)
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        hinge, fired = 0, {}
        for name, x in inputs.items():
            encoder = model.get_submodule(f"base_model.model.{name}").monolora_encoder["default"]
            latents = torch.stack([encoder.weight.double() @ row + encoder.bias.double() for row in x])
            hinge = hinge + torch.relu(latents + 0.02).mean()
            fired[f"base_model.model.{name}"] = (latents > 0).any(1).double().mean().item()
        (3.0 * hinge).backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        assert len(found) == 2 * 7 * 2  # A and b of seven modules of two layers
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-8)
        assert silence.loss == pytest.approx(hinge.item(), rel=1e-6)
        assert silence.fired_by_module() == pytest.approx(fired)

    def test_b_alone_can_make_it_silent(self, llama, random_adapter, input_ids):
        model = random_adapter(llama, target_modules="all-linear", encoder_bias=True)
        assert certify(model, [{"input_ids": input_ids}]).silent == 0
        for bias in biases(model).values():
            bias.data -= 100
        certificate = certify(model, [{"input_ids": input_ids}])
        assert (certificate.silent, certificate.compared) == (3, 3)
        assert set(Silence(model, [{"input_ids": input_ids}]).fired_by_module().values()) == {0.0}


def test_sparsity_is_that_of_the_shifted_latents(llama, random_adapter, input_ids):
    model = random_adapter(llama, encoder_bias=True)
    for bias in biases(model).values():
        bias.data[:] = torch.tensor([-100.0, 100.0, 100.0, 100.0])
    sparsity = activation_sparsity(model, [{"input_ids": input_ids}])
    assert (sparsity.overall, sparsity.dead) == (0.25, 0.25)


@pytest.mark.parametrize("measure", [activation_sparsity, certify])
def test_a_bias_that_is_not_finite(llama, random_adapter, input_ids, measure):
    model = random_adapter(llama, encoder_bias=True)
    next(iter(biases(model).values())).data[0] = float("nan")
    with pytest.raises(DivergedError, match=r"1 tensors .* NaN .*monolora_encoder.bias"):
        measure(model, [{"input_ids": input_ids}])


def test_the_check_compares_b(check, small_model, tmp_path, monkeypatch):
    adapter = save_adapter(small_model, tmp_path / "adapter", encoder_bias=True)
    result = check(adapter)
    assert (result.code, result.table["tensors"]) == (0, "42 in the file, 42 of them equal in the model")
    rewrite(
        adapter,
        lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("0.mlp.up_proj.monolora_encoder.bias")},
    )
    assert check(adapter).code == 1


def test_an_adapter_in_the_place_of_another(small_model, input_ids, tmp_path):
    first, second = (save_adapter(small_model, tmp_path / str(i), seed=i, encoder_bias=True) for i in range(2))
    plain = save_adapter(small_model, tmp_path / "plain")
    base = AutoModelForCausalLM.from_pretrained(small_model)
    expected = PeftModel.from_pretrained(copy.deepcopy(base), second).eval()(input_ids).logits
    model = PeftModel.from_pretrained(base, first).eval()
    replace_adapter(model, second)
    assert torch.equal(model(input_ids).logits, expected)
    with pytest.raises(ValueError, match="`encoder_bias` is True there and False in"):
        replace_adapter(model, plain)
