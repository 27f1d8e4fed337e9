"""`layer_replication`: some layers several times, on the base's weights, with an adapter for each time."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    set_seed,
)

from mono_peft import MonoLoraConfig, MonoLoraLayer, replace_adapter

RANGES = [(0, 3), (1, 4)]
ORDER = [0, 1, 2, 1, 2, 3]
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10], [13, 14, 15, 16, 17, 18, 19, 3]])
SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
OPTIONS = {"r": 4, "layer_replication": RANGES, "task_type": "CAUSAL_LM"}


def base_of(config):
    set_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def llama():
    return base_of(LlamaConfig(**SIZES))


def adapted(base, **more):
    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(base), MonoLoraConfig(**{"init_weights": False} | OPTIONS | more)).eval()


def written_out(base):
    """The model that `base` becomes, with layers and weights of its own."""
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = len(ORDER)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in ORDER]
    model = base_of(config)
    weights = base.state_dict()
    for i, source in enumerate(ORDER):
        prefix = f"model.layers.{source}."
        layer = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        model.model.layers[i].load_state_dict(layer)
    model.load_state_dict({n: w for n, w in weights.items() if ".layers." not in n}, strict=False)
    return model.eval()


ALTERNATING = Gemma2Config(
    **SIZES, head_dim=8, sliding_window=3, layer_types=["sliding_attention", "full_attention"] * 2
)


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), ALTERNATING], ids=["llama", "gemma2"])
@torch.no_grad()
def test_it_is_the_model_written_out(config):
    base = base_of(config)
    model, expected = adapted(base), written_out(base)
    weights = {n: p for n, p in model.named_parameters() if "monolora" in n}
    assert len(weights) == len(ORDER) * 2 * 2
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits)
    whole = get_peft_model(expected, MonoLoraConfig(r=4, task_type="CAUSAL_LM")).eval()
    whole.load_state_dict(weights, strict=False)
    torch.testing.assert_close(model(IDS).logits, whole(IDS).logits)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(input_ids=IDS, **settings), whole.generate(input_ids=IDS, **settings))
    assert torch.equal(
        model.generate(input_ids=IDS, use_cache=False, **settings), whole.generate(input_ids=IDS, **settings)
    )


def test_the_identity_equals_lora(llama):
    lora = get_peft_model(copy.deepcopy(llama), LoraConfig(init_lora_weights=False, **OPTIONS))
    mono = adapted(llama, activation="identity")
    weights = lora.state_dict()
    mono.load_state_dict(
        {n.replace("lora_A", "monolora_encoder").replace("lora_B", "monolora_decoder"): w for n, w in weights.items()}
    )
    gradients = []
    for model in (lora.train(), mono.train()):
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(mono(IDS).logits, lora(IDS).logits)
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_saved_loaded_and_replaced(llama, tmp_path):
    model = adapted(llama)
    parameters = sum(p.numel() for n, p in model.named_parameters() if "monolora" not in n)
    assert parameters == sum(p.numel() for p in llama.parameters())  # no weight of the base is there twice
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    assert loaded.peft_config["default"].layer_replication == [[0, 3], [1, 4]]
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    other = adapted(llama, layer_replication=[[0, 2], [0, 4]])
    with pytest.raises(ValueError, match="Cannot replace adapter 'default' in place: `layer_replication` is"):
        replace_adapter(other, tmp_path)
    assert len(loaded.load_adapter(tmp_path, "second").unexpected_keys) == 0  # the layers are there already
    loaded.set_adapter("second")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="`layer_replication` differs from that of the model's other adapters"):
        loaded.add_adapter("third", MonoLoraConfig(task_type="CAUSAL_LM"))
    assert set(loaded.peft_config) == {"default", "second"}


@torch.no_grad()
def test_unloading_gives_the_base_back(llama):
    expected = llama(IDS).logits
    layers = list(llama.model.layers)
    model = get_peft_model(llama, MonoLoraConfig(init_weights=False, **OPTIONS)).unload()
    assert list(model.model.layers) == layers
    assert model.config.num_hidden_layers == 4
    assert torch.equal(model(IDS).logits, expected)


def test_a_refusal_leaves_the_model_as_it_was(llama):
    layers = list(llama.model.layers)
    for targets, ranges, message in [
        (["norm"], RANGES, "it is a LlamaRMSNorm"),
        (["query"], RANGES, "Target modules query not found"),
        (["q_proj"], [[0, 5]], r"`layer_replication=\[\[0, 5\]\]` names layers that this model does not have"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            get_peft_model(llama, MonoLoraConfig(target_modules=targets, layer_replication=ranges))
        assert list(llama.model.layers) == layers
        assert llama.config.num_hidden_layers == 4
    assert not any(isinstance(module, MonoLoraLayer) for module in llama.modules())


def test_a_layout_that_peft_does_not_know(gpt2):
    assert isinstance(gpt2, GPT2LMHeadModel)
    with pytest.raises(ValueError, match="Could not locate the layers attribute"):
        get_peft_model(gpt2, MonoLoraConfig(layer_replication=[[0, 2], [0, 2]]))


@pytest.mark.parametrize("ranges", [[], [[0]], [[2, 2]], [[-1, 2]], [[0, 1.5]]])
def test_ranges_that_are_none(ranges):
    with pytest.raises(ValueError, match=r"must be a list of ranges of layers \[first, last \+ 1\]"):
        MonoLoraConfig(layer_replication=ranges)


def test_layers_are_chosen_among_the_replicated_ones(llama):
    model = adapted(
        llama, target_modules=["q_proj"], layers_to_transform=[3, 5], rank_pattern={"5.self_attn.q_proj": 2}
    )
    names = {n: m.r["default"] for n, m in model.get_base_model().named_modules() if isinstance(m, MonoLoraLayer)}
    assert names == {"model.layers.3.self_attn.q_proj": 4, "model.layers.5.self_attn.q_proj": 2}
    assert isinstance(model.get_base_model(), LlamaForCausalLM)


@torch.no_grad()
def test_transformers_own_loading(llama, tmp_path):
    """As `transformers serve` does it."""
    model = adapted(llama)
    model.save_pretrained(tmp_path)
    llama.load_adapter(str(tmp_path))
    assert torch.equal(llama(IDS).logits, model(IDS).logits)


def test_fused_experts_of_each_layer():
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    parts = [[0, 2], [0, 2]]
    model = adapted(MixtralForCausalLM(config), target_parameters=["mlp.experts.down_proj"], layer_replication=parts)
    layers = {n.split("layers.")[1][0] for n, _ in model.named_parameters() if "down_proj.monolora_encoder" in n}
    assert layers == {"0", "1", "2", "3"}
