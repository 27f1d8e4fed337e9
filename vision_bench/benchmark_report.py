"""The table of a benchmark, as Markdown, CSV and JSON, and its figure: functions of its rows."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vision_bench import figures, report, sae
from vision_bench.benchmark import ACCURACY, KINDS, SAME, Settings, Subject
from vision_bench.corruptions import CLEAN, Grid, parse
from vision_bench.metrics import MEASURED, chance_level
from vision_bench.probe import NORM, TRAINING
from vision_bench.runs import DIVERGED, Interval, interval, paired_difference, write_atomic

Row = dict[str, Any]

# What gains are over, and the columns of the half-widths of these.
BASES = {"raw": "gain_half_width", "unit": "gain_over_unit_half_width"}
IN_WORDS = {"raw": "raw features", "unit": "L2-normalised raw features (unit)"}
TEXT, TABLE, DATA, FIGURE = "results.md", "results.csv", "results.json", "robustness"


def write(subjects: Sequence[Subject], rows: Sequence[Row], settings: Settings) -> str:
    """Write the table and the figure of the models into the output folder; the Markdown is returned.

    Raises:
        OSError: a file cannot be written.
    """
    folder, sweep = Path(settings.output_dir), parse(settings.corruptions)
    labels = _labels(subjects)
    kinds = {subject.id: _kinds(subject, rows, settings) for subject in subjects}
    cells = [
        cell
        for subject in subjects
        for kind in kinds[subject.id]
        for cell in _cells(subject, labels[subject.id], kind, rows, sweep)
    ]
    text = _markdown(subjects, labels, kinds, cells, rows, settings, sweep)
    write_atomic(folder / TEXT, text)
    write_atomic(folder / TABLE, _csv(cells))
    write_atomic(folder / DATA, _json(cells, _diverged(subjects, labels, rows), settings))
    panels = {
        labels[subject.id]: {
            kind: _one_at_a_time(
                cell for cell in cells if (cell["features_id"], cell["features"]) == (subject.id, kind)
            )
            for kind in kinds[subject.id]
        }
        for subject in subjects
        if kinds[subject.id]
    }
    if panels:
        figures.save(folder / FIGURE, figures.robustness_dots(panels))
    else:
        figures.delete(folder / FIGURE)
    return text


def _kinds(subject: Subject, rows: Sequence[Row], settings: Settings) -> list[str]:
    """The kinds of features of a model that have numbers: those asked for, without `relu` where it equals `raw`."""
    without = {row["config"]["features"] for row in _find(rows, DIVERGED, features_id=subject.id)}
    if _relu_is_raw(subject, rows, settings):
        without.add("relu")
    return [kind for kind in KINDS if kind in settings.features and kind not in without]


def _relu_is_raw(subject: Subject, rows: Sequence[Row], settings: Settings) -> bool:
    return "raw" in settings.features and bool(_find(rows, SAME, features_id=subject.id))


def _diverged(subjects: Sequence[Subject], labels: dict[str, str], rows: Sequence[Row]) -> list[dict[str, str]]:
    """Of what nothing could be measured, and why."""
    return [
        {"model": labels[subject.id], "features": row["config"]["features"], "reason": row["config"]["reason"]}
        for subject in subjects
        for row in _find(rows, DIVERGED, features_id=subject.id)
    ]


def _labels(subjects: Sequence[Subject]) -> dict[str, str]:
    """A short name of each model by its id, the whole name where two would be the same."""
    short = [subject.label for subject in subjects]
    return {s.id: s.label if short.count(s.label) == 1 else f"{s.name} {s.layer}" for s in subjects}


def _cells(subject: Subject, label: str, kind: str, rows: Sequence[Row], sweep: Grid) -> list[dict[str, Any]]:
    """A row of the table for every way of training and of testing the probes on a kind of features of a model."""
    of_model = [row for row in rows if row["config"]["features_id"] == subject.id]
    mine = [row for row in of_model if row["config"]["features"] == kind]
    cells = []
    for shots, rate, test in itertools.product(sweep.few_shots, sweep.label_noise, sweep.tests()):
        training = {"few_shots": shots, "label_noise": rate}
        arm = training | {"test": test}
        found = _find(mine, ACCURACY, **arm)
        accuracy = _percent(found)
        own, class_means = (_percent(_find(mine, name, **training)) for name in TRAINING)
        gains: dict[str, float | None] = {}
        for base, width in BASES.items():
            over = paired_difference(found, _find(of_model, ACCURACY, features=base, **arm)) if kind != base else None
            gains |= {f"gain_over_{base}": over and 100 * over.mean}
            gains |= {width: over and over.scaled(100).half_width}
        cells.append(
            {
                "model": label,
                "pretrained": subject.pretrained,
                "random_init": subject.random,
                "layer": subject.layer,
                "preprocessing": subject.preprocessing,
                "dimensions": mine[0]["config"]["dimensions"],
                "features": kind,
                **arm,
                "top1": accuracy.mean,
                "top1_half_width": accuracy.half_width,
                "seeds": len(found),
                "chance_top1": 100 * chance_level(subject.tests[test].labels, subject.num_classes),
                "training_top1": own.mean,
                "training_half_width": own.half_width,
                "class_means_training_top1": class_means.mean,
                "trained": own.mean >= class_means.mean,
                **gains,
                **{name: _find(mine, name, test=test)[0]["value"] for name in MEASURED},
                "test_images": found[0]["n"],
                "training_images": mine[0]["config"]["training_images"],
                "features_id": subject.id,
            }
        )
    return cells


def _percent(rows: Sequence[Row]) -> Interval:
    return interval([100 * row["value"] for row in rows])


def _find(rows: Iterable[Row], metric: str, **arm: Any) -> list[Row]:
    return [row for row in rows if row["metric"] == metric and all(row["config"].get(k) == v for k, v in arm.items())]


def _csv(cells: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(cells[0]) if cells else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return text.getvalue()


def _json(cells: list[dict[str, Any]], diverged: list[dict[str, str]], settings: Settings) -> str:
    whole = {"settings": settings.of_results(), "table": cells, "diverged": diverged}
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"


def _markdown(
    subjects: Sequence[Subject],
    labels: dict[str, str],
    kinds: dict[str, list[str]],
    cells: list[dict[str, Any]],
    rows: Sequence[Row],
    settings: Settings,
    sweep: Grid,
) -> str:
    tests, seeds = list(sweep.tests()), len(settings.seeds)
    limit = f", about {settings.limit} images of each split" if settings.limit else ""
    text = f"# Robustness and monosemanticity of frozen features: {settings.dataset}{limit}\n\n"
    for subject in subjects:
        size = " x ".join(map(str, subject.image_size))
        text += f"- **{labels[subject.id]}**: {subject.layer} at {size} pixels. Pretrained: {subject.pretrained}.\n"
        text += f"  Images: {subject.preprocessing}.\n"
        if "relu" in settings.features and _relu_is_raw(subject, rows, settings):
            text += "  No feature is negative: `relu` equals `raw` and was not measured again.\n"
    text += "\nTop-1 accuracy of linear probes, %, by what they are tested on.\n\n"
    head = ["model", "features", "images", "wrong labels"]
    what = ["own training labels", "semantic consistency", "chance", "sparsity", "live"]
    values, untrained = list[list[str]](), list[str]()
    gains: dict[str, list[list[str]]] = {base: [] for base in BASES}
    ways = itertools.product(subjects, KINDS, sweep.few_shots, sweep.label_noise)
    for subject, kind, shots, rate in ways:
        mine = {
            cell["test"]: cell
            for cell in cells
            if (cell["features_id"], cell["features"], cell["few_shots"], cell["label_noise"])
            == (subject.id, kind, shots, rate)
        }
        if not mine:
            continue
        clean = mine[CLEAN]
        start = [labels[subject.id], kind, f"{100 * shots:g} %", f"{100 * rate:g} %"]
        consistency, chance, sparsity, live = (clean[name] for name in MEASURED)
        found = [_shown(consistency), _shown(chance), _shown(sparsity), f"{live:.0f} of {clean['dimensions']}"]
        top1 = [Interval(mine[t]["top1"], mine[t]["top1_half_width"], seeds).text(1) for t in tests]
        own = Interval(clean["training_top1"], clean["training_half_width"], seeds).text(1)
        if not clean["trained"]:
            own += " (not trained)"
            percents = f"{clean['training_top1']:.1f} %, class means {clean['class_means_training_top1']:.1f} %"
            untrained.append(f"{start[0]}, {kind}, {start[2]} of the images, {start[3]} wrong labels ({percents})")
        values.append([*start, *top1, own, *found])
        for base, width in BASES.items():
            if kind != "raw" and clean[f"gain_over_{base}"] is not None:
                over = [Interval(mine[t][f"gain_over_{base}"], mine[t][width], seeds) for t in tests]
                gains[base].append([*start, *(one.text(1, sign=True) for one in over)])
    diverged = _diverged(subjects, labels, rows)
    for one in diverged:
        values.append([one["model"], one["features"], "-", "-", *["diverged"] * len(tests), *["-"] * len(what)])
    levels = {cell["test"]: f"{cell['chance_top1']:.1f}" for cell in cells}
    values.append(["chance level", "-", "-", "-", *(levels.get(test, "-") for test in tests), *["-"] * len(what)])
    text += _table([*head, *tests, *what], values) + report.untrained(untrained)
    for (model, reason), group in itertools.groupby(diverged, key=lambda one: (one["model"], one["reason"])):
        marked = ", ".join(one["features"] for one in group)
        text += f"\n{model}, {marked}: diverged, so that nothing could be measured: {reason}.\n"
    for base, lines in gains.items():
        if lines:
            text += f"\nPoints over the {IN_WORDS[base]} of the same model, paired by seed.\n\n"
            text += _table([*head, *tests], lines)
    scaled = "standardised features" if settings.standardize else "features"
    text += (
        f"\nMean ± half-width of the 95 % interval over {seeds} seeds of probes, wrong labels and drawn images;\n"
        if seeds > 1
        else f"\nOne seed ({settings.seeds[0]}) of probes, wrong labels and drawn images, so there are no intervals;\n"
    )
    text += (
        "the models, the autoencoder and the noise on the images are the same for all seeds. Probes:\n"
        f"{settings.probe_epochs} epochs, LARS 0.4, {scaled} times the number that makes the mean square norm of the\n"
        f"training rows {NORM:g} squared, so that their scale decides nothing; of few images as many steps as of\n"
        "all, up to whole epochs.\n"
        f"{report.TRAINING_NOTE}"
        "Consistency, chance, sparsity and live dimensions are of the clean test images; chance is the consistency\n"
        "with shuffled labels. A consistency means little without the sparsity beside it. Accuracies of models that\n"
        "were pretrained on other images, or with labels, are no comparison of methods. results.csv has all numbers,\n"
        "also what the features are under noise and shifts.\n"
    )
    qualities = {
        labels[subject.id]: [_find(rows, name, features_id=subject.id)[0]["value"] for name in sae.QUALITY]
        for subject in subjects
        if "sae" in kinds[subject.id]
    }
    if qualities:
        text += "\nSparse autoencoders on clean test images:\n\n"
        lines = [[label, *("-" if v is None else f"{v:.3g}" for v in values)] for label, values in qualities.items()]
        text += _table(["model", "variance unexplained", "active latents", "dead latents"], lines)
        text += report.unexplained({label: values[0] for label, values in qualities.items()})
    return text


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A GitHub table, first two columns left-aligned, the others right-aligned."""
    whole = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in whole)


def _one_at_a_time(cells: Iterable[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Accuracy, half-width and chance level where at most one thing is corrupted, by what it is, the clean first."""
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
            found[parts[0] if parts else CLEAN] = (cell["top1"], cell["top1_half_width"] or 0.0, cell["chance_top1"])
    return found
