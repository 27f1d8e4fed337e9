"""Enters MonoLoRA in PEFT's tables. With names.py the only file that changes PEFT; tested with PEFT 0.18 to 0.21."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import peft.optimizers
from peft.config import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from .names import NAME, PREFIX, lock, peft_type


def register_monolora(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Enter the two classes in PEFT's tables; again after a reload, which replaces them.

    Raises:
        ImportError: PEFT is outside the tested range, or already has another method under this name.
    """
    member = peft_type()
    with lock:
        for table, cls in ((PEFT_TYPE_TO_CONFIG_MAPPING, config_cls), (PEFT_TYPE_TO_TUNER_MAPPING, model_cls)):
            old = table.get(member)
            if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ImportError(
                    f"PEFT already has the method {NAME}, as {old.__module__}.{old.__qualname__}: only one "
                    "package can provide it in a process."
                )
            table.pop(member, None)
        PEFT_TYPE_TO_PREFIX_MAPPING.pop(member, None)
        register_peft_method(name=NAME.lower(), prefix=PREFIX, config_cls=config_cls, model_cls=model_cls)


def refuse_lora_optimizers() -> None:
    """Let PEFT's optimisers for LoRA raise on a MonoLoRA model: they go by LoRA's names and would just do AdamW."""
    for name, instead in {
        "create_loraplus_optimizer": "It would train A and B at one rate. Use mono_peft.monolora_plus_param_groups.",
        "create_lorafa_optimizer": "It would train A, and its projected gradient of B holds for a linear update only.",
    }.items():
        original = getattr(peft.optimizers, name)
        if not hasattr(original, "refuses_monolora"):
            guarded = _refuse_monolora(original, f"peft.optimizers.{name} does not support MonoLoRA. {instead}")
            setattr(peft.optimizers, name, guarded)
            setattr(sys.modules[original.__module__], name, guarded)


def _refuse_monolora(original: Callable[..., Any], message: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def guarded(model: Any, *args: Any, **kwargs: Any) -> Any:
        if any(PREFIX in name for name, _ in model.named_parameters()):
            raise ValueError(message)
        return original(model, *args, **kwargs)

    guarded.refuses_monolora = True  # type: ignore[attr-defined]
    return guarded
