"""Models and images that are fit to be benchmarked. Whatever can be refused is refused here, before the long work."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vision_bench import features, kinds, learners, models, zoo
from vision_bench.benchmark_settings import Settings
from vision_bench.corruptions import CLEAN, InputNoise, seed_of
from vision_bench.data import ImageSet, draw_fraction, load_splits
from vision_bench.shifts import load_shifted, synthetic
from vision_bench.viewed_images import viewed

TRAIN = "train"  # the name of the pass over the training images
VIEW, VIEW_STREAM = "view", 3  # before the number of a pass over views of them, and of the random numbers of that


class Pass(NamedTuple):
    """One pass of a model over images; its features are in a folder of the cache, or will be."""

    images: ImageSet  # normalised as the model wants them
    noise: InputNoise | None  # on the images
    folder: Path
    source: features.Source

    def load(self) -> torch.Tensor:
        """The features (n, d) on the CPU."""
        return features.load(self.folder, self.source.layers[0], self.source)

    def width(self) -> int:
        """The d of features (n, d) that are in the cache."""
        return next(features.shards(self.folder, self.source.layers[0], self.source)).shape[1]


@dataclass
class Subject:
    """A model that is fit to be measured, with its passes over all images.

    Args:
        name: as the settings have it.
        random: whether its weights are drawn at random.
        pretrained: in words, on what.
        layer: of `models.LAYERS`, whose features are measured.
        preprocessing: in words, how its images are made.
        train: the pass over the training images.
        tests: the passes over test images, by the names of `Conditions.tests`.
        views: the passes over augmented views of the training images, if a kind of features needs them.
        model: None once its features are in the cache. Until then it stays in memory, because its file, read again
            later, could have become that of another model.
    """

    name: str
    random: bool
    pretrained: str
    layer: str
    preprocessing: str
    train: Pass
    tests: dict[str, Pass]
    views: list[Pass]
    model: nn.Module | None

    @property
    def passes(self) -> list[Pass]:
        """All of them that are measured, that over the training images first."""
        return [self.train, *self.tests.values()]

    @cached_property
    def id(self) -> str:
        """12 digits that follow from the weights, the layer, and all images as the model gets them."""
        return digest([asdict(part.source) for part in self.passes])

    @property
    def label(self) -> str:
        """The name, short and with what must not be overlooked."""
        path = Path(self.name.removeprefix("local-dir:"))
        name = self.name
        if path.exists():
            name = path.parent.name if path.name == "model.safetensors" else path.name
        elif "=" in name:  # MODEL=FILE
            name = f"{name.partition('=')[0]}={path.name}"
        return f"{name} (random)" if self.random else name

    @property
    def described(self) -> dict[str, Any]:
        """Settings that every row of the model has, beside its features."""
        return {
            "model": self.name,
            "pretrained": self.pretrained,
            "random_init": self.random,
            "layer": self.layer,
        }

    def extract(self, batch_size: int) -> None:
        """Compute the features that the cache lacks, and let go of the model. All processes call this.

        Raises:
            FloatingPointError: some are NaN or infinite; in every process.
        """
        model, self.model = self.model, None
        if model is None:
            return
        for images, noise, folder, source in (*self.passes, *self.views):
            features.extract(
                folder,
                model,
                images,
                source.split,
                source.layers,
                batch_size=batch_size,
                progress=True,
                noise=noise,
                checkpoint=source.checkpoint,
            )
        model.to("cpu")

    def load(self, test: str) -> torch.Tensor:
        """The features (n, d) of a test.

        Raises:
            ValueError: they have another size than those of the training images.
        """
        z, width = self.tests[test].load(), self.train.width()
        if z.shape[1] != width:
            raise ValueError(
                f"{self.name} gives {width} features of the training images and {z.shape[1]} of the test images "
                f"({test}); they must be as many."
            )
        return z

    def is_non_negative(self) -> bool:
        """Whether no feature of any image is negative, so that ReLU leaves all as they are."""
        return all(bool((part.load() >= 0).all()) for part in self.passes)


def find_subjects(settings: Settings, device: torch.device, progress: bool) -> list[Subject]:
    """The models of the settings, each tried on a few of its images.

        find_subjects(Settings(random_init=["small_conv"], output_dir="runs/bench"), torch.device("cpu"), True)

    Args:
        device: where a few images are tried, and views of images are made.
        progress: show progress bars while images are read.

    Raises:
        ValueError: a model, a corruption or a data set is not as it must be.
    """
    # Every model before any image, because to read the images may take long.
    frozen = [zoo.load(name) for name in settings.model_names]
    frozen += [zoo.load(name, random=True) for name in settings.random_init]
    for model in frozen:
        _layer(model, settings)
    sizes = [settings.image_size or model.image_size for model in frozen]
    images = {size: _load(settings, size, device, progress) for size in dict.fromkeys(sizes)}
    subjects: dict[str, Subject] = {}
    for index, size in enumerate(sizes):
        # A model is held no longer than until its features are computed, so not in the list.
        subject = _subject(frozen.pop(0), index >= len(settings.models), settings, images[size], device)
        if subject.id in subjects:
            raise ValueError(f"models has {subjects[subject.id].name} and {subject.name}: one and the same model.")
        subjects[subject.id] = subject
    return list(subjects.values())


def limited(images: ImageSet, limit: int | None) -> ImageSet:
    """About so many of the images, drawn from each class; None leaves all."""
    if limit is None or limit >= len(images):
        return images
    return images.subset(draw_fraction(images, limit / len(images), f"limit is {limit}"))


class _Images(NamedTuple):
    """The images of a benchmark at one size."""

    sets: dict[str, ImageSet]  # the training images as `TRAIN`, the test images as `CLEAN`, and each shift by its name
    whole: str  # fingerprint of the training images before a limit


def _load(settings: Settings, size: int | None, device: torch.device, progress: bool) -> _Images:
    """The images at a size in pixels; None: that of the data set."""
    reading: dict[str, Any] = {
        "skip_corrupt": settings.skip_corrupt,
        "label_column": settings.label_column,
        "progress": progress,
    }
    names = settings.dataset, settings.data_root, settings.train_split, settings.test_split, settings.test_fraction
    whole, test = load_splits(*names, image_size=size, **reading)
    train, test = (limited(images, settings.limit) for images in (whole, test))
    if train.num_classes < 2:
        raise ValueError(
            f"{settings.dataset} has images of one class, {train.class_names[0]}; a probe needs at least two."
        )
    if people := settings.read_human_labels():
        people.check(train.labels, train.num_classes)
    for share in settings.conditions.few_shots:
        draw_fraction(train, share, f"few_shots is {share:g}")
    sets = {TRAIN: train, CLEAN: test}
    for shift in filter(None, settings.conditions.shifts):
        if shift.folder:
            sets[str(shift)] = limited(load_shifted(shift.folder, train, **reading), settings.limit)
        else:
            sets[str(shift)] = synthetic(shift.name, test, shift.strength)
    if settings.heads:
        sets |= {
            f"{VIEW} {number}": viewed(train, seed_of(number, VIEW_STREAM), device)
            for number in range(settings.head_views)
        }
    return _Images(sets, whole.fingerprint)


def _overlap(pretrained: str, images: _Images) -> str:
    """Whether a model was pretrained on the training images, in words to follow `Frozen.pretrained`."""
    if zoo.FINGERPRINT not in pretrained:
        return ""
    if images.sets[TRAIN].fingerprint in pretrained:
        return " (the training images here)"
    if images.whole in pretrained:
        return " (all training images, of which those here are a part)"
    if re.search(rf"{zoo.FINGERPRINT} [0-9a-f]{{16}}$", pretrained):
        return " (of an earlier version, so that they may be the training images here)"
    # A part of the set, or the same images at another size, has a fingerprint of its own.
    return " (not the training images here, but some images may be in both)"


def _subject(frozen: zoo.Frozen, random: bool, settings: Settings, images: _Images, device: torch.device) -> Subject:
    """A model that gives features of one size for the images, or an error."""
    checkpoint, layer = models.fingerprint(frozen.model), _layer(frozen, settings)
    size = settings.image_size or frozen.image_size
    # A folder of other images is normalised as the images that the model was trained on.
    mean, std = frozen.statistics or (images.sets[TRAIN].mean, images.sets[TRAIN].std)
    sets = {name: replace(image_set, mean=mean, std=std) for name, image_set in images.sets.items()}

    def pass_over(split: str, name: str, noise: InputNoise | None) -> Pass:
        source = features.source(frozen.model, sets[name], split, [layer], noise=noise, checkpoint=checkpoint)
        words = re.sub(r"[^\w.]+", "_", f"{Path(frozen.name).name}-{split}".replace("-", "_"))
        return Pass(sets[name], noise, settings.cache / f"{words[-60:]}-{digest(asdict(source))}", source)

    train = pass_over(TRAIN, TRAIN, None)
    tests = {
        name: pass_over(f"test, {name}", str(shift or CLEAN), noise)
        for name, (shift, noise) in settings.conditions.tests().items()
    }
    views = [pass_over(name, name, None) for name in sets if name.startswith(VIEW)]
    is_missing = any(features.missing(part.folder, part.source) for part in (train, *tests.values(), *views))
    width = _tried_width(frozen, layer, sets, device) if is_missing else train.width()
    learners.check(settings.learners, width)
    has_latents = kinds.CSR in settings.heads or any(map(kinds.needs_autoencoder, settings.features))
    if settings.sae_k is not None and width is not None and settings.sae_k > width and has_latents:
        raise ValueError(
            f"sae_k is {settings.sae_k}; {frozen.name} has {width} features, and it must not exceed them."
        )
    cut = f"shorter side to {size} pixels (bicubic), square cut at the centre" if size else "size as in the data set"
    numbers = (" ".join(f"{value:.4g}" for value in values) for values in (mean, std))
    return Subject(
        frozen.name,
        random,
        frozen.pretrained + _overlap(frozen.pretrained, images),
        layer,
        "{}; mean {}, standard deviation {}".format(cut, *numbers),
        train,
        tests,
        views,
        frozen.model if is_missing else None,
    )


def _layer(frozen: zoo.Frozen, settings: Settings) -> str:
    """The layer of a model that is measured. Raises ValueError if it does not have the one asked for."""
    layers = models.layers(frozen.model)
    if settings.layer is not None and settings.layer not in layers:
        raise ValueError(f"layer is {settings.layer!r}; {frozen.name} has {', '.join(layers)}.")
    return settings.layer or layers[-1]


def _tried_width(frozen: zoo.Frozen, layer: str, images: dict[str, ImageSet], device: torch.device) -> int | None:
    """The d of features (n, d) of a few images, None if none are finite, which `Subject.extract` reports.

    Raises:
        ValueError: those of some images are not (n, d), or d is not one for all.
    """
    widths = {}
    frozen.model.to(device)
    for name, image_set in images.items():
        try:
            few = image_set.images[: min(3, len(image_set))]
            z = features.embed(frozen.model, few, image_set.mean, image_set.std, [layer], batch_size=2)[layer]
            widths[name] = z.shape[1]
        except FloatingPointError:
            continue
        except (AssertionError, RuntimeError, ValueError) as error:
            size = " x ".join(map(str, image_set.images.shape[2:]))
            raise ValueError(
                f"{frozen.name} gives no features of {name} images of {size} pixels: {error} (--image_size sets the "
                "pixels.)"
            ) from None
    frozen.model.to("cpu")  # until its features are computed
    if len(set(widths.values())) > 1:
        raise ValueError(f"{frozen.name} gives features of different sizes: {widths}; they must be of one.")
    return next(iter(widths.values()), None)


def digest(content: Any) -> str:
    """12 hexadecimal digits that follow from what can be JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
