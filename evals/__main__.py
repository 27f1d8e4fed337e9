"""`python -m evals generate | judge | run`: from a model and adapters to answers, verdicts and one table."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from evals.registry import JUDGES, MODELS

if TYPE_CHECKING:
    from evals.generate import GenerateSettings


def _generation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help=f"folder or name on the hub; or {', '.join(MODELS)}, which is built here"
    )
    parser.add_argument("--tasks", required=True, nargs="+", help="tasks of evals/tasks and any of lm-eval's")
    parser.add_argument("--output_dir", required=True, help="for completions.jsonl, results.jsonl and the rest")
    parser.add_argument("--adapters", nargs="*", default=[], metavar="[NAME=]FOLDER", help="adapters of the model")
    parser.add_argument("--no_base", dest="base", action="store_false", help="leave out the model without adapters")
    parser.add_argument("--limit", type=int, help="only the first so many prompts of each task")
    parser.add_argument("--max_new_tokens", type=int, help="instead of the tasks' own limit (512 in evals/tasks)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--dtype", default="auto", help="auto (of the checkpoint), float32, bfloat16 or float16")
    parser.add_argument("--load_in_4bit", action="store_true", help="the base in NF4, through bitsandbytes")
    parser.add_argument(
        "--thinking", default="off",
        help="off or on: whether chat templates that have a switch ask all arms to think first; thoughts are cut",
    )  # fmt: skip
    parser.add_argument(
        "--thought_markers", nargs=2, metavar=("OPENER", "CLOSER"), help="of a thought, instead of the template's"
    )


def _judging_options(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--judges", required=required, nargs="+", default=[], metavar="JUDGE",
        help="; ".join(f"{kind.usage}: {kind.help}" for kind in JUDGES.values()),
    )  # fmt: skip
    parser.add_argument("--judge_batch_size", type=int, default=8, help="conversations at a time")
    parser.add_argument("--judge_dtype", default="auto", help="auto (of the checkpoint), float32, bfloat16 or float16")
    parser.add_argument("--endpoint", help="OpenAI-compatible server for chat=MODEL; its key is in OPENAI_API_KEY")
    parser.add_argument("--rubric", help="file with the question to chat=MODEL, instead of evals/judges/rubric.txt")


def _settings(options: dict[str, Any]) -> GenerateSettings:
    from evals.generate import GenerateSettings
    from evals.models import Adapter

    markers = options.pop("thought_markers")
    adapters = [Adapter(given) for given in options.pop("adapters")]
    return GenerateSettings(**options, adapters=adapters, thought_markers=markers and tuple(markers))


def _generate(options: dict[str, Any]) -> None:
    from evals.generate import generate

    run = generate(_settings(options))
    print(f"Answers and metrics are in {run.folder}.")


def _judge(options: dict[str, Any]) -> None:
    from evals.judge import judge
    from evals.report import write_report

    print(write_report(judge(options.pop("output_dir"), **_of_judging(options))))


def _run(options: dict[str, Any]) -> None:
    from evals.completions import has_answers
    from evals.generate import generate
    from evals.judge import check_judging, judge
    from evals.report import write_report

    judging = _of_judging(options)
    settings = _settings(options)
    if judging["judges"]:
        check_judging(**judging)  # before hours of generation
    run = generate(settings)
    if judging["judges"] and not has_answers(run.folder):
        print("There are no answers to judge.")
    elif judging["judges"]:
        run = judge(run.folder, **judging)
    print(write_report(run))


def _of_judging(options: dict[str, Any]) -> dict[str, Any]:
    names = {"judges": "judges", "judge_batch_size": "batch_size", "judge_dtype": "dtype"}
    return {new: options.pop(old) for old, new in (names | {"endpoint": "endpoint", "rubric": "rubric"}).items()}


def main(arguments: list[str] | None = None) -> None:
    """Run a subcommand; the heavy imports happen inside it."""
    parser = argparse.ArgumentParser(prog="python -m evals", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _generation_options(commands.add_parser("generate", help="answers of models to prompts, and metrics of tasks"))
    judging = commands.add_parser("judge", help="verdicts on the answers of a folder")
    judging.add_argument("--output_dir", required=True, help="with completions.jsonl; verdicts.jsonl comes beside it")
    _judging_options(judging, required=True)
    both = commands.add_parser("run", help="generate, judge, then one table and the figure")
    _generation_options(both)
    _judging_options(both, required=False)
    options = vars(parser.parse_args(arguments))
    command = {"generate": _generate, "judge": _judge, "run": _run}[options.pop("command")]
    try:
        command(options)
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
