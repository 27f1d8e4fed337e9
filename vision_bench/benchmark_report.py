"""The table of a benchmark, as Markdown, CSV and JSON, and its figure: functions of its rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vision_bench import figures, gain_parts, kinds, label_noise, report, sae
from vision_bench.benchmark import EFFECTIVE_RANK, SAME, Row
from vision_bench.benchmark_settings import Settings
from vision_bench.corruptions import CLEAN
from vision_bench.learners import LEARNERS, PROBE, TUNED
from vision_bench.metrics import MEASURED, chance_level
from vision_bench.probe import NORM
from vision_bench.runs import DIVERGED, Interval, markdown_table, over_seeds, select, write_atomic
from vision_bench.subjects import Subject
from vision_bench.sweep import WRONG_LABELS

# What gains are over, with the column of their half-widths and words for it.
BASES = {
    "raw": ("gain_half_width", "raw features"),
    "unit": ("gain_over_unit_half_width", "L2-normalised raw features (unit)"),
}
TEXT, TABLE, DATA, FIGURE, PARTS = "results.md", "results.csv", "results.json", "robustness", "gain_parts"
NAMES = gain_parts.RawNames("raw", "unit")
LINEAR_PROBES = "linear probes"
HEADER = ["model", "features", "images", "wrong labels"]  # of the tables in Markdown
DESCRIBED = ["own training labels", "semantic consistency", "chance", "sparsity", "live", "effective rank"]

Line = dict[str, Any]


def write(subjects: Sequence[Subject], rows: Sequence[Row], settings: Settings) -> str:
    """Write the table and the figure of the models into the output folder; the Markdown is returned.

    Args:
        subjects, rows: as `benchmark.run` returns them.
        settings: with which it was called.

    Raises:
        OSError: a file cannot be written.
    """
    folder = Path(settings.output_dir)
    short = [subject.label for subject in subjects]
    models = [
        _Model(
            subject,
            subject.label if short.count(subject.label) == 1 else f"{subject.name} {subject.layer}",
            [row for row in rows if row["config"]["features_id"] == subject.id],
            settings,
        )
        for subject in subjects
    ]
    lines = [line for model in models for line in model.lines.values()]
    text = _markdown(models, settings)
    write_atomic(folder / TEXT, text)
    write_atomic(folder / TABLE, pd.DataFrame(lines, dtype=object).to_csv(index=False, lineterminator="\n"))
    diverged = [
        {"model": model.label, "features": kind, "reason": reason}
        for model in models
        for kind, reason in model.diverged.items()
    ]
    whole = {"settings": settings.recorded, "table": lines, "diverged": diverged}
    write_atomic(folder / DATA, json.dumps(whole, indent=1, allow_nan=False) + "\n")
    learner = settings.learners[0]
    shown = LINEAR_PROBES if learner == PROBE else learner
    panels = {
        model.label: {
            kind: {name: _dot(model.lines[learner, kind, column]) for name, column in model.single.items()}
            for kind in model.kinds
        }
        for model in models
        if model.kinds
    }
    figures.save(folder / FIGURE, figures.robustness_dots(panels, shown) if panels else None)
    parts = {
        f"{model.label}, {kind}" if len(models) > 1 else kind: panel
        for model in models
        for kind, panel in gain_parts.dots(model.tables[learner], model.single, NAMES, model.tuned(learner)).items()
    }
    figures.save(folder / PARTS, figures.gain_dots(parts, shown) if parts else None)
    return text


class _Model:
    """A model of the report.

    Attributes:
        label: a short name, the whole one where two would be the same.
        diverged: why nothing could be measured, by kind of features.
        relu_is_raw: whether `relu` was not measured because it equals `raw`.
        kinds: the kinds of features asked for that have numbers.
        tables: their accuracies by each learner, by share of the images, share of wrong labels and test.
        lines: of results.csv, one for every learner, kind of features and column of the tables.
        single: the columns of the tables in which at most one thing is corrupted, by what it is, the clean one first.
    """

    def __init__(self, subject: Subject, label: str, rows: Sequence[Row], settings: Settings) -> None:
        self.subject, self.label, conditions = subject, label, settings.conditions
        self.diverged: dict[str, str] = {
            row["config"]["features"]: row["config"]["reason"] for row in rows if row["metric"] == DIVERGED
        }
        self.relu_is_raw = "raw" in settings.features and any(row["metric"] == SAME for row in rows)
        without = {*self.diverged, *(["relu"] if self.relu_is_raw else [])}
        self.kinds = [kind for kind in settings.features if kind not in without]
        columns: dict[Hashable, dict[str, Any]] = {
            (share, rate, test): {"few_shots": share, "label_noise": rate, "test": test}
            for share, rate, test in itertools.product(
                conditions.few_shots, conditions.label_noise, conditions.tests()
            )
        }
        self.tables = {name: report.ProbeTable(rows, columns, self.kinds, learner=name) for name in settings.learners}
        ways = itertools.product(settings.learners, self.kinds, columns)
        self.lines = {way: self._line(*way, settings) for way in ways}
        conditions_of = ((single_corruption(settings_of), column) for column, settings_of in columns.items())
        self.single = {name: column for name, column in conditions_of if name is not None}

    def _line(self, learner: str, kind: str, column: Hashable, settings: Settings) -> Line:
        table = self.tables[learner]
        test, accuracy = table.columns[column]["test"], table.mean(kind, column)
        own, images = table.own_labels(kind, column), self.subject.tests[test].images
        rows = table.select(table.accuracy_metric, column, features=kind)
        gains: dict[str, float | None] = {}
        for base, (width, _) in BASES.items():
            gain = table.gain(kind, column, over=base)
            exists = kind != base and gain.n > 0
            gains |= {f"gain_over_{base}": gain.mean if exists else None, width: gain.half_width if exists else None}
        return {
            "model": self.label,
            "pretrained": self.subject.pretrained,
            "random_init": self.subject.random,
            "layer": self.subject.layer,
            "preprocessing": self.subject.preprocessing,
            "dimensions": int(rows["dimensions"].iloc[0]),
            "features": kind,
            "learner": learner,
            "rotation_equivariant": LEARNERS[learner].is_equivariant(settings.standardize),
            **table.columns[column],
            "top1": accuracy.mean,
            "top1_half_width": accuracy.half_width,
            "seeds": accuracy.n,
            "chance_top1": 100 * chance_level(images.labels, images.num_classes),
            "training_top1": own.accuracy.mean,
            "training_half_width": own.accuracy.half_width,
            "class_means_training_top1": None if own.class_means is None else own.class_means.mean,
            "trained": own.trained,
            **gains,
            **{name: self.value(name, features=kind, test=test) for name in MEASURED},
            EFFECTIVE_RANK: self.value(EFFECTIVE_RANK, features=kind) if test == CLEAN else None,
            WRONG_LABELS: _wrong_labels(table, kind, column),
            "test_images": int(rows["n"].iloc[0]),
            "training_images": int(rows["training_images"].iloc[0]),
            "features_id": self.subject.id,
        }

    def tuned(self, learner: str) -> report.ProbeTable | None:
        """The table of what a learner is when it is tuned, if that was measured."""
        return self.tables.get(TUNED) if learner == PROBE else None

    def value(self, metric: str, **settings: Any) -> float | None:
        """The value of the one row of a metric, or the mean over seeds, None where it is undefined."""
        rows = next(iter(self.tables.values())).rows
        value = float(select(rows, metric, **settings)["value"].mean())
        return None if value != value else value

    def by_training(self, learner: str) -> Iterable[tuple[list[str], list[Line]]]:
        """The cells of `HEADER` and a line for each test, by kind of features and way of training a learner."""
        own = (line for line in self.lines.values() if line["learner"] == learner)
        by = itertools.groupby(own, key=lambda line: (line["features"], line["few_shots"], line["label_noise"]))
        for (kind, share, noise), group in by:
            lines = list(group)
            real = f" ({100 * lines[0][WRONG_LABELS]:.1f} %)" if noise == label_noise.HUMAN else ""
            yield [self.label, kind, f"{100 * share:g} %", label_noise.words(noise) + real], lines


def _wrong_labels(table: report.ProbeTable, kind: str, column: Hashable) -> float:
    """The real share of wrong training labels, a mean over seeds where it is drawn."""
    noise = table.columns[column]["label_noise"]
    if not isinstance(noise, str):
        return float(noise)
    return over_seeds(table.select(table.training_metrics[0], column, features=kind)[WRONG_LABELS]).mean


def _markdown(models: Sequence[_Model], settings: Settings) -> str:
    limit = f", about {settings.limit} images of each split" if settings.limit else ""
    text = f"# Robustness and monosemanticity of frozen features: {settings.dataset}{limit}\n\n"
    for model in models:
        subject, size = model.subject, " x ".join(map(str, model.subject.train.source.image_size))
        text += f"- **{model.label}**: {subject.layer} at {size} pixels. Pretrained: {subject.pretrained}.\n"
        text += f"  Images: {subject.preprocessing}.\n"
        if "relu" in settings.features and model.relu_is_raw:
            text += "  No feature is negative: `relu` equals `raw` and was not measured again.\n"
    tests = list(settings.conditions.tests())
    for learner in settings.learners:
        title = LINEAR_PROBES if learner == PROBE else report.learner_title(learner, settings.standardize)
        text += f"\nTop-1 accuracy of {title}, %, by what they are tested on.\n\n"
        text += _accuracies(models, tests, learner)
        text += _gains(models, tests, learner)
        for model in models:
            if gain_parts.explained_kinds(model.kinds, NAMES):
                text += f"\n{model.label}, {learner}: what the gains over raw features consist of.\n\n"
                equivariant = LEARNERS[learner].is_equivariant(settings.standardize)
                table = model.tables[learner]
                text += gain_parts.markdown(
                    table, model.single, NAMES, model.tuned(learner), is_equivariant=equivariant
                )
    seeds = len(settings.seeds)
    drawn = (
        "each has autoencoders, heads and random bases of its own, and all the same models and noise on images."
        if settings.fit_each_seed
        else "the models, autoencoders, heads, random bases and the noise on images are the same for all seeds."
    )
    scaled = "standardised features" if settings.standardize else "features"
    text += (
        f"\nMean ± half-width of the 95 % interval over {seeds} seeds of probes, wrong labels and drawn images;\n"
        if seeds > 1
        else f"\nOne seed ({settings.seeds[0]}) of probes, wrong labels and drawn images, so there are no intervals;\n"
    )
    text += (
        f"{drawn} Probes:\n"
        f"{settings.probe_epochs} epochs, LARS 0.4, {scaled} times the number that makes the mean square norm of the\n"
        f"training rows {NORM:g} squared, so that their scale decides nothing; of few images as many steps as of\n"
        "all, up to whole epochs.\n"
        f"{report.TRAINING_NOTE}"
        "Consistency, chance, sparsity and live dimensions are of the clean test images; chance is the consistency\n"
        "with shuffled labels. A consistency means little without the sparsity beside it. Effective rank: entropy of\n"
        "the singular values of the normalised rows. Accuracies of models that\n"
        "were pretrained on other images, or with labels, are no comparison of methods. results.csv has all numbers,\n"
        "also what the features are under noise and shifts.\n"
    )
    qualities = {
        model.label if kind == "sae" else f"{model.label}, {kind}": [
            model.value(metric, features=kind) for metric in sae.QUALITY
        ]
        for model in models
        for kind in model.kinds
        if kinds.has_latents(kind)
    }
    if qualities:
        text += "\nSparse autoencoders on clean test images:\n\n"
        lines = [[label, *("-" if v is None else f"{v:.3g}" for v in values)] for label, values in qualities.items()]
        text += markdown_table(["model", "variance unexplained", "active latents", "dead latents"], lines, left=2)
        text += report.unexplained({label: values[0] for label, values in qualities.items()})
    return text


def _accuracies(models: Sequence[_Model], tests: Sequence[str], learner: str) -> str:
    """The table of accuracies of a learner and of what the features are, with its warnings."""
    table, untrained, chance_levels = list[list[str]](), list[str](), ["-"] * len(tests)
    for model in models:
        for start, lines in model.by_training(learner):
            clean = lines[0]
            own = model.tables[learner].own_labels(
                clean["features"], (clean["few_shots"], clean["label_noise"], CLEAN)
            )
            if not own.trained:
                name, kind, share, _ = start
                noise = label_noise.condition(clean["label_noise"])
                untrained.append(f"{name}, {kind}, {share} of the images, {noise} ({own.words})")
            top1 = [Interval(line["top1"], line["top1_half_width"], line["seeds"]).text(1) for line in lines]
            described = ["-" if clean[metric] is None else f"{clean[metric]:.3f}" for metric in MEASURED[:3]]
            live = f"{clean[MEASURED[3]]:.0f} of {clean['dimensions']}"
            rank = clean[EFFECTIVE_RANK]
            table.append([*start, *top1, own.text, *described, live, "-" if rank is None else f"{rank:.2f}"])
            chance_levels = [f"{line['chance_top1']:.1f}" for line in lines]
    nothing = ["-"] * len(DESCRIBED)
    for model in models:
        table += [[model.label, kind, "-", "-", *["diverged"] * len(tests), *nothing] for kind in model.diverged]
    table.append(["chance level", "-", "-", "-", *chance_levels, *nothing])
    text = markdown_table([*HEADER, *tests, *DESCRIBED], table, left=2) + report.untrained(untrained)
    for model in models:
        for reason, diverged in itertools.groupby(model.diverged, key=model.diverged.__getitem__):
            text += f"\n{model.label}, {', '.join(diverged)}: diverged, so that nothing could be measured: {reason}.\n"
    return text


def _gains(models: Sequence[_Model], tests: Sequence[str], learner: str) -> str:
    """A table of gains over each base by the same learner."""
    text = ""
    for base, (width, words) in BASES.items():
        gain = f"gain_over_{base}"
        table = [
            [*start, *(Interval(line[gain], line[width], line["seeds"]).text(1, sign=True) for line in lines)]
            for model in models
            for start, lines in model.by_training(learner)
            if lines[0]["features"] != "raw" and lines[0][gain] is not None
        ]
        if table:
            text += f"\nPoints over the {words} of the same model, paired by seed.\n\n"
            text += markdown_table([*HEADER, *tests], table, left=2)
    return text


def single_corruption(settings: Mapping[str, Any]) -> str | None:
    """What is corrupted under the settings of a column, in words; None if more than one thing is.

    Args:
        settings: few_shots, label_noise and test, as rows have them.
    """
    parts = []
    if noise := settings["label_noise"]:
        parts.append(label_noise.condition(noise))
    if settings["few_shots"] < 1:
        parts.append(f"{100 * settings['few_shots']:g} % of the images")
    if settings["test"] != CLEAN:
        parts.append(settings["test"])
    if len(parts) > 1 or " + " in settings["test"]:
        return None
    return parts[0] if parts else CLEAN


def _dot(line: Line) -> tuple[float, float, float]:
    """Accuracy, half-width and chance level of a line, in percent."""
    return line["top1"], line["top1_half_width"] or 0.0, line["chance_top1"]
