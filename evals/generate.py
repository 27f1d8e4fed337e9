"""`python -m evals generate`: answers of a base model and adapters to prompts, and metrics of any lm-eval task.

lm-eval-harness builds the requests, generates and scores. What it lacks is here: several adapters on one loaded base,
every answer kept as soon as its batch is done, and a killed run that continues.
"""

from __future__ import annotations

import difflib
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from evals.completions import COMPLETIONS, Completion, read_completions
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
    DTYPES,
    WEIGHTS_FILE,
    Adapter,
    adapter_tokenizer,
    attached,
    check_adapter,
    check_base,
    hub_commit,
    load_base,
    method_and_seed,
)
from evals.prompts import THINKING
from evals.registry import MODELS, TASK_FOLDERS
from evals.thoughts import thoughts_of
from vision_bench.runs import DIVERGED, LineAppender, Run, device_name, locked


@dataclass(frozen=True)
class GenerateSettings:
    """What answers what, and how.

    Raises:
        ValueError: a value is not allowed; names the option, the value and what is.
    """

    model: str  # folder, name on the hub, or one of `evals.registry.MODELS`
    tasks: list[str]  # ours (evals/tasks) and any of lm-eval's: tasks, groups, tags
    output_dir: str
    adapters: list[Adapter] = field(default_factory=list)
    base: bool = True  # the base model answers too
    limit: int | None = None  # the first so many prompts of each task; None: all
    max_new_tokens: int | None = None  # None: as each task's YAML says (512 in ours)
    batch_size: int = 16  # prompts at a time
    dtype: str = "auto"
    load_in_4bit: bool = False
    thinking: str = "off"  # whether models think before they answer, one of THINKING
    thought_markers: tuple[str, str] | None = None  # what opens and ends a thought; None: as chat templates say
    # What the tasks' data functions take, as lm-eval's metadata.
    task_data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("limit", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}, allowed is 1 or more.")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}, allowed are {', '.join(DTYPES)}.")
        if self.thinking not in THINKING:
            raise ValueError(f"--thinking is {self.thinking!r}, allowed are {', '.join(THINKING)}.")
        if self.thought_markers is not None and not all(self.thought_markers):
            raise ValueError(f"--thought_markers are {self.thought_markers}; give what opens and what ends a thought.")
        for option, values in (("--tasks", self.tasks), ("--adapters", [a.name for a in self.adapters])):
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                raise ValueError(f"{option} has {', '.join(twice)} more than once; name each once.")
        if not self.tasks:
            raise ValueError("--tasks is empty; name at least one task.")
        if not self.base and not self.adapters:
            raise ValueError("--no_base without --adapters leaves nothing to answer.")

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that stand for the whole output folder, because another value gives other answers."""
        names = ("limit", "max_new_tokens", "dtype", "load_in_4bit", "thinking", "thought_markers")
        return {name: getattr(self, name) for name in names}


def generate(settings: GenerateSettings) -> Run:
    """Answer all prompts and score all tasks, first with the base, then with each adapter.

    Writes `completions.jsonl` batch by batch and the tasks' metrics as rows of `results.jsonl`. What is there already
    is neither generated nor scored again, so the same call continues a run that was killed; further adapters and
    tasks may be named in the same folder. Answers and rows belong to the contents of model, adapter and task, whose
    checksums they hold. An arm that diverged is marked by a row, has no answers, and the others go on.

    Returns:
        The output folder with its rows.

    Raises:
        ValueError: before any weights are loaded: the model or an adapter cannot be had or do not fit each other, a
            task is unknown or its data cannot be had, or the folder holds answers made with other settings or by
            other contents.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default
    _check_names(Run(settings.output_dir, "evals", settings.decisive), settings)  # at once; and again when it is held
    source = str(MODELS[settings.model]()) if settings.model in MODELS else settings.model
    tokenizer, config = check_base(source)
    folders = {adapter.name: check_adapter(adapter, source, config) for adapter in settings.adapters}
    manager = task_manager(settings.tasks, settings.task_data)
    loaded = {name: load_task(manager, name, settings, tokenizer, config) for name in settings.tasks}
    commit = hub_commit(source)
    arms = _arms(settings, source, commit, tokenizer, folders)
    tasks = task_checksums([task for of_name in loaded.values() for task in of_name], settings.limit)
    with locked(Path(settings.output_dir)):  # from here on what the folder holds does not change behind our back
        run = Run(settings.output_dir, "evals", settings.decisive)
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
        check_contents(run, settings.model, answered.values(), {arm.name: arm.checksums for arm in arms}, tasks)
        missing = [(arm, name) for arm in arms for name in loaded if not _finished(run, settings, arm, name)]
        if not missing:
            return run
        run.bind()
        for arm in _with_missing(arms, missing):
            weights = non_finite_of_file(folders[arm.name] / WEIGHTS_FILE) if arm.name else None
            if weights is not None:
                _mark_diverged(run, settings, arm, f"the adapter's {weights} is not finite")
        missing = [(arm, name) for arm, name in missing if not _diverged(run, settings, arm)]
        if not missing:
            return run
        base = load_base(source, settings.dtype, settings.load_in_4bit, revision=commit)
        weights = non_finite(base.named_parameters())
        if weights is not None:
            for arm in _with_missing(arms, missing):
                _mark_diverged(run, settings, arm, f"the base model's {weights} is not finite")
            return run
        with LineAppender(path) as file:
            lm = CompletionsLM(
                base,
                arms[0],
                model=settings.model,
                thinking=settings.thinking,
                load_in_4bit=settings.load_in_4bit,
                batch_size=settings.batch_size,
                file=file,
                done=answered,
                tasks=tasks,
            )
            for arm in _with_missing(arms, missing):
                with attached(base, arm.adapter) if arm.adapter else nullcontext(base) as model:
                    lm.answer_with(model, arm)
                    try:
                        for name in [name for one, name in missing if one is arm]:
                            _evaluate(run, settings, manager, lm, arm, name, loaded[name], tasks)
                    except DivergedError as error:
                        lm.forget(arm)
                        _mark_diverged(run, settings, arm, str(error))
    return run


def _arms(
    settings: GenerateSettings,
    source: str,
    commit: str | None,
    tokenizer: PreTrainedTokenizerBase,
    folders: dict[str, Path],
) -> list[Arm]:
    """What answers, in this order, with checksums: here every byte of the model's weights is read, once.

    Raises:
        ValueError: an adapter's tokenizer does not fit, two adapters are the same one, or a chat template cannot do
            what --thinking says.
    """
    of_model = model_checksums(source, commit)
    markers = settings.thought_markers
    arms = []
    if settings.base:
        thoughts = thoughts_of(tokenizer, settings.thinking, markers, f"the model {settings.model!r}")
        arms.append(Arm(None, tokenizer, thoughts, of_model, False))
    names: dict[str, str] = {}
    for adapter in settings.adapters:
        own = adapter_tokenizer(adapter, folders[adapter.name], tokenizer)
        if own is not tokenizer:
            print(f"The adapter {adapter.name!r} has a tokenizer or chat template of its own, which it answers with.")
        of_adapter = adapter_checksums(folders[adapter.name])
        same = names.setdefault(checksum(of_adapter), adapter.name)
        # Adapters that diverged may well be equal, in nothing but NaN.
        if same != adapter.name and non_finite_of_file(folders[adapter.name] / WEIGHTS_FILE) is None:
            raise ValueError(
                f"--adapters has {same!r} and {adapter.name!r}, which are the same adapter, byte for byte: the table "
                "would count it twice. Name it once."
            )
        thoughts = thoughts_of(own, settings.thinking, markers, f"the adapter {adapter.name!r}")
        arms.append(Arm(adapter, own, thoughts, of_model | of_adapter, own is not tokenizer))
    return arms


def _with_missing(arms: Iterable[Arm], missing: Iterable[tuple[Arm, str]]) -> list[Arm]:
    """The arms that have a task to do."""
    return [arm for arm in arms if any(one is arm for one, _ in missing)]


def _diverged(run: Run, settings: GenerateSettings, arm: Arm) -> bool:
    return bool(run.find(DIVERGED, model=settings.model, adapter=arm.name))


def _mark_diverged(run: Run, settings: GenerateSettings, arm: Arm, reason: str) -> None:
    """Let the row that says so be the only one of an arm."""
    print(f"{arm.name or 'The base model'} diverged: {reason}. It gets no answers and no other results.")
    identity = {"model": settings.model, "adapter": arm.name}
    kept = [row for row in run.rows if {name: row["config"].get(name) for name in identity} != identity]
    if len(kept) < len(run.rows):
        run.replace(kept)
    method, seed = method_and_seed(arm.name)
    where = identity | {"method": method, "task": None, "checksums": arm.checksums}
    run.add_diverged(reason, n=1, seed=seed, seconds=0, device=device_name(), **where)


def _check_names(run: Run, settings: GenerateSettings) -> None:
    """No two adapters of a folder are the same method and seed: the table would take them for one."""
    known = {
        method_and_seed(row["config"]["adapter"]): row["config"]["adapter"]
        for row in run.rows
        if row["config"]["model"] == settings.model
    }
    for adapter in settings.adapters:
        method, seed = method_and_seed(adapter.name)
        other = known.setdefault((method, seed), adapter.name)
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


def _row_arm(settings: GenerateSettings, arm: Arm, task: str) -> dict[str, Any]:
    """What tells a row from others of the folder."""
    method = method_and_seed(arm.name)[0]
    return {"model": settings.model, "adapter": arm.name, "method": method, "task": task}


def _finished(run: Run, settings: GenerateSettings, arm: Arm, task: str) -> bool:
    """Whether an arm has all results of a task, or cannot have any."""
    done = run.find("seconds", requested=task, **_row_arm(settings, arm, task))
    return bool(done) or _diverged(run, settings, arm)


def _evaluate(
    run: Run,
    settings: GenerateSettings,
    manager: TaskManager,
    lm: CompletionsLM,
    arm: Arm,
    requested: str,
    tasks: list[Task | Group],
    checksums: dict[str, str],
) -> None:
    """Generate and score one task, group or tag; adds its rows."""
    start = time.monotonic()
    for task in _single_tasks(tasks):
        _score_answers_only(task, lm)
    results = simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=manager,
        limit=settings.limit,
        apply_chat_template=lm.tokenizer.chat_template is not None,
        bootstrap_iters=0,
        log_samples=True,
    )
    seconds = time.monotonic() - start
    seed = method_and_seed(arm.name)[1]
    common: dict[str, Any] = {"seed": seed, "seconds": seconds, "device": device_name(lm.device)}
    values = [
        (task, metric if kind == "none" else f"{metric} ({kind})", value, _count(results, task, metric, kind))
        for task, metrics in results["results"].items()
        for metric, kind, value in _metrics(metrics)
    ]
    if arm.thoughts.markers:
        for task in _single_tasks(tasks):
            values += _thought_shares(str(task.task_name), lm.answers_of(str(task.task_name)))
    new = []
    for task, metric, value, n in values:
        where = _row_arm(settings, arm, task) | {"requested": requested}
        if run.find(metric, **where):  # a run killed between two rows of a task writes the others
            continue
        if not math.isfinite(value):
            print(f"{metric} of the task {task!r} is {value} for {arm.name or 'the base'}: it is undefined there.")
        where["checksums"] = arm.checksums | ({"task": checksums[task]} if task in checksums else {})
        new.append(run.row(metric, value if math.isfinite(value) else None, n=n, **common, **where))
    # Last, because this row says that the task is done.
    n = sum(n["effective"] for n in results["n-samples"].values())
    where = _row_arm(settings, arm, requested) | {"requested": requested}
    where["checksums"] = arm.checksums | ({"task": checksums[requested]} if requested in checksums else {})
    run.add_rows([*new, run.row("seconds", seconds, n=n, **common, **where)])


def _single_tasks(tasks: Iterable[Task | Group]) -> list[Task]:
    """The tasks themselves, and those of groups."""
    return [task for one in tasks for task in (one.get_all_tasks() if isinstance(one, Group) else [one])]


def _score_answers_only(task: Task, lm: CompletionsLM) -> None:
    """Leave documents out of the task's metrics whose answer ends within a thought: there is no text to score."""
    process = type(task).process_results

    def process_answers(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        return {} if lm.is_unfinished(str(task.task_name), doc) else dict(process(task, doc, results))

    task.process_results = process_answers


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
