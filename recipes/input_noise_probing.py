"""Fig. 2(a, b) and the input noise of Fig. 1(b): which features bear noisy images?

    python recipes/input_noise_probing.py --output_dir runs/input_noise
    accelerate launch recipes/input_noise_probing.py --config recipes/configs/cifar100.yaml --output_dir runs/figure2

Linear classifiers on frozen features, trained on clean images and labels, tested on images with noise of a growing
scale. The features and the controls are those of vision_bench/kinds.py, and `poly_decay`, which is poly probed with
the weight decay that is best for the noise. The noise on an
image follows from the seed and the place of the image in its set, and is the same for all features; the features of a
noisy test set are made once for each kind, scale and seed and shared by all probes.

The paper (pictures only, ImageNet-100): sae and ncl are ahead of poly under noise, the more so the more noise there
is. As arms differ without noise already, the table also says how the gain changes from there. The default run, about
two minutes on 2 cores, is of another scale (1,437 digits, a network of three convolutions). Expected there: both are
ahead of poly already without noise, by about 3 and 4 points, and these gains do not grow with either noise.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from probe_report import draw_gain_parts, notes, probe_table
from probing import FEATURES, ControlSettings, LearnerSettings, controlled_grid, experiment, run_experiment
from vision import PretrainingSettings, ProbingSettings, models_of

from vision_bench import figures
from vision_bench.corruptions import CONDITIONS, SPACES, InputNoise, noise_names
from vision_bench.report import ProbeTable
from vision_bench.runs import Run, option, run_as_program
from vision_bench.sweep import Grid, Test

CLEAN = ("none", 0.0)
PAPER_BAR = ("gaussian", 0.6)  # of Fig. 1(b)


@dataclass
class InputNoiseSettings:
    """The noise on the test images."""

    noises: list[str] = option(["uniform", "gaussian"], help=f"Of {', '.join(noise_names())}.")
    scales: list[float] = option(
        [i / 10 for i in range(11)], help="Of the noise; 0, the images as they are, is measured in any case."
    )
    noise_space: str = option(
        "normalised", help="normalised: added after normalisation; pixel: to values in [0, 1], then clamped."
    )

    def __post_init__(self) -> None:
        for name, values, allowed in (
            ("noises", self.noises, noise_names()),
            ("noise_space", [self.noise_space], SPACES),
        ):
            if not values or not set(values) <= set(allowed) or len(set(values)) < len(values):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it takes {', '.join(allowed)}, each once.")
        if not all(scale >= 0 and math.isfinite(scale) for scale in self.scales) or not any(self.scales):
            raise ValueError(f"scales is {self.scales}; it takes finite numbers of at least 0, one of them above.")
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales takes different numbers, got {self.scales}.")
        for noise, scale in itertools.product(self.noises, filter(None, self.scales)):
            allowed_scales = CONDITIONS[noise].range
            if allowed_scales is not None and scale not in allowed_scales:
                raise ValueError(f"scales has {scale}; for {noise} it must be {allowed_scales}.")


SETTINGS = (PretrainingSettings, ProbingSettings, ControlSettings, LearnerSettings, InputNoiseSettings)


def levels(config: dict[str, Any], noise: str) -> list[tuple[str, float]]:
    """(noise, scale) of the columns of a table in ascending order, from none."""
    return [CLEAN, *((noise, scale) for scale in sorted(config["scales"]) if scale)]


def grid(config: dict[str, Any], model_seed: int) -> Grid:
    """The probes with the models of a pretraining: each is tested without noise, and with the noise of its seed."""
    noisy = [
        Test(noise=InputNoise(noise, scale, seed, config["noise_space"]), seeds=(seed,))
        for noise in config["noises"]
        for seed in models_of(config)[model_seed]
        for _, scale in levels(config, noise)[1:]
    ]

    def test_arm(test: Test) -> dict[str, Any]:
        if test.noise is None:
            return {"noise": CLEAN[0], "scale": CLEAN[1]}
        return {"noise": test.noise.kind, "scale": test.noise.scale, "noise_seed": test.noise.seed}

    return controlled_grid(config, model_seed, [Test(), *noisy], test_arm=test_arm)


def table_of(run: Run) -> ProbeTable:
    """The accuracies, a column for each noise and scale."""
    columns = dict.fromkeys(level for noise in run.config["noises"] for level in levels(run.config, noise))
    return probe_table(run, {(noise, scale): {"noise": noise, "scale": scale} for noise, scale in columns})


def report(run: Run) -> str:
    """A table for each kind of noise: accuracies with intervals, what the features are, gains, how these grow."""
    config, table = run.config, table_of(run)
    where = "after normalisation" if config["noise_space"] == "normalised" else "to pixels in [0, 1], then clamped"
    text = (
        f"# Linear probes on frozen features under input noise: {config['data']}, {config['backbone']}\n\n"
        f"Top-1 accuracy on test images, %, by the scale of the noise, added {where}; probes of clean images.\n"
        + table.training_table(["own training labels"], [CLEAN])
    )
    for noise in config["noises"]:
        columns, label = levels(config, noise), CONDITIONS[noise].label
        header = ["none", *(f"{scale:g}" for _, scale in columns[1:])]
        starts = [CLEAN] * len(columns[1:])
        text += (
            f"\n## {label[0].upper()}{label[1:]}\n\n{table.accuracy_table(header, columns)}"
            f"\nPoints gained over poly, paired by seed:\n\n{table.gain_table(header, columns)}"
            "\nBy how much that gain is larger than without noise, paired by seed:\n\n"
            + table.growth_table(header[1:], columns[1:], starts)
        )
    text += notes(run, table, [level for noise in config["noises"] for level in levels(config, noise)])
    return text + "The paper shows these curves as pictures only (ImageNet-100): no numbers of it stand beside ours.\n"


def draw(run: Run) -> None:
    """Fig. 2(a), 2(b): the curves of each kind of noise; the input noise of Fig. 1(b)."""
    config, table = run.config, table_of(run)
    for noise in config["noises"]:
        columns, label = levels(config, noise), CONDITIONS[noise].label
        chance = [table.chance(CLEAN)] * len(columns)
        drawing = figures.band_curves([scale for _, scale in columns], table.curves(columns), label, chance)
        figures.save(run.folder / f"figure_2_{noise}", drawing)
    draw_gain_parts(run, table, list(table.columns))
    noise, scale = PAPER_BAR
    if noise not in config["noises"] or scale not in config["scales"]:
        noise, scale = config["noises"][-1], max(config["scales"])
    shown = {"no noise": CLEAN, f"{noise.replace('_', ' ').capitalize()} noise {scale:g}": (noise, scale)}
    figures.save(run.folder / "figure_1b", figures.accuracy_bars(*table.bars(shown, FEATURES)))


EXPERIMENT = experiment(
    SETTINGS,
    grid,
    recipe="input_noise_probing",
    items=("figure_2ab", "figure_1b"),
    title="Figures 2(a), 2(b) and 1(b): input noise",
    claim="The paper: SAE and NCL are ahead under uniform and Gaussian noise, the more the noise (ImageNet-100; "
    "curves without numbers).",
    pictures={
        "figure_2_*": "Figure 2(a, b): {} noise, ours",
        "figure_1b": "Figure 1(b), input noise: ours",
        "gain_parts": "What the gains over poly consist of: ours",
    },
    report=report,
    draw=draw,
)


# An earlier version drew the noise of a seed in one stream, and its rows are not continued with other noise.
main = partial(run_experiment, EXPERIMENT, SETTINGS, grid, config={"noise_draw": "by image"})


if __name__ == "__main__":
    run_as_program(main)
