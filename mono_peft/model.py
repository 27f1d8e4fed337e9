"""`MonoLoraModel`: puts MonoLoRA layers into a base model, and guards what goes in and out."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    _check_lora_target_modules_mamba,
    _ExcludedModule,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import MonoLoraConfig
from .layer import MERGE_ERROR, MonoLoraConv2d, MonoLoraEmbedding, MonoLoraLayer, MonoLoraLinear
from .register import PREFIX

MODEL_TAG = "monolora"

_PEFT_PREFIX = "base_model.model."
_ADAPTER_TENSOR = re.compile(rf"\.{PREFIX}(?:encoder|decoder)\.(?P<adapter>[^.]+)\.weight$")
_INSIDE_LAYER = re.compile(rf"\.(base_layer|{PREFIX}\w+)(\.|$)")


class MonoLoraModel(BaseTuner):
    """A base model with MonoLoRA adapters; what `get_peft_model(model, MonoLoraConfig(...))` puts inside PeftModel.

    Raises:
        TypeError: a targeted module is of a kind that MonoLoRA cannot adapt. The model is left as it was.
        ValueError: nothing matches `target_modules`, or the configuration conflicts with another adapter's.
    """

    prefix = PREFIX
    tuner_layer_cls = MonoLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        layers = [module for module in model.modules() if isinstance(module, MonoLoraLayer)]
        if any(adapter_name in layer.monolora_encoder for layer in layers):
            raise ValueError(
                f"The model has an adapter named {adapter_name!r} already. Give the new one another name, or delete "
                "the old one with `delete_adapter` first."
            )
        # With a state dict its keys name the modules, and `target_modules` may match nothing.
        self._targets_come_from_config = kwargs.get("state_dict") is None
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # Model cards, PEFT's and the trainers', take their tags from here.
        tags = getattr(model, "model_tags", None) or []
        setattr(model, "model_tags", sorted({*tags, MODEL_TAG}))  # noqa: B010, mypy reads it as a submodule

    def unload(self) -> nn.Module:
        """The base model without adapters, and without their tag."""
        model = super().unload()
        model.model_tags = [tag for tag in model.model_tags or [] if tag != MODEL_TAG] or None
        return model

    def _prepare_model(self, peft_config: MonoLoraConfig, model: nn.Module) -> None:
        """Check every target before the first one is replaced, so that a refusal leaves the model as it was."""
        targets = peft_config.target_modules
        if not self._targets_come_from_config or targets == DUMMY_TARGET_MODULES:
            return
        expanded = _maybe_include_all_linear_layers(copy.copy(peft_config), model)  # "all-linear" by names
        matched: list[str] = []
        excluded = False
        for name, module in model.named_modules():
            if not name or _INSIDE_LAYER.search(name):
                continue
            found = self._check_target_module_exists(expanded, name)
            if isinstance(found, _ExcludedModule):
                excluded = True
            elif found:
                matched.append(name)
                self._check_target_module_compatiblity(peft_config, model, name.rpartition(".")[2])
                if not isinstance(module, MonoLoraLayer):
                    _check_supported(name, module, model)
        if isinstance(targets, (set, list)):
            _check_no_bare_parameters(model, targets, matched)
        if not matched and not excluded:
            layers = peft_config.layers_to_transform
            where = "the base model" if layers is None else f"layers_to_transform={layers} of the base model"
            raise ValueError(
                f"Target modules {_listed(targets)} not found in {where}. Please check the target modules and "
                f"try again. This model has: {_listed(_adaptable_names(model))}."
            )
        if isinstance(targets, (set, list)) and set(targets) != self._default_targets(model):
            unmatched = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in matched)]
            if unmatched:
                warnings.warn(
                    f"These entries of `target_modules` match no module and are ignored: {_listed(unmatched)}. This "
                    f"model has: {_listed(_adaptable_names(model))}.",
                    stacklevel=2,
                )

    def _default_targets(self, model: nn.Module) -> set[str]:
        return set(self.target_module_mapping.get(self.get_model_config(model).get("model_type"), ()))

    def _check_target_module_compatiblity(
        self, peft_config: MonoLoraConfig, model: nn.Module, target_name: str
    ) -> None:
        # PEFT's guard against Mamba's fused modules, which bypass `forward`, looks at the types it lists only.
        _check_lora_target_modules_mamba(SimpleNamespace(peft_type=PeftType.LORA), model, target_name)

    def _check_new_adapter_config(self, config: MonoLoraConfig) -> None:
        super()._check_new_adapter_config(config)
        if config.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(
                f"`bias={config.bias!r}` needs peft >= 0.21: older versions would train the biases and not save them."
            )

    def _create_and_replace(
        self,
        peft_config: MonoLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ranks, alphas = peft_config.rank_pattern, peft_config.alpha_pattern
        options = {
            "r": ranks.get(get_pattern_key(ranks.keys(), current_key), peft_config.r),
            "alpha": alphas.get(get_pattern_key(alphas.keys(), current_key), peft_config.monolora_alpha),
            "dropout": peft_config.monolora_dropout,
            "activation": peft_config.activation,
            "use_rslora": peft_config.use_rslora,
            "init_weights": peft_config.init_weights,
            "inference_mode": peft_config.inference_mode,
        }
        if isinstance(target, MonoLoraLayer):
            target.update_layer(adapter_name, **options)
            return
        _check_supported(current_key, target, self.model)
        layer_class = _layer_class(target)
        assert layer_class is not None
        new_module = layer_class(target, adapter_name, **options)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # an additional adapter does not train before it is set active
        self._replace_module(parent, target_name, new_module, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of a forward or generate call, one adapter per input row, on to the layers."""
        if kwargs.get("alora_offsets") is not None:
            raise ValueError("`alora_offsets` belongs to activated LoRA, which MonoLoRA does not implement.")
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in adapter_names for _ in range(beams)]  # beam search repeats each row in place
        encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else None
        encoder_modules = set(encoder.modules()) if encoder is not None and encoder is not self.model else set()
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, (MonoLoraLayer, AuxiliaryTrainingWrapper)):
                    names = list(adapter_names) if module in encoder_modules else repeated
                    hook = partial(_pass_adapter_names, adapter_names=names)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: list[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode; call model.eval().")
        unknown = set(adapter_names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {_listed(unknown)}; this model has "
                f"{_listed(self.peft_config)}, and '__base__' means none."
            )

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(MERGE_ERROR)

    def unmerge_adapter(self) -> None:
        """Nothing is ever merged; warns once."""
        warnings.warn("MonoLoRA adapters are never merged, so there is nothing to unmerge.", stacklevel=2)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not possible.

        Raises:
            NotImplementedError: always, before anything changes.
        """
        raise NotImplementedError(
            "MonoLoRA adapters cannot be combined into one: the sum of two updates B sigma(A x) is not of that form "
            "for any weighted A and B of the same rank, and weights cannot merge through sigma. Activate several "
            "adapters at once instead: `model.base_model.set_adapter(['first', 'second'])` adds their updates."
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MonoLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Raise ValueError for a file that is not this adapter's. PEFT (0.21 on) would only warn."""
        tensors = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        _check_tensor_names(model, adapter_name, tensors)
        check_finite(tensors)
        return tensors

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        tensors = super()._get_adapter_state_dict(*args, **kwargs)
        empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
        if empty:
            raise ValueError(
                f"Refusing to save empty tensors ({_listed(empty)}): the weights are sharded over processes. Save "
                "with `trainer.save_model()`, or pass `state_dict=accelerator.get_state_dict(model)`."
            )
        return tensors


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: Any, adapter_names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": adapter_names}


def _adaptable_names(model: nn.Module) -> set[str]:
    """Last components of the names of the modules that MonoLoRA can adapt, or has."""
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name and not _INSIDE_LAYER.search(name) and (isinstance(module, MonoLoraLayer) or not _obstacle(module))
    }


def _layer_class(module: nn.Module) -> type[MonoLoraLayer] | None:
    """What adapts `module`; None if nothing does."""
    if isinstance(module, nn.Embedding):
        return MonoLoraEmbedding
    if isinstance(module, nn.Conv2d):
        return MonoLoraConv2d
    if isinstance(module, (nn.Linear, Conv1D)) or _is_quantized_linear(module):
        return MonoLoraLinear
    return None


def _is_quantized_linear(module: nn.Module) -> bool:
    """Whether `module` is a quantiser's own linear layer; those of bitsandbytes and torchao are nn.Linear anyway."""
    if "Linear" not in type(module).__name__ or "LayerNorm" in type(module).__name__:
        return False  # also without the import below: it takes seconds where some quantisers are installed
    try:
        from peft.utils.quantization_utils import resolve_quantization_backend
    except ImportError:  # peft < 0.20, which has the sizes only
        return _get_in_out_features(module) != (None, None)
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear"


def _obstacle(module: nn.Module) -> str | None:
    """Why MonoLoRA cannot adapt `module`, None if it can."""
    if _layer_class(module) is None:
        return (
            f"it is a {type(module).__name__}, and MonoLoRA adapts torch.nn.Linear, Conv2d and Embedding, "
            "transformers' Conv1D, and the quantised linear layers that PEFT knows"
        )
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "it belongs to torch.nn.MultiheadAttention, which reads its weight and never calls it"
    if getattr(module, "_hf_tp_plan", None) is not None:
        return "it is sharded by tensor parallelism, and sigma needs the whole of A x; use data parallelism or FSDP"
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            return f"it pads with padding_mode={module.padding_mode!r}, and MonoLoRA's A pads with zeros"
        if type(module).forward is not nn.Conv2d.forward:
            return f"{type(module).__name__} has a forward of its own, and A is a plain convolution"
    return None


def _check_supported(name: str, module: nn.Module, model: nn.Module) -> None:
    """Raise TypeError unless MonoLoRA can adapt `module`."""
    obstacle = _obstacle(module)
    if obstacle:
        raise TypeError(
            f"MonoLoRA cannot adapt the target module '{name}': {obstacle}. Choose others, or name it in "
            f"`exclude_modules`. Modules of this model that can be adapted: {_listed(_adaptable_names(model))}."
        )


def _check_no_bare_parameters(model: nn.Module, targets: Iterable[str], matched: Iterable[str]) -> None:
    """Raise ValueError for a target that names no module but parameters, as the fused experts of MoE models are."""
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in matched):
            continue
        for name, _ in model.named_parameters():
            if name.endswith(f".{target}") and not _INSIDE_LAYER.search(name):
                raise ValueError(
                    f"`target_modules` has {target!r}, which is a bare nn.Parameter ('{name}'): it is multiplied "
                    "inside its module, where MonoLoRA cannot see its input. Experts that are separate Linear modules "
                    f"can be adapted, fused ones cannot. This model has: {_listed(_adaptable_names(model))}."
                )


def _check_tensor_names(model: nn.Module, adapter_name: str, tensors: Iterable[str]) -> None:
    """Raise ValueError unless `tensors` names every weight of the adapter in `model` and nothing unknown to it."""
    # Where layers were injected without PeftModel, files have its prefix and the model has not.
    given = {name.removeprefix(_PEFT_PREFIX) for name in tensors}
    known = {name.removeprefix(_PEFT_PREFIX) for name in model.state_dict()}
    wanted = {name for name in known if (match := _ADAPTER_TENSOR.search(name)) and match["adapter"] == adapter_name}
    unknown, missing = given - known, wanted - given
    problem = None
    if any(".lora_A." in name for name in unknown):
        problem = (
            "it holds the weights of a LoRA adapter under a MonoLoRA configuration. LoRA has no sigma: load it with a "
            "LoraConfig (peft_type LORA in its adapter_config.json)"
        )
    elif wanted and missing == wanted:
        problem = "it holds no weights of MonoLoRA layers of this model"
    elif missing:
        problem = f"{len(missing)} tensors are missing: {_listed(missing)}"
    elif unknown:
        problem = f"{len(unknown)} tensors belong to no module of this model: {_listed(unknown)}"
    if problem:
        raise ValueError(
            f"This MonoLoRA adapter does not fit the model: {problem}. Check that the file is complete, and that the "
            "base model and target_modules are those it was trained with."
        )


class DivergedError(ValueError):
    """An adapter's weights, or what it computes, are NaN or infinite: its training diverged."""


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise DivergedError if an adapter's tensor holds NaN or infinity."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise DivergedError(
            f"{len(broken)} tensors of this adapter hold NaN or infinity ({_listed(broken)}): its training diverged, "
            "or the file is damaged. Load an earlier checkpoint."
        )


def _listed(names: Any, most: int = 12) -> str:
    if isinstance(names, str):
        return repr(names)
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
