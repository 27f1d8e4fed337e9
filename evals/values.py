"""What runs measured on each prompt: of folders of `python -m evals`, and of lm-eval's `--log_samples` files.

base, adapter = read_arms("runs/safety")
adapter.values[Measured("xstest", "unsafe", "refusal")]["7"]  # Value({"prompt": "..."}, "safe", 1.0)
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from evals.records import (
    COMPLETIONS,
    SAMPLES,
    VERDICTS,
    Verdict,
    read_completions,
    read_samples,
    read_verdicts,
    verdicts_on,
)
from evals.registry import judge_kind
from vision_bench.runs import read_lines

_LM_EVAL_FILE = re.compile(r"samples_(?P<task>.+?)(_(?P<date>\d{4}-\d\d-\d\dT[\d.:-]+))?\.jsonl")
BASE = "base"  # the arm without an adapter
# Settings of an answer that are the model's own, so that two models may differ in them.
_OF_THE_MODEL = {"end_token_ids", "tokenizer", "checksums", "prompt_tokens_cut"}
_LM_EVAL_FIELDS = ("doc_id", "doc_hash", "prompt_hash", "target_hash", "metrics", "arguments")


class Measured(NamedTuple):
    """What was measured: a task's metric, by a judge or, for lm-eval's metrics, under a filter."""

    task: str
    metric: str
    judge: str = ""
    filter: str = ""

    def __str__(self) -> str:
        by = self.judge or (f"({self.filter})" if self.filter not in ("", "none") else "")
        return f"{self.task} {self.metric} {by}".strip()


class Value(NamedTuple):
    """The value on one prompt."""

    asked: dict[str, str]  # the prompt, or checksums of document, prompt and right answer
    category: str | None  # of the prompt, as its data set names it
    value: float | None  # None where the judge did not decide, or there is no answer


@dataclass
class ArmValues:
    """What one model, with or without an adapter, got on the prompts of its tasks."""

    name: str
    values: dict[Measured, dict[str, Value]] = field(default_factory=lambda: defaultdict(dict))  # by prompt
    settings: dict[Measured, dict[str, Any]] = field(default_factory=dict)  # that arms which are compared share


def read_arms(text: str) -> list[ArmValues]:
    """The arms of a run that the command line names, `[NAME=]PATH[:ARM]`.

    PATH is a folder of `python -m evals`, whose arms are the base and the adapters; or a folder or file of lm-eval's
    `--log_samples`, which has one arm. ARM is one of a folder's, `base` or an adapter's name.

    Raises:
        ValueError: there is no such run or arm, or its files cannot be read.
    """
    name, path, arm = _parts(text)
    if path.is_file() or not any((path / file).is_file() for file in (COMPLETIONS, SAMPLES)):
        if arm is not None:
            raise ValueError(
                f"{text!r} names the arm {arm!r}, but {path} is lm-eval's, which has one model's samples."
            )
        return [_lm_eval_arm(name or path.stem, path)]
    arms = _folder_arms(path)
    if not arms:
        raise ValueError(f"{path} has answers and no values of them: `python -m evals judge` lets judges say some.")
    if arm is None:
        return [ArmValues(f"{name}:{a.name}" if name else a.name, a.values, a.settings) for a in arms.values()]
    if arm not in arms:
        raise ValueError(f"{path} has no results of {arm!r}; it has those of {', '.join(arms)}.")
    return [ArmValues(name or arm, arms[arm].values, arms[arm].settings)]


def _parts(text: str) -> tuple[str | None, Path, str | None]:
    """NAME, PATH and ARM of `[NAME=]PATH[:ARM]`; the path is the longest that exists."""
    for name, rest in ((None, text), text.partition("=")[::2]):
        colons = [len(rest), *(i for i in range(len(rest) - 1, 0, -1) if rest[i] == ":")]
        for colon in colons if rest else ():
            path, arm = Path(rest[:colon]), rest[colon + 1 :]
            if path.exists():
                return name or None, path, arm or None
    raise ValueError(
        f"{text!r} names no run: there is no such folder or file. Write [NAME=]PATH[:ARM], such as runs/safety or "
        "mine=runs/safety:lora-seed0."
    )


def _folder_arms(folder: Path) -> dict[str, ArmValues]:
    """The arms of a folder of `python -m evals` by name."""
    arms: dict[str, ArmValues] = {}
    models: set[str] = set()

    def arm(model: str, adapter: str | None) -> ArmValues:
        models.add(model)
        if len(models) > 1:
            raise ValueError(f"{folder} has answers of several models ({', '.join(sorted(models))}), not of arms.")
        if adapter == BASE:
            raise ValueError(f"{folder} has an adapter called {BASE}, as the base itself is: give it another name.")
        name = adapter or BASE
        return arms.setdefault(name, ArmValues(name))

    samples = read_samples(folder / SAMPLES).rows if (folder / SAMPLES).is_file() else []
    metrics: dict[tuple[str, str, str | None], dict[str, None]] = defaultdict(dict)
    for sample in samples:
        metrics[sample.task, sample.filter, sample.category] |= dict.fromkeys(sample.metrics)
    for sample in samples:
        of = arm(sample.model, sample.adapter)
        asked = _asked(sample.document, sample.prompt, sample.target)
        # An answer that ended within a thought has no metric, and counts as asked under each that it would have.
        for metric, value in (sample.metrics or metrics[sample.task, sample.filter, sample.category]).items():
            key = Measured(sample.task, metric, filter=sample.filter)
            of.values[key][sample.prompt_id] = Value(asked, sample.category, value)
            of.settings[key] = sample.settings
    if not (folder / VERDICTS).is_file():
        return arms
    completions = {row.key: row for row in read_completions(folder / COMPLETIONS).rows}
    for verdict in verdicts_on(completions, read_verdicts(folder / VERDICTS).rows, folder):
        of, answer = arm(verdict.model, verdict.adapter), completions[verdict.completion_key]
        generation = {k: v for k, v in answer.generation.items() if k not in _OF_THE_MODEL}
        settings = generation | {f"judge's {name}": value for name, value in verdict.settings.items()}
        for metric, number in _numbers_of(verdict):
            key = Measured(verdict.task, metric, verdict.judge)
            of.values[key][verdict.prompt_id] = Value({"prompt": answer.prompt}, verdict.category, number)
            of.settings[key] = settings
    return arms


def _numbers_of(verdict: Verdict) -> Iterator[tuple[str, float | None]]:
    """The metrics of a verdict under the names that tables give them; None where the judge did not decide."""
    kind = judge_kind(verdict.judge)
    yield kind.unsafe, float(verdict.outcome == "unsafe") if verdict.is_parsed else None
    for label in kind.labels:
        yield label, verdict.scores.get(label) if verdict.is_parsed else None
    if verdict.scores and not kind.labels:
        score = verdict.mean_score if verdict.is_parsed else None
        yield "score", None if score is None else 100 * score


def _asked(document: str, prompt: str, target: str) -> dict[str, str]:
    return {"document": document, "prompt as it was sent": prompt, "right answer": target}


def _lm_eval_arm(name: str, path: Path) -> ArmValues:
    """What lm-eval logged of one model."""
    files = [path] if path.is_file() else sorted(path.rglob("samples_*.jsonl"))
    if not files:
        raise ValueError(
            f"{path} is no run: it has neither {COMPLETIONS} nor {SAMPLES} of `python -m evals`, nor samples_*.jsonl, "
            "which lm-eval writes with --log_samples."
        )
    by_task: dict[str, Path] = {}
    for file in files:
        match = _LM_EVAL_FILE.fullmatch(file.name)
        task = match["task"] if match else file.stem
        first = by_task.setdefault(task, file)
        if first != file:
            raise ValueError(
                f"{path} has several files of the task {task!r} ({first.relative_to(path)} and "
                f"{file.relative_to(path)}): name one of them, or the folder of one model and one run."
            )
    arm = ArmValues(name)
    for task, file in by_task.items():
        settings = _lm_eval_settings(file, task)
        for line, row in read_lines(file).rows:
            lacking = [field for field in _LM_EVAL_FIELDS if field not in row]
            if lacking:
                raise ValueError(f"{file}, line {line} lacks {', '.join(lacking)}: it is no sample of lm-eval 0.4.")
            asked = _asked(*(row[f"{name}_hash"] for name in ("doc", "prompt", "target")))
            document = row.get("doc")
            category = document.get("category") if isinstance(document, dict) else None
            for metric, number in _numbers(row, f"{file}, line {line}"):
                key = Measured(task, metric, filter=row.get("filter", "none"))
                value = Value(asked, category if isinstance(category, str) else None, number)
                if str(row["doc_id"]) in arm.values[key]:
                    raise ValueError(f"{file}, line {line}: document {row['doc_id']} is there already ({key}).")
                arm.values[key][str(row["doc_id"])] = value
                arm.settings[key] = settings | _sent_options(row)
    return arm


def _numbers(row: dict[str, Any], where: str) -> Iterator[tuple[str, float]]:
    """Metrics of a sample of lm-eval that are numbers; others, as corpus BLEU's, have no value of one document."""
    for metric in row["metrics"]:
        if metric not in row:
            raise ValueError(f"{where} lacks the metric {metric!r} that it names.")
        if isinstance(row[metric], int | float):
            yield metric, float(row[metric])


def _sent_options(row: dict[str, Any]) -> dict[str, Any]:
    """How a sample of lm-eval was generated, from its request; nothing of one that was scored."""
    options = row["arguments"].get("gen_args_0", {}).get("arg_1") if isinstance(row["arguments"], dict) else None
    return {"generation_kwargs": options} if isinstance(options, dict) else {}


def _lm_eval_settings(file: Path, task: str) -> dict[str, Any]:
    """Settings of lm-eval's results file beside the samples, as far as it is there."""
    results = file.with_name(re.sub(rf"^samples_{re.escape(task)}_(.*)\.jsonl$", r"results_\1.json", file.name))
    if results == file or not results.is_file():
        return {}
    try:
        told = json.loads(results.read_text(encoding="utf-8"))
        config, of_task = told["config"], told["configs"][task]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{results} is no results file of lm-eval ({error!r}): restore it, or move it away."
        ) from None
    names = ("output_type", "repeats", "process_results", "filter_list", "metric_list", "description")
    settings = {name: of_task[name] for name in names if name in of_task}
    settings |= {"num_fewshot": of_task.get("num_fewshot") or 0, "version": told.get("versions", {}).get(task)}
    settings |= {"system_instruction": told.get("system_instruction"), "lm_eval": told.get("lm_eval_version")}
    if "model_dtype" in config:
        settings["dtype"] = str(config["model_dtype"]).removeprefix("torch.")
    if settings["num_fewshot"]:
        settings["fewshot_seed"] = config.get("fewshot_seed")
    return settings
