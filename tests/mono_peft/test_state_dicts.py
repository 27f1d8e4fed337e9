"""State dicts of adapters with biases, whole modules and token embeddings, as they are and inside FSDP."""

import copy

import peft
import pytest
import torch
from packaging.version import Version
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mono_peft import MonoLoraConfig

pytestmark = pytest.mark.skipif(
    Version("0.21") > Version(peft.__version__), reason="older PEFT does not save biases, and gives a tuner no say"
)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def llama(**options):
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        attention_bias=True, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


CASES = {
    "convnet": (ConvNet, {"target_modules": ["conv"]}),
    "convnet, head": (ConvNet, {"target_modules": ["conv"], "modules_to_save": ["head"]}),
    "convnet, head and norm": (ConvNet, {"target_modules": ["conv"], "modules_to_save": ["head", "norm"]}),
    "llama": (llama, {"target_modules": "all-linear"}),
    "llama, head": (llama, {"modules_to_save": ["lm_head"]}),
    "llama, embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama, tokens": (llama, {"trainable_token_indices": [3, 7]}),
    "llama, tokens of both": (llama, {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [1]}}),
    "tied": (lambda: llama(tie_word_embeddings=True), {"target_modules": "all-linear"}),
    "tied, embedding": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied, tokens": (lambda: llama(tie_word_embeddings=True), {"trainable_token_indices": [3, 7]}),
}
every_case = pytest.mark.parametrize("name", CASES)
every_bias = pytest.mark.parametrize("bias", ["none", "all", "lora_only"])


def base_of(name):
    torch.manual_seed(0)
    return CASES[name][0]().eval()


def adapted(name, bias="none"):
    """The case's base with an adapter, all of whose trainable parameters were moved."""
    model = get_peft_model(base_of(name), MonoLoraConfig(r=4, bias=bias, **CASES[name][1]))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def output(model):
    if isinstance(model.get_base_model() if isinstance(model, PeftModel) else model, ConvNet):
        return model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    return model(torch.arange(12).view(2, 6)).logits


@every_case
@every_bias
@pytest.mark.parametrize("second", [False, True])
def test_what_is_taken_out_can_be_put_in(name, bias, second):
    model = adapted(name, bias)
    fresh = get_peft_model(base_of(name), MonoLoraConfig(r=4, bias=bias, **CASES[name][1])).eval()
    if second:
        for each in (model, fresh):
            each.add_adapter("efaul", MonoLoraConfig(r=2, **CASES[name][1]))
    expected = output(model)
    tensors = {n: t.clone() for n, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    assert not torch.allclose(output(fresh), expected)
    assert not set_peft_model_state_dict(fresh, tensors).unexpected_keys
    assert torch.equal(output(fresh), expected)
    again = get_peft_model_state_dict(fresh, save_embedding_layers=False)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[n], tensors[n]) for n in tensors)


@every_case
@every_bias
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_what_is_saved_can_be_loaded(name, bias, low_cpu_mem_usage, tmp_path):
    model = adapted(name, bias)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base_of(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(output(loaded), output(model))


@every_case
def test_unloading_gives_the_base_back(name):
    base = base_of(name)
    expected, before = output(base), {n: t.clone() for n, t in base.state_dict().items()}
    model = adapted(name)
    assert peft.get_base_model_state_dict(model).keys() == before.keys()
    unloaded = model.unload()
    after = unloaded.state_dict()
    assert list(after) == list(before)
    trained = CASES[name][1].get("modules_to_save", [])  # PEFT leaves the trained copies
    assert {n for n in after if not torch.equal(after[n], before[n])} == {
        n for n in after if n.split(".")[0] in trained and not n.split(".")[-1].startswith(("running", "num"))
    }
    if not trained:
        assert torch.equal(output(unloaded), expected)
    if name.startswith("tied"):
        assert unloaded.lm_head.weight is unloaded.model.embed_tokens.weight


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@every_case
@every_bias
@pytest.mark.parametrize("layers", [False, True], ids=["one wrapper", "a wrapper around each layer"])
def test_inside_fsdp(name, bias, layers, process_group):
    model = adapted(name, bias)
    expected = {n: t.clone() for n, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    policy = ModuleWrapPolicy({LlamaDecoderLayer, nn.Conv2d}) if layers else None
    sharded = FullyShardedDataParallel(
        copy.deepcopy(model), auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    tensors = get_peft_model_state_dict(sharded, save_embedding_layers=False)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[n], expected[n]) for n in expected)
    changed = {n: t + 1 if t.is_floating_point() else t for n, t in expected.items()}
    with pytest.raises(ValueError, match=r"cannot load an adapter into a model inside a FullyShardedDataParallel"):
        set_peft_model_state_dict(sharded, changed)
    inner = sharded.module
    assert not set_peft_model_state_dict(inner, changed).unexpected_keys
    tensors = get_peft_model_state_dict(inner, save_embedding_layers=False)
    assert all(torch.equal(tensors[n], changed[n]) for n in changed)
