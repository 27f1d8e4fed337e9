"""Robustness and monosemanticity of frozen models: features once, then all probes and all tests on them.

Training images give features, as they are (`raw`), L2-normalised (`unit`), after ReLU (`relu`), or as latents of a
top-k sparse autoencoder of the normalised ones (`sae`). Probes learn from them with a share of wrong labels
(`label_noise`) of a share of the images (`few_shots`), and are tested on test images with noise and shifts. Every
process of a launch computes its share of the features, then takes its share of the (model, kind of features) pairs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from vision_bench import features, models, sae, zoo
from vision_bench.corruptions import Grid, InputNoise, flip_labels, parse
from vision_bench.data import ImageSet, load_splits, stratified_fraction
from vision_bench.metrics import MEASURED, semantic_consistency
from vision_bench.probe import NORM, TRAINING, Probes, fit_linear_probes, probe_accuracy, training_accuracy
from vision_bench.runs import CONFIG, DIVERGED, Run, device_name, locked
from vision_bench.shifts import load_shifted, synthetic

RECIPE = "vision_bench"
KINDS = ("raw", "unit", "relu", "sae")
ACCURACY = "offline_probe_top1"
SAME = "equals_raw"  # the metric of the row that stands for a kind of features which is not measured again
SAE_SEED = 0
PROBE_BATCH = 256  # images, or all where there are fewer


@dataclass(frozen=True)
class Settings:
    """A benchmark.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    models: Sequence[str]  # see `zoo.load`
    output_dir: str
    random_init: Sequence[str] = ()  # models of timm, or small_conv, with random weights
    dataset: str = "digits"  # see `data.load_splits`, also for the next six
    data_root: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    test_fraction: float | None = None
    skip_corrupt: bool = False
    label_column: str | None = None
    image_size: int | None = None  # pixels; None: what a model of timm was trained at, else the data set's
    limit: int | None = None  # about so many images of the training and of the test set, drawn from each class
    corruptions: Sequence[str] = ("label_noise", "gaussian", "few_shots")  # see `corruptions.parse`
    features: Sequence[str] = KINDS
    layer: str | None = None  # of models.layers; None: the last one of each model
    seeds: Sequence[int] = (0, 1, 2, 3, 4)  # of label noise, few shots and probes
    sae_k: int | None = None  # active latents of as many as the features have dimensions; None: an eighth
    sae_epochs: int = 50
    probe_epochs: int = 50
    standardize: bool = False  # each feature before probing
    batch_size: int = 256  # of the forward passes
    cache_dir: str | None = None  # of features and autoencoders; None: in output_dir
    resume: bool = False

    def __post_init__(self) -> None:
        if not self.models and not self.random_init:
            raise ValueError("models is empty; name at least one, or give --random_init NAME.")
        for name in ("models", "random_init", "seeds", "features"):
            values = list(getattr(self, name))
            if len(set(values)) < len(values):
                raise ValueError(f"{name} is {values}; each may stand there once.")
        unknown = [kind for kind in self.features if kind not in KINDS]
        if unknown or not self.features:
            raise ValueError(f"features has {unknown or 'nothing'}; it must be of {', '.join(KINDS)}.")
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"seeds is {list(self.seeds)}; it takes integers of at least 0.")
        if self.layer is not None and self.layer not in models.LAYERS:
            raise ValueError(f"layer is {self.layer!r}; it must be one of {', '.join(models.LAYERS)}.")
        for name in ("image_size", "limit", "sae_k", "sae_epochs", "probe_epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")

        if self.cache.exists() and not self.cache.is_dir():
            raise ValueError(f"cache_dir is {self.cache}, which is a file; name a folder.")

    @property
    def cache(self) -> Path:
        """The folder of features and autoencoders."""
        return Path(self.cache_dir or Path(self.output_dir) / "cache")

    def of_results(self) -> dict[str, Any]:
        """What must be equal in all rows of a folder, which may hold several models and kinds of features."""
        left_out = {
            "models",
            "random_init",
            "features",
            "output_dir",
            "data_root",
            "cache_dir",
            "batch_size",
            "resume",
        }
        return {k: v for k, v in asdict(self).items() if k not in left_out} | {"probe_norm": NORM}


class Features(NamedTuple):
    """Where features are, and of what."""

    folder: Path
    source: features.Source
    labels: torch.Tensor


class Subject(NamedTuple):
    """A model that was found fit to be measured."""

    name: str  # as it was given
    random: bool
    pretrained: str  # in words, on what
    layer: str
    image_size: tuple[int, int]  # pixels
    preprocessing: str  # in words, how its images are made
    train: Features
    tests: dict[str, Features]  # by the names of Grid.tests
    num_classes: int
    id: str  # follows from the weights, the layer, and all images as the model gets them

    @property
    def label(self) -> str:
        """The name, short and with what must not be overlooked."""
        path = Path(self.name.removeprefix("local-dir:"))
        name = self.name
        if path.exists():
            name = path.parent.name if path.name == "model.safetensors" else path.name
        return f"{name} (random)" if self.random else name


class _Data:
    """The images of the settings at one size after another."""

    def __init__(self, settings: Settings, sweep: Grid, progress: bool) -> None:
        self.settings, self.sweep, self.progress = settings, sweep, progress
        self._loaded: dict[int | None, dict[str, ImageSet]] = {}
        self._whole: dict[int | None, str] = {}  # fingerprints of all training images

    def at(self, size: int | None) -> dict[str, ImageSet]:
        """The training images as "train", the test images as "clean", and each shift by its name."""
        if size not in self._loaded:
            self._loaded[size] = self._load(size)
        return self._loaded[size]

    def overlap(self, frozen: zoo.Frozen) -> str:
        """Whether a model was pretrained on the training images, in words to follow `Frozen.pretrained`."""
        size = self.settings.image_size or frozen.image_size
        if zoo.FINGERPRINT not in frozen.pretrained:
            return ""
        if self.at(size)["train"].fingerprint in frozen.pretrained:
            return " (the training images here)"
        if self._whole[size] in frozen.pretrained:
            return " (all training images, of which those here are a part)"
        if re.search(rf"{zoo.FINGERPRINT} [0-9a-f]{{16}}$", frozen.pretrained):
            return " (of an earlier version, so that they may be the training images here)"
        # A part of the set, or the same images at another size, has a fingerprint of its own.
        return " (not the training images here, but some images may be in both)"

    def _load(self, size: int | None) -> dict[str, ImageSet]:
        settings = self.settings
        train, test = load_splits(
            settings.dataset,
            settings.data_root,
            settings.train_split,
            settings.test_split,
            settings.test_fraction,
            image_size=size,
            skip_corrupt=settings.skip_corrupt,
            label_column=settings.label_column,
            progress=self.progress,
        )
        self._whole[size] = train.fingerprint
        train, test = (_limited(images, settings.limit) for images in (train, test))
        if train.num_classes < 2:
            raise ValueError(
                f"{settings.dataset} has images of one class, {train.class_names[0]}; a probe needs at least two."
            )
        for rate in self.sweep.few_shots:
            _drawn(train, rate, f"few_shots is {rate:g}")
        sets = {"train": train, "clean": test}
        for shift in self.sweep.shifts:
            if shift is not None and shift.folder:
                shifted = load_shifted(
                    shift.folder,
                    train,
                    skip_corrupt=settings.skip_corrupt,
                    label_column=settings.label_column,
                    progress=self.progress,
                )
                sets[str(shift)] = _limited(shifted, settings.limit)
            elif shift is not None:
                sets[str(shift)] = synthetic(shift.name, test, shift.strength)
        return sets


def _limited(images: ImageSet, limit: int | None) -> ImageSet:
    if limit is None or limit >= len(images):
        return images
    return images.subset(_drawn(images, limit / len(images), f"limit is {limit}"))


def _drawn(images: ImageSet, fraction: float, words: str) -> torch.Tensor:
    """Indices of a share of each class. Raises ValueError, which begins with `words`, if a class is left with none."""
    try:
        return stratified_fraction(images.labels, fraction, torch.Generator().manual_seed(0), images.class_names)
    except ValueError as error:
        raise ValueError(f"{words} of {len(images)} images: {error}") from None


def run(settings: Settings) -> tuple[list[Subject], list[dict[str, Any]]]:
    """Measure what the output folder has no rows of; every process of a launch calls this.

    Returns:
        The models, and all rows of the folder.

    Raises:
        ValueError: a model, a corruption, a data set or the folder is not as it must be; before long work.
        OSError: a file cannot be written.
    """
    sweep = parse(settings.corruptions)
    # One process may train long while others wait for its rows.
    accelerator = Accelerator(
        # Said so, because several processes without a GPU would otherwise not know of each other.
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    main = accelerator.is_main_process
    results = _begin(settings, main)
    # Every model before any image: to read the images may take long.
    loaded = [
        (zoo.load(name, random), random)
        for random, names in ((False, settings.models), (True, settings.random_init))
        for name in names
    ]
    for frozen, _ in loaded:
        _layer(frozen, settings)
    data = _Data(settings, sweep, main)
    checked = [_check(*loaded.pop(0), settings, sweep, data, accelerator.device) for _ in range(len(loaded))]
    subjects = [subject for subject, _ in checked]
    to_extract = {subject.id: frozen for subject, frozen in checked if frozen is not None}
    del checked  # a model is not held longer than until its features are computed
    by_id: dict[str, Subject] = {}
    for subject in subjects:
        if by_id.setdefault(subject.id, subject) is not subject:
            raise ValueError(f"models has {by_id[subject.id].name} and {subject.name}: one and the same model.")
    accelerator.wait_for_everyone()  # all have read what there is
    results.bind()
    if main:
        for subject in subjects:
            print(
                f"{subject.label}: {subject.layer} at {subject.image_size[0]} x {subject.image_size[1]} pixels, "
                f"pretrained: {subject.pretrained}"
            )
    lacking = {
        subject.id: [k for k in settings.features if not _complete(results.rows, subject, k, settings, sweep)]
        for subject in subjects
    }
    _drop_incomplete(results, lacking)
    units = []
    for subject in subjects:
        kinds = lacking[subject.id]
        if not kinds:
            continue
        try:
            if subject.id in to_extract:
                _extract(subject, to_extract.pop(subject.id), settings, sweep, data)
            units += [(subject, kind) for kind in kinds]
        except FloatingPointError as error:
            diverged = [_diverged(results, subject, kind, str(error), accelerator.device) for kind in kinds]
            results.add_rows(diverged)
    processes = accelerator.num_processes
    for first in tqdm(range(0, len(units), processes), desc="kinds of features", disable=not main or not units):
        made: list[dict[str, Any]] = []
        if first + accelerator.process_index < len(units):
            subject, kind = units[first + accelerator.process_index]
            try:
                made = _measure(results, subject, kind, settings, sweep, accelerator.device, main)
            except (FloatingPointError, sae.NoVariance) as error:
                made = [_diverged(results, subject, kind, str(error), accelerator.device)]
        results.add_rows(gather_object(made))
    return subjects, results.rows


def _begin(settings: Settings, is_main: bool) -> Run:
    """The rows of the folder, if it may be used."""
    results = Run(settings.output_dir, RECIPE, settings.of_results(), is_main)
    if (results.folder / CONFIG).exists() and not settings.resume:
        raise ValueError(
            f"{results.folder} holds a benchmark already. Give --resume to continue it, also with more models "
            "or features, or choose another --output_dir (with its cache as --cache_dir, features are not computed "
            "again)."
        )
    return results


def _check(
    frozen: zoo.Frozen, random: bool, settings: Settings, sweep: Grid, data: _Data, device: torch.device
) -> tuple[Subject, zoo.Frozen | None]:
    """A model that gives features of one size for the images, or an error.

    Where the cache lacks features, the model stays in memory: read again later, its file could have become another.
    """
    checkpoint = models.fingerprint(frozen.model)
    layer = _layer(frozen, settings)
    sets = _sets(frozen, settings, data)
    cache = settings.cache
    found = {
        test: _features(
            cache, frozen, checkpoint, layer, sets[of], test if test == "train" else f"test, {test}", noise
        )
        for test, of, noise in _passes(sweep)
    }
    train = found["train"]
    is_missing = any(features.missing(one.folder, one.source) for one in found.values())
    if is_missing:
        width = _check_features(frozen, layer, sets, device)
    else:
        width = next(features.shards(train.folder, layer, train.source)).shape[1]
    if settings.sae_k is not None and width is not None and settings.sae_k > width and "sae" in settings.features:
        raise ValueError(
            f"sae_k is {settings.sae_k}; {frozen.name} has {width} features, and it must not exceed them."
        )
    del found["train"]
    height, width = sets["train"].images.shape[2:]
    pretrained = frozen.pretrained + data.overlap(frozen)
    subject = Subject(
        frozen.name, random, pretrained, layer, (height, width), _preprocessing(frozen, settings, sets["train"]),
        train, found, sets["train"].num_classes,
        _digest([asdict(one.source) for one in (train, *found.values())]),
    )  # fmt: skip
    return subject, frozen if is_missing else None


def _layer(frozen: zoo.Frozen, settings: Settings) -> str:
    """The layer of a model that is measured. Raises ValueError if it does not have the one asked for."""
    layers = models.layers(frozen.model)
    if settings.layer is not None and settings.layer not in layers:
        raise ValueError(f"layer is {settings.layer!r}; {frozen.name} has {', '.join(layers)}.")
    return settings.layer or layers[-1]


def _passes(sweep: Grid) -> list[tuple[str, str, InputNoise | None]]:
    """Every pass over images: its name, the set of `_Data.at`, and the noise."""
    tests = ((test, str(shift or "clean"), noise) for test, (shift, noise) in sweep.tests().items())
    return [("train", "train", None), *tests]


def _sets(frozen: zoo.Frozen, settings: Settings, data: _Data) -> dict[str, ImageSet]:
    """The images as a model wants them."""
    sets = data.at(settings.image_size or frozen.image_size)
    if frozen.statistics is None:
        # A folder of other images is normalised as the images that the model was trained on.
        mean, std = sets["train"].mean, sets["train"].std
    else:
        mean, std = frozen.statistics
    return {name: replace(images, mean=mean, std=std) for name, images in sets.items()}


def _preprocessing(frozen: zoo.Frozen, settings: Settings, images: ImageSet) -> str:
    """How the images of a model are made, in words."""
    size = settings.image_size or frozen.image_size
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (images.mean, images.std))
    cut = f"shorter side to {size} pixels (bicubic), square cut at the centre" if size else "size as in the data set"
    return f"{cut}; mean {mean}, standard deviation {std}"


def _features(
    cache: Path,
    frozen: zoo.Frozen,
    checkpoint: str,
    layer: str,
    images: ImageSet,
    split: str,
    noise: InputNoise | None,
) -> Features:
    of = features.source(frozen.model, images, split, [layer], noise=noise, checkpoint=checkpoint)
    words = re.sub(r"[^\w.]+", "_", f"{Path(frozen.name).name}-{split}".replace("-", "_"))
    return Features(cache / f"{words[-60:]}-{_digest(asdict(of))}", of, images.labels)


def _digest(of: Any) -> str:
    """12 hexadecimal digits that follow from what can be JSON."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]


def _check_features(frozen: zoo.Frozen, layer: str, sets: dict[str, ImageSet], device: torch.device) -> int | None:
    """The d of features (n, d), None if none are finite, which `_extract` reports.

    Raises:
        ValueError: those of some images are not (n, d), or d is not one for all.
    """
    widths = {}
    frozen.model.to(device)
    for name, images in sets.items():
        try:
            few = images.images[: min(3, len(images))]
            made = features.embed(frozen.model, few, images.mean, images.std, [layer], batch_size=2)
        except FloatingPointError:
            continue
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{frozen.name} gives no features of {name} images of {' x '.join(map(str, images.images.shape[2:]))} "
                f"pixels: {error} (--image_size sets the pixels.)"
            ) from None
        widths[name] = made[layer].shape[1]
    frozen.model.to("cpu")  # until its features are computed
    if len(set(widths.values())) > 1:
        raise ValueError(f"{frozen.name} gives features of different sizes: {widths}; they must be of one.")
    return next(iter(widths.values()), None)


def _extract(subject: Subject, frozen: zoo.Frozen, settings: Settings, sweep: Grid, data: _Data) -> None:
    """Compute the features that the cache lacks. Raises FloatingPointError in every process if some are not finite."""
    wanted = {"train": subject.train, **subject.tests}
    sets = _sets(frozen, settings, data)
    for name, of, noise in _passes(sweep):
        one = wanted[name]
        features.extract(
            one.folder,
            frozen.model,
            sets[of],
            one.source.split,
            [subject.layer],
            batch_size=settings.batch_size,
            progress=True,
            noise=noise,
            checkpoint=one.source.checkpoint,
        )
    frozen.model.to("cpu")


def _diverged(results: Run, subject: Subject, kind: str, reason: str, device: torch.device) -> dict[str, Any]:
    """The row that marks a kind of features of a model of which nothing can be measured."""
    return results.row(
        DIVERGED,
        1.0,
        n=len(subject.train.labels),
        seed=None,
        seconds=0.0,
        device=device_name(device),
        model=subject.name,
        pretrained=subject.pretrained,
        random_init=subject.random,
        layer=subject.layer,
        features=kind,
        features_id=subject.id,
        reason=reason,
    )


def _complete(done: list[dict[str, Any]], subject: Subject, kind: str, settings: Settings, sweep: Grid) -> bool:
    """Whether there is every row of a kind of features of a model; they are written together."""
    there = [row for row in done if row["config"]["features_id"] == subject.id and row["config"]["features"] == kind]
    if any(row["metric"] == DIVERGED for row in there):
        return True
    if kind == "relu" and "raw" in settings.features and any(row["metric"] == SAME for row in there):
        return True
    tests = len(sweep.tests())
    probes = len(sweep.label_noise) * len(sweep.few_shots) * len(settings.seeds)
    expected = tests * (probes + len(MEASURED)) + len(TRAINING) * probes + (len(sae.QUALITY) if kind == "sae" else 0)
    return sum(row["metric"] != SAME for row in there) == expected


def _drop_incomplete(results: Run, lacking: dict[str, list[str]]) -> None:
    """Take away the rows of kinds of features, by model, that are measured anew: a full disk may have cut them short.

    Beside the new rows they would count twice, and the intervals would be too narrow.
    """
    kept = [
        row
        for row in results.rows
        if row["metric"] == SAME or row["config"]["features"] not in lacking.get(row["config"]["features_id"], ())
    ]
    if len(kept) < len(results.rows):
        results.replace(kept)


def _measure(
    results: Run, subject: Subject, kind: str, settings: Settings, sweep: Grid, device: torch.device, progress: bool
) -> list[dict[str, Any]]:
    """All rows of one kind of features of one model; a single one where `relu` equals `raw`, which is measured."""
    start = time.monotonic()
    raw = _load(subject.train, subject)
    common = {
        "model": subject.name,
        "pretrained": subject.pretrained,
        "random_init": subject.random,
        "layer": subject.layer,
        "image_size": list(subject.image_size),
        "preprocessing": subject.preprocessing,
        "dimensions": raw.shape[1],
        "training_images": len(raw),
        "features": kind,
        "features_id": subject.id,
    }
    found: list[tuple[str, float | None, int | None, int, dict[str, Any]]] = []  # metric, value, seed, n, arm
    if kind == "relu" and "raw" in settings.features and _is_non_negative(subject):
        found.append((SAME, 1.0, None, len(raw), {}))
    else:
        encoder = _autoencoder(subject, raw, settings, device, progress) if kind == "sae" else None
        cells, probes, training = _probes(subject, _of_kind(raw, kind, encoder), settings, sweep, device, progress)
        for (shots, rate, seed), (images, *values) in zip(cells, training, strict=True):
            arm = {"few_shots": shots, "label_noise": rate}
            found += [(name, v, seed, images, arm) for name, v in zip(TRAINING, values, strict=True)]
        for test, one in subject.tests.items():
            given = _load(one, subject)
            if given.shape[1] != raw.shape[1]:
                raise ValueError(
                    f"{subject.name} gives {raw.shape[1]} features of the training images and {given.shape[1]} of "
                    f"the test images ({test}); they must be as many."
                )
            if encoder is not None and test == "clean":
                quality = sae.evaluate(encoder, F.normalize(given))
                found += [(name, v, None, len(given), {}) for name, v in zip(sae.QUALITY, quality, strict=True)]
            z = _of_kind(given, kind, encoder)
            accuracy = probe_accuracy(*probes, z, one.labels, topk=(1,))[1].tolist()
            for (shots, rate, seed), value in zip(cells, accuracy, strict=True):
                found.append((ACCURACY, value, seed, len(z), {"test": test, "few_shots": shots, "label_noise": rate}))
            what = semantic_consistency(z, one.labels).summary
            found += [(name, v, None, len(z), {"test": test}) for name, v in what.items()]
    seconds = time.monotonic() - start
    return [
        results.row(metric, value, n=n, seed=seed, seconds=seconds, device=device_name(device), **common, **arm)
        for metric, value, seed, n, arm in found
    ]


def _load(one: Features, subject: Subject) -> torch.Tensor:
    return features.load(one.folder, subject.layer, one.source)


def _is_non_negative(subject: Subject) -> bool:
    """Whether no feature of any image is negative, so that ReLU leaves all as they are."""
    return all(bool((_load(one, subject) >= 0).all()) for one in (subject.train, *subject.tests.values()))


def _autoencoder(
    subject: Subject, raw: torch.Tensor, settings: Settings, device: torch.device, progress: bool
) -> sae.TopKAutoencoder:
    """Trained on the L2-normalised training features, without labels; continued or taken from the cache."""
    directions = F.normalize(raw[raw.any(dim=1)])  # a row of zeros has none
    if not len(directions):
        raise sae.NoVariance("all training features are 0")
    of = subject.train.folder
    k = settings.sae_k or max(1, round(raw.shape[1] / 8))
    checkpoint_dir = of.parent / f"sae-{of.name.rpartition('-')[2]}-k{k}-epochs{settings.sae_epochs}"
    with locked(checkpoint_dir, timeout=-1):  # Another run with this cache may be training the same autoencoder.
        return sae.fit(
            directions,
            raw.shape[1],
            k,
            epochs=settings.sae_epochs,
            batch_size=min(256, len(directions)),
            seed=SAE_SEED,
            device=device,
            checkpoint_dir=checkpoint_dir,
            progress=progress,
        ).autoencoder


@torch.no_grad()
def _of_kind(raw: torch.Tensor, kind: str, encoder: sae.TopKAutoencoder | None) -> torch.Tensor:
    """Features (n, d) of a kind, on the CPU."""
    if encoder is not None:
        return sae.normalised_latents(encoder, raw)
    return F.normalize(raw) if kind == "unit" else F.relu(raw) if kind == "relu" else raw


def _probes(
    subject: Subject, train: torch.Tensor, settings: Settings, sweep: Grid, device: torch.device, progress: bool
) -> tuple[list[tuple[float, float, int]], Probes, list[tuple[int, float, float]]]:
    """A probe for every (share of the images, share of wrong labels, seed), trained in one pass for each draw.

    Also gives, for each probe, its number of training images and the two values of `training_accuracy`.
    """
    cells, fitted, training = list[tuple[float, float, int]](), list[Probes](), list[tuple[int, float, float]]()
    labels = subject.train.labels
    steps = settings.probe_epochs * (len(labels) // min(PROBE_BATCH, len(labels)))
    for shots in sweep.few_shots:
        # All seeds see all images, or each its own draw of them.
        for seeds in [list(settings.seeds)] if shots == 1 else [[seed] for seed in settings.seeds]:
            drawn = stratified_fraction(labels, shots, torch.Generator().manual_seed(seeds[0]))
            batch = min(PROBE_BATCH, len(drawn))
            wanted = list(itertools.product(seeds, sweep.label_noise))
            noisy = torch.stack(
                [
                    flip_labels(labels[drawn], rate, subject.num_classes, torch.Generator().manual_seed(seed))
                    for seed, rate in wanted
                ]
            )
            z = (train if shots == 1 else train[drawn]).to(device)
            fitted.append(
                fit_linear_probes(
                    z,
                    noisy,
                    subject.num_classes,
                    epochs=max(1, round(steps / (len(drawn) // batch))),  # an incomplete batch is no step
                    batch_size=batch,
                    standardize=settings.standardize,
                    seeds=[seed for seed, _ in wanted],
                    device=device,
                    progress=progress,
                )
            )
            accuracies = training_accuracy(fitted[-1], z, noisy)
            training += [(len(drawn), own.item(), means.item()) for own, means in zip(*accuracies, strict=True)]
            cells += [(shots, rate, seed) for seed, rate in wanted]
    return cells, Probes(*(torch.cat(parts) for parts in zip(*fitted, strict=True))), training
