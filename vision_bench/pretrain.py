"""Contrastive pretraining: SimCLR, and NCL, which is SimCLR with a non-negative output.

One step takes `batch_size` images over all processes, makes two views of each, and lowers the InfoNCE loss of the
L2-normalised outputs. A linear classifier on the detached backbone features is trained beside it: it moves nothing of
the model. A training that was stopped continues to the same bits (see `training`).

Accuracies are never mixed. `online_probe_train_top1`: the classifier on the training views, while it is learning;
`online_probe_validation_top1`: the same classifier on validation images; `knn_validation_top1`: nearest neighbours,
without any training, in the backbone features. (A linear probe trained afterwards on frozen features: `probe`.)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from vision_bench import features, models, storage, training
from vision_bench.checks import NOT_NEGATIVE, POSITIVE, check_counts
from vision_bench.data import ImageSet
from vision_bench.losses import activation_bonus, info_nce
from vision_bench.probe import knn_accuracy, probe_accuracy
from vision_bench.views import SimCLRViews, check_settings

MONITORED = ("online_probe_validation_top1", "knn_validation_top1")
VALIDATION = "validation_images"  # of the log: the fingerprint of those that MONITORED are of
WARMUP_START = 3e-5  # learning rate of the first step, as the official schedule


@dataclass(frozen=True)
class PretrainConfig:
    """Settings that decide the pretrained weights, with the paper's defaults for CIFAR-100.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    epochs: int = 200
    batch_size: int = 256  # images, over all processes
    optimizer: str = "lars"  # a name of timm's
    learning_rate: float = 0.4
    classifier_learning_rate: float = 0.1  # of the online probe
    weight_decay: float = 1e-4  # not of biases and normalisations, which LARS does not adapt either
    warmup_epochs: int = 10  # of the learning rate, linear and per step; then a cosine to 0
    temperature: float = 0.2
    activation_bonus: float = 0.0  # weight of - mean |z| in the loss; 1.0 in the official code for NCL
    gather_gradient: bool = True  # of the negatives of other processes; the official code does without
    views: dict[str, Any] = field(default_factory=dict)  # settings of SimCLRViews, by default the paper's for CIFAR
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(epochs=self.epochs, batch_size=self.batch_size)
        POSITIVE.check(learning_rate=self.learning_rate, temperature=self.temperature)
        NOT_NEGATIVE.check(weight_decay=self.weight_decay, activation_bonus=self.activation_bonus)
        NOT_NEGATIVE.check(classifier_learning_rate=self.classifier_learning_rate)
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}; it must be in [0, {self.epochs}), the epochs.")
        check_settings(self.views)
        if self.optimizer == "lars" and self.weight_decay == 0:
            raise ValueError(
                "weight_decay is 0, and timm's LARS adapts only what is decayed: it would be plain SGD. Give a small "
                "one, or optimizer 'sgd'."
            )


class Pretrained(NamedTuple):
    """A trained model and how its training went."""

    model: models.ContrastiveModel  # in eval mode
    log: list[dict[str, Any]]  # one entry an epoch; complete in the main process


class _Trainee(nn.Module):
    """Model and online probe as one module, so that one forward pass under DDP serves both."""

    def __init__(self, model: models.ContrastiveModel, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.classifier = nn.Linear(model.num_features, num_classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.model(images)
        return features.output, self.classifier(features.backbone.detach())


def pretrain(
    folder: str | Path,
    model_config: models.ModelConfig,
    config: PretrainConfig,
    train: ImageSet,
    validation: ImageSet | None = None,
    accelerator: Accelerator | None = None,
    monitor_epochs: int = 10,
    **execution: Any,
) -> Pretrained:
    """Train a model, or continue the training that `folder` holds, or return the model that it holds.

    Leaves `model.safetensors` (see `models.load`) and `log.jsonl` in the folder. Sets torch's global seed.

    Args:
        train: at least a batch of images, with labels: they train the online probe and nothing else.
        validation: for the accuracies of the online probe and the nearest neighbours.
        accelerator: decides devices, processes, precision ("no" or "bf16") and trackers; by default one process in
            float32 on the device that accelerate chooses.
        monitor_epochs: so often the validation accuracies are measured; at the last epoch they always are.
        execution: of `training.Execution`: checkpoint_minutes, compile_model, workers, name, progress.

    Raises:
        ValueError: fewer images than a batch, a batch size that the processes cannot share, another precision, other
            classes or another normalisation in `validation`, or a folder that holds another training or in which
            another process is training.
        FloatingPointError: the training diverged: the loss or a weight is NaN or infinite.

    Example:
        >>> train, test = load_splits("digits")
        >>> small = models.ModelConfig("small_conv", projector_hidden=64, projector_out=32)
        >>> pretrain("runs/simclr", small, PretrainConfig(epochs=3, warmup_epochs=1), train, test).log[-1]
    """
    launch = training.Launch.of("pretraining", folder, accelerator, execution)
    training.check(config, len(train), launch.accelerator)
    if validation is not None:
        training.check_validation(train, validation)
    identity = {
        "config": asdict(config),
        "data": train.fingerprint,
        "images": training.described(train),
        "num_classes": train.num_classes,
        "precision": launch.accelerator.mixed_precision,
    }
    path = launch.folder / training.MODEL
    finished = _finished(path, model_config, identity, validation)
    if finished is not None:  # reading needs no lock
        return finished
    with launch.held():
        finished = _finished(path, model_config, identity, validation)  # by a process that has just ended
        if finished is not None:
            return finished
        run = _Run(launch, model_config, config, train, validation, monitor_epochs, identity)
        run.run()
    # as a loaded model is: convolutions round otherwise in the layout of training
    run.model.to("cpu").to(memory_format=torch.contiguous_format).eval()
    if launch.accelerator.num_processes > 1:  # the statistics of batch normalisation may differ between them
        run.model, _ = models.load(path)
    return Pretrained(run.model, run.log)


def _finished(
    path: Path, model_config: models.ModelConfig, identity: Mapping[str, Any], validation: ImageSet | None
) -> Pretrained | None:
    """The model of a training that has ended, with the accuracies that are of these validation images."""
    if not path.exists():
        return None
    model, trained = models.load(path)
    if "images" not in trained:
        warnings.warn(
            f"{path} is of an older version and does not say how its images were normalised; it is taken to be with "
            f"mean {identity['images']['mean']} and deviation {identity['images']['std']}, as the images given.",
            stacklevel=3,
        )
        trained["images"] = identity["images"]
    trained["model"] = asdict(model.config)
    storage.refuse_another(path, trained, {"model": asdict(model_config), **identity})
    log = training.read_log(path.parent)
    for entry in log:
        if validation is None or entry.get(VALIDATION) != validation.fingerprint:
            for name in MONITORED:
                entry.pop(name, None)
    return Pretrained(model, log)


class _Run(training.Training):
    """Steps and measurements of pretraining."""

    online_top1 = "online_probe_train_top1"

    def __init__(
        self,
        launch: training.Launch,
        model_config: models.ModelConfig,
        config: PretrainConfig,
        train: ImageSet,
        validation: ImageSet | None,
        monitor_epochs: int,
        identity: Mapping[str, Any],
    ) -> None:
        self.config, self.validation = config, validation
        self.remedy = (
            f"Lower learning_rate (here {config.learning_rate:g}) or classifier_learning_rate "
            f"({config.classifier_learning_rate:g}), or lengthen warmup_epochs ({config.warmup_epochs})"
        )
        self.views = SimCLRViews(train.images.shape[-1], train.mean, train.std, **config.views)
        torch.manual_seed(config.seed)
        self.model = models.ContrastiveModel(model_config)
        trainee = _Trainee(self.model, train.num_classes)
        training.share_batch_norm(trainee, launch.accelerator)
        trainee.to(launch.accelerator.device).to(memory_format=torch.channels_last)
        optimizer = _optimizer(trainee, config)
        steps = len(train) // config.batch_size
        schedule = CosineLRScheduler(
            optimizer,
            t_initial=(config.epochs - config.warmup_epochs) * steps,
            warmup_t=config.warmup_epochs * steps,
            warmup_lr_init=WARMUP_START,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        identity = {"model": asdict(model_config), **identity}
        super().__init__(launch, identity, config, train, trainee, optimizer, schedule, monitor_epochs)

    def step(self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> None:
        config = self.config
        views = torch.cat(self.views(images, generator)).to(memory_format=torch.channels_last)
        labels = labels.repeat(2)
        with self.accelerator.autocast():
            output, logits = self.module(views)
        output, logits = output.float(), logits.float()
        z1, z2 = output.chunk(2)
        loss = info_nce(z1, z2, config.temperature, gather_gradient=config.gather_gradient)
        if config.activation_bonus:
            loss = loss - config.activation_bonus * activation_bonus(output)
        self.learn(loss + F.cross_entropy(logits, labels), loss, logits, labels)

    def save_model(self) -> None:
        self.model.to("cpu").eval()
        models.save(self.folder / training.MODEL, self.model, {k: v for k, v in self.identity.items() if k != "model"})

    def measure(self, epoch: int) -> dict[str, Any]:
        """The accuracies of the online probe and the nearest neighbours on the validation images, if there are any."""
        validation = self.validation
        if validation is None:
            return {}
        bank, asked = (
            features.embed(self.model, images.images, images.mean, images.std, ["backbone"])["backbone"]
            for images in (self.data, validation)
        )
        classifier: Any = self.raw.classifier
        weights, biases = classifier.weight.detach().cpu()[None], classifier.bias.detach().cpu()[None]
        online = float(probe_accuracy(weights, biases, asked, validation.labels, topk=(1,))[1][0])
        bank, k = bank.to(self.accelerator.device), min(20, len(self.data.labels))
        neighbours = knn_accuracy(bank, self.data.labels, asked, validation.labels, k)
        return {VALIDATION: validation.fingerprint, **dict(zip(MONITORED, (online, neighbours), strict=True))}


def _optimizer(trainee: _Trainee, config: PretrainConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "lars":
        options |= {"trust_coeff": 0.02, "trust_clip": True}
    optimizer = create_optimizer_v2(trainee.model, config.optimizer, **options)
    classifier = {"params": list(trainee.classifier.parameters()), "lr": config.classifier_learning_rate}
    optimizer.add_param_group(classifier | {"weight_decay": 0.0})
    return optimizer
