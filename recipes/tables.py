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
import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from experiments import CannotShow, Experiment, diverged_seeds
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from PIL import Image

from vision_bench.figures import SUFFIXES
from vision_bench.runs import CONFIG, ROWS, Run, option, parse, read_rows, run_as_program, write_atomic

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
INTRODUCTION = """\
The tables and figures of the ICLR 2025 paper [Beyond Interpretability: The Gains of Feature Monosemanticity on Model \
Robustness](https://openreview.net/forum?id=g6Qc3p7JH5), what it says there, and what was measured here, with 95 % \
intervals. The scale of each run stands in its settings; unless they are the paper's, its numbers are of another scale.
"""


def experiments() -> list[Experiment]:
    """What the recipes with a part in the paper say of themselves, in the order of the page."""
    return [import_module(name).EXPERIMENT for name in RECIPES]


@dataclass
class TablesSettings:
    """Settings of the page: the folders, and which tables it shows."""

    output_dir: str = option(help="Folder of the page, the tables and the pictures.")
    runs: str = option("runs", help=f"Folder below which every {ROWS} is read.")
    only: list[str] = option([], help="Tables and figures, such as table_1 figure_4c; by default all.")
    split: bool = option(False, help="Show several configurations of a recipe, each by itself.")

    def __post_init__(self) -> None:
        items = dict.fromkeys(item for experiment in experiments() for item in experiment.items)
        unknown = [item for item in self.only if item not in items]
        if unknown:
            raise ValueError(f"only has {unknown[0]!r}; it takes {', '.join(items)}.")


class Source(NamedTuple):
    """Rows of one configuration of a recipe, as a folder has them."""

    folder: Path
    recipe: str
    settings: dict[str, Any]
    facts: dict[str, Any]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Section:
    """A part of the page; `claim`, `state` and `tables` are Markdown."""

    name: str  # anchor, and the folder of its tables and pictures
    title: str
    claim: str  # of the paper
    state: str  # where the rows are from, or why nothing is shown
    tables: str | None = None  # None: nothing is shown
    pictures: Sequence[tuple[Path, str]] = ()  # PNG files and captions
    settings: dict[str, Any] = field(default_factory=dict)


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
    sources = []
    for path in sorted(folder.rglob(ROWS)):
        if output.resolve() in path.resolve().parents:
            raise ValueError(f"output_dir is {output}, which holds the run {path.parent}; choose another folder.")
        if not (path.parent / CONFIG).exists():
            raise ValueError(f"{path} has no {CONFIG} beside it, which says what the rows are of; copy it along.")
        described = json.loads((path.parent / CONFIG).read_text(encoding="utf-8"))
        settings = described["config"]
        telling = settings.keys() - overridden.get(described["recipe"], frozenset())
        by_configuration: dict[str, list[dict[str, Any]]] = {}
        for row in read_rows(path):
            own = settings | {name: row["config"][name] for name in telling & row["config"].keys()}
            by_configuration.setdefault(json.dumps([row["recipe"], own], sort_keys=True), []).append(row)
        for key, rows in by_configuration.items():
            recipe, own = json.loads(key)
            sources.append(Source(path.parent, recipe, own, described.get("facts", {}), rows))
    if not sources:
        raise ValueError(f"there is no {ROWS} below {folder}; run a recipe, such as `{experiments()[1].command}`.")
    return sources


def differences(sources: Iterable[Source]) -> str:
    """Name the folders of sources, and the settings in which their configurations differ."""
    sources = list(sources)
    names = dict.fromkeys(name for source in sources for name in source.settings)
    values = {name: [source.settings.get(name) for source in sources] for name in names}
    different = (name for name in names if any(value != values[name][0] for value in values[name]))
    folders = ", ".join(dict.fromkeys(str(source.folder) for source in sources))
    settings = "; ".join(f"{name}: {' / '.join(map(repr, values[name]))}" for name in different)
    return f"{folders} ({settings or 'the same settings'})"


def chosen(settings: TablesSettings, sources: list[Source]) -> list[tuple[Experiment, list[Source]]]:
    """The experiments to show, each with its rows.

    Raises:
        ValueError: one has rows of several configurations and they are not to be split, or one that was asked for has
            no rows.
    """
    shown = [
        (experiment, [source for source in sources if source.recipe == experiment.recipe])
        for experiment in experiments()
        if not settings.only or set(experiment.items) & set(settings.only)
    ]
    for experiment, runs in shown:
        if len(runs) > 1 and not settings.split:
            raise ValueError(
                f"rows of {len(runs)} configurations of {experiment.recipe} cannot share a table: {differences(runs)}"
                ". Name a folder with one of them, or give --split to show each by itself."
            )
    for item in settings.only:
        makers = [(experiment, runs) for experiment, runs in shown if item in experiment.items]
        if not any(runs for _, runs in makers):
            recipes = " or ".join(experiment.recipe for experiment, _ in makers)
            commands = " or ".join(f"`{experiment.command}`" for experiment, _ in makers)
            raise ValueError(f"{item} needs rows of {recipes}, and {settings.runs} has none: {commands} makes them.")
    return shown


def provenance(source: Source) -> str:
    """Where rows are from, when, and on what they were made."""

    def joined(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    rows, seeds = source.rows, source.settings["seeds"]
    days = sorted({row["time"][:10] for row in rows})
    return (
        f"Ours: `{source.folder}`, {len(rows)} rows, {len(seeds)} seed{'s' * (len(seeds) != 1)}, "
        f"{joined(row['device'] for row in rows if row['device'])}, "
        f"torch {joined(row['versions'].get('torch', '?') for row in rows)}, "
        f"commit {joined(row['commit'][:7] for row in rows if row['commit']) or 'unknown'}, "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}."
    )


def section(experiment: Experiment, source: Source, name: str, title: str, settings: TablesSettings) -> Section:
    """A run's table and pictures, in a folder of their own; without them if it was stopped or cannot be shown.

    Raises:
        ValueError: it was stopped or cannot be shown, and was asked for.
    """
    folder = Path(settings.output_dir) / name
    for pattern in ("results.md", *(f"{stem}.{suffix}" for stem in experiment.pictures for suffix in SUFFIXES)):
        for stale in folder.glob(pattern):
            stale.unlink()  # of another run that was shown here
    state = "Not shown"
    try:
        run = Run(folder, source.recipe, experiment.configuration(source.settings, source.facts))
        run.rows = source.rows
        if lacking := experiment.lacking(run):
            state = "Not whole"
            again = f"the same command of recipes/{source.recipe}.py again makes them"
            raise CannotShow(f"{source.folder} lacks {lacking}: {again}.")
        folder.mkdir(parents=True, exist_ok=True)
        tables = experiment.render(run, source.folder) + diverged_seeds(run)
    except CannotShow as error:
        if settings.only:
            raise
        return Section(name, title, experiment.claim, f"{state}: {error}", settings=source.settings)
    run.write("results.md", tables)
    pictures = experiment.drawn(folder)
    return Section(name, title, experiment.claim, provenance(source), tables, pictures, source.settings)


def sections(settings: TablesSettings, shown: list[tuple[Experiment, list[Source]]]) -> list[Section]:
    """A section for each configuration, or one that says what makes the rows."""
    parts = []
    for experiment, runs in shown:
        if not runs:
            nothing = f"Ours: no rows below `{settings.runs}`; this makes them: `{experiment.command}`."
            parts.append(Section(experiment.recipe, experiment.title, experiment.claim, nothing))
        for i, source in enumerate(runs, 1):
            name, title = experiment.recipe, experiment.title
            if len(runs) > 1:
                name, title = f"{name}-{i}", f"{title} ({i}: {source.folder.name})"
            parts.append(section(experiment, source, name, title, settings))
    return parts


def lowered(markdown: str) -> str:
    """Markdown whose headings are two levels lower."""
    return re.sub(r"^(#+ )", r"##\1", markdown, flags=re.MULTILINE)


def width(picture: Path) -> int:
    """The pixels of a line."""
    with Image.open(picture) as opened:
        return opened.width


def page(introduction: str, parts: Sequence[Section]) -> str:
    """The whole HTML document, by `tables.html.j2`; `introduction` is Markdown."""
    # HTML within Markdown is shown, not obeyed; each table gets a box that scrolls.
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.add_render_rule("table_open", lambda *_: '<div class="wide" tabindex="0"><table>\n')
    markdown.add_render_rule("table_close", lambda *_: "</table></div>\n")
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "markdown": markdown.render,
        "lowered": lowered,
        "base64": lambda path: b64encode(path.read_bytes()).decode(),
        "width": width,
    }
    return templates.get_template("tables.html.j2").render(title=TITLE, introduction=introduction, sections=parts)


def main(arguments: list[str] | None = None) -> None:
    """Read the rows, draw, and write the tables and the page."""
    (settings,) = parse([TablesSettings], arguments)
    output = Path(settings.output_dir)
    sources = read(Path(settings.runs), output)
    shown = chosen(settings, sources)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir is {output}, which cannot be written to ({error}); choose another.") from None
    parts = sections(settings, shown)
    introduction = INTRODUCTION + "\n"
    for part in parts:
        state = "" if part.tables is not None else " (not shown)" if part.settings else " (no rows)"
        introduction += f"- [{part.title}](#{part.name}){state}\n"
    if others := sorted({source.recipe for source in sources} - set(RECIPES)):
        introduction += f"\nRows that are of no table or figure of the paper were left out: {', '.join(others)}.\n"
    text = f"# {TITLE}\n\n{introduction}"
    for part in parts:
        text += f'\n<a id="{part.name}"></a>\n\n## {part.title}\n\n{part.claim}\n\n{part.state}\n\n'
        text += "".join(f"![{caption}]({path.relative_to(output)})\n" for path, caption in part.pictures)
        text += "\n" + lowered(part.tables or "")
    write_atomic(output / "results.md", text)
    write_atomic(output / "index.html", page(introduction, parts))
    print(introduction + f"\n{output / 'index.html'}")


if __name__ == "__main__":
    run_as_program(main)
