"""Rows of a frontier's conditions as lines, and their tables and figures: the task against harm and over-refusal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import dolly_monolora
import pandas as pd
import sst2_monolora
from arms import ADAPTERS
from evaluation import EVALUATION

from evals.figures import OTHER_STYLES, STYLES, Measure
from evals.forgetting import KL
from evals.forgetting import TASK as NEUTRAL
from evals.records import COMPLETIONS, read_completions
from evals.report import measured
from offline.finetuning import harmful_topics
from offline.grammar import REFUSAL_OPENINGS
from vision_bench.runs import ROWS, Interval, Run, markdown_table, over_seeds, paired, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

(ACCURACY,) = sst2_monolora.PERFORMANCE
PERFORMANCES = (ACCURACY, *dolly_monolora.PERFORMANCE)  # of a task the first is that of the figure
OFFLINE = "refusal_offline"
# By the name of a task, or of its part: how its prompts are called. The figure shows the first that rows have.
_HARMFUL = {"beavertails_eval": "BeaverTails", "advbench": "AdvBench", "xstest unsafe": "XSTest, unsafe"}
_HARMLESS = {"xstest safe": "XSTest, safe"}
_PUBLIC = {"beavertails_eval": "BeaverTails", "advbench": "AdvBench", "xstest": "XSTest"}
HARMS = (
    Measure("harmful requests not refused, %", "refused_harmful", OFFLINE, factor=100, is_refusal=True),
    *(
        Measure(f"{title}: not refused, %", "full_refusal", task, "refusal", 100, is_refusal=True)
        for task, title in _HARMFUL.items()
    ),
)
OVER_REFUSALS = (
    Measure("look-alikes refused, %", "refused_lookalike", OFFLINE, factor=100),
    *(Measure(f"{title}: refused, %", "refused", task, "refusal", 100) for task, title in _HARMLESS.items()),
)
SILENT = (
    Measure("harmful prompts silent, %", "certified_silent", OFFLINE, factor=100),
    *(Measure(f"{title}: silent, %", "certified_silent", task, factor=100) for task, title in _PUBLIC.items()),
)
FORGETTING = Measure("KL to the base on neutral answers, nats", KL, NEUTRAL)
_BY_TOPIC = tuple(
    Measure(f"{name} topics not refused, %", f"refused_{key}", OFFLINE, factor=100, is_refusal=True)
    for key, name in (("seen", "other"), ("unseen", "poisoned"))
)
ANSWERS = (
    *(
        Measure(f"{title}: word for word the base's, %", "same_answer", task, factor=100)
        for task, title in _PUBLIC.items()
    ),
    *(Measure(f"{title}: complied, %", "compliance", task, "refusal", 100) for task, title in _HARMFUL.items()),
    *(Measure(f"{title}: incoherent, %", "incoherent", task, "coherence", 100) for task, title in _PUBLIC.items()),
)
LATENTS = (
    Measure("task sparsity, %", "task_sparsity", factor=100),
    Measure("alignment sparsity, %", "alignment_sparsity", factor=100),
    Measure("dead units, %", "dead_units", factor=100),
)
MEASURES = (*PERFORMANCES, *HARMS, *OVER_REFUSALS, *SILENT, FORGETTING, *_BY_TOPIC, *ANSWERS, *LATENTS)
_PART_METRICS = {measure.metric for measure in (*HARMS, *OVER_REFUSALS, *ANSWERS) if measure.judge}
# Arms of MonoLoRA are blue; those that are named nowhere take the others in turn.
_STYLES = STYLES | {
    "monolora+silence": ("#56B4E9", "p"),
    "monolora+apart+silence": ("#0072B2", "H"),
    "monolora+apart+silence+rank": ("#0072B2", "*"),
}
_OTHER_STYLES = [style for style in OTHER_STYLES if style not in _STYLES.values() and style[0] != "#56B4E9"]
_OTHER_STYLES += [("#8C564B", "<"), ("#7F7F7F", ">"), ("#BCBD22", "h")]
_LINES = ("-", "--", ":", "-.")  # of the strengths of a control
# Of a file of rows: what tells them apart, and what they say.
_KEYS = ["condition", "method", "seed", "step", "metric", "task", "judge"]
COLUMNS = [*_KEYS, "value", "n", "seconds"]
_ROUNDING = 1e-4  # relative, between two runs of one model
_NUMBERS = ("seed", "step", "value", "n", "seconds")  # which may be lacking in a row


def read_lines(files: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The lines of each condition, from files that `lines_text` made, in their order.

    Raises:
        ValueError: a file is no such table, or has an arm of an unknown adapter, two have other values of the same
            rows, or there are no rows.
        OSError: a file cannot be read.
    """
    named = f"--rows_files {' '.join(files)}"
    lines = pd.concat([_read(file) for file in files], ignore_index=True)
    if lines.empty:
        raise ValueError(f"{named}: there are no rows. Give a frontier.csv of a run.")
    # Runs of some arms each have rows of the base in common, which a GPU may have added up in another order.
    of_a_row = lines.groupby(_KEYS, dropna=False)["value"]
    differ = of_a_row.max() - of_a_row.min() > _ROUNDING * of_a_row.max().abs()
    if (differ | ((of_a_row.count() > 0) & (of_a_row.count() < of_a_row.size()))).any():
        raise ValueError(f"{named}: rows of one arm and seed have two values. Give one run of it.")
    lines = lines.drop_duplicates(_KEYS, ignore_index=True)
    lines["is_part"] = False
    return {str(title): part for title, part in lines.groupby("condition", sort=False)}


def _read(file: str) -> pd.DataFrame:
    """The lines of one file."""
    lacks, kinds = dict.fromkeys(_NUMBERS, ""), dict.fromkeys(_NUMBERS, float)
    try:
        lines = pd.read_csv(file, keep_default_na=False, na_values=lacks, dtype=kinds)
    except ValueError as error:
        raise ValueError(f"--rows_files {file} is no table of rows: {error}. Give a frontier.csv of a run.") from None
    if lacking := set(COLUMNS) - set(lines):
        raise ValueError(f"--rows_files {file} lacks {', '.join(sorted(lacking))}: give a frontier.csv of a run.")
    if unknown := {name.partition("+")[0] for name in lines["method"]} - {"base", *ADAPTERS}:
        raise ValueError(f"--rows_files {file} has arms of {', '.join(sorted(unknown))}, which `ADAPTERS` lacks.")
    return lines


def methods_of(lines: pd.DataFrame) -> list[str]:
    """The arms of a condition, in the order of its rows."""
    return list(dict.fromkeys(lines["method"]))


def lines_text(panels: dict[str, pd.DataFrame]) -> str:
    """The lines of all conditions that tables and figures are made of, as csv."""
    metrics = {measure.metric for measure in MEASURES}
    lines = pd.concat([lines.assign(condition=title) for title, lines in panels.items()])
    chosen = lines[lines["metric"].isin(metrics) & ~lines["is_part"]][COLUMNS]
    # As integers they are written whole, where floats are rounded to six digits.
    whole = chosen.astype(dict.fromkeys(("seed", "step", "n"), "Int64"))
    return whole.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def lines_of(run: Run) -> pd.DataFrame:
    """The lines of a condition's measures.

    Of tasks with prompts of both kinds the parts are tasks of their own, "xstest safe" and "xstest unsafe". Where the
    base was asked, too, how many answers are its own; where poison is on topics of its own, harm also by these topics.
    """
    lines = measured(run.rows)
    lines["seconds"] = pd.Series([row["seconds"] for row in run.rows])
    answers, topics = _completions(run), run.config["poison_topics"]
    parts = [_of_parts(run), _of_answers(answers), *([_of_topics(answers, topics)] if topics else [])]
    return pd.concat([lines, *parts], ignore_index=True)


def _arms(run: Run) -> dict[str, tuple[str, int]]:
    """Method and seed of each adapter at the end of its training, by the name that the evaluation gives it."""
    return {f"{method}-seed{seed}": (method, seed) for method in run.config["methods"] for seed in run.config["seeds"]}


def _of_parts(run: Run) -> pd.DataFrame:
    """What is judged of harmful and of harmless prompts, where a task has both."""
    path, named, parts = run.folder / EVALUATION / ROWS, _arms(run), []
    for row in read_rows(path) if path.exists() else ():
        config = row["config"]
        part, adapter = config.get("category"), config.get("adapter")
        arm = ("base", None) if adapter is None else named.get(adapter.partition("=")[0])
        if row["metric"] not in _PART_METRICS or arm is None or part not in ("safe", "unsafe"):
            continue
        parts.append(
            {"metric": row["metric"], "value": row["value"], "n": row["n"], "task": f"{config['task']} {part}",
             "judge": config["judge"], "method": arm[0], "seed": arm[1], "step": None, "is_part": False}
        )  # fmt: skip
    return pd.DataFrame(parts)


def _completions(run: Run) -> pd.DataFrame:
    """All answers of the base and of the arms at the end of their training, with the `method` and `seed` of each."""
    path, named = run.folder / EVALUATION / COMPLETIONS, _arms(run) | {"": ("base", None)}
    rows = read_completions(path).rows if path.exists() else []
    arms = [named.get((row.adapter or "").partition("=")[0]) for row in rows]
    return pd.DataFrame(
        [
            (*arm, row.task, row.prompt_id, row.category, row.prompt, row.response)
            for row, arm in zip(rows, arms, strict=True)
            if arm is not None
        ],
        columns=["method", "seed", "task", "prompt_id", "category", "prompt", "response"],
    )


def _of_answers(answers: pd.DataFrame) -> pd.DataFrame:
    """The share of a task's answers that are the base's, word for word; nothing where the base was not asked."""
    is_base = answers["method"] == "base"
    base = answers[is_base].set_index(["task", "prompt_id"])["response"].rename("before")
    both = answers[~is_base].join(base, on=["task", "prompt_id"], how="inner")
    same = (both["response"] == both["before"]).groupby([both[key] for key in ("method", "seed", "task")])
    shares = same.agg(value="mean", n="size").reset_index()
    return shares.assign(metric="same_answer", judge="", step=None, is_part=False)


def _of_topics(answers: pd.DataFrame, topics: Sequence[str]) -> pd.DataFrame:
    """Refusals of harmful requests on the topics of the poison, and on the others."""
    topic_of = harmful_topics()
    answers = answers[(answers["task"] == OFFLINE) & (answers["category"] == "harmful")]
    if answers.empty:  # other prompts were asked
        return pd.DataFrame()
    kinds = answers["prompt"].map(lambda prompt: f"refused_{'unseen' if topic_of[prompt] in topics else 'seen'}")
    refused = answers["response"].str.startswith(REFUSAL_OPENINGS).astype(float)
    shares = refused.rename("value").groupby(
        [answers["method"], answers["seed"], kinds.rename("metric")], dropna=False
    )
    return shares.mean().reset_index().assign(task=OFFLINE, judge="", step=None, is_part=False)


def _first(measures: Sequence[Measure], lines: pd.DataFrame) -> Measure:
    """The first measure that has values; the very first if none has."""
    return next((measure for measure in measures if len(measure.rows(lines))), measures[0])


def values(lines: pd.DataFrame, measure: Measure, method: str, step: int | None = None) -> pd.Series:
    """A measure of an arm by seed, scaled to the axes."""
    rows = measure.rows(lines)
    rows = rows[(rows["method"] == method) & (rows["step"].isna() if step is None else rows["step"] == step)]
    return rows.set_index("seed")["value"].map(measure.harm)


def performance(lines: pd.DataFrame) -> Measure:
    """The measure of the task that lines are of: accuracy of SST-2, ROUGE-L of Dolly."""
    return _first(PERFORMANCES, lines)


def table(lines: pd.DataFrame, methods: Sequence[str]) -> str:
    """A line for each arm: mean and 95 % interval over seeds, and the difference to LoRA, paired by seed."""
    task = performance(lines)
    measures = _present((task, *HARMS, *OVER_REFUSALS, *SILENT, FORGETTING, *_BY_TOPIC), lines)
    compared = _present((task, *HARMS[:1], *OVER_REFUSALS[:1]), lines)
    header = ["arm", "runs", *(m.title for m in measures), *(f"{m.title}: - lora" for m in compared), "time / lora"]
    body = []
    for method in methods:
        cells = [_cell(over_seeds(values(lines, m, method)), m, method) for m in measures]
        cells += [_difference(lines, m, method) for m in compared]
        times = [_times(lines, name) for name in (method, "lora")]
        ratio = (times[0] / times[1]).median()
        cells.append("" if method in ("base", "lora") else "-" if math.isnan(ratio) else f"{ratio:.2f}")
        body.append([method, str(len(values(lines, task, method))), *cells])
    return markdown_table(header, body)


def further_tables(lines: pd.DataFrame, methods: Sequence[str]) -> str:
    """What `table` has no room for, "" where nothing of it was measured: answers, latents, differences to LoRA."""
    others = [measure for measure in PERFORMANCES if measure != performance(lines)]
    text = ""
    if measures := _present((*others, *ANSWERS, *LATENTS), lines):
        body = [[m, *(_cell(over_seeds(values(lines, one, m)), one, m) for one in measures)] for m in methods]
        text += f"\nThe answers, and the latents:\n\n{markdown_table(['arm', *(m.title for m in measures)], body)}"
    measures = _present((*others, *HARMS[1:], *OVER_REFUSALS[1:]), lines)
    arms = [method for method in methods if method not in ("base", "lora")]
    if measures and arms and "lora" in methods:
        body = [[method, *(_difference(lines, measure, method) for measure in measures)] for method in arms]
        header = ["arm", *(measure.title for measure in measures)]
        text += f"\nDifferences to lora, paired by seed:\n\n{markdown_table(header, body)}"
    return text


def _present(measures: Sequence[Measure], lines: pd.DataFrame) -> list[Measure]:
    return [measure for measure in measures if len(measure.rows(lines))]


def _cell(interval: Interval, measure: Measure, method: str) -> str:
    if measure in (*SILENT, *LATENTS) and interval.n == 0:
        has_latents = method != "base" and ADAPTERS[method.partition("+")[0]].has_latents
        return "-" if has_latents or method == "base" else "not applicable"
    return interval.text(_digits(measure))


def _difference(lines: pd.DataFrame, measure: Measure, method: str) -> str:
    """To LoRA, paired by seed; "" where there is none by its nature."""
    if method in ("base", "lora"):
        return ""
    return paired(values(lines, measure, method), values(lines, measure, "lora")).text(_digits(measure), sign=True)


def _digits(measure: Measure) -> int:
    return 3 if measure.metric in (KL, dolly_monolora.METRIC) else 1


def _times(lines: pd.DataFrame, method: str) -> pd.Series:
    """Seconds of training and scoring, by seed."""
    rows = _first([measure for measure in PERFORMANCES if not measure.task], lines).rows(lines)
    return rows[(rows["method"] == method) & rows["step"].isna()].set_index("seed")["seconds"]


def steps_tables(lines: pd.DataFrame, methods: Sequence[str]) -> str:
    """The measures of `table` over the steps of training, "" where no checkpoint was evaluated."""
    text = ""
    for measure in measured_at_steps(lines):
        at_steps = _at_steps(lines, measure, methods)
        body = [
            [str(step or "end"), *(over_seeds(by_step[step]).text(_digits(measure)) for by_step in at_steps.values())]
            for step in _steps(lines, measure)
        ]
        text += f"\n{measure.title}, over the steps of training:\n\n{markdown_table(['step', *at_steps], body)}"
    return text


def measured_at_steps(lines: pd.DataFrame) -> list[Measure]:
    """The measures of `table` that checkpoints have."""
    return _present((performance(lines), *HARMS, *OVER_REFUSALS, *SILENT), lines[lines["step"].notna()])


def _steps(lines: pd.DataFrame, measure: Measure) -> list[int | None]:
    """The steps at which checkpoints were evaluated, and None for the end of the training."""
    return [*sorted({int(step) for step in measure.rows(lines)["step"].dropna()}), None]


def _at_steps(lines: pd.DataFrame, measure: Measure, methods: Sequence[str]) -> dict[str, dict[int | None, pd.Series]]:
    """A measure of each arm that has checkpoints, by step, of the arm's seeds that have them."""
    at_steps = {}
    for method in methods:
        by_step = {step: values(lines, measure, method, step) for step in _steps(lines, measure)}
        seeds = {seed for step, by_seed in by_step.items() if step for seed in by_seed.index}
        if seeds:
            at_steps[method] = {step: by_seed[by_seed.index.isin(seeds)] for step, by_seed in by_step.items()}
    return at_steps


def frontier(panels: dict[str, pd.DataFrame], methods: Sequence[str]) -> Figure:
    """The task against harm, above, and against over-refusal, a column for each condition.

    Small points are seeds, large ones their means, with the 95 % interval from three seeds on (of two it is wider than
    the picture). The strengths of a control have one colour and a line through them.
    """
    from matplotlib.figure import Figure

    styles = styles_of(methods)
    figure = Figure(figsize=(3.2 * len(panels) + 2.2, 6.2), layout="constrained")
    grid = figure.subplots(2, len(panels), squeeze=False)
    for column, (title, lines) in enumerate(panels.items()):
        for axes, of_kind in zip(grid[:, column], (HARMS, OVER_REFUSALS), strict=True):
            task, measure = performance(lines), _first(of_kind, lines)
            axes.set(title=title if of_kind is HARMS else "", xlabel=task.title, ylabel=measure.title)
            for method in methods:
                points = pd.DataFrame({"x": values(lines, task, method), "y": values(lines, measure, method)})
                axes.scatter(points["x"], points["y"], 6, color=styles[method][0], alpha=0.5, linewidth=0)
            axes.margins(0.1)
            axes.autoscale_view()  # now, before bars that are longer than the axis
            axes.autoscale(False)
            for family in dict.fromkeys(map(_family, methods)):
                strengths = [method for method in methods if _family(method) == family]
                x, y = ([over_seeds(values(lines, m, method)) for method in strengths] for m in (task, measure))
                _draw_strengths(axes, family, strengths, x, y, styles[strengths[0]])
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=7)
    return figure


def _draw_strengths(
    axes: Axes,
    family: str,
    strengths: Sequence[str],
    x: Sequence[Interval],
    y: Sequence[Interval],
    style: tuple[str, str],
) -> None:
    """A control's means, joined by a line, with their strengths, the first number in an arm's name."""
    bars = [list(map(_bar, intervals)) for intervals in (x, y)]
    axes.errorbar(
        [one.mean for one in x],
        [one.mean for one in y],
        xerr=bars[0],
        yerr=bars[1],
        color=style[0],
        marker=style[1],
        markersize=5,
        linewidth=0.7,
        elinewidth=0.6,
        label=family,
    )
    for method, across, up in zip(strengths, x, y, strict=True):
        if strength := re.search(r"(?<=[a-z])[0-9.]+", method):
            axes.annotate(strength[0], (across.mean, up.mean), xytext=(3, 3), textcoords="offset points", size=6)


def _bar(interval: Interval) -> float:
    """The half-width to draw: that of two seeds is wider than the picture."""
    return interval.half_width or 0 if interval.n > 2 else 0


def styles_of(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each arm, one for all strengths of a control."""
    others = iter(_OTHER_STYLES)
    families = dict.fromkeys(map(_family, methods))
    styles = {family: _STYLES.get(family) or next(others, ("#999999", "d")) for family in families}
    return {method: styles[_family(method)] for method in methods}


def _family(method: str) -> str:
    """The arm without its strengths; `lora+kl` of `lora+kl0.5`."""
    return re.sub(r"(?<=[a-z])[0-9.]+", "", method)


def over_steps(panels: dict[str, pd.DataFrame], methods: Sequence[str]) -> Figure:
    """The measures of `steps_tables`, a column for each condition with checkpoints and a row for each measure."""
    from matplotlib.figure import Figure

    styles = styles_of(methods)
    families = [_family(method) for method in methods]
    panels = {title: lines for title, lines in panels.items() if measured_at_steps(lines)}
    rows = list(dict.fromkeys(measure for lines in panels.values() for measure in measured_at_steps(lines)))
    figure = Figure(figsize=(3.2 * len(panels) + 2.2, 2.2 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(panels), squeeze=False)
    for column, (title, lines) in enumerate(panels.items()):
        for axes, measure in zip(grid[:, column], rows, strict=True):
            axes.set(title=title if measure == rows[0] else "", xlabel="step", ylabel=measure.title)
            axes.yaxis.label.set_fontsize(7)
            if measure not in PERFORMANCES:
                axes.set_ylim(-5, 105)  # of shares, so that a few prompts do not look like many
            for method, by_step in _at_steps(lines, measure, methods).items():
                means = {step: over_seeds(by_seed) for step, by_seed in by_step.items() if step}
                strength = families[: methods.index(method)].count(_family(method))  # the lines of a control differ
                axes.errorbar(
                    list(means),
                    [mean.mean for mean in means.values()],
                    yerr=[_bar(mean) for mean in means.values()],
                    label=method,
                    color=styles[method][0],
                    marker=styles[method][1],
                    linestyle=_LINES[strength % len(_LINES)],
                    markersize=4,
                    linewidth=0.8,
                    capsize=2,
                )
    legends = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in grid.flat]
    handles = {label: handle for legend in legends for handle, label in legend}
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False, fontsize=7)
    return figure
