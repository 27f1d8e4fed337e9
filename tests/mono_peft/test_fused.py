"""The fused linear layer equals the modules called one by one, and is left alone where it would not."""

import copy
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    LEDConfig,
    LEDForConditionalGeneration,
    LongformerConfig,
    LongformerForMaskedLM,
    RoCBertConfig,
    RoCBertForMaskedLM,
)

from mono_peft import MonoLoraConfig, activation_sparsity, fused


def adapted(base, **options):
    options = {"r": 3, "lora_alpha": 5, "init_weights": False, "target_modules": ["0"]} | options
    model = get_peft_model(nn.Sequential(base), MonoLoraConfig(**options), autocast_adapter_dtype=False)
    return model, model.base_model.model[0]


def plain(layer, x):
    """The modules one by one."""
    return layer.base_layer(x) + layer.update("default", x).to(layer.base_layer.weight.dtype)


def is_fused(layer, x):
    return type(layer(x).grad_fn).__name__ == "_ReluUpdateBackward"


def gradients(layer, run, x, out_weight):
    for parameter in layer.parameters():
        parameter.grad = None
    x = x.detach().clone().requires_grad_(x.requires_grad)
    result = run(x)
    (result * out_weight).sum().backward()
    named = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return result.detach(), named, x.grad


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    transposed=st.booleans(),
    input_gradient=st.booleans(),
)
def test_it_equals_the_modules_one_by_one(lead, sizes, dtype, bias, transposed, input_gradient):
    torch.manual_seed(0)
    d_in, d_out, r = sizes
    _, layer = adapted(nn.Linear(d_in, d_out, bias=bias).to(dtype), r=r)
    x = torch.randn(*lead, d_in, dtype=dtype)
    if transposed:  # not contiguous
        x = torch.randn(d_in, *lead, dtype=dtype).movedim(0, -1)
    x.requires_grad_(input_gradient)
    out_weight = torch.randn(*lead, d_out, dtype=dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    result, ours, x_ours = gradients(layer, layer, x, out_weight)
    expected, theirs, x_theirs = gradients(layer, lambda x: plain(layer, x), x, out_weight)
    close = {"rtol": tolerance, "atol": tolerance * 10}
    torch.testing.assert_close(result, expected, **close)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], **close)
    if input_gradient:
        torch.testing.assert_close(x_ours, x_theirs, **close)


def test_it_is_what_runs():
    _, layer = adapted(nn.Linear(6, 5))
    x = torch.randn(2, 4, 6, requires_grad=True)
    assert is_fused(layer, x)
    assert is_fused(layer.train(), x)


def test_gradients_by_finite_differences_also_of_second_order():
    torch.manual_seed(0)
    _, layer = adapted(nn.Linear(4, 3).double(), r=2)
    weights = (layer.monolora_encoder.default.weight, layer.monolora_decoder.default.weight)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert is_fused(layer, x)
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *weights))
    assert torch.autograd.gradgradcheck(lambda *_: layer(x), (x, *weights))


def test_dropout_is_one_mask_in_both_passes():
    torch.manual_seed(0)
    _, layer = adapted(nn.Linear(40, 5).double(), lora_dropout=0.3)
    layer.train()
    x = torch.randn(6, 40, dtype=torch.float64, requires_grad=True)
    out_weight = torch.randn(6, 5, dtype=torch.float64)
    torch.manual_seed(7)
    result, ours, x_gradient = gradients(layer, layer, x, out_weight)
    torch.manual_seed(7)
    keep = fused._kept_elements(x, round(0.3 * 2**16)).double()
    y = x.detach().clone().requires_grad_()
    A, B = layer.monolora_encoder.default.weight, layer.monolora_decoder.default.weight
    A.grad = B.grad = None
    dropped = round(0.3 * 2**16) / 2**16
    expected = layer.base_layer(y) + 5 / 3 * torch.relu(keep * y / (1 - dropped) @ A.T) @ B.T
    (expected * out_weight).sum().backward()
    torch.testing.assert_close(result, expected.detach())
    torch.testing.assert_close(x_gradient, y.grad)
    torch.testing.assert_close(ours["monolora_encoder.default.weight"], A.grad)
    torch.testing.assert_close(ours["monolora_decoder.default.weight"], B.grad)


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.999])
def test_the_share_of_dropped_elements(dropout):
    torch.manual_seed(0)
    n = 1_000_001
    keep = fused._kept_elements(torch.empty(n), round(dropout * 2**16))
    share = 1 - keep.double().mean().item()
    assert abs(share - dropout) < 4 * (dropout * (1 - dropout) / n) ** 0.5 + 2**-17
    assert set(keep.unique().tolist()) == {0, 1}
    neighbours = (keep[1:] * keep[:-1]).double().mean().item()  # numbers from one draw are independent
    assert neighbours == pytest.approx((1 - dropout) ** 2, abs=4 / n**0.5)


@settings(max_examples=30, deadline=None)
@given(
    dropout=st.one_of(
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 2**-12),
        st.floats(0, 24).map(lambda bits: 1 - 2**-bits),
        st.sampled_from([0.01, 0.99, 2**-16, 1 - 2**-16, 1 - 2**-17]),
    )
)
def test_any_declared_probability_takes_effect_and_the_expectation_stays(dropout):
    """The encoder is a sum of 65,536 ones: the latent is the share that is kept times what it is scaled up by."""
    torch.manual_seed(0)
    n, tokens = 2**16, 64
    _, layer = adapted(nn.Linear(n, 1, bias=False).double(), lora_dropout=dropout, r=1, lora_alpha=1)
    nn.init.zeros_(layer.base_layer.weight)
    nn.init.ones_(layer.monolora_encoder.default.weight)
    nn.init.ones_(layer.monolora_decoder.default.weight)
    layer.train()
    sums = layer(torch.ones(tokens, n, dtype=torch.float64))
    kept = sums.sum().item() * (1 - dropout)
    expected, deviation = n * tokens * (1 - dropout), (n * tokens * dropout * (1 - dropout)) ** 0.5
    # Six standard deviations, a few elements for rare events, and a thousandth of the rarer outcome for rounded rates.
    assert abs(kept - expected) <= 6 * deviation + 6 + n * tokens * min(dropout, 1 - dropout) * 1e-3


def test_dropout_is_off_in_evaluation_and_repeats_under_a_seed():
    _, layer = adapted(nn.Linear(30, 5), lora_dropout=0.5)
    x = torch.randn(4, 30)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), plain(layer, x))
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)


class InPlace(nn.Module):
    """A linear layer whose output is modified in place, as ReLU(inplace=True) and `/=` do."""

    def __init__(self, change):
        super().__init__()
        self.linear, self.change = nn.Linear(6, 5), change

    def forward(self, x):
        y = self.linear(x)
        return self.change(y) if self.change is not None else y


IN_PLACE = {
    "relu": (nn.ReLU(inplace=True), torch.relu),
    "division": (lambda y: y.div_(3), lambda y: y / 3),
    "an exponential": (lambda y: y.exp_(), torch.exp),
    "a view": (lambda y: (y[..., :2].mul_(3), y)[1], lambda y: torch.cat([y[..., :2] * 3, y[..., 2:]], -1)),
    "a reshaped view": (lambda y: y.view(-1).sigmoid_().view_as(y), torch.sigmoid),
    "a mask": (lambda y: y.masked_fill_(y < 0, 7.0), lambda y: y.masked_fill(y < 0, 7.0)),
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("lead", [(4,), (2, 3), (2, 1, 3), ()])
def test_the_output_can_be_modified_in_place(name, lead):
    torch.manual_seed(0)
    change, same = IN_PLACE[name]
    config = MonoLoraConfig(target_modules=["linear"], r=3, init_weights=False)
    model = get_peft_model(InPlace(change).double(), config, autocast_adapter_dtype=False)
    layer = model.base_model.model.linear
    x = torch.randn(*lead, 6, dtype=torch.float64, requires_grad=True)
    assert is_fused(layer, x)
    out_weight = torch.randn(*lead, 5, dtype=torch.float64)
    result, ours, x_ours = gradients(layer, model, x, out_weight)
    expected, theirs, x_theirs = gradients(layer, lambda x: same(plain(layer, x)), x, out_weight)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(x_ours, x_theirs)
    assert ours.keys() == theirs.keys()
    for weight, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[weight])
    weights = (layer.monolora_encoder.default.weight, layer.monolora_decoder.default.weight)
    assert torch.autograd.gradcheck(lambda *_: model(x), (x, *weights))
    assert torch.autograd.gradgradcheck(lambda *_: model(x), (x, *weights))


SMALL = {"vocab_size": 50, "pad_token_id": 1, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **SMALL}
MODELS_IN_PLACE = {
    "longformer": lambda: LongformerForMaskedLM(LongformerConfig(attention_window=4, **ENCODER)),
    "led": lambda: LEDForConditionalGeneration(
        LEDConfig(
            vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, attention_window=4, dropout=0.0,
            attention_dropout=0.0, activation_dropout=0.0, decoder_start_token_id=2,
        )
    ),
    "roc_bert": lambda: RoCBertForMaskedLM(
        RoCBertConfig(
            pronunciation_vocab_size=20, pronunciation_embed_dim=8, shape_vocab_size=20, shape_embed_dim=8, **ENCODER
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS_IN_PLACE)
def test_models_that_work_in_place_train_as_without_fusing(name, monkeypatch):
    torch.manual_seed(0)
    base = MODELS_IN_PLACE[name]()
    ids = torch.randint(3, 20, (2, 8), generator=torch.Generator().manual_seed(1))
    steps = []
    for fusing in (True, False):
        torch.manual_seed(1)
        config = MonoLoraConfig(target_modules="all-linear", r=4, init_weights=False)
        model = get_peft_model(copy.deepcopy(base), config).train()
        if not fusing:
            monkeypatch.setattr(fused, "is_safe", lambda *args: False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        steps.append((loss, {n: p for n, p in model.named_parameters() if p.requires_grad}))
    (loss, ours), (expected, theirs) = steps
    torch.testing.assert_close(loss, expected)
    for weight, value in ours.items():
        torch.testing.assert_close(value, theirs[weight], rtol=1e-4, atol=1e-6, msg=weight)


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def with_hook(layer):
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)


def with_encoder_hook(layer):
    layer.monolora_encoder.default.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def with_replaced_forward(layer):  # as accelerate does
    old = layer.base_layer.forward
    layer.base_layer.forward = lambda x: old(x) + 1


def with_weight_norm(layer):
    nn.utils.parametrizations.weight_norm(layer.monolora_decoder.default)


def with_trained_base(layer):
    layer.base_layer.bias.requires_grad_(True)


def with_mixed_dtypes(layer):
    layer.base_layer.to(torch.bfloat16)


def with_another_class(layer):
    layer.base_layer = OwnForward(6, 5)


@pytest.mark.parametrize(
    "change",
    [
        with_hook, with_encoder_hook, with_replaced_forward, with_weight_norm, with_trained_base, with_mixed_dtypes,
        with_another_class,
    ],
)  # fmt: skip
def test_it_steps_aside(change):
    torch.manual_seed(0)
    _, layer = adapted(nn.Linear(6, 5))
    x = torch.randn(2, 4, 6)
    change(layer)
    x = x.to(layer.base_layer.weight.dtype)
    assert not is_fused(layer, x)
    assert torch.equal(layer(x), plain(layer, x))


def test_it_steps_aside_for_two_adapters_and_other_activations():
    model, layer = adapted(nn.Linear(6, 5))
    model.add_adapter("second", MonoLoraConfig(target_modules=["0"], activation="sigmoid", init_weights=False))
    x = torch.randn(2, 6)
    assert is_fused(layer, x)
    model.base_model.set_adapter(["default", "second"])
    assert not is_fused(layer, x)
    expected = layer.base_layer(x) + layer.update("default", x) + layer.update("second", x)
    torch.testing.assert_close(layer(x), expected)
    model.set_adapter("second")
    assert not is_fused(layer, x)


def test_autocast_compile_and_function_transforms_get_the_plain_path():
    torch.manual_seed(0)
    model, layer = adapted(nn.Linear(6, 5))
    x = torch.randn(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fused(layer, x)
        assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
    jacobian = torch.func.jacrev(layer)(x[0])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(layer, x[0]))
    torch.testing.assert_close(torch.func.jacfwd(layer)(x[0]), jacobian)


def test_measuring_sparsity_still_sees_the_latents():
    torch.manual_seed(0)
    model, layer = adapted(nn.Linear(6, 5))
    x = torch.randn(50, 6)
    latents = torch.relu(x @ layer.monolora_encoder.default.weight.T)
    assert activation_sparsity(model, [{"input": x}]).overall == pytest.approx((latents == 0).float().mean().item())


def saved_bytes(model, x):
    """Bytes kept for the backward pass, without weights and the input itself."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    gc.collect()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(x)
    del result
    return sum(kept.values())


@pytest.mark.parametrize(("dropout", "at_most"), [(0.0, 1.0), (0.1, 0.25)])
def test_it_keeps_less_than_lora(dropout, at_most):
    base = nn.Linear(256, 256)
    options = {"target_modules": ["0"], "lora_dropout": dropout, "r": 8}
    lora = get_peft_model(nn.Sequential(copy.deepcopy(base)), LoraConfig(**options)).train()
    mono = get_peft_model(nn.Sequential(base), MonoLoraConfig(**options)).train()
    x = torch.randn(128, 256, requires_grad=True)
    theirs, ours = saved_bytes(lora, x), saved_bytes(mono, x)
    assert theirs > 0
    assert ours <= at_most * theirs
