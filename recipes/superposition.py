"""Fig. 5: does a toy model without superposition (mono) classify more robustly than one with it (poly)?

    python recipes/superposition.py --output_dir runs/superposition
    python recipes/superposition.py --output_dir runs/superposition_grid --full

Fig. 5a: W^T W of two encoders (n = 20, m = 5), diagonal without and mixed with superposition. Fig. 5b: accuracy of
linear probes on frozen features without noise, with 90 % label noise in training, with Gaussian noise in testing.

The paper: poly is ahead without noise, mono with either noise. Expected at the default setting (n = 100, m = 20,
S = 0.9, 20,000 samples): about 20 % mono and 41 % poly without noise, 15 and 12 % with label noise, 12 and 9 % with
input noise 0.3. That is a window: the same table has its neighbours with more samples or higher sparsity, where poly
stays ahead under label noise, and the phase diagram shows them. About a minute of processor time, on one or two
cores; `--full` adds other sizes, flips over all classes, more samples and sparsities: 120 cells instead of 9.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from experiments import Experiment

from vision_bench import figures
from vision_bench.runs import Cell, Run, defaults, device_name, option, run_as_program
from vision_bench.runs.statistics import Interval, interval, markdown_table, paired_difference
from vision_bench.superposition import FLIPS, classify, geometry, train

ARMS = ("mono", "poly")
GEOMETRY = ("represented", "features_per_dimension", "superposition")
N_TEST = 10_000


@dataclass
class SuperpositionSettings:
    """The window of Fig. 5b (the first size and flips), and the problems around it."""

    output_dir: str = option(help="Folder of the results.", changes_results=False)
    seeds: list[int] = option(list(range(10)), help="Of encoders, data, noise.")
    neighbour_seeds: int = option(4, help="So many of the seeds are run outside the window.")
    sizes: list[str] = option(["100x20"], help="Features x dimensions, n x m.")
    sparsity: float = option(0.9, help="S of the classified samples in the window.")
    samples: int = option(20_000, help="Training samples in the window.")
    sparsities: list[float] = option([0.7, 0.9, 0.95], help="S of all cells.")
    sample_sizes: list[int] = option([5000, 20_000, 50_000], help="Of all cells.")
    flips: list[str] = option(["others"], help=f"Of {', '.join(FLIPS)}.")
    noise_rate: float = option(0.9, help="Share of flipped training labels.")
    input_noises: list[float] = option([0.1, 0.3, 0.5], help="Sigmas in testing.")
    steps: int = option(3000, help="Training steps of the encoders.")
    batch_size: int = option(256, help="Of the encoders.")
    epochs: int = option(10, help="Of the probes.")
    full: bool = option(False, help="The wide grid: overrides sizes, axes, flips, neighbours.")

    def __post_init__(self) -> None:
        if self.full:
            self.sizes = ["100x20", "50x25", "20x5"]
            self.sparsities = [0.5, 0.7, 0.9, 0.95]
            self.sample_sizes = [2000, 5000, 10_000, 20_000, 50_000]
            self.flips = list(FLIPS)
            self.neighbour_seeds = len(self.seeds)
        for name in ("seeds", "sizes", "sparsities", "sample_sizes", "flips", "input_noises"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} takes different values, got {values}.")
        for problem in problems(vars(self)):
            n, m = size_of(problem["size"])
            if not 1 <= m <= n:
                raise ValueError(f"sizes has {problem['size']!r}: n_dims is {m}; it must be in [1, {n}].")
            if problem["samples"] < n:
                raise ValueError(f"samples is {problem['samples']} for {n} classes; give at least one for each class.")
            if not 0 <= problem["sparsity"] < 1:
                raise ValueError(f"sparsity is {problem['sparsity']}; it must be in [0, 1).")
            if problem["flips"] not in FLIPS:
                raise ValueError(f"flips has {problem['flips']!r}; it must be one of {', '.join(FLIPS)}.")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds is {self.seeds}; each must be at least 0.")
        for name in ("neighbour_seeds", "steps", "batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.noise_rate <= 1:
            raise ValueError(f"noise_rate is {self.noise_rate}; it must be in [0, 1], 0.9 for 90 % of the labels.")
        for level in self.input_noises:
            if not 0 <= level < math.inf:
                raise ValueError(f"input_noises has {level}; each must be finite and at least 0.")


def size_of(name: str) -> tuple[int, int]:
    """(n, m) of 'nxm'."""
    try:
        n, m = (int(part) for part in name.split("x"))
    except ValueError:
        raise ValueError(f"sizes has {name!r}; write features x dimensions, such as 100x20.") from None
    return n, m


def problems(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the classification problems: the window of Fig. 5b first, then its neighbours."""
    window = {"size": config["sizes"][0], "flips": config["flips"][0]}
    window |= {"sparsity": config["sparsity"], "samples": config["samples"]}
    axes = product(config["sizes"], config["flips"], config["sparsities"], config["sample_sizes"])
    neighbours = (dict(zip(window, values, strict=True)) for values in axes)
    return [window, *(problem for problem in neighbours if problem != window)]


def seeds_of(config: Mapping[str, Any], problem: Mapping[str, Any]) -> list[int]:
    """All seeds for the window, the first few for the others."""
    return config["seeds"] if problem == problems(config)[0] else config["seeds"][: config["neighbour_seeds"]]


def conditions(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The noises with their levels in the order of the tables."""
    levels = [("clean", 0.0), ("label", config["noise_rate"]), *(("input", level) for level in config["input_noises"])]
    return [{"noise": noise, "level": level} for noise, level in levels]


def encoder_cells(config: Mapping[str, Any], size: str) -> list[Cell]:
    """How the encoders of a size arrange the features, in the order of (metrics, arms, seeds)."""
    axes = product(GEOMETRY, ARMS, config["seeds"])
    return [Cell(metric, seed, {"size": size, "features": features}) for metric, features, seed in axes]


def accuracy_cells(config: Mapping[str, Any], problem: Mapping[str, Any]) -> list[Cell]:
    """The accuracies on a problem, in the order of (conditions, arms, seeds)."""
    axes = product(conditions(config), ARMS, seeds_of(config, problem))
    return [Cell("accuracy", seed, {**problem, **noise, "features": features}) for noise, features, seed in axes]


def cells(config: Mapping[str, Any]) -> Iterator[Cell]:
    """Every row of a whole run."""
    for size in config["sizes"]:
        yield from encoder_cells(config, size)
    for problem in problems(config):
        yield from accuracy_cells(config, problem)


def encoders(size: str, settings: SuperpositionSettings) -> torch.Tensor:
    """W of mono and poly for every seed, (2, seeds, m, n).

    mono learns a linear reconstruction of dense samples with decaying importance, which keeps the first m features;
    poly a ReLU reconstruction of sparse samples with equal importance, which superposes. The decay is such that the
    features at the border, m and m + 1, are told apart within the steps.
    """
    n, m = size_of(size)
    shared: dict[str, Any] = {"steps": settings.steps, "batch_size": settings.batch_size, "progress": True}
    mono = train(n, m, [0.0], settings.seeds, importance=0.8, activation="linear", **shared)
    poly = train(n, m, [0.99], settings.seeds, **shared)
    return torch.cat([mono.weight, poly.weight])


def add(run: Run, cells: list[Cell], tables: Sequence[torch.Tensor], n: int, begun: float) -> None:
    """Rows of the cells that the run lacks; the tables hold the values of all cells in their order."""
    measured: dict[str, Any] = {"n": n, "seconds": time.monotonic() - begun, "device": device_name("cpu")}
    values, lacking = torch.stack(list(tables)).flatten().tolist(), run.lacking(cells)
    filled = [(cell, value) for cell, value in zip(cells, values, strict=True) if cell in lacking]
    run.add_rows([run.row(cell.metric, value, seed=cell.seed, **measured, **cell.arm) for cell, value in filled])


def measure(run: Run, settings: SuperpositionSettings) -> None:
    """Train the encoders and the probes of what the run has no rows of."""
    config = run.config
    for size in settings.sizes:
        of_size = [problem for problem in problems(config) if problem["size"] == size]
        unsolved = [problem for problem in of_size if run.lacking(accuracy_cells(config, problem))]
        if not unsolved and not run.lacking(encoder_cells(config, size)):
            continue
        begun = time.monotonic()
        weight = encoders(size, settings)
        arrangement = geometry(weight)
        tables = [getattr(arrangement, metric) for metric in GEOMETRY]
        add(run, encoder_cells(config, size), tables, weight.shape[-1], begun)
        for problem in unsolved:
            begun = time.monotonic()
            seeds = seeds_of(config, problem)
            classified = (weight[:, : len(seeds)], problem["sparsity"], problem["samples"], seeds)
            noises = (settings.noise_rate, problem["flips"], settings.input_noises)
            result = classify(*classified, *noises, N_TEST, settings.epochs, progress=True)
            tables = [result.clean, result.label_noise, *result.input_noise]
            add(run, accuracy_cells(config, problem), tables, N_TEST, begun)


def scores(run: Run, problem: dict[str, Any], condition: dict[str, Any]) -> tuple[Interval, Interval, Interval]:
    """Accuracy of mono, of poly and their difference paired by seed, in percent."""
    mono, poly = (run.find("accuracy", **problem, **condition, features=features) for features in ARMS)
    gain = paired_difference(mono, poly)
    assert gain is not None
    poly_mean, mono_mean = (interval([row["value"] for row in rows]).scaled(100) for rows in (poly, mono))
    return mono_mean, poly_mean, gain.scaled(100)


def report(run: Run) -> str:
    """The window and its neighbours as Markdown, and whether the ordering of the paper holds in each."""
    config = run.config
    header = ["cell: n x m, flips, S, samples", "seeds"]
    names = {"clean": "clean", "label": "label noise {level:g}", "input": "input noise {level:g}"}
    for condition in conditions(config):
        header += [f"{names[condition['noise']].format(**condition)}: mono", "poly", "mono - poly"]
    lines = []
    for problem in problems(config):
        line, ordered = ["{size}, {flips}, {sparsity:g}, {samples}".format(**problem)], []
        for condition in conditions(config):
            mono, poly, gain = scores(run, problem, condition)
            line += [] if len(line) > 1 else [str(gain.n)]
            line += [mono.text(1), poly.text(1), gain.text(1, sign=True)]
            ahead = gain.mean * (-1 if condition["noise"] == "clean" else 1)
            ordered.append(ahead > 0 and (gain.half_width is None or ahead > gain.half_width))
        lines.append([*line, f"{sum(ordered)} of {len(ordered)}"])
    accuracies = markdown_table([*header, "as in the paper"], lines)
    lines = []
    for size, features in product(config["sizes"], ARMS):
        values = [[row["value"] for row in run.find(metric, size=size, features=features)] for metric in GEOMETRY]
        lines.append([f"{size}, {features}", *(interval(value).text() for value in values)])
    arrangement = markdown_table(["encoder", *(name.replace("_", " ") for name in GEOMETRY)], lines)
    return f"""# Toy model: accuracy without superposition (mono) and with it (poly), %

{accuracies}
Mean ± half-width of the 95 % interval over seeds, differences paired by seed. The first cell is the
window of Fig. 5b. "As in the paper" counts the noises at which poly (clean) or mono (with noise) is ahead
by more than the interval. Chance for {config["sizes"][0]} is {100 / size_of(config["sizes"][0])[0]:g} %.

## Encoders

{arrangement}"""


def draw(run: Run) -> None:
    """Fig. 5a (encoders of n = 20, m = 5), Fig. 5b and the phase diagram."""
    config, drawings = run.config, {}
    trained = train(20, 5, [0.0, 0.9], config["seeds"][:1], importance=0.7, steps=config["steps"], progress=True)
    mono, poly = geometry(trained.weight[:, 0]).gram
    drawings["gram"] = figures.gram_heatmaps({"mono (S = 0)": mono.numpy(), "poly (S = 0.9)": poly.numpy()})

    window, bars = problems(config)[0], {}
    names = {"clean": "clean", "label": "label\n{level:g}", "input": "input\n{level:g}"}
    for condition in conditions(config):
        arms = zip(ARMS, scores(run, window, condition), strict=False)
        heights = {arm: (value.mean, value.half_width or 0.0) for arm, value in arms}
        bars[names[condition["noise"]].format(**condition)] = heights
    drawings["accuracy"] = figures.accuracy_bars(bars)

    gains, widths = {}, {}
    label, *noisy = conditions(config)[1:]
    for condition in (label, noisy[len(noisy) // 2]):
        table = [
            [
                scores(run, window | {"sparsity": sparsity, "samples": samples}, condition)[2]
                for samples in config["sample_sizes"]
            ]
            for sparsity in config["sparsities"]
        ]
        title = "{noise} noise {level:g}".format(**condition)
        gains[title] = np.array([[gain.mean for gain in row] for row in table])
        widths[title] = np.array([[gain.half_width or np.nan for gain in row] for row in table])
    drawings["phase"] = figures.phase_diagram(gains, widths, config["sample_sizes"], config["sparsities"])
    for name, figure in drawings.items():
        figures.save(run.folder / name, figure)


EXPERIMENT = Experiment(
    recipe="superposition",
    items=("figure_5",),
    title="Figure 5: the toy model of superposition",
    claim="The paper: with superposition (poly) the toy model classifies better without noise, without it (mono) "
    "better under 90 % label noise and under input noise (bars without numbers).",
    pictures={"gram": "Figure 5(a): ours", "accuracy": "Figure 5(b): ours", "phase": "Where the ordering holds"},
    cells=cells,
    report=report,
    draw=draw,
    defaults=defaults(SuperpositionSettings),
    overridden=frozenset({"sparsity", "samples", "flips"}),
)


main = partial(EXPERIMENT.run, SuperpositionSettings, measure)


if __name__ == "__main__":
    run_as_program(main)
