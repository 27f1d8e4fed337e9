"""Frozen models by name: any of timm, of the hub or in a local file, and what their weights come from.

    from vision_bench import zoo

    frozen = zoo.load("small_conv", random=True)
    print(frozen.pretrained)  # nothing: random initialisation, seed 0

Files other than safetensors are never opened, because they may run code.
"""

from __future__ import annotations

import difflib
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg, parse_model_name
from torch import nn

from vision_bench import models, storage, weights
from vision_bench.data import Statistics
from vision_bench.timm_models import TRAINING  # which also makes our own backbones known to timm

FINGERPRINT = "images of the fingerprint"  # in Frozen.pretrained where they are known
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
RANDOM_SEED = 0  # of weights that nothing was trained on


class Frozen(NamedTuple):
    """A model in eval mode and how it wants its images."""

    name: str
    model: nn.Module
    pretrained: str  # in words, what its weights come from
    # Mean and deviation of the channels that the model was trained with; None: not known, those of the data set.
    statistics: tuple[Statistics, Statistics] | None
    image_size: int | None  # pixels of a side that the model was trained at; None: that of the data set


def load(name: str, random: bool = False) -> Frozen:
    """A frozen model by name. What exists as a file or folder is never taken for anything else.

    Args:
        name: a model of timm, with or without a tag; "hf-hub:USER/NAME"; a checkpoint of ours (its file or folder); a
            folder with timm's config.json and safetensors, with or without "local-dir:"; or "MODEL=FILE.safetensors",
            weights for a model of timm.
        random: with weights drawn at random, for a model of timm or "small_conv" only.

    Raises:
        ValueError: there is no such model or file, its weights cannot be had, do not fit, or there are none; the name
            means a model of timm and a file or folder; or a weight is NaN or infinite.
    """
    if random:
        return _random(name)
    source, _, place = name.partition(":")
    if source in ("hf-hub", "hf_hub"):
        return _timm(name, f"weights of {place} on the hub")
    path = Path(place if source == "local-dir" else name)
    if path.exists():  # asked before anything in the name has a meaning: a folder may be called lr=0.1
        if name in timm.list_models() or timm.is_model_pretrained(name):
            raise ValueError(
                f"{name} is a model of timm and a file or folder here. Write ./{name} for the latter; for the former "
                "run the command in another folder."
            )
        return _local(name, path)
    architecture, _, file = name.partition("=")
    if file and not {"/", "\\", ":"} & set(architecture):
        _check_name(architecture)
        return _with_weights(name, architecture, _safetensors(Path(file), architecture))
    if source == "local-dir" or {"/", "\\"} & set(name) or path.suffix in (".safetensors", *PICKLES):
        hint = "" if source == "local-dir" else f" A model of the hub is written hf-hub:{name}."
        raise ValueError(f"there is no file or folder {path}.{hint}")
    _check_name(name)
    if not timm.is_model_pretrained(name):
        raise ValueError(_without_weights(name))
    cfg = get_pretrained_cfg(name)
    return _timm(name, f"timm's weights {cfg.architecture}.{cfg.tag}" if cfg.tag else f"timm's weights {name}")


def _random(name: str) -> Frozen:
    if name != models.SMALL:
        _check_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        model = models.build_backbone(models.ModelConfig(name))
    return _frozen(name, model, f"nothing: random initialisation, seed {RANDOM_SEED}")


def _with_weights(name: str, architecture: str, file: Path) -> Frozen:
    """A model of timm with the weights in a file, of which only the classifier may be left over."""
    state, is_mapped = weights.fitting(file, architecture)
    model = timm.create_model(architecture, num_classes=0)
    model.load_state_dict(state)
    words = " (under other names, mapped in their order)" if is_mapped else ""
    return _frozen(name, model, f"weights in {file}{words}, whatever they were trained on")


def _local(name: str, path: Path) -> Frozen:
    """A checkpoint of ours, or a folder of timm's."""
    config = path / "config.json"
    if path.is_dir() and config.is_file():
        if not (path / "model.safetensors").is_file():  # timm would open a pickle
            pickled = next((file for file in sorted(path.iterdir()) if file.suffix in PICKLES), None)
            raise ValueError(
                f"{path} has no model.safetensors; save the weights with safe_serialization=True."
                + ("" if pickled is None else _conversion(pickled, path / "model.safetensors", str(path)))
            )
        try:
            settings = json.loads(config.read_text(encoding="utf-8"))
            training = settings.get(TRAINING)
            tag = settings.get("pretrained_cfg", settings).get("tag")
        except (json.JSONDecodeError, AttributeError):
            raise ValueError(f"{config} is not a configuration of timm's; export the model again.") from None
        words = f"weights in {path}" + (f", tag {tag}" if tag else "") + ", whatever they were trained on"
        return _timm(f"local-dir:{path}", _training(training) if training else words, name=name)
    file = _safetensors(path / "model.safetensors" if path.is_dir() else path)
    if not storage.has_header(file):
        raise ValueError(
            f"{file} has weights but not which model they are of. Write MODEL={file} with a name of timm's, or give "
            "a folder with timm's config.json (timm.models.save_for_hf)."
        )
    model, training = models.load(file)
    images = training.get("images")
    statistics, image_size = None, None
    if images is None:
        warnings.warn(
            f"{file} is of an older version and does not say with which mean and deviation its images were "
            "normalised; those of the data set are taken, which may be others.",
            stacklevel=4,
        )
    else:
        height, width = images["image_size"]
        statistics, image_size = (tuple(images["mean"]), tuple(images["std"])), (height if height == width else None)
    words = _training({"method": model.config.method} | training)
    return _finite(Frozen(name, model, words, statistics, image_size))


def _training(training: dict[str, Any]) -> str:
    """The header of a checkpoint in words."""
    config = training.get("config", {})
    parts = [str(training["method"])] if "method" in training else []
    parts += [f"{config['epochs']} epochs"] if "epochs" in config else []
    parts += [f"seed {config['seed']}"] if "seed" in config else []
    if "data" in training:
        parts.append(f"without labels on {FINGERPRINT} {training['data']}")
    return "self-supervised, " + (", ".join(parts) or "settings unknown")


def _timm(creates: str, pretrained: str, name: str | None = None) -> Frozen:
    """Create the model `creates` by `timm.create_model`, with its weights."""
    name = name or creates
    try:
        # With its classifier, because timm lets any tensor be missing where the number of classes is another.
        model = timm.create_model(creates, pretrained=True)
        if model.num_classes:
            model.reset_classifier(0)
    except (OSError, AssertionError) as error:  # of the hub's and the network's errors
        if creates.startswith("local-dir:"):
            raise ValueError(f"{name} cannot be read ({error}).") from error
        raise ValueError(
            f"the weights of {name} cannot be had ({_short(error)}). Offline: fetch them where there is a network "
            f"(timm.create_model({creates!r}, pretrained=True)) and take along the cache, the folder that HF_HOME "
            "names, or a folder written with timm.models.save_for_hf(..., safe_serialization=True), and give its path "
            "instead of the name."
        ) from error
    except (RuntimeError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{name} cannot be built with its weights: {_short(error)}") from error
    return _frozen(name, model, pretrained)


def _frozen(name: str, model: nn.Module, pretrained: str) -> Frozen:
    """A model of timm's, whose configuration says how its images are made, or small_conv, which has none."""
    if not getattr(model, "pretrained_cfg", None):
        return _finite(Frozen(name, model.eval(), pretrained, None, None))
    images = resolve_model_data_config(model)
    statistics = tuple(images["mean"]), tuple(images["std"])
    return _finite(Frozen(name, model.eval(), pretrained, statistics, int(images["input_size"][-1])))


def _finite(frozen: Frozen) -> Frozen:
    if tensor := storage.non_finite(frozen.model.state_dict()):
        raise ValueError(
            f"{frozen.name} has NaN or infinite weights, first in {tensor}: nothing can be measured on it."
        )
    return frozen


def _safetensors(path: Path, architecture: str = "MODEL") -> Path:
    """The path, if it is of a file that may be opened."""
    if path.suffix != ".safetensors":
        converted = path.with_suffix(".safetensors")
        raise ValueError(
            f"{path} is not a .safetensors file, and others are not opened: they may run code."
            + (_conversion(path, converted, f"{architecture}={converted}") if path.suffix in PICKLES else "")
        )
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    return path


def _conversion(pickled: Path, converted: Path, name: str) -> str:
    """The lines that turn a pickled file of weights into one that is opened, to follow an error."""
    return (
        f" Two lines of Python convert {pickled} without running code in it; name the model as {name} then. Where the "
        "weights lie deeper in the file, write a key such as ['state_dict'] behind torch.load(...).\n"
        "import json, torch, safetensors.torch\n"
        "safetensors.torch.save_file(tensors := {name: tensor.clone(memory_format=torch.contiguous_format) for name, "
        f"tensor in torch.load({str(pickled)!r}, map_location='cpu', weights_only=True).items()}}, "
        f"{str(converted)!r}, {{{weights.ORDER!r}: json.dumps(list(tensors))}})"
    )


def _check_name(name: str) -> None:
    """Raise ValueError for what timm does not have, with near names."""
    if name == models.SMALL:
        raise ValueError(_without_weights(name))
    try:
        architecture, tag = parse_model_name(name)[1].partition(".")[::2]
    except ValueError as error:
        raise ValueError(f"{name!r} is no name of a model: {error}") from None
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.5)
        near = near or timm.list_models(f"*{architecture[:4]}*")[:5]
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r}"
            + (f"; near it: {', '.join(near)}." if near else "; timm.list_models() has the names.")
        )
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise ValueError(f"timm has no weights {name!r}; it has {', '.join(tags) or 'none'} for {architecture}.")


def _without_weights(name: str) -> str:
    return (
        f"there are no pretrained weights of {name!r}. Give a checkpoint instead, or ask for its random "
        f"initialisation: --random_init {name}."
    )


def _short(error: BaseException) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split())[:300]
