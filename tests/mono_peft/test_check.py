"""`python -m mono_peft.check`: adapters that are and are not what their file says."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mono_peft import MonoLoraConfig
from tests.mono_peft.conftest import CHECKED_PROMPTS, rewrite, save_adapter


def by_hand(base, adapter):
    """KL(adapter, base) a token and the largest difference of log-probabilities, prompt by prompt."""
    tokenizer, without = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(copy.deepcopy(without), adapter)
    divergences, largest = [], 0
    for prompt in CHECKED_PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        p, q = model(ids).logits[0].double().softmax(-1), without(ids).logits[0].double().softmax(-1)
        divergences.append((p * (p / q).log()).sum(-1))
        largest = max(largest, (p.log() - q.log()).abs().max().item())
    return torch.cat(divergences).mean().item(), largest


@pytest.mark.parametrize("config", [MonoLoraConfig, LoraConfig])
def test_an_adapter_that_is_applied(check, small_model, tmp_path, config):
    adapter = save_adapter(small_model, tmp_path / "adapter", config, modules_to_save=["lm_head"])
    result = check(adapter)
    assert result.code == 0
    assert result.last == "all is right: the model holds the file's tensors, its outputs differ from the base's"
    assert result.table["tensors"] == "29 in the file, 29 of them equal in the model"
    assert result.table["B"] == "is zero in 0 of 14 modules"
    divergence, largest = by_hand(small_model, adapter)
    assert float(result.table["KL(adapter, base)"].split()[0]) == pytest.approx(divergence, rel=5e-3)
    assert float(result.table["log-probabilities"].split()[5]) == pytest.approx(largest, rel=5e-3)
    if config is MonoLoraConfig:
        assert result.table["adapter"] == f"MONOLORA of rank 4, saved for {small_model}"
        assert result.table["live units"].endswith("%, fire on the prompts")
    else:
        assert "live units" not in result.table


@pytest.mark.parametrize("config", [MonoLoraConfig, LoraConfig])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_embeddings_and_a_base_of_lower_precision(check, small_model, tmp_path, config):
    """The file holds the base's embedding too, in float32."""
    adapter = save_adapter(small_model, tmp_path / "adapter", config, target_modules=["embed_tokens", "q_proj"])
    result = check(adapter, "--dtype", "bfloat16")
    assert (result.code, result.table["tensors"]) == (0, "7 in the file, 7 of them equal in the model"), result.last


@pytest.mark.parametrize("config", [MonoLoraConfig, LoraConfig])
def test_an_activated_adapter_is_invoked(check, small_model, tmp_path, config):
    adapter = save_adapter(
        small_model, tmp_path / "adapter", config, task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]
    )
    assert check(adapter).code == 0
    served = check(adapter, "--endpoint", "http://localhost:1", "--served-name", "mine")
    assert served.last.endswith("is an activated adapter, and those are checked without a server only")


def test_dead_units_are_counted(check, adapter):
    def kill_half(tensors):
        for name, tensor in tensors.items():
            if "encoder" in name:
                tensor[:2] = 0
        return tensors

    rewrite(adapter, kill_half)
    live = float(check(adapter).table["live units"].split("%")[0])
    assert 25 <= live <= 50


class TestWrongAdapters:
    @pytest.mark.filterwarnings("ignore:Found missing adapter keys")
    def test_renamed_tensors_of_lora(self, check, small_model, tmp_path):
        """What `torch.compile` makes of the names: PEFT warns, and applies nothing."""
        adapter = save_adapter(small_model, tmp_path / "adapter", LoraConfig)
        rewrite(adapter, lambda tensors: {n.replace(".layers.", "._orig_mod.layers."): v for n, v in tensors.items()})
        result = check(adapter)
        assert result.code == 1
        assert "28 tensors of the file are not in the model: base_model.model.model._orig_mod.layers.0" in result.last
        assert "28 tensors of the adapter in the model are not in the file: base_model.model.model.lay" in result.last
        assert result.table["tensors"] == "28 in the file, 0 of them equal in the model"

    @pytest.mark.filterwarnings("ignore:Found missing adapter keys")
    def test_one_tensor_is_missing(self, check, small_model, tmp_path):
        adapter = save_adapter(small_model, tmp_path / "adapter", LoraConfig)
        rewrite(adapter, lambda tensors: dict(list(tensors.items())[1:]))
        result = check(adapter)
        assert (result.code, result.table["tensors"]) == (1, "27 in the file, 27 of them equal in the model")
        assert result.last.startswith("1 tensors of the adapter in the model are not in the file: base_model.model")

    def test_a_renamed_tensor_of_monolora(self, check, adapter):
        rewrite(adapter, lambda tensors: {n.replace("layers.0.mlp.up", "layers.0.up"): v for n, v in tensors.items()})
        result = check(adapter)
        assert result.code == 1
        assert "tensors" in result.last
        assert "layers.0.mlp.up_proj.monolora_" in result.last

    def test_a_loader_that_changes_values(self, check, adapter, monkeypatch):
        load = PeftModel.load_adapter

        def rounded(self, *args, **kwargs):
            result = load(self, *args, **kwargs)
            next(p for n, p in self.named_parameters() if "decoder" in n).data[0, 0] += 1e-3
            return result

        monkeypatch.setattr(PeftModel, "load_adapter", rounded)
        result = check(adapter)
        assert (result.code, result.table["tensors"]) == (1, "28 in the file, 27 of them equal in the model")
        assert result.last.startswith("1 tensors of the file have other values in the model: base_model.model.")

    @pytest.mark.parametrize("config", [MonoLoraConfig, LoraConfig])
    def test_an_adapter_that_is_not_trained(self, check, small_model, tmp_path, config):
        random = {"init_weights" if config is MonoLoraConfig else "init_lora_weights": True}
        result = check(save_adapter(small_model, tmp_path / "adapter", config, **random))
        assert result.code == 1
        assert result.table["B"] == "is zero in 14 of 14 modules"
        assert result.last == "B is zero in all modules, and the outputs are the base's: the adapter is not trained"

    def test_an_adapter_whose_units_are_all_dead(self, check, adapter):
        rewrite(adapter, lambda tensors: {n: v * 0 if "encoder" in n else v for n, v in tensors.items()})
        result = check(adapter)
        assert (result.code, result.table["live units"]) == (1, "0.0%, fire on the prompts")
        assert result.last == "the outputs equal the base's on all prompts: the adapter does nothing"

    def test_nan(self, check, adapter):
        rewrite(adapter, lambda tensors: {n: v / 0 if "0.mlp.up" in n else v for n, v in tensors.items()})
        result = check(adapter)
        assert result.code == 1
        assert "2 tensors of this adapter hold NaN or infinity" in result.last

    @pytest.mark.parametrize("config", [MonoLoraConfig, LoraConfig])
    @pytest.mark.filterwarnings("ignore:Some weights of", "ignore:Found missing adapter keys")
    def test_a_base_of_other_shapes(self, check, small_model, tmp_path, config):
        sizes = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2}
        other = tmp_path / "other"
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(other)
        AutoTokenizer.from_pretrained(small_model).save_pretrained(other)
        result = check(save_adapter(small_model, tmp_path / "adapter", config), base=other)
        assert result.code == 1
        assert "22 tensors of the file have other shapes than in the model, such as base_model.model." in result.last
        assert ".weight: (32, 4) in the file, (16, 4) in the model. The adapter is of another base" in result.last

    def test_a_base_with_other_modules(self, check, small_model, gpt2, tmp_path):
        gpt2.resize_token_embeddings(400)
        gpt2.save_pretrained(tmp_path / "other")
        AutoTokenizer.from_pretrained(small_model).save_pretrained(tmp_path / "other")
        adapter = save_adapter(small_model, tmp_path / "adapter", LoraConfig, target_modules=["q_proj"])
        result = check(adapter, base=tmp_path / "other")
        assert result.code == 1
        assert result.last.startswith(f"the adapter cannot be loaded on {tmp_path / 'other'}: ")
        assert "q_proj" in result.last


class TestFilesThatAreNoAdapter:
    def test_another_method(self, check, small_model, tmp_path):
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        get_peft_model(AutoModelForCausalLM.from_pretrained(small_model), config).save_pretrained(tmp_path / "adapter")
        result = check(tmp_path / "adapter")
        assert result.code == 1
        assert result.last.endswith("is a PREFIX_TUNING adapter: only LORA and MONOLORA are checked")

    def test_another_task(self, check, adapter):
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "SEQ_CLS"}))
        assert check(adapter).last.endswith("is for SEQ_CLS: only adapters of causal language models are checked")

    def test_a_newer_format(self, check, adapter):
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 9}))
        result = check(adapter)
        assert (result.code, result.table) == (1, {})
        assert "is not readable: This adapter was saved in format 9" in result.last

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_folder_without_its_files(self, check, adapter, name):
        (adapter / name).unlink()
        result = check(adapter)
        assert (result.code, result.last) == (
            1, f"the folder {adapter} is no adapter that can be checked: it has no {name}"
        )  # fmt: skip

    def test_a_file_that_is_cut_off(self, check, adapter):
        path = adapter / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        assert check(adapter).last.endswith("fetch it again")

    def test_no_folder(self, check):
        result = check("no/such-adapter")
        assert (result.code, result.table) == (1, {})
        assert result.last.startswith("no/such-adapter is no folder, and no adapter on the hub: ")

    def test_a_base_that_is_none(self, check, adapter, tmp_path):
        result = check(adapter, base=tmp_path)
        assert result.code == 1
        assert result.last.startswith(f"the base {tmp_path} has no tokenizer that can be read: ")

    def test_a_base_with_an_adapter_inside(self, check, small_model, adapter):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (small_model / name).write_bytes((adapter / name).read_bytes())
        result = check(adapter)
        assert result.code == 1
        assert "has an adapter_config.json, and transformers loads that adapter too" in result.last
