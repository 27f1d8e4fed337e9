"""The arithmetic of a layer against five obvious lines, and against PEFT's LoRA."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from mono_peft import MonoLoraConfig, activation_sparsity
from mono_peft.layer import ACTIVATIONS

REFERENCE = {
    "relu": lambda z: z.clamp(min=0),
    "relu2": lambda z: z.clamp(min=0) ** 2,
    "relu6": lambda z: z.clamp(0, 6),
    "sigmoid": lambda z: 1 / (1 + (-z).exp()),
    "softplus": lambda z: (1 + z.exp()).log(),
    "identity": lambda z: z,
}


def adapted(base, **options):
    """`base` as the only layer of a model with a MonoLoRA adapter; returns model and adapted layer."""
    model = get_peft_model(nn.Sequential(base), MonoLoraConfig(target_modules=["0"], **options))
    return model, model.base_model.model[0]


def test_the_table_of_activations_is_the_documented_one():
    assert set(ACTIVATIONS) == set(REFERENCE)


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
@pytest.mark.parametrize("activation", REFERENCE)
def test_forward_and_gradients_equal_the_reference(activation, kind):
    torch.manual_seed(0)
    base = Conv1D(7, 5) if kind == "conv1d" else nn.Linear(5, 7, bias=kind == "linear")
    base = base.double()
    if kind == "conv1d":
        nn.init.normal_(base.bias)
    model, layer = adapted(base, r=3, lora_alpha=5, activation=activation, init_weights=False)
    layer.monolora_encoder.default.weight.data *= 4  # reach the bends of relu6 too
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    out_weight = torch.randn(2, 4, 7, dtype=torch.float64)
    model.eval()
    result = model(x)
    (result * out_weight).sum().backward()

    W = (base.weight.T if kind == "conv1d" else base.weight).detach()
    b = base.bias.detach() if base.bias is not None else 0
    A = layer.monolora_encoder.default.weight.detach().clone().requires_grad_()
    B = layer.monolora_decoder.default.weight.detach().clone().requires_grad_()
    y = x.detach().clone().requires_grad_()
    expected = y @ W.T + b + 5 / 3 * REFERENCE[activation](y @ A.T) @ B.T
    (expected * out_weight).sum().backward()

    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.monolora_encoder.default.weight.grad, A.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.monolora_decoder.default.weight.grad, B.grad, rtol=0, atol=1e-10)
    assert base.weight.grad is None


@settings(max_examples=40, deadline=None)
@given(
    d_in=st.integers(1, 20),
    d_out=st.integers(1, 20),
    r=st.integers(1, 24),
    alpha=st.floats(0.1, 64),
    rslora=st.booleans(),
    leading=st.lists(st.integers(1, 4), max_size=3),
    activation=st.sampled_from(sorted(REFERENCE)),
)
def test_any_shape_equals_the_reference(d_in, d_out, r, alpha, rslora, leading, activation):
    model, layer = adapted(
        nn.Linear(d_in, d_out).double(),
        r=r,
        lora_alpha=alpha,
        use_rslora=rslora,
        activation=activation,
        init_weights=False,
    )
    x = torch.randn(*leading, d_in, dtype=torch.float64)
    A, B = layer.monolora_encoder.default.weight, layer.monolora_decoder.default.weight
    scale = alpha / r**0.5 if rslora else alpha / r
    expected = layer.base_layer(x) + scale * REFERENCE[activation](x @ A.T) @ B.T
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("activation", REFERENCE)
def test_gradcheck(activation):
    torch.manual_seed(0)
    model, layer = adapted(nn.Linear(4, 3).double(), r=2, activation=activation, init_weights=False)
    weights = (layer.monolora_encoder.default.weight, layer.monolora_decoder.default.weight)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: model(x), (x, *weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", REFERENCE)
def test_low_precision_bases_agree_with_float64(dtype, activation):
    torch.manual_seed(0)
    model, layer = adapted(nn.Linear(16, 8).to(dtype), r=4, activation=activation, init_weights=False)
    assert layer.monolora_encoder.default.weight.dtype == torch.float32  # autocast_adapter_dtype
    x = torch.randn(3, 16).to(dtype)
    result = model(x)
    assert result.dtype == dtype
    A, B = layer.monolora_encoder.default.weight.double(), layer.monolora_decoder.default.weight.double()
    base = layer.base_layer
    expected = F.linear(x.double(), base.weight.double(), base.bias.double())
    expected += 8 / 4 * REFERENCE[activation](x.double() @ A.T) @ B.T
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_adapter_takes_the_base_dtype_without_autocast():
    base = nn.Sequential(nn.Linear(4, 4).bfloat16())
    model = get_peft_model(base, MonoLoraConfig(target_modules=["0"]), autocast_adapter_dtype=False)
    assert model.base_model.model[0].monolora_encoder.default.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_identity_equals_lora(llama, input_ids, rslora, dropout):
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": dropout, "use_rslora": rslora}
    lora = get_peft_model(copy.deepcopy(llama), LoraConfig(init_lora_weights=False, **options))
    mono = get_peft_model(llama, MonoLoraConfig(activation="identity", init_weights=False, **options))
    weights = {
        name.replace("lora_A", "monolora_encoder").replace("lora_B", "monolora_decoder"): value
        for name, value in lora.state_dict().items()
    }
    mono.load_state_dict(weights)
    lora.train(), mono.train()
    outputs = []
    for model in (lora, mono):
        torch.manual_seed(3)  # the same dropout masks
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        outputs.append((loss, gradients))
    torch.testing.assert_close(outputs[1][0], outputs[0][0])
    assert len(outputs[0][1]) == len(outputs[1][1]) == 2 * 2 * 2
    for lora_gradient, mono_gradient in zip(outputs[0][1].values(), outputs[1][1].values(), strict=True):
        torch.testing.assert_close(mono_gradient, lora_gradient, rtol=1e-4, atol=1e-6)


def test_dropout_acts_on_the_encoder_input_in_training_only():
    torch.manual_seed(0)
    model, layer = adapted(nn.Linear(50, 3), r=2, lora_dropout=0.5, init_weights=False)
    seen = []
    layer.monolora_encoder.default.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.ones(20, 50)
    model.train()
    model(x)
    model.eval()
    model(x)
    assert 0.4 < (seen[0] == 0).float().mean() < 0.6
    assert set(seen[0].unique().tolist()) == {0.0, 2.0}
    assert torch.equal(seen[1], x)


def test_initialisation_is_that_of_lora():
    torch.manual_seed(0)
    _, layer = adapted(nn.Linear(400, 10), r=8)
    A, B = layer.monolora_encoder.default.weight, layer.monolora_decoder.default.weight
    assert torch.equal(B, torch.zeros(10, 8))
    bound = 400**-0.5  # Kaiming uniform with a = sqrt(5)
    assert 0.95 * bound < A.abs().max() <= bound
    _, layer = adapted(nn.Linear(400, 10), r=8, init_lora_weights="gaussian")
    A = layer.monolora_encoder.default.weight
    assert abs(A.std().item() * 8 - 1) < 0.1
    assert torch.equal(layer.monolora_decoder.default.weight, torch.zeros(10, 8))


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def patches(x, kernel, stride, padding, dilation):
    """What each position of a convolution sees of x (batch, channels, *lengths): (batch, positions, numbers)."""
    x = F.pad(x, [padding] * 2 * len(kernel))
    places = [
        range(0, length - dilation * (size - 1), stride) for length, size in zip(x.shape[2:], kernel, strict=True)
    ]
    seen = []
    for corner in itertools.product(*places):
        window = [slice(c, c + dilation * (size - 1) + 1, dilation) for c, size in zip(corner, kernel, strict=True)]
        seen.append(x[(..., *window)].flatten(1))
    return torch.stack(seen, 1)


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
)
def test_a_convolution_equals_a_linear_layer_on_patches(kernel, stride, padding, dilation, groups):
    torch.manual_seed(0)
    shape = {"kernel_size": tuple(kernel), "stride": stride, "padding": padding, "dilation": dilation}
    base = CONVOLUTIONS[len(kernel)](4, 6, **shape, groups=groups).double()
    model, layer = adapted(base, r=3, lora_alpha=5, init_weights=False)
    x = torch.randn(2, 4, *(7, 6, 5)[: len(kernel)], dtype=torch.float64)
    assert layer.monolora_encoder.default.weight.shape == (3, 4, *kernel)
    A = layer.monolora_encoder.default.weight.reshape(3, -1)
    B = layer.monolora_decoder.default.weight.reshape(6, 3)
    update = 5 / 3 * (patches(x, kernel, stride, padding, dilation) @ A.T).clamp(min=0) @ B.T
    result, plain = model(x), base(x)
    torch.testing.assert_close(result - plain, update.transpose(1, 2).reshape(plain.shape), rtol=0, atol=1e-10)
    torch.testing.assert_close(model(x[0]), result[0])  # without a batch


@pytest.mark.parametrize("dimensions", CONVOLUTIONS)
def test_the_units_of_a_convolution_are_its_channels(dimensions):
    model, layer = adapted(CONVOLUTIONS[dimensions](3, 5, 2), r=4, init_weights=False)
    layer.monolora_encoder.default.weight.data[1] = -1  # of positive inputs no unit but this one never fires
    layer.monolora_encoder.default.weight.data[[0, 2, 3]] = 1
    measured = activation_sparsity(model, [{"input": torch.rand(2, 3, *[6] * dimensions)}])
    assert (measured.overall, measured.dead) == (0.25, 0.25)


@pytest.mark.parametrize("activation", REFERENCE)
@pytest.mark.parametrize("embed_scale", [None, 3.0])
def test_an_embedding_equals_the_reference(activation, embed_scale):
    torch.manual_seed(0)
    base = nn.Embedding(20, 6, padding_idx=0).double()
    if embed_scale:
        base.embed_scale = embed_scale
    model, layer = adapted(base, r=3, lora_alpha=5, lora_dropout=0.5, activation=activation, init_weights=False)
    ids = torch.randint(0, 20, (2, 5))
    A, B = layer.monolora_encoder.default.weight, layer.monolora_decoder.default.weight
    expected = base(ids) + 5 / 3 * (embed_scale or 1) * REFERENCE[activation](A[ids]) @ B.T
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, "embedding"])
def test_identity_equals_lora_on_other_layers(kind):
    torch.manual_seed(0)
    if kind == "embedding":
        base, x = nn.Embedding(20, 6), torch.randint(0, 20, (2, 5))
    else:
        base, x = CONVOLUTIONS[kind](3, 5, 3, stride=2, padding=1), torch.randn(2, 3, *[8] * kind)
    options = {"target_modules": ["0"], "r": 4, "lora_alpha": 6}
    lora = get_peft_model(nn.Sequential(copy.deepcopy(base)), LoraConfig(init_lora_weights=False, **options))
    mono = get_peft_model(nn.Sequential(base), MonoLoraConfig(activation="identity", init_weights=False, **options))
    theirs, ours = lora.base_model.model[0], mono.base_model.model[0]
    if kind != "embedding":
        A, B = theirs.lora_A.default.weight, theirs.lora_B.default.weight
    else:
        A, B = theirs.lora_embedding_A.default.T, theirs.lora_embedding_B.default
    ours.monolora_encoder.default.weight.data.copy_(A)
    ours.monolora_decoder.default.weight.data.copy_(B)
    assert not torch.allclose(mono(x), base(x))
    torch.testing.assert_close(mono(x), lora(x))


@pytest.mark.parametrize("base", [nn.Conv2d(3, 5, 3), nn.Embedding(20, 5)])
def test_an_encoder_never_starts_at_zero_and_learns(base):
    model, layer = adapted(base, r=4)
    A = layer.monolora_encoder.default.weight
    assert A.abs().max() > 0
    assert torch.equal(layer.monolora_decoder.default.weight, torch.zeros_like(layer.monolora_decoder.default.weight))
    x = torch.randn(2, 3, 8, 8) if isinstance(base, nn.Conv2d) else torch.arange(20)
    before = A.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # in the first step only B has a gradient
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
    assert not torch.equal(A, before)


def test_scales_can_be_changed_and_set_back():
    torch.manual_seed(0)
    _, layer = adapted(nn.Linear(4, 3), r=4, lora_alpha=6, use_rslora=True, init_weights=False)
    x = torch.randn(2, 4)
    update = layer(x) - layer.base_layer(x)

    def factor():
        ratio = (layer(x) - layer.base_layer(x)) / update
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
        return round(ratio[0, 0].item(), 4)

    layer.set_scale("default", 2)
    layer.scale_layer(3)
    assert factor() == 6
    layer.unscale_layer(2)
    assert factor() == 3
    layer.set_scale("default", 0.5)  # of the configured scale, not of the present one
    assert factor() == 0.5
    layer.unscale_layer()
    assert factor() == 1
    layer.set_scale("of another layer", 2)
    assert factor() == 1


def test_a_float16_base_does_not_overflow_in_the_adapter():
    base = nn.Linear(64, 2).half()
    nn.init.zeros_(base.weight)
    x = torch.full((1, 64), 60000.0, dtype=torch.float16)
    model, layer = adapted(base, r=2, init_weights=False)
    layer.monolora_encoder.default.weight.data.fill_(1.0)  # A x = 3.8e6, above float16's 65,504
    layer.monolora_decoder.default.weight.data.fill_(1e-5)
    expected = 64 * 60000.0 * 1e-5 * 2 * 4
    torch.testing.assert_close(model(x).float(), base(x).float() + expected, rtol=1e-3, atol=0)
    layer.half()  # as LoRA in float16: infinity, which a GradScaler sees, and not a plausible number
    assert not model(x).isfinite().any()
