"""MonoLoRA on the fused experts of a mixture of experts: W_e x + s B_e sigma(A_e x) for each expert e.

transformers lets the experts of all its models be computed by functions of one registry, from the same attributes:
stacked weights, what is transposed, where a bias is, how the gate is applied. Ours is one more of these functions; the
experts whose adapters act are computed by it, all others as before.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from .layer import REPLICATED, MonoLoraLayer

try:
    from transformers.integrations.moe import ExpertsInterface, _grouped_mm
except ImportError:  # an early transformers 5: its experts are refused
    ExpertsInterface = _grouped_mm = None

IMPLEMENTATION = "monolora"  # the name of our function in the registry
_INTERFACE = ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KERNEL_BYTES = 16  # the grouped product wants rows that start at multiples of this


class Routing(NamedTuple):
    """Which token and which expert each routed row is of; a row is a pair of a token and an expert that it goes to.

    The rows are sorted by expert: all S tensors below have one number a row, S = tokens times experts per token.
    """

    tokens: torch.Tensor  # (S,) int64, index of the token
    experts: torch.Tensor  # (S,) int64, index of the expert
    ends: torch.Tensor  # (experts,) int32, where the rows of each expert end
    num_tokens: int


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply each row of x by the matrix of its expert, without a loop where torch has a kernel for it.

    Args:
        x: (S, in), rows sorted by expert, of the dtype of `weight`.
        weight: (experts, in, out), also a transposed view.
        ends: (experts,) int32, where the rows of each expert end.

    Returns:
        (S, out). Where a length is no multiple of 16 bytes, it is filled up with zeros for the kernel.
    """
    if weight.dtype not in _KERNEL_DTYPES:  # float64: transformers' own loop over the experts
        result: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight, ends)
        return result
    multiple = _KERNEL_BYTES // weight.itemsize
    more_in, more_out = -weight.shape[1] % multiple, -weight.shape[2] % multiple
    if more_in:
        x = functional.pad(x, (0, more_in))
    if more_in or more_out:
        weight = functional.pad(weight, (0, more_out, 0, more_in))
    result = _grouped_mm(x, weight, ends)
    return result[:, : result.shape[1] - more_out] if more_out else result


class ExpertsLinear(nn.Module):
    """A linear map for each expert; `weight` is (experts, out, in), `bias` (experts, out) or None."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None

    def reset_parameters(self) -> None:
        """Draw the map of each expert as `nn.Linear` draws its own."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Map routed rows (S, in) to (S, out)."""
        result = grouped_linear(x, self.weight.transpose(1, 2), routing.ends)
        return result if self.bias is None else result + self.bias[routing.experts]


def project(experts: Any, parameter_name: str, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Map routed rows (S, in) to (S, out) by a stacked weight of an experts module, and its bias if there is one."""
    weight = getattr(experts, parameter_name)
    result = grouped_linear(
        x.to(weight.dtype), weight if experts.is_transposed else weight.transpose(1, 2), routing.ends
    )
    return result + getattr(experts, f"{parameter_name}_bias")[routing.experts] if experts.has_bias else result


class ExpertsProjection(nn.Module):
    """A stacked weight of an experts module as a layer of its own; the weight stays in the experts module."""

    def __init__(self, experts: nn.Module, parameter_name: str) -> None:
        super().__init__()
        self._experts = (experts,)  # in a tuple, because it is not inside this layer
        self.parameter_name = parameter_name

    @property
    def weight(self) -> torch.Tensor:
        """The stacked weight, (experts, out, in), or (experts, in, out) where the experts are transposed."""
        weight: torch.Tensor = getattr(self._experts[0], self.parameter_name)
        return weight

    def sizes(self) -> tuple[int, int, int]:
        """Number of experts, in_features, out_features; also where the weight is sharded."""
        num_experts, *shape = getattr(self.weight, "ds_shape", self.weight.shape)
        in_features, out_features = shape if self._experts[0].is_transposed else reversed(shape)
        return num_experts, in_features, out_features

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Map routed rows (S, in) to (S, out)."""
        return project(self._experts[0], self.parameter_name, x, routing)


class MonoLoraExpertsProjection(MonoLoraLayer):
    """MonoLoRA on a stacked weight: A is (experts, r, in), B (experts, out, r), and r counts for each expert."""

    def base_sizes(self) -> tuple[int, int]:
        self.num_experts, in_features, out_features = self.get_base_layer().sizes()
        return in_features, out_features

    def new_encoder(self, r: int, bias: bool) -> nn.Module:
        return ExpertsLinear(self.num_experts, self.in_features, r, bias)

    def new_decoder(self, r: int) -> nn.Module:
        return ExpertsLinear(self.num_experts, r, self.out_features, bias=False)

    def acts(self) -> bool:
        """Whether an adapter contributes to the output."""
        return not self.disable_adapters and any(name in self.monolora_encoder for name in self.active_adapters)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's product plus the updates of the active adapters, for routed rows (S, in) and their `Routing`."""
        (routing,) = args
        result = self.base_layer(x, routing)
        for name in self.active_adapters:
            if name in self.monolora_encoder and not self.disable_adapters:
                encoder: Any = self.monolora_encoder[name]
                seen = self.monolora_dropout[name](self._cast_input_dtype(x, encoder.weight.dtype))
                latents = self.monolora_activation[name](encoder(seen, routing))
                update = self.monolora_decoder[name](latents * self.scaling[name], routing)
                result = result + update.to(result.dtype)
        return result


class MonoLoraExperts(nn.Module):
    """An experts module with the layers of its adapted weights, each under the name of its parameter."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.base_layer = experts
        experts.config = _AdaptedConfig(experts.config, self)

    def adapt(self, parameter_name: str, adapter_name: str, **adapter_options: Any) -> MonoLoraExpertsProjection:
        """Add the adapter to a stacked weight; options as in `MonoLoraLayer.update_layer`."""
        layer = self.projections().get(parameter_name)
        if layer is None:
            base = ExpertsProjection(self.base_layer, parameter_name)
            layer = MonoLoraExpertsProjection(base, adapter_name, **adapter_options)
            self.add_module(parameter_name, layer)
        else:
            layer.update_layer(adapter_name, **adapter_options)
        return layer

    def projections(self) -> dict[str, MonoLoraExpertsProjection]:
        """The layers by the names of their parameters."""
        return {n: layer for n, layer in self.named_children() if isinstance(layer, MonoLoraExpertsProjection)}

    def act(self) -> bool:
        """Whether an adapter contributes to the output."""
        return any(layer.acts() for layer in self.projections().values())

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the experts compute; they call `adapted_experts_forward` if an adapter acts."""
        if getattr(self, "_is_replica", False):
            raise RuntimeError(f"MonoLoRA on fused experts does not work in nn.DataParallel, {REPLICATED}")
        result: torch.Tensor = self.base_layer(*args, **kwargs)
        return result

    def get_base_layer(self) -> nn.Module:
        """The experts module."""
        experts: nn.Module = self.base_layer
        return experts

    def unload_and_optionally_merge_module(self, **kwargs: Any) -> nn.Module:
        """The experts module as it was before; PEFT calls this to unload. Merging is refused before."""
        experts: Any = self.get_base_layer()
        experts.config = experts.config.unadapted
        return self.get_base_layer()


class _AdaptedConfig:
    """The model's config as experts with adapters see it: while one acts, it names our implementation.

    The experts look at the name at each call. The model's own config, and what is set in it later, stays as it is.
    """

    def __init__(self, unadapted: Any, adapters: MonoLoraExperts) -> None:
        self.unadapted, self.adapters = unadapted, adapters

    @property
    def _experts_implementation(self) -> Any:
        return IMPLEMENTATION if self.adapters.act() else self.unadapted._experts_implementation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "unadapted":
            raise AttributeError(name)
        return getattr(self.unadapted, name)


def adapted_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute experts with adapters; an implementation of transformers' experts interface.

    The routed rows are sorted by expert once, and each projection with its adapters multiplies them in groups. Without
    an update this is operation for operation transformers' implementation "grouped_mm".

    Args:
        self: the experts module, inside a `MonoLoraExperts`.
        hidden_states: (tokens, in).
        top_k_index: (tokens, k), the experts of each token.
        top_k_weights: (tokens, k), what their outputs are weighted with.

    Returns:
        (tokens, in), of the dtype of `hidden_states`.
    """
    layers: dict[str, MonoLoraExpertsProjection] = self.config.adapters.projections()

    def projected(name: str, rows: torch.Tensor) -> torch.Tensor:
        return layers[name](rows, routing) if name in layers else project(self, name, rows, routing)

    tokens, k = top_k_index.shape
    experts, order = torch.sort(top_k_index.reshape(-1))
    ids = torch.arange(self.num_experts, device=experts.device)
    ends = torch.searchsorted(experts, ids, right=True, out_int32=True)
    routing = Routing(order // k, experts, ends, tokens)

    rows = hidden_states[routing.tokens]
    if self.has_gate:
        rows = self._apply_gate(projected("gate_up_proj", rows))
    else:
        rows = self.act_fn(projected("up_proj", rows))
    rows = projected("down_proj", rows)
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1)[order, None]

    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return rows[places].view(tokens, k, -1).sum(1).to(hidden_states.dtype)


if ExpertsInterface is not None:
    ExpertsInterface.register(IMPLEMENTATION, adapted_experts_forward)


def experts_obstacle(module: nn.Module, parameter_name: str) -> str | None:
    """Why MonoLoRA cannot adapt a parameter of `module`; None if it is a stacked weight of experts that it can."""
    if isinstance(module, MonoLoraExperts):
        module = module.get_base_layer()
    kind = type(module).__name__
    if any(not hasattr(module, attribute) for attribute in _INTERFACE) or ExpertsInterface is None:
        return (
            f"{kind} does not come through the experts interface of transformers (`use_experts_implementation`), so "
            "that what the parameter is multiplied by is out of reach; adapt layers with `target_modules`"
        )
    stacked = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    if parameter_name not in stacked:
        return f"it is no stacked weight of the experts; {kind} has {' and '.join(stacked)}"
    if module._is_expert_parallel or getattr(module, "_hf_tp_plan", None) is not None:
        return "its experts are spread over processes, which MonoLoRA does not follow; use data parallelism or FSDP"
    weight = module._parameters.get(parameter_name)
    if weight is None or not weight.dtype.is_floating_point or weight.itemsize < 2:
        return "it is quantised or parametrised, and MonoLoRA multiplies by plain numbers; load the model unquantised"
    return None
