"""Which adapters can be kept silent, and what has to be refused before that is tried."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from torch import nn

from .activity import active_adapters
from .layer import MonoLoraLayer
from .sharded import is_cut
from .targets import listed

if TYPE_CHECKING:
    from transformers import TrainingArguments

_KINDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)


class NeverSilentError(ValueError):
    """The model has no adapter, or one that has no half-space where it adds nothing."""


def silenceable_adapters(model: nn.Module) -> list[tuple[str, MonoLoraLayer, str]]:
    """The active MonoLoRA adapters of a model, as names of layers, layers, and names of adapters.

    Raises:
        NeverSilentError: there is none, or a sigma is not exactly zero below zero.
    """
    adapters = list(active_adapters(model))
    if not adapters:
        raise NeverSilentError(
            "the model has no active MonoLoRA adapter: only it has a half-space, A x <= 0, where it adds nothing. "
            "LoRA adds s B A x, which is zero on a subspace only, so that it changes every text."
        )
    for name, layer, adapter in adapters:
        sigma = layer.monolora_activation[adapter]
        # One unit at each of four positions: topk asks for the dimensions that latents of a convolution have.
        if sigma(torch.tensor([-1e4, -1.0, -1e-4, 0.0]).view(4, 1, 1, 1, 1)).any():
            raise NeverSilentError(
                f"the sigma of {name} is {type(sigma).__name__}, which is not exactly zero where A x <= 0, so that "
                "the adapter adds something to every text. Train with activation='relu', 'relu2' or 'relu6'."
            )
    return adapters


def check_ranges(
    weight: float,
    margin: float,
    rows_per_step: int,
    rows_per_module: int,
    memory_budget: int,
    lower_every: int | None,
    seed: int,
) -> None:
    if not 0 < weight < float("inf"):
        raise ValueError(f"`weight` must be a positive, finite number, got {weight!r}.")
    if not 0 <= margin < float("inf"):
        raise ValueError(f"`margin` must be a finite number that is not negative, got {margin!r}.")
    counts = {"rows_per_step": rows_per_step, "rows_per_module": rows_per_module}
    if lower_every is not None:
        counts["lower_every"] = lower_every
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"`{name}` must be a positive integer, got {count!r}.")
    if memory_budget < 0:
        raise ValueError(f"`memory_budget` is a number of bytes and must not be negative, got {memory_budget!r}.")
    if not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ValueError(f"`seed` must be an integer from 0 to 2^31 - 1, got {seed!r}.")


def trainable_layers(model: nn.Module) -> list[tuple[str, MonoLoraLayer, nn.Linear]]:
    """Name, layer and A of the active adapters."""
    layers: list[tuple[str, MonoLoraLayer, nn.Linear]] = []
    for name, layer, adapter in silenceable_adapters(model):
        encoder = layer.monolora_encoder[adapter]
        if not isinstance(encoder, nn.Linear):
            raise ValueError(
                f"Silence constrains adapters of linear layers, and {name} is a {type(layer).__name__}. Leave it out "
                "of `target_modules` and `target_parameters`."
            )
        if layer.frozen_encoder[adapter]:
            raise ValueError(
                f"the adapter {adapter} has `frozen_encoder=True`: its A stays as it was drawn, and nothing but A "
                "could make it silent. Train without `frozen_encoder`."
            )
        if not encoder.weight.requires_grad:
            raise ValueError(
                f"the adapter {adapter} of {name} is frozen, so that nothing could make it silent. Load it with "
                "`is_trainable=True`, or make the adapter that is trained the only active one."
            )
        if adapter in layer.monolora_invocations:
            raise ValueError(
                f"the adapter {adapter} is an activated one, which is silent before its invocation tokens anyway, and "
                "Silence does not tell these tokens apart. Train without `alora_invocation_tokens`."
            )
        if layers and layers[-1][0] == name:
            raise ValueError(f"{name} has two active adapters: Silence keeps one silent. Set one active.")
        layers.append((name, layer, encoder))
    return layers


def check_what_trains(model: nn.Module, layers: list[tuple[str, MonoLoraLayer, nn.Linear]]) -> None:
    """Raise if more is trained than adapters and what comes after all of them, the head; warn of the head."""
    parts = [getattr(layer, part) for _, layer, _ in layers for part in layer.adapter_layer_names]
    ours = {id(parameter) for part in parts for parameter in part.parameters()}
    others = {id(p): name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours}
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    body: nn.Module = getattr(base, getattr(base, "base_model_prefix", ""), base)
    inside = [others[id(parameter)] for parameter in body.parameters() if id(parameter) in others]
    if inside:
        raise ValueError(
            f"more than the adapters is trained, {listed(inside, 3)}: then the base's inputs change in training, and "
            "a silent adapter does not give the base back. Train without `bias`, `trainable_token_indices` and "
            "`modules_to_save` but a head's."
        )
    if others:
        warnings.warn(
            f"{listed(others.values(), 3)} of the head are trained beside the adapter: where it is silent, the head's "
            "inputs are the base's, the outputs are not.",
            stacklevel=3,
        )


def check_biases(layers: list[tuple[str, MonoLoraLayer, nn.Linear]], method: str) -> None:
    """Raise ValueError unless each adapter has a whole bias b, which `method` sets."""
    without = [name for name, _, encoder in layers if encoder.bias is None]
    if without:
        raise ValueError(
            f"the adapter of {listed(without, 3)} has no bias b to set: `{method}` needs "
            "MonoLoraConfig(encoder_bias=True)."
        )
    if any(hasattr(encoder.weight, "ds_id") or is_cut(encoder.weight) for _, _, encoder in layers):
        raise ValueError(f"`{method}` needs whole weights, which ZeRO-3 and FSDP cut up: use ZeRO-2 or DDP.")


def check_untrained(layers: list[tuple[str, MonoLoraLayer, nn.Linear]]) -> None:
    """Raise ValueError if the B of an adapter is not zero."""
    trained = [name for name, layer, encoder in layers if _decoder_of(layer, encoder).weight.any()]
    if trained:
        raise ValueError(
            f"the adapter of {listed(trained, 3)} is trained already (its B is not zero), and `start_apart` would "
            "turn its units away from what they learnt. Call it on a new adapter, before training."
        )


def _decoder_of(layer: MonoLoraLayer, encoder: nn.Linear) -> Any:
    """B of the adapter whose A is `encoder`."""
    return next(layer.monolora_decoder[name] for name, other in layer.monolora_encoder.items() if other is encoder)


def check_trainer(args: TrainingArguments) -> None:
    """Raise ValueError where the hinge's gradient cannot be added to the task's, whole and unscaled."""
    kind = AcceleratorState().distributed_type
    if kind not in _KINDS:
        raise ValueError(
            f"Silence works in one process, with DDP and with DeepSpeed, and this is {kind.value}, with which it has "
            "not been run. Train with DDP or DeepSpeed; with `fully_shard` in a loop of your own, call "
            "`add_gradients`."
        )
    if args.fp16:
        raise ValueError("Silence adds to gradients that are not scaled, and fp16 scales them: train with bf16=True.")
    if any(word in str(args.optim) for word in ("lomo", "layerwise")):
        raise ValueError(
            f"the optimizer {args.optim} steps in the backward pass, so that nothing can be added to the gradients: "
            "choose another `optim`."
        )
