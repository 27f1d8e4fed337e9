"""The networks of the vision experiments: a timm backbone, a projector, and a non-negative output.

    images (n, 3, h, w) -> backbone (n, d) -> projector d -> hidden -> ReLU -> out -> output sigma(projector)

SimCLR has no sigma, non-negative contrastive learning (NCL) has one; L2 normalisation belongs to the loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import nn

from vision_bench import fingerprints, storage

KIND = "model"
LAYERS = ("backbone", "projector", "output")
STEMS = ("timm", "cifar")
SMALL = "small_conv"


def identity(x: torch.Tensor) -> torch.Tensor:
    """x."""
    return x


def rep_relu(x: torch.Tensor) -> torch.Tensor:
    """ReLU forward, the gradient of GELU backward (straight through), so that dead dimensions can come back."""
    soft = F.gelu(x)
    return F.relu(x).detach() + (soft - soft.detach())


NON_NEGATIVE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": identity,
    "relu": F.relu,
    "rep_relu": rep_relu,
    "relu2": lambda x: F.relu(x).square(),
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a `ContrastiveModel`; its checkpoints have it in their header.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    backbone: str = "resnet18"  # any name of timm, or "small_conv" for images of 8 to 32 pixels
    stem: str = "timm"  # "cifar": 3x3 convolution of stride 1 instead of the first one, no max-pooling
    stem_padding: int = 1  # of the CIFAR stem; the official code has 2
    projector_hidden: int = 16384
    projector_out: int = 2048
    non_negative: str = "none"  # a name in NON_NEGATIVE
    backbone_options: dict[str, Any] = field(default_factory=dict)  # further arguments of timm.create_model

    def __post_init__(self) -> None:
        for name, allowed in (("stem", STEMS), ("non_negative", tuple(NON_NEGATIVE))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        if self.stem_padding < 0 or self.projector_hidden < 1 or self.projector_out < 1:
            raise ValueError(
                f"stem_padding is {self.stem_padding}, projector_hidden {self.projector_hidden}, projector_out "
                f"{self.projector_out}; the padding must be at least 0, the sizes at least 1."
            )
        if self.backbone != SMALL and not timm.is_model(self.backbone):
            near = timm.list_models(f"*{self.backbone.split('_')[0]}*")[:5]
            raise ValueError(
                f"backbone is {self.backbone!r}, which is neither {SMALL!r} nor a model of timm {timm.__version__}"
                + (f"; near it: {', '.join(near)}." if near else ".")
            )

    @property
    def method(self) -> str:
        """What pretraining with this output is called: "SimCLR" or "NCL (relu)"."""
        return "SimCLR" if self.non_negative == "none" else f"NCL ({self.non_negative})"


class Features(NamedTuple):
    """What a model makes of n images; `projector` and `output` are equal without a non-negative output."""

    backbone: torch.Tensor  # (n, d)
    projector: torch.Tensor  # (n, projector_out), before sigma
    output: torch.Tensor  # (n, projector_out), after sigma, not L2-normalised


class SmallConvNet(nn.Module):
    """Three 3x3 convolutions with batch normalisation and ReLU, two of stride 2, then the mean over all places."""

    num_features = 128
    num_classes = 0  # of the contract of timm's models

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels_in, channels_out, stride in ((3, 16, 1), (16, 32, 2), (32, self.num_features, 2)):
            layers += [
                nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(channels_out),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, h, w) -> (n, 128)."""
        return self.layers(x).mean(dim=(2, 3))


class ContrastiveModel(nn.Module):
    """Backbone, projector and non-negative output; initial weights come from torch's global generator.

    Attributes:
        config: the `ModelConfig`.
        num_features: d, the width of the backbone's output.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config)
        # num_features is not the output's width where timm's head has a hidden layer.
        width: Any = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        self.num_features = int(width)
        self.projector = projector(self.num_features, config.projector_hidden, config.projector_out)
        self.non_negative = NON_NEGATIVE[config.non_negative]

    def forward(self, images: torch.Tensor) -> Features:
        """(n, 3, h, w), normalised to the data set's mean and standard deviation -> features of n images."""
        backbone = self.backbone(images)
        projected = self.projector(backbone)
        return Features(backbone, projected, self.non_negative(projected))


def projector(d: int, hidden: int, out: int) -> nn.Sequential:
    """The network d -> hidden -> ReLU -> out between a backbone and the loss, of random weights."""
    return nn.Sequential(nn.Linear(d, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out))


def build_backbone(config: ModelConfig) -> nn.Module:
    """The backbone alone, of random weights: images (n, 3, h, w) -> (n, d), unless backbone_options ask for a head.

    Raises:
        ValueError: the stem or the options do not fit the backbone.
    """
    if config.backbone == SMALL:
        if config.stem != "timm" or config.backbone_options:
            raise ValueError(f"{SMALL} takes no backbone_options and only the stem 'timm' (its own).")
        return SmallConvNet()
    backbone = timm.create_model(config.backbone, **{"num_classes": 0} | config.backbone_options)
    if config.stem == "cifar":
        _use_cifar_stem(backbone, config)
    return backbone


def _use_cifar_stem(backbone: nn.Module, config: ModelConfig) -> None:
    first = getattr(backbone, "conv1", None)
    deep = isinstance(first, nn.Sequential)  # stem of several 3x3 convolutions
    conv = first[0] if isinstance(first, nn.Sequential) else first
    if not isinstance(conv, nn.Conv2d) or not hasattr(backbone, "maxpool"):
        raise ValueError(
            f"stem is 'cifar', but {config.backbone} has no conv1 and maxpool to replace. Use stem 'timm'; for small "
            "images give a smaller patch or image size in backbone_options where the model takes it."
        )
    new = nn.Conv2d(conv.in_channels, conv.out_channels, 3, stride=1, padding=config.stem_padding, bias=False)
    if deep:
        first[0] = new  # type: ignore[index]
    else:
        backbone.conv1 = new
    backbone.maxpool = nn.Identity()


def save(path: str | Path, model: ContrastiveModel, training: dict[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        training: what the weights come from (data, method, settings, seed), JSON-serialisable.

    Raises:
        OSError: the file cannot be written.
    """
    storage.save(path, KIND, model.state_dict(), {"model": asdict(model.config), "training": training})


def load(path: str | Path) -> tuple[ContrastiveModel, dict[str, Any]]:
    """The model of a checkpoint, in eval mode on the CPU, and what it says of its training.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of a model, or its weights do not fit the model that its header describes.
    """
    tensors, header = storage.load(path, KIND)
    unknown = set(header["model"]) - {f.name for f in fields(ModelConfig)}
    if unknown:
        raise ValueError(f"{path} sets {', '.join(sorted(unknown))}, which this version's models do not have.")
    model = ContrastiveModel(ModelConfig(**header["model"]))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model in its header: {error}") from None
    return model.eval(), header["training"]


def layers(model: nn.Module) -> tuple[str, ...]:
    """The layers whose features a model gives: all `LAYERS`, or of one that is a backbone alone the first of them."""
    return LAYERS if isinstance(_uncompiled(model), ContrastiveModel) else LAYERS[:1]


def _uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped, or `model` itself if it is not compiled."""
    return getattr(model, "_orig_mod", model)


def outputs(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute the outputs of a model for normalised images (n, 3, h, w), by layer."""
    output = model(images)
    return output._asdict() if isinstance(output, Features) else {LAYERS[0]: output}


def fingerprint(model: nn.Module) -> str:
    """Checksum of all that decides the output in eval mode: weights, buffers, and `fingerprints.description`.

    It is the same on any device, in either mode, compiled, and after saving and loading. To hash 100 million float32
    weights takes below a second of a CPU core: compute it once for a model.
    """
    model = _uncompiled(model)
    if isinstance(model, ContrastiveModel):
        kind = model.config.non_negative
    else:  # timm's say which model they are
        kind = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    # The buffers that are not saved, such as the frequencies of position embeddings, decide too.
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    described = hashlib.sha256(f"{fingerprints.description(model)} {storage.fingerprint(tensors)}".encode())
    return f"{kind}-{described.hexdigest()}"
