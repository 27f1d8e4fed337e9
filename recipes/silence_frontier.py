"""What does a finetune cost that leaves harmful requests alone? The task against harm, and over-refusal.

    python recipes/silence_frontier.py --output_dir runs/silence_frontier
    python recipes/silence_frontier.py --config recipes/configs/offline_frontier_full.yaml --output_dir runs/frontier
    python recipes/silence_frontier.py --task dolly --config recipes/configs/offline_dolly.yaml --output_dir runs/dolly

The arms of the recipe sst2_monolora or dolly_monolora, with several strengths of each control, on the task alone and
with shares of poison: harmful requests with answers that comply. The poison may also be on topics that the safety
pairs lack (`--unseen_poison_shares` with `--poison_topics`). Each of these conditions has a folder below the output
folder, whose rows the same command continues; the tables are of all of them, and two figures are drawn: the frontier,
and, with `--eval_every`, what the checkpoints' rows say over the steps of training. What they show is in frontier.csv;
with such files as `--rows_files`, of some arms or seeds each, they are made of these, and nothing is trained.

The default, some two minutes of one core, is one seed of few arms on the offline model: a demonstration.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import dolly_monolora
import library_messages  # noqa: F401  # before the libraries that speak while they are imported
import pandas as pd
import sst2_monolora
from experiments import Experiment
from frontier import (
    frontier,
    further_tables,
    lines_of,
    lines_text,
    measured_at_steps,
    methods_of,
    over_steps,
    read_lines,
    steps_tables,
    table,
)
from sst2_monolora import Sst2Settings
from table2 import CONFIGS, Table2Settings, check, demonstration, parse, prepared
from task import Task
from trl import ModelConfig

from vision_bench import figures
from vision_bench.runs import run_as_program, write_atomic


@dataclass
class FrontierSettings(Sst2Settings):
    """The options of sst2_monolora, the task, and the conditions."""

    task: str = field(default="sst2", metadata={"help": "What the arms learn: sst2 or dolly."})
    poison_shares: list[float] = field(
        default_factory=lambda: [0.0, 0.1], metadata={"help": "Of every arm's training rows; 0: the task alone."}
    )
    unseen_poison_shares: list[float] = field(
        default_factory=list,
        metadata={"help": "The same, of poison on --poison_topics only, which safety pairs lack."},
    )
    rows_files: list[str] = field(
        default_factory=list,
        metadata={"help": "frontier.csv of one or several runs: table and figures of these, without any training."},
    )


class LearntTask(NamedTuple):
    """A task that the arms learn, as its recipe knows it."""

    settings: type[Table2Settings]
    load: Callable[[Any, ModelConfig, str], Task]
    experiment: Experiment
    title: str  # before those of the conditions, so that rows of several tasks stay apart


TASKS = {
    "sst2": LearntTask(
        Sst2Settings,
        lambda settings, options, _: sst2_monolora.load_task(settings, options),
        sst2_monolora.EXPERIMENT,
        "",
    ),
    "dolly": LearntTask(Table2Settings, dolly_monolora.load_task, dolly_monolora.EXPERIMENT, "Dolly, "),
}


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


def learnt_task(settings: FrontierSettings) -> LearntTask:
    """The task that settings name. Raises ValueError if there is no such task, or it has not all that they name."""
    if settings.task not in TASKS:
        raise ValueError(f"--task is {settings.task!r}, allowed are {', '.join(TASKS)}.")
    if settings.task == "dolly" and settings.eval_file:
        raise ValueError("--eval_file is for --task sst2: Dolly keeps a fifteenth of --train_file for evaluation.")
    return TASKS[settings.task]


def main(arguments: list[str] | None = None) -> None:
    """Run all conditions as far as they have no rows, then write and print the tables and draw the figures."""
    settings, training, options = parse(
        arguments, FrontierSettings, "silence_frontier", CONFIGS / "offline_frontier.yaml"
    )
    folder = Path(training.output_dir)
    if settings.rows_files:
        panels = read_lines(settings.rows_files)
        report(folder, panels, methods_of(pd.concat(panels.values())))
        return
    task = learnt_task(settings)
    runs = []
    for condition in conditions(settings):
        own = {f.name: copy.copy(getattr(settings, f.name)) for f in fields(task.settings)}
        own |= {"poison_share": condition.poison_share, "poison_topics": condition.poison_topics}
        own |= {} if condition.poison_share else {"poison_file": None}
        one = task.settings(**own)
        where = copy.deepcopy(training)
        where.output_dir = str(Path(training.output_dir) / condition.name)
        check(one, where, options)
        runs.append((condition, one, where))
    panels = {}
    with demonstration(options):
        comparisons = []
        for condition, one, where in runs:
            chosen = copy.deepcopy(options)  # `prepared` sets the offline model
            comparison = prepared(task.load(one, chosen, where.output_dir), one, where, chosen)
            comparisons.append((condition, comparison))
        while comparisons:  # a condition's folder is locked, and its texts are held, until the next one begins
            condition, comparison = comparisons.pop(0)
            run = comparison()
            if run.is_main:
                run.write("results.md", task.experiment.render(run, run.folder))
                panels[task.title + condition.title] = lines_of(run)
    if panels:  # only in the main process
        report(folder, panels, settings.methods)


def report(folder: Path, panels: dict[str, pd.DataFrame], methods: Sequence[str]) -> None:
    """Write the rows of all conditions, write and print their tables, and draw the figures."""
    text = "# The frontier of the task against harm and over-refusal\n"
    for title, lines in panels.items():
        present = [method for method in methods if (lines["method"] == method).any()]
        text += f"\n## {title}\n\n{table(lines, present)}{steps_tables(lines, present)}"
        text += further_tables(lines, present)
    text += "\nMean ± half-width of the 95 % interval over seeds; differences are paired by seed.\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "frontier.csv", lines_text(panels))
    write_atomic(folder / "results.md", text)
    figures.save(folder / "frontier", frontier(panels, methods))
    if any(map(measured_at_steps, panels.values())):
        figures.save(folder / "over_steps", over_steps(panels, methods))
    print(text)


if __name__ == "__main__":
    run_as_program(main)
