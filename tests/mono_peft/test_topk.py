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
    assert TopK(2)(latents).isnan().any()
    assert TopK(2, -2)(latents.T).isnan().any()


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


def is_sparse(layer, x):
    """Whether the update is computed from the active units alone."""
    return type(layer.update("default", x).grad_fn).__name__ == "_TopKUpdateBackward"


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    r=st.integers(16, 80),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    encoder_bias=st.booleans(),
    frozen=st.booleans(),
    input_gradient=st.booleans(),
    ties=st.booleans(),
)
def test_active_units_alone_give_what_all_give(
    lead, sizes, r, share, dtype, encoder_bias, frozen, input_gradient, ties
):
    """The gradients too, against autograd through dense products."""
    torch.manual_seed(0)
    k = 1 + int(share * (r // 16 - 1))
    options = {"r": r, "k": k, "encoder_bias": encoder_bias, "frozen_encoder": frozen}
    _, layer = adapted(nn.Linear(*sizes).to(dtype), **options)
    layer.to(dtype)
    x = torch.randn(*lead, sizes[0], dtype=dtype)
    if ties:
        encoder = layer.monolora_encoder.default
        encoder.weight.data = encoder.weight.data.sign()
        if encoder_bias:
            encoder.bias.data.zero_()
        x = x.sign()
    x.requires_grad_(input_gradient)
    assert is_sparse(layer, x)
    found, expected = layer.update("default", x), MonoLoraLayer.update(layer, "default", x)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found, expected, **tolerance)
    learned = [p for n, p in layer.named_parameters() if p.requires_grad] + ([x] if input_gradient else [])
    direction = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, learned, direction), torch.autograd.grad(expected, learned, direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_gradients_of_active_units_by_finite_differences_also_of_second_order():
    torch.manual_seed(0)
    _, layer = adapted(nn.Linear(4, 3).double(), r=16, k=1, encoder_bias=True)
    layer.double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert is_sparse(layer, x)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *parameters))
    assert torch.autograd.gradgradcheck(lambda *_: layer(x), (x, *parameters))


def test_dropout_acts_before_the_active_units():
    torch.manual_seed(0)
    _, layer = adapted(nn.Linear(9, 3), r=32, lora_dropout=0.5)
    layer.train()
    x = torch.randn(5, 9)
    assert is_sparse(layer, x)
    torch.manual_seed(1)
    found = layer.update("default", x)
    torch.manual_seed(1)
    torch.testing.assert_close(found, MonoLoraLayer.update(layer, "default", x))


@pytest.mark.parametrize("part", ["monolora_encoder", "monolora_activation", "monolora_decoder"])
def test_hooks_see_all_latents(part):
    _, layer = adapted(nn.Linear(9, 3), r=32)
    x, seen = torch.randn(5, 9), []
    assert is_sparse(layer, x)
    getattr(layer, part).default.register_forward_hook(lambda m, args, output: seen.append(output))
    assert not is_sparse(layer, x)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("options", "dtype"), [({"r": 31}, torch.float32), ({"r": 32}, torch.bfloat16), ({"r": 32, "k": 3}, torch.float32)]
)
def test_where_all_units_are_computed(options, dtype):
    _, layer = adapted(nn.Linear(9, 3).to(dtype), **options)
    layer.to(dtype)
    assert not is_sparse(layer, torch.randn(5, 9, dtype=dtype))


def test_texts_that_are_silent_get_exactly_nothing_in_training():
    _, layer = adapted(nn.Linear(9, 3), r=32, encoder_bias=True)
    layer.monolora_encoder.default.bias.data -= 100
    x = torch.randn(5, 9, requires_grad=True)
    assert is_sparse(layer, x)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.update("default", x).sum().backward()
    assert not x.grad.any()
    assert not layer.monolora_encoder.default.weight.grad.any()


@settings(max_examples=40, deadline=None)
@given(lead=st.lists(st.just(1), max_size=3), r=st.integers(16, 80), encoder_bias=st.booleans(), ties=st.booleans())
def test_one_token_without_gradients_is_decoded_by_its_active_units(lead, r, encoder_bias, ties):
    torch.manual_seed(0)
    _, layer = adapted(nn.Linear(9, 5).double(), r=r, k=max(1, r // 16), encoder_bias=encoder_bias)
    layer.double().eval()
    if ties:
        layer.monolora_encoder.default.weight.data.sign_()
    x = torch.randn(*lead, 9, dtype=torch.float64).sign()
    with torch.no_grad():
        expected = layer.base_layer(x) + MonoLoraLayer.update(layer, "default", x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TopK, "forward", None)  # it is not called
            found = layer(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        layer.monolora_activation.default.register_forward_hook(lambda m, args, output: output * 0)
        assert torch.equal(layer(x), layer.base_layer(x))
