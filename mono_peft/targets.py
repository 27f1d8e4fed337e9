"""Which modules of a base model MonoLoRA can adapt, and why not the others."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn
from transformers.pytorch_utils import Conv1D

from .bypass import weight_read
from .experts import experts_obstacle
from .layer import (
    NO_BIAS_OF_AN_EMBEDDING,
    MonoLoraConvolution,
    MonoLoraEmbedding,
    MonoLoraLayer,
    MonoLoraLinear,
    convolution_kind,
)
from .names import PREFIX

INSIDE_LAYER = re.compile(rf"\.(base_layer|{PREFIX}\w+)(\.|$)")  # in the names of the modules of a MonoLoRA layer
_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.original\d*$")  # where torch keeps a parametrised weight


def layer_class(module: nn.Module) -> type[MonoLoraLayer] | None:
    """Return the layer class that adapts `module`, or None if no class does."""
    if isinstance(module, nn.Embedding):
        return MonoLoraEmbedding
    if convolution_kind(module) is not None:
        return MonoLoraConvolution
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


def check_supported(model: nn.Module, names: Iterable[str]) -> None:
    """Raise TypeError unless MonoLoRA can adapt all modules of `model` with these `names`.

    The message has the reason for each that it cannot adapt, and the list of what this model has that it can.
    """
    refused: dict[str, list[str]] = {}
    for name in names:
        if (obstacle := _obstacle(model, name)) is not None:
            refused.setdefault(obstacle, []).append(name)
    if not refused:
        return
    adaptable = adaptable_names(model)
    reasons = [
        f"'{first}': {reason}" + (f" (and {len(others)} more like it)" if others else "")
        for reason, (first, *others) in refused.items()
    ]
    ends = {name: name.rpartition(".")[2] for group in refused.values() for name in group}
    excluded = {name if end in adaptable else end for name, end in ends.items()}
    raise TypeError(
        f"MonoLoRA cannot adapt the target module {'; '.join(reasons)}. Choose others, or leave them out with "
        f"`exclude_modules=[{listed(map(repr, excluded))}]`. Modules of this model that can be adapted: "
        f"{listed(adaptable)}."
    )


def check_activatable(model: nn.Module, names: Iterable[str]) -> None:
    """Raise TypeError if `model` or one of its modules `names` does not compute as an activated adapter needs it."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise TypeError(
            f"An activated MonoLoRA adapter (`alora_invocation_tokens`) cannot adapt {type(model).__name__}: while it "
            "generates, the adapter finds its place by `past_key_values`, which this model does not take."
        )
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, MonoLoraConvolution) or convolution_kind(module) is not None:
            raise TypeError(
                f"An activated MonoLoRA adapter (`alora_invocation_tokens`) cannot adapt '{name}', a convolution: it "
                f"has no tokens. Leave it out with `exclude_modules=[{name.rpartition('.')[2]!r}]`."
            )


def check_biasable(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError if one of the modules `names` of `model` cannot have an adapter with `encoder_bias`."""
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, MonoLoraEmbedding) or layer_class(module) is MonoLoraEmbedding:
            raise ValueError(NO_BIAS_OF_AN_EMBEDDING.format(f"'{name}'"))


def warn_of_other_paths(model: nn.Module, names: Iterable[str]) -> None:
    """Warn of those modules of `model` among `names` whose weight it reads on some paths, and calls on others."""
    readers: dict[str, set[str]] = {}
    for name in names:
        if (read := weight_read(model, name)) is not None:
            readers.setdefault(read.method, set()).add(name.rpartition(".")[2])
    for method, ends in readers.items():
        warnings.warn(
            f"{method} reads the weight of {listed(ends)} itself on one of its paths, where an adapter does not act. "
            "If the first pass in training or in evaluation takes that path, a warning says so; `exclude_modules` "
            "leaves the module out.",
            stacklevel=2,
        )


def warn_of_unmatched_patterns(model: nn.Module, adapter_name: str, config: Any) -> None:
    """Warn of the keys of `rank_pattern` and `alpha_pattern` that name no layer which has the adapter."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MonoLoraLayer)}
    names = [name for name, layer in layers.items() if adapter_name in layer.monolora_encoder]
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, option)
        unmatched = [p for p in patterns if not any(re.match(rf"(.*\.)?({p})$", name) for name in names)]
        if unmatched:
            warnings.warn(
                f"These keys of `{option}` match no adapted module or parameter and are ignored: {listed(unmatched)}",
                stacklevel=2,
            )


def check_no_bare_parameters(model: nn.Module, targets: Iterable[str], matched: Iterable[str]) -> None:
    """Raise ValueError for a target that names no module but parameters, as the fused experts of MoE models are."""
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in matched):
            continue
        for name in parameter_names(model):
            if name.endswith(f".{target}"):
                raise ValueError(
                    f"`target_modules` has {target!r}, which is a bare nn.Parameter ('{name}') and no module. The "
                    f"stacked weights of fused experts are named in `target_parameters`; this model has: "
                    f"{listed(adaptable_parameters(model)) or 'none'}. Modules: {listed(adaptable_names(model))}."
                )


def parameter_names(model: nn.Module) -> list[str]:
    """The names of the base model's parameters as they are without adapters."""
    # Layers that share their weights have adapters of their own.
    every = model.named_parameters(remove_duplicate=False)
    names = (name for name, _ in every if f".{PREFIX}" not in name)
    return [_PARAMETRIZED.sub(r"\1", name.replace(".base_layer.", ".")) for name in names]


def matched_parameters(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """The names among `parameter_names` that are a target, or end with one."""
    targets = list(targets)
    return [n for n in parameter_names(model) if any(n == t or n.endswith(f".{t}") for t in targets)]


def adaptable_parameters(model: nn.Module) -> set[str]:
    """Last two components of the names of the stacked weights that MonoLoRA can adapt, or has."""
    return {
        ".".join(name.split(".")[-2:]) for name in parameter_names(model) if _parameter_obstacle(model, name) is None
    }


def check_parameters_supported(model: nn.Module, names: Iterable[str]) -> None:
    """Raise TypeError unless MonoLoRA can adapt all parameters of `model` with these `names`."""
    for name in names:
        if (obstacle := _parameter_obstacle(model, name)) is not None:
            raise TypeError(
                f"MonoLoRA cannot adapt the target parameter '{name}': {obstacle}. Parameters of this model that can "
                f"be adapted: {listed(adaptable_parameters(model)) or 'none'}."
            )


def _parameter_obstacle(model: nn.Module, name: str) -> str | None:
    module_name, _, parameter_name = name.rpartition(".")
    if not module_name:
        return "it lies in the model itself and in no module inside"
    module = model.get_submodule(module_name)
    if isinstance(module, MonoLoraLayer) or (layer_class(module) is not None and parameter_name == "weight"):
        return f"it belongs to a layer; name '{module_name.rpartition('.')[2]}' in `target_modules`"
    return experts_obstacle(module, parameter_name)


def adaptable_names(model: nn.Module) -> set[str]:
    """Last components of the names of the modules that MonoLoRA can adapt, or has."""
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name
        and not INSIDE_LAYER.search(name)
        and (isinstance(module, MonoLoraLayer) or _obstacle(model, name) is None)
    }


def _obstacle(model: nn.Module, name: str) -> str | None:
    """Why MonoLoRA cannot adapt the module `name` of `model`, None if it can."""
    module = model.get_submodule(name)
    if isinstance(module, nn.MultiheadAttention):
        return "it gives its weights to a fused function, which LoRA merges into, and no matrix equals s B sigma(A x)"
    if layer_class(module) is None:
        return (
            f"it is a {type(module).__name__}, and MonoLoRA adapts torch.nn.Linear, Embedding, Conv1d, "
            "Conv2d and Conv3d, transformers' Conv1D, and the quantised linear layers that PEFT knows"
        )
    if getattr(module, "_hf_tp_plan", None) is not None:
        return "it is sharded by tensor parallelism, and sigma needs the whole of A x; use data parallelism or FSDP"
    if (convolution := convolution_kind(module)) is not None:
        if module.padding_mode != "zeros":
            return f"it pads with padding_mode={module.padding_mode!r}, and MonoLoRA's A pads with zeros"
        if type(module).forward is not convolution.forward:
            return f"{type(module).__name__} has a forward of its own, and A is a plain convolution"
    read = weight_read(model, name)
    if read is not None and not read.called_too:
        return f"{read.method} reads its weight and never calls it, so that an adapter would not act"
    if read is not None and read.fused:
        return f"{read.method} has a path that gives its weight to a fused kernel, past the adapter"
    return _own_forward_obstacle(module)


def _own_forward_obstacle(module: nn.Module) -> str | None:
    """Say what the own forward of a linear or embedding layer does that an adapter cannot add to.

    Routers return several tensors, tables of positions look at the places of the ids and not at the ids. The forward
    is tried on a small input, with numbers in place of the weight.
    """
    kind = next((kind for kind in (nn.Linear, Conv1D, nn.Embedding) if isinstance(module, kind)), None)
    weight = module._parameters.get("weight")
    if kind is None or type(module).forward is kind.forward or type(weight) is not nn.Parameter or weight.itemsize < 2:
        return None  # a quantised layer computes what its base class does
    in_features, out_features = _get_in_out_features(module)
    assert in_features is not None
    if kind is nn.Embedding:
        ids = [i for i in range(min(in_features, 3)) if i != module.padding_idx] or [0]
        x = torch.tensor([[ids[0], ids[-1], ids[0]], [ids[-1], ids[0], ids[-1]]])
        numbers = torch.arange(in_features, dtype=weight.dtype)[:, None]  # the vector of id i is i, i, ...
    else:
        x = torch.zeros(2, 3, in_features, dtype=weight.dtype)
        numbers = torch.zeros(1, 1, dtype=weight.dtype)
    own = f"{type(module).__name__} has a forward of its own, which"
    try:
        result = _try_forward(module, x, numbers)
    except Exception as error:  # it may be anything
        return f"{own} fails on an input of shape {tuple(x.shape)} ({type(error).__name__}: {error})"
    expected = (*x.shape[:2], out_features)
    if not isinstance(result, torch.Tensor):
        return f"{own} returns a {type(result).__name__} and not a tensor"
    if tuple(result.shape) != expected:
        return f"{own} makes the shape {tuple(result.shape)} of {tuple(x.shape)}, where an adapter makes {expected}"
    if kind is nn.Embedding and any((result[x == i] != result[x == i][0]).any() for i in (ids[0], ids[-1])):
        return f"{own} gives an id other vectors at other places, as tables of positions do"
    return None


def _try_forward(module: nn.Module, x: torch.Tensor, numbers: torch.Tensor) -> Any:
    """Call `module` on x on the CPU with `numbers` as its weight; neither its state nor random numbers change."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return type(module).forward(_stand_in(module, numbers), x)


def _stand_in(module: nn.Module, numbers: torch.Tensor) -> nn.Module:
    """A copy of `module` on the CPU with `numbers` as its weight and ones as other parameters; they take no memory."""
    twin: Any = copy.copy(module)
    twin._parameters, twin._buffers, twin._modules = {}, {}, {}
    for name, parameter in module._parameters.items():
        twin._parameters[name] = None
        if parameter is not None:
            number = numbers if name == "weight" else torch.ones((), dtype=parameter.dtype)
            shape = getattr(parameter, "ds_shape", parameter.shape)  # the whole one's under ZeRO-3
            twin._parameters[name] = number.expand(shape)
    for name, buffer in module._buffers.items():
        twin._buffers[name] = None
        if buffer is not None:
            twin._buffers[name] = torch.ones_like(buffer, device="cpu") if buffer.is_meta else buffer.cpu().clone()
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _stand_in(child, torch.ones(()))
    return twin


def listed(names: Iterable[str] | str | None, most: int = 12) -> str:
    """The names in order with commas, those beyond `most` as a number."""
    if isinstance(names, str) or names is None:
        return repr(names)
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
