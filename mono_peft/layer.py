"""MonoLoRA's arithmetic: h = W x + s B sigma(A dropout(x)), eq. 5 of the paper, written once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn
from transformers.activations import ACT2FN

# sigma by name. All but `identity` are non-negative; `identity` is the linear control, equal to LoRA.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu2": lambda: ACT2FN["relu2"],
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
}

MERGE_ERROR = (
    "MonoLoRA cannot merge: its update s B sigma(A x) is not linear in x, so no weight matrix equals it. Keep the "
    "adapter beside the base model (`save_pretrained`, `PeftModel.from_pretrained`), or call `unload()` to get the "
    "base model back. If you need one mergeable matrix, train PEFT's LoraConfig, or MonoLoraConfig("
    'activation="identity") as its equal.'
)


class MonoLoraLayer(BaseTunerLayer):
    """The adapters of one base layer: their weights, scales and activations, keyed by the adapter's name."""

    adapter_layer_names = ("monolora_encoder", "monolora_decoder")
    # Every other dict keyed by adapter; PEFT deletes and moves adapters by this list.
    other_param_names = ("r", "monolora_alpha", "scaling", "monolora_dropout", "monolora_activation")
    active_adapters: list[str]  # PEFT's property, declared because mypy does not follow PEFT

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise TypeError(f"MonoLoRA cannot read the sizes of a {type(base_layer).__name__}.")
        self.in_features: int = in_features
        self.out_features: int = out_features
        self.r: dict[str, int] = {}
        self.monolora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.monolora_dropout = nn.ModuleDict()
        self.monolora_activation = nn.ModuleDict()
        self.monolora_encoder = nn.ModuleDict()
        self.monolora_decoder = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []  # stays empty; PEFT reads it
        self.cast_input_dtype_enabled = True  # switched by peft.helpers.disable_input_dtype_casting

    def update_layer(
        self,
        adapter_name: str,
        *,
        r: int,
        alpha: float,
        dropout: float,
        activation: str,
        use_rslora: bool,
        init_weights: bool | str,
        inference_mode: bool,
    ) -> None:
        """Add the adapter `adapter_name`: encoder A of shape (r, in_features), decoder B of shape (out_features, r).

        Args:
            r: rank, a positive integer.
            alpha: numerator of the scale s = alpha / r, or alpha / sqrt(r) with `use_rslora`.
            dropout: probability in [0, 1) of zeroing an element of x before A.
            activation: a key of `ACTIVATIONS`.
            init_weights: see `MonoLoraConfig`.
            inference_mode: leave the adapter frozen.
        """
        self.r[adapter_name] = r
        self.monolora_alpha[adapter_name] = alpha
        self.scaling[adapter_name] = alpha / math.sqrt(r) if use_rslora else alpha / r
        self.monolora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.monolora_activation[adapter_name] = ACTIVATIONS[activation]()
        self.monolora_encoder[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.monolora_decoder[adapter_name] = nn.Linear(r, self.out_features, bias=False)
        self.reset_parameters(adapter_name, init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def reset_parameters(self, adapter_name: str, init_weights: bool | str) -> None:
        """Initialise as LoRA does. A is never zero: relu'(0) = 0, so an encoder of zeros could not learn."""
        (encoder,) = self.monolora_encoder[adapter_name].parameters()
        (decoder,) = self.monolora_decoder[adapter_name].parameters()
        if init_weights == "gaussian":
            nn.init.normal_(encoder, std=1 / self.r[adapter_name])
        else:
            nn.init.kaiming_uniform_(encoder, a=math.sqrt(5))
        if init_weights is False:
            nn.init.kaiming_uniform_(decoder, a=math.sqrt(5))
        else:
            nn.init.zeros_(decoder)

    def update(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """s B sigma(A dropout(x)) of one adapter: x of shape (..., in_features) to (..., out_features).

        The scale multiplies the latents, r numbers a token in place of out_features.
        """
        encoder = self.monolora_encoder[adapter_name]
        x = self._cast_input_dtype(x, encoder.weight.dtype)
        latents = self.monolora_activation[adapter_name](encoder(self.monolora_dropout[adapter_name](x)))
        return self.monolora_decoder[adapter_name](latents * self.scaling[adapter_name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible, see `MERGE_ERROR`.

        Raises:
            NotImplementedError: always, before anything changes.
        """
        raise NotImplementedError(MERGE_ERROR)

    def unmerge(self) -> None:
        """Nothing is ever merged; warns, because PEFT calls this on paths that must not fail."""
        warnings.warn("MonoLoRA adapters are never merged, so there is nothing to unmerge.", stacklevel=2)


class MonoLoraLinear(nn.Module, MonoLoraLayer):
    """MonoLoRA on a layer that maps (..., in_features) to (..., out_features); the base's weight is never read."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **adapter_options: Any) -> None:
        super().__init__()
        MonoLoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **adapter_options)

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The base's output plus the updates of the active adapters, in the base output's dtype.

        Args:
            x: (..., in_features), any float dtype.
            adapter_names: for each row of x (its first dimension) the one adapter that applies to it, or
                "__base__" for none. Inference only.
        """
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if adapter_names is not None:
            return self._add_updates_per_row(result, x, adapter_names)
        for adapter_name in self.active_adapters:
            if adapter_name in self.monolora_encoder:
                result = result + self.update(adapter_name, x).to(result.dtype)
        return result

    def _add_updates_per_row(self, result: torch.Tensor, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        if len(adapter_names) != len(x):
            raise ValueError(
                f"`adapter_names` must name one adapter per input row, got {len(adapter_names)} for {len(x)} rows."
            )
        for adapter_name in sorted(set(adapter_names) & self.monolora_encoder.keys()):
            rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter_name], device=x.device)
            result = result.index_add(0, rows, self.update(adapter_name, x[rows]).to(result.dtype))
        return result

    def __repr__(self) -> str:
        return "monolora." + super().__repr__()
