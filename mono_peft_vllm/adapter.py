"""Reads a MonoLoRA adapter as vLLM's `LoRAModel`, and refuses what the server would serve as something else."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from vllm.lora.layers import (
    LogitsProcessorWithLoRA,
    RowParallelLinearWithLoRA,
    RowParallelLinearWithShardedLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.models.transformers.base import Base as TransformersBackend
from vllm.model_executor.models.utils import PPMissingLayer

from mono_peft import MonoLoraConfig
from mono_peft.state_dicts import check_finite

from .sigma import SIGMAS

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.monolora_(?P<part>encoder|decoder)\.weight")
_BASE_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.weight")
_WITHOUT = "Train the adapter without it, or serve it with `python -m mono_peft.serve`."


def read_adapter(folder: Path, adapter_id: int, worker: WorkerLoRAManager) -> LoRAModel:
    """The adapter in `folder`, as `WorkerLoRAManager._load_adapter` gives those of LoRA, and checked.

    The scale s of each module is multiplied into B, and vLLM told alpha = r, so that no version of vLLM has to know of
    rank and alpha patterns or rsLoRA. The model has its activation in the attribute `monolora_activation`.

    Raises:
        ValueError: the file or its options cannot be served, or do not fit the served model; the text says what to do.
    """
    config = MonoLoraConfig.from_pretrained(str(folder))
    _check_options(config, folder)
    tensors, embeddings = _vllm_tensors(folder, config)
    ranks = [config.r, *config.rank_pattern.values()]
    helper = PEFTHelper(r=max(ranks), lora_alpha=max(ranks), target_modules=[])
    helper.validate_legal(worker.lora_config)
    manager = worker._adapter_manager
    if config.activation == "topk":
        for wrapper in manager.punica_wrapper_mapping.values():
            if not getattr(wrapper, "serves_topk", False):
                raise ValueError(
                    f"{folder}: on this platform vLLM cannot serve `activation='topk'`, only on CPUs: one graph "
                    "computes the tokens of all adapters, and all would pay for the sort. Serve it with "
                    "`python -m mono_peft.serve`."
                )
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()  # as vLLM's own reading does
    adapter = LoRAModel.from_lora_tensors(
        adapter_id,
        tensors,
        helper,
        device="cpu",
        dtype=worker.lora_config.lora_dtype,
        model_vocab_size=worker.vocab_size,
        weights_mapper=mapper,
        skip_prefixes=getattr(manager.model, "lora_skip_prefixes", None),
    )
    adapter.monolora_activation, adapter.monolora_k = config.activation, config.k
    _check_modules(adapter, manager, folder)
    modules = dict(manager.model.named_modules())
    for name, table in embeddings.items():
        name = name if mapper is None else mapper._map_name(name)
        module = modules.get(name, modules.get(f"model.{name}"))  # pooling models have the latter
        if not isinstance(module, PPMissingLayer):
            _check_embedding(name, table, getattr(module, "base_layer", module), folder)
    return adapter


def _check_options(config: MonoLoraConfig, folder: Path) -> None:
    if config.alora_invocation_tokens:
        raise ValueError(
            f"{folder}: vLLM cannot serve an activated MonoLoRA adapter (`alora_invocation_tokens`). Generate with "
            "PeftModel, or train the adapter without them."
        )
    for option in ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"):
        if value := getattr(config, option, None):
            raise ValueError(f"{folder}: vLLM cannot serve a MonoLoRA adapter with `{option}={value!r}`. {_WITHOUT}")
    if config.encoder_bias:
        raise ValueError(
            f"{folder}: vLLM cannot serve a MonoLoRA adapter with `encoder_bias=True`: its kernels compute A x, "
            f"without a bias. {_WITHOUT}"
        )
    if config.bias != "none":
        raise ValueError(f"{folder}: vLLM cannot serve a MonoLoRA adapter with `bias={config.bias!r}`. {_WITHOUT}")
    served = (*SIGMAS, "topk")
    if config.activation not in served:
        raise ValueError(f"{folder}: vLLM cannot serve `activation={config.activation!r}`, only {', '.join(served)}.")


def _vllm_tensors(folder: Path, config: MonoLoraConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors by vLLM's names, with s in B; and the base's embedding tables that PEFT has put in the file."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder} has no adapter_model.safetensors; other files of weights are not read.")
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    embeddings = {}
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): copy the file again.") from None
    check_finite(saved)
    for name, tensor in saved.items():
        if match := _TENSOR.fullmatch(name):
            modules[match["module"]][match["part"]] = tensor
        elif match := _BASE_TENSOR.fullmatch(name):
            embeddings[match["module"]] = tensor
        else:
            raise ValueError(f"{path}: {name} is no tensor of a MonoLoRA adapter that vLLM can serve.")
    tensors: dict[str, torch.Tensor] = {}
    for module, parts in modules.items():
        if parts.keys() != {"encoder", "decoder"}:
            raise ValueError(f"{path} has only the {next(iter(parts))} of {module}.")
        encoder, decoder = parts["encoder"], parts["decoder"]
        rank, scale = config.rank_and_scale(module)
        if ".experts" in module or encoder.ndim != 2 or decoder.ndim != 2:
            kind = "experts" if ".experts" in module else "convolutions"
            raise ValueError(f"{folder}: vLLM cannot serve MonoLoRA on {kind} ({module}). {_WITHOUT}")
        of_embedding = encoder.shape[1] == rank != encoder.shape[0]  # the encoder is a table of tokens
        if rank not in encoder.shape or decoder.shape[1] != rank:
            shapes = f"{tuple(encoder.shape)} and {tuple(decoder.shape)}"
            raise ValueError(f"{path}: {module} has the shapes {shapes}, which do not fit its rank {rank}.")
        names = ("lora_embedding_A", "lora_embedding_B") if of_embedding else ("lora_A.weight", "lora_B.weight")
        values = (encoder.T.contiguous() if of_embedding else encoder, decoder * scale)
        tensors |= {f"base_model.model.{module}.{name}": value for name, value in zip(names, values, strict=True)}
    if not tensors:
        raise ValueError(f"{path} has no tensor of an adapter.")
    return tensors, embeddings


def _served(manager: LoRAModelManager) -> Iterator[tuple[str, Any, int | None]]:
    """Names that an adapter may adapt, the module of each, and its place among the parts of a packed one."""
    for name, module in manager.modules.items():
        for part, own in enumerate(manager.packed_modules.get(name, [])):
            yield own, module, part
        if name not in manager.packed_modules:
            yield name, module, None


def _check_modules(adapter: LoRAModel, manager: LoRAModelManager, folder: Path) -> None:
    """Refuse modules that the server does not have, or of other sizes: vLLM drops the ones, and pads the others."""
    served = {name: (module, part) for name, module, part in _served(manager)}
    if manager.is_pooling_model:  # these have the names of the model inside, too
        served = {name.removeprefix("model."): value for name, value in served.items()} | served
    elsewhere = [name for name, module in manager.model.named_modules() if isinstance(module, PPMissingLayer)]
    unknown = [
        name
        for name in adapter.loras
        if name not in served and not any(f"{name}.".startswith(f"{other}.") for other in elsewhere)
    ]
    if unknown:
        raise ValueError(
            f"{folder}: the served model has no module {unknown[0]} that vLLM can adapt ({len(unknown)} of "
            f"{len(adapter.loras)} modules of the adapter), and would leave it out. The adapter belongs to another "
            "base model, `--lora-target-modules` excludes it, or vLLM adapts no embeddings in this architecture."
        )
    absorbed = {id(module.kv_b_proj) for module in manager.model.modules() if isinstance(module, MLAAttention)}
    for name, weights in adapter.loras.items():
        if name not in served:
            continue
        module, part = served[name]
        if id(module.base_layer) in absorbed or id(module) in absorbed:
            raise ValueError(
                f"{folder}: vLLM computes {name} inside its attention (MLA) and would leave the adapter out, LoRA's "
                f"too. {_WITHOUT}"
            )
        if isinstance(module, VocabParallelEmbeddingWithLoRA) and isinstance(manager.model, TransformersBackend):
            raise ValueError(
                f"{folder}: with `--model-impl transformers` vLLM gives all tokens the {name} of the first one's "
                f"adapter, LoRA's too. {_WITHOUT}"
            )
        inputs, outputs = _sizes(module, part)
        got = (weights.lora_a.shape[1], weights.lora_b.shape[0])
        if got != (inputs, got[1] if outputs is None else outputs):
            raise ValueError(
                f"{folder}: the adapter of {name} maps {got[0]} to {got[1]} numbers, the served module "
                f"{inputs} to {outputs}. The adapter belongs to another base model."
            )
        whole = isinstance(module, RowParallelLinearWithLoRA) and not isinstance(
            module, RowParallelLinearWithShardedLoRA
        )
        if whole and module.tp_size > 1 and adapter.monolora_activation != "identity":
            raise ValueError(
                f"{folder}: with tensor parallelism {name} has a part of A x on each rank, and sigma acts on the sum. "
                "Start vLLM with --fully-sharded-loras."
            )


def _sizes(module: Any, part: int | None) -> tuple[int, int | None]:
    """Numbers that a module, or a part of a packed one, maps from and to over all ranks; None if vLLM checks it."""
    base = module.base_layer
    if isinstance(module, LogitsProcessorWithLoRA):
        return module.hidden_size, module.vocab_size
    if isinstance(module, VocabParallelEmbeddingWithLoRA):
        return base.org_vocab_size, base.embedding_dim
    slices = list(getattr(base, "output_sizes", [base.output_size]))
    if isinstance(base, QKVParallelLinear):  # whose own sizes count each copy of a key-value head
        keys = base.total_num_kv_heads
        slices = [base.total_num_heads * base.head_size, keys * base.head_size, keys * base.v_head_size]
    if part is None:
        return base.input_size, sum(slices)
    return base.input_size, slices[part] if module.n_slices == len(slices) else None


def _check_embedding(name: str, table: torch.Tensor, base: Any, folder: Path) -> None:
    """Refuse an embedding table in the file that is not the server's: vLLM would go on with its own."""
    if not hasattr(base, "shard_indices") or not hasattr(base, "weight"):
        raise ValueError(f"{folder} brings a table of {name}, and the served model has none to compare it with.")
    start, end = base.shard_indices.org_vocab_start_index, base.shard_indices.org_vocab_end_index
    own, saved = base.weight[: end - start].cpu(), table[start:end]
    # Either may be rounded to the other's dtype.
    if saved.shape != own.shape or not (
        torch.equal(saved.to(own.dtype), own) or torch.equal(own.to(saved.dtype), saved)
    ):
        raise ValueError(
            f"{folder} brings its own table of the base's {name}, which is not the served model's. Save the base that "
            "the adapter was trained on, and serve that."
        )
