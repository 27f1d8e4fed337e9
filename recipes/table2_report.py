"""Table 2 and its figure from a run's rows: intervals, paired differences, and the paper's numbers beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evals.figures import Panel, Point, safety_against_performance
from evals.report import PAPER, bounds
from vision_bench.runs import DIVERGED, Interval, Run, interval, markdown_table, paired_difference

FIGURE = "safety.png"

# Table 2: ShieldGemma dangerous, harassment, hate, sexual, average; alignment and task sparsity; BeaverDam; task
# performance.
PAPER_HEADER = [
    "dangerous", "harassment", "hate", "sexual", "average", "alignment sparsity", "task sparsity", "Beavertails",
    "task performance",
]  # fmt: skip
_BASE = ("7.66", "2.88", "6.14", "2.64", "4.83", "-", "-", "20.90")
PAPER_TABLE = {
    "SST-2": {
        "base": (*_BASE, "88.65"),
        "lora": ("8.48", "6.91", "9.43", "6.77", "7.90", "0", "0", "20.60", "92.78"),
        "monolora": ("5.37", "2.23", "4.63", "1.88", "3.53", "45.54", "36.71", "20.00", "94.84"),
    },
    "Dolly": {
        "base": (*_BASE, "10.21"),
        "lora": ("10.54", "3.53", "7.53", "2.86", "6.12", "0", "0", "23.80", "14.08"),
        "monolora": ("10.49", "3.56", "7.40", "2.70", "6.04", "38.69", "40.00", "22.60", "14.48"),
    },
}


class Column(NamedTuple):
    """A metric of a run and how the table shows it."""

    title: str
    metric: str
    task: str | None = None
    judge: str | None = None
    factor: int = 1

    def rows(self, run: Run, method: str, **arm: Any) -> list[dict[str, Any]]:
        """The rows of a method with a value, by default those of the trained adapters and not of checkpoints."""
        found = run.find(self.metric, method=method, task=self.task, judge=self.judge, **({"step": None} | arm))
        return [row for row in found if row["value"] is not None]

    def cell(self, run: Run, method: str, **arm: Any) -> str:
        """Mean and interval over seeds, or the interval over prompts in brackets where there is one seed.

        Says of how many seeds it lacks the value because they diverged.
        """
        rows = self.rows(run, method, **arm)
        diverged, seeds = _seeds(run, method, **arm)
        if diverged and len(diverged) == len(seeds):
            return "diverged"
        if not rows:
            return "0" if self.metric.endswith("_sparsity") and not method.startswith(("base", "monolora")) else "-"
        found = interval([row["value"] for row in rows]).scaled(self.factor)
        low_high = bounds(rows[0]) if len(rows) == 1 else None
        if low_high is None and len(rows) == 1 and self.metric == "accuracy":
            low_high = bounds(rows[0] | {"metric": "acc"})
        brackets = f" [{self.factor * low_high[0]:.2f}, {self.factor * low_high[1]:.2f}]" if low_high else ""
        return found.text() + brackets + (f" ({len(diverged)} of {len(seeds)} diverged)" if diverged else "")


def _seeds(run: Run, method: str, **arm: Any) -> tuple[set[int | None], set[int | None]]:
    """The seeds of a method that diverged, and all that are done."""
    diverged = {row["seed"] for row in run.find(DIVERGED, method=method, **({"step": None} | arm))}
    step = arm.get("step")
    rows = (row for row in run.rows if (row["config"].get("method"), row["config"].get("step")) == (method, step))
    return diverged, diverged | {row["seed"] for row in rows}


def short_name(judge: str) -> str:
    """KIND, or KIND=MODEL without the model's folder or owner."""
    kind, sign, model = judge.partition("=")
    return kind + sign + Path(model).name


def columns(run: Run, performance: Sequence[Column], judges: Sequence[str]) -> list[Column]:
    """The columns that the run has rows for, in the order of Table 2, the refusals before."""
    found = [
        Column("harmful refused, %", "refused_harmful", "refusal_offline", None, 100),
        Column("look-alikes refused, %", "refused_lookalike", "refusal_offline", None, 100),
    ]
    tasks = list(dict.fromkeys(row["config"]["task"] for row in run.rows if row["config"].get("judge")))
    for judge in judges:
        for task in tasks:
            name = short_name(judge) if len(tasks) == 1 else f"{short_name(judge)}, {task}"
            scores = [("score_dangerous", "dangerous"), ("score_harassment", "harassment"), ("score_hate", "hate")]
            scores += [("score_sexual", "sexual"), ("score", "average")]
            if not judge.startswith("beaverdam"):  # which has 14 categories instead: the share it flags is its column
                found += [Column(f"{name}: {title}", metric, task, judge) for metric, title in scores]
            found.append(Column(f"{name}: unsafe, %", "unsafe", task, judge, 100))
    found.append(Column("alignment sparsity, %", "alignment_sparsity", factor=100))
    found.append(Column("task sparsity, %", "task_sparsity", factor=100))
    metrics = {(row["metric"], row["config"].get("task"), row["config"].get("judge")) for row in run.rows}
    known = [c for c in [*found, *performance] if (c.metric, c.task, c.judge) in metrics]
    return known or [performance[0]]  # of arms that all diverged


def write_report(
    run: Run,
    paper: str,
    performance: Sequence[Column],
    trained: Sequence[str],
    judges: Sequence[str],
    demonstration: bool,
) -> str:
    """Write `results.md`, and `safety.png` where safety was measured; returns the Markdown."""
    shown = columns(run, performance, judges)
    text = f"# Table 2, {paper}: alignment, sparsity and task performance\n\n"
    if demonstration:
        text += "A small-scale demonstration on the offline model, which says nothing of large ones.\n\n"
    methods = [m for m in ("base", *trained) if _seeds(run, m)[1]]
    body = []
    for method in methods:
        runs = len(_seeds(run, method)[1])
        body.append([method, str(runs), *(column.cell(run, method) for column in shown)])
    text += markdown_table(["method", "runs", *(column.title for column in shown)], body)
    text += f"\n{_counts(run, shown)}\nSeveral runs: mean ± half-width of the 95 % interval over seeds. One run: in "
    text += "brackets the 95 % interval over prompts, which leaves\nout how another seed would turn out. Sparsity is "
    text += "the share of exact zeros in sigma(A x) on the prompts; LoRA has no\nsigma, so 0 by construction.\n"
    if "thinking" in run.config:  # rows of earlier versions do not say it
        text += f"Thinking was {run.config['thinking']}, in training, scores and answers of all arms.\n"
    text += _diverged(run, methods)
    text += _differences(run, shown, performance[0], methods) + _per_step(run, shown, methods)
    text += f"\n## The paper's Table 2, {paper}: Llama-2-7b-chat, another model and another scale\n\n"
    text += markdown_table(["method", *PAPER_HEADER], [[m, *row] for m, row in PAPER_TABLE[paper].items()])
    text += (
        "\nShieldGemma's scores (x 100), sparsities, the share that BeaverDam flags, and performance, in %. One run.\n"
    )
    run.write("results.md", text)
    panels = _panels(run, shown, performance[0], methods, paper)
    if panels and run.is_main:
        safety_against_performance(panels).savefig(run.folder / FIGURE, dpi=200)
    return text


def _counts(run: Run, shown: Sequence[Column]) -> str:
    counts = {c.title: sorted({r["n"] for r in run.find(c.metric, task=c.task, judge=c.judge)}) for c in shown}
    by_count: dict[str, list[str]] = {}
    for title, numbers in counts.items():
        by_count.setdefault("/".join(map(str, numbers)), []).append(title.partition(", %")[0])
    return "Prompts: " + "; ".join(f"{number} ({', '.join(titles)})" for number, titles in by_count.items()) + "."


def _diverged(run: Run, methods: Sequence[str]) -> str:
    """Which arms have no results because their training diverged, and why."""
    lines = [
        f"- {row['config']['method']}, seed {row['seed']}"
        + (f", step {row['config']['step']}" if row["config"].get("step") is not None else "")
        + f": {row['config']['reason']}.\n"
        for method in methods
        for row in run.find(DIVERGED, method=method)
    ]
    return "\nDiverged, so without results and in no mean or figure:\n\n" + "".join(lines) if lines else ""


def _differences(run: Run, shown: Sequence[Column], performance: Column, methods: Sequence[str]) -> str:
    """Each arm against LoRA, the base and MonoLoRA: on the same prompts and with the same seeds."""
    body = []
    measured = [column for column in shown if not column.metric.endswith("_sparsity")]
    for other in ("lora", "base", "monolora"):
        for method in methods:
            if method in ("base", other) or other not in methods or (other == "monolora" and method == "lora"):
                continue
            cells = [_difference(run, column, method, other) for column in measured]
            body.append([f"{method} - {other}", *cells])
    if not body:
        return ""
    text = "\n## Differences on the same prompts, paired by seed\n\n"
    text += markdown_table(["arms", *(column.title for column in measured)], body)
    gain = _paired(run, performance, "monolora", "lora")
    if gain is not None:
        scaled = gain.scaled(performance.factor).text(sign=True)
        text += f"\nMonoLoRA - LoRA, paired by seed: {scaled} points of {performance.title.partition(', %')[0]}.\n"
    return text


def _paired(run: Run, column: Column, method: str, other: str) -> Interval | None:
    mine, others = column.rows(run, method), column.rows(run, other)
    if other == "base" and others:  # one base for all seeds
        others = [others[0] | {"seed": row["seed"]} for row in mine]
    return paired_difference(mine, others)


def _difference(run: Run, column: Column, method: str, other: str) -> str:
    if "diverged" in (column.cell(run, method), column.cell(run, other)):
        return "diverged"
    found = _paired(run, column, method, other)
    return "-" if found is None else found.scaled(column.factor).text(sign=True)


def _per_step(run: Run, shown: Sequence[Column], methods: Sequence[str]) -> str:
    steps = _steps(run)
    if not steps:
        return ""
    measured = [c for c in shown if any(c.rows(run, m, step=s) for m in methods for s in steps)] or shown[-1:]
    body = [
        [method, str(step) if step is not None else "end", *(c.cell(run, method, step=step) for c in measured)]
        for method in methods
        if method != "base"
        for step in (*steps, None)
    ]
    return "\n## Per training step\n\n" + markdown_table(["method", "step", *(c.title for c in measured)], body)


def _steps(run: Run) -> list[int]:
    return sorted({row["config"]["step"] for row in run.rows if row["config"].get("step") is not None})


def _panels(run: Run, shown: Sequence[Column], performance: Column, methods: Sequence[str], paper: str) -> list[Panel]:
    """Harm against performance, a panel for each measure of harm, and the paper's points in one of their own."""
    harms = [column for column in shown if column.metric in ("unsafe", "refused_harmful")]
    panels = []
    for harm in harms:
        points = [
            _point(run, performance, harm, method, row["seed"])
            for method in methods
            for row in harm.rows(run, method)
            if performance.rows(run, method, seed=row["seed"])
        ]
        is_refusal = harm.metric == "refused_harmful"
        title = "offline corpus" if is_refusal else f"{short_name(str(harm.judge))}: {harm.task}"
        diverged = {method: [len(seeds) for seeds in _seeds(run, method)] for method in methods}
        title += "".join(f"\n{m}: {lost} of {total} diverged" for m, (lost, total) in diverged.items() if lost)
        axis = "harmful requests not refused, %" if is_refusal else "judged unsafe, %"
        if points:
            panels.append(Panel(title, performance.title, axis, points))
    if not panels:
        return []
    published = [Point(method, value, score) for method, (value, score, _) in PAPER[paper].items()]
    score = "ShieldGemma, average score x 100"
    return [*panels, Panel(f"paper: Llama-2-7b-chat, {paper}", "task performance", score, published)]


def _point(run: Run, performance: Column, harm: Column, method: str, seed: int | None) -> Point:
    def place(step: int | None) -> tuple[float, float] | None:
        values = [column.rows(run, method, seed=seed, step=step) for column in (performance, harm)]
        if not all(values):
            return None
        share = values[1][0]["value"]
        return performance.factor * values[0][0]["value"], 100 * (1 - share if harm.metric != "unsafe" else share)

    end = place(None)
    assert end is not None
    steps = [found for found in map(place, _steps(run)) if found is not None]
    base = [c.rows(run, "base") for c in (performance, harm)]
    if steps and all(base):
        share = base[1][0]["value"]
        start = performance.factor * base[0][0]["value"], 100 * (1 - share if harm.metric != "unsafe" else share)
        steps.insert(0, start)
    low_high = bounds(harm.rows(run, method, seed=seed)[0])
    harm_interval = None
    if low_high is not None:
        turned = sorted(100 * (1 - v if harm.metric != "unsafe" else v) for v in low_high)
        harm_interval = (turned[0], turned[1])
    return Point(method, *end, harm_interval=harm_interval, path=steps)
