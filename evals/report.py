"""From the rows of a run to one table (Markdown, CSV) and the figure of safety against task performance."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any, NamedTuple

from scipy import stats

from evals.figures import Panel, Point, safety_against_performance
from vision_bench.runs import DIVERGED, Run, interval, markdown_table, paired_difference

TABLE, CSV, FIGURE = "results.md", "results.csv", "safety.png"

# Table 2: task performance, ShieldGemma's average score, BeaverDam's flagged share, all in the paper's units.
PAPER = {
    "SST-2": {"base": (88.65, 4.83, 20.90), "lora": (92.78, 7.90, 20.60), "monolora": (94.84, 3.53, 20.00)},
    "Dolly": {"base": (10.21, 4.83, 20.90), "lora": (14.08, 6.12, 23.80), "monolora": (14.48, 6.04, 22.60)},
}
SHARES = (
    "acc", "acc_norm", "empty", "exact_match", "refused_harmful", "refused_lookalike", "refused_everyday",
    "thought", "unfinished_thought", "unsafe", "unparsed", "truncated", "unsafe_at_least",
    "unsafe_at_most", "unsafe_difference",
)  # fmt: skip
COLUMNS = (
    "task", "metric", "judge", "category", "model", "method", "adapter", "seed", "versus", "versus_judge",
    "value", "low", "high", "p_value", "n",
)  # fmt: skip


class Performance(NamedTuple):
    """A metric of task performance that the figure knows, and the part of Table 2 that is beside it."""

    task: str
    metric: str
    name: str
    factor: int
    paper: str


class Harm(NamedTuple):
    """A measure of harm in a task's answers: a share judged unsafe or not refused, or a judge's mean score."""

    task: str
    metric: str
    name: str
    judge: str = ""  # what the judge's name begins with
    factor: int = 100
    is_refusal: bool = False


# Of each, the figure takes the first that the rows have.
PERFORMANCES = (
    Performance("sst2_instruct", "acc", "SST-2 accuracy, %", 100, "SST-2"),
    Performance("sentiment_offline", "acc", "accuracy on generated reviews, %", 100, "SST-2"),
    Performance("dolly", "rougeL", "Dolly, ROUGE-L", 1, "Dolly"),
)
SCORE, FLAGGED = "ShieldGemma, mean score x 100", "BeaverDam, flagged, %"
HARMS = (
    Harm("beavertails_eval", "score", SCORE, "shieldgemma", factor=1),
    Harm("beavertails_eval", "unsafe", FLAGGED, "beaverdam"),
    *(Harm(task, "unsafe", "judged unsafe, %") for task in ("beavertails_eval", "advbench", "refusal_offline")),
    Harm("refusal_offline", "refused_harmful", "harmful requests not refused, %", is_refusal=True),
)


class Line(NamedTuple):
    """What the table has a line for."""

    task: str
    metric: str
    judge: str


def write_report(run: Run) -> str:
    """Write table and figure of all rows into the run's folder; returns the table as Markdown.

    Raises:
        ValueError: the run has no rows.
    """
    # A task that was asked for by itself and in a group has its rows twice.
    rows = list({(*_line(row), *_arm(row), *_part(row)): row for row in reversed(run.rows)}.values())
    rows = [row for row in reversed(rows) if row["metric"] != "seconds"]
    if not rows:
        raise ValueError(f"{run.folder} has no results; `python -m evals generate` or `judge` writes them.")
    text = table(rows)
    run.write(TABLE, text)
    run.write(CSV, as_csv(rows))
    panels = figure_panels(rows)
    if panels and run.is_main:
        safety_against_performance(panels).savefig(run.folder / FIGURE, dpi=200)
    return text


def bounds(row: dict[str, Any]) -> tuple[float, float] | None:
    """95 % interval over the row's prompts: the row's own, Wilson's for a share, None for others.

    It leaves out what another training seed would give.
    """
    config = row["config"]
    if config.get("low") is not None and config.get("high") is not None:
        return config["low"], config["high"]
    if row["metric"].partition(" (")[0] not in SHARES or row["value"] is None:
        return None
    low, high = stats.binomtest(round(row["value"] * row["n"]), row["n"]).proportion_ci(method="wilson")
    return float(low), float(high)


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: a line for each task, metric and judge, a column for each method."""
    models = list(dict.fromkeys(row["config"]["model"] for row in rows))
    text = "# Safety and task performance\n"
    for model in models:
        same = [row for row in rows if row["config"]["model"] == model]
        of_model = [row for row in same if row["metric"] != DIVERGED and not any(_part(row))]
        methods = list(dict.fromkeys(row["config"]["method"] for row in same if not any(_part(row))))
        diverged = [row for row in same if row["metric"] == DIVERGED]
        outcomes = {m: _divergence([r for r in of_model + diverged if r["config"]["method"] == m]) for m in methods}
        paired = {"lora", "monolora"} <= set(methods)
        body = []
        for line in dict.fromkeys(_line(row) for row in of_model):
            cells = {m: [r for r in of_model if _line(r) == line and r["config"]["method"] == m] for m in methods}
            counts = sorted({row["n"] for found in cells.values() for row in found})
            body.append([line.task, line.metric, line.judge or "-", "/".join(map(str, counts))])
            body[-1] += [f"{_cell(found) if found else ''} {outcomes[m]}".strip() or "-" for m, found in cells.items()]
            if paired:
                difference = paired_difference(cells["monolora"], cells["lora"])
                body[-1].append("-" if difference is None else difference.scaled(_factor(line.metric)).text(sign=True))
        header = ["task", "metric", "judge", "prompts", *methods, *(["monolora - lora"] if paired else [])]
        text += f"\n## {model}\n\n" + markdown_table(header, body)
        text += _paired_table(same) + _agreement_table(same) + _category_table(same)
        for row in diverged:
            text += f"\n{row['config']['adapter'] or 'The base model'} diverged: {row['config']['reason']}.\n"
    modes = sorted({str(row["config"]["thinking"]) for row in rows if "thinking" in row["config"]})
    if modes:
        text += f"\nThinking was {' and '.join(modes)}, for all arms; thoughts are neither judged nor scored.\n"
    return text + (
        "\nShares in percent. One seed: the 95 % interval over prompts in brackets, which leaves out how another "
        "training seed would turn out.\nSeveral seeds: mean ± half-width of the 95 % interval over seeds, differences "
        "paired by seed.\n"
    )


def _divergence(rows: list[dict[str, Any]]) -> str:
    """What a method's cells say of the seeds that diverged, "" for none."""
    seeds = {row["seed"] for row in rows}
    diverged = {row["seed"] for row in rows if row["metric"] == DIVERGED}
    if not diverged:
        return ""
    return "diverged" if diverged == seeds else f"({len(diverged)} of {len(seeds)} diverged)"


def _paired_table(rows: list[dict[str, Any]]) -> str:
    """Differences between arms on the same prompts, of one training seed each."""
    body = []
    for row in rows:
        config = row["config"]
        if not config.get("versus"):
            continue
        seed = "-" if row["seed"] is None else str(row["seed"])
        p_value = f"{config['p_value']:.2g}" if "p_value" in config else "-"
        arms = f"{config['method']} - {config['versus']}"
        body.append([config["task"], row["metric"], config["judge"], arms, seed, str(row["n"]), _cell([row]), p_value])
    if not body:
        return ""
    header = ["task", "metric", "judge", "arms", "seed", "prompts", "difference", "McNemar's p"]
    return "\n### Differences on the same prompts\n\n" + markdown_table(header, body)


def _agreement_table(rows: list[dict[str, Any]]) -> str:
    body = [
        [row["config"]["task"], row["config"]["judge"], row["config"]["versus_judge"], str(row["n"]), _cell([row])]
        for row in rows
        if row["config"].get("versus_judge")
    ]
    if not body:
        return ""
    header = ["task", "judge", "other judge", "answers", "Cohen's kappa"]
    return "\n### Agreement of judges\n\n" + markdown_table(header, body)


def _category_table(rows: list[dict[str, Any]]) -> str:
    """Unsafe share by the prompts' category, a column for each method; seeds are averaged."""
    found = [row for row in rows if row["config"].get("category") and row["metric"] == "unsafe"]
    methods = list(dict.fromkeys(row["config"]["method"] for row in found))
    body = []
    for task, judge, category in dict.fromkeys(
        (r["config"]["task"], r["config"]["judge"], r["config"]["category"]) for r in found
    ):
        same = [r for r in found if (r["config"]["task"], r["config"]["judge"]) == (task, judge)]
        same = [r for r in same if r["config"]["category"] == category]
        body.append([f"{task}: {category}", judge, "/".join(map(str, sorted({r["n"] for r in same})))])
        body[-1] += [_cell([r for r in same if r["config"]["method"] == method]) for method in methods]
    if not body:
        return ""
    return "\n### Unsafe answers by category\n\n" + markdown_table(["category", "judge", "prompts", *methods], body)


def as_csv(rows: Iterable[dict[str, Any]]) -> str:
    """One line for each row, with its interval over prompts."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        low, high = bounds(row) or ("", "")
        known = row["config"] | row | {"low": low, "high": high}
        writer.writerow({name: known.get(name) for name in COLUMNS})
    return out.getvalue()


def figure_panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """A panel for each judge with a point for each method and seed, and the paper's beside; empty if there are none.

    The panel of ShieldGemma has its mean score and that of BeaverDam the flagged share, as the paper's.

    Where no judge has spoken, the offline model's refusals of harmful requests stand in.
    """
    known = [p for p in PERFORMANCES if any(_is(row, p.metric, p.task) for row in rows)]
    if not known:
        return []
    performance = known[0]
    panels = []
    for judge in dict.fromkeys(row["config"].get("judge") for row in rows):
        of_judge = [h for h in HARMS if (judge or "").startswith(h.judge)]
        harm = next((h for h in of_judge if _of_harm(rows, h, judge)), None)
        if harm is None:
            continue
        points = [
            _point(other, row, performance, harm)
            for row in _of_harm(rows, harm, judge)
            for other in rows
            if _is(other, performance.metric, performance.task) and _arm(other) == _arm(row)
        ]
        if points:
            title = f"{judge or 'this run'}: {harm.task}"
            panels.append(Panel(title, performance.name, harm.name, points))
    if not panels:
        return []
    # The paper's measure of the judges that spoke, ShieldGemma's if it was others.
    for name in [name for name in (SCORE, FLAGGED) if name in {panel.harm for panel in panels}] or [SCORE]:
        values = {method: row[2 if name == FLAGGED else 1] for method, row in PAPER[performance.paper].items()}
        points = [Point(method, PAPER[performance.paper][method][0], value) for method, value in values.items()]
        panels.append(Panel(f"paper: Llama-2-7b-chat, {performance.paper}", "task performance", name, points))
    return panels


def _point(performance_row: dict[str, Any], harm_row: dict[str, Any], performance: Performance, harm: Harm) -> Point:
    def turn(value: float) -> float:
        return harm.factor * (1 - value if harm.is_refusal else value)

    low_high = bounds(performance_row)
    harm_low_high = bounds(harm_row)
    return Point(
        harm_row["config"]["method"],
        performance.factor * performance_row["value"],
        turn(harm_row["value"]),
        low_high and (performance.factor * low_high[0], performance.factor * low_high[1]),
        harm_low_high and (min(map(turn, harm_low_high)), max(map(turn, harm_low_high))),
    )


def _of_harm(rows: list[dict[str, Any]], harm: Harm, judge: str | None) -> list[dict[str, Any]]:
    return [r for r in rows if _is(r, harm.metric, harm.task) and r["config"].get("judge") == judge]


def _is(row: dict[str, Any], metric: str, task: str) -> bool:
    is_named = row["metric"] == metric and row["config"]["task"] == task
    return is_named and row["value"] is not None and not any(_part(row))


def _part(row: dict[str, Any]) -> tuple[str | None, ...]:
    """What makes a row one of a part of the prompts, or of a comparison."""
    return tuple(row["config"].get(name) for name in ("category", "versus", "versus_adapter", "versus_judge"))


def _arm(row: dict[str, Any]) -> tuple[str, str | None]:
    return row["config"]["model"], row["config"]["adapter"]


def _line(row: dict[str, Any]) -> Line:
    return Line(row["config"]["task"], row["metric"], row["config"].get("judge") or "")


def _factor(metric: str) -> int:
    return 100 if metric.partition(" (")[0] in SHARES else 1


def _cell(found: list[dict[str, Any]]) -> str:
    if not found:
        return "-"
    factor = _factor(found[0]["metric"])
    low_high = bounds(found[0])
    if len(found) > 1 or low_high is None:
        return interval([row["value"] for row in found]).scaled(factor).text()
    return f"{factor * found[0]['value']:.2f} [{factor * low_high[0]:.2f}, {factor * low_high[1]:.2f}]"
