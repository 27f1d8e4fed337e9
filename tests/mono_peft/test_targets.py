"""Linear and embedding layers with a forward of their own: adapted where it is the same function, else refused."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from timm.layers import Linear as TimmLinear
from torch import nn
from torch.nn import functional
from transformers import BartConfig, BartModel, Llama4ForCausalLM, Llama4TextConfig, PhimoeConfig, PhimoeForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.fsmt.modeling_fsmt import SinusoidalPositionalEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from mono_peft import MonoLoraConfig, MonoLoraLayer

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0,
}  # fmt: skip


def phimoe():
    return PhimoeForCausalLM(PhimoeConfig(**SIZES))


def llama4():
    return Llama4ForCausalLM(Llama4TextConfig(intermediate_size_mlp=32, head_dim=8, **SIZES))


@pytest.mark.parametrize("model", [phimoe, llama4])
def test_routers_are_refused_with_the_list(model, input_ids):
    model = model()
    before = {n: type(m) for n, m in model.named_modules()}
    message = (
        r"layers\.0\.\w+\.router': \w+Router has a forward of its own, which returns a tuple and not a tensor "
        r"\(and 1 more like it\)\. .*exclude_modules=\['router'\].* can be adapted: .*q_proj, .*v_proj"
    )
    for targets in ("all-linear", ["q_proj", "router"]):
        with pytest.raises(TypeError, match=message):
            get_peft_model(model, MonoLoraConfig(target_modules=targets))
        assert {n: type(m) for n, m in model.named_modules()} == before
    model = get_peft_model(model, MonoLoraConfig(target_modules="all-linear", exclude_modules=["router"]))
    model(input_ids % 50).logits.sum().backward()


class Flattening(nn.Linear):
    def forward(self, x):
        return super().forward(x.reshape(-1, self.in_features))


class ChannelsFirst(nn.Linear):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class TwoInputs(nn.Linear):
    def forward(self, x, gate):
        return super().forward(x) * gate


class Positions(nn.Embedding):
    def forward(self, ids):
        return super().forward(torch.arange(ids.shape[1])).expand(len(ids), -1, -1)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Flattening(6, 4), r"makes the shape \(6, 4\) of \(2, 3, 6\), where an adapter makes \(2, 3, 4\)"),
        (ChannelsFirst(6, 4), r"fails on an input of shape \(2, 3, 6\) \(RuntimeError"),
        (TwoInputs(6, 4), r"fails on an input of shape \(2, 3, 6\) \(TypeError: .*gate"),
        (IdeficsDecoupledLinear(6, 4, 2), r"makes the shape \(2, 3, 6\)"),
        (Positions(8, 4), "gives an id other vectors at other places, as tables of positions do"),
        (SinusoidalPositionalEmbedding(8, 4, 0), "gives an id other vectors at other places"),
        (OPTLearnedPositionalEmbedding(8, 4), "OPTLearnedPositionalEmbedding has a forward of its own, which"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_functions_are_refused(layer, reason, device):
    model = nn.Sequential(copy.deepcopy(layer).to(device))
    with pytest.raises(
        TypeError, match=f"'0': {type(layer).__name__} has a forward of its own, which .*{reason}|{reason}"
    ):
        inject_adapter_in_model(MonoLoraConfig(target_modules=["0"]), model)
    assert type(model[0]) is type(layer)


def test_tables_of_positions_in_a_model():
    config = BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    with pytest.raises(
        TypeError, match=r"encoder\.embed_positions': BartLearnedPositionalEmbedding .* at other places"
    ):
        get_peft_model(BartModel(config), MonoLoraConfig(target_modules=["embed_positions"]))


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Normed(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm = nn.LayerNorm(sizes[1])

    def forward(self, ids):
        return self.norm(super().forward(ids))


@pytest.mark.parametrize(
    "layer",
    [
        FalconLinear(6, 4), TimmLinear(6, 4), Shifted(6, 4), Shifted(6, 4).bfloat16(), Normed(6, 4),
        Gemma3TextScaledWordEmbedding(6, 4, 0, embed_scale=4.0), Gemma3TextScaledWordEmbedding(6, 4, 5).half(),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_the_same_function_in_other_words_is_adapted(layer):
    model = get_peft_model(nn.Sequential(copy.deepcopy(layer)), MonoLoraConfig(target_modules=["0"]))
    assert isinstance(model.base_model.model[0], MonoLoraLayer)
    x = (
        torch.tensor([[0, 5, 2]])
        if isinstance(layer, nn.Embedding)
        else torch.randn(2, 3, 6, dtype=layer.weight.dtype)
    )
    torch.testing.assert_close(model(x), layer(x))


def test_a_scaled_embedding_is_adapted_as_by_lora():
    torch.manual_seed(0)
    base = nn.Sequential(Gemma3TextScaledWordEmbedding(20, 6, 0, embed_scale=2.5))
    options = {"target_modules": ["0"], "r": 4}
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights=False, **options))
    mono = get_peft_model(base, MonoLoraConfig(activation="identity", init_weights=False, **options))
    theirs, ours = lora.base_model.model[0], mono.base_model.model[0]
    ours.monolora_encoder.default.weight.data.copy_(theirs.lora_embedding_A.default.T)
    ours.monolora_decoder.default.weight.data.copy_(theirs.lora_embedding_B.default)
    ids = torch.tensor([[0, 5, 19]])
    torch.testing.assert_close(mono(ids), lora(ids))
    assert not torch.allclose(mono(ids), base[0].base_layer(ids))


class Counting(nn.Linear):
    """A layer with a state: what is tried must not leave a trace."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return functional.dropout(super().forward(x))


def test_trying_leaves_no_trace():
    layer = Counting(6, 4)
    layer.register_forward_hook(lambda *_: pytest.fail("the hook was called"))
    weight, model = layer.weight.clone(), nn.Sequential(layer, nn.ReLU())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with pytest.raises(TypeError):  # the activation is refused, after the first layer was tried
        inject_adapter_in_model(MonoLoraConfig(target_modules=["0", "1"]), model)
    assert torch.equal(torch.rand(3), expected)
    assert layer.calls == 0
    assert torch.equal(layer.weight, weight)
    assert layer.weight.requires_grad
