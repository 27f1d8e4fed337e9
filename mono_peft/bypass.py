"""Finds adapted modules that the model does not call, because it reads their weight itself: no adapter acts there.

Kernels do that (Mamba's fused scan takes the weight of `out_proj`), torch.nn.MultiheadAttention, and every
`functional.linear(x, self.proj.weight)`. The sources tell before an adapter is put in, the first pass tells for sure.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from torch import nn

from .layer import MonoLoraLayer

Path = tuple[str, ...]  # attributes from a module to one inside it; "*" is an index

_CONTAINERS = (nn.Module.forward, nn.Sequential.forward)  # forward of those that call what is inside without naming it
# What may be asked of a weight without computing with it.
_PROPERTIES = {"device", "dtype", "shape", "size", "ndim", "dim", "numel", "is_cuda", "is_meta", "requires_grad"}
_PROPERTIES |= {"is_floating_point", "element_size", "itemsize"}


class WeightRead(NamedTuple):
    """A method that computes with the weight of a module."""

    method: str  # such as "WavLMAttention.forward"
    called_too: bool  # whether other code of the model may call the module, so that its adapter acts sometimes
    fused: bool  # whether one call takes this weight and another module's, as kernels do that replace several modules


class _Mentions(NamedTuple):
    """What the forward pass of a class, with all methods that it calls, does with the modules inside."""

    reads: dict[Path, str]  # modules whose weight it computes with, and the method that does
    fused: set[Path]  # those among them whose weight goes into one call with another's
    others: set[Path] | None  # modules that it mentions otherwise, a call above all; None without the source


def weight_read(model: nn.Module, name: str) -> WeightRead | None:
    """The method of `model` that computes with the weight of its module `name` itself; None if no source shows one."""
    parts = name.split(".")
    ancestors = [model]
    for part in parts[:-1]:
        ancestors.append(ancestors[-1].get_submodule(part))
    indexed = zip(parts, ancestors, strict=True)
    path = tuple("*" if part.isdigit() or isinstance(parent, nn.ModuleDict) else part for part, parent in indexed)
    method, called_too, fused = None, True, False
    for depth, ancestor in enumerate(ancestors):
        mentions, inside = _mentions(type(ancestor)), path[depth:]  # type: ignore[arg-type]
        method = mentions.reads.get(inside, method)
        fused |= inside in mentions.fused
        if type(ancestor).forward not in _CONTAINERS:  # the last one that is none is who calls the module
            called_too = mentions.others is None or any(
                inside[: len(other)] == other or other == (*inside, "forward") for other in mentions.others
            )
    return WeightRead(method, called_too, fused) if method is not None else None


@functools.cache
def _mentions(cls: type[nn.Module]) -> _Mentions:
    reads: dict[Path, str] = {}
    fused: set[Path] = set()
    others: set[Path] = set()
    methods = ["forward"]
    for name in methods:  # grows while it is read
        for method, tree in _definitions(cls, name):
            fused |= _fused_paths(tree)
            for path, is_read in _paths(tree):
                if is_read:
                    reads.setdefault(path, method)
                else:
                    others.add(path)
                    if path[0] not in methods:
                        methods.append(path[0])
    return _Mentions(reads, fused, others if next(_definitions(cls, "forward"), None) else None)


def _definitions(cls: type, name: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Qualified name and syntax tree of the method `name`, and of those above it that it reaches by `super()`."""
    for parent in cls.__mro__:
        if name not in vars(parent) or parent is nn.Module:
            continue
        member = vars(parent)[name]
        function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", None) or member)
        if not inspect.isfunction(function):
            return
        try:
            source = textwrap.dedent(inspect.getsource(function))
            tree = ast.parse(source).body[0]
        except (OSError, SyntaxError):
            return
        if not isinstance(tree, ast.FunctionDef):
            return
        yield f"{parent.__name__}.{name}", tree
        if "super()" not in source:
            return


def _paths(tree: ast.FunctionDef) -> Iterator[tuple[Path, bool]]:
    """Every longest `self.a.b[i]...` in a method, and whether it computes with a weight; the path ends before it."""
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    for node in ast.walk(tree):
        parent = parents.get(node)
        if isinstance(parent, (ast.Attribute, ast.Subscript)) and parent.value is node:
            continue  # not the longest
        path = _path(node, tree)
        if not path or "bias" in path:
            continue
        if "weight" not in path[1:]:
            yield path, False
            continue
        end = path.index("weight", 1)
        asks = isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "isinstance"
        if not asks and not isinstance(parent, ast.Compare) and _PROPERTIES.isdisjoint(path[end + 1 : end + 2]):
            yield path[:end], True


def _fused_paths(tree: ast.FunctionDef) -> set[Path]:
    """The modules of whose weights several are arguments of one call, as they are or by a method such as `squeeze`."""
    fused: set[Path] = set()
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        weights = set()
        for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
            while isinstance(argument, ast.Call):
                argument = argument.func
            path = _path(argument, tree)
            if "weight" in path[1:]:
                weights.add(path[: path.index("weight", 1)])
        if len(weights) > 1:
            fused |= weights
    return fused


def _path(node: ast.AST, method: ast.FunctionDef) -> Path:
    """("a", "b", "*", ...) for `self.a.b[i]...`; nothing for what does not start at the method's instance."""
    parts: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        parts.append(node.attr if isinstance(node, ast.Attribute) else "*")
        node = node.value
    instance = method.args.args[0].arg if method.args.args else None
    return tuple(reversed(parts)) if isinstance(node, ast.Name) and node.id == instance else ()


@contextmanager
def warn_of_idle_layers(layers: Mapping[str, MonoLoraLayer], mode: str) -> Iterator[None]:
    """Warn of each of `layers`, by name, that is not called while this is entered, which is one forward pass.

    One that nobody read the weight of either counts only if no layer of its kind (the name without its numbers) is
    called: experts may get no token, and some models drop layers at random.

    Args:
        mode: what the pass is called in the warning.
    """
    called: set[nn.Module] = set()

    def record(module: nn.Module, inputs: object) -> None:
        called.add(module)

    with ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.register_forward_pre_hook(record))
            stack.callback(setattr, layer, "weight_is_read", None)
            layer.weight_is_read = False
        yield
        idle = {name: layer for name, layer in layers.items() if layer not in called}
        bypassed = [name for name, layer in idle.items() if layer.weight_is_read]
    kinds = {_kind(name) for name in layers.keys() - idle.keys()}
    unused = [name for name in idle if name not in bypassed and _kind(name) not in kinds]
    if bypassed:
        warnings.warn(
            f"{len(bypassed)} of {len(layers)} MonoLoRA layers did not act in the first pass {mode}: the model reads "
            f"their weight and does not call them ({_kinds(bypassed)}). Name them in `exclude_modules`, or switch off "
            "the kernel or fast path that reads them.",
            stacklevel=2,
        )
    if unused:
        warnings.warn(
            f"{len(unused)} of {len(layers)} MonoLoRA layers were not called in the first pass {mode} "
            f"({_kinds(unused)}). Unless that is because of the inputs (a part for images, and only text), their "
            "adapters never act: name them in `exclude_modules`.",
            stacklevel=2,
        )


def _kind(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _kinds(names: list[str]) -> str:
    kinds = sorted({_kind(name) for name in names})
    return ", ".join(kinds[:6]) + (f" and {len(kinds) - 6} more" if len(kinds) > 6 else "")
