"""What a module computes, as text that can be hashed beside its weights.

The weights do not say which function they belong to: one set of them gives other features with token pooling than with
average pooling, and the difference is an attribute. Therefore every submodule is described by its class, the code of
that class, its hooks and all its attributes, whatever their names. What is unknown is described rather than left out:
a difference that does not matter costs one pass over the images, one that is overlooked gives wrong numbers.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import re
import sys
import types
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vision_bench import storage

# Attributes that decide nothing: those of torch itself, and those in which timm notes what it was asked for and what
# the weights come from. All that timm makes of its arguments is in other attributes, so that weights in a folder and
# in a file alone are one model.
_RECORDS = {"_model_args", "pretrained_model_args", "pretrained_cfg", "default_cfg"}
_NOT_COMPUTED = {*vars(nn.Module()), "_compiled_call_impl", "_is_torch_compile"} | _RECORDS
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def description(model: nn.Module) -> str:
    """A text that is equal for two modules if they are of equal classes, code, attributes, hooks and submodules.

    The mode, the device and the tensors that are parameters or buffers do not enter, nor do attributes named
    `..._cache`, which forward passes fill.
    """
    names = {id(part): name for name, part in model.named_modules()}
    return repr([(name, _Description(names).module(part)) for name, part in model.named_modules()])


class _Description:
    """Nested tuples that say what an attribute is; `names` are those of the submodules by their id."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names
        self.path: list[int] = []  # ids of the objects that are being described, because objects may hold each other

    def module(self, module: nn.Module) -> Any:
        attributes = {name: value for name, value in vars(module).items() if name not in _NOT_COMPUTED}
        hooks = [list(vars(module)[name].values()) for name in _HOOKS]
        return self._class(type(module)), self._attributes(attributes), self.described(hooks)

    def described(self, value: Any) -> Any:
        """Describe an object by its type and its contents, so that equal descriptions mean equal objects."""
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, range, torch.dtype)):
            return type(value).__name__, repr(value)
        if id(value) in self.path:
            return "within itself", len(self.path) - self.path.index(id(value))
        self.path.append(id(value))
        try:
            return type(value).__qualname__, self._contents(value)
        finally:
            self.path.pop()

    def _contents(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            if id(value) in self.names:
                return self.names[id(value)]
            tensors = dict(value.named_parameters()) | dict(value.named_buffers())
            return description(value), storage.fingerprint(tensors)
        if isinstance(value, torch.Tensor):
            return storage.fingerprint({"": value})
        if isinstance(value, np.ndarray):
            return str(value.dtype), self.described(value.tolist())
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if isinstance(value, torch.device):  # a model is the same on each
            return ""
        if isinstance(value, (torch.fx.Graph, torch.Graph)):
            return str(value)
        if isinstance(value, Mapping):
            return sorted((repr(self.described(key)), self.described(element)) for key, element in value.items())
        if isinstance(value, Set):
            return sorted(repr(self.described(element)) for element in value)
        if isinstance(value, (list, tuple)):
            return [self.described(element) for element in value]
        if isinstance(value, functools.partial):
            return self.described(value.func), self.described(value.args), self.described(value.keywords)
        if isinstance(value, enum.Enum):
            return value.name
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.MethodType):
            return self._function(value.__func__), self.described(value.__self__)
        if callable(value) and hasattr(value, "__qualname__"):
            return self._function(value)
        slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
        attributes = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        attributes |= getattr(value, "__dict__", {})
        # Numbers of NumPy, slices, dates, patterns and the like have no attributes; an address says nothing.
        text = "" if attributes else re.sub("0x[0-9a-f]+", "", repr(value))
        return self._class(type(value)), text, self._attributes(attributes)

    def _attributes(self, attributes: Mapping[str, Any]) -> Any:
        return [(name, self.described(attributes[name])) for name in sorted(attributes) if not name.endswith("_cache")]

    def _class(self, cls: type) -> Any:
        return [(base.__module__, base.__qualname__, _code(base)) for base in cls.__mro__]

    def _function(self, function: Callable[..., Any]) -> Any:
        name = getattr(function, "__module__", None), function.__qualname__, _code(function)
        if not isinstance(function, types.FunctionType) or not (function.__closure__ or "<" in function.__qualname__):
            return name  # there is one of that name
        cells = [getattr(cell, "cell_contents", None) for cell in function.__closure__ or ()]
        values = self.described([function.__defaults__, function.__kwdefaults__, cells])
        return name, _bytecode(function.__code__), values


def _code(code: Any) -> Any:
    """What the code of a class or function is: the version of its package, or for want of one the code itself."""
    package = (code.__module__ or "builtins").partition(".")[0]
    if package == "torch" or package in sys.stdlib_module_names:
        return ""  # computes the same in every version
    version = getattr(sys.modules.get(package), "__version__", None)
    if version is not None:
        return str(version)
    # The whole file, because a class may use its other functions, and what runs, because the file may have been edited
    # after it was imported; there is no file of what is written in a notebook.
    path = getattr(sys.modules.get(code.__module__), "__file__", None)
    text = "" if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()
    functions = [part for part in (code, *vars(code).values()) if isinstance(part, types.FunctionType)]
    return text, [_bytecode(function.__code__) for function in functions]


def _bytecode(code: types.CodeType) -> Any:
    constants = [
        _bytecode(part) if isinstance(part, types.CodeType)
        else sorted(map(repr, part)) if isinstance(part, frozenset)  # whose order is not the same in every process
        else repr(part)
        for part in code.co_consts
    ]  # fmt: skip
    return code.co_code.hex(), constants, code.co_names
