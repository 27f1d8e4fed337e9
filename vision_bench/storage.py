"""Tensors on disk: safetensors files whose header says what they are, written whole or not at all.

The header is JSON under one key of the file's metadata. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vision_bench.runs import differences, replacing

KEY = "vision_bench"


def save(path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors with a header; a kill or a full disk leaves the file that was there before.

    Args:
        kind: what the file holds, checked by `load`.
        header: JSON-serialisable.

    Raises:
        OSError: the file cannot be written; names it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {KEY: json.dumps({"kind": kind, **header}, sort_keys=True)}
    try:
        with replacing(path) as temporary:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise OSError(f"Cannot write {path} ({error}). Is the disk full? The old file, if any, is whole.") from error


def load(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the header of a file written by `save`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole safetensors file, or of another kind.
    """
    header = read_header(path, kind)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (no mapping)


def read_header(path: str | Path, kind: str) -> dict[str, Any]:
    """The header alone; raises as `load`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); delete it and make it again.") from None
    if KEY not in metadata:
        raise ValueError(f"{path} has no header of vision_bench, so what it holds is unknown; make it again here.")
    header = json.loads(metadata[KEY])
    if header.pop("kind") != kind:
        raise ValueError(f"{path} holds a {json.loads(metadata[KEY])['kind']}; expected a {kind}.")
    return header


def has_header(path: str | Path) -> bool:
    """Whether a safetensors file was written by `save`. Raises ValueError if it is not a whole safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}).") from None


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors: equal if and only if the tensors are."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def non_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor with a value that is NaN or infinite, None if there is none."""
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point() or tensor.is_complex()]
    if not names:
        return None
    finite = torch.stack([tensors[name].detach().isfinite().all() for name in names]).tolist()
    return next((name for name, is_finite in zip(names, finite, strict=True) if not is_finite), None)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The tensors that change from step to step, to be saved beside others; `load_optimizer_state` takes them back."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{number}.{name}": t for number, values in state.items() for name, t in values.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Take over what `optimizer_state` gave; other tensors are passed over."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in without_prefix("optimizer.", tensors).items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with a prefix before their names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names have the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def refuse_another(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise ValueError that names the differences between what `path` was trained with and what is asked for now."""
    if changed := differences(saved, current, nested=True):
        raise ValueError(f"{path} is of another training ({changed}). Choose another folder, or delete it.")
