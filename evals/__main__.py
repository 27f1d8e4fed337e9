"""`python -m evals COMMAND`: from a model and adapters to answers, verdicts, one table, and what follows from it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evals import settings as told
    from vision_bench.runs import Run

COMMANDS = {
    "generate": "answers of models to prompts, and metrics of tasks",
    "judge": "verdicts on the answers of a folder",
    "run": "generate, judge, then one table and the figure",
    "stress": "how easily is a judge fooled? verdicts on twins of answers",
    "forgetting": "KL to the base and loss on neutral texts, per token",
    "compare": "do two or more runs differ on the same prompts? ours, or lm-eval's",
    "accept": "does an adapter keep what its card asks for? a release gate",
}


def _generate(settings: told.GenerateSettings) -> None:
    from evals.generate import generate

    print(f"Answers and metrics are in {generate(settings).folder}.")


def _judge(folder: told.FolderSettings, judging: told.JudgeSettings) -> None:
    from evals.judge import judge

    _report(judge(folder.output_dir, **judging.arguments))


def _report(run: Run) -> None:
    from evals.report import summary, write_report

    write_report(run)
    print(summary(run))


def _run(settings: told.GenerateSettings, judging: told.JudgeSettings) -> None:
    from evals.generate import generate
    from evals.judge import check_judging, judge
    from evals.records import has_answers

    if judging.judges:
        check_judging(**judging.arguments)  # before hours of generation
    run = generate(settings)
    if judging.judges and not has_answers(run.folder):
        print("There are no answers to judge.")
    elif judging.judges:
        run = judge(run.folder, **judging.arguments)
    _report(run)


def _compare(settings: told.CompareSettings) -> None:
    from evals.compare import check_output, compare

    if settings.output is not None:
        check_output(settings.output)
    comparison = compare(settings.runs, categories=settings.categories, allow=settings.allow)
    print(comparison.text())
    if settings.output is not None:
        comparison.write(settings.output)


def _stress(settings: told.StressSettings, judging: told.JudgeSettings) -> None:
    from evals.report import write_report
    from evals.stress import stress

    if len(settings.answers) > 1:
        raise ValueError(f"stress takes one ANSWERS, got {', '.join(settings.answers)}.")
    options = {"output_dir": settings.output_dir, "limit": settings.limit, "seed": settings.seed} | judging.arguments
    result = stress(next(iter(settings.answers), None), **options)
    print(result.text())
    if result.run is not None:
        write_report(result.run)


def _forgetting(settings: told.ForgettingSettings) -> None:
    from evals.forgetting_rows import measure_forgetting

    _report(measure_forgetting(settings))


def _command(name: str, arguments: list[str]) -> None:
    """Run a sub-command; the heavy imports happen inside it."""
    if name == "accept":
        from evals.accept import main

        sys.exit(main(arguments))
    from evals import settings as told
    from evals.registry import JUDGES
    from vision_bench.runs.settings import parse

    options: dict[str, Any] = {"prog": f"python -m evals {name}", "description": COMMANDS[name]}
    if name in ("judge", "run", "stress"):
        width = max(len(kind.usage) for kind in JUDGES.values())
        lines = (f"  {kind.usage:{width}}  {kind.help}\n" for kind in JUDGES.values())
        options["epilog"] = "judges:\n" + "".join(lines)
        options["formatter_class"] = argparse.RawDescriptionHelpFormatter
    # By name: what runs, of which settings, and whose settings a file of them may hold too.
    kinds: dict[str, tuple[Callable[..., None], list[type], list[type]]] = {
        "generate": (_generate, [told.GenerateSettings], [told.JudgeSettings]),
        "judge": (_judge, [told.FolderSettings, told.JudgeSettings], [told.GenerateSettings]),
        "run": (_run, [told.GenerateSettings, told.JudgeSettings], []),
        "stress": (_stress, [told.StressSettings, told.JudgeSettings], []),
        "forgetting": (_forgetting, [told.ForgettingSettings], [told.GenerateSettings, told.JudgeSettings]),
        "compare": (_compare, [told.CompareSettings], []),
    }
    command, settings, shared = kinds[name]
    command(*parse(settings, arguments, shared=shared, **options))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in COMMANDS:
        lines = "".join(f"  {name:11} {text}\n" for name, text in COMMANDS.items())
        parser = argparse.ArgumentParser(
            prog="python -m evals", description=f"{__doc__}\n\n{lines}", formatter_class=argparse.RawTextHelpFormatter
        )
        parser.add_argument("command", choices=COMMANDS, help="each has its own --help")
        parser.parse_args(words)
    from vision_bench.runs.settings import run_as_program  # after what needs no torch: help, and a wrong command

    run_as_program(lambda: _command(words[0], words[1:]))


if __name__ == "__main__":
    main()
