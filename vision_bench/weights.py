"""Weights in a file, fitted to a model of timm's, also where the file has other names for the same tensors.

timm's `load_checkpoint(model, file, remap=True)` maps tensors in their order too, but it goes by the number of their
values alone, so that two of equal size may change places, takes a file with more or fewer tensors than the model, and
opens pickles. Here a map is taken only if everything agrees that can be compared, and all else is refused.

    import timm
    from vision_bench import weights

    state, is_mapped = weights.fitting("lite0.safetensors", "tf_efficientnet_lite0")
    timm.create_model("tf_efficientnet_lite0", num_classes=0).load_state_dict(state)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors import SafetensorError, safe_open

ORDER = "order"  # in the metadata of a file: JSON of the names in the order of the model; safetensors sorts them
COUNTER = "num_batches_tracked"  # last word of the buffers of batch normalisation that decide nothing
SHOWN = 3  # names in an error


class Fitting(NamedTuple):
    """What a model without its classifier is to be given."""

    state: dict[str, torch.Tensor]  # whole
    is_mapped: bool  # whether the file names the tensors otherwise


def fitting(file: str | Path, architecture: str) -> Fitting:
    """The tensors of a file as the state of a model of timm's without its classifier.

    If the names are those of the model, tensors of its classifier alone may be left over. Otherwise the names are
    mapped in the order that the file's metadata has under `ORDER`: there must be as many tensors as the model has
    with or without its classifier, each with the shape of its counterpart (but for the classifier) and with the same
    last word in its name ("weight", "bias", "running_mean", ...), and a name that both have must mean itself.

    Args:
        file: safetensors.
        architecture: a name of `timm.create_model`.

    Raises:
        ValueError: the file is no whole safetensors file, or does not fit; the error lists what is missing,
            unexpected or of another shape, and where the order differs first.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} does not fit {architecture}: {error}") from None
    bare = timm.create_model(architecture, num_classes=0)
    expected = bare.state_dict()
    classifiers = bare.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    wrong = _misfits(tensors, expected, classifiers)
    if not wrong:
        return Fitting({**expected, **{name: tensors[name] for name in expected if name in tensors}}, False)
    start = f"{file} does not fit {architecture}: it {wrong}. "
    try:
        order = json.loads(metadata[ORDER])
    except (KeyError, json.JSONDecodeError):
        raise ValueError(
            f"{start}Name the model that it is of. If it is of this one under other names, write these in the order "
            f"of its tensors, as JSON, into the file's metadata under {ORDER!r}, so that they can be mapped."
        ) from None
    if sorted(order) != sorted(tensors):
        raise ValueError(f"{start}Its metadata under {ORDER!r} are not the names of its tensors.")
    given = [name for name in order if not _is_counter(name)]
    kept = {name: tensor for name, tensor in expected.items() if not _is_counter(name)}
    whole = {name: t for name, t in timm.create_model(architecture).state_dict().items() if not _is_counter(name)}
    wanted = next((state for state in (whole, kept) if len(state) == len(given)), None)
    if wanted is None:
        raise ValueError(
            f"{start}Nor can its names be mapped: it has {len(given)} tensors, and the model has {len(whole)} with "
            f"its classifier and {len(kept)} without."
        )
    for place, (name, (target, tensor)) in enumerate(zip(given, wanted.items(), strict=True)):
        same_word = name.rpartition(".")[2] == target.rpartition(".")[2]
        same_shape = tensors[name].shape == tensor.shape or target not in kept
        if not (same_word and same_shape and (name == target or name not in wanted)):
            raise ValueError(
                f"{start}Nor can its names be mapped: in their order, tensor {place} is {name} "
                f"{tuple(tensors[name].shape)} and that of the model {target} {tuple(tensor.shape)}."
            )
    mapped = {target: tensors[name] for name, target in zip(given, wanted, strict=True) if target in kept}
    return Fitting({**expected, **mapped}, True)


def _misfits(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], classifiers: tuple[str, ...]
) -> str:
    """In what the tensors of a file differ from those expected, in words; '' if they fit."""
    missing = [name for name in expected if name not in tensors and not _is_counter(name)]
    unexpected = [name for name in tensors if name not in expected and name.rpartition(".")[0] not in classifiers]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    parts = [f"lacks {len(missing)} tensors of the model ({_some(missing)})"] if missing else []
    parts += [f"has {len(unexpected)} others ({_some(unexpected)})"] if unexpected else []
    parts += [f"has {len(shapes)} of another shape ({_some(shapes)})"] if shapes else []
    return " and ".join(parts)


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == COUNTER


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
