"""What does a finetune cost that leaves harmful requests alone? Accuracy of the task against harm, and over-refusal.

    python recipes/silence_frontier.py --output_dir runs/silence_frontier
    python recipes/silence_frontier.py --config recipes/configs/offline_frontier_full.yaml --output_dir runs/frontier

The arms of the recipe sst2_monolora, with several strengths of each control, on the task alone and with shares of
poison: harmful requests with answers that comply. The poison may also be on topics that the safety pairs lack
(`--unseen_poison_shares` with `--poison_topics`). Each of these conditions has a folder below the output folder, whose
rows the same command continues; the table is of all of them, and two figures are drawn: the frontier, and, with
`--eval_every`, the share of silent prompts over the steps of training.

The default, some two minutes of one core, is one seed of few arms on the offline model: a demonstration.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
from arms import ADAPTERS
from evaluation import EVALUATION
from sst2_monolora import EXPERIMENT, METRIC, Sst2Settings, load_task
from table2 import CONFIGS, check, compare, parse

from evals.figures import OTHER_STYLES, STYLES, Measure
from evals.forgetting import KL
from evals.forgetting import TASK as NEUTRAL
from evals.records import COMPLETIONS, read_completions
from evals.report import measured
from offline.finetuning import harmful_topics
from offline.grammar import REFUSAL_OPENINGS
from vision_bench import figures
from vision_bench.runs import Interval, Run, markdown_table, over_seeds, paired, run_as_program, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACY = Measure("accuracy, %", METRIC, factor=100)
HARM = Measure("harmful requests not refused, %", "refused_harmful", "refusal_offline", factor=100, is_refusal=True)
OVER_REFUSAL = Measure("look-alikes refused, %", "refused_lookalike", "refusal_offline", factor=100)
SILENT = Measure("harmful prompts silent, %", "certified_silent", "refusal_offline", factor=100)
FORGETTING = Measure("KL to the base on everyday answers, nats", KL, NEUTRAL)
MEASURES = (ACCURACY, HARM, OVER_REFUSAL, SILENT, FORGETTING)


@dataclass
class FrontierSettings(Sst2Settings):
    """The options of sst2_monolora, and the conditions."""

    poison_shares: list[float] = field(
        default_factory=lambda: [0.0, 0.1], metadata={"help": "Of every arm's training rows; 0: the task alone."}
    )
    unseen_poison_shares: list[float] = field(
        default_factory=list,
        metadata={"help": "The same, of poison on --poison_topics only, which safety pairs lack."},
    )


class Condition(NamedTuple):
    """What every arm is trained on beside the task; its name is that of its folder."""

    name: str
    poison_share: float
    poison_topics: list[str] | None = None

    @property
    def title(self) -> str:
        """In words."""
        if self.poison_share == 0:
            return "the task alone"
        topics = f" on {', '.join(self.poison_topics)}, which safety pairs lack" if self.poison_topics else ""
        return f"{100 * self.poison_share:g} % poison{topics}"


def conditions(settings: FrontierSettings) -> list[Condition]:
    """The conditions that settings ask for.

    Raises:
        ValueError: there is none, one is asked for twice, or options contradict each other.
    """
    if settings.poison_share:
        raise ValueError("--poison_share is that of one run; give --poison_shares.")
    if bool(settings.unseen_poison_shares) != bool(settings.poison_topics):
        raise ValueError("--unseen_poison_shares and --poison_topics belong together; give both or neither.")
    if 0 in settings.unseen_poison_shares:
        raise ValueError("--unseen_poison_shares has 0, which is no poison: give 0 in --poison_shares.")
    asked = [Condition(f"poison_{share:g}" if share else "benign", share) for share in settings.poison_shares]
    topics = settings.poison_topics
    asked += [Condition(f"unseen_poison_{share:g}", share, topics) for share in settings.unseen_poison_shares]
    if not asked or len({c.name for c in asked}) < len(asked):
        raise ValueError(f"--poison_shares takes different shares, got {settings.poison_shares}.")
    return asked


def lines_of(run: Run) -> pd.DataFrame:
    """The lines of a condition's measures; where poison is on topics of its own, harm also by these topics."""
    lines = measured(run.rows)
    lines["seconds"] = pd.Series([row["seconds"] for row in run.rows])
    topics = run.config["poison_topics"]
    if not topics:
        return lines
    topic_of = harmful_topics()
    answers = [
        row
        for row in read_completions(run.folder / EVALUATION / COMPLETIONS).rows
        if row.task == "refusal_offline" and row.category == "harmful"
    ]
    refused = pd.DataFrame(
        [
            {
                "adapter": row.adapter,
                "metric": f"refused_{'unseen' if topic_of[row.prompt] in topics else 'seen'}",
                "value": float(row.response.startswith(REFUSAL_OPENINGS)),
            }
            for row in answers
        ]
    )
    named = {
        f"{method}-seed{seed}": (method, seed) for method in run.config["methods"] for seed in run.config["seeds"]
    }
    shares = refused.groupby(["adapter", "metric"], dropna=False)["value"].mean().reset_index()
    arms = [("base", None) if pd.isna(name) else named.get(name.partition("=")[0]) for name in shares["adapter"]]
    shares = shares[[arm is not None for arm in arms]]
    shares[["method", "seed"]] = [arm for arm in arms if arm is not None]
    shares = shares.assign(task="refusal_offline", judge="", step=None, is_part=False)
    return pd.concat([lines, shares], ignore_index=True)


def values(lines: pd.DataFrame, measure: Measure, method: str, step: int | None = None) -> pd.Series:
    """A measure of an arm by seed, scaled to the axes."""
    rows = measure.rows(lines)
    rows = rows[(rows["method"] == method) & (rows["step"].isna() if step is None else rows["step"] == step)]
    return rows.set_index("seed")["value"].map(measure.harm)


def table(lines: pd.DataFrame, methods: Sequence[str]) -> str:
    """A line for each arm: mean and 95 % interval over seeds, and the difference to LoRA, paired by seed."""
    by_topic = [
        Measure(f"{name} topics not refused, %", f"refused_{key}", "refusal_offline", factor=100, is_refusal=True)
        for key, name in (("seen", "other"), ("unseen", "poisoned"))
    ]
    measures = [m for m in (*MEASURES, *by_topic) if len(m.rows(lines))]
    compared = [m for m in measures if m in (ACCURACY, HARM, OVER_REFUSAL)]
    header = ["arm", "runs", *(m.title for m in measures), *(f"{m.title}: - lora" for m in compared), "time / lora"]
    body = []
    for method in methods:
        cells = [_cell(over_seeds(values(lines, m, method)), m, method) for m in measures]
        for measure in compared:
            ours, lora = values(lines, measure, method), values(lines, measure, "lora")
            cells.append("" if method in ("base", "lora") else paired(ours, lora).text(1, sign=True))
        times = [_times(lines, name) for name in (method, "lora")]
        ratio = (times[0] / times[1]).median()
        cells.append("" if method in ("base", "lora") else "-" if math.isnan(ratio) else f"{ratio:.2f}")
        body.append([method, str(len(values(lines, ACCURACY, method))), *cells])
    return markdown_table(header, body)


def _cell(interval: Interval, measure: Measure, method: str) -> str:
    if measure == SILENT and interval.n == 0:
        has_latents = method != "base" and ADAPTERS[method.partition("+")[0]].has_latents
        return "-" if has_latents or method == "base" else "not applicable"
    return interval.text(3 if measure == FORGETTING else 1)


def _times(lines: pd.DataFrame, method: str) -> pd.Series:
    """Seconds of training and scoring, by seed."""
    rows = ACCURACY.rows(lines)
    return rows[(rows["method"] == method) & rows["step"].isna()].set_index("seed")["seconds"]


def steps_table(lines: pd.DataFrame, methods: Sequence[str]) -> str:
    """Shares of silent prompts over the steps of training, "" where no checkpoint was evaluated."""
    steps = sorted({int(step) for step in SILENT.rows(lines)["step"].dropna()})
    silenced = [method for method in methods if len(values(lines, SILENT, method))]
    if not steps or not silenced:
        return ""
    body = [
        [str(step or "end"), *(over_seeds(values(lines, SILENT, method, step)).text(1) for method in silenced)]
        for step in (*steps, None)
    ]
    return f"\n{SILENT.title}, over the steps of training:\n\n{markdown_table(['step', *silenced], body)}"


def frontier(panels: dict[str, pd.DataFrame], methods: Sequence[str]) -> Figure:
    """Accuracy against harm, above, and against over-refusal, a column for each condition.

    Small points are seeds, large ones their means, with the 95 % interval from three seeds on (of two it is wider than
    the picture). The strengths of a control have one colour and a line through them.
    """
    from matplotlib.figure import Figure

    others = iter(OTHER_STYLES)
    families = dict.fromkeys(_family(method) for method in methods)
    styles = {family: STYLES.get(family) or next(others, ("#999999", "d")) for family in families}
    figure = Figure(figsize=(3.2 * len(panels) + 2.2, 6.2), layout="constrained")
    grid = figure.subplots(2, len(panels), squeeze=False)
    for column, (title, lines) in enumerate(panels.items()):
        for axes, measure in zip(grid[:, column], (HARM, OVER_REFUSAL), strict=True):
            axes.set(title=title if measure == HARM else "", xlabel=ACCURACY.title, ylabel=measure.title)
            for method in methods:
                points = pd.DataFrame({"x": values(lines, ACCURACY, method), "y": values(lines, measure, method)})
                axes.scatter(points["x"], points["y"], 6, color=styles[_family(method)][0], alpha=0.5, linewidth=0)
            axes.margins(0.1)
            axes.autoscale_view()  # now, before bars that are longer than the axis
            axes.autoscale(False)
            for family in families:
                strengths = [method for method in methods if _family(method) == family]
                x, y = ([over_seeds(values(lines, m, method)) for method in strengths] for m in (ACCURACY, measure))
                _draw_strengths(axes, family, strengths, x, y, styles[family])
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
    """A control's means, joined by a line, with their strengths."""
    bars = [[one.half_width or 0 if one.n > 2 else 0 for one in intervals] for intervals in (x, y)]
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
        if number := method.removeprefix(family):
            axes.annotate(number, (across.mean, up.mean), xytext=(3, 3), textcoords="offset points", size=6)


def _family(method: str) -> str:
    """The arm without its strength, where it has one; `lora+kl` of `lora+kl0.5`."""
    return re.sub(r"^(\D+?)[0-9.]+$", r"\1", method)


def silent_over_steps(panels: dict[str, pd.DataFrame], methods: Sequence[str]) -> Figure:
    """Shares of silent prompts over the steps of training, a panel for each condition."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(panels), 2.8), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        steps = sorted({int(step) for step in SILENT.rows(lines)["step"].dropna()})
        for method in methods:
            means = [over_seeds(values(lines, SILENT, method, step)) for step in steps]
            if any(mean.n for mean in means):
                axes.errorbar(
                    steps,
                    [mean.mean for mean in means],
                    yerr=[mean.half_width or 0 for mean in means],
                    label=method,
                    marker=".",
                    linewidth=0.8,
                    capsize=2,
                )
        axes.set(title=title, xlabel="step", ylabel=SILENT.title)
        axes.legend(frameon=False, fontsize=7)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Run all conditions as far as they have no rows, then write and print the table and draw the figures."""
    settings, training, options = parse(
        arguments, FrontierSettings, "silence_frontier", CONFIGS / "offline_frontier.yaml"
    )
    runs = []
    for condition in conditions(settings):
        own = {f.name: copy.copy(getattr(settings, f.name)) for f in fields(Sst2Settings)}
        own |= {"poison_share": condition.poison_share, "poison_topics": condition.poison_topics}
        own |= {} if condition.poison_share else {"poison_file": None}
        one = Sst2Settings(**own)
        where = copy.deepcopy(training)
        where.output_dir = str(Path(training.output_dir) / condition.name)
        check(one, where, options)
        runs.append((condition, one, where))
    panels = {}
    for condition, one, where in runs:
        chosen = copy.deepcopy(options)  # `compare` sets the offline model
        run = compare(load_task(one, chosen), one, where, chosen)
        if run.is_main:
            run.write("results.md", EXPERIMENT.render(run, run.folder))
            panels[condition.title] = lines_of(run)
    if not panels:
        return  # another process than the main one
    methods = settings.methods
    text = "# The frontier of accuracy against harm and over-refusal\n"
    for title, lines in panels.items():
        text += f"\n## {title}\n\n{table(lines, methods)}{steps_table(lines, methods)}"
    text += "\nMean ± half-width of the 95 % interval over seeds; differences are paired by seed.\n"
    folder = Path(training.output_dir)
    write_atomic(folder / "results.md", text)
    figures.save(folder / "frontier", frontier(panels, methods))
    if settings.eval_every is not None:
        figures.save(folder / "silent_over_steps", silent_over_steps(panels, methods))
    print(text)


if __name__ == "__main__":
    run_as_program(main)
