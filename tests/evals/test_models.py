"""A base and its adapters: what does not fit is refused before weights are loaded, and the base stays what it was."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from evals.models import Adapter, attached, check_adapter, check_base, load_base, method_and_seed


def check(adapter, base):
    check_adapter(Adapter(str(adapter)), str(base), AutoConfig.from_pretrained(base))


def edit(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ("base", None)),
        ("lora-seed0", ("lora", 0)),
        ("runs/seed_study/monolora-seed12/adapter", ("monolora", 12)),
        ("runs/sst2/lora_seed3", ("lora", 3)),
        ("my-adapter", ("my-adapter", None)),
        ("seed4", ("seed4", 4)),
    ],
)
def test_method_and_seed_of_a_name(given, expected):
    assert method_and_seed(given) == expected


def test_names_and_folders(tmp_path):
    assert (Adapter("a=b/c").name, Adapter("a=b/c").source) == ("a", "b/c")
    assert (Adapter("b/c").name, Adapter("b/c").source) == ("b/c", "b/c")
    (tmp_path / "lr=1").mkdir()
    assert Adapter(f"{tmp_path}/lr=1").source == f"{tmp_path}/lr=1"
    with pytest.raises(ValueError, match=r"--adapters has 'a='; write FOLDER or NAME=FOLDER"):
        Adapter("a=")


@pytest.mark.parametrize("method", ["lora", "monolora"])
def test_an_adapter_of_this_base_passes_without_weights(talking_model, make_adapter, method, monkeypatch):
    adapter = make_adapter(talking_model, "one", method, modules_to_save=["lm_head"])
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    check(adapter, talking_model)


def test_a_moved_base_passes(talking_model, make_adapter, tmp_path):
    adapter = make_adapter(talking_model, "one")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(talking_model, tmp_path / "elsewhere" / "talker")
    check(adapter, tmp_path / "elsewhere" / "talker")


def test_another_base_is_refused_by_name(talking_model, make_adapter, tmp_path):
    adapter = make_adapter(talking_model, "one")
    shutil.copytree(talking_model, tmp_path / "other")
    with pytest.raises(ValueError, match=r"trained on '.*talker', not on '.*other': use --model .*talker"):
        check(adapter, tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, r"does not fit .* has the shape \(4, 32\) in its file, the model needs \(4, 64\)"),
        ({"num_hidden_layers": 1}, r"layers\.1\..* in its file, the model needs none of that name"),
        ({"num_hidden_layers": 3}, r"layers\.2\..* has the shape absent in its file"),
    ],
)
def test_another_base_is_refused_by_its_shapes(talking_model, make_adapter, tmp_path, change, message):
    adapter = make_adapter(talking_model, "one", "monolora")
    config = LlamaConfig.from_pretrained(talking_model)
    LlamaForCausalLM(LlamaConfig(**(config.to_dict() | change))).save_pretrained(tmp_path / "new" / "talker")
    with pytest.raises(ValueError, match=message):
        check(adapter, tmp_path / "new" / "talker")


def test_adapter_folders_that_are_not_whole(talking_model, make_adapter, tmp_path):
    adapter = make_adapter(talking_model, "one")
    with pytest.raises(ValueError, match=r"Cannot load adapter_model.safetensors of the adapter 'no/such'.*no local"):
        check("no/such", talking_model)
    edit(adapter, peft_type="NOSUCH")
    with pytest.raises(ValueError, match=r"has a adapter_config.json that PEFT cannot read|cannot read \("):
        check(adapter, talking_model)
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors; weights in other formats are not read"):
        check(adapter, talking_model)
    weights.write_bytes(b"not weights")
    edit(adapter, peft_type="LORA")
    with pytest.raises(ValueError, match=r"its adapter_model.safetensors cannot be read"):
        check(adapter, talking_model)


def test_bases_that_cannot_be_had(talking_model, tmp_path):
    with pytest.raises(ValueError, match=r"Cannot load the model 'google/gemma'.*network access.*`hf auth login`"):
        check_base("google/gemma")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"lacks a model's or tokenizer's files"):
        check_base(str(tmp_path / "empty"))
    whole = (talking_model / "model.safetensors").read_bytes()
    (talking_model / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"weights .*model\.safetensors cannot be read \(.*\): fetch the file again"):
        check_base(str(talking_model))
    (talking_model / "model.safetensors").rename(talking_model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no \.safetensors; weights in other formats are not read"):
        check_base(str(talking_model))


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("is_tied", [False, True])
def test_an_adapter_with_saved_embeddings_changes_no_other_arm(talking_model, tmp_path, targets, is_tied):
    if is_tied:
        model = AutoModelForCausalLM.from_pretrained(talking_model, tie_word_embeddings=True)
        model.config.tie_word_embeddings = True
        model.save_pretrained(talking_model)
    trained = get_peft_model(
        AutoModelForCausalLM.from_pretrained(talking_model), LoraConfig(target_modules=targets, task_type="CAUSAL_LM")
    ).eval()
    with torch.no_grad():
        trained.get_input_embeddings().weight.add_(0.1)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    fresh = PeftModel.from_pretrained(load_base(str(talking_model), "auto", False), tmp_path / "adapter").eval()
    adapter, ids = Adapter(str(tmp_path / "adapter")), torch.arange(3, 13)[None]
    check(tmp_path / "adapter", talking_model)
    base = load_base(str(talking_model), "auto", load_in_4bit=False)
    before = base(ids).logits
    with attached(base, adapter) as model:
        assert torch.equal(model(ids).logits, fresh(ids).logits)
    assert torch.equal(base(ids).logits, before)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}),
        ("lora", {"modules_to_save": ["lm_head"]}),
        ("lora", {"bias": "all"}),
        ("monolora", {}),
        ("monolora", {"modules_to_save": ["lm_head"]}),
    ],
)
def test_the_base_is_what_it_was_after_an_adapter(tmp_path, gpt2, make_adapter, method, options):
    gpt2.save_pretrained(tmp_path / "gpt2")
    adapter = make_adapter(tmp_path / "gpt2", "one", method, target_modules=["c_attn"], fan_in_fan_out=True, **options)
    base = load_base(str(tmp_path / "gpt2"), "auto", load_in_4bit=False)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    ids = torch.arange(3, 13)[None]
    logits = base(ids).logits
    fresh = PeftModel.from_pretrained(load_base(str(tmp_path / "gpt2"), "auto", load_in_4bit=False), adapter).eval()
    for _ in range(2):
        with attached(base, Adapter(str(adapter))) as model:
            assert torch.equal(model(ids).logits, fresh(ids).logits)
            assert not torch.equal(model(ids).logits, logits)
        after = base.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert torch.equal(base(ids).logits, logits)


@pytest.mark.slow
def test_a_4_bit_base(talking_model, make_adapter):
    pytest.importorskip("bitsandbytes")
    base = load_base(str(talking_model), "float32", load_in_4bit=True)
    assert type(base.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    ids = torch.arange(3, 13)[None]
    before = base(ids).logits
    with attached(base, Adapter(str(make_adapter(talking_model, "one", "monolora")))) as model:
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(base(ids).logits, before)
