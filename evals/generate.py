"""`python -m evals generate`: answers of a base model and adapters to prompts, and metrics of any lm-eval task.

lm-eval-harness builds the requests, generates and scores. What it lacks is here: several adapters on one loaded base,
every answer kept as soon as its batch is done, and a killed run that continues.

    run = generate(GenerateSettings("Qwen/Qwen3-0.6B", ["xstest", "sst2_instruct"], "runs/safety", max_new_tokens=256))
    run.find("acc", task="sst2_instruct")[0]["value"]
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from evals.completions_lm import Arm, CompletionsLM, DivergedError, most_new_tokens
from evals.contents import (
    adapter_checksums,
    check_contents,
    checksum,
    model_checksums,
    name_of_model,
    non_finite,
    non_finite_of_file,
    task_checksums,
)
from evals.models import (
    WEIGHTS_FILE,
    adapter_tokenizer,
    attached,
    check_adapter,
    check_base,
    hub_commit,
    load_base,
    method_and_seed,
)
from evals.records import COMPLETIONS, SAMPLES, Completion, Sample, read_completions, read_samples
from evals.registry import MODELS, TASK_FOLDERS
from evals.settings import GenerateSettings
from evals.thoughts import thoughts_of
from vision_bench.runs import DIVERGED, LineAppender, Run, device_name, locked
from vision_bench.runs.settings import defaults, recorded


def generate(settings: GenerateSettings) -> Run:
    """Answer all prompts and score all tasks, first with the base, then with each adapter.

    Writes `completions.jsonl` batch by batch, the tasks' metrics as rows of `results.jsonl`, and those of each
    document to `samples.jsonl`. What is there already is neither generated nor scored again, so the same call
    continues a run that was killed; further adapters and tasks may be named in the same folder. Answers and rows
    belong to the contents of model, adapter and task, whose checksums they hold. An arm that diverged is marked by a
    row, has no answers, and the others go on.

    Returns:
        The output folder with its rows.

    Raises:
        ValueError: before any weights are loaded: the model or an adapter cannot be had or do not fit each other, a
            task is unknown or its data cannot be had, or the folder holds answers made with other settings or by
            other contents.
    """
    _check_names(_folder(settings), settings)  # at once; and again when the folder is held
    source = str(MODELS[settings.model]()) if settings.model in MODELS else settings.model
    tokenizer, config = check_base(source)
    folders = {adapter.name: check_adapter(adapter, source, config) for adapter in settings.adapters}
    manager = task_manager(settings.tasks, settings.task_data)
    loaded = {name: load_task(manager, name, settings, tokenizer, config) for name in settings.tasks}
    commit = hub_commit(source)
    arms = _arms(settings, source, commit, tokenizer, folders)
    checksums = task_checksums([task for tasks in loaded.values() for task in tasks], settings.limit)
    with locked(Path(settings.output_dir)):  # from here on what the folder holds does not change behind our back
        run = _folder(settings)
        path = run.folder / COMPLETIONS
        done = read_completions(path) if path.exists() else None
        if done and done.torn:
            print(f"{done.torn}; what is missing is generated again.")
        answered = {row.key: row for row in done.rows} if done else {}
        name = name_of_model(run, answered.values(), settings.model, arms[0].checksums)
        if name != settings.model:
            print(f"{run.folder} has the model {settings.model!r} as {name!r}, which it stays in the table.")
            settings = replace(settings, model=name)
        _check_names(run, settings)
        contents = {arm.name: arm.checksums for arm in arms}
        check_contents(run, settings.model, answered.values(), contents, checksums)
        generation = Generation(run, settings, arms, manager, loaded, checksums)
        missing = generation.missing()
        if not missing:
            return run
        run.bind()
        for arm, _ in missing:
            weights = non_finite_of_file(folders[arm.name] / WEIGHTS_FILE) if arm.name else None
            if weights is not None:
                generation.mark_diverged(arm, f"the adapter's {weights} is not finite")
        missing = generation.missing()
        if not missing:
            return run
        base = load_base(source, settings.dtype, settings.load_in_4bit, revision=commit)
        weights = non_finite(base.named_parameters())
        if weights is not None:
            for arm, _ in missing:
                generation.mark_diverged(arm, f"the base model's {weights} is not finite")
            return run
        with LineAppender(path) as file, LineAppender(run.folder / SAMPLES) as samples:
            lm = CompletionsLM(base, arms[0], settings, file=file, done=answered, tasks=checksums)
            for arm, names in missing:
                with attached(base, arm.adapter) if arm.adapter else nullcontext(base) as model:
                    lm.answer_with(model, arm)
                    try:
                        for name in names:
                            generation.evaluate(lm, arm, name, samples)
                    except DivergedError as error:
                        lm.forget(arm)
                        forget_samples(samples, settings.model, arm.name)
                        generation.mark_diverged(arm, str(error))
    return run


def _folder(settings: GenerateSettings) -> Run:
    return Run(settings.output_dir, "evals", recorded(settings), defaults=defaults(GenerateSettings))


def _arms(
    settings: GenerateSettings,
    source: str,
    commit: str | None,
    tokenizer: PreTrainedTokenizerBase,
    folders: dict[str, Path],
) -> list[Arm]:
    """List the answering models in order, with checksums, for which every byte of the weights is read once.

    Raises:
        ValueError: an adapter's tokenizer does not fit, two adapters are the same one, or a chat template cannot do
            what --thinking says.
    """
    model = model_checksums(source, commit)
    markers = None if settings.thought_markers is None else (settings.thought_markers[0], settings.thought_markers[1])
    arms = []
    if settings.base:
        thoughts = thoughts_of(tokenizer, settings.thinking, markers, f"the model {settings.model!r}")
        arms.append(Arm(None, tokenizer, thoughts, model, False))
    names: dict[str, str] = {}
    for adapter in settings.adapters:
        own = adapter_tokenizer(adapter, folders[adapter.name], tokenizer)
        if own is not tokenizer:
            print(f"The adapter {adapter.name!r} has a tokenizer or chat template of its own, which it answers with.")
        contents = adapter_checksums(folders[adapter.name])
        same = names.setdefault(checksum(contents), adapter.name)
        # Adapters that diverged may well be equal, in nothing but NaN.
        if same != adapter.name and non_finite_of_file(folders[adapter.name] / WEIGHTS_FILE) is None:
            raise ValueError(
                f"--adapters has {same!r} and {adapter.name!r}, which are the same adapter, byte for byte: the table "
                "would count it twice. Name it once."
            )
        thoughts = thoughts_of(own, settings.thinking, markers, f"the adapter {adapter.name!r}")
        arms.append(Arm(adapter, own, thoughts, model | contents, own is not tokenizer))
    return arms


def _check_names(run: Run, settings: GenerateSettings) -> None:
    """No two adapters of a folder are the same method and seed: the table would take them for one."""
    names = {
        method_and_seed(row["config"]["adapter"]): row["config"]["adapter"]
        for row in run.rows
        if row["config"]["model"] == settings.model
    }
    for adapter in settings.adapters:
        method, seed = method_and_seed(adapter.name)
        other = names.setdefault((method, seed), adapter.name)
        if other != adapter.name:
            raise ValueError(
                f"--adapters has {adapter.name!r}, whose name says method {method!r} and seed {seed}, as that of "
                f"{other!r} does; tell them apart with NAME=FOLDER, such as my-{method}-seed{seed}={adapter.source}."
            )


def task_manager(names: list[str], task_data: dict[str, Any] | None = None) -> TaskManager:
    """lm-eval's index of tasks, with ours; lm-eval's own 13,000 are read only if one is named.

    Args:
        names: tasks, groups or tags.
        task_data: keyword arguments of our tasks' data functions, each of which takes those it knows.

    Raises:
        ValueError: no task, group or tag has the name; says which are like it.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default
    folders = [str(folder) for folder in TASK_FOLDERS]
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=task_data)
    if set(names) <= set(manager.all_tasks):
        return manager
    ours = manager.all_tasks
    manager = TaskManager(include_path=folders, metadata=task_data)
    for name in names:
        if name not in manager.all_tasks:
            like = difflib.get_close_matches(name, manager.all_tasks, n=5)
            hint = f" Like it: {', '.join(like)}." if like else ""
            raise ValueError(
                f"--tasks has {name!r}, which is no task.{hint} Ours are {', '.join(ours)}; `lm_eval ls tasks` lists "
                "lm-eval's."
            )
    return manager


def load_task(
    manager: TaskManager,
    name: str,
    settings: GenerateSettings,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
) -> list[Task | Group]:
    """The task with its data, or those of a group or tag; generation limits set and checked.

    Raises:
        ValueError: the data cannot be had, or the answers' limit does not fit the model's context.
    """
    try:
        loaded = manager.load([name])
    except (OSError, RuntimeError) as error:  # ours raise ValueError, with advice
        cause = str(error).strip().splitlines()[0]
        raise ValueError(f"Cannot load the data of the task {name!r} ({cause}); it needs network access.") from None
    context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    for task in loaded["tasks"].values():
        if task.get_config("output_type") != "generate_until":
            if settings.thinking == "on":
                raise ValueError(
                    f"The task {task.task_name!r} scores given answers, with which no model begins that thinks first: "
                    "leave out the task, or --thinking on."
                )
            continue
        if settings.max_new_tokens is not None:
            task.set_config("generation_kwargs", {"max_gen_toks": settings.max_new_tokens}, update=True)
        new = most_new_tokens(task.get_config("generation_kwargs"))
        if new >= context:
            raise ValueError(
                f"The task {task.task_name!r} asks for {new} new tokens, but the context of {settings.model!r} has "
                f"{context} tokens, prompt included: give --max_new_tokens, at most {context // 2} leaves half of it."
            )
    in_groups = {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
    groups = [g for g in loaded["groups"].values() if g.name == name]
    return [*groups, *(task for key, task in loaded["tasks"].items() if key not in in_groups)]


@dataclass(frozen=True)
class Generation:
    """The rows of a folder: which are missing, and how they are made."""

    run: Run
    settings: GenerateSettings
    arms: list[Arm]
    manager: TaskManager
    loaded: dict[str, list[Task | Group]]  # by the name that was asked for
    checksums: dict[str, str]  # of tasks and groups

    def missing(self) -> list[tuple[Arm, list[str]]]:
        """The arms that lack results of tasks, each with those; an arm that diverged cannot have any."""
        missing = []
        for arm in self.arms:
            names = [
                name
                for name in self.loaded
                if not self.run.find("seconds", requested=name, **self._row_arm(arm, name))
            ]
            if names and not self.run.find(DIVERGED, model=self.settings.model, adapter=arm.name):
                missing.append((arm, names))
        return missing

    def _row_arm(self, arm: Arm, task: str | None) -> dict[str, Any]:
        """Return the settings that tell a row from the folder's others."""
        method = method_and_seed(arm.name)[0]
        return {"model": self.settings.model, "adapter": arm.name, "method": method, "task": task}

    def mark_diverged(self, arm: Arm, reason: str) -> None:
        """Let the row that says so be the only one of an arm."""
        print(f"{arm.name or 'The base model'} diverged: {reason}. It gets no answers and no other results.")
        identity = (self.settings.model, arm.name)
        kept = [row for row in self.run.rows if (row["config"].get("model"), row["config"].get("adapter")) != identity]
        if len(kept) < len(self.run.rows):
            self.run.replace(kept)
        where = self._row_arm(arm, None) | {"checksums": arm.checksums}
        seed = method_and_seed(arm.name)[1]
        self.run.add_diverged(reason, n=1, seed=seed, seconds=0, device=device_name(), **where)

    def evaluate(self, lm: CompletionsLM, arm: Arm, requested: str, samples: LineAppender) -> None:
        """Generate and score one task, group or tag; adds its samples, then its rows."""
        start = time.monotonic()
        tasks = self.loaded[requested]
        for task in _single_tasks(tasks):
            _score_answers_only(task, lm)
        results = simple_evaluate(
            model=lm,
            tasks=tasks,
            task_manager=self.manager,
            limit=self.settings.limit,
            apply_chat_template=lm.tokenizer.chat_template is not None,
            bootstrap_iters=0,
            log_samples=True,
        )
        seconds = time.monotonic() - start
        values = [
            (task, metric if kind == "none" else f"{metric} ({kind})", value, _count(results, task, metric, kind))
            for task, metrics in results["results"].items()
            for metric, kind, value in _metrics(metrics)
        ]
        if arm.thoughts.markers:
            for task in _single_tasks(tasks):
                values += _thought_shares(str(task.task_name), lm.answers_of(str(task.task_name)))
        there = {sample.key for sample in read_samples(samples.path).rows}  # of a run killed before the rows
        new = _samples(tasks, results["samples"], self.settings, lm, arm, self.checksums)
        samples.append(asdict(sample) for sample in new if sample.key not in there)
        # Last, because this row says that the task is done.
        values.append((requested, "seconds", seconds, sum(n["effective"] for n in results["n-samples"].values())))
        rows = []
        for task, metric, value, n in values:
            where = self._row_arm(arm, task) | {"requested": requested}
            if self.run.find(metric, **where):  # a run killed between two rows of a task writes the others
                continue
            if not math.isfinite(value):
                print(f"{metric} of the task {task!r} is {value} for {arm.name or 'the base'}: it is undefined there.")
            task_checksum = {"task": self.checksums[task]} if task in self.checksums else {}
            where["checksums"] = arm.checksums | task_checksum
            measured: dict[str, Any] = {"n": n, "seconds": seconds, "device": device_name(lm.device)}
            seed = method_and_seed(arm.name)[1]
            rows.append(self.run.row(metric, value if math.isfinite(value) else None, seed=seed, **measured, **where))
        self.run.add_rows(rows)


def _single_tasks(tasks: Iterable[Task | Group]) -> list[Task]:
    """The tasks themselves, and those of groups."""
    return [single for task in tasks for single in (task.get_all_tasks() if isinstance(task, Group) else [task])]


def _score_answers_only(task: Task, lm: CompletionsLM) -> None:
    """Leave documents out of the task's metrics whose answer ends within a thought: there is no text to score."""
    process = type(task).process_results

    def process_answers(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        return {} if lm.is_unfinished(str(task.task_name), doc) else dict(process(task, doc, results))

    task.process_results = process_answers


def _samples(
    tasks: Iterable[Task | Group],
    logged: dict[str, list[dict[str, Any]]],
    settings: GenerateSettings,
    lm: CompletionsLM,
    arm: Arm,
    checksums: dict[str, str],
) -> Iterator[Sample]:
    """A record for each document of the tasks, with those of its metrics that are numbers."""
    for task in _single_tasks(tasks):
        name = str(task.task_name)
        generation = task.get_config("generation_kwargs") if task.OUTPUT_TYPE == "generate_until" else None
        how = {
            "num_fewshot": task.get_config("num_fewshot") or 0,
            "generation_kwargs": json.loads(json.dumps(generation)),
            "dtype": str(lm.model.dtype).removeprefix("torch."),
            "load_in_4bit": settings.load_in_4bit,
            "thinking": settings.thinking,
            "checksum": checksums[name],
        }
        for row in logged.get(name, []):
            category = row["doc"].get("category")
            metrics = {metric: row[metric] for metric in row["metrics"]}
            yield Sample(
                prompt_id=str(row["doc_id"]),
                task=name,
                category=category if isinstance(category, str) else None,
                model=settings.model,
                adapter=arm.name,
                seed=method_and_seed(arm.name)[1],
                filter=row["filter"],
                document=row["doc_hash"],
                prompt=row["prompt_hash"],
                target=row["target_hash"],
                settings=how,
                metrics={k: float(v) for k, v in metrics.items() if isinstance(v, Real) and math.isfinite(v)},
            )


def forget_samples(samples: LineAppender, model: str, adapter: str | None) -> None:
    """Take an arm's samples out of the file: one that diverged has no results."""
    kept = [row for row in read_samples(samples.path).rows if (row.model, row.adapter) != (model, adapter)]
    samples.replace(asdict(row) for row in kept)


def _thought_shares(task: str, answers: list[Completion]) -> list[tuple[str, str, float, int]]:
    """The shares of answers with a thought and of those that end within one."""
    if not answers:
        return []
    n = len(answers)
    unfinished = sum(row.finish_reason == "thought" for row in answers) / n
    thoughts = sum(bool(row.thought) or row.finish_reason == "thought" for row in answers) / n
    return [(task, "thought", thoughts, n), (task, "unfinished_thought", unfinished, n)]


def _metrics(results: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Metric, filter and value of lm-eval's `{"acc,none": 0.5, "acc_stderr,none": ..., "alias": ...}`."""
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            yield metric, kind, value


def _count(results: dict[str, Any], task: str, metric: str, kind: str) -> int:
    """The prompts behind a metric of a task, or of a group."""
    members = results.get("group_subtasks", {}).get(task) or [task]
    samples = [sample for member in members for sample in results["samples"].get(member, [])]
    if not samples:  # a group of groups
        return int(sum(n["effective"] for n in results["n-samples"].values()))
    return sum(metric in sample["metrics"] and sample["filter"] == kind for sample in samples)
