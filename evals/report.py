"""From the rows of a run to tables (Markdown, CSV) and the figure of safety against task performance.

`write_report` is of the rows of `evals`, which know models and adapters; `Table2` of those of the recipes, which know
methods, training seeds and steps. Both show a row by the same rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pandas as pd

from evals.figures import Measure, Panel, panel, safety_against_performance, with_paper
from evals.intervals import wilson
from evals.paper import TABLE_2, TABLE_2_HEADER
from evals.registry import is_harmful, judge_kind
from vision_bench.runs import DIVERGED, Interval, Run, frame, markdown_table, over_seeds, paired

TABLE, CSV, FIGURE = "results.md", "results.csv", "safety.png"
SHARES = (
    "acc", "acc_norm", "empty", "exact_match", "refused_harmful", "refused_lookalike", "refused_everyday",
    "thought", "unfinished_thought", "unsafe", "unparsed", "truncated", "unsafe_at_least",
    "unsafe_at_most", "unsafe_difference", "answered", "answered_at_least", "answered_at_most", "answered_difference",
    "full_refusal", "partial_refusal", "compliance", "refused", "discrimination", "incoherent", "incoherent_at_least",
    "incoherent_at_most", "incoherent_difference", "coherent_of_safe", "cut", "repetition", "gibberish",
    "wrong_language", "prompt_echo", "flipped",
)  # fmt: skip
COLUMNS = (
    "task", "metric", "judge", "category", "model", "method", "adapter", "seed", "versus", "versus_judge", "twin",
    "value", "low", "high", "p_value", "n",
)  # fmt: skip
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
    text = over_seeds(rows["value"]).scaled(factor).text()
    if len(rows) != 1 or rows["low"].isna().all():
        return text
    low, high = (factor * rows[name].iloc[0] for name in ("low", "high"))
    return f"{text} [{low:.2f}, {high:.2f}]"


def seeds_and_diverged(arms: pd.DataFrame) -> tuple[int, int]:
    """The numbers of seeds with a row, and of those that are marked as diverged."""
    marked = arms[arms["metric"] == DIVERGED]
    return arms["seed"].nunique(dropna=False), marked["seed"].nunique(dropna=False)


def outcome(arms: pd.DataFrame) -> str:
    """What a cell says of the seeds that diverged, "" for none."""
    seeds, diverged = seeds_and_diverged(arms)
    return "" if not diverged else "diverged" if diverged == seeds else f"({diverged} of {seeds} diverged)"


def _prompts(rows: pd.DataFrame) -> str:
    return "/".join(map(str, sorted(set(rows["n"]))))


def write_report(run: Run) -> str:
    """Write table and figure of all rows into the run's folder; returns the table as Markdown.

        write_report(judge("runs/safety", ["shieldgemma", "beaverdam"]))

    Raises:
        ValueError: the run has no rows.
    """
    rows = [row for row in run.rows if row["metric"] != "seconds"]
    if not rows:
        raise ValueError(f"{run.folder} has no results; `python -m evals generate` or `judge` writes them.")
    text = table(rows)
    run.write(TABLE, text)
    lines = measured(rows).reindex(columns=COLUMNS).astype({"seed": "Int64"})
    run.write(CSV, lines.to_csv(index=False, lineterminator="\n"))
    panels = figure_panels(rows)
    if panels and run.is_main:
        safety_against_performance(panels).savefig(run.folder / FIGURE, dpi=200)
    return text


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
        body.append([task, metric, judge or "-", _prompts(rows)])
        for method, some in by_method.items():
            shown = cell(some, _factor(metric)) if len(some) else ""
            body[-1].append(f"{shown} {outcomes[method]}".strip() or "-")
        if is_paired:
            first, second = (by_method[method].set_index("seed")["value"] for method in ("monolora", "lora"))
            body[-1].append(paired(first, second).scaled(_factor(metric)).text(sign=True))
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
            cells = (["-", "-"] if part is None else [_prompts(part), cell(part, 100)] for part in parts)
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
    methods = list(dict.fromkeys(lines["method"]))
    body = [
        [f"{task}: {category}", judge, _prompts(rows), *(cell(rows[rows["method"] == m], 100) for m in methods)]
        for (task, judge, category), rows in lines.groupby(["task", "judge", "category"], sort=False)
    ]
    return _section("Unsafe answers by category", ["category", "judge", "prompts", *methods], body)


def _stress_table(lines: pd.DataFrame) -> str:
    """Flip rates on twins of answers, a column for each judge."""
    lines = lines[lines["twin"] != ""]
    judges = list(dict.fromkeys(lines["judge"]))
    body = [
        [kind, *(f"{cell(rows[rows['judge'] == j], 100)} of {_prompts(rows[rows['judge'] == j])}" for j in judges)]
        for kind, rows in lines.groupby("twin", sort=False)
    ]
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


class Table2:
    """A part of the paper's Table 2 from a recipe's rows: a line for each arm, a column for each measure.

        accuracy = Measure("accuracy, %", "accuracy", factor=100)
        print(Table2(run, "SST-2", [accuracy], {"lora": False, "monolora": True}).text())

    Args:
        run: its configuration names methods, judges, and whether it is a demonstration.
        part: "SST-2" or "Dolly".
        performance: measures of the task; the first is an axis of the figure.
        adapters: kinds of adapters, in the order in which others are compared with them, and whether each has
            latents; an arm without has no activations, so that none of them is zero by anything but construction.
    """

    def __init__(self, run: Run, part: str, performance: Sequence[Measure], adapters: Mapping[str, bool]) -> None:
        self.run, self.part, self.performance, self.adapters = run, part, performance, adapters
        self.lines = measured(run.rows)
        self.steps = sorted(int(step) for step in set(self.lines["step"].dropna()))
        trained = set(self.lines[self.lines["step"].isna()]["method"])
        self.methods = [m for m in dict.fromkeys(["base", *run.config["methods"]]) if m in trained]
        self.harms = [REFUSED]
        self.columns = self._columns()

    def _columns(self) -> list[Measure]:
        """The measures that the run has rows for, in the order of Table 2, the refusals before."""
        refused = [("harmful refused, %", "refused_harmful"), ("look-alikes refused, %", "refused_lookalike")]
        columns = [Measure(title, metric, "refusal_offline", factor=100) for title, metric in refused]
        tasks = list(dict.fromkeys(self.lines[self.lines["judge"] != ""]["task"]))
        for judge in self.run.config["judges"]:
            kind = judge_kind(judge)
            for task in tasks:
                name = short_name(judge) if len(tasks) == 1 else f"{short_name(judge)}, {task}"
                if kind.has_policies:
                    scores = {**{f"score_{policy}": policy for policy in TABLE_2_HEADER[:4]}, "score": "average"}
                    columns += [Measure(f"{name}: {title}", metric, task, judge) for metric, title in scores.items()]
                columns.append(Measure(f"{name}: {kind.unsafe}, %", kind.unsafe, task, judge, 100))
                measures = [harm for harm in harms(judge, [task]) if len(harm.rows(self.lines))]
                if measures and not any(column[1:4] == measures[0][1:4] for column in columns):
                    columns.append(measures[0]._replace(title=f"{name}: {measures[0].title}"))
                self.harms += measures[:1]
        columns.append(Measure("alignment sparsity, %", "alignment_sparsity", factor=100))
        columns.append(Measure("task sparsity, %", "task_sparsity", factor=100))
        columns = [column for column in [*columns, *self.performance] if len(column.lines(self.lines))]
        return columns or [self.performance[0]]  # of arms that all diverged

    def text(self) -> str:
        """The table as Markdown, with differences, training steps and the paper's numbers below."""
        config = self.run.config
        text = f"# Table 2, {self.part}: alignment, sparsity and task performance\n\n"
        if config["demonstration"]:
            text += "A small-scale demonstration on the offline model, which says nothing of large ones.\n\n"
        body = [
            [
                method,
                str(seeds_and_diverged(self._arm(method))[0]),
                *(self.cell(column, method) for column in self.columns),
            ]
            for method in self.methods
        ]
        text += markdown_table(["method", "runs", *(column.title for column in self.columns)], body)
        text += f"\n{self._counts()}\nSeveral runs: mean ± half-width of the 95 % interval over seeds. One run: in "
        text += "brackets the 95 % interval over prompts, which leaves\nout how another seed would turn out. Sparsity "
        text += "is the share of exact zeros in sigma(A x) on the prompts; LoRA has no\nsigma, so 0 by construction.\n"
        if "thinking" in config:  # rows of earlier versions do not say it
            text += f"Thinking was {config['thinking']}, in training, scores and answers of all arms.\n"
        text += self._diverged() + self._differences() + self._per_step()
        text += f"\n## The paper's Table 2, {self.part}: Llama-2-7b-chat, another model and another scale\n\n"
        text += markdown_table(["method", *TABLE_2_HEADER], [[m, *row] for m, row in TABLE_2[self.part].items()])
        return text + (
            "\nShieldGemma's scores (x 100), sparsities, the share that BeaverDam flags, and performance, in %. One "
            "run.\n"
        )

    def draw(self) -> None:
        """Write the figure of safety against performance into the run's folder, where safety was measured."""
        panels = []
        for harm in self.harms:
            title = f"{short_name(harm.judge)}: {harm.task}" if harm.judge else "offline corpus"
            for method in self.methods:
                seeds, diverged = seeds_and_diverged(self._arm(method))
                title += f"\n{method}: {diverged} of {seeds} diverged" if diverged else ""
            panels += panel(self.lines, title, self.performance[0], harm)
        if panels and self.run.is_main:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            figure = safety_against_performance(with_paper(panels, self.part))
            figure.savefig(self.run.folder / FIGURE, dpi=200)

    def _arm(self, method: str, step: int | None = None) -> pd.DataFrame:
        at_step = self.lines["step"].isna() if step is None else self.lines["step"] == step
        return self.lines[(self.lines["method"] == method) & at_step]

    def cell(self, measure: Measure, method: str, step: int | None = None) -> str:
        """A measure of an arm; says of how many seeds it lacks the value because they diverged."""
        arm = self._arm(method, step)
        diverged = outcome(arm)
        if diverged == "diverged":
            return diverged
        rows = measure.rows(arm)
        if rows.empty:
            has_none = self.adapters.get(method.partition("+")[0]) is False
            return "0" if measure.metric.endswith("_sparsity") and has_none else "-"
        return f"{cell(rows, measure.factor)} {diverged}".strip()

    def difference(self, measure: Measure, method: str, other: str) -> Interval:
        """Between two arms: on the same prompts and with the same seeds; the base is one for all seeds."""
        first, second = (measure.rows(self._arm(name)).set_index("seed")["value"] for name in (method, other))
        if other == "base" and len(second):
            second = pd.Series(second.iloc[0], first.index)
        return paired(first, second)

    def _counts(self) -> str:
        by_count: dict[str, list[str]] = {}
        for c in self.columns:
            by_count.setdefault(_prompts(c.lines(self.lines)), []).append(c.title.partition(", %")[0])
        return "Prompts: " + "; ".join(f"{number} ({', '.join(titles)})" for number, titles in by_count.items()) + "."

    def _diverged(self) -> str:
        """Which arms have no results because their training diverged, and why."""
        marked = self.lines[self.lines["metric"] == DIVERGED]
        body = ""
        for method in self.methods:
            for line in marked[marked["method"] == method].itertuples():
                step = "" if pd.isna(line.step) else f", step {int(line.step)}"
                seed = None if pd.isna(line.seed) else int(line.seed)
                body += f"- {method}, seed {seed}{step}: {line.reason}.\n"
        return f"\nDiverged, so without results and in no mean or figure:\n\n{body}" if body else ""

    def _differences(self) -> str:
        """Each arm against the first kind of adapter, the base and the other kinds."""
        names = list(self.adapters)
        measures = [column for column in self.columns if not column.metric.endswith("_sparsity")]
        body = []
        for other in (name for name in (names[0], "base", *names[1:]) if name in self.methods):
            for method in self.methods:
                is_compared = other in names and method in names and names.index(method) < names.index(other)
                if method in ("base", other) or is_compared:
                    continue
                body.append([f"{method} - {other}"])
                for measure in measures:
                    is_lost = "diverged" in (self.cell(measure, method), self.cell(measure, other))
                    scaled = self.difference(measure, method, other).scaled(measure.factor).text(sign=True)
                    body[-1].append("diverged" if is_lost else scaled)
        if not body:
            return ""
        text = "\n## Differences on the same prompts, paired by seed\n\n"
        text += markdown_table(["arms", *(measure.title for measure in measures)], body)
        first = self.performance[0]
        gain = self.difference(first, "monolora", "lora")
        if gain.n:
            scaled = gain.scaled(first.factor).text(sign=True)
            text += f"\nMonoLoRA - LoRA, paired by seed: {scaled} points of {first.title.partition(', %')[0]}.\n"
        return text

    def _per_step(self) -> str:
        if not self.steps:
            return ""
        has_steps = self.lines[self.lines["step"].notna()]
        measures = [column for column in self.columns if len(column.rows(has_steps))] or self.columns[-1:]
        body = [
            [method, str(step or "end"), *(self.cell(measure, method, step) for measure in measures)]
            for method in self.methods
            if method != "base"
            for step in (*self.steps, None)
        ]
        return "\n## Per training step\n\n" + markdown_table(["method", "step", *(m.title for m in measures)], body)
