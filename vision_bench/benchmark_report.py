"""The table of a benchmark, as Markdown, CSV and JSON, and its figure: functions of its rows."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from result_rows import Interval, interval, write_atomic
from vision_bench import figures, sae
from vision_bench.benchmark import ACCURACY, KINDS, Settings, Subject
from vision_bench.corruption_sweep import CLEAN, Sweep, parse
from vision_bench.metrics import MEASURED

Row = dict[str, Any]

TEXT, TABLE, DATA, FIGURE = "results.md", "results.csv", "results.json", "robustness"


def write(subjects: Sequence[Subject], rows: Sequence[Row], settings: Settings) -> str:
    """Write the table and the figure of the models into the output folder; the Markdown is returned.

    Raises:
        OSError: a file cannot be written.
    """
    folder, sweep = Path(settings.output_dir), parse(settings.corruptions)
    labels = _labels(subjects)
    kinds = [kind for kind in KINDS if kind in settings.features]
    cells = [
        cell
        for subject, kind in itertools.product(subjects, kinds)
        for cell in _cells(subject, labels[subject.id], kind, rows, sweep)
    ]
    text = _markdown(subjects, labels, kinds, cells, rows, settings, sweep)
    write_atomic(folder / TEXT, text)
    write_atomic(folder / TABLE, _csv(cells))
    write_atomic(folder / DATA, _json(cells, settings))
    panels = {
        labels[subject.id]: {
            kind: _one_at_a_time(
                cell for cell in cells if (cell["features_id"], cell["features"]) == (subject.id, kind)
            )
            for kind in kinds
        }
        for subject in subjects
    }
    figures.save(folder / FIGURE, figures.robustness_dots(panels))
    return text


def _labels(subjects: Sequence[Subject]) -> dict[str, str]:
    """A short name of each model by its id, the whole name where two would be the same."""
    short = [subject.label for subject in subjects]
    return {s.id: s.label if short.count(s.label) == 1 else f"{s.name} {s.layer}" for s in subjects}


def _cells(subject: Subject, label: str, kind: str, rows: Sequence[Row], sweep: Sweep) -> list[dict[str, Any]]:
    """A row of the table for every way of training and of testing the probes on a kind of features of a model."""
    mine = [row for row in rows if row["config"]["features_id"] == subject.id and row["config"]["features"] == kind]
    raw = [row for row in rows if row["config"]["features_id"] == subject.id and row["config"]["features"] == "raw"]
    cells = []
    for shots, rate, test in itertools.product(sweep.few_shots, sweep.label_noise, sweep.tests()):
        arm = {"few_shots": shots, "label_noise": rate, "test": test}
        found = _find(mine, ACCURACY, **arm)
        accuracy = interval([100 * row["value"] for row in found])
        base = {row["seed"]: row["value"] for row in _find(raw, ACCURACY, **arm)}
        gains = [100 * (row["value"] - base[row["seed"]]) for row in found if row["seed"] in base]
        gain = interval(gains) if gains and kind != "raw" else Interval(math.nan, None, 0)
        cells.append(
            {
                "model": label,
                "pretrained": subject.pretrained,
                "random_init": subject.random,
                "layer": subject.layer,
                "dimensions": mine[0]["config"]["dimensions"],
                "features": kind,
                **arm,
                "top1": accuracy.mean,
                "top1_half_width": accuracy.half_width,
                "seeds": len(found),
                "gain_over_raw": None if math.isnan(gain.mean) else gain.mean,
                "gain_half_width": gain.half_width,
                **{name: _find(mine, name, test=test)[0]["value"] for name in MEASURED},
                "test_images": found[0]["n"],
                "training_images": mine[0]["config"]["training_images"],
                "features_id": subject.id,
            }
        )
    return cells


def _find(rows: Iterable[Row], metric: str, **arm: Any) -> list[Row]:
    return [row for row in rows if row["metric"] == metric and all(row["config"].get(k) == v for k, v in arm.items())]


def _csv(cells: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(cells[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return text.getvalue()


def _json(cells: list[dict[str, Any]], settings: Settings) -> str:
    return json.dumps({"settings": settings.of_results(), "table": cells}, indent=1, allow_nan=False) + "\n"


def _markdown(
    subjects: Sequence[Subject],
    labels: dict[str, str],
    kinds: Sequence[str],
    cells: list[dict[str, Any]],
    rows: Sequence[Row],
    settings: Settings,
    sweep: Sweep,
) -> str:
    tests, seeds = list(sweep.tests()), len(settings.seeds)
    limit = f", about {settings.limit} images of each split" if settings.limit else ""
    text = f"# Robustness and monosemanticity of frozen features: {settings.dataset}{limit}\n\n"
    for subject in subjects:
        size = " x ".join(map(str, subject.image_size))
        text += f"- **{labels[subject.id]}**: {subject.layer} at {size} pixels. Pretrained: {subject.pretrained}.\n"
    text += "\nTop-1 accuracy of linear probes, %, by what they are tested on.\n\n"
    head = ["model", "features", "images", "wrong labels"]
    what = ["semantic consistency", "chance", "sparsity", "live"]
    values, gains = [], []
    ways = itertools.product(subjects, kinds, sweep.few_shots, sweep.label_noise)
    for subject, kind, shots, rate in ways:
        mine = {
            cell["test"]: cell
            for cell in cells
            if (cell["features_id"], cell["features"], cell["few_shots"], cell["label_noise"])
            == (subject.id, kind, shots, rate)
        }
        start = [labels[subject.id], kind, f"{100 * shots:g} %", f"{100 * rate:g} %"]
        consistency, chance, sparsity, live = (mine[CLEAN][name] for name in MEASURED)
        found = [_shown(consistency), _shown(chance), _shown(sparsity), f"{live:.0f} of {mine[CLEAN]['dimensions']}"]
        top1 = [Interval(mine[t]["top1"], mine[t]["top1_half_width"], seeds).text(1) for t in tests]
        values.append(start + top1 + found)
        if kind != "raw" and mine[CLEAN]["gain_over_raw"] is not None:
            over = [Interval(mine[t]["gain_over_raw"], mine[t]["gain_half_width"], seeds) for t in tests]
            gains.append(start + [one.text(1, sign=True) for one in over])
    text += _table([*head, *tests, *what], values)
    if gains:
        text += "\nPoints over the raw features of the same model, paired by seed.\n\n"
        text += _table([*head, *tests], gains)
    scaled = "standardised" if settings.standardize else "unscaled"
    text += (
        f"\nMean ± half-width of the 95 % interval over {seeds} seeds of probes, wrong labels and\n"
        "drawn images; the models, the autoencoder and the noise on the images are the same for all seeds. Probes:\n"
        f"{settings.probe_epochs} epochs, LARS 0.4, {scaled} features; of few images as many steps as of all, up to\n"
        "whole epochs.\n"
        "Consistency, chance, sparsity and live dimensions are of the clean test images; chance is the consistency\n"
        "with shuffled labels. A consistency means little without the sparsity beside it. Accuracies of models that\n"
        "were pretrained on other images, or with labels, are no comparison of methods, nor are those of features of\n"
        "another scale, which decides how fast such a probe learns: see --standardize. results.csv has all numbers,\n"
        "also what the features are under noise and shifts.\n"
    )
    if "sae" in kinds:
        text += "\nSparse autoencoders on clean test images:\n\n"
        lines = []
        for subject in subjects:
            quality = (_find(rows, name, features_id=subject.id)[0]["value"] for name in sae.QUALITY)
            lines.append([labels[subject.id], *(f"{value:.3g}" for value in quality)])
        text += _table(["model", "variance unexplained", "active latents", "dead latents"], lines)
    return text


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A GitHub table, first two columns left-aligned, the others right-aligned."""
    whole = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in whole)


def _one_at_a_time(cells: Iterable[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Accuracy and half-width where at most one thing is corrupted, by what it is, the clean condition first."""
    found = {}
    for cell in cells:
        parts = []
        if cell["label_noise"]:
            parts.append(f"{100 * cell['label_noise']:g} % wrong labels")
        if cell["few_shots"] < 1:
            parts.append(f"{100 * cell['few_shots']:g} % of the images")
        if cell["test"] != CLEAN:
            parts.append(cell["test"])
        if len(parts) <= 1 and " + " not in cell["test"]:
            found[parts[0] if parts else CLEAN] = (cell["top1"], cell["top1_half_width"] or 0.0)
    return found
