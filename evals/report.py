"""From the rows of a run to tables (Markdown, CSV) and the figure of safety against task performance.

Rows of `evals` know models and adapters; for those of the recipes, which know methods, training seeds and steps, there
is `evals.table_2`, which shows a row by the same rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pandas as pd

from evals.figures import Measure, Panel, panel, safety_against_performance, with_paper
from evals.forgetting import KL, LOSS, LOSS_DIFFERENCE
from evals.intervals import wilson
from evals.registry import is_harmful, judge_kind
from evals.terminal import table_text
from vision_bench.runs import DIVERGED, Run, frame, markdown_table, over_seeds, paired

TABLE, CSV, FIGURE = "results.md", "results.csv", "safety.png"
SHARES = (
    "acc", "acc_norm", "empty", "exact_match", "refused_harmful", "refused_lookalike", "refused_everyday",
    "thought", "unfinished_thought", "unsafe", "unparsed", "truncated", "unsafe_at_least",
    "unsafe_at_most", "unsafe_difference", "answered", "answered_at_least", "answered_at_most", "answered_difference",
    "full_refusal", "partial_refusal", "compliance", "refused", "discrimination", "incoherent", "incoherent_at_least",
    "incoherent_at_most", "incoherent_difference", "coherent_of_safe", "cut", "repetition", "gibberish",
    "wrong_language", "prompt_echo", "flipped", "certified_silent",
)  # fmt: skip
COLUMNS = (
    "task", "metric", "judge", "category", "model", "method", "adapter", "seed", "versus", "versus_judge", "twin",
    "value", "low", "high", "p_value", "n",
)  # fmt: skip
ARMS_BESIDE = 3  # in a table of 100 columns
NATS = (KL, LOSS, LOSS_DIFFERENCE)  # per token, of which a hundredth is much
# Settings of rows of a part of the prompts, or of two arms.
_PARTS = ["category", "versus", "versus_adapter", "versus_judge", "twin"]
PAPER_PROMPTS = "beavertails_eval"  # on which a judge's own measure of harm is shown
# Of each kind, the figure takes the first that the rows have.
PERFORMANCES = {
    Measure("SST-2 accuracy, %", "acc", "sst2_instruct", factor=100): "SST-2",
    Measure("accuracy on generated reviews, %", "acc", "sentiment_offline", factor=100): "SST-2",
    Measure("Dolly, ROUGE-L", "rougeL", "dolly"): "Dolly",
}
JUDGED_TASKS = (PAPER_PROMPTS, "advbench", "refusal_offline")
REFUSED = Measure("harmful requests not refused, %", "refused_harmful", "refusal_offline", factor=100, is_refusal=True)


def harms(judge: str, tasks: Iterable[str]) -> list[Measure]:
    """What stands for harm in a judge's rows of tasks: on the paper's prompts its own measure, else unsafe answers."""
    kind = judge_kind(judge)
    if not kind.is_of_harm:
        return []
    measures = [Measure(f"judged {kind.unsafe}, %", kind.unsafe, task, judge, 100) for task in tasks]
    of_paper = Measure(
        kind.harm_label, kind.harm_metric, PAPER_PROMPTS, judge, 100 if kind.harm_metric in SHARES else 1
    )
    return [of_paper, *measures] if PAPER_PROMPTS in tasks else measures


def short_name(judge: str) -> str:
    """KIND, or KIND=MODEL without the model's folder or owner."""
    kind, sign, model = judge.partition("=")
    return kind + sign + Path(model).name


def bounds(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """95 % interval over the row's prompts: the row's own, Wilson's for a share, None for others.

    It leaves out what another training seed would give.
    """
    config, metric = row["config"], row["metric"].partition(" (")[0]
    if config.get("low") is not None and config.get("high") is not None:
        return config["low"], config["high"]
    is_share = metric in SHARES or (metric == "accuracy" and not config.get("task"))  # that of the recipe
    if not is_share or row["value"] is None:
        return None
    return wilson(round(row["value"] * row["n"]), row["n"])


def measured(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A line for each row, with its `bounds` as low and high and "" where it has no task, judge or adapter.

    Of those that are equal but for their value, as of a task that was asked for by itself and in a group, the first.
    """
    table = frame(rows)
    for name in (*COLUMNS, *_PARTS, "step", "reason"):
        if name not in table:
            table[name] = None
    table[["low", "high"]] = pd.DataFrame([bounds(row) or (None, None) for row in rows], table.index, dtype=float)
    texts = ["task", "judge", "adapter", *_PARTS]
    table[texts] = table[texts].astype(object).fillna("")
    table["is_part"] = (table[_PARTS] != "").any(axis=1)
    names = ("model", "adapter", "method", "step")
    table["arm"] = [str([row["seed"], *(row["config"].get(name) for name in names)]) for row in rows]
    return table.drop_duplicates(["arm", "metric", "task", "judge", *_PARTS])


def cell(rows: pd.DataFrame, factor: int) -> str:
    """Mean and interval over seeds, or of one seed the interval over prompts in brackets; "-" without a value."""
    rows = rows[rows["value"].notna()]
    places = digits(str(rows["metric"].iloc[0])) if len(rows) else 2
    text = over_seeds(rows["value"]).scaled(factor).text(places)
    if len(rows) != 1 or rows["low"].isna().all():
        return text
    low, high = (factor * rows[name].iloc[0] for name in ("low", "high"))
    return f"{text} [{low:.{places}f}, {high:.{places}f}]"


def seeds_and_diverged(arms: pd.DataFrame) -> tuple[int, int]:
    """The numbers of seeds with a row, and of those that are marked as diverged."""
    marked = arms[arms["metric"] == DIVERGED]
    return arms["seed"].nunique(dropna=False), marked["seed"].nunique(dropna=False)


def outcome(arms: pd.DataFrame) -> str:
    """What a cell says of the seeds that diverged, "" for none."""
    seeds, diverged = seeds_and_diverged(arms)
    return "" if not diverged else "diverged" if diverged == seeds else f"({diverged} of {seeds} diverged)"


def prompts(rows: pd.DataFrame) -> str:
    """The numbers of prompts behind rows, "200" or "100/200"."""
    return "/".join(map(str, sorted(set(rows["n"]))))


def write_report(run: Run) -> str:
    """Write table and figure of all rows into the run's folder; returns the table as Markdown.

        write_report(judge("runs/safety", ["shieldgemma", "beaverdam"]))

    Raises:
        ValueError: the run has no rows.
    """
    rows = _shown(run)
    text = table(rows)
    run.write(TABLE, text)
    lines = measured(rows).reindex(columns=COLUMNS).astype({"seed": "Int64"})
    run.write(CSV, lines.to_csv(index=False, lineterminator="\n"))
    panels = figure_panels(rows)
    if panels and run.is_main:
        safety_against_performance(panels).savefig(run.folder / FIGURE, dpi=200)
    return text


def summary(run: Run) -> str:
    """What a terminal shows of a run: a table for each task and judge, a line for each metric, three arms beside it.

    Raises:
        ValueError: the run has no rows.
    """
    every = measured(_shown(run))
    order = list(dict.fromkeys(every["method"]))
    text = ""
    for (model, task, judge), lines in every[~every["is_part"] & (every["metric"] != DIVERGED)].groupby(
        ["model", "task", "judge"], sort=False
    ):
        methods = sorted(set(lines["method"]), key=order.index)
        for some in (methods[i : i + ARMS_BESIDE] for i in range(0, len(methods), ARMS_BESIDE)):
            body = [
                [metric, prompts(rows), *(cell(rows[rows["method"] == m], _factor(metric)) for m in some)]
                for metric, rows in lines[lines["method"].isin(some)].groupby("metric", sort=False)
            ]
            title = f"{Path(model).name}: {task}" + (f", judged by {short_name(judge)}" if judge else "")
            text += table_text(title, ["metric", "prompts", *some], body) + "\n"
    diverged = every[every["metric"] == DIVERGED].itertuples()
    text += "".join(f"{line.adapter or 'The base model'} diverged: {line.reason}.\n" for line in diverged)
    return f"{text}Shares in percent, 95 % intervals in brackets. Comparisons and categories: {run.folder / TABLE}"


def _shown(run: Run) -> list[dict[str, Any]]:
    rows = [row for row in run.rows if row["metric"] != "seconds"]
    if not rows:
        raise ValueError(f"{run.folder} has no results; `python -m evals generate` or `judge` writes them.")
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: a line for each task, metric and judge, a column for each method."""
    every = measured(rows)
    text = "# Safety and task performance\n"
    for model, lines in every.groupby("model", sort=False):
        text += (
            f"\n## {model}\n\n"
            + _arms_table(lines)
            + refusal_table(lines)
            + _paired_table(lines)
            + _agreement_table(lines)
        )
        text += _category_table(lines) + _stress_table(lines)
        for line in lines[lines["metric"] == DIVERGED].itertuples():
            text += f"\n{line.adapter or 'The base model'} diverged: {line.reason}.\n"
    modes = sorted({str(row["config"]["thinking"]) for row in rows if "thinking" in row["config"]})
    if modes:
        text += f"\nThinking was {' and '.join(modes)}, for all arms; thoughts are neither judged nor scored.\n"
    return text + (
        "\nShares in percent. One seed: the 95 % interval over prompts in brackets, which leaves out how another "
        "training seed would turn out.\nSeveral seeds: mean ± half-width of the 95 % interval over seeds, differences "
        "paired by seed.\n"
    )


def digits(metric: str) -> int:
    """The digits behind the point that tables show of a metric."""
    return 4 if metric in NATS else 2


def _factor(metric: str) -> int:
    return 100 if metric.partition(" (")[0] in SHARES else 1


def _arms_table(lines: pd.DataFrame) -> str:
    """A line for each task, metric and judge, a column for each method, and the paper's comparison."""
    lines = lines[~lines["is_part"]]
    methods = list(dict.fromkeys(lines["method"]))
    outcomes = {method: outcome(rows) for method, rows in lines.groupby("method")}
    is_paired = {"lora", "monolora"} <= set(methods)
    body = []
    for (task, metric, judge), rows in lines[lines["metric"] != DIVERGED].groupby(
        ["task", "metric", "judge"], sort=False
    ):
        by_method = {method: rows[rows["method"] == method] for method in methods}
        body.append([task, metric, judge or "-", prompts(rows)])
        for method, some in by_method.items():
            shown = cell(some, _factor(metric)) if len(some) else ""
            body[-1].append(f"{shown} {outcomes[method]}".strip() or "-")
        if is_paired:
            first, second = (by_method[method].set_index("seed")["value"] for method in ("monolora", "lora"))
            body[-1].append(paired(first, second).scaled(_factor(metric)).text(digits(metric), sign=True))
    header = ["task", "metric", "judge", "prompts", *methods, *(["monolora - lora"] if is_paired else [])]
    return markdown_table(header, body)


def _paired_table(lines: pd.DataFrame) -> str:
    """Differences between arms on the same prompts, of one training seed each."""
    body = [
        [
            line.task, line.metric, line.judge, f"{line.method} - {line.versus}",
            "-" if pd.isna(line.seed) else str(int(line.seed)), str(line.n),
            cell(lines.loc[[line.Index]], _factor(line.metric)),
            "-" if pd.isna(line.p_value) else f"{line.p_value:.2g}",
        ]
        for line in lines[lines["versus"] != ""].itertuples()
    ]  # fmt: skip
    header = ["task", "metric", "judge", "arms", "seed", "prompts", "difference", "McNemar's p"]
    return _section("Differences on the same prompts", header, body)


def refusal_table(lines: pd.DataFrame) -> str:
    """Harmful prompts answered beside harmless prompts refused: neither says anything without the other."""
    keys = list(zip(lines["task"], lines["category"], strict=True))
    lines = lines.assign(harm=[is_harmful(*key) for key in keys])
    # Of a task of both kinds of prompts its categories, of another one the whole.
    is_whole = pd.Series([(is_harmful(task, "") is None) == (category != "") for task, category in keys], lines.index)
    lines = lines[is_whole | (lines["metric"] == "discrimination")]
    lines = lines[(lines["versus"] == "") & (lines["judge"] != "")]
    body = []
    for (judge, task, method), rows in lines.groupby(["judge", "task", "method"], sort=False):
        chosen = (
            rows[(rows["metric"] == "answered") & (rows["harm"].eq(True))],
            rows[(rows["metric"] == "refused") & (rows["harm"].eq(False))],
            rows[rows["metric"] == "discrimination"],
        )
        for parts in zip_longest(*([part for _, part in some.groupby("category", sort=False)] for some in chosen)):
            cells = (["-", "-"] if part is None else [prompts(part), cell(part, 100)] for part in parts)
            body.append([task, judge, method, *chain.from_iterable(cells)])
    header = ["task", "judge", "arm", "harmful", "answered", "harmless", "refused", "pairs", "difference"]
    return _section("Harmful compliance and over-refusal", header, body)


def _agreement_table(lines: pd.DataFrame) -> str:
    body = [
        [line.task, line.judge, line.versus_judge, str(line.n), cell(lines.loc[[line.Index]], 1)]
        for line in lines[lines["versus_judge"] != ""].itertuples()
    ]
    return _section("Agreement of judges", ["task", "judge", "other judge", "answers", "Cohen's kappa"], body)


def _category_table(lines: pd.DataFrame) -> str:
    """Share of unsafe outcomes by the prompts' category, a column for each method; seeds are averaged."""
    shares = [kind.unsafe if kind.is_of_harm else "" for kind in map(judge_kind, lines["judge"])]
    lines = lines[(lines["category"] != "") & (lines["metric"] == shares)]
    asks = [is_harmful(task, category) for task, category in zip(lines["task"], lines["category"], strict=True)]
    is_of_refusals = lines["metric"] == "answered"  # that harmless prompts are answered is not unsafe
    lines = lines[~(is_of_refusals & pd.Series([ask is False for ask in asks], lines.index, dtype=bool))]
    methods = list(dict.fromkeys(lines["method"]))
    body = [
        [f"{task}: {category}", judge, prompts(rows), *(cell(rows[rows["method"] == m], 100) for m in methods)]
        for (task, judge, category), rows in lines.groupby(["task", "judge", "category"], sort=False)
    ]
    return _section("Unsafe answers by category", ["category", "judge", "prompts", *methods], body)


def _stress_table(lines: pd.DataFrame) -> str:
    """Flip rates on twins of answers, a column for each judge."""
    lines = lines[lines["twin"] != ""]
    judges = list(dict.fromkeys(lines["judge"]))
    body = []
    for kind, rows in lines.groupby("twin", sort=False):
        of_judges = [rows[rows["judge"] == judge] for judge in judges]
        body.append([kind, *(f"{cell(some, 100)} of {prompts(some)}" for some in of_judges)])
    return _section("Verdicts that flip on twins of answers", ["twin", *judges], body)


def _section(title: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return f"\n### {title}\n\n{markdown_table(header, body)}" if body else ""


def figure_panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """A panel for each judge with a point for each method and seed, and the paper's beside; empty if there are none.

    On the paper's prompts a judge's panel has its own measure of harm, as `evals.registry.JUDGES` names it. Rows
    without a judge show the offline model's refusals of harmful requests.
    """
    lines = measured(rows)
    performance = next((p for p in PERFORMANCES if len(p.rows(lines))), None)
    if performance is None:
        return []
    panels = []
    for judge in dict.fromkeys(lines["judge"]):
        measures = harms(judge, JUDGED_TASKS) if judge else [REFUSED]
        harm = next((harm for harm in measures if len(harm.rows(lines))), None)
        if harm is not None:
            panels += panel(lines, f"{judge or 'this run'}: {harm.task}", performance, harm)
    return with_paper(panels, PERFORMANCES[performance])
