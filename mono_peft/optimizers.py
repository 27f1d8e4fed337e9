"""LoRA+ for MonoLoRA: parameter groups in which B learns faster than A."""

from __future__ import annotations

from typing import Any

from torch import nn

from .layer import MonoLoraEmbedding, MonoLoraLayer


def monolora_plus_param_groups(
    model: nn.Module,
    learning_rate: float,
    learning_rate_ratio: float,
    embedding_learning_rate: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups of LoRA+ (arXiv:2402.12354), for any optimiser:

        groups = monolora_plus_param_groups(model, learning_rate=2e-4, learning_rate_ratio=16)
        trainer = SFTTrainer(model, ..., optimizers=(torch.optim.AdamW(groups), None))

    The counterpart of `peft.optimizers.create_loraplus_optimizer`, which knows LoRA's names only. The encoders A and
    whatever else trains (a score head, token embeddings) learn at `learning_rate`, the decoders B at `learning_rate`
    times `learning_rate_ratio`, biases and other vectors of the base as B but without weight decay, the encoders' own
    biases b as A but without weight decay, adapters of embeddings at `embedding_learning_rate`.

    Args:
        model: with MonoLoRA adapters; parameters that do not require gradients are left out.
        learning_rate_ratio: of B to A, at least 1.

    Raises:
        ValueError: the ratio is below 1, or no MonoLoRA weight of the model requires gradients.
    """
    if not learning_rate_ratio >= 1:
        raise ValueError(f"learning_rate_ratio is {learning_rate_ratio}; LoRA+ trains B faster than A: at least 1.")
    kinds: dict[nn.Parameter, str] = {}
    for layer in model.modules():
        if isinstance(layer, MonoLoraEmbedding):
            parameters = (*layer.monolora_encoder.parameters(), *layer.monolora_decoder.parameters())
            kinds |= dict.fromkeys(parameters, "embeddings")
        elif isinstance(layer, MonoLoraLayer):
            biases = (p for name, p in layer.monolora_encoder.named_parameters() if name.endswith(".bias"))
            kinds |= dict.fromkeys(layer.monolora_decoder.parameters(), "decoders")
            kinds |= dict.fromkeys(biases, "encoder_biases")
    groups: dict[str, dict[str, Any]] = {
        "encoders": {"lr": learning_rate, "weight_decay": weight_decay},
        "encoder_biases": {"lr": learning_rate, "weight_decay": 0.0},
        "decoders": {"lr": learning_rate * learning_rate_ratio, "weight_decay": weight_decay},
        "vectors": {"lr": learning_rate * learning_rate_ratio, "weight_decay": 0.0},
        "embeddings": {"lr": embedding_learning_rate, "weight_decay": weight_decay},
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = kinds.get(parameter, "vectors" if parameter.ndim == 1 else "encoders")
            groups[kind].setdefault("params", []).append(parameter)
    if "params" not in groups["decoders"] and "params" not in groups["embeddings"]:
        raise ValueError("No MonoLoRA weight of this model requires gradients: add an adapter, or set it active.")
    return [group for group in groups.values() if "params" in group]
