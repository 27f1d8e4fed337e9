"""Backbones of our checkpoints as models of timm: a folder that `timm.create_model("local-dir:FOLDER")` loads.

A folder of a network that timm has needs nothing of this package; that of `small_conv` or of a CIFAR stem needs
`import vision_bench.timm_models`, which registers the model `vision_bench_backbone` with timm.

    from vision_bench import models, timm_models
    from vision_bench.data import load_images

    model, training = models.load("runs/digits_ncl/model.safetensors")
    timm_models.save("runs/digits_backbone", model, load_images("digits", "train"), training)
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, save_for_hf
from torch import nn

from vision_bench.data import ImageSet
from vision_bench.models import SMALL, ContrastiveModel, ModelConfig, build_backbone
from vision_bench.training import described

TRAINING = "vision_bench_training"  # of config.json: what the weights come from
# Where register_model looks for them.
default_cfgs = generate_default_cfgs({"vision_bench_backbone": {"num_classes": 0}})


@register_model
def vision_bench_backbone(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`build_backbone` for timm: `backbone`, `stem` and `stem_padding` are those of `ModelConfig`."""
    model: nn.Module = build_model_with_cfg(_build, "vision_bench_backbone", pretrained, **kwargs)
    return model


def _build(backbone: str = SMALL, stem: str = "timm", stem_padding: int = 1, **options: Any) -> nn.Module:
    if backbone == SMALL:
        # timm passes on what every model of its own takes.
        passed = {name: options.pop(name, default) for name, default in (("num_classes", 0), ("in_chans", 3))}
        if passed != {"num_classes": 0, "in_chans": 3}:
            raise ValueError(f"{SMALL} has 3 channels and no classifier, got {passed}; use num_classes=0.")
    return build_backbone(ModelConfig(backbone, stem, stem_padding, backbone_options=options))


def save(folder: str | Path, model: ContrastiveModel, images: ImageSet, training: dict[str, Any]) -> None:
    """Write the backbone of a checkpoint as a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
        folder: must not exist, or be empty; gets `config.json` and `model.safetensors`.
        model, training: as `models.load` returns them.
        images: any split of the set it was trained on, for the mean, the deviation and the size of the images.

    Raises:
        ValueError: the folder has files, or `training` says that the images were normalised otherwise or of another
            size.
        OSError: it cannot be written.
    """
    folder, config = Path(folder), model.config
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder is {folder}, which exists and is not empty; choose another.")
    values = described(images)
    trained_on = training.get("images", values)
    changed = [f"{k} is {v}, and {trained_on[k]} in the training" for k, v in values.items() if v != trained_on[k]]
    if changed:
        raise ValueError(f"images are not as those that the model was trained on: {'; '.join(changed)}.")
    if config.backbone != SMALL and config.stem == "timm":
        architecture, arguments = config.backbone.split(".")[0], dict(config.backbone_options)
    else:
        architecture = "vision_bench_backbone"
        arguments = {"backbone": config.backbone, "stem": config.stem, "stem_padding": config.stem_padding}
        arguments |= config.backbone_options
    exported = timm.create_model(architecture, num_classes=0, **arguments)
    exported.load_state_dict(model.backbone.state_dict())
    original = getattr(model.backbone, "pretrained_cfg", {})
    pretrained_cfg = {
        "architecture": architecture,
        "tag": "vision_bench",  # these are not the weights that timm has under the name
        "num_classes": 0,
        "classifier": original.get("classifier"),
        "first_conv": original.get("first_conv"),
        "input_size": tuple(images.images.shape[1:]),
        "crop_pct": 1.0,
        "mean": tuple(images.mean),
        "std": tuple(images.std),
        # What timm says of its own weights of that name.
        **dict.fromkeys(("test_input_size", "test_crop_pct", "license", "description", "origin_url")),
        **dict.fromkeys(("paper_name", "paper_ids", "notes")),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        whole = Path(temporary) / "whole"
        save_for_hf(
            exported,
            whole,
            model_config={"pretrained_cfg": pretrained_cfg, TRAINING: {"method": config.method} | training},
            model_args=arguments,
            safe_serialization=True,
        )
        os.replace(whole, folder)
