"""Wrong training labels by name: at random, by a condition of `corruptions`, or those that people gave.

import torch
from vision_bench.label_noise import HUMAN, HumanLabels, given_labels

labels = torch.arange(3).repeat_interleave(100)
generator = torch.Generator().manual_seed(0)
given_labels(labels, 0.4, 3, generator)  # 40 % of them uniformly wrong
given_labels(labels, "pair_flips 0.4", 3, generator)  # 40 % of them the next class
people = HumanLabels(torch.tensor([[80, 20, 0], [5, 90, 5], [0, 50, 50]]))  # row: true class, column: class given
given_labels(labels, HUMAN, 3, generator, people)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vision_bench.corruptions import CONDITIONS, TRAINING_LABELS, check_labels

UNIFORM, HUMAN = "label_noise", "human"
SIGNIFICANT = 4  # standard errors by which people must agree with the true labels more often than by chance

LabelNoise = float | str  # the share of `UNIFORM` wrong labels; "NAME SHARE" of another condition; or `HUMAN`


@dataclass(frozen=True)
class HumanLabels:
    """Labels that people gave to images: how often which class, or to which image which class.

    Args:
        counts: (classes, classes) int64, at least 0: of images of the class of the row, how many got the label of the
            column.
        labels: (n,) int64, the label of each training image. One of the two is given.
    """

    counts: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    def draw(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The labels that all training images get, (n,) int64.

        Labels of a file are taken as they are. With counts, the images of a class get the labels of its row in a
        random order: a draw without replacement, which begins anew when the row is used up. If the row has as many
        labels as the class has images, the counts are thus met exactly; whatever the numbers, the expected shares
        are those of the row.

        Args:
            labels: (n,) int64, the right ones, for which `check` holds.
            generator: of the draw, on the CPU.
        """
        if self.labels is not None:
            return self.labels
        assert self.counts is not None
        given = labels.clone()
        for true_class, row in enumerate(self.counts):
            images = (labels == true_class).nonzero().squeeze(1)
            if not len(images):
                continue
            pool = torch.repeat_interleave(torch.arange(len(row)), row)
            rounds = math.ceil(len(images) / len(pool))
            orders = [torch.randperm(len(pool), generator=generator) for _ in range(rounds)]
            given[images] = pool[torch.cat(orders)[: len(images)]]
        return given

    def check(self, labels: torch.Tensor, num_classes: int) -> None:
        """Raise unless these can be the labels of the training images.

        Args:
            labels: (n,) integer in [0, num_classes), the right ones.

        Raises:
            ValueError: the numbers of classes or images differ, a class that has images has no counts, or the labels
                agree with the right ones no more often than by chance, as those of other images would.
        """
        if self.labels is not None:
            if len(self.labels) != len(labels):
                raise ValueError(
                    f"human_labels has {len(self.labels)} labels for {len(labels)} training images; it must have one "
                    "for each, in their order (so all of them must be taken)."
                )
            if int(self.labels.max()) >= num_classes:
                raise ValueError(
                    f"human_labels has the class {int(self.labels.max())}; the images are of classes 0 to "
                    f"{num_classes - 1}."
                )
        if self.counts is not None:
            if len(self.counts) != num_classes:
                raise ValueError(
                    f"human_labels has counts of {len(self.counts)} classes and the images are of {num_classes}; the "
                    "classes must be the same, in the same order."
                )
            empty = (self.counts.sum(dim=1) == 0) & (torch.bincount(labels, minlength=num_classes) > 0)
            if empty.any():
                raise ValueError(
                    f"human_labels has no counts in row {int(empty.nonzero()[0]) + 1}, of a class that has images."
                )
        given = self.draw(labels.long(), torch.Generator().manual_seed(0))
        shares = (torch.bincount(part, minlength=num_classes) / len(labels) for part in (given, labels))
        chance = float(torch.stack(list(shares)).prod(dim=0).sum())
        agreement = 1 - wrong_share(given, labels)
        if agreement <= chance + SIGNIFICANT * (chance * (1 - chance) / len(labels)) ** 0.5:
            what = "classes" if self.labels is None else "images"
            raise ValueError(
                f"human_labels agrees with the right label of {100 * agreement:.1f} % of the images, and by chance "
                f"labels would of {100 * chance:.1f} %: its {what} are not in the order of the training {what}."
            )


def read_human_labels(path: str | Path) -> HumanLabels:
    """Read a table of counts or a file of labels: CSV of integers without a header.

    As many lines as columns are counts, line: true class, column: class given; lines of one number are labels, 0 for
    the first class, a line for each training image.

    Raises:
        ValueError: the file cannot be read, or is neither.
    """
    try:
        numbers = np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"human_labels {path} cannot be read ({error}); it takes a CSV file of integers without a header."
        ) from None
    wrong = np.argwhere(~((numbers >= 0) & (numbers % 1 == 0) & (numbers < 2**31)))
    if len(wrong):
        line, column = wrong[0]
        raise ValueError(
            f"human_labels {path} has {numbers[line, column]:g} in line {line + 1}, column {column + 1}; it takes "
            "integers of at least 0."
        )
    whole = torch.from_numpy(numbers.astype(np.int64))
    if whole.shape[0] == whole.shape[1] >= 2:
        return HumanLabels(counts=whole)
    if whole.shape[1] == 1 and len(whole):
        return HumanLabels(labels=whole[:, 0])
    raise ValueError(
        f"human_labels {path} has {whole.shape[0]} lines of {whole.shape[1]} numbers; it takes as many lines as "
        "columns, counts of the true class (line) and the class given (column), or lines of one label."
    )


def given_labels(
    labels: torch.Tensor,
    noise: LabelNoise,
    num_classes: int,
    generator: torch.Generator,
    people: HumanLabels | None = None,
) -> torch.Tensor:
    """The labels (n,) int64 that images get under a noise.

    Args:
        labels: (n,) integer in [0, num_classes), the right ones.
        noise: see `LabelNoise`.
        generator: of the draw.
        people: needed for `HUMAN`; `labels` are then those of all images for which it was checked.

    Raises:
        TypeError: the labels are not integers.
        ValueError: the noise has no name that is known, or as its function.
    """
    if noise == HUMAN:
        if people is None:
            raise ValueError(f"label noise is {HUMAN!r}, and there are no labels that people gave; give human_labels.")
        check_labels(labels, num_classes)
        return people.draw(labels.long(), generator)
    name, share = _parts(noise)
    if name not in CONDITIONS or CONDITIONS[name].changes != TRAINING_LABELS:
        raise ValueError(f"label noise is {noise!r}; {name!r} is no condition that changes training labels.")
    return CONDITIONS[name].function(labels, share, num_classes, generator)


def named(name: str, share: float) -> LabelNoise:
    """A share of wrong labels by a condition."""
    return share if name == UNIFORM else f"{name} {share:g}"


def words(noise: LabelNoise) -> str:
    """In words: "40 %" of uniformly wrong labels, "40 % pair flips", or "human labels"."""
    if noise == HUMAN:
        return "human labels"
    name, share = _parts(noise)
    return f"{100 * share:g} %" + ("" if name == UNIFORM else f" {name.replace('_', ' ')}")


def condition(noise: LabelNoise) -> str:
    """In words that stand by themselves: "40 % wrong labels", "40 % pair flips", or "human labels"."""
    return words(noise) + ("" if isinstance(noise, str) else " wrong labels")


def wrong_share(given: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the images, in [0, 1], whose label (n,) given is not the right one (n,)."""
    return float((given != labels.to(given.device)).double().mean())


def _parts(noise: LabelNoise) -> tuple[str, float]:
    """The name of a condition, and the share of wrong labels."""
    if not isinstance(noise, str):
        return UNIFORM, noise
    name, _, share = noise.partition(" ")
    return name, float(share)
