"""What the commands are told: settings as dataclasses, which a program fills by hand and the command line by name."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.prompts import THINKING
from vision_bench.runs.settings import option

DTYPES = ("auto", "float32", "bfloat16", "float16")
_DTYPE_HELP = "auto (of the checkpoint), float32, bfloat16 or float16"


class AdapterNameError(argparse.ArgumentTypeError, ValueError):
    """What the command line says of an adapter does not name one."""


@dataclass(frozen=True)
class Adapter:
    """An adapter as named on the command line, `FOLDER` or `NAME=FOLDER`; FOLDER may be a name on the hub.

    Raises:
        ValueError: the name or the folder is empty.
    """

    text: str  # as it was written

    def __post_init__(self) -> None:
        if not self.name or not self.source:
            raise AdapterNameError(f"--adapters has {self.text!r}; write FOLDER or NAME=FOLDER.")

    @property
    def name(self) -> str:
        """NAME if there is one, else FOLDER as it is written."""
        return self._parts[0]

    @property
    def source(self) -> str:
        """FOLDER."""
        return self._parts[1]

    @property
    def _parts(self) -> tuple[str, str]:
        name, sign, folder = self.text.partition("=")
        return (name, folder) if sign and not Path(self.text).is_dir() else (self.text, self.text)


@dataclass
class GenerateSettings:
    """Settings of `generate`: the models, the tasks, and how answers are made.

    Raises:
        ValueError: a value is not allowed; names the option, the value and what is.
    """

    model: str = option(
        help="Folder or name on the hub; or `offline` for the offline model, which is built here.",
        changes_results=False,
    )
    tasks: list[str] = option(
        help="Tasks of evals/tasks and any tasks, groups and tags of lm-eval's.", changes_results=False
    )
    output_dir: str = option(help="For completions.jsonl, results.jsonl and the rest.", changes_results=False)
    adapters: list[Adapter] = option(
        [],
        help="Adapters of the model; each is a folder or a name on the hub.",
        changes_results=False,
        nargs="*",
        metavar="[NAME=]FOLDER",
    )
    base: bool = option(
        True, help="Whether the model answers without adapters too; --no_base leaves it out.", changes_results=False
    )
    limit: int | None = option(None, help="Only the first so many prompts of each task.")
    max_new_tokens: int | None = option(None, help="Instead of the tasks' own limit (512 in evals/tasks).")
    batch_size: int = option(16, help="Prompts at a time.", changes_results=False)
    dtype: str = option("auto", help=f"Of the weights: {_DTYPE_HELP}.")
    load_in_4bit: bool = option(False, help="The base in NF4, through bitsandbytes.")
    thinking: str = option(
        "off",
        help="off or on: whether chat templates that have a switch ask all arms to think first; thoughts are cut.",
    )
    thought_markers: list[str] | None = option(
        None,
        help="What opens and what ends a thought, instead of what the chat template says.",
        nargs=2,
        metavar=("OPENER", "CLOSER"),
    )
    task_data: dict[str, Any] = option(
        {},
        help="JSON of what the tasks' data functions take, as lm-eval's --metadata.",
        changes_results=False,
        type=json.loads,
        metavar="JSON",
    )

    def __post_init__(self) -> None:
        self.adapters = [Adapter(a) if isinstance(a, str) else a for a in self.adapters]  # a YAML file has texts
        for name in ("limit", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}, allowed is 1 or more.")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}, allowed are {', '.join(DTYPES)}.")
        if self.thinking not in THINKING:
            raise ValueError(f"--thinking is {self.thinking!r}, allowed are {', '.join(THINKING)}.")
        markers = self.thought_markers
        if markers is not None and (len(markers) != 2 or not all(markers)):
            raise ValueError(f"--thought_markers are {markers}; give what opens and what ends a thought.")
        for name, values in (("--tasks", self.tasks), ("--adapters", [a.name for a in self.adapters])):
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                raise ValueError(f"{name} has {', '.join(twice)} more than once; name each once.")
        if not self.tasks:
            raise ValueError("--tasks is empty; name at least one task.")
        if not self.base and not self.adapters:
            raise ValueError("--no_base without --adapters leaves nothing to answer.")


@dataclass
class JudgeSettings:
    """Settings of `judge`: the judges and how they run; `evals.judge.check_judging` checks them."""

    judges: list[str] = option([], help="Judges of the answers, see below.", metavar="JUDGE")
    judge_batch_size: int = option(8, help="Conversations at a time.")
    judge_dtype: str = option("auto", help=f"Of a judge's weights: {_DTYPE_HELP}.")
    endpoint: str | None = option(
        None, help="OpenAI-compatible server for chat=MODEL; its key is read from OPENAI_API_KEY."
    )
    rubric: str | None = option(None, help="File with the question to chat=MODEL, instead of evals/judges/rubric.txt.")
    perplexity_model: str | None = option(
        None, help="Model of the judge coherence: whether it, such as the base, finds the answers likely."
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `evals.judge.judge`."""
        return {
            "judges": self.judges,
            "batch_size": self.judge_batch_size,
            "dtype": self.judge_dtype,
            "endpoint": self.endpoint,
            "rubric": self.rubric,
            "perplexity_model": self.perplexity_model,
        }


@dataclass
class FolderSettings:
    """Setting of `judge` that names the folder of the answers."""

    output_dir: str = option(help="With completions.jsonl; verdicts.jsonl comes beside it.")


@dataclass
class StressSettings:
    """Settings of `stress`; `evals.stress.stress` checks them."""

    answers: list[str] = option(
        [],
        help="A folder with completions.jsonl, or such a file; without it a few answers that come with evals.",
        positional=True,
        metavar="ANSWERS",
    )
    output_dir: str | None = option(None, help="For the twins and verdicts; by default ANSWERS/stress.")
    limit: int = option(50, help="How many answers, drawn by the seed.")
    seed: int = option(0, help="Of the draw and of the twins.")


@dataclass
class ForgettingSettings:
    """Settings of `forgetting`; `evals.forgetting_rows.measure_forgetting` checks what they name.

    Raises:
        ValueError: a number is not allowed, or an adapter is named twice.
    """

    model: str = option(help="Folder or name on the hub; or `offline` for the offline model.", changes_results=False)
    output_dir: str = option(help="For results.jsonl; may be a folder of generate.", changes_results=False)
    adapters: list[Adapter] = option(
        [], help="Adapters of the model.", changes_results=False, nargs="*", metavar="[NAME=]FOLDER"
    )
    texts: str | None = option(
        None,
        help="File with the column text, or prompt and response (jsonl, csv, parquet, ...), instead of the 48 "
        "paragraphs of evals/neutral_text.jsonl.",
        changes_results=False,
        metavar="FILE",
    )
    batch_size: int = option(4, help="Texts at a time.", changes_results=False)
    dtype: str = option("auto", help=f"Of the weights: {_DTYPE_HELP}.")
    load_in_4bit: bool = option(False, help="The base in NF4, through bitsandbytes.")

    def __post_init__(self) -> None:
        self.adapters = [Adapter(a) if isinstance(a, str) else a for a in self.adapters]
        if self.batch_size < 1:
            raise ValueError(f"--batch_size is {self.batch_size}, allowed is 1 or more.")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}, allowed are {', '.join(DTYPES)}.")
        twice = [name for name, count in Counter(a.name for a in self.adapters).items() if count > 1]
        if twice:
            raise ValueError(f"--adapters has {', '.join(twice)} more than once; name each once.")


@dataclass
class CompareSettings:
    """Settings of `compare`; `evals.compare.compare` checks the runs."""

    runs: list[str] = option(
        [],
        help="[NAME=]PATH[:ARM]: a folder of evals with its arms or one of them (base, or an adapter's name), or a "
        "folder or file of lm-eval's --log_samples. The first arm is what the others are compared with.",
        positional=True,
        metavar="RUN",
    )
    categories: bool = option(False, help="A row for each category of prompts too.")
    allow: list[str] = option([], help="Settings that may differ, because they are what is compared.", nargs="*")
    output: Path | None = option(None, help="File for all columns, .csv or .json.", metavar="FILE")
