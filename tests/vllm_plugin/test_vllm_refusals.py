"""What vLLM would serve as another model is refused when the adapter is loaded, with a text that says what to do."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM, LlamaConfig, LlamaForCausalLM

from mono_peft import MonoLoraConfig
from mono_peft_vllm.sigma import PerSlotMixin
from tests.vllm_plugin.conftest import assert_equal, engine, generate, prompts, request, save_adapter


@pytest.fixture(scope="module")
def llm(folder):
    with engine(folder) as llm:
        yield llm


@pytest.fixture
def adapter(folder):
    """The folder of an adapter that may be changed."""
    shutil.copytree(folder / "relu", folder / "changed")
    yield folder / "changed"
    shutil.rmtree(folder / "changed")


def load(llm, folder):
    return llm.llm_engine.add_lora(request(folder, "changed", number=77))


def change_options(adapter, **options):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def change_tensors(adapter, change):
    path = adapter / "adapter_model.safetensors"
    save_file(dict(change(name, tensor) for name, tensor in load_file(path).items()), path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}, "cannot serve an activated MonoLoRA adapter"),
        ({"bias": "all"}, "bias='all'"),
        ({"encoder_bias": True}, "cannot serve a MonoLoRA adapter with `encoder_bias=True`"),
        ({"format_version": 9}, "Upgrade mono-peft"),
        ({"activation": "tanh"}, "must be one of relu"),
        ({"r": 5}, "do not fit its rank 5"),
        ({"r": 200}, "greater than max_lora_rank 8"),
    ],
)
def test_options(llm, folder, adapter, options, said):
    change_options(adapter, **options)
    if options.get("r") == 200:
        change_tensors(
            adapter, lambda name, tensor: (name, tensor.repeat(25, 1) if "encoder" in name else tensor.repeat(1, 25))
        )
    with pytest.raises(ValueError, match=said):
        load(llm, folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, tensor: (name, tensor * float("nan")), "NaN or infinity"),
        (lambda name, tensor: (name.replace("monolora_encoder", "lora_A"), tensor), "no tensor of a MonoLoRA adapter"),
        (lambda name, tensor: (name.replace("mlp.", "mlp.experts.0."), tensor), "on experts"),
        (lambda name, tensor: (name, tensor[..., None, None].contiguous()), "on convolutions"),
        (lambda name, tensor: (name.replace("layers.1", "layers.7"), tensor), "no module model.layers.7"),
        (lambda name, tensor: (name.replace("q_proj", "query"), tensor), "no module model.layers.0.self_attn.query"),
        (lambda name, tensor: (name.replace("base_model.model.", ""), tensor), "no tensor of a MonoLoRA adapter"),
        (
            lambda name, tensor: (name.replace("layers.1.mlp.up_proj.monolora_decoder", "x.monolora_decoder"), tensor),
            "only the (encoder|decoder) of",
        ),
    ],
)
def test_tensors(llm, folder, adapter, change, said):
    change_tensors(adapter, change)
    with pytest.raises(ValueError, match=said):
        load(llm, folder)


def test_topk_where_one_graph_computes_all_adapters(llm, folder, monkeypatch):
    monkeypatch.setattr(PerSlotMixin, "serves_topk", False)
    with pytest.raises(ValueError, match="on this platform vLLM cannot serve `activation='topk'`, only on CPUs"):
        llm.llm_engine.add_lora(request(folder, "topk"))


def test_other_files_of_weights(llm, folder, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors"):
        load(llm, folder)


def test_a_file_that_is_cut(llm, folder, adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="copy the file again"):
        load(llm, folder)


@pytest.mark.parametrize("target", ["q_proj", "v_proj", "down_proj", "o_proj", "lm_head"])
@pytest.mark.parametrize("wider", [True, False])
def test_an_adapter_of_a_base_of_other_sizes(llm, folder, tmp_path, target, wider):
    """vLLM copies a smaller matrix into a corner of its own and serves that."""
    config = LlamaConfig.from_pretrained(folder / "base")
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 6, "vocab_size": 321}
    if not wider:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 319}
    config.update(sizes | {"head_dim": 32})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    shutil.rmtree(folder / "changed", ignore_errors=True)
    save_adapter(tmp_path / "base", MonoLoraConfig(target_modules=[target]), folder / "changed")
    with pytest.raises(ValueError, match="belongs to another base model"):
        load(llm, folder)
    shutil.rmtree(folder / "changed")


def test_an_embedding_table_of_its_own(llm, folder):
    """PEFT puts the base's table in the file, and vLLM leaves it there."""
    shutil.copytree(folder / "embedding", folder / "changed")
    assert load(llm, folder)
    llm.llm_engine.remove_lora(77)
    change_tensors(folder / "changed", lambda name, tensor: (name, tensor + 1 if "base_layer" in name else tensor))
    with pytest.raises(ValueError, match="brings its own table"):
        load(llm, folder)
    shutil.rmtree(folder / "changed")


def test_after_refusals_the_others_are_served_as_before(llm, folder, adapter, reference):
    batch = [(name, prompt) for prompt in prompts(1) for name in ("base", "lora", "softplus")]
    assert_equal(generate(llm, folder, batch, 6), batch, reference, 6)
    change_options(adapter, bias="all")
    for _ in range(20):  # more than adapters are kept
        with pytest.raises(ValueError, match="bias"):
            load(llm, folder)
    assert {1, 5} <= llm.llm_engine.list_loras()  # lora and softplus: nothing was evicted for what was refused
    assert_equal(generate(llm, folder, batch, 6), batch, reference, 6)


def test_lora_adapters_meet_vllms_own_checks(llm, folder, tmp_path):
    save_adapter(folder / "base", LoraConfig(target_modules=["q_proj"], use_dora=True), tmp_path / "changed")
    with pytest.raises(ValueError, match="DoRA"):
        load(llm, tmp_path)


def test_modules_that_the_server_was_told_to_leave_alone(folder):
    with (
        engine(folder, lora_target_modules=["q_proj", "v_proj"]) as llm,
        pytest.raises(ValueError, match="lora-target-modules"),
    ):
        llm.llm_engine.add_lora(request(folder, "relu"))


def test_embeddings_on_transformers_own_models(folder):
    """There vLLM gives all tokens the A of the first token's adapter. It changes its own models, hence a process."""
    program = f"""
import pathlib
import pytest
from tests.vllm_plugin.conftest import engine, request
folder = pathlib.Path({str(folder)!r})
with engine(folder, model_impl="transformers") as llm:
    with pytest.raises(ValueError, match="--model-impl transformers"):
        llm.llm_engine.add_lora(request(folder, "embedding"))
    assert llm.llm_engine.add_lora(request(folder, "relu"))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_projection_that_attention_absorbs(tmp_path, folder):
    """vLLM's latent attention computes with `kv_b_proj`'s weight, and an adapter of it does nothing."""
    config = DeepseekV2Config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=320,
        max_position_embeddings=512,
        first_k_dense_replace=2,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        n_routed_experts=4,
        moe_intermediate_size=64,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    )
    DeepseekV2ForCausalLM(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(tmp_path / "base")
    for name in ("kv_b_proj", "o_proj"):
        save_adapter(tmp_path / "base", MonoLoraConfig(target_modules=[name]), tmp_path / name)
    with engine(tmp_path, dtype="bfloat16") as llm:
        with pytest.raises(ValueError, match="inside its attention"):
            llm.llm_engine.add_lora(request(tmp_path, "kv_b_proj", number=1))
        assert llm.llm_engine.add_lora(request(tmp_path, "o_proj", number=2))
