"""`frozen_encoder`: A and b stay as they were drawn, are saved, and no way of PEFT lets them train."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from small_bases import MLP, ConvNet, Tokens, llama, mixtral

from mono_peft import MonoLoraConfig, Silence, monolora_plus_param_groups

IDS = torch.randint(1, 50, (4, 6), generator=torch.Generator().manual_seed(0))
EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
BASES = {
    "llama": (llama, {"target_modules": "all-linear", "encoder_bias": True, "lora_dropout": 0.1}, {"input_ids": IDS}),
    "topk": (llama, {"target_modules": ["q_proj"], "activation": "topk", "k": 2}, {"input_ids": IDS}),
    "experts": (mixtral, EXPERTS | {"encoder_bias": True}, {"input_ids": IDS}),
    "convolutions": (ConvNet, {"target_modules": ["stem"], "encoder_bias": True}, {"x": torch.randn(2, 3, 8, 8)}),
    "table": (Tokens, {"target_modules": ["table"]}, {"x": IDS}),
}


def adapted(name, **more):
    base, options, inputs = BASES[name]
    torch.manual_seed(0)
    config = MonoLoraConfig(**{"r": 4, "frozen_encoder": True} | options | more)
    return get_peft_model(base(), config), inputs


def output(model, inputs):
    result = model(**inputs)
    return getattr(result, "logits", result)


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", BASES)
def test_training_moves_b_of_the_decoder_alone_and_the_file_has_the_encoder(name, tmp_path):
    model, inputs = adapted(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert trainable(model) == {n for n in before if "monolora_decoder" in n}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        output(model, inputs).square().mean().backward()
        optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trainable(model)
    expected = output(model.eval(), inputs)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len([n for n in saved if ".monolora_" in n]) == len([n for n in before if ".monolora_" in n])
    torch.manual_seed(0)
    base = BASES[name][0]()
    torch.manual_seed(99)  # what is drawn while loading does not matter
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert trainable(loaded) == trainable(model)
    assert torch.equal(output(loaded.eval(), inputs), expected)


@pytest.mark.parametrize("name", ["llama", "experts", "convolutions"])
def test_b_is_random_as_a_is(name):
    model, _ = adapted(name)
    for parameter in (p for n, p in model.named_parameters() if n.endswith("monolora_encoder.default.bias")):
        weight = next(p for n, p in model.named_parameters() if n.endswith("monolora_encoder.default.weight"))
        assert parameter.any()
        assert parameter.abs().max() < 3 * weight.abs().max()


def test_no_way_of_peft_lets_it_train():
    model, _ = adapted("llama")
    expected = trainable(model)
    model.add_adapter("learned", MonoLoraConfig(r=4, target_modules="all-linear"))
    model.set_adapter("learned")
    assert [n for n in trainable(model) if ".learned." in n and "encoder" in n]
    model.set_adapter("default")
    assert trainable(model) == expected
    with model.disable_adapter():
        pass
    assert trainable(model) == expected
    model.set_requires_grad(["default", "learned"])
    assert {n for n in trainable(model) if ".default." in n} == expected
    model.delete_adapter("learned")
    assert trainable(model) == expected


def test_the_learned_one_starts_with_the_same_a():
    """As the control differs by training alone."""
    weights = []
    for frozen in (False, True):
        model, _ = adapted("topk", frozen_encoder=frozen)
        weights.append({n: p for n, p in model.named_parameters() if "monolora_encoder" in n})
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[1][n], p) for n, p in weights[0].items())


def test_learning_rates():
    model, _ = adapted("llama")
    groups = monolora_plus_param_groups(model, 1e-3, 16)
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(14, 16e-3)]


def test_what_makes_no_sense(tmp_path):
    model, _ = adapted("llama")
    with pytest.raises(ValueError, match="has `frozen_encoder=True`: its A stays as it was drawn, and nothing but A"):
        Silence(model, [{"input_ids": IDS}])
    with pytest.raises(ValueError, match="`frozen_encoder` must be True or False, got 'yes'"):
        MonoLoraConfig(frozen_encoder="yes")
    get_peft_model(MLP(), MonoLoraConfig(target_modules=["below"], frozen_encoder=True)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["format_version"] == 2
