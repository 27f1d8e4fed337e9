"""`activation="topk"`: the k largest positive latents of a token, against a loop, and where else it counts."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, get_peft_model
from small_bases import MLP, Tokens, mixtral
from torch import nn

from mono_peft import MonoLoraConfig, Silence, activation_sparsity, replace_adapter
from mono_peft.certify import certify
from mono_peft.layer import MonoLoraLayer
from mono_peft.topk import TopK
from tests.mono_peft.conftest import save_adapter


def largest(latents, k):
    """The places of the k largest positive ones in a list, of equal ones the first."""
    positive = [i for i, value in enumerate(latents) if value > 0]
    return sorted(positive, key=lambda i: (-latents[i], i))[:k]


def reference(latents, k):
    """By loops over positions and units; the last dimension counts the units."""
    result = torch.zeros(latents.shape, dtype=latents.dtype)
    for row, kept in zip(latents.reshape(-1, latents.shape[-1]), result.reshape(-1, latents.shape[-1]), strict=True):
        for i in largest(row.tolist(), k):
            kept[i] = row[i]
    return result


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_it_keeps_what_the_loop_keeps(data):
    """Few different values, so that there are ties, zeros of both signs and rows without a positive latent."""
    lead = data.draw(st.lists(st.integers(0, 3), max_size=2))
    r = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, r))
    values = data.draw(st.sampled_from([(-1.0, 0.0, -0.0), (-1.0, 0.0, 1.0, 2.0), (float("inf"), 1e-45, -3.0, 0.5)]))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    places = torch.randint(
        len(values), (*lead, r), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    latents = torch.tensor(values, dtype=dtype)[places].requires_grad_()
    expected = reference(latents.detach(), k)
    result = TopK(k)(latents)
    assert torch.equal(result, expected)
    result.sum().backward()
    assert torch.equal(latents.grad, (expected > 0).to(dtype))
    dim = data.draw(st.integers(-latents.ndim, -1))
    moved = latents.detach().movedim(-1, dim)
    assert torch.equal(TopK(k, dim)(moved), expected.movedim(-1, dim))


def test_ties_are_broken_by_the_index():
    latents = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, -1.0]])
    assert TopK(3)(latents).tolist() == [[0, 3, 2, 2, 0, 0]]


def test_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(TopK(3), x)
    assert torch.autograd.gradgradcheck(TopK(3), x)


@pytest.mark.parametrize("nans", [1, 2, 5])
def test_nan_does_not_go_unseen(nans):
    latents = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.5]])
    latents[0, -nans:] = -torch.tensor(float("nan"))  # of either sign
    assert TopK(2)(latents).isnan().sum() == nans


def adapted(base, **options):
    options = {"r": 6, "k": 2, "lora_alpha": 5, "init_weights": False, "target_modules": ["0"]} | options
    model = get_peft_model(nn.Sequential(base), MonoLoraConfig(activation="topk", **options))
    return model, model.base_model.model[0]


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    data=st.data(),
    encoder_bias=st.booleans(),
    frozen=st.booleans(),
)
def test_a_linear_layer_equals_the_reference(lead, sizes, data, encoder_bias, frozen):
    torch.manual_seed(0)
    d_in, d_out, r = sizes
    k = data.draw(st.integers(1, r))
    base = nn.Linear(d_in, d_out).double()
    _, layer = adapted(base, r=r, k=k, encoder_bias=encoder_bias)
    layer.double()
    encoder, decoder = layer.monolora_encoder.default, layer.monolora_decoder.default
    x = torch.randn(*lead, d_in, dtype=torch.float64, requires_grad=not frozen)
    y = x.detach().clone().requires_grad_()
    learned = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    A, B, *b = (
        p.detach().clone().requires_grad_() for p in (encoder.weight, decoder.weight, encoder.bias) if p is not None
    )
    latents = y @ A.T + (b[0] if b else 0)
    kept = (reference(latents.detach(), k) > 0).double()
    expected = base(y) + 5 / r * (latents * kept) @ B.T
    result = layer(x)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(result)
    (result * direction).sum().backward()
    (expected * direction).sum().backward()
    assert len(learned) == 2 + encoder_bias
    pairs = [(encoder.weight, A), (decoder.weight, B), *([(encoder.bias, b[0])] if b else [])]
    for ours, theirs in pairs if frozen else [*pairs, (x, y)]:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_a_convolution_counts_for_each_pixel():
    torch.manual_seed(0)
    _, layer = adapted(nn.Conv2d(3, 4, 3, padding=1).double())
    layer.double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    latents = layer.monolora_encoder.default(x).movedim(1, -1)
    update = 5 / 6 * reference(latents.detach(), 2) @ layer.monolora_decoder.default.weight[:, :, 0, 0].T
    torch.testing.assert_close(layer(x), layer.base_layer(x) + update.movedim(-1, 1))


def test_an_embedding_counts_for_each_token():
    model = get_peft_model(
        Tokens(), MonoLoraConfig(r=6, target_modules=["table"], activation="topk", k=2, init_weights=False)
    )
    layer = model.base_model.model.table
    ids = torch.randint(0, 50, (3, 4))
    latents = reference(layer.monolora_encoder.default.weight.detach()[ids], 2)
    expected = layer.base_layer(ids) + 8 / 6 * latents @ layer.monolora_decoder.default.weight.T
    torch.testing.assert_close(layer(ids), expected)


def test_fused_experts_count_for_each_routed_row():
    torch.manual_seed(0)
    options = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "activation": "topk", "k": 2}
    model = get_peft_model(mixtral(), MonoLoraConfig(r=6, init_weights=False, **options)).eval()
    layer = next(m for m in model.modules() if isinstance(m, MonoLoraLayer))
    seen = []
    layer.monolora_activation["default"].register_forward_hook(
        lambda m, args, latents: seen.extend((args[0], latents))
    )
    model(input_ids=torch.randint(1, 50, (2, 6)))
    assert torch.equal(seen[1], reference(seen[0].detach(), 2))


def test_with_k_equal_to_r_it_is_relu(llama, random_adapter, input_ids):
    logits = []
    for options in ({"activation": "relu"}, {"activation": "topk", "k": 4}):
        torch.manual_seed(1)
        model = random_adapter(copy.deepcopy(llama), target_modules="all-linear", **options)
        logits.append(model(input_ids).logits)
    torch.testing.assert_close(*logits)


def test_sparsity(llama, random_adapter, input_ids):
    model = random_adapter(llama, r=16, activation="topk", k=2)
    sparsity = activation_sparsity(model, [{"input_ids": input_ids}])
    assert sparsity.overall >= 14 / 16
    assert sparsity.dead > 0


def test_silence_and_certificates(llama, random_adapter, input_ids):
    """The hinge is that of relu: all latents of a token are zero if all A x <= 0, whatever k is."""
    gradients = []
    for options in ({"activation": "relu"}, {"activation": "topk", "k": 2}):
        torch.manual_seed(1)
        model = random_adapter(copy.deepcopy(llama), target_modules="all-linear", encoder_bias=True, **options)
        Silence(model, [{"input_ids": input_ids}]).add_gradients(0)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())
    assert certify(model, [{"input_ids": input_ids}]).silent == 0
    for name, parameter in model.named_parameters():
        if name.endswith("monolora_encoder.default.bias"):
            parameter.data -= 100
    certificate = certify(model, [{"input_ids": input_ids}])
    assert (certificate.silent, certificate.compared) == (3, 3)


def test_it_is_saved_and_checked(check, small_model, tmp_path, input_ids):
    adapter = save_adapter(small_model, tmp_path / "adapter", activation="topk", k=3)
    config = PeftConfig.from_pretrained(adapter)
    assert (config.activation, config.k) == ("topk", 3)
    assert check(adapter).code == 0
    other = save_adapter(small_model, tmp_path / "other", activation="topk", k=2)
    model = get_peft_model(MLP(), MonoLoraConfig(target_modules=["below"], r=4, activation="topk", k=3))
    with pytest.raises(ValueError, match=r"`k` is 3 there and 2 in"):
        replace_adapter(model, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`activation='topk'` needs a positive integer `k`, got None"),
        ({"k": 0}, "needs a positive integer `k`, got 0"),
        ({"k": True}, "needs a positive integer `k`, got True"),
        ({"k": 2.0}, "needs a positive integer `k`, got 2.0"),
        ({"k": 9}, "`k=9` is more than `r=8`"),
        ({"k": 5, "rank_pattern": {"q_proj": 4}}, r"`k=5` is more than `rank_pattern\['q_proj'\]=4`"),
        ({"activation": "relu", "k": 4}, "`k=4` is an option of `activation='topk'`, got 'relu': remove `k`"),
    ],
)
def test_what_k_may_be(options, message):
    with pytest.raises(ValueError, match=message):
        MonoLoraConfig(**{"activation": "topk"} | options)
