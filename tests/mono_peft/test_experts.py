"""Fused experts: equal to a loop over tokens and experts, to transformers' own experts, and to PEFT's LoRA."""

import copy
import math

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mono_peft import MonoLoraConfig
from mono_peft.layer import ACTIVATIONS, MonoLoraLayer

SIZES = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "num_experts_per_tok": 2}


def mixtral(**more):
    return MixtralForCausalLM(MixtralConfig(**SIZES | more, intermediate_size=8, num_local_experts=4))


def qwen3_moe(**more):
    sizes = {"intermediate_size": 16, "head_dim": 6, "num_experts": 4, "moe_intermediate_size": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | more, **sizes))


def olmoe(**more):
    return OlmoeForCausalLM(OlmoeConfig(**SIZES | more, intermediate_size=8, num_experts=4, eos_token_id=1))


def gpt_oss(**more):
    return GptOssForCausalLM(GptOssConfig(**SIZES | more, intermediate_size=8, head_dim=6, num_local_experts=4))


def deepseek_v3(**more):
    """The first layer is dense, the second has experts and a shared one beside them."""
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 2, "first_k_dense_replace": 1}
    heads = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
    sizes = {"intermediate_size": 16, "moe_intermediate_size": 8}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES | more, **experts, **heads, **sizes))


def nemotron_h(**more):
    """Experts without a gate; the second layer has them."""
    sizes = {"vocab_size": 50, "hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 6}
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 8}
    experts |= {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_latent_size": None}
    return NemotronHForCausalLM(NemotronHConfig(**sizes, **experts, layers_block_type=["attention", "moe"], **more))


FAMILIES = {f.__name__: f for f in (mixtral, qwen3_moe, olmoe, gpt_oss, deepseek_v3, nemotron_h)}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
TARGETS = dict.fromkeys(FAMILIES, BOTH) | {"nemotron_h": ["experts.up_proj", "experts.down_proj"]}
every_family = pytest.mark.parametrize("family", FAMILIES)
IDS = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(0))


def base_of(family, **more):
    torch.manual_seed(0)
    base = FAMILIES[family](**more).eval()
    with torch.no_grad():  # what starts at zero would hide errors
        for name, parameter in base.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.4)
    return base


def adapted(base, targets, **options):
    torch.manual_seed(1)
    options = {"r": 3, "lora_alpha": 5, "init_weights": False, "target_modules": []} | options
    return get_peft_model(base, MonoLoraConfig(target_parameters=targets, **options)).eval()


def experts_of(model):
    """The last experts module of a model, or what wraps it."""
    return [module for name, module in model.named_modules() if name.endswith(".experts")][-1]


def sigma(name, x):
    zero = torch.zeros_like(x)
    return {
        "relu": lambda: torch.maximum(x, zero),
        "relu2": lambda: torch.maximum(x, zero) ** 2,
        "relu6": lambda: torch.minimum(torch.maximum(x, zero), zero + 6),
        "sigmoid": lambda: 1 / (1 + torch.exp(-x)),
        "softplus": lambda: torch.log1p(torch.exp(x)),
        "identity": lambda: x,
    }[name]()


def gated(family, z):
    """What a family makes of the first projection of one token."""
    if family == "nemotron_h":
        return torch.relu(z) ** 2
    if family == "gpt_oss":  # interleaved and clamped
        gate, up = z[0::2].clamp(max=7.0), z[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = z[: len(z) // 2], z[len(z) // 2 :]
    return gate / (1 + torch.exp(-gate)) * up


def reference(family, weights, adapters, activation, scale, hidden, index, routing_weights):
    """One token, one of its experts, one projection after another, by matrices and vectors.

    Args:
        weights: name -> (experts, ...) of the base.
        adapters: name -> (A, B), (experts, r, in) and (experts, out, r), of those projections that have one.
    """

    def project(name, expert, x):
        matrix = weights[name][expert]
        y = x @ matrix if family == "gpt_oss" else matrix @ x
        if f"{name}_bias" in weights:
            y = y + weights[f"{name}_bias"][expert]
        if name in adapters:
            encoder, decoder = adapters[name]
            y = y + scale * decoder[expert] @ sigma(activation, encoder[expert] @ x)
        return y

    first = "up_proj" if family == "nemotron_h" else "gate_up_proj"
    rows = []
    for token in range(len(hidden)):
        outputs = [
            routing_weights[token, i]
            * project("down_proj", expert, gated(family, project(first, expert, hidden[token])))
            for i, expert in enumerate(index[token].tolist())
        ]
        rows.append(sum(outputs))
    return torch.stack(rows)


def routed_inputs(tokens=9, dtype=torch.float64):
    """Hidden states, the two experts of each token and their weights; expert 2 gets no token."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, 12, generator=generator).to(dtype)
    pairs = torch.tensor([[0, 1], [1, 0], [3, 1], [0, 3]])
    index = pairs[torch.randint(0, 4, (tokens,), generator=generator)]
    weights = torch.rand(tokens, 2, generator=generator).to(dtype)
    return hidden.requires_grad_(), index, weights.requires_grad_()


@every_family
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_gradients_equal_the_loop(family, activation):
    base = base_of(family).double()
    weights = {name: p.detach().clone() for name, p in experts_of(base).named_parameters()}
    model = adapted(base, TARGETS[family], activation=activation)
    experts = experts_of(model)
    names = [target.removeprefix("experts.") for target in TARGETS[family]]
    layers = {name: getattr(experts, name) for name in names}
    adapters = {
        name: (layer.monolora_encoder["default"].weight, layer.monolora_decoder["default"].weight)
        for name, layer in layers.items()
    }
    hidden, index, routing_weights = routed_inputs()
    found = experts(hidden, index, routing_weights)
    arguments = (hidden, index, routing_weights)
    expected = reference(family, weights, adapters, activation, 5 / 3, *arguments)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    learned = [hidden, routing_weights, *(weight for pair in adapters.values() for weight in pair)]
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(4), dtype=found.dtype)
    gradients = [torch.autograd.grad(y, learned, direction) for y in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert theirs.abs().max() > 0
    for gradient in gradients[0][2:]:
        assert gradient[2].abs().max() == 0  # of the expert without a token


@every_family
@pytest.mark.parametrize("number", [0, 1])
def test_one_of_the_two_weights(family, number):
    base = base_of(family).double()
    weights = {name: p.detach().clone() for name, p in experts_of(base).named_parameters()}
    model = adapted(base, [TARGETS[family][number]], use_rslora=True)
    name = TARGETS[family][number].removeprefix("experts.")
    layer = getattr(experts_of(model), name)
    adapters = {name: (layer.monolora_encoder["default"].weight, layer.monolora_decoder["default"].weight)}
    found = experts_of(model)(*routed_inputs())
    expected = reference(family, weights, adapters, "relu", 5 / math.sqrt(3), *routed_inputs())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@every_family
def test_without_an_update_it_is_the_base_to_the_last_bit(family):
    """Of the implementation grouped_mm, which is transformers' default; eager and batched_mm sum in other orders."""
    base = base_of(family)
    expected = {}
    for implementation in ("grouped_mm", "eager", "batched_mm"):
        base.set_experts_implementation(implementation)
        expected[implementation] = base(IDS).logits
        model = adapted(copy.deepcopy(base), TARGETS[family], init_weights=True)
        assert torch.equal(model(IDS).logits, expected["grouped_mm"])
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, expected[implementation])
    for implementation in ("eager", "batched_mm"):
        torch.testing.assert_close(expected[implementation], expected["grouped_mm"], rtol=1e-3, atol=1e-3)


@every_family
def test_the_identity_equals_lora(family):
    """Float64 and the same weights; PEFT's LoRA adds s B_e A_e to the stacked weight."""
    if Version(peft.__version__) < Version("0.20"):
        pytest.skip("LoRA of older PEFT takes in for out where the stacked weight is not transposed")
    base = base_of(family, experts_implementation="eager").double()
    lora = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, target_modules=[], target_parameters=TARGETS[family]),
    )
    ours = adapted(base, TARGETS[family], activation="identity")
    wrappers = {}
    for name, module in lora.named_modules():
        if hasattr(module, "parameter_name"):
            wrappers[name.replace(".base_layer", ""), module.parameter_name] = module
    with torch.no_grad():
        for (name, parameter), module in wrappers.items():
            layer = getattr(ours.get_submodule(name), parameter)
            experts, r, out = 4, 3, module.out_features
            encoder = module.lora_A["default"].weight.reshape(experts, r, -1)
            decoder = module.lora_B["default"].weight.reshape(out, r, experts).permute(2, 0, 1)
            layer.monolora_encoder["default"].weight.copy_(encoder)
            layer.monolora_decoder["default"].weight.copy_(decoder)
    found, expected = ours(IDS).logits, lora(IDS).logits
    assert (expected - base_of(family, experts_implementation="eager").double()(IDS).logits).abs().max() > 0.1
    # Nemotron-H's eager experts, which LoRA runs through here, add up in float32, as its router's weights are.
    tolerance = 1e-5 if family == "nemotron_h" else 1e-9
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    trainable = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, lora)]
    assert trainable[0] == trainable[1]


def test_parameter_counts():
    """Experts times r (in + out), for each of the two projections of both layers."""
    model = adapted(base_of("mixtral"), BOTH, r=3)
    assert model.get_nb_trainable_parameters()[0] == 2 * 4 * 3 * ((12 + 16) + (8 + 12))
    patterns = {"rank_pattern": {"experts.gate_up_proj": 1, "1.mlp.experts.down_proj": 2}}
    model = adapted(base_of("mixtral"), BOTH, r=3, **patterns)
    assert model.get_nb_trainable_parameters()[0] == 4 * (2 * (12 + 16) + (3 + 2) * (8 + 12))


def test_patterns_of_rank_and_alpha(recwarn):
    options = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {r"0\.mlp\.experts\..*": 7}}
    model = adapted(base_of("mixtral"), BOTH, **options)
    layers = {
        name.partition(".layers.")[2]: module
        for name, module in model.named_modules()
        if isinstance(module, MonoLoraLayer)
    }
    assert {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()} == {
        "0.mlp.experts.gate_up_proj": (3, 7 / 3),
        "0.mlp.experts.down_proj": (2, 7 / 2),
        "1.mlp.experts.gate_up_proj": (3, 5 / 3),
        "1.mlp.experts.down_proj": (2, 5 / 2),
    }
    assert not [w for w in recwarn if "pattern" in str(w.message)]
    with pytest.warns(UserWarning, match=r"match no adapted module or parameter and are ignored: experts\.up$"):
        adapted(base_of("mixtral"), BOTH, rank_pattern={"experts.up": 2})


def test_dropout_acts_on_what_the_encoder_sees_in_training_only():
    base = base_of("mixtral").double()
    weights = dict(experts_of(base).named_parameters())
    model = adapted(base, BOTH[:1], lora_dropout=0.5)
    layer = experts_of(model).gate_up_proj
    pair = (layer.monolora_encoder["default"].weight.double(), layer.monolora_decoder["default"].weight.double())
    layer.monolora_encoder["default"].weight.data, layer.monolora_decoder["default"].weight.data = pair
    hidden, _, _ = routed_inputs(tokens=1)
    index, routing_weights = torch.tensor([[3, 1]]), torch.ones(1, 2, dtype=torch.float64)
    evaluated = reference("mixtral", weights, {"gate_up_proj": pair}, "relu", 5 / 3, hidden, index, routing_weights)
    torch.testing.assert_close(experts_of(model)(hidden, index, routing_weights), evaluated)
    model.train()
    torch.manual_seed(5)
    found = experts_of(model)(hidden, index, routing_weights)
    torch.manual_seed(5)
    masks = functional.dropout(torch.ones(2, 12, dtype=torch.float64), 0.5)  # of the rows by expert: 1, then 3
    expected = 0
    for expert, mask in zip((1, 3), masks, strict=True):
        masked = (pair[0] * mask, pair[1])
        expected = expected + reference(
            "mixtral",
            weights,
            {"gate_up_proj": masked},
            "relu",
            5 / 3,
            hidden,
            torch.tensor([[expert]]),
            routing_weights[:, :1],
        )
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, evaluated)


@pytest.mark.parametrize("r", [1, 3, 4, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_every_rank_in_the_dtypes_of_the_kernel(r, dtype, tolerance):
    """torch's grouped product wants rows of whole 16 bytes, and r need not be; hidden states of 12 numbers are not."""
    found = {}
    for each in (torch.float64, dtype):
        model = adapted(base_of("mixtral"), BOTH, r=r, activation="softplus").to(each)  # without a step in gradients
        experts = experts_of(model)
        hidden, index, routing_weights = routed_inputs(dtype=each)
        y = experts(hidden, index, routing_weights)
        y.float().square().mean().backward()
        weights = [p for n, p in experts.named_parameters() if "monolora_" in n]
        found[each] = [y, hidden.grad, routing_weights.grad, *(p.grad for p in weights)]
        assert y.dtype == each
    for ours, exact in zip(found[dtype], found[torch.float64], strict=True):
        scale = exact.abs().max()
        assert scale > 0
        torch.testing.assert_close(ours.double() / scale, exact / scale, rtol=0, atol=tolerance)
