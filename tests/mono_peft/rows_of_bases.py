"""Base models with configurations, which all behaviours that PEFT asks of a tuner are tested on."""

from typing import NamedTuple

import peft
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from small_bases import MLP, ConvNet, Signals, Tokens, bert, gpt2, gpt_oss, llama, mixtral, t5, tied_llama

from mono_peft import MonoLoraConfig
from mono_peft.layer import ACTIVATIONS

PEFT = Version(peft.__version__)


class Row(NamedTuple):
    base: type | object
    options: dict


IDS = torch.randint(1, 50, (4, 6), generator=torch.Generator().manual_seed(0))
ROWS = {
    "llama": Row(llama, {"task_type": "CAUSAL_LM"}),
    "llama all-linear, dropout": Row(llama, {"target_modules": "all-linear", "lora_dropout": 0.1}),
    "llama patterns": Row(llama, {"rank_pattern": {"layers.0.*v_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    "llama first layer, rsLoRA": Row(
        llama, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0], "use_rslora": True}
    ),
    "llama expression": Row(
        llama, {"target_modules": r".*\.layers\.1\..*(gate|down)_proj", "exclude_modules": ["gate_proj"]}
    ),
    "llama head": Row(llama, {"modules_to_save": ["lm_head"]}),
    "llama embedding": Row(llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama tokens": Row(llama, {"trainable_token_indices": [3, 7]}),
    "llama tied, tokens": Row(tied_llama, {"target_modules": "all-linear", "trainable_token_indices": [3, 7]}),
    "llama tied, embedding": Row(tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama, bias of the encoder": Row(
        llama, {"target_modules": "all-linear", "encoder_bias": True, "lora_dropout": 0.1}
    ),
    "llama, topk": Row(
        llama,
        {"target_modules": ["embed_tokens", "q_proj", "up_proj", "lm_head"], "activation": "topk", "k": 2},
    ),
    "gpt2": Row(gpt2, {"task_type": "CAUSAL_LM"}),
    "bert": Row(bert, {"task_type": "SEQ_CLS"}),
    "t5": Row(t5, {"task_type": "SEQ_2_SEQ_LM"}),
    "mixtral experts": Row(
        mixtral, {"target_modules": [], "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}
    ),
    "mixtral one weight a layer, dropout": Row(
        mixtral,
        {
            "target_modules": [],
            "target_parameters": ["0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"],
            "lora_dropout": 0.1,
        },
    ),
    "gpt-oss experts, modules and head": Row(
        gpt_oss,
        {
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": ["mlp.experts.down_proj", "experts.gate_up_proj"],
            "rank_pattern": {"experts.gate_up_proj": 3},
            "modules_to_save": ["lm_head"],
        },
    ),
    "mlp": Row(MLP, {"target_modules": ["below", "above"], "modules_to_save": ["head"]}),
    "mixtral experts, bias of the encoder": Row(
        mixtral, {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "encoder_bias": True}
    ),
    "mixtral experts, topk": Row(
        mixtral,
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "activation": "topk", "k": 2},
    ),
    "convnet": Row(ConvNet, {"target_modules": ["stem", "grouped"]}),
    "convnet, topk": Row(ConvNet, {"target_modules": ["stem", "grouped"], "activation": "topk", "k": 2}),
    "convnet, bias of the encoder": Row(ConvNet, {"target_modules": ["stem", "grouped"], "encoder_bias": True}),
    "signals": Row(Signals, {"target_modules": ["signal", "volume"]}),
    "tokens": Row(Tokens, {"target_modules": ["table", "head"]}),
    **{
        f"mlp {name}": Row(MLP, {"target_modules": ["below", "above"], "activation": name})
        for name in sorted(ACTIVATIONS)
    },
}
if Version("0.19") > PEFT:
    del ROWS["llama tied, tokens"]  # older PEFT wraps the tied embedding for one adapter only, LoRA's too
if Version("0.21") > PEFT:
    del ROWS["t5"]  # encoder-decoder models of older PEFT do not work with this transformers at all
every_row = pytest.mark.parametrize("name", ROWS)
every_plain_row = pytest.mark.parametrize(
    "name", [n for n, row in ROWS.items() if not {"modules_to_save", "target_parameters"} & row.options.keys()]
)


def base_of(name):
    torch.manual_seed(0)
    return ROWS[name].base().eval()


def config_of(name, **more):
    return MonoLoraConfig(**{"r": 4, "lora_alpha": 8, "init_weights": False} | ROWS[name].options | more)


def adapted(name, **more):
    base = base_of(name)
    torch.manual_seed(1)
    return get_peft_model(base, config_of(name, **more)).eval()


def inputs(name):
    if name.startswith("convnet"):
        return {"x": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    if name == "signals":
        return {"x": torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(0))}
    if name == "tokens":
        return {"x": IDS}
    if name.startswith("mlp"):
        return {"x": torch.randn(4, 10, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS} if name == "t5" else {})


def output(model, name, **more):
    result = model(**inputs(name), **more)
    return result if isinstance(result, torch.Tensor) else result.logits


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}
