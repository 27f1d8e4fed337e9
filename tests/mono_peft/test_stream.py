"""Who reads and writes the residual stream, what a vector in it does to the logits, and which vectors are alike."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
    Qwen3Config,
)

from mono_peft.activity import active_adapters
from mono_peft.lens import Unembedding, nearest
from mono_peft.stream import residual_stream
from mono_peft.unit_records import decoder_columns, scale_of

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA_READS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
# Heads of 8 dimensions each, so that o_proj and down_proj of hidden size 32 cannot be told by their shapes.
MODELS = {
    "llama": (LlamaConfig(**SMALL, num_key_value_heads=4), LLAMA_READS, {"o_proj", "down_proj"}),
    "qwen3": (Qwen3Config(**SMALL, num_key_value_heads=4, head_dim=8), LLAMA_READS, {"o_proj", "down_proj"}),
    "gpt2": (GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4), {"c_attn", "c_fc"}, {"c_proj"}),
    "opt": (
        OPTConfig(vocab_size=100, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                  word_embed_proj_dim=32),
        {"q_proj", "k_proj", "v_proj", "fc1"}, {"out_proj", "fc2"},
    ),
    # attention and MLP side by side
    "neox": (GPTNeoXConfig(**SMALL), {"query_key_value", "dense_h_to_4h"}, {"dense", "dense_4h_to_h"}),
    # their outputs are normalised before they are added
    "gemma2": (Gemma2Config(**SMALL, num_key_value_heads=4, head_dim=8), LLAMA_READS, set()),
    "olmo2": (Olmo2Config(**SMALL, num_key_value_heads=4), LLAMA_READS, set()),
    "granite": (
        GraniteConfig(**SMALL, num_key_value_heads=4, residual_multiplier=0.5, embedding_multiplier=3.0),
        LLAMA_READS, {"o_proj", "down_proj"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_readers_and_writers(name, random_adapter):
    config, reads, writes = MODELS[name]
    model = random_adapter(AutoModelForCausalLM.from_config(config), target_modules="all-linear")
    layers = {layer_name: layer for layer_name, layer, _ in active_adapters(model)}
    stream = residual_stream(model, layers, torch.tensor([[5, 6, 7, 8]]))
    assert stream.readers == {layer for layer in layers if layer.rpartition(".")[2] in reads}
    assert stream.writers.keys() == {layer for layer in layers if layer.rpartition(".")[2] in writes}
    assert set(stream.writers.values()) <= {0.5 if name == "granite" else 1.0}
    assert stream.is_unembedded
    assert "norm" in type(stream.final_norm).__name__.lower()


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite"])
def test_logit_changes_are_those_of_a_step_from_a_residual_of_that_size(name, random_adapter):
    """The reference adds a small step to a residual that has the measured size and is orthogonal to the step."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name][0]).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "ln_f" in parameter_name:
                parameter.add_(torch.rand_like(parameter))  # else all ones, or zeros
    ids = torch.randint(3, 100, (3, 9))
    stream = residual_stream(model, {}, ids[:1])
    unembedding = Unembedding(model, stream)
    sizes = []
    centred = name == "gpt2"
    handle = stream.final_norm.register_forward_pre_hook(lambda module, args: sizes.append(args[0].detach()))
    mask = torch.tensor([[1] * 9, [1] * 9, [1] * 5 + [0] * 4])
    with unembedding.measuring(model), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    handle.remove()
    residuals = sizes[0][mask.bool()]
    size = residuals.std(1, correction=0).mean() if centred else residuals.square().mean(1).sqrt().mean()
    vectors = torch.randn(5, 32) * torch.tensor([1e-6, 1e-3, 1, 10, 1e4])[:, None]
    found = unembedding.changes(vectors, 3)
    head = model.get_output_embeddings()
    for i, vector in enumerate(vectors):
        step = vector / vector.norm()
        residual = torch.randn(32, generator=torch.Generator().manual_seed(i)).double()
        directions = [step.double() - step.double().mean(), torch.ones(32).double()] if centred else [step.double()]
        for direction in directions:
            residual -= residual @ direction / (direction @ direction) * direction
        residual = (residual / residual.square().mean().sqrt() * size).float()
        with torch.no_grad():
            logits = [head(stream.final_norm(h[None])).double() for h in (residual, residual + 1e-3 * size * step)]
        change = (logits[1] - logits[0])[0] / (1e-3 * size) * vector.norm()
        assert torch.allclose(found.raised_by[i].double(), change.topk(3).values, rtol=0.02)
        assert torch.allclose(change[found.raised[i]], found.raised_by[i].double(), rtol=0.02)
        assert torch.allclose(change[found.lowered[i]], found.lowered_by[i].double(), rtol=0.02)
        assert found.lowered_by[i].tolist() == sorted(found.lowered_by[i].tolist())


def test_what_a_unit_of_a_scaled_embedding_writes(random_adapter):
    config = Gemma3TextConfig(**SMALL, num_key_value_heads=4, head_dim=8)  # scales its embeddings by 32 ** 0.5
    model = random_adapter(AutoModelForCausalLM.from_config(config), target_modules=["embed_tokens"])
    ((_, layer, adapter),) = active_adapters(model)
    ids = torch.arange(100)
    with torch.no_grad():
        written = layer(ids) - layer.base_layer(ids)
        latents = torch.relu(layer.monolora_encoder[adapter](ids))
        found = latents @ decoder_columns(layer, adapter) * scale_of(layer, adapter)
    torch.testing.assert_close(found, written, rtol=1e-4, atol=1e-4)


def test_nearest_by_cosine():
    vectors = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    vectors[7] = 3 * vectors[20] + 0.01
    numbers, cosines = nearest(vectors, 2)
    for i in range(30):
        others = [(float(torch.cosine_similarity(vectors[i], vectors[j], dim=0)), j) for j in range(30) if j != i]
        best = sorted(others, reverse=True)[:2]
        assert numbers[i].tolist() == [j for _, j in best]
        assert cosines[i].tolist() == pytest.approx([cosine for cosine, _ in best], abs=1e-5)
    assert nearest(vectors[:2], 3)[0].tolist() == [[1], [0]]
