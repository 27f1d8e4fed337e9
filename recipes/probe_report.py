"""The reports of the recipes that probe frozen features: tables of each learner, and what explains them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from probing import FEATURES, autoencoders

from vision_bench import figures, gain_parts, label_noise, sae
from vision_bench.learners import LEARNERS, PROBE, TUNED
from vision_bench.report import TRAINING_NOTE, Comparison, ProbeTable, learner_title, unexplained
from vision_bench.runs import Run, interval, over_seeds, select

RANDOM = ("poly_unit", "random_relu")  # what sae and ncl must beat to have gained by what they learnt
NAMES = gain_parts.RawNames("poly", "poly_unit")


def where_there_is_one(run: Run, metric: str, name: str, digits: int) -> str:
    """Mean over seeds, signed, of a metric that a seed may have no value of: "-" if none has, else how many have."""
    rows, seeds = run.find(metric, features=name), len(run.config["seeds"])
    if not rows:
        return "-"
    few = f" ({len(rows)} of {seeds} seeds)" if len(rows) < seeds else ""
    return interval([row["value"] for row in rows]).text(digits, sign=True) + few


def probe_table(run: Run, columns: Mapping[Any, Mapping[str, Any]], arms: Sequence[str] | None = None) -> ProbeTable:
    """The accuracies of a run, with gains of each arm over poly, and of sae and ncl over the random controls."""
    arms = run.config["arms"] if arms is None else arms
    comparisons = [Comparison(name, name, "poly") for name in arms if name != "poly"]
    comparisons += [Comparison(f"{n} over {o}", n, o) for n in FEATURES[1:] for o in RANDOM if {n, o} <= set(arms)]
    return ProbeTable(run.rows, columns, arms, comparisons)


def over(config: Mapping[str, Any]) -> str:
    """Say what the intervals of a table are over."""
    shared = config["shared_pretraining"]
    varied = "probes and noise, the models are the same" if shared else "pretraining, noise and probes"
    return f"Mean ± half-width of the 95 % interval over {len(config['seeds'])} seeds ({varied})."


def columns_in_words(table: ProbeTable, columns: Iterable[Hashable]) -> dict[str, Hashable]:
    """The columns by what their settings are."""

    def words(name: str, value: Any) -> str:
        return label_noise.condition(value) if name == "noise_rate" else f"{name.replace('_', ' ')} {value}"

    return {", ".join(words(*setting) for setting in table.columns[column].items()): column for column in columns}


def draw_gain_parts(run: Run, table: ProbeTable, columns: Iterable[Hashable]) -> None:
    """Draw what the gains consist of, if the twins of features are among the arms."""
    tuned = tables_of(run, table).get(TUNED)
    if panels := gain_parts.dots(table, columns_in_words(table, columns), NAMES, tuned):
        figures.save(run.folder / "gain_parts", figures.gain_dots(panels, "linear probes"))


def notes(run: Run, table: ProbeTable, columns: Sequence[Hashable]) -> str:
    """Explain the tables of probes, as Markdown; `columns` are those of all tables of accuracies, in their order.

    Before stands what the gains consist of, if the twins of features are among the arms.
    """
    config = run.config
    parts = ""
    if gain_parts.explained_kinds(table.arms, NAMES):
        shown, equivariant = columns_in_words(table, columns), not config["standardize"]
        parts = "\n## What the gains over poly consist of\n\n"
        tuned = tables_of(run, table).get(TUNED)
        parts += gain_parts.markdown(table, shown, NAMES, tuned, is_equivariant=equivariant)
    qualities = {
        name: [
            over_seeds(select(table.rows, metric, features=None if name == "sae" else name)["value"])
            for metric in sae.QUALITY
        ]
        for name in autoencoders(table.arms)
    }
    unscaled = "The scale of features decides how far these probes come (rescale: false).\n"
    by_column = (table.decays[column] for column in columns)
    decays = ", ".join(f"{by_arm['poly_decay']:g}" for by_arm in by_column if "poly_decay" in by_arm)
    return parts + (
        f"\n{over(config)}\n"
        "The paper's numbers are of another scale (ResNet-18, 200 epochs, 16384-2048 projector) unless that is what\n"
        "was run here. Consistency, sparsity and live dimensions are of the clean test images; chance is the\n"
        "consistency with shuffled labels. A consistency means little without the sparsity beside it.\n"
        f"poly_decay takes the best of {len(config['decays'])} weight decays for each column on the test labels\n"
        f"themselves, which favours it (those it took, column after column of all tables: {decays});\n"
        "poly_unit, random_relu, random_mask: see vision_bench/kinds.py.\n"
        f"{TRAINING_NOTE}{unscaled * (not config['rescale'])}"
        + "".join(
            "{} on test images: FVU {}, L0 {}, dead {}.\n".format(
                "SAE" if name == "sae" else name, *(interval.text(3) for interval in quality)
            )
            for name, quality in qualities.items()
        )
        + unexplained({name: quality[0].mean for name, quality in qualities.items()})
        + "".join(_of_learner(run, table, columns, name) for name in learners_of(config)[1:])
    )


def learners_of(config: Mapping[str, Any]) -> list[str]:
    """The learners of a run, the linear probe first; recipes that do not let one choose have it alone."""
    return [PROBE, *(name for name in config.get("learners", ()) if name != PROBE)]


def tables_of(run: Run, table: ProbeTable) -> dict[str, ProbeTable]:
    """The table of linear probes, and a table like it of each other learner, by name; poly_decay is of the former."""
    arms = [arm for arm in table.arms if arm != "poly_decay"]
    comparisons = [one for one in table.comparisons if {one.arm, one.over} <= set(arms)]
    others = learners_of(run.config)[1:]
    return {PROBE: table} | {
        name: ProbeTable(run.rows, table.columns, arms, comparisons, learner=name) for name in others
    }


def _of_learner(run: Run, table: ProbeTable, columns: Sequence[Hashable], name: str) -> str:
    """The tables of a learner other than the linear probe, whose table is given, as Markdown."""
    own, shown = tables_of(run, table)[name], columns_in_words(table, columns)
    equivariant = LEARNERS[name].is_equivariant(run.config["standardize"])
    text = f"\n## {learner_title(name, run.config['standardize'])}\n\nTop-1 accuracy on the test images, %.\n\n"
    text += own.accuracy_table([*shown], [*shown.values()])
    text += f"\nPoints gained over poly, paired by seed.\n\n{own.gain_table([*shown], [*shown.values()])}"
    if gain_parts.explained_kinds(own.arms, NAMES):
        text += f"\n{gain_parts.markdown(own, shown, NAMES, is_equivariant=equivariant)}"
    return text
