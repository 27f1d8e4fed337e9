"""The settings of `python -m vision_bench`, and the conditions that words such as "label_noise=0.4,0.8" name."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vision_bench import kinds, learners, models
from vision_bench.checks import check_counts
from vision_bench.corruptions import (
    CLEAN,
    CONDITIONS,
    FOLDER,
    NORMALISED_IMAGES,
    TRAINING_IMAGES,
    TRAINING_LABELS,
    InputNoise,
)
from vision_bench.label_noise import HUMAN, UNIFORM, HumanLabels, LabelNoise, named, read_human_labels
from vision_bench.learners import LEARNERS, PROBE
from vision_bench.probe import NORM
from vision_bench.runs import file_checksum, option, recorded
from vision_bench.sweep import Training

FEATURES = ("raw", "unit", "relu", "sae")
FIXED_SEED = 0  # of autoencoders, heads and what is drawn once, unless each seed has its own
# Of `kinds.KINDS`, those of the recipes: of a second model, or another name for one of these.
OF_RECIPES = ("poly", "poly_unit", "ncl")


@dataclass(kw_only=True)
class Settings:
    """A benchmark of frozen models.

        Settings(models=["resnet18"], dataset="cifar100", corruptions=["gaussian=0.6"], output_dir="runs/bench")

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    models: list[str] = option([], help="see above", positional=True, metavar="MODEL", changes_results=False)
    random_init: list[str] = option([], help="also NAMEs of timm, or small_conv, at random", changes_results=False)
    weights: str | None = option(
        None, help="safetensors file for a MODEL of timm, as MODEL=FILE; names are mapped", changes_results=False
    )
    output_dir: str = option(help="gets the table, the figure and results.jsonl", changes_results=False)
    dataset: str = option("digits", help="or cifar10, cifar100, imagenet100, a folder, a set of the hub")
    data_root: str | None = option(None, help="folder of the data set's files", changes_results=False)
    train_split: str = option("train", help="name of the split of the training images")
    test_split: str = option("test", help="name of the split of the test images; without one, val or validation")
    test_fraction: float | None = option(None, help="share of the training split that is the test images, per class")
    skip_corrupt: bool = option(False, help="leave out images that cannot be decoded")
    label_column: str | None = option(None, help="of a Hugging Face set, if it is not found")
    image_size: int | None = option(None, help="pixels; by default what a model was trained at, or those of the data")
    limit: int | None = option(None, help="about so many images of both sets, drawn from each class")
    corruptions: list[str] = option(
        ["label_noise", "gaussian", "few_shots"],
        help=f"of {', '.join(CONDITIONS)}, {FOLDER}=PATH; every combination is measured; without numbers: "
        + " ".join(
            f"{name}={','.join(f'{x:g}' for x in row.numbers)}" for name, row in CONDITIONS.items() if row.numbers
        ),
        nargs="*",
        metavar="NAME[=NUMBERS]",
    )
    human_labels: str | None = option(
        None,
        help=f"CSV file of what people said, for {UNIFORM}={HUMAN}: counts of the true class (line) and the class "
        "given (column), or a label for each training image",
        changes_results=False,
    )
    features: list[str] = option(
        [*FEATURES],
        help=f"of {', '.join(kind for kind in kinds.KINDS if kind not in OF_RECIPES)}; KIND{kinds.RANDOM_BASIS}, the "
        "twin of any of them",
        metavar="KIND",
        changes_results=False,
    )
    learners: list[str] = option(
        [PROBE], help=f"of {', '.join(LEARNERS)}; all on the same labels", metavar="LEARNER", changes_results=False
    )
    layer: str | None = option(None, help="backbone, projector or output; by default the last one that a model has")
    seeds: list[int] = option([0, 1, 2, 3, 4], help="of probes, wrong labels and drawn images")
    sae_k: int | None = option(None, help="active latents; by default an eighth of the dimensions of the features")
    sae_epochs: int = option(50, help="of the training of autoencoders")
    head_views: int = option(3, help="augmented views of each training image that heads are trained on")
    head_epochs: int = option(20, help="of the training of heads")
    probe_epochs: int = option(50, help="of the training of probes")
    standardize: bool = option(False, help="standardise each feature before probing")
    fit_each_seed: bool = option(
        False,
        help="train autoencoders and heads, and draw random bases, masks and projections, anew for each seed; "
        f"otherwise all have the seed {FIXED_SEED}",
    )
    batch_size: int = option(256, help="images of a forward pass", changes_results=False)
    cache_dir: str | None = option(
        None,
        help="of features and autoencoders, by default OUTPUT_DIR/cache; may be that of another run",
        changes_results=False,
    )
    resume: bool = option(False, help="continue in an output_dir that has results", changes_results=False)

    def __post_init__(self) -> None:
        if not self.models and not self.random_init:
            raise ValueError("models is empty; name at least one, or give --random_init NAME.")
        if self.weights is not None and len(self.models) != 1:
            raise ValueError(f"weights is {self.weights}, the file of one model; name one, not {len(self.models)}.")
        for name in ("models", "random_init", "seeds", "features"):
            values = list(getattr(self, name))
            if len(set(values)) < len(values):
                raise ValueError(f"{name} is {values}; each may stand there once.")
        if not self.features:
            raise ValueError(f"features has nothing; name kinds of features, such as {', '.join(FEATURES)}.")
        for kind in self.features:
            kinds.find(kind)
            if kind.removesuffix(kinds.RANDOM_BASIS) in OF_RECIPES:
                raise ValueError(f"features has {kind}, which recipes have; a single frozen model has raw and unit.")
        learners.check(self.learners)
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"seeds is {list(self.seeds)}; it takes integers of at least 0.")
        if self.head_views < 2:
            raise ValueError(f"head_views is {self.head_views}; a head is trained on pairs of views, at least 2.")
        if self.layer is not None and self.layer not in models.LAYERS:
            raise ValueError(f"layer is {self.layer!r}; it must be one of {', '.join(models.LAYERS)}.")
        counts = "image_size", "limit", "sae_k", "sae_epochs", "head_epochs", "probe_epochs", "batch_size"
        check_counts(**{name: getattr(self, name) for name in counts})
        is_human = HUMAN in parse_conditions(self.corruptions).label_noise
        if is_human != (self.human_labels is not None):
            asked, lacking = f"corruptions {UNIFORM}={HUMAN}", "human_labels FILE"
            raise ValueError("{} needs {}.".format(*((asked, lacking) if is_human else (lacking, asked))))
        self.read_human_labels()
        if self.cache.exists() and not self.cache.is_dir():
            raise ValueError(f"cache_dir is {self.cache}, which is a file; name a folder.")

    @property
    def model_names(self) -> list[str]:
        """The models as `zoo.load` takes them."""
        return [name if self.weights is None else f"{name}={self.weights}" for name in self.models]

    @property
    def heads(self) -> list[str]:
        """The heads that kinds of features are made with."""
        return list(dict.fromkeys(head for head in map(kinds.head_of, self.features) if head is not None))

    @property
    def cache(self) -> Path:
        """The folder of features and autoencoders."""
        return Path(self.cache_dir or Path(self.output_dir) / "cache")

    @property
    def conditions(self) -> Conditions:
        """The conditions that the words of `corruptions` name."""
        return parse_conditions(self.corruptions)

    def read_human_labels(self) -> HumanLabels | None:
        """The labels that people gave, None without any; raises ValueError for a file of something else."""
        return None if self.human_labels is None else read_human_labels(self.human_labels)

    @property
    def recorded(self) -> dict[str, Any]:
        """Settings that all rows of a folder share; models and kinds of features may differ between its rows."""
        people = {} if self.human_labels is None else {"human_labels_sha256": file_checksum(self.human_labels)}
        return recorded(self) | {"probe_norm": NORM} | people


class Shift(NamedTuple):
    """Other test images: the clean ones after a condition that changes uint8 images, or those of a labelled folder.

    Args:
        name: of the condition, or `FOLDER`.
        strength: the number of the condition; None: its default.
        folder: where the images are, `folder/CLASS/*.jpg`; None for a condition of the table.
    """

    name: str
    strength: float | None = None
    folder: str | None = None

    def __str__(self) -> str:
        number = "" if self.strength is None else f"{self.strength:g}"
        return " ".join(filter(None, (self.name, number, self.folder)))


class Conditions(NamedTuple):
    """Every combination of these is measured; each field holds the clean condition first."""

    label_noise: tuple[LabelNoise, ...]  # wrong training labels, none (0) first
    few_shots: tuple[float, ...]  # shares of the training images that have labels, 1 first
    noises: tuple[InputNoise | None, ...]  # on the test images
    shifts: tuple[Shift | None, ...]  # of the test images

    def tests(self) -> dict[str, tuple[Shift | None, InputNoise | None]]:
        """What the probes are tested on, by name: "clean", "gaussian 0.6", "rotated + gaussian 0.6"."""
        tests: dict[str, tuple[Shift | None, InputNoise | None]] = {}
        for shift, noise in itertools.product(self.shifts, self.noises):
            parts = [str(shift)] if shift else []
            parts += [f"{noise.kind} {noise.scale:g}"] if noise else []
            tests[" + ".join(parts) or CLEAN] = shift, noise
        return tests

    def trainings(self, seeds: Sequence[int], learners: Sequence[str] = (PROBE,)) -> list[Training]:
        """How the probes are trained."""
        ways = itertools.product(learners, self.few_shots, seeds, self.label_noise)
        return [
            Training(label_noise=rate, fraction=share, seed=seed, learner=learner)
            for learner, share, seed, rate in ways
        ]


def parse_conditions(words: Sequence[str]) -> Conditions:
    """The conditions of words NAME or NAME=NUMBER,NUMBER,... with names of the table, or folder=PATH.

        parse_conditions(["label_noise=0.2,human", "gaussian", "rotated", "folder=data/sketches"]).tests()

    Raises:
        ValueError: an unknown name, or a number that is none or out of its range.
    """
    labels, shares = list[LabelNoise]([0.0]), [1.0]
    noises, shifts = list[InputNoise | None]([None]), list[Shift | None]([None])
    for word in words:
        name, _, values = word.partition("=")
        if name == FOLDER:
            if not values:
                raise ValueError(f"corruptions has {word!r}; write folder=PATH, with CLASS/*.jpg in it.")
            shifts.append(Shift(FOLDER, folder=values))
            continue
        if name not in CONDITIONS:
            near = difflib.get_close_matches(name, [*CONDITIONS, FOLDER], n=1)
            raise ValueError(
                f"corruptions has {word!r}, which is unknown; there are {', '.join([*CONDITIONS, FOLDER])}"
                + (f". Do you mean {near[0]}?" if near else ".")
            )
        changes = CONDITIONS[name].changes
        if changes == TRAINING_LABELS:
            labels += _label_noises(name, word, values)
            continue
        numbers = _numbers(name, word, values)
        if changes == TRAINING_IMAGES:
            shares += numbers
        elif changes == NORMALISED_IMAGES:
            noises += [InputNoise(name, number) for number in numbers]
        else:
            shifts += [Shift(name, strength) for strength in numbers or (None,)]
    conditions = Conditions(tuple(labels), tuple(shares), tuple(noises), tuple(shifts))
    if any(len(set(values)) < len(values) for values in conditions):
        raise ValueError(f"corruptions is {' '.join(words)}; the same one stands there twice.")
    return conditions


def _label_noises(name: str, word: str, values: str) -> list[LabelNoise]:
    """The noises of a condition that changes training labels; `UNIFORM` may have `HUMAN` among its numbers."""
    numbers = [value for value in values.split(",") if name != UNIFORM or value != HUMAN]
    people = [HUMAN] * (len(values.split(",")) - len(numbers))
    shares = _numbers(name, word, ",".join(numbers)) if numbers else ()
    return [*(named(name, share) for share in shares), *people]


def _numbers(name: str, word: str, values: str) -> tuple[float, ...]:
    condition = CONDITIONS[name]
    if not values:
        return condition.numbers
    if condition.range is None:
        raise ValueError(f"corruptions has {word!r}; {name} takes no number.")
    try:
        numbers = tuple(float(value) for value in values.split(","))
    except ValueError:
        raise ValueError(f"corruptions has {name}={values!r}; write numbers with commas, {name}=0.2,0.4.") from None
    for number in numbers:
        if number not in condition.range:
            raise ValueError(f"corruptions has {name}={number:g}; it must be {condition.range}.")
    return numbers
