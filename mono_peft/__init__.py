"""MonoLoRA as a PEFT tuner. Importing this package registers it."""

from .config import MonoLoraConfig
from .layer import MonoLoraLayer
from .model import MonoLoraModel
from .register import register_monolora

register_monolora(MonoLoraConfig, MonoLoraModel)

from .activity import ActivationSparsity, SparsityCallback, activation_sparsity  # noqa: E402

__all__ = [
    "ActivationSparsity",
    "MonoLoraConfig",
    "MonoLoraLayer",
    "MonoLoraModel",
    "SparsityCallback",
    "activation_sparsity",
]
