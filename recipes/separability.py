"""Theorems 4.1, 4.2 and B.1 to B.9: the closed forms against quadrature and simulation, and which claims hold.

    python recipes/separability.py --output_dir runs/separability
    python recipes/separability.py --output_dir runs/literal_label --ties zero --kind absolute --sparsities 0.1 0.3

Prints one line for every quantity of the theorems (closed form, Gauss quadrature of the definition, Monte Carlo with
1e7 draws), and one for every tie rule and criterion with the range of sparsity in which each claim holds. The figure
has the criterion against label and input noise under the chosen rule and criterion. Under a minute on 2 cores.

The paper claims that the monosemantic representation overtakes at a noise rate of 25 %. Expected here: with Fisher's
ratio it never does; docs/theory.md has the proofs, and the readings under which it would.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from program import parse, run_as_program
from separability_claims import GRID, criterion_claims, distribution_claims, verdict
from tqdm.auto import tqdm

from vision_bench import figures
from vision_bench.runs import Run, interval, markdown_table
from vision_bench.separability import (
    CRITERIA,
    TIES,
    Moments,
    criterion,
    crossing,
    integrated_moments,
    moments,
    simulated_moments,
)

BATCHES = 100  # of the simulation; their spread gives its standard error
NOISE_KINDS = ("label", "input")
DEVICE = "cpu"
SOURCES = {"closed form": moments, "quadrature": integrated_moments}


@dataclass
class SeparabilityArguments:
    """Where, and at which noise, the theorems are evaluated."""

    output_dir: str = field(metadata={"help": "Folder of the results."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of the simulation."})
    sparsities: list[float] = field(default_factory=lambda: [0.0, 0.5], metadata={"help": "S, each in [0, 1)."})
    noise_rate: float = field(default=0.25, metadata={"help": "eta of the label noise, the paper's crossing."})
    input_noise: float = field(default=0.5, metadata={"help": "sigma of the input noise."})
    ties: str = field(default="coin", metadata={"help": f"Tie rule: {', '.join(TIES)}."})
    kind: str = field(default="fisher", metadata={"help": f"Criterion: {', '.join(CRITERIA)}."})
    draws: int = field(default=10_000_000, metadata={"help": "Samples of the simulation for each noise and seed."})


def check(script: SeparabilityArguments) -> None:
    """Raise ValueError for settings without a result, before the simulation."""
    for sparsity in script.sparsities:
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsities has {sparsity}; it must be in [0, 1), at 1 a class may be empty.")
    criterion(moments(script.sparsities, script.noise_rate, script.input_noise, script.ties), script.kind)
    if script.draws < 1000 * BATCHES:
        raise ValueError(f"draws is {script.draws}; it must be at least {1000 * BATCHES}.")


def quantities(kind: str, clean: Moments, label: Moments, noisy: Moments) -> Iterator[tuple[str, str, float]]:
    """(theorem, quantity, value) from the moments without noise, with label noise and with input noise."""
    arms = (("u", "mono"), ("v", "poly"))
    for theorem, (z, arm) in zip(("B.1", "B.3"), arms, strict=True):
        for y in (0, 1):
            yield theorem, f"mean of {z}, y = {y}", getattr(clean, arm).means[y]
            yield theorem, f"variance of {z}, y = {y}", getattr(clean, arm).variances[y]
    yield "B.4", "share of y = 1, noisy", label.priors[1]
    for distance, variance, noise in (("B.5", "B.6", label), ("B.7", "B.8", noisy)):
        for z, arm in arms:
            means, variances = getattr(noise, arm)
            yield distance, f"distance D of {z}, noisy", means[1] - means[0]
            for y in (0, 1):
                yield variance, f"variance of {z}, y = {y}, noisy", variances[y]
    for theorem, case, noise in (
        ("4.1", "clean", clean),
        ("4.2", "label noise", label),
        ("B.9", "input noise", noisy),
    ):
        for z, arm in arms:
            yield theorem, f"J({z}), {case}", getattr(criterion(noise, kind), arm)


def evaluate(
    script: SeparabilityArguments, sparsity: float, source: Callable[..., Moments]
) -> list[tuple[str, str, float]]:
    """All quantities of one source of moments."""
    cases = ((0.0, 0.0), (script.noise_rate, 0.0), (0.0, script.input_noise))
    return list(quantities(script.kind, *(source(sparsity, rate, sigma, script.ties) for rate, sigma in cases)))


def add_theorems(run: Run, script: SeparabilityArguments, sparsity: float, seed: int | None) -> None:
    """Rows of the closed form and the quadrature (seed None) or of the simulation, with standard errors."""
    if run.find("value", sparsity=sparsity, seed=seed):
        return
    start = time.monotonic()
    if seed is None:
        rows = []
        for source, function in SOURCES.items():
            for theorem, quantity, value in evaluate(script, sparsity, function):
                arm = {"theorem": theorem, "quantity": quantity, "source": source, "sparsity": sparsity}
                seconds = time.monotonic() - start
                rows.append(run.row("value", float(value), n=1, seed=None, seconds=seconds, device=DEVICE, **arm))
        run.add_rows(rows)
        return
    generator = np.random.default_rng(seed)

    def simulated(*setting: Any) -> Moments:
        return simulated_moments(script.draws // BATCHES, generator, *setting)

    batches = tqdm(range(BATCHES), desc=f"simulation, S = {sparsity:g}, seed {seed}")
    table = [evaluate(script, sparsity, simulated) for _ in batches]
    rows = []
    for column in zip(*table, strict=True):
        values = np.array([value for _, _, value in column])
        arm = {"theorem": column[0][0], "quantity": column[0][1], "source": "simulation", "sparsity": sparsity}
        arm["standard_error"] = float(values.std(ddof=1) / BATCHES**0.5)
        seconds = time.monotonic() - start
        value = float(values.mean())
        rows.append(run.row("value", value, n=script.draws, seed=seed, seconds=seconds, device=DEVICE, **arm))
    run.add_rows(rows)


def report(run: Run, script: SeparabilityArguments) -> str:
    """Both tables as Markdown."""
    text = f"# Separability of mono u = x1 and poly v = x1 - x2\n\nTies: {script.ties}; criterion: {script.kind}; "
    text += f"noise rate {script.noise_rate:g}; input noise {script.input_noise:g}.\n"
    for sparsity in script.sparsities:
        lines = []
        for closed in run.find("value", source="closed form", sparsity=sparsity):
            arm = {name: closed["config"][name] for name in ("theorem", "quantity", "sparsity")}
            (quadrature,) = run.find("value", source="quadrature", **arm)
            drawn = run.find("value", source="simulation", **arm)
            mean = interval([row["value"] for row in drawn]).mean
            error = sum(row["config"]["standard_error"] ** 2 for row in drawn) ** 0.5 / len(drawn)
            agrees = abs(quadrature["value"] - closed["value"]) < 1e-12 and abs(mean - closed["value"]) < 4 * error
            line = [arm["theorem"], arm["quantity"], f"{closed['value']:.6f}", f"{quadrature['value']:.6f}"]
            lines.append([*line, f"{mean:.6f} ± {error:.6f}", "yes" if agrees else "NO"])
        header = ["theorem", "quantity", "closed form", "quadrature", "simulation ± standard error", "agree"]
        text += f"\n## S = {sparsity:g}\n\n{markdown_table(header, lines)}"
    text += "\nThey agree if quadrature differs by less than 1e-12, simulation by less than 4 standard errors.\n"
    text += f"\n## Where mono overtakes poly ({script.ties}, {script.kind})\n\n"
    lines = []
    for sparsity in script.sparsities:
        found = (run.find("crossing", sparsity=sparsity, noise=noise) for noise in NOISE_KINDS)
        lines.append([f"{sparsity:g}", *(f"{rows[0]['value']:.6f}" if rows else "never" for rows in found)])
    text += markdown_table(["S", "noise rate", "input noise"], lines)
    for title, kinds in (("tie rule", [None]), ("tie rule and criterion", CRITERIA)):
        text += f"\n## Claims, by {title}\n\n"
        rows = run.find("claim", ties=TIES[0], kind=kinds[0])
        header = [f"{row['config']['theorem']}: {row['config']['claim']}" for row in rows]
        lines = [
            [
                ", ".join(filter(None, (ties, kind))),
                *(row["config"]["verdict"] for row in run.find("claim", ties=ties, kind=kind)),
            ]
            for ties in TIES
            for kind in kinds
        ]
        text += markdown_table([title, *header], lines)
    return text + f"\nRanges on a grid of S with the step {GRID[1]:g}, noise rates below 1/2.\n"


def draw(script: SeparabilityArguments, folder: Path) -> None:
    """The criterion against label and input noise, a row of panels for each sparsity."""
    panels = []
    for sparsity in script.sparsities:
        row = []
        for noise, label in zip(NOISE_KINDS, ("noise rate", "input noise"), strict=True):
            level = crossing(sparsity, noise, script.kind, script.ties)
            levels = np.linspace(0, 0.5 if noise == "label" else max(1.0, 1.25 * (level or 0)), 201)
            setting = (levels, 0) if noise == "label" else (0, levels)
            scores = criterion(moments(sparsity, *setting, script.ties), script.kind)
            title = f"S = {sparsity:g}"
            row.append(dict(title=title, label=label, levels=levels, **scores._asdict(), crossing=level))
        panels.append(row)
    figures.save(folder / "criterion", figures.separability_curves(panels))


def main(arguments: list[str] | None = None) -> None:
    """Evaluate what the output folder has no rows of, then write and print the tables and draw the figure."""
    script = parse(SeparabilityArguments, arguments)
    check(script)
    config = {k: v for k, v in asdict(script).items() if k not in ("output_dir", "seeds")}
    run = Run(script.output_dir, "separability", config | {"seeds": script.seeds})
    run.bind()
    for sparsity in script.sparsities:
        for seed in (None, *script.seeds):
            add_theorems(run, script, sparsity, seed)
    for sparsity, noise in itertools.product(script.sparsities, NOISE_KINDS):
        level = crossing(sparsity, noise, script.kind, script.ties)
        if level is not None and not run.find("crossing", sparsity=sparsity, noise=noise):
            run.add("crossing", level, n=1, seed=None, seconds=0.0, device=DEVICE, sparsity=sparsity, noise=noise)
    for ties in TIES:
        for kind in (None, *CRITERIA):
            if run.find("claim", ties=ties, kind=kind):
                continue
            start = time.monotonic()
            rows = []
            for theorem, claim, holds in distribution_claims(ties) if kind is None else criterion_claims(ties, kind):
                arm = {"theorem": theorem, "claim": claim, "ties": ties, "kind": kind, "verdict": verdict(holds)}
                measured = {"seconds": time.monotonic() - start, "device": DEVICE}
                rows.append(run.row("claim", float(holds.mean()), n=len(GRID), seed=None, **measured, **arm))
            run.add_rows(rows)
    text = report(run, script)
    run.write("results.md", text)
    draw(script, run.folder)
    print(text)


if __name__ == "__main__":
    run_as_program(main)
