"""Quantised bases: really loaded, trained, saved and loaded again, on the CPU."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig, LlamaConfig, LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from mono_peft import MonoLoraConfig
from mono_peft.layer import MonoLoraLinear

pytestmark = pytest.mark.slow

ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}


@pytest.fixture
def folder(tmp_path):
    """A Llama on disk, wide enough for blocks of 64 weights."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=None, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder, quantization_config):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization_config, dtype=torch.float32, device_map={"": "cpu"}
    )


@torch.no_grad()
def logits(model, ids):
    """Without gradients, because bitsandbytes multiplies by another kernel, which rounds otherwise, with them."""
    return model(input_ids=ids).logits


def frozen(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("options", [NF4, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_bitsandbytes_with_sft(folder, options, make_tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    colours = {"grass": "green", "snow": "white", "coal": "black", "blood": "red"}
    rows = Dataset.from_list([{"prompt": f"{k} is", "completion": f" {v}"} for k, v in colours.items()])
    settings = SFTConfig(  # activation checkpointing is on by default
        str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        max_steps=40, learning_rate=2e-2, per_device_train_batch_size=4, logging_steps=1,
    )  # fmt: skip
    base = load(folder, BitsAndBytesConfig(**options))
    config = MonoLoraConfig(task_type="CAUSAL_LM", **ADAPTER)
    trainer = SFTTrainer(base, settings, train_dataset=rows, processing_class=make_tokenizer(), peft_config=config)
    model = trainer.model
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer) is MonoLoraLinear
    assert "Linear4bit" in repr(layer) or "Linear8bitLt" in repr(layer)
    before = frozen(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert len(start) == 2 * 7 * 2
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] <= 0.8 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert [n for n, p in model.named_parameters() if n in start and torch.equal(p, start[n])] == []

    ids = torch.randint(2, 400, (2, 8))
    expected = logits(model.eval(), ids)
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(folder, BitsAndBytesConfig(**options)), tmp_path / "adapter").eval()
    trained = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        if "monolora_" in name:  # QLoRA's bfloat16, which PEFT loads as float32
            assert torch.equal(parameter, trained[name].to(parameter.dtype))
            parameter.data = parameter.data.to(trained[name].dtype)
    assert torch.equal(logits(loaded, ids), expected)

    with pytest.raises(NotImplementedError, match="cannot merge"):
        loaded.merge_and_unload()
    assert torch.equal(logits(loaded, ids), expected)
    with loaded.disable_adapter():
        bare = logits(loaded, ids)
    assert torch.equal(logits(load(folder, BitsAndBytesConfig(**options)), ids), bare)


@pytest.mark.parametrize("options", [{}, {"activation": "topk", "k": 2, "encoder_bias": True}], ids=["relu", "topk"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
def test_bitsandbytes_compute_dtypes(folder, compute, options):
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(**NF4 | {"bnb_4bit_compute_dtype": compute})
    ids = torch.randint(2, 400, (2, 8))
    model = get_peft_model(load(folder, quantization), MonoLoraConfig(**ADAPTER | options))
    # Before any pass in evaluation: from the first one on, bitsandbytes 0.50 has gradients of zero on some CPUs.
    model.train()(input_ids=ids, labels=ids).loss.backward()
    decoders = [p for n, p in model.named_parameters() if "decoder" in n]
    assert len(decoders) == 14
    assert all(p.grad.abs().max() > 0 for p in decoders)
    assert torch.equal(logits(model.eval(), ids), logits(load(folder, quantization), ids))  # B is zero


def check_round_trip(make_base, targets, x, tmp_path):
    """Training lowers the output's size, the base stays, saved and loaded again gives the same, merging is refused."""
    model = get_peft_model(make_base(), MonoLoraConfig(r=4, target_modules=targets, init_weights=False))
    before = model(x)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    expected = model.eval()(x)
    assert expected.square().mean() < 0.8 * before.square().mean()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(make_base(), tmp_path).eval()(x), expected)
    with pytest.raises(NotImplementedError, match="cannot merge"):
        model.merge_and_unload()
    assert torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), make_base()(x))


def test_torchao(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def make_base():
        base = copy.deepcopy(plain)
        quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
        return base

    assert type(make_base()[0].weight) is not nn.Parameter
    check_round_trip(make_base, ["0", "2"], torch.randn(8, 64), tmp_path)


def test_hqq(tmp_path):
    hqq = pytest.importorskip("hqq.core.quantize")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def make_base():
        base = copy.deepcopy(plain)
        options = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
        base[0] = hqq.HQQLinear(base[0], options, compute_dtype=torch.float32, device="cpu")
        return base

    check_round_trip(make_base, ["0", "2"], torch.randn(8, 64), tmp_path)


def test_gptq(folder, make_tokenizer, tmp_path):
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum.gptq")
    texts = [" ".join(f"{i * j % 97}" for j in range(64)) for i in range(1, 17)]
    options = {"bits": 4, "backend": "gptq_torch"}  # gptqmodel's own choice on some CPUs has no gradient, and says so
    calibration = {"group_size": 32, "dataset": texts, "tokenizer": make_tokenizer(), "model_seqlen": 64}
    load(folder, GPTQConfig(**options, **calibration)).save_pretrained(tmp_path / "quantised")

    def make_base():
        return load(tmp_path / "quantised", GPTQConfig(**options))

    ids = torch.randint(2, 400, (2, 8))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(make_base(), MonoLoraConfig(**ADAPTER | {"target_modules": targets, "init_weights": False}))
    layers = [module for module in model.modules() if isinstance(module, MonoLoraLinear)]
    assert len(layers) == 14
    assert not any(isinstance(layer.get_base_layer(), nn.Linear) for layer in layers)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model.train()(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, ids), logits(model.eval(), ids))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, ids), logits(make_base(), ids))
