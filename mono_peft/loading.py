"""A base and its adapter from folders or names on the hub, for commands: what cannot be loaded is a `LoadError`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .names import peft_type


class LoadError(ValueError):
    """An adapter or its base cannot be read, or is none that the commands are for."""


def command_parser(program: str, documentation: str | None) -> argparse.ArgumentParser:
    """A parser of BASE, ADAPTER, --dtype and --device, whose help starts with the text of the command's module."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(program, description=documentation, formatter_class=formatter)
    parser.add_argument("base", metavar="BASE", help="the base model's folder or name on the hub")
    parser.add_argument("adapter", metavar="ADAPTER", help="the adapter's folder or name on the hub")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the base here (default: its checkpoint's)")
    device = "auto" if torch.accelerator.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="such as cpu or cuda:1 (default: all GPUs, or the CPU)")
    return parser


def adapter_config(adapter: str) -> PeftConfig:
    """Return the configuration of a LoRA or MonoLoRA adapter of a causal language model."""
    _file(adapter, "adapter_config.json")
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"the adapter_config.json of {adapter} is not readable: {_first_line(error)}") from None
    if config.peft_type not in (PeftType.LORA, peft_type()):
        raise LoadError(f"{adapter} is a {config.peft_type.value} adapter: only LORA and MONOLORA are checked")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise LoadError(f"{adapter} is for {config.task_type}: only adapters of causal language models are checked")
    return config


def adapter_tensors(adapter: str) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors by their names in its file, on the CPU."""
    try:
        return load_file(_file(adapter, "adapter_model.safetensors"))
    except SafetensorError as error:
        raise LoadError(f"{adapter}/adapter_model.safetensors cannot be read ({error}): fetch it again") from None


def _file(adapter: str, name: str) -> str:
    try:
        return str(cached_file(adapter, name))
    except (OSError, ValueError) as error:
        if Path(adapter).is_dir():
            raise LoadError(f"the folder {adapter} is no adapter that can be checked: it has no {name}") from None
        raise LoadError(f"{adapter} is no folder, and no adapter on the hub: {_first_line(error)}") from None


def tokenizer_of(base: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer that is saved with the base."""
    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise LoadError(f"the base {base} has no tokenizer that can be read: {_first_line(error)}") from None


def base_model(base: str, dtype: str, device: str) -> PreTrainedModel:
    """Return the causal language model in the folder or of the name `base`, in eval mode."""
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map=device, use_safetensors=True).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise LoadError(f"the base {base} cannot be loaded: {_first_line(error)}") from None
    if getattr(model, "_hf_peft_config_loaded", False):
        raise LoadError(f"the base {base} has an adapter_config.json, and transformers loads that adapter too")
    return model


def with_adapter(base: PreTrainedModel, adapter: str, **options: Any) -> PeftModel:
    """Return `base` with the adapter on it; `options` are further ones of `PeftModel.from_pretrained`."""
    try:
        return PeftModel.from_pretrained(base, adapter, use_safetensors=True, **options)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise LoadError(f"the adapter cannot be loaded on {base.name_or_path}: {kind}{_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
