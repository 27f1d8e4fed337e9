"""Finetuning a pretrained model with labels: standard (CE) and non-negative tuning (NCE), section 3.2 of the paper.

    CE: cross entropy of W f(x) + b;    NCE: cross entropy of W relu(f(x)) + b        (eq. 3)

f is the pretrained network, W and b a new linear classifier; all weights that are not frozen are trained. The two
losses differ in that ReLU and in nothing else: equal seeds see equal batches, views and initial classifiers.

Accuracies are never mixed. `online_train_top1`: on the augmented training batches, in training mode, while the model
changes (what the official code logs); `train_top1`, `held_out_top1`, `validation_top1`: of the model as it is after an
epoch, in eval mode, on the images as they are. Training accuracies are against the labels that were trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import MultiStepLRScheduler
from torch import nn

from vision_bench import features, models, storage, training
from vision_bench.checks import NOT_NEGATIVE, POSITIVE, SHARE, check_counts
from vision_bench.corruptions import seed_of
from vision_bench.data import ImageSet
from vision_bench.views import SimCLRViews, check_settings

KIND = "finetuned model"
LOSSES = ("ce", "nce")
LAYERS = ("projector", "backbone")
HELD_OUT = 2  # stream of random numbers, beside those of `training`
# Crops and flips: of SimCLR's views without a change of colours.
CROPS_AND_FLIPS: dict[str, Any] = {
    "jitter_probability": 0.0,
    "greyscale_probability": 0.0,
    "blur_probability": 0.0,
}


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings that decide the finetuned weights, with the official code's defaults.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    loss: str = "ce"  # or "nce"
    layer: str = "projector"  # what is classified: the projector's output before any sigma, or the backbone's
    epochs: int = 100
    batch_size: int = 256  # images, over all processes
    optimizer: str = "momentum"  # a name of timm's; this one is SGD with a momentum of 0.9
    learning_rate: float = 1.5
    milestones: tuple[float, ...] = (0.6, 0.8)  # shares of the epochs; at each the learning rate falls to a tenth
    weight_decay: float = 0.0  # not of biases and normalisations
    dropout: float = 0.0  # of the features, after the ReLU of NCE
    held_out: float = 0.0  # share of the training images; above 0, the weights of the epoch best on it are kept
    monitor_epochs: int = 1  # so often the accuracies are measured, and held-out ones compared; at the last they are
    views: dict[str, Any] | None = field(default_factory=lambda: dict(CROPS_AND_FLIPS))  # None: images as they are
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("loss", LOSSES), ("layer", LAYERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        check_counts(epochs=self.epochs, batch_size=self.batch_size, monitor_epochs=self.monitor_epochs)
        POSITIVE.check(learning_rate=self.learning_rate)
        NOT_NEGATIVE.check(weight_decay=self.weight_decay)
        SHARE.check(dropout=self.dropout, held_out=self.held_out)
        if any(not 0 < milestone < 1 for milestone in self.milestones):
            raise ValueError(f"milestones is {self.milestones}; they are shares of the epochs, each in (0, 1).")
        check_settings(self.views or {})


class Classifier(nn.Module):
    """A pretrained network with a linear classifier.

    Args:
        model: its backbone, and its projector if `config.layer` says so, are copied. The classifier's initial weights
            come from torch's global generator.
    """

    def __init__(self, model: models.ContrastiveModel, config: FinetuneConfig, num_classes: int) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(model.backbone)
        projects = config.layer == "projector"
        self.projector = copy.deepcopy(model.projector) if projects else nn.Identity()
        self.non_negative = config.loss == "nce"
        self.dropout = nn.Dropout(config.dropout)
        width = model.config.projector_out if projects else model.num_features
        self.classifier = nn.Linear(width, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (n, 3, h, w) -> what is classified (n, d), at least 0 with NCE."""
        classified = self.projector(self.backbone(images))
        return F.relu(classified) if self.non_negative else classified

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (n, 3, h, w) -> logits (n, num_classes)."""
        return self.classifier(self.dropout(self.features(images)))


class Finetuned(NamedTuple):
    """A finetuned model and how its training went."""

    model: Classifier  # in eval mode, on the CPU
    log: list[dict[str, Any]]  # one entry an epoch; complete in the main process
    epoch: int  # whose weights the model has: the last, or the one that was best on the held-out images


def finetune(
    folder: str | Path,
    model: models.ContrastiveModel,
    config: FinetuneConfig,
    train: ImageSet,
    validation: ImageSet,
    accelerator: Accelerator | None = None,
    adapter: Mapping[str, Any] | None = None,
    **execution: Any,
) -> Finetuned:
    """Finetune a model, or continue the finetuning that `folder` holds, or return the model that it holds.

    Leaves `model.safetensors` and `log.jsonl` in the folder, and `model` as it was. Sets torch's global seed.

    Args:
        model: pretrained; parameters that do not require a gradient stay as they are. Its backbone may hold adapters.
        train: at least a batch of images that are not held out, with the labels to learn, wrong ones included.
        validation: measured after each epoch, never used for a choice.
        accelerator, execution: as in `pretrain.pretrain`.
        adapter: settings of the backbone's adapters, JSON-serialisable; a folder with others is refused.

    Raises:
        ValueError: as `pretrain.pretrain`.
        FloatingPointError: the training diverged: the loss, a weight, a feature or a score is NaN or infinite.

    Example:
        >>> train, test = load_splits("digits")
        >>> model, _ = models.load("runs/simclr/model.safetensors")
        >>> finetune("runs/nce", model, FinetuneConfig(loss="nce", epochs=5), train, test).log[-1]["validation_top1"]
    """
    launch = training.Launch.of("finetuning", folder, accelerator, execution)
    training.check_validation(train, validation)
    kept, held_out = _split(train, config)
    training.check(config, len(kept), launch.accelerator)
    identity = {
        "model": asdict(model.config),
        "weights": models.fingerprint(model),
        "adapter": dict(adapter or {}),
        "config": asdict(config),
        "data": train.fingerprint,
        "images": training.described(train),
        "validation": validation.fingerprint,
        "num_classes": train.num_classes,
        "precision": launch.accelerator.mixed_precision,
    }
    path = launch.folder / training.MODEL
    if not path.exists():
        with launch.held():
            torch.manual_seed(config.seed)
            classifier = Classifier(model, config, train.num_classes)
            _Run(launch, classifier, config, kept, held_out, validation, identity).run()
    # Of the file, whose weights may be those of an earlier epoch.
    tensors, header = storage.load(path, KIND)
    storage.refuse_another(path, header["what"], identity)
    classifier = Classifier(model, config, train.num_classes)
    classifier.load_state_dict(tensors)
    return Finetuned(classifier.eval(), training.read_log(launch.folder), header["epoch"])


def _split(train: ImageSet, config: FinetuneConfig) -> tuple[ImageSet, ImageSet | None]:
    """The images to train on and those held out, drawn without regard to labels, which may be wrong."""
    if not config.held_out:
        return train, None
    count = round(config.held_out * len(train))
    if not 0 < count < len(train):
        raise ValueError(
            f"held_out is {config.held_out} of {len(train)} images, which leaves {count} to hold out; both parts need "
            "at least one."
        )
    generator = torch.Generator().manual_seed(seed_of(config.seed, HELD_OUT))
    order = torch.randperm(len(train), generator=generator)
    return train.subset(order[count:].sort().values), train.subset(order[:count].sort().values)


class _Run(training.Training):
    """Steps and measurements of finetuning."""

    online_top1 = "online_train_top1"

    def __init__(
        self,
        launch: training.Launch,
        classifier: Classifier,
        config: FinetuneConfig,
        train: ImageSet,
        held_out: ImageSet | None,
        validation: ImageSet,
        identity: Mapping[str, Any],
    ) -> None:
        self.config, self.held_out, self.validation = config, held_out, validation
        self.classifier = classifier
        self.remedy = f"Lower learning_rate (here {config.learning_rate:g}; in recipes finetuning_learning_rate)"
        self.views = None
        if config.views is not None:
            self.views = SimCLRViews(train.images.shape[-1], train.mean, train.std, **config.views)
        self.best: dict[str, torch.Tensor] = {}
        self.best_epoch, self.best_top1 = 0, -1.0
        training.share_batch_norm(classifier, launch.accelerator)
        classifier.to(launch.accelerator.device).to(memory_format=torch.channels_last)
        optimizer = create_optimizer_v2(
            classifier, config.optimizer, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        total = config.epochs * (len(train) // config.batch_size)
        steps = [1 + round(share * total) for share in config.milestones]  # timm lowers the rate a step before each
        schedule = MultiStepLRScheduler(optimizer, decay_t=steps, decay_rate=0.1, t_in_epochs=False)
        super().__init__(launch, identity, config, train, classifier, optimizer, schedule, config.monitor_epochs)

    def step(self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> None:
        if self.views is None:
            views = features.normalise(images, self.data.mean, self.data.std)
        else:
            height, width = images.shape[-2:]
            views = self.views.apply(images, self.views.draw(len(images), height, width, generator))
        with self.accelerator.autocast():
            logits = self.module(views.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels)
        self.learn(loss, loss, logits, labels)

    def measure(self, epoch: int) -> dict[str, Any]:
        """The accuracies in eval mode; weights that are better on the held-out images than those before are kept."""
        parts = {"train": self.data, "held_out": self.held_out, "validation": self.validation}
        entry = {f"{name}_top1": accuracy(self.classifier, part) for name, part in parts.items() if part is not None}
        if entry.get("held_out_top1", -1.0) > self.best_top1:
            self.best_epoch, self.best_top1 = epoch, entry["held_out_top1"]
            self.best = {name: tensor.clone() for name, tensor in self.classifier.state_dict().items()}
        return entry

    def save_model(self) -> None:
        weights = self.best or self.classifier.state_dict()
        header = {"what": self.identity, "epoch": self.best_epoch or self.epochs}
        storage.save(self.folder / training.MODEL, KIND, weights, header)

    def more_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return self.best, {"epoch": self.best_epoch, "top1": self.best_top1}

    def set_more_state(self, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
        self.best = dict(tensors)
        self.best_epoch, self.best_top1 = header["epoch"], header["top1"]


@torch.no_grad()
def embed(classifier: Classifier, images: ImageSet, batch_size: int = 256) -> torch.Tensor:
    """Compute the features (n, d) float32, on the CPU, that `classifier` classifies, in eval mode without views.

    Raises:
        FloatingPointError: a value is NaN or infinite.
    """
    device = next(classifier.parameters()).device
    was_training = classifier.training
    classifier.eval()
    parts = []
    try:
        for start in range(0, len(images), batch_size):
            pixels = images.images[start : start + batch_size].to(device)
            classified = classifier.features(features.normalise(pixels, images.mean, images.std)).float().cpu()
            parts.append(features.check_finite(classified, "the features", start))
    finally:
        classifier.train(was_training)
    return torch.cat(parts)


@torch.no_grad()
def accuracy(classifier: Classifier, images: ImageSet) -> float:
    """Share in [0, 1] of the images, as they are, whose label `classifier` predicts in eval mode.

    Raises:
        FloatingPointError: a feature or a logit is NaN or infinite.
    """
    head = classifier.classifier
    logits = F.linear(embed(classifier, images).to(head.weight.device), head.weight, head.bias)
    features.check_finite(logits, "the logits", 0)
    return (logits.argmax(dim=1).cpu() == images.labels).float().mean().item()
