"""The settings of the probing recipes that are not yet composed: as `vision`, by inheritance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import vision
from vision import IMAGES, METHODS, VIEWS, PretrainingSettings, ProbingSettings, highest_with_signal

from vision_bench.runs import Run, option, parse, recorded

__all__ = ["IMAGES", "METHODS", "VIEWS", "highest_with_signal"]
SPLITS = ("train", "test")


@dataclass
class DownstreamArguments(PretrainingSettings):
    """Pretraining, and whether the seeds of what follows share it."""

    shared_pretraining: bool = option(False, help=vision.SHARED_PRETRAINING)

    def models_of(self) -> dict[int, list[int]]:
        return vision.models_of({"seeds": self.seeds, "shared_pretraining": self.shared_pretraining})


@dataclass
class ProbingArguments(ProbingSettings, DownstreamArguments):
    """Pretraining, the sparse autoencoder, and linear probes."""

    def __post_init__(self) -> None:
        PretrainingSettings.__post_init__(self)
        ProbingSettings.__post_init__(self)

    def check(self, train: Any, test: Any) -> None:
        ProbingSettings.check(self, self, {"train": train, "test": test})

    @property
    def varied(self) -> str:
        return vision.varied({"shared_pretraining": self.shared_pretraining})


def results_config(script: Any, train: Any, test: Any) -> dict[str, Any]:
    return recorded(script) | {IMAGES: {"train": train.fingerprint, "test": test.fingerprint}}


def load_splits(script: Any) -> tuple[Any, Any]:
    splits = vision.load_splits(script)
    return splits["train"], splits["test"]


def start_accelerator(script: Any, recipe: str) -> Any:
    return vision.start_accelerator(recipe, (script,))


def start(settings: type[Any], arguments: list[str] | None, recipe: str) -> tuple[Any, Any, Any, Any]:
    (script,) = parse([settings], arguments)
    splits = vision.load_splits(script)
    script.check(splits["train"], splits["test"])
    accelerator = start_accelerator(script, recipe)
    run = Run(script.output_dir, recipe, results_config(script, *splits.values()), is_main=accelerator.is_main_process)
    run.bind()
    return script, splits, accelerator, run


def finish(accelerator: Any, run: Any, report: Any, draw: Any = None) -> None:
    vision.finish(accelerator, run, lambda _: report(), draw and (lambda _: draw()))


def measure_seeds(run: Any, script: Any, accelerator: Any, measure: Any) -> None:
    vision.measure_seeds(run, accelerator, measure)


def pretrained(script: Any, method: str, seed: int, train: Any, validation: Any, accelerator: Any) -> Any:
    return vision.pretrained(script, method, seed, {"train": train, "test": validation}, accelerator)
