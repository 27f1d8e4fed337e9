"""Every table and figure of the paper with ours beside it, from the rows of other recipes, and one page of them all.

    python recipes/tables.py --runs runs --output_dir tables
    python recipes/tables.py --runs runs --output_dir tables --only table_1 figure_4c
    python recipes/tables.py --runs runs --output_dir tables --split

Reads every `results.jsonl` below `--runs` and computes nothing anew but what the pictures need. The output folder gets
a folder for each run with its table and pictures (PNG and PDF), `results.md` with all tables, and `index.html`, one
self-contained page to open from disk or to send: pictures within, no script, no network.

Rows of two configurations of a recipe never share a table: they are refused, or with `--split` shown one after the
other. What the paper has and no row is about stands on the page with the command that makes the rows; asked for by
`--only` it is an error. A run that was stopped is not shown as if it were whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from experiments import CannotShow, Experiment
from page import Section, lowered, page
from program import parse, run_as_program
from unported_experiments import UNPORTED

from vision_bench.figures import SUFFIXES
from vision_bench.runs import CONFIG, ROWS, Run, read_rows, write_atomic

RECIPES = [  # with a part in the paper, in the order of the page; each exports an `EXPERIMENT`
    "top_activated_samples",
    "label_noise_probing",
    "input_noise_probing",
    "ood_probing",
    "few_shot_finetuning",
    "noisy_finetuning",
    "sst2_monolora",
    "dolly_monolora",
    "salient_features",
    "superposition",
    "separability",
    "robust_loss",
]
TITLE = "Beyond Interpretability: the paper's tables and figures, and ours"


def experiments() -> list[Experiment]:
    """What the recipes with a part in the paper say of themselves, in the order of the page."""
    return [getattr(import_module(name), "EXPERIMENT", None) or UNPORTED[name] for name in RECIPES]


@dataclass
class TablesArguments:
    """Where the rows are, and what is made of them."""

    output_dir: str = field(metadata={"help": "Folder of the page, the tables and the pictures."})
    runs: str = field(default="runs", metadata={"help": f"Folder below which every {ROWS} is read."})
    only: list[str] = field(
        default_factory=list, metadata={"help": "Tables and figures, such as table_1 figure_4c; by default all."}
    )
    split: bool = field(default=False, metadata={"help": "Show several configurations of a recipe, each by itself."})

    def __post_init__(self) -> None:
        items = dict.fromkeys(item for experiment in experiments() for item in experiment.items)
        unknown = [item for item in self.only if item not in items]
        if unknown:
            raise ValueError(f"only has {unknown[0]!r}; it takes {', '.join(items)}.")


class Source(NamedTuple):
    """Rows of one configuration of a recipe."""

    folder: Path
    recipe: str
    config: dict[str, Any]
    facts: dict[str, Any]
    rows: list[dict[str, Any]]


def read(folder: Path, output: Path) -> list[Source]:
    """The rows below a folder, by configuration; a file with rows of several gives several.

    Raises:
        ValueError: there are none, a file of rows is broken or without its configuration, or one is below `output`.
    """
    if not folder.is_dir():
        raise ValueError(
            f"runs is {folder}, which is no folder; name the one that holds the output folders of recipes."
        )
    overridden = {experiment.recipe: experiment.overridden for experiment in experiments()}
    found = []
    for path in sorted(folder.rglob(ROWS)):
        if output.resolve() in path.resolve().parents:
            raise ValueError(f"output_dir is {output}, which holds the run {path.parent}; choose another folder.")
        if not (path.parent / CONFIG).exists():
            raise ValueError(f"{path} has no {CONFIG} beside it, which says what the rows are of; copy it along.")
        described = json.loads((path.parent / CONFIG).read_text(encoding="utf-8"))
        recipe, settings, facts = described["recipe"], described["config"], described.get("facts", {})
        by_configuration: dict[str, list[dict[str, Any]]] = {}
        for row in read_rows(path):
            own = {k: v for k, v in row["config"].items() if k in settings and k not in overridden.get(recipe, ())}
            config = settings | own
            by_configuration.setdefault(json.dumps([row["recipe"], config], sort_keys=True), []).append(row)
        for key, rows in by_configuration.items():
            found.append(Source(path.parent, *json.loads(key), facts, rows))
    if not found:
        raise ValueError(f"there is no {ROWS} below {folder}; run a recipe, such as `{experiments()[1].command}`.")
    return found


def different(sources: Iterable[Source]) -> str:
    """Where the configurations of sources are, and in what they differ."""
    sources = list(sources)
    names = dict.fromkeys(name for source in sources for name in source.config)
    values = {name: [source.config.get(name) for source in sources] for name in names}
    apart = {name: found for name, found in values.items() if any(value != found[0] for value in found)}
    where = ", ".join(dict.fromkeys(str(source.folder) for source in sources))
    what = "; ".join(f"{name}: {' / '.join(map(repr, found))}" for name, found in apart.items())
    return f"{where} ({what or 'the same settings'})"


def chosen(script: TablesArguments, sources: list[Source]) -> list[tuple[Experiment, list[Source]]]:
    """The experiments to show, each with its rows.

    Raises:
        ValueError: one has rows of several configurations and they are not to be split, or one that was asked for has
            no rows.
    """
    wanted = [e for e in experiments() if not script.only or set(e.items) & set(script.only)]
    found = [(experiment, [s for s in sources if s.recipe == experiment.recipe]) for experiment in wanted]
    for experiment, of in found:
        if len(of) > 1 and not script.split:
            raise ValueError(
                f"rows of {len(of)} configurations of {experiment.recipe} cannot share a table: {different(of)}. "
                "Name a folder with one of them, or give --split to show each by itself."
            )
    for item in script.only:
        makers = [(experiment, of) for experiment, of in found if item in experiment.items]
        if not any(of for _, of in makers):
            recipes = " or ".join(experiment.recipe for experiment, _ in makers)
            commands = " or ".join(f"`{experiment.command}`" for experiment, _ in makers)
            raise ValueError(f"{item} needs rows of {recipes}, and {script.runs} has none: {commands} makes them.")
    return found


def provenance(source: Source, seeds: list[int]) -> str:
    """Where rows are from, when, and on what they were made."""

    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in source.rows if row[name]))

    days = sorted({row["time"][:10] for row in source.rows})
    torch = ", ".join(dict.fromkeys(row["versions"].get("torch", "?") for row in source.rows))
    commits = ", ".join(dict.fromkeys(str(row["commit"])[:7] for row in source.rows if row["commit"]))
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    return (
        f"Ours: `{source.folder}`, {len(source.rows)} rows, {len(seeds)} seed{'s' * (len(seeds) != 1)}, "
        f"{values('device')}, torch {torch}, commit {commits or 'unknown'}, {when}."
    )


class Stopped(CannotShow):
    """A run that is not whole."""


def section(experiment: Experiment, source: Source, name: str, title: str, output: Path, asked: bool) -> Section:
    """A run's table and pictures, in a folder of their own; without them if it was stopped or cannot be shown.

    Raises:
        ValueError: it was stopped or cannot be shown, and was asked for.
    """
    run = Run(output / name, source.recipe, source.config)
    for pattern in ("results.md", *(f"{stem}.{suffix}" for stem in experiment.pictures for suffix in SUFFIXES)):
        for stale in run.folder.glob(pattern):
            stale.unlink()  # of another run that was shown here
    try:
        run = Run(run.folder, source.recipe, experiment.configuration(source.config, source.facts))
        run.rows = source.rows
        missing = experiment.lacking(run)
        if missing is not None:
            raise Stopped(
                f"{source.folder} lacks {missing}: the same command of recipes/{source.recipe}.py again makes them."
            )
        run.folder.mkdir(parents=True, exist_ok=True)
        text = experiment.render(run, source.folder)
    except CannotShow as error:
        if asked:
            raise
        state = "Not whole" if isinstance(error, Stopped) else "Not shown"
        return Section(name, title, experiment.claim, f"{state}: {error}", settings=source.config)
    run.write("results.md", text)
    said = provenance(source, source.config["seeds"])
    return Section(name, title, experiment.claim, said, text, experiment.drawn(run.folder), source.config)


def sections(script: TablesArguments, found: list[tuple[Experiment, list[Source]]]) -> list[Section]:
    """A section for each configuration, or one that says what makes the rows."""
    made = []
    for experiment, of in found:
        if not of:
            nothing = f"Ours: no rows below `{script.runs}`; this makes them: `{experiment.command}`."
            made.append(Section(experiment.recipe, experiment.title, experiment.claim, nothing))
        for i, source in enumerate(of, 1):
            name, title = experiment.recipe, experiment.title
            if len(of) > 1:
                name, title = f"{name}-{i}", f"{title} ({i}: {source.folder.name})"
            made.append(section(experiment, source, name, title, Path(script.output_dir), bool(script.only)))
    return made


def introduction(made: list[Section], sources: list[Source]) -> str:
    """What the page is, and its contents, as Markdown."""
    text = (
        "The tables and figures of the ICLR 2025 paper "
        "[Beyond Interpretability: The Gains of Feature Monosemanticity on Model Robustness]"
        "(https://openreview.net/forum?id=g6Qc3p7JH5), what it says there, and what was measured here, with 95 % "
        "intervals. The scale of each run stands in its settings; unless they are the paper's, its numbers are of "
        "another scale.\n\n"
    )
    for one in made:
        state = "" if one.markdown is not None else " (not shown)" if one.settings else " (no rows)"
        text += f"- [{one.title}](#{one.name}){state}\n"
    others = sorted({s.recipe for s in sources} - set(RECIPES))
    return text + (
        f"\nRows that are of no table or figure of the paper were left out: {', '.join(others)}.\n" * bool(others)
    )


def main(arguments: list[str] | None = None) -> None:
    """Read the rows, draw, and write the tables and the page."""
    script = parse(TablesArguments, arguments)
    output = Path(script.output_dir)
    sources = read(Path(script.runs), output)
    found = chosen(script, sources)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir is {output}, which cannot be written to ({error}); choose another.") from None
    made = sections(script, found)
    text = introduction(made, sources)
    tables = f"# {TITLE}\n\n{text}"
    for one in made:
        tables += f'\n<a id="{one.name}"></a>\n\n## {one.title}\n\n{one.claim}\n\n{one.source}\n\n'
        tables += "".join(f"![{caption}]({path.relative_to(output)})\n" for path, caption in one.pictures)
        tables += "\n" + lowered(one.markdown or "")
    write_atomic(output / "results.md", tables)
    write_atomic(output / "index.html", page(TITLE, text, made))
    print(text + f"\n{output / 'index.html'}")


if __name__ == "__main__":
    run_as_program(main)
