"""Which adapted layers read the residual stream, and which write to it: the stream is followed through one pass.

It starts as the token embeddings; what is added to it is in it from then on. A layer writes to the stream if its
output itself is added, and reads it if its input is the stream, or the stream behind a norm. Names and shapes tell
neither: an output of hidden size may be normalised before it is added, and o_proj may have inputs of hidden size, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .activity import in_eval_mode

STREAM = "residual stream"
_ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__")
_MULTIPLICATIONS = ("mul", "mul_", "__mul__", "__rmul__", "__imul__")
# The result holds the numbers of the first argument.
_SAME = ("to", "type", "float", "half", "bfloat16", "contiguous", "clone", "dropout", "view", "reshape")


class Stream(NamedTuple):
    """Where layers stand to the residual stream."""

    readers: set[str]  # names of the layers that read it, as a rule behind a norm
    writers: dict[str, float]  # whose output is added to it, times this number (1 but in models such as Granite)
    # The norm between the stream and the unembedding; None where the unembedding reads the stream itself.
    final_norm: nn.Module | None
    is_unembedded: bool  # whether the unembedding was seen to read the stream, through `final_norm` if there is one


class _Flow(TorchFunctionMode):
    """Follows tensors by where their numbers lie; whatever is followed is kept, so that no place is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: set[int] = set()
        self.sources: dict[int, dict[str, float]] = {}  # layers whose outputs, times a number, are summed in it
        self.normalised: dict[int, nn.Module] = {}  # the stream, behind which norm
        self.writers: dict[str, float] = {}
        self.kept: list[torch.Tensor] = []

    def place(self, tensor: torch.Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        operands = [self.place(a) for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if operands and isinstance(result, torch.Tensor):
            if name in _ADDITIONS:
                self._added(operands, self.place(result))
            elif name in _SAME:
                self._passed_on(operands[0], self.place(result), 1.0)
            elif name in _MULTIPLICATIONS and (factor := _number(args[1])) is not None:
                self._passed_on(operands[0], self.place(result), factor)
        return result

    def _added(self, operands: list[int], result: int) -> None:
        sources = {name: times for place in operands for name, times in self.sources.get(place, {}).items()}
        if any(operand in self.stream for operand in operands):
            self.stream.add(result)
            self.writers |= sources
        elif sources:
            self.sources[result] = sources

    def _passed_on(self, operand: int, result: int, factor: float) -> None:
        if operand in self.stream:
            self.stream.add(result)
        if operand in self.sources:
            self.sources[result] = {name: times * factor for name, times in self.sources[operand].items()}


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, (int, float)) else None


@torch.no_grad()
def residual_stream(model: Any, layers: Mapping[str, nn.Module], ids: torch.Tensor) -> Stream:
    """Follow the residual stream of a causal language model.

    Args:
        model: with adapters or without.
        layers: those asked for, by name.
        ids: (1, tokens) int64, a text on the model's device.
    """
    flow, readers, last = _Flow(), set[str](), []

    def embedded(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        flow.stream.add(flow.place(output))

    def normed(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(output, torch.Tensor) and flow.place(args[0]) in flow.stream:
            flow.normalised[flow.place(output)] = module

    def read(name: str, module: nn.Module, args: Any) -> None:
        place = flow.place(args[0])
        if place in flow.stream or place in flow.normalised:
            readers.add(name)

    def written(name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        flow.sources[flow.place(output)] = {name: 1.0}

    def unembedded(module: nn.Module, args: Any) -> None:
        last.append(flow.place(args[0]))

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with ExitStack() as hooks:
        hooks.enter_context(embedding.register_forward_hook(embedded))
        hooks.enter_context(head.register_forward_pre_hook(unembedded))
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                hooks.enter_context(module.register_forward_hook(normed))
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(read, name)))
            hooks.enter_context(layer.register_forward_hook(partial(written, name)))
        with in_eval_mode(model), flow:
            model(input_ids=ids, use_cache=False)
    place = last[-1] if last else None
    final_norm = flow.normalised.get(place) if place is not None else None
    return Stream(readers, flow.writers, final_norm, final_norm is not None or place in flow.stream)
