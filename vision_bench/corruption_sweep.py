"""What a benchmark varies, from words such as "label_noise=0.4,0.8", "gaussian=0.6" and "rotated"."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from vision_bench.corruptions import INPUT_NOISES
from vision_bench.features import InputNoise
from vision_bench.shifts import SYNTHETIC

# With the numbers that stand for a word without any.
NUMBERS: dict[str, tuple[float, ...]] = {
    "label_noise": (0.4, 0.8),
    "few_shots": (0.1,),
    **dict.fromkeys(INPUT_NOISES, (0.6,)),
}
FOLDER = "folder"
CLEAN = "clean"


class Shift(NamedTuple):
    """Other images for the test: the test images after a shift of `SYNTHETIC`, or those of a labelled folder."""

    name: str
    folder: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.folder}" if self.folder else self.name


class Sweep(NamedTuple):
    """Every combination of these is measured; each holds the clean condition first."""

    label_noise: tuple[float, ...]  # shares of wrong training labels, 0 first
    few_shots: tuple[float, ...]  # shares of the training images that have labels, 1 first
    noises: tuple[InputNoise | None, ...]  # on the test images
    shifts: tuple[Shift | None, ...]  # of the test images

    def tests(self) -> dict[str, tuple[Shift | None, InputNoise | None]]:
        """What the probes are tested on, by name: "clean", "gaussian 0.6", "rotated + gaussian 0.6"."""
        found: dict[str, tuple[Shift | None, InputNoise | None]] = {}
        for shift, noise in itertools.product(self.shifts, self.noises):
            parts = [str(shift)] if shift else []
            parts += [f"{noise.kind} {noise.scale:g}"] if noise else []
            found[" + ".join(parts) or CLEAN] = shift, noise
        return found


def parse(words: Sequence[str]) -> Sweep:
    """The sweep of words NAME or NAME=NUMBER,NUMBER,... or folder=PATH.

    Raises:
        ValueError: an unknown name, or a number that is none or out of its range.
    """
    rates, shots, noises, shifts = [0.0], [1.0], list[InputNoise | None]([None]), list[Shift | None]([None])
    for word in words:
        name, _, values = word.partition("=")
        if name == FOLDER:
            if not values:
                raise ValueError(f"corruptions has {word!r}; write folder=PATH, with CLASS/*.jpg in it.")
            shifts.append(Shift(FOLDER, values))
            continue
        if name in SYNTHETIC:
            if values:
                raise ValueError(f"corruptions has {word!r}; {name} takes no number.")
            shifts.append(Shift(name))
            continue
        if name not in NUMBERS:
            known = [*NUMBERS, *SYNTHETIC, FOLDER]
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"corruptions has {word!r}, which is unknown; there are {', '.join(known)}"
                + (f". Do you mean {near[0]}?" if near else ".")
            )
        for number in _numbers(name, values):
            if name == "label_noise":
                rates.append(number)
            elif name == "few_shots":
                shots.append(number)
            else:
                noises.append(InputNoise(name, number))
    for found in (rates, shots, noises, shifts):
        if len(set(found)) < len(found):
            raise ValueError(f"corruptions is {' '.join(words)}; the same one stands there twice.")
    return Sweep(tuple(rates), tuple(shots), tuple(noises), tuple(shifts))


def _numbers(name: str, values: str) -> tuple[float, ...]:
    if not values:
        return NUMBERS[name]
    try:
        numbers = tuple(float(value) for value in values.split(","))
    except ValueError:
        raise ValueError(f"corruptions has {name}={values!r}; write numbers with commas, {name}=0.2,0.4.") from None
    for number in numbers:
        allowed = _allowed(name, number)
        if allowed or not math.isfinite(number):
            raise ValueError(f"corruptions has {name}={number:g}; it must be {allowed or 'finite'}.")
    return numbers


def _allowed(name: str, number: float) -> str:
    """What the number must be where it is not, else nothing."""
    if name == "label_noise" and not 0 < number <= 1:
        return "in (0, 1], 0.4 for 40 % wrong labels"
    if name == "few_shots" and not 0 < number < 1:
        return "in (0, 1), 0.1 for 10 % of the training images"
    if name in INPUT_NOISES and not number > 0:
        return "above 0"
    return ""
