"""Fig. 2(a, b) and the input noise of Fig. 1(b): which features bear noisy images?

    python recipes/input_noise_probing.py --output_dir runs/input_noise
    accelerate launch recipes/input_noise_probing.py --config recipes/configs/cifar100.yaml --output_dir runs/figure2

Linear classifiers on frozen features, trained on clean images and labels, tested on images with noise of a growing
scale. The features and the controls are those of vision_bench/kinds.py, and `poly_decay`, which is poly probed with
the weight decay that is best for the noise. The noise is drawn anew for each seed and the same for all features; the
features of a noisy test set are made once for each kind, scale and seed and shared by all probes.

The paper (pictures only, ImageNet-100): sae and ncl are ahead of poly under noise, the more so the more noise there
is. As arms differ without noise already, the table also says how the gain changes from there. The default run, about
two minutes on 2 cores, is of another scale (1,437 digits, a network of three convolutions). Expected there: both are
ahead of poly already without noise, by about 3 and 4 points, and these gains do not grow with either noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from probes import (
    Cell,
    ControlledArguments,
    accuracy_lines,
    bars,
    curves,
    gain_lines,
    growth_lines,
    measured_header,
    notes,
    training_table,
)
from program import run_as_program
from shifted import Trial, measure
from training_accuracies import chance_percent
from vision_ladder import finish, measure_seeds, start

from vision_bench import figures
from vision_bench.corruptions import CONDITIONS, SPACES, add_input_noise, add_pixel_noise, noise_names
from vision_bench.data import ImageSet
from vision_bench.runs import Run, markdown_table

CLEAN: Cell = {"noise": "none", "scale": 0.0}
PAPER_BAR = ("gaussian", 0.6)  # of Fig. 1(b)


@dataclass
class InputNoiseArguments(ControlledArguments):
    """Settings of this recipe."""

    noises: list[str] = field(
        default_factory=lambda: ["uniform", "gaussian"], metadata={"help": f"Of {', '.join(noise_names())}."}
    )
    scales: list[float] = field(
        default_factory=lambda: [i / 10 for i in range(11)],
        metadata={"help": "Of the noise; 0, the images as they are, is measured in any case."},
    )
    noise_space: str = field(
        default="normalised",
        metadata={"help": "normalised: added after normalisation; pixel: to values in [0, 1], then clamped."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("noises", noise_names()), ("noise_space", SPACES)):
            value = getattr(self, name)
            given = [value] if isinstance(value, str) else value
            unknown = [one for one in given if one not in allowed]
            if unknown or not given or len(set(given)) < len(given):
                raise ValueError(f"{name} is {value!r}; it takes {', '.join(allowed)}, each once.")
        if not all(scale >= 0 and math.isfinite(scale) for scale in self.scales) or not any(self.scales):
            raise ValueError(f"scales is {self.scales}; it takes finite numbers of at least 0, one of them above.")
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales takes different numbers, got {self.scales}.")

    def cells(self, noise: str) -> list[Cell]:
        """The levels of a kind of noise in ascending order, from none."""
        return [CLEAN, *({"noise": noise, "scale": scale} for scale in sorted(self.scales) if scale)]


def noise_of(
    space: str, images: ImageSet, kind: str, scale: float, seed: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that adds the noise of a seed to the normalised images, batch after batch."""
    generator = torch.Generator().manual_seed(seed)
    if space == "pixel":
        return lambda x: add_pixel_noise(x, images.mean, images.std, kind, scale, generator)
    return lambda x: add_input_noise(x, kind, scale, generator)


def trials(script: InputNoiseArguments, seeds: list[int], images: ImageSet) -> list[Trial]:
    """The clean test images for all seeds, and for each kind, scale and seed of the noise those with noise."""

    def given() -> ImageSet:
        return images

    found = [Trial(CLEAN, seeds, given)]
    for kind, seed in itertools.product(script.noises, seeds):
        for cell in script.cells(kind)[1:]:
            noise = partial(noise_of, script.noise_space, images, kind, cell["scale"], seed)
            found.append(Trial(cell | {"noise_seed": seed}, [seed], given, noise))
    return found


def report(run: Run, script: InputNoiseArguments) -> str:
    """A table for each kind of noise: accuracies with intervals, what the features are, gains, how these grow."""
    text = f"# Linear probes on frozen features under input noise: {script.data}, {script.backbone}\n\n"
    where = "after normalisation" if script.noise_space == "normalised" else "to pixels in [0, 1], then clamped"
    text += f"Top-1 accuracy on test images, %, by the scale of the noise, added {where}; probes of clean images.\n"
    text += training_table(run, ["own training labels"], [CLEAN], [{}])
    for noise in script.noises:
        cells = script.cells(noise)
        header = ["features", "none", *(f"{cell['scale']:g}" for cell in cells[1:])]
        text += f"\n## {CONDITIONS[noise].label[0].upper()}{CONDITIONS[noise].label[1:]}\n\n"
        text += markdown_table([*header, *measured_header()], accuracy_lines(run, cells))
        text += "\nPoints gained over poly, paired by seed:\n\n"
        text += markdown_table(header, gain_lines(run, cells))
        text += "\nBy how much that gain is larger than without noise, paired by seed:\n\n"
        text += markdown_table(["features", *header[2:]], growth_lines(run, cells[1:], CLEAN))
    text += notes(run, script, [cell for noise in script.noises for cell in script.cells(noise)])
    return text + "The paper shows these curves as pictures only (ImageNet-100): no numbers of it stand beside ours.\n"


def draw(run: Run, script: InputNoiseArguments) -> None:
    """Fig. 2(a), 2(b): the curves of each kind of noise; the input noise of Fig. 1(b)."""
    drawings = {}
    for noise in script.noises:
        cells = script.cells(noise)
        levels = [cell["scale"] for cell in cells]
        drawings[f"figure_2_{noise}"] = figures.noise_curves(
            levels, curves(run, cells), CONDITIONS[noise].label, [chance_percent(run)] * len(levels)
        )
    noise, scale = PAPER_BAR
    if noise not in script.noises or scale not in script.scales:
        noise, scale = script.noises[-1], max(script.scales)
    conditions = {
        "no noise": CLEAN,
        f"{noise.replace('_', ' ').capitalize()} noise {scale:g}": {"noise": noise, "scale": scale},
    }
    drawings["figure_1b"] = figures.accuracy_bars(bars(run, conditions), [chance_percent(run)] * len(conditions))
    for name, figure in drawings.items():
        figures.save(run.folder / name, figure)


def main(arguments: list[str] | None = None) -> None:
    """Measure what the output folder has no rows of, then write and print the table and draw the figures."""
    script, splits, accelerator, run = start(InputNoiseArguments, arguments, "input_noise_probing")
    seeds_of = script.models_of()
    measure_seeds(
        run,
        script,
        accelerator,
        lambda seed: measure(run, script, seed, splits, accelerator, trials(script, seeds_of[seed], splits["test"])),
    )
    finish(accelerator, run, lambda: report(run, script), lambda: draw(run, script))


if __name__ == "__main__":
    run_as_program(main)
