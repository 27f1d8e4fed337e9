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
    decoders, embeddings, encoder_biases = set(), set(), set()
    for layer in model.modules():
        if isinstance(layer, MonoLoraEmbedding):
            embeddings |= {*layer.monolora_encoder.parameters(), *layer.monolora_decoder.parameters()}
        elif isinstance(layer, MonoLoraLayer):
            decoders |= set(layer.monolora_decoder.parameters())
            encoder_biases |= {p for name, p in layer.monolora_encoder.named_parameters() if name.endswith(".bias")}
    kinds = ("encoders", "encoder_biases", "decoders", "vectors", "embeddings")
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in kinds}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter in embeddings:
            groups["embeddings"].append(parameter)
        elif parameter in encoder_biases:
            groups["encoder_biases"].append(parameter)
        elif parameter in decoders:
            groups["decoders"].append(parameter)
        else:
            groups["vectors" if parameter.ndim == 1 else "encoders"].append(parameter)
    if not groups["decoders"] and not groups["embeddings"]:
        raise ValueError("No MonoLoRA weight of this model requires gradients: add an adapter, or set it active.")
    learning_rates = {
        "encoders": learning_rate,
        "encoder_biases": learning_rate,
        "decoders": learning_rate * learning_rate_ratio,
        "vectors": learning_rate * learning_rate_ratio,
        "embeddings": embedding_learning_rate,
    }
    return [
        {
            "params": parameters,
            "lr": learning_rates[name],
            "weight_decay": 0.0 if name in ("vectors", "encoder_biases") else weight_decay,
        }
        for name, parameters in groups.items()
        if parameters
    ]
