"""What the page of results asks of a recipe that has a part in the paper: the class of its `EXPERIMENT`.

To put an experiment on the page, write its recipe, export an `EXPERIMENT`, and add the recipe's name to
`tables.RECIPES`:

    def cells(config: dict[str, Any]) -> Iterator[Cell]:
        for seed, rate in product(config["seeds"], config["rates"]):
            yield Cell("accuracy", seed, {"rate": rate})

    def report(run: Run) -> str:
        rows = [[row["seed"], row["value"]] for row in run.find("accuracy")]
        return "# Accuracy\\n\\n" + markdown_table(["seed", "accuracy"], rows)

    def draw(run: Run) -> None:
        figures.save(run.folder / "figure_7", ...)

    EXPERIMENT = Experiment(
        recipe="my_recipe", items=("figure_7",), title="Figure 7: accuracy", claim="The paper: it rises.",
        pictures={"figure_7": "Figure 7: ours"}, cells=cells, report=report, draw=draw,
    )
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from vision_bench.figures import SUFFIXES
from vision_bench.runs import DIVERGED, Cell, Run, parse, recorded


class CannotShow(ValueError):
    """Rows that are whole but cannot be made a table by this version."""


@dataclass(frozen=True)
class Experiment:
    """What a recipe shows of the paper.

    Args:
        recipe: its file, and what its rows say they are from.
        items: the paper's tables and figures that it has a part in, as `--only` takes them.
        title, claim: of the section; the claim is the paper's, with its numbers where it prints them. Markdown.
        pictures: names of the drawings, without suffix, and their captions, in the order of the page. A name may end
            with *, for which the caption has {}.
        cells: all rows that a whole run has, from its recorded configuration; measuring and resuming use it too.
        report: tables of a whole run, as Markdown.
        draw: draws `pictures` into the folder of a whole run. None: what they show stands in no row, so that the
            pictures in the folder of the recipe's own run are taken.
        summary: what a terminal shows of a whole run. None: the report.
        facts: names of the facts that `report` needs, such as num_classes; see `vision_bench.runs.Run`.
        defaults: whatever settings the recipe records, at their default: a setting that a run lacks was at it, and a
            run with a setting that is not here is not shown. None: settings are taken as they are.
        overridden: settings that rows replace by values of their own, so that they do not tell configurations apart.
    """

    recipe: str
    items: tuple[str, ...]
    title: str
    claim: str
    pictures: Mapping[str, str]
    cells: Callable[[dict[str, Any]], Iterable[Cell]]
    report: Callable[[Run], str]
    draw: Callable[[Run], None] | None
    facts: tuple[str, ...] = ()
    summary: Callable[[Run], str] | None = None
    defaults: Mapping[str, Any] | None = field(default=None, repr=False)
    overridden: frozenset[str] = frozenset()

    @property
    def command(self) -> str:
        """The command that makes the rows."""
        return f"python recipes/{self.recipe}.py --output_dir runs/{self.recipe}"

    def configuration(self, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the configuration of a run, for `cells` and `report`, from its recorded settings and facts.

        Raises:
            CannotShow: it lacks facts, or has settings that this version of the recipe does not have.
        """
        lacking = [name for name in self.facts if name not in facts]
        if lacking:
            raise CannotShow(
                f"rows of {self.recipe} do not say the {', '.join(lacking)}: they are of an older version of "
                f"recipes/{self.recipe}.py; the same command again adds it, and measures nothing anew."
            )
        unknown = sorted(settings.keys() - self.defaults.keys()) if self.defaults is not None else []
        if unknown:
            raise CannotShow(
                f"rows of {self.recipe} have the settings {', '.join(unknown)}, which recipes/{self.recipe}.py lacks; "
                "use the version that made them, or run it again."
            )
        return {**(self.defaults or {}), **settings, **facts}

    def run(
        self, settings_class: type[Any], measure: Callable[[Run, Any], None], arguments: list[str] | None = None
    ) -> None:
        """Measure what the output folder has no rows of, then show it: the program of an experiment without images.

        Args:
            settings_class: of all settings; one is output_dir.
            measure: adds the rows that a run lacks, by the settings.
        """
        (settings,) = parse([settings_class], arguments)
        run = Run(settings.output_dir, self.recipe, recorded(settings), defaults=self.defaults)
        run.bind()
        measure(run, settings)
        show(run, self.report, self.draw)

    def lacking(self, run: Run) -> str | None:
        """What a stopped run lacks, in words; None if it is whole."""
        cells = run.lacking(self.cells(run.config))
        if not cells:
            return None
        first = ", ".join(f"{name} {value}" for name, value in {**cells[0].arm, "seed": cells[0].seed}.items())
        more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        return f"rows of the metric {cells[0].metric} ({first}{more})"

    def render(self, run: Run, source: Path) -> str:
        """Draw the pictures of a whole run into its folder, and return its tables; `source` is where the rows are."""
        if self.draw is not None:
            self.draw(run)
        else:
            for name, suffix in product(self.pictures, SUFFIXES):
                for path in source.glob(f"{name}.{suffix}"):
                    shutil.copyfile(path, run.folder / path.name)
        return self.report(run)

    def drawn(self, folder: Path) -> list[tuple[Path, str]]:
        """The pictures that a folder has, with their captions."""
        return [
            (path, caption.format(path.stem.removeprefix(name.rstrip("*"))))
            for name, caption in self.pictures.items()
            for path in sorted(folder.glob(f"{name}.png"))
        ]


def show(run: Run, report: Callable[[Run], str], draw: Callable[[Run], None] | None = None) -> None:
    """Write `results.md`, draw, and print the tables; the main process does."""
    if run.is_main:
        text = report(run) + diverged_seeds(run)
        run.write("results.md", text)
        if draw is not None:
            draw(run)
        print(text)


def diverged_seeds(run: Run) -> str:
    """Which seeds diverged as a whole, and why, as Markdown; nothing where none did."""
    # A mark with a method is of an arm, and stands in the recipe's own table.
    marks = [row for row in run.find(DIVERGED) if "method" not in row["config"]]
    if not marks:
        return ""
    reasons = "; ".join(f"{row['seed']} ({row['config']['reason'].rstrip('.')})" for row in marks)
    return f"\n**Diverged:** seeds {reasons}. They have no part in the tables, which are of the other seeds.\n"
