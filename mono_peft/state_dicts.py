"""An adapter's tensors by their names: which of a model's are its own, and whether those of a file are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from .names import PREFIX
from .targets import listed

_PEFT_PREFIX = "base_model.model."
_ADAPTER_TENSOR = re.compile(rf"\.{PREFIX}(?:encoder|decoder)\.(?P<adapter>[^.]+)\.(?:weight|bias)$")


class DivergedError(ValueError):
    """An adapter's weights, or what it computes, are NaN or infinite: its training diverged."""


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise DivergedError if an adapter's tensor holds NaN or infinity."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise DivergedError(
            f"{len(broken)} tensors of this adapter hold NaN or infinity ({listed(broken)}): its training diverged, "
            "or the file is damaged. Load an earlier checkpoint."
        )


def tensors_to_save(state_dict: Mapping[str, torch.Tensor], adapter_name: str, bias: str) -> dict[str, torch.Tensor]:
    """The tensors of a model's state dict that belong to one adapter, without what `modules_to_save` adds.

    Args:
        state_dict: of the model; inside an FSDP wrapper its names differ from those of the modules.
        bias: the adapter's option, by which trained biases of the base are saved too.

    Raises:
        ValueError: some tensors are empty, because they are sharded over processes.
    """
    names = [n for n in state_dict if ".modules_to_save." not in n and ".original_module." not in n]
    own = names_of_adapter(names, adapter_name)
    biases: Iterable[str] = ()
    if bias == "all":
        # Those of adapters are no biases of the base.
        of_base = (name for name in names if not _ADAPTER_TENSOR.search(name))
        biases = (name for name in of_base if name == "bias" or name.endswith(".bias"))
    elif bias == "monolora_only":
        layers = {name.partition(f".{PREFIX}")[0] for name in own}
        biases = (name for name in names if name.removesuffix(".base_layer.bias") in layers)
    tensors = {name: state_dict[name] for name in (*own, *biases)}
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        raise ValueError(
            f"Refusing to save empty tensors ({listed(empty)}): the weights are sharded over processes. Save "
            "with `trainer.save_model()`, or pass `state_dict=accelerator.get_state_dict(model)`."
        )
    return tensors


def names_of_adapter(names: Iterable[str], adapter_name: str) -> list[str]:
    """Return those of `names` that are weights of the adapter."""
    return [name for name in names if (match := _ADAPTER_TENSOR.search(name)) and match["adapter"] == adapter_name]


def check_prefix(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError where PEFT would take the prefix off the tensors' names although the model has it."""
    parameters = (name for name, _ in model.named_parameters())
    if any(n.startswith(_PEFT_PREFIX) for n in names) and not any(n.startswith(_PEFT_PREFIX) for n in parameters):
        raise ValueError(
            f"PEFT cannot load an adapter into a model inside a {type(model).__name__}: it would silently leave all "
            "weights as they are. Load into the model inside it, or before wrapping, or use FSDP2 (`fully_shard`)."
        )


def check_tensor_names(names: Iterable[str], adapter_name: str, tensors: Iterable[str]) -> None:
    """Raise ValueError unless `tensors` has every weight of the adapter in a model of these `names` and no unknown."""
    # Where layers were injected without PeftModel, files have its prefix and the model has not.
    saved = {name.removeprefix(_PEFT_PREFIX) for name in tensors}
    present = {name.removeprefix(_PEFT_PREFIX) for name in names}
    needed = set(names_of_adapter(present, adapter_name))
    unknown, missing = saved - present, needed - saved
    problem = None
    if any(".lora_A." in name for name in unknown):
        problem = (
            "it holds the weights of a LoRA adapter under a MonoLoRA configuration. LoRA has no sigma: load it with a "
            "LoraConfig (peft_type LORA in its adapter_config.json)"
        )
    elif needed and missing == needed:
        problem = "it holds no weights of MonoLoRA layers of this model"
    elif missing:
        problem = f"{len(missing)} tensors are missing: {listed(missing)}"
    elif unknown:
        problem = f"{len(unknown)} tensors belong to no module of this model: {listed(unknown)}"
    if problem:
        raise ValueError(
            f"This MonoLoRA adapter does not fit the model: {problem}. Check that the file is complete, and that the "
            "base model and target_modules are those it was trained with."
        )
