"""MonoLoRA as a PEFT tuner. Importing this package registers it."""

from .config import MonoLoraConfig
from .layer import MonoLoraLayer
from .model import MonoLoraModel
from .register import refuse_lora_optimizers, register_monolora
from .state_dicts import DivergedError

register_monolora(MonoLoraConfig, MonoLoraModel)
refuse_lora_optimizers()

from .activity import ActivationSparsity, SparsityCallback, activation_sparsity  # noqa: E402
from .optimizers import monolora_plus_param_groups  # noqa: E402
from .provenance import ProvenanceCallback  # noqa: E402
from .replace import replace_adapter  # noqa: E402
from .silence import Silence  # noqa: E402

__all__ = [
    "ActivationSparsity",
    "DivergedError",
    "MonoLoraConfig",
    "MonoLoraLayer",
    "MonoLoraModel",
    "ProvenanceCallback",
    "Silence",
    "SparsityCallback",
    "activation_sparsity",
    "monolora_plus_param_groups",
    "replace_adapter",
]
