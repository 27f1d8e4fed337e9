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

import itertools
import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from program import parse, run_as_program

from vision_bench import figures
from vision_bench.runs import Interval, Run, device_name, interval, markdown_table, paired_difference
from vision_bench.superposition import FLIPS, classify, geometry, train

ARMS = ("mono", "poly")
GEOMETRY = ("represented", "features_per_dimension", "superposition")
N_TEST = 10_000


@dataclass
class SuperpositionArguments:
    """The window of Fig. 5b (the first size and flips), and the cells around it."""

    output_dir: str = field(metadata={"help": "Folder of the results."})
    seeds: list[int] = field(default_factory=lambda: list(range(10)), metadata={"help": "Of encoders, data, noise."})
    neighbour_seeds: int = field(default=4, metadata={"help": "So many of the seeds are run outside the window."})
    sizes: list[str] = field(default_factory=lambda: ["100x20"], metadata={"help": "Features x dimensions, n x m."})
    sparsity: float = field(default=0.9, metadata={"help": "S of the classified samples in the window."})
    samples: int = field(default=20_000, metadata={"help": "Training samples in the window."})
    sparsities: list[float] = field(default_factory=lambda: [0.7, 0.9, 0.95], metadata={"help": "S of all cells."})
    sample_sizes: list[int] = field(default_factory=lambda: [5000, 20_000, 50_000], metadata={"help": "Of all cells."})
    flips: list[str] = field(default_factory=lambda: ["others"], metadata={"help": f"Of {', '.join(FLIPS)}."})
    noise_rate: float = field(default=0.9, metadata={"help": "Share of flipped training labels."})
    input_noises: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5], metadata={"help": "Sigmas in testing."})
    steps: int = field(default=3000, metadata={"help": "Training steps of the encoders."})
    batch_size: int = field(default=256, metadata={"help": "Of the encoders."})
    epochs: int = field(default=10, metadata={"help": "Of the probes."})
    full: bool = field(default=False, metadata={"help": "The wide grid: overrides sizes, axes, flips, neighbours."})

    def __post_init__(self) -> None:
        if self.full:
            self.sizes = ["100x20", "50x25", "20x5"]
            self.sparsities = [0.5, 0.7, 0.9, 0.95]
            self.sample_sizes = [2000, 5000, 10_000, 20_000, 50_000]
            self.flips = list(FLIPS)
            self.neighbour_seeds = len(self.seeds)


def size_of(name: str) -> tuple[int, int]:
    """(n, m) of 'nxm'."""
    try:
        n, m = (int(part) for part in name.split("x"))
    except ValueError:
        raise ValueError(f"sizes has {name!r}; write features x dimensions, such as 100x20.") from None
    return n, m


def encoders(size: str, script: SuperpositionArguments) -> torch.Tensor:
    """W of mono and poly for every seed, (2, seeds, m, n).

    mono learns a linear reconstruction of dense samples with decaying importance, which keeps the first m features;
    poly a ReLU reconstruction of sparse samples with equal importance, which superposes. The decay is such that the
    features at the border, m and m + 1, are told apart within the steps.
    """
    n, m = size_of(size)
    shared = {"steps": script.steps, "batch_size": script.batch_size, "progress": True}
    mono = train(n, m, [0.0], script.seeds, importance=0.8, activation="linear", **shared)
    poly = train(n, m, [0.99], script.seeds, **shared)
    return torch.cat([mono.weight, poly.weight])


def cells(script: SuperpositionArguments) -> list[dict[str, Any]]:
    """The window of Fig. 5b first, then its neighbours; each is the arm of its rows."""
    window = {
        "size": script.sizes[0],
        "flips": script.flips[0],
        "sparsity": script.sparsity,
        "samples": script.samples,
    }
    axes = itertools.product(script.sizes, script.flips, script.sparsities, script.sample_sizes)
    return [window, *(cell for values in axes if (cell := dict(zip(window, values, strict=True))) != window)]


def seeds_of(script: SuperpositionArguments, cell: dict[str, Any]) -> list[int]:
    """All seeds for the window, the first few for the others."""
    return script.seeds if cell == cells(script)[0] else script.seeds[: script.neighbour_seeds]


def is_complete(run: Run, script: SuperpositionArguments, cell: dict[str, Any]) -> bool:
    """Whether the folder has every row of the cell."""
    return len(run.find("accuracy", **cell)) == len(ARMS) * len(conditions(script)) * len(seeds_of(script, cell))


def check(script: SuperpositionArguments) -> None:
    """Raise ValueError for settings that would fail later, before the encoders are trained."""
    for cell in cells(script):
        n, m = size_of(cell["size"])
        if not 1 <= m <= n:
            raise ValueError(f"sizes has {cell['size']!r}: n_dims is {m}; it must be in [1, {n}].")
        if cell["samples"] < n:
            raise ValueError(f"samples is {cell['samples']} for {n} classes; give at least one for each class.")
        if not 0 <= cell["sparsity"] < 1:
            raise ValueError(f"sparsity is {cell['sparsity']}; it must be in [0, 1).")
        if cell["flips"] not in FLIPS:
            raise ValueError(f"flips has {cell['flips']!r}; it must be one of {', '.join(FLIPS)}.")
    for name in ("seeds", "sizes", "sparsities", "sample_sizes", "flips", "input_noises"):
        values = getattr(script, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} takes different values, got {values}.")
    if min(script.seeds) < 0:
        raise ValueError(f"seeds is {script.seeds}; each must be at least 0.")
    for name in ("neighbour_seeds", "steps", "batch_size", "epochs"):
        if getattr(script, name) < 1:
            raise ValueError(f"{name} is {getattr(script, name)}; it must be at least 1.")
    if not 0 <= script.noise_rate <= 1:
        raise ValueError(f"noise_rate is {script.noise_rate}; it must be in [0, 1], 0.9 for 90 % of the labels.")
    for level in script.input_noises:
        if not 0 <= level < math.inf:
            raise ValueError(f"input_noises has {level}; each must be finite and at least 0.")


def conditions(script: SuperpositionArguments) -> list[tuple[str, float]]:
    """(noise, level) in the order of the tables."""
    return [("clean", 0.0), ("label", script.noise_rate), *(("input", level) for level in script.input_noises)]


def add_cell(run: Run, script: SuperpositionArguments, weight: torch.Tensor, cell: dict[str, Any]) -> None:
    """Rows of one cell: the accuracy of both arms for every seed and noise."""
    start = time.monotonic()
    seeds = seeds_of(script, cell)
    setting = (script.noise_rate, cell["flips"], script.input_noises, N_TEST, script.epochs)
    result = classify(weight, cell["sparsity"], cell["samples"], seeds, *setting, progress=True)
    tables = [result.clean, result.label_noise, *result.input_noise]
    measured = {"n": N_TEST, "seconds": time.monotonic() - start, "device": device_name("cpu")}
    rows = []
    for (noise, level), table in zip(conditions(script), tables, strict=True):
        for (i, features), (j, seed) in itertools.product(enumerate(ARMS), enumerate(seeds)):
            arm = cell | {"noise": noise, "level": level, "features": features}
            if not run.find("accuracy", seed=seed, **arm):
                rows.append(run.row("accuracy", float(table[i, j]), seed=seed, **measured, **arm))
    run.add_rows(rows)


def scores(run: Run, cell: dict[str, Any], noise: str, level: float) -> tuple[Interval, Interval, Interval]:
    """Accuracy of mono, of poly and their difference paired by seed, in percent."""
    mono, poly = (
        [row | {"value": 100 * row["value"]} for row in run.find("accuracy", **cell, **arm, noise=noise, level=level)]
        for arm in ({"features": features} for features in ARMS)
    )
    gain = paired_difference(mono, poly)
    assert gain is not None
    return interval([row["value"] for row in mono]), interval([row["value"] for row in poly]), gain


def report(run: Run, script: SuperpositionArguments) -> str:
    """The window and its neighbours as Markdown, and whether the ordering of the paper holds in each."""
    text = "# Toy model: accuracy without superposition (mono) and with it (poly), %\n\n"
    header = ["cell: n x m, flips, S, samples", "seeds"]
    for noise, level in conditions(script):
        name = {"clean": "clean", "label": f"label noise {level:g}", "input": f"input noise {level:g}"}[noise]
        header += [f"{name}: mono", "poly", "mono - poly"]
    lines = []
    for cell in cells(script):
        line, ordered = [f"{cell['size']}, {cell['flips']}, {cell['sparsity']:g}, {cell['samples']}"], []
        for noise, level in conditions(script):
            mono, poly, gain = scores(run, cell, noise, level)
            line += [] if len(line) > 1 else [str(gain.n)]
            line += [mono.text(1), poly.text(1), gain.text(1, sign=True)]
            wanted = gain.mean * (-1 if noise == "clean" else 1)
            ordered.append(wanted > 0 and (gain.half_width is None or wanted > gain.half_width))
        lines.append([*line, f"{sum(ordered)} of {len(ordered)}"])
    text += markdown_table([*header, "as in the paper"], lines)
    text += "\nMean ± half-width of the 95 % interval over seeds, differences paired by seed. The first cell is the\n"
    text += (
        'window of Fig. 5b. "As in the paper" counts the noises at which poly (clean) or mono (with noise) is ahead\n'
    )
    text += f"by more than the interval. Chance for {script.sizes[0]} is {100 / size_of(script.sizes[0])[0]:g} %.\n"
    text += "\n## Encoders\n\n"
    lines = []
    for size, features in itertools.product(script.sizes, ARMS):
        values = [[row["value"] for row in run.find(metric, size=size, features=features)] for metric in GEOMETRY]
        lines.append([f"{size}, {features}", *(interval(value).text() for value in values)])
    return text + markdown_table(["encoder", *(name.replace("_", " ") for name in GEOMETRY)], lines)


def draw(run: Run, script: SuperpositionArguments) -> None:
    """Fig. 5a (encoders of n = 20, m = 5), Fig. 5b and the phase diagram."""
    weight = train(20, 5, [0.0, 0.9], script.seeds[:1], importance=0.7, steps=script.steps, progress=True).weight
    grams = geometry(weight[:, 0]).gram
    drawings = {"gram": figures.gram_heatmaps({"mono (S = 0)": grams[0].numpy(), "poly (S = 0.9)": grams[1].numpy()})}

    window, bars = cells(script)[0], {}
    names = {"clean": "clean", "label": "label\n{:g}", "input": "input\n{:g}"}
    for noise, level in conditions(script):
        found = dict(zip(ARMS, scores(run, window, noise, level), strict=False))
        bars[names[noise].format(level)] = {arm: (one.mean, one.half_width or 0.0) for arm, one in found.items()}
    drawings["accuracy"] = figures.accuracy_bars(bars)

    gains, widths = {}, {}
    for noise, level in (("label", script.noise_rate), ("input", script.input_noises[len(script.input_noises) // 2])):
        table = [
            [
                scores(run, window | {"sparsity": sparsity, "samples": samples}, noise, level)[2]
                for samples in script.sample_sizes
            ]
            for sparsity in script.sparsities
        ]
        gains[f"{noise} noise {level:g}"] = np.array([[one.mean for one in row] for row in table])
        widths[f"{noise} noise {level:g}"] = np.array([[one.half_width or np.nan for one in row] for row in table])
    drawings["phase"] = figures.phase_diagram(gains, widths, script.sample_sizes, script.sparsities)
    for name, figure in drawings.items():
        figures.save(run.folder / name, figure)


def main(arguments: list[str] | None = None) -> None:
    """Measure the cells that the output folder has no rows of, then write and print the table and draw the figures."""
    script = parse(SuperpositionArguments, arguments)
    check(script)
    run = Run(script.output_dir, "superposition", {k: v for k, v in asdict(script).items() if k != "output_dir"})
    run.bind()
    for size in script.sizes:
        missing = [cell for cell in cells(script) if cell["size"] == size and not is_complete(run, script, cell)]
        if not missing:
            continue
        start = time.monotonic()
        weight = encoders(size, script)
        measured = {"n": weight.shape[-1], "seconds": time.monotonic() - start, "device": device_name("cpu")}
        arrangement = geometry(weight)
        rows = []
        for metric, (i, features), (j, seed) in itertools.product(GEOMETRY, enumerate(ARMS), enumerate(script.seeds)):
            if not run.find(metric, seed=seed, size=size, features=features):
                value = float(getattr(arrangement, metric)[i, j])
                rows.append(run.row(metric, value, seed=seed, **measured, size=size, features=features))
        run.add_rows(rows)
        for cell in missing:
            add_cell(run, script, weight[:, : len(seeds_of(script, cell))], cell)
    text = report(run, script)
    run.write("results.md", text)
    draw(run, script)
    print(text)


if __name__ == "__main__":
    run_as_program(main)
