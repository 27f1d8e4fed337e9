"""`MonoLoraModel`: puts MonoLoRA layers into a base model, and guards what goes in and out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper, _get_submodules
from torch import nn

from .bypass import warn_of_idle_layers
from .config import MonoLoraConfig
from .experts import MonoLoraExperts, MonoLoraExpertsProjection
from .invocation import Invocations
from .layer import MERGE_ERROR, MonoLoraLayer
from .names import PREFIX
from .replication import Replication
from .state_dicts import check_finite, check_prefix, check_tensor_names, names_of_adapter, tensors_to_save
from .targets import (
    INSIDE_LAYER,
    adaptable_names,
    adaptable_parameters,
    check_activatable,
    check_biasable,
    check_no_bare_parameters,
    check_parameters_supported,
    check_supported,
    layer_class,
    listed,
    matched_parameters,
    warn_of_other_paths,
    warn_of_unmatched_patterns,
)

MODEL_TAG = "monolora"


class MonoLoraModel(BaseTuner):
    """A base model with MonoLoRA adapters; what `get_peft_model(model, MonoLoraConfig(...))` puts inside PeftModel.

    Raises:
        TypeError: a targeted module is of a kind that MonoLoRA cannot adapt. The model is left as it was.
        ValueError: nothing matches `target_modules`, or the configuration conflicts with another adapter's.
    """

    targeted_parameter_names: list[str]  # PEFT's, declared because mypy does not follow PEFT
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
        self._invocations: Invocations = getattr(self, "_invocations", None) or Invocations()
        self._replication: Replication | None = getattr(self, "_replication", None)
        self._watched_modes: set[tuple[bool, bool]] = set()  # of passes: training or evaluation, with gradients or not
        self._targets_come_from_config = kwargs.get("state_dict") is None
        with warnings.catch_warnings():
            # PEFT looks for them among modules only, and not among target parameters.
            warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match")
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        warn_of_unmatched_patterns(model, adapter_name, self.peft_config[adapter_name])
        # Model cards, PEFT's and the trainers', take their tags from here.
        tags = getattr(model, "model_tags", None) or []
        setattr(model, "model_tags", sorted({*tags, MODEL_TAG}))  # noqa: B010, mypy reads it as a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT before 0.21 calls `self.model.forward`, past the hook that shows activated adapters the token ids.
        return self.model(*args, **kwargs)

    def unload(self) -> nn.Module:
        """The base model without adapters, and without their tag.

        As with every method of PEFT, the trained copies of `modules_to_save` and trained biases stay in it.
        """
        model = super().unload()
        if self._replication is not None:
            self._replication.undo()
            self._replication = None
        model.model_tags = [tag for tag in model.model_tags or [] if tag != MODEL_TAG] or None
        return model

    def _prepare_model(self, peft_config: MonoLoraConfig, model: nn.Module) -> None:
        if not peft_config.layer_replication or any(isinstance(module, MonoLoraLayer) for module in model.modules()):
            self._check_targets(peft_config, model)
            return
        replication = Replication(model, peft_config.layer_replication)
        try:
            self._check_targets(peft_config, model)
        except Exception:
            replication.undo()
            raise
        self._replication = replication

    def _check_targets(self, peft_config: MonoLoraConfig, model: nn.Module) -> None:
        """Check every target before the first one is replaced, so that a refusal leaves the model as it was."""
        targets = peft_config.target_modules
        if not self._targets_come_from_config or targets == DUMMY_TARGET_MODULES:
            return
        if peft_config.target_parameters:
            self._check_target_parameters(peft_config, model)
        if not targets and peft_config.target_parameters:
            return
        expanded = _maybe_include_all_linear_layers(copy.copy(peft_config), model)  # "all-linear" by names
        matched: list[str] = []
        excluded = False
        for name, _ in model.named_modules():
            if not name or INSIDE_LAYER.search(name):
                continue
            match = self._check_target_module_exists(expanded, name)
            if isinstance(match, _ExcludedModule):
                excluded = True
            elif match:
                matched.append(name)
        new = [name for name in matched if not isinstance(model.get_submodule(name), MonoLoraLayer)]
        check_supported(model, new)
        if peft_config.alora_invocation_tokens:
            check_activatable(model, matched)
        if peft_config.encoder_bias:
            check_biasable(model, matched)
        warn_of_other_paths(model, new)
        if isinstance(targets, (set, list)):
            check_no_bare_parameters(model, targets, matched)
        if not matched and not excluded:
            layers = peft_config.layers_to_transform
            where = "the base model" if layers is None else f"layers_to_transform={layers} of the base model"
            raise ValueError(
                f"Target modules {listed(targets)} not found in {where}. Please check the target modules and "
                f"try again. This model has: {listed(adaptable_names(model))}."
            )
        if isinstance(targets, (set, list)) and set(targets) != self._default_targets(model):
            unmatched = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in matched)]
            if unmatched:
                warnings.warn(
                    f"These entries of `target_modules` match no module and are ignored: {listed(unmatched)}. This "
                    f"model has: {listed(adaptable_names(model))}.",
                    stacklevel=2,
                )

    def _check_target_parameters(self, peft_config: MonoLoraConfig, model: nn.Module) -> None:
        check_parameters_supported(model, self._matched_parameters(peft_config, model))
        unmatched = [t for t in peft_config.target_parameters or () if not matched_parameters(model, [t])]
        if unmatched:
            raise ValueError(
                f"Target parameters {listed(unmatched)} not found in the base model. This model has: "
                f"{listed(adaptable_parameters(model)) or 'none that MonoLoRA can adapt'}."
            )

    def _matched_parameters(self, peft_config: MonoLoraConfig, model: nn.Module) -> list[str]:
        names = matched_parameters(model, peft_config.target_parameters or ())
        keys = {name: (name, name.rpartition(".")[0]) for name in names}
        check = partial(self._check_target_module_exists, peft_config)
        return [name for name in names if not any(isinstance(check(key), _ExcludedModule) for key in keys[name])]

    def _prepare_adapter_config(self, peft_config: MonoLoraConfig, model_config: dict[str, Any]) -> MonoLoraConfig:
        if peft_config.target_modules is None and peft_config.target_parameters:
            peft_config.target_modules = set(self.target_module_mapping.get(model_config.get("model_type"), ()))
        config: MonoLoraConfig = super()._prepare_adapter_config(peft_config, model_config)
        return config

    def _inject_parameters(
        self, peft_config: MonoLoraConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapt the stacked weights that `target_parameters` names; PEFT's own way would wrap one in another."""
        names = self._matched_parameters(peft_config, model)
        for name in names:
            module_name, _, parameter_name = name.rpartition(".")
            parent, target, target_name = _get_submodules(model, module_name)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(peft_config, adapter_name, target, target_name, parent, name, parameter_name)
        # PEFT before 0.21 looks for the names here, and not at what is returned.
        self.targeted_parameter_names += [n for n in names if n not in self.targeted_parameter_names]
        return names

    def _default_targets(self, model: nn.Module) -> set[str]:
        return set(self.target_module_mapping.get(self.get_model_config(model).get("model_type"), ()))

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        # With `bias="all"` PEFT takes the biases of all encoders for the base's.
        for layer in (module for module in model.modules() if isinstance(module, MonoLoraLayer)):
            layer.train_biases_with_encoders()

    def _check_new_adapter_config(self, config: MonoLoraConfig) -> None:
        super()._check_new_adapter_config(config)
        if config.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(
                f"`bias={config.bias!r}` needs peft >= 0.21: older versions would train the biases and not save them."
            )

        if any(other.layer_replication != config.layer_replication for other in self.peft_config.values()):
            raise ValueError(
                "`layer_replication` differs from that of the model's other adapters, and adapters of one model act "
                "on the same layers. Load them on models of their own."
            )

    # The trained copy of an embedding is that of its head too, with `ensure_weight_tying`.
    _add_modules_to_save_to_tie = getattr(LoraModel, "_add_modules_to_save_to_tie", None)  # peft >= 0.19

    def _add_targets_to_tie(self, peft_config: MonoLoraConfig, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            "`ensure_weight_tying` cannot tie an adapted embedding and its head: LoRA's head has the update of the "
            "embedding transposed, and with sigma the two are no matrix and its transpose. Adapt one of them only, "
            "without `ensure_weight_tying`, or train the embedding by `modules_to_save`."
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT would also copy the child's weight, which of trainable tokens is no parameter but the trained table.
        setattr(parent, child_name, new_module)

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
        rank, scale = peft_config.rank_and_scale(current_key)
        options = {
            "r": rank,
            "scaling": scale,
            "dropout": peft_config.monolora_dropout,
            "activation": peft_config.activation,
            "k": peft_config.k,
            "encoder_bias": peft_config.encoder_bias,
            "frozen_encoder": peft_config.frozen_encoder,
            "init_weights": peft_config.init_weights,
            "inference_mode": peft_config.inference_mode,
            "invocations": self._invocations if peft_config.alora_invocation_tokens else None,
        }
        if parameter_name is not None:
            if not isinstance(target, MonoLoraExperts):
                target = MonoLoraExperts(target)
                self._replace_module(parent, target_name, target, target.get_base_layer())
            projection = target.adapt(parameter_name, adapter_name, **options)
            if adapter_name not in self.active_adapters:
                projection.set_adapter(self.active_adapters)
            return
        if isinstance(target, MonoLoraLayer):
            target.update_layer(adapter_name, **options)
            return
        check_supported(self.model, [current_key])
        new_class = layer_class(target)
        assert new_class is not None
        new_module = new_class(target, adapter_name, **options)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # an additional adapter does not train before it is set active
        self._replace_module(parent, target_name, new_module, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of a forward or generate call, one adapter per input row, on to the layers.

        Around the first pass in each mode the layers are watched, and those that are not called are warned of.
        """
        activated = any(config.alora_invocation_tokens for config in self.peft_config.values())
        if not activated and kwargs.get("alora_offsets") is not None:
            raise ValueError("`alora_offsets` is for activated adapters (`alora_invocation_tokens`); there is none.")
        watched = self._invocations.watched(self.model, self.peft_config, args, kwargs) if activated else nullcontext()
        with watched, self._rows_adapted(kwargs.get("adapter_names"), kwargs.get("num_beams") or 1):
            yield

    @contextmanager
    def _rows_adapted(self, adapter_names: list[str] | None, beams: int) -> Iterator[None]:
        if adapter_names is None:
            with self._watched():
                yield
            return
        self._check_adapter_names(adapter_names)
        repeated = [name for name in adapter_names for _ in range(beams)]  # beam search repeats each row in place
        encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else None
        encoder_modules = set(encoder.modules()) if encoder is not None and encoder is not self.model else set()
        with ExitStack() as hooks:
            for module in self.modules():
                if isinstance(module, (MonoLoraLayer, AuxiliaryTrainingWrapper)):
                    names = list(adapter_names) if module in encoder_modules else repeated
                    hook = partial(_pass_adapter_names, adapter_names=names)
                    hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield

    @contextmanager
    def _watched(self) -> Iterator[None]:
        mode = (self.model.training, torch.is_grad_enabled())
        if torch.compiler.is_compiling() or mode in self._watched_modes:
            yield
            return
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, MonoLoraLayer)}
        training, gradients = mode
        kind = ("in training" if training else "in evaluation") + ("" if gradients else " without gradients")
        with warn_of_idle_layers(layers, kind):
            yield
        self._watched_modes.add(mode)

    def _check_adapter_names(self, adapter_names: list[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode; call model.eval().")
        if any(isinstance(module, MonoLoraExpertsProjection) for module in self.modules()):
            raise ValueError(
                "Cannot pass `adapter_names`: this model has adapters on fused experts, which get the tokens of all "
                "rows in one list and do not know which row a token is of. Run each adapter's rows by themselves, "
                "after `set_adapter`."
            )
        unknown = set(adapter_names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {listed(unknown)}; this model has "
                f"{listed(self.peft_config)}, and '__base__' means none."
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
        names = list(model.state_dict())
        # As when saving: layers inside an FSDP wrapper.
        saved = {cls._remove_adapter_name_from_key(n, adapter_name): n for n in names_of_adapter(names, adapter_name)}
        tensors = {saved.get(name, name): tensor for name, tensor in tensors.items()}
        check_tensor_names(names, adapter_name, tensors)
        check_finite(tensors)
        check_prefix(model, names)
        return tensors

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MonoLoraConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        return tensors_to_save(state_dict, adapter_name, config.bias)


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: Any, adapter_names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": adapter_names}
