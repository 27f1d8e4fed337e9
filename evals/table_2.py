"""A part of the paper's Table 2 from the rows of a recipe, with differences, training steps and what was printed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

import pandas as pd

from evals.figures import Measure, panel, safety_against_performance, with_paper
from evals.forgetting import KL, LOSS
from evals.forgetting import TASK as FORGETTING
from evals.paper import TABLE_2, TABLE_2_HEADER
from evals.registry import judge_kind
from evals.report import (
    ARMS_BESIDE,
    FIGURE,
    REFUSED,
    cell,
    digits,
    harms,
    measured,
    outcome,
    prompts,
    seeds_and_diverged,
    short_name,
)
from evals.terminal import WIDTH, table_text
from vision_bench.runs import DIVERGED, Interval, Run, markdown_table, paired


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
        columns.append(Measure("KL to the base on neutral text, nats", KL, FORGETTING))
        columns.append(Measure("loss on neutral text, nats", LOSS, FORGETTING))
        certified = dict.fromkeys(self.lines[self.lines["metric"] == "certified_silent"]["task"])
        columns += [Measure(f"silent, {task}, %", "certified_silent", task, factor=100) for task in certified]
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

    def summary(self) -> str:
        """What a terminal shows: a line for each measure beside three arms at most, and what they say in words."""
        columns = [*self.performance, *(column for column in self.columns if column not in self.performance)]
        columns = [column for column in columns if not column.metric.startswith("score_")]  # of single policies
        text = ""
        for some in (self.methods[i : i + ARMS_BESIDE] for i in range(0, len(self.methods), ARMS_BESIDE)):
            body = [[column.title, *(self.cell(column, method) for method in some)] for column in columns]
            text += table_text(f"Table 2, {self.part}", ["", *some], body) + "\n"
        text += "\n".join(textwrap.fill(sentence, WIDTH) for sentence in self._sentences())
        return f"{text}\n{self._diverged()}"

    def _sentences(self) -> list[str]:
        """Where the base and the kinds of adapters stand in the task and in harm, in two sentences."""
        task, zeros = self._standing(self.performance[0]), Measure("", "task_sparsity", factor=100)
        for method in self._named():
            if len(rows := zeros.rows(self._arm(method))):
                task += f"; {100 * rows['value'].mean():.1f} % of the latents of {method} are zero"
        harm = next((harm for harm in self.harms if len(harm.rows(self.lines))), None)
        safety = self._standing(harm) if harm else "No prompts were asked that tell of harm"
        if self.run.config["demonstration"]:
            safety += "; this is a demonstration on a small offline model, which says nothing of large ones"
        return [f"{task}.", f"{safety}."]

    def _named(self) -> list[str]:
        return [method for method in ("base", *self.adapters) if method in self.methods] or self.methods

    def _standing(self, measure: Measure) -> str:
        """The means over seeds of a measure, an arm after the other."""
        name, _, unit = measure.title.partition(", ")
        stand = []
        for method in self._named():
            mean = measure.rows(self._arm(method))["value"].mean()  # NaN where an arm diverged
            value = (
                "no value" if math.isnan(mean) else f"{measure.harm(mean):.{digits(measure.metric)}f} {unit}".strip()
            )
            stand.append(f"{'the base' if method == 'base' else method} has {value}")
        return f"In {name} {', '.join(stand)}"

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
            if measure.metric == "certified_silent" and has_none:
                return "not applicable"
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
            by_count.setdefault(prompts(c.lines(self.lines)), []).append(c.title.partition(", %")[0])
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
                    difference = self.difference(measure, method, other).scaled(measure.factor)
                    scaled = difference.text(digits(measure.metric), sign=True)
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
