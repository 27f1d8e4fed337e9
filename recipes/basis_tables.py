"""Tables and figure of what features gain under corruptions, and what the gains consist of, from rows of runs.

    python -m vision_bench MODEL --features raw unit sae sae_random_basis --output_dir runs/main ...
    python recipes/basis_tables.py --runs runs/main runs/few_shots --rows rows.csv
    python recipes/basis_tables.py --rows rows.csv --output_dir runs/tables

The first of the two writes the rows of runs of `python -m vision_bench` of one model, where at most one thing is
corrupted, into a small file; runs of further learners, kinds of features or corruptions may be beside each other. The
second makes `tables.md` and `gains.png` of such a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vision_bench import figures, gain_parts, kinds, sae
from vision_bench.benchmark import EFFECTIVE_RANK
from vision_bench.benchmark_report import NAMES, single_corruption
from vision_bench.corruptions import CLEAN
from vision_bench.learners import LEARNERS, PROBE, TUNED, metrics_of
from vision_bench.metrics import MEASURED
from vision_bench.report import ProbeTable, learner_title
from vision_bench.runs import ROWS, frame, markdown_table, over_seeds, paired, read_rows, run_as_program, select

CONDITION = ("few_shots", "label_noise", "test")
COLUMNS = ("metric", "features", *CONDITION, "seed", "n", "value")
DESCRIBED = (*MEASURED, EFFECTIVE_RANK, *sae.QUALITY)
# Which features are compared with which, where both are measured.
COMPARISONS = (
    ("unit", "raw"),
    ("sae", "raw"),
    ("sae", "unit"),
    ("sae", "sae_random_basis"),
    ("sae", "sae_frozen_encoder"),
    ("sae", "sae_frozen_decoder"),
    ("sae", "random_relu"),
    ("sae", "pca"),
    ("simclr_head", "raw"),
    ("ncl_head", "raw"),
    ("ncl_head", "unit"),
    ("ncl_head", "simclr_head"),
    ("ncl_head", "ncl_head_random_basis"),
    ("csr", "raw"),
    ("csr", "sae"),
)
OVER_TUNED = ("raw", "unit", "sae", "simclr_head", "ncl_head")  # features compared with tuned probes of raw ones


def collect(folders: Iterable[str | Path]) -> pd.DataFrame:
    """The rows of runs of one model, each once, that tables are made of, with the columns `COLUMNS`.

    Raises:
        ValueError: the runs are of several models.
    """
    wanted = set(DESCRIBED)
    for learner in LEARNERS:
        accuracy, training = metrics_of(learner)
        wanted |= {accuracy, *training}
    lines, models = list[dict[str, Any]](), set[str]()
    for folder in folders:
        for row in read_rows(Path(folder) / ROWS):
            config = row["config"]
            settings = {"few_shots": 1.0, "label_noise": 0.0, "test": CLEAN} | config
            if row["metric"] in wanted and single_corruption(settings) is not None:
                models.add(str(config["model"]))
                lines.append(row | {name: config.get(name) for name in ("features", *CONDITION)})
    if len(models) > 1:
        raise ValueError(f"runs are of {', '.join(sorted(models))}; name those of one model.")
    found = pd.DataFrame(lines, columns=list(COLUMNS))
    return found.drop_duplicates(list(COLUMNS[:-2])).reset_index(drop=True)


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of `collect`, as `ProbeTable` takes them."""
    lines = pd.read_csv(path, dtype={"label_noise": object, "test": object})
    rows = []
    for line in lines.to_dict("records"):
        present = {str(name): value for name, value in line.items() if not pd.isna(value)}
        settings = {name: present[name] for name in ("features", *CONDITION) if name in present}
        if "label_noise" in settings:
            settings["label_noise"] = _number(settings["label_noise"])
        row = {"metric": present["metric"], "n": present["n"], "config": settings}
        rows.append(row | {"seed": present.get("seed"), "value": present.get("value")})
    return rows


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """All tables, as Markdown."""
    found = frame(rows)
    text = "What the features are on the clean test images.\n\n" + _described(found)
    for learner in LEARNERS:
        table = _table(rows, learner)
        if table is None:
            continue
        tuned = _tuned(rows, table, learner)
        columns = list(table.columns)
        text += f"\nTop-1 accuracy, %: {learner_title(learner, False)}.\n\n"
        cells = [[arm, *(table.mean(arm, column).text(1) for column in columns)] for arm in table.arms]
        text += markdown_table(["features", *map(str, columns)], cells)
        text += _differences(table, learner, tuned) + _parts(table, learner, tuned)
        if learner == PROBE:
            trained = [column for column, settings in table.columns.items() if settings["test"] == CLEAN]
            text += table.training_table([str(column) for column in trained], trained)
    return text


def _table(rows: Sequence[Mapping[str, Any]], learner: str) -> ProbeTable | None:
    """The accuracies of a learner, None if there are none."""
    accuracy, training = metrics_of(learner)
    own = [row for row in rows if row["metric"] in {accuracy, *training}]
    columns: dict[Hashable, dict[str, Any]] = {}
    for row in own:
        if row["metric"] == accuracy:
            settings = {name: row["config"][name] for name in CONDITION}
            columns.setdefault(single_corruption(settings), settings)
    arms = _in_order(row["config"]["features"] for row in own)
    return ProbeTable(own, columns, arms, learner=learner) if columns else None


def _described(found: pd.DataFrame) -> str:
    """What each kind of features is on the clean test images; latents have more cells."""
    cells = []
    clean = found[found["test"].isna() | (found["test"] == CLEAN)]
    for kind in _in_order(found["features"]):
        values = [over_seeds(select(clean, metric, features=kind)["value"]) for metric in DESCRIBED]
        digits = [0 if metric in (MEASURED[3], sae.QUALITY[1]) else 3 for metric in DESCRIBED]
        cells.append([kind, *(value.text(places) for value, places in zip(values, digits, strict=True))])
    return markdown_table(["features", *(name.replace("_", " ") for name in DESCRIBED)], cells)


def _differences(table: ProbeTable, learner: str, tuned: ProbeTable | None) -> str:
    """Points of each comparison in each condition, paired by seed; with `tuned`, also over tuned probes of raw."""
    columns = list(table.columns)
    cells = [
        [f"{arm} - {over}", *(table.gain(arm, column, over).text(1, sign=True) for column in columns)]
        for arm, over in COMPARISONS
        if {arm, over} <= set(table.arms)
    ]
    if tuned is not None:
        for arm in (kind for kind in OVER_TUNED if kind in table.arms):
            gains = [paired(table.points(arm, column), tuned.points("raw", column)) for column in columns]
            cells.append([f"{arm} - tuned raw", *(gain.text(1, sign=True) for gain in gains)])
    if not cells:
        return ""
    text = f"\nPoints of accuracy by which features differ, {learner}, paired by seed.\n\n"
    return text + markdown_table(["difference", *map(str, columns)], cells)


def _parts(table: ProbeTable, learner: str, tuned: ProbeTable | None) -> str:
    """What gains over raw features consist of."""
    if not gain_parts.explained_kinds(table.arms, NAMES):
        return ""
    columns = {str(column): column for column in table.columns}
    text = f"\nWhat gains over raw features consist of, {learner}.\n\n"
    is_equivariant = LEARNERS[learner].is_equivariant(False)
    return text + gain_parts.markdown(table, columns, NAMES, tuned, is_equivariant=is_equivariant)


def _tuned(rows: Sequence[Mapping[str, Any]], table: ProbeTable, learner: str) -> ProbeTable | None:
    """Tuned probes, with the columns of a table of probes, if they were measured in any of these."""
    tuned = _table(rows, TUNED) if learner == PROBE else None
    if tuned is None:
        return None
    return ProbeTable(rows, table.columns, tuned.arms, learner=TUNED)


def _in_order(features: Iterable[str]) -> list[str]:
    """Kinds of features, each once, in the order of `kinds.KINDS`, a twin behind its kind."""
    order = list(kinds.KINDS)
    return sorted(set(features), key=lambda name: (order.index(name.removesuffix(kinds.RANDOM_BASIS)), name))


def _number(text: str) -> float | str:
    """A share of wrong labels, or the name of another noise."""
    try:
        return float(text)
    except ValueError:
        return text


def main() -> None:
    """Write the file of rows, or the tables and the figure of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True, metavar="FILE", help="the file of rows")
    parser.add_argument("--runs", nargs="+", metavar="FOLDER", help="folders whose rows are written into the file")
    parser.add_argument("--output_dir", help="gets tables.md and gains.png")
    arguments = parser.parse_args()
    if arguments.runs:
        collect(arguments.runs).to_csv(arguments.rows, index=False, float_format="%.6g", lineterminator="\n")
    rows = read(arguments.rows)
    if arguments.output_dir is None:
        return
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text(tables(rows), encoding="utf-8")
    table = _table(rows, PROBE)
    if table is not None and gain_parts.explained_kinds(table.arms, NAMES):
        columns = {str(column): column for column in table.columns}
        panels = gain_parts.dots(table, columns, NAMES, _tuned(rows, table, PROBE))
        figures.save(folder / "gains", figures.gain_dots(panels, "linear probes"))


if __name__ == "__main__":
    run_as_program(main)
