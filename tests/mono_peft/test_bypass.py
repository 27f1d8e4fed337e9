"""Adapters on modules that the model does not call: refused where the source shows it, else warned of."""

import re
import warnings

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModel,
    BambaConfig,
    DebertaConfig,
    FalconH1Config,
    FalconMambaConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    LongcatFlashConfig,
    Mamba2Config,
    MambaConfig,
    MobileBertConfig,
    MobileBertForMaskedLM,
    NemotronHConfig,
    T5Config,
    WavLMConfig,
    Zamba2Config,
)

from mono_peft import MonoLoraConfig, MonoLoraLayer

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
MODELS = {
    "bamba": (BambaConfig(attn_layer_indices=[1], **MAMBA2, **ATTENTION, **SMALL), {"out_proj"}),
    "granite hybrid": (
        GraniteMoeHybridConfig(
            layer_types=["mamba", "attention"], shared_intermediate_size=32, num_local_experts=0, **MAMBA2,
            **ATTENTION, **SMALL,
        ),
        {"out_proj"},
    ),
    "zamba2": (
        Zamba2Config(
            layers_block_type=["mamba", "hybrid"], hybrid_layer_ids=[1], num_mem_blocks=1, n_mamba_heads=4,
            mamba_headdim=16, mamba_d_state=8, mamba_ngroups=1, chunk_size=8, num_attention_heads=4,
            intermediate_size=48, **SMALL,
        ),
        {"out_proj"},
    ),
    "mamba2": (
        Mamba2Config(num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8, **SMALL), {"out_proj"},
    ),
    "falcon h1": (FalconH1Config(mamba_d_ssm=64, head_dim=8, **MAMBA2, **ATTENTION, **SMALL), {"out_proj"}),
    "nemotron h": (
        NemotronHConfig(
            hybrid_override_pattern="M*", mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=1,
            chunk_size=8, head_dim=8, **ATTENTION, **SMALL,
        ),
        {"out_proj"},
    ),
    "mamba": (MambaConfig(state_size=8, **SMALL), {"x_proj", "dt_proj", "out_proj"}),
    "falcon mamba": (FalconMambaConfig(state_size=8, **SMALL), {"x_proj", "dt_proj", "out_proj"}),
    "wavlm": (
        WavLMConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=(16,),
            conv_stride=(4,), conv_kernel=(4,), num_feat_extract_layers=1, num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        {"q_proj", "k_proj", "v_proj", "out_proj"},
    ),
    "longcat flash": (
        LongcatFlashConfig(
            vocab_size=50, hidden_size=32, num_layers=1, num_hidden_layers=2, num_attention_heads=4,
            ffn_hidden_size=48, expert_ffn_hidden_size=16, n_routed_experts=4, zero_expert_num=1, moe_topk=2,
            q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8,
        ),
        {"classifier"},
    ),
}  # fmt: skip


def adapted(model, **options):
    return get_peft_model(model, MonoLoraConfig(**{"target_modules": "all-linear", "init_weights": False} | options))


def adapted_ends(model):
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, MonoLoraLayer)}


def of_idle_layers(caught):
    return [str(w.message) for w in caught if "MonoLoRA layers" in str(w.message)]


@pytest.mark.parametrize("name", MODELS)
def test_what_a_kernel_or_every_path_reads_is_refused(name):
    config, read = MODELS[name]
    model = AutoModel.from_config(config)
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(TypeError, match=r"(never calls it|fused kernel).*can be adapted: ") as refused:
        adapted(model)
    assert {n: type(m) for n, m in model.named_modules()} == before
    excluded = re.search(r"exclude_modules=(\[.*?\])`", str(refused.value))
    assert set(eval(excluded[1])) == read  # as the message says it, so that it can be copied
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(reads the weight|MonoLoRA layers)")
        model = adapted(model, exclude_modules=eval(excluded[1]))
        assert read.isdisjoint(adapted_ends(model))
        inputs = {"input_values": torch.randn(2, 400)} if name == "wavlm" else {"input_ids": torch.ones(2, 8).long()}
        model(**inputs)


def test_a_named_target_is_refused_alike():
    with pytest.raises(
        TypeError, match=r"mamba\.out_proj': BambaMixer\.forward has a path that gives its weight to a"
    ):
        adapted(AutoModel.from_config(MODELS["bamba"][0]), target_modules=["out_proj", "q_proj"])


def test_a_head_that_is_multiplied_by_hand():
    config = MobileBertConfig(
        num_attention_heads=4, intermediate_size=48, embedding_size=32, true_hidden_size=32, intra_bottleneck_size=32,
        **SMALL,
    )  # fmt: skip
    message = r"'cls\.predictions\.dense': MobileBertLMPredictionHead\.forward reads its weight and never calls it"
    with pytest.raises(TypeError, match=message + r".*exclude_modules=\['cls\.predictions\.dense'\]"):
        adapted(MobileBertForMaskedLM(config))


def test_jamba_is_warned_of_before_and_after():
    config = JambaConfig(
        attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8, mamba_dt_rank=4, **ATTENTION, **SMALL
    )
    with pytest.warns(UserWarning, match=r"JambaMambaMixer\.forward reads the weight of dt_proj itself"):
        model = adapted(AutoModel.from_config(config))
    with pytest.warns(
        UserWarning, match=r"1 of \d+ MonoLoRA layers did not act in the first pass in training"
    ) as caught:
        model.train()(torch.ones(2, 8).long())
    assert "(layers.*.mamba.dt_proj)" in of_idle_layers(caught)[0]


def test_a_path_that_is_not_taken_is_warned_of_before_only():
    config = DebertaConfig(num_attention_heads=4, intermediate_size=48, **SMALL)
    with pytest.warns(UserWarning, match=r"DisentangledSelfAttention\.forward reads the weight of in_proj itself"):
        model = get_peft_model(AutoModel.from_config(config), MonoLoraConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(torch.ones(2, 8).long())


def test_asking_for_the_dtype_of_a_weight_is_no_bypass():
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = adapted(AutoModel.from_config(config))
        assert "wo" in adapted_ends(model)
        model(input_ids=torch.ones(2, 8).long(), decoder_input_ids=torch.ones(2, 8).long())


class Net(nn.Module):
    """Two linear layers; subclasses say how they use `proj`."""

    def __init__(self):
        super().__init__()
        self.first, self.proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.use(self.first(x))


class ByHand(Net):
    def use(self, x):
        return functional.linear(x, self.proj.weight, self.proj.bias)


class Transposed(Net):
    def use(self, x):
        return x @ self.proj.weight.t()


class Inherited(ByHand):
    def use(self, x):
        return super().use(x).relu()


class Read(Net):
    @property
    def projection(self):
        return self.proj.weight[:, :2]

    def use(self, x):
        return x[..., :2] @ self.projection.T


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Module()
        self.net.proj = nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.net.proj.weight


class Indexed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(4, 4)}) for _ in range(2)])

    def forward(self, x):
        return x @ self.layers[0]["proj"].weight @ self.layers[1]["proj"].weight


class Kernel(Net):
    def use(self, x):
        if not self.training:
            return torch.addmm(self.first.weight[0], self.first.weight, self.proj.weight.t()) @ x.T
        return self.proj(x)


def test_the_convolution_of_mamba_is_refused():
    with pytest.raises(TypeError, match=r"mixer\.conv1d': MambaMixer\.forward reads its weight and never calls it"):
        adapted(AutoModel.from_config(MODELS["mamba"][0]), target_modules=["conv1d"])


@pytest.mark.parametrize(
    "net", [ByHand, Transposed, Inherited, Read, Outer, Indexed, Kernel, nn.TransformerEncoderLayer]
)
def test_sources_that_read_the_weight(net):
    model = net(8, 2, 16) if net is nn.TransformerEncoderLayer else net()
    target = "linear2" if net is nn.TransformerEncoderLayer else "proj"
    with pytest.raises(TypeError, match=rf"{target}': {net.__name__}|{target}': ByHand\.use reads its weight"):
        inject_adapter_in_model(MonoLoraConfig(target_modules=[target]), model)
    assert not adapted_ends(model)


class Called(Net):
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.proj.weight)

    def use(self, x):
        if isinstance(self.proj.weight, torch.Tensor) and self.proj.weight.dtype != x.dtype:
            x = x.to(self.proj.weight.device)
        return self.proj.forward(x) + self.proj.bias.shape[0] + self.proj.weight.shape[0]

    def penalty(self):
        return self.proj.weight.square().sum()


def test_sources_that_do_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = adapted(Called(), target_modules=["proj"])
    assert adapted_ends(model) == {"proj"}


class Hidden(Net):
    """Reads the weight where no search of the source finds it, in evaluation only."""

    def use(self, x):
        layer = getattr(self, "pr" + "oj")
        return layer(x) if self.training else functional.linear(x, layer.weight)


def test_the_first_pass_in_each_mode_tells_what_the_source_hides():
    model, x = adapted(Hidden(), target_modules=["first", "proj"]), torch.randn(3, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train()(x)
        model.train()(x)
    assert of_idle_layers(caught) == []
    with pytest.warns(
        UserWarning, match=r"1 of 2 MonoLoRA layers did not act in the first pass in evaluation: .*\(proj\)"
    ):
        model.eval()(x)
    with torch.no_grad(), pytest.warns(UserWarning, match="in evaluation without gradients"):
        model(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x)
        with torch.no_grad():
            model(x)
    assert of_idle_layers(caught) == []
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(m.weight_is_read is None for m in model.modules() if isinstance(m, MonoLoraLayer))
    model.add_adapter("second", MonoLoraConfig(target_modules=["proj"]))
    with pytest.warns(UserWarning, match="1 of 2 MonoLoRA layers did not act"):
        model(x)


def test_a_pass_that_fails_is_not_the_first():
    model = adapted(Hidden(), target_modules=["proj"]).eval()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(3, 5))
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.warns(UserWarning, match="1 of 1 MonoLoRA layers did not act"):
        model(torch.randn(3, 4))


def test_compiled_without_a_graph_break():
    model, x = adapted(Hidden(), target_modules=["first", "proj"]), torch.randn(3, 4)
    expected = model(x)
    model.base_model._watched_modes.clear()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    torch._dynamo.reset()


class Mixture(nn.Module):
    """The first token of each row chooses its expert."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(3))
        self.spare = nn.Linear(4, 4)

    def forward(self, x, experts=(0,), spare=False):
        x = sum(self.experts[i]["up"](x) for i in experts)
        return self.spare(x) if spare else x


def test_experts_without_a_token_are_no_fault_and_unused_parts_are():
    x = torch.randn(2, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted(Mixture(), target_modules=["up", "spare"])(x, experts=(1,), spare=True)
    assert of_idle_layers(caught) == []
    with pytest.warns(UserWarning, match=r"1 of 4 MonoLoRA layers were not called .* in training \(spare\)"):
        adapted(Mixture(), target_modules=["up", "spare"])(x, experts=(1,))


def test_generating_is_one_pass(llama, input_ids):
    model = adapted(llama, task_type="CAUSAL_LM").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate(input_ids=input_ids, max_new_tokens=2, pad_token_id=0)
    assert model.base_model._watched_modes == {(False, True)}
