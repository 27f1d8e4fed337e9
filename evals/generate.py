"""`python -m evals generate`: answers of a base model and adapters to prompts, and metrics of any lm-eval task.

lm-eval-harness builds the requests, generates and scores. What it lacks is here: several adapters on one loaded base,
every answer kept as soon as its batch is done, and a killed run that continues.
"""

from __future__ import annotations

import difflib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from evals.completions import Completion, read_completions
from evals.embedded import embedded_model
from evals.models import DTYPES, Adapter, attached, check_adapter, check_base, load_base, method_and_seed
from result_rows import LineAppender, Run, device_name, locked

COMPLETIONS = "completions.jsonl"
EMBEDDED = "embedded"  # --model embedded: the offline model, built where it is not cached
TASKS = Path(__file__).parent / "tasks"

Key = tuple[str, str, str | None, str]


@dataclass(frozen=True)
class GenerateSettings:
    """What answers what, and how.

    Raises:
        ValueError: a value is not allowed; names the option, the value and what is.
    """

    model: str  # folder, name on the hub, or EMBEDDED
    tasks: list[str]  # ours (evals/tasks) and any of lm-eval's: tasks, groups, tags
    output_dir: str
    adapters: list[Adapter] = field(default_factory=list)
    base: bool = True  # the base model answers too
    limit: int | None = None  # the first so many prompts of each task; None: all
    max_new_tokens: int | None = None  # None: as each task's YAML says (512 in ours)
    batch_size: int = 16  # prompts at a time
    dtype: str = "auto"
    load_in_4bit: bool = False
    task_data: dict[str, Any] = field(
        default_factory=dict
    )  # what the tasks' data functions take, as lm-eval's metadata

    def __post_init__(self) -> None:
        for name in ("limit", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}, allowed is 1 or more.")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}, allowed are {', '.join(DTYPES)}.")
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
        return {name: getattr(self, name) for name in ("limit", "max_new_tokens", "dtype", "load_in_4bit")}


def generate(settings: GenerateSettings) -> Run:
    """Answer all prompts and score all tasks, first with the base, then with each adapter.

    Writes `completions.jsonl` batch by batch and the tasks' metrics as rows of `results.jsonl`. What is there already
    is neither generated nor scored again, so the same call continues a run that was killed; further adapters and
    tasks may be named in the same folder.

    Returns:
        The output folder with its rows.

    Raises:
        ValueError: before any weights are loaded: the model or an adapter cannot be had or do not fit each other, a
            task is unknown or its data cannot be had, or the folder holds answers made with other settings.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default
    _check_names(Run(settings.output_dir, "evals", settings.decisive), settings)  # at once; and again when it is held
    source = str(embedded_model()) if settings.model == EMBEDDED else settings.model
    tokenizer, config = check_base(source)
    for adapter in settings.adapters:
        check_adapter(adapter, source, config)
    manager = task_manager(settings.tasks, settings.task_data)
    loaded = {name: _load_task(manager, name, settings, tokenizer, config) for name in settings.tasks}
    with locked(Path(settings.output_dir)):  # from here on what the folder holds does not change behind our back
        run = Run(settings.output_dir, "evals", settings.decisive)
        _check_names(run, settings)
        path = run.folder / COMPLETIONS
        done = read_completions(path) if path.exists() else None
        if done and done.torn:
            print(f"{done.torn}; what is missing is generated again.")
        arms: list[Adapter | None] = [*([None] if settings.base else []), *settings.adapters]
        missing = [(arm, name) for arm in arms for name in loaded if not _finished(run, settings, arm, name)]
        if not missing:
            return run
        run.bind()
        base = load_base(source, settings.dtype, settings.load_in_4bit)
        with LineAppender(path) as file:
            lm = CompletionsLM(base, tokenizer, settings, file, {row.key: row for row in done.rows} if done else {})
            for arm in arms:
                names = [name for one, name in missing if one is arm]
                if not names:
                    continue
                with attached(base, arm) if arm else nullcontext(base) as model:
                    lm.answer_with(model, arm)
                    for name in names:
                        _evaluate(run, settings, manager, lm, arm, name, loaded[name])
    return run


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
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=task_data)
    if set(names) <= set(manager.all_tasks):
        return manager
    ours = manager.all_tasks
    manager = TaskManager(include_path=str(TASKS), metadata=task_data)
    for name in names:
        if name not in manager.all_tasks:
            like = difflib.get_close_matches(name, manager.all_tasks, n=5)
            hint = f" Like it: {', '.join(like)}." if like else ""
            raise ValueError(
                f"--tasks has {name!r}, which is no task.{hint} Ours are {', '.join(ours)}; `lm_eval ls tasks` lists "
                "lm-eval's."
            )
    return manager


def _load_task(
    manager: TaskManager,
    name: str,
    settings: GenerateSettings,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
) -> list[Task | Group]:
    """The task with its data, or those of a group or tag; generation limits set and checked."""
    try:
        loaded = manager.load([name])
    except (OSError, RuntimeError) as error:  # ours raise ValueError, with advice
        cause = str(error).strip().splitlines()[0]
        raise ValueError(f"Cannot load the data of the task {name!r} ({cause}); it needs network access.") from None
    context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    for task in loaded["tasks"].values():
        if task.get_config("output_type") != "generate_until":
            continue
        if settings.max_new_tokens is not None:
            task.set_config("generation_kwargs", {"max_gen_toks": settings.max_new_tokens}, update=True)
        new = _most_new_tokens(task.get_config("generation_kwargs"))
        if new >= context:
            raise ValueError(
                f"The task {task.task_name!r} asks for {new} new tokens, but the context of {settings.model!r} has "
                f"{context} tokens, prompt included: give --max_new_tokens, at most {context // 2} leaves half of it."
            )
    in_groups = {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
    groups = [g for g in loaded["groups"].values() if g.name == name]
    return [*groups, *(task for key, task in loaded["tasks"].items() if key not in in_groups)]


def _most_new_tokens(options: dict[str, Any]) -> int:
    """The limit that lm-eval reads from a task's generation options, under any of the names it takes."""
    return int(normalize_gen_kwargs(options)["max_gen_toks"])


def _arm(settings: GenerateSettings, adapter: Adapter | None, task: str) -> dict[str, Any]:
    """What tells a row from others of the folder."""
    name = adapter.name if adapter else None
    return {"model": settings.model, "adapter": name, "method": method_and_seed(name)[0], "task": task}


def _finished(run: Run, settings: GenerateSettings, adapter: Adapter | None, task: str) -> bool:
    return bool(run.find("seconds", requested=task, **_arm(settings, adapter, task)))


def _evaluate(
    run: Run,
    settings: GenerateSettings,
    manager: TaskManager,
    lm: CompletionsLM,
    adapter: Adapter | None,
    requested: str,
    tasks: list[Task | Group],
) -> None:
    """Generate and score one task, group or tag; adds its rows."""
    start = time.monotonic()
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
    seed = method_and_seed(adapter.name if adapter else None)[1]
    common: dict[str, Any] = {"seed": seed, "seconds": seconds, "device": device_name(lm.device)}
    for task, metrics in results["results"].items():
        arm = _arm(settings, adapter, task) | {"requested": requested}
        for metric, kind, value in _metrics(metrics):
            name = metric if kind == "none" else f"{metric} ({kind})"
            if not run.find(name, **arm):  # a run killed between two rows of a task writes the others
                run.add(name, float(value), n=_count(results, task, metric, kind), **common, **arm)
    # Last, because this row says that the task is done.
    arm = _arm(settings, adapter, requested) | {"requested": requested}
    run.add("seconds", seconds, n=sum(n["effective"] for n in results["n-samples"].values()), **common, **arm)


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


class CompletionsLM(HFLM):
    """lm-eval's model, which takes answers from the completions file where they are there and adds those it makes.

    Args:
        base: the loaded base model.
        done: what the file holds.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerateSettings,
        file: LineAppender,
        done: dict[Key, Completion],
    ) -> None:
        super().__init__(pretrained=base, tokenizer=tokenizer, batch_size=settings.batch_size)
        self._settings = settings
        self._file = file
        self._done = done
        self._adapter: Adapter | None = None
        self._answer_gap = answer_gap(tokenizer)
        eos = getattr(base.generation_config, "eos_token_id", None)
        self._end_ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id}
        self._new_tokens: list[list[int]] = []

    def answer_with(self, model: torch.nn.Module, adapter: Adapter | None) -> None:
        """Answer with `model`, the base or the base with `adapter`, from here on."""
        self._model = model
        self._adapter = adapter

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval; in our tasks, an answer follows the prompt as the chat template writes it.

        lm-eval sets answers right behind the generation prompt. Some templates write a space before an answer, and
        so they are trained: without it another token is scored.
        """
        if self._answer_gap:
            requests = [
                replace(r, arguments=(r.args[0] + self._answer_gap, r.args[1])) if _is_ours(r.task_name) else r
                for r in requests
            ]
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval, in batches of similar length, the longest first; each is on the disk before the next begins."""
        rows = self._rows(requests)
        missing = []
        for request, row in zip(requests, rows, strict=True):
            before = self._done.get(row.key)
            if before is None:
                missing.append((request, row))
            else:
                _check_same(before, row)
        cut = sum("prompt_tokens_cut" in row.generation for _, row in missing)
        if cut:
            print(
                f"{cut} of {len(missing)} prompts do not fit the context of {self.max_length} tokens with the answer: "
                "they lose their beginning (`prompt_tokens_cut` in their rows)."
            )
        with tqdm(total=len(rows), initial=len(rows) - len(missing), disable=disable_tqdm, desc=self._name) as bar:
            for batch in self._batches(missing):
                done = [
                    replace(row, response=response, finish_reason=reason)
                    for row, (response, reason) in zip([row for _, row in batch], self._answers(batch), strict=True)
                ]
                self._file.append(asdict(row) for row in done)
                self._done |= {row.key: row for row in done}
                bar.update(len(done))
        return [self._done[row.key].response for row in rows]

    @property
    def _name(self) -> str:
        return f"Generating ({self._adapter.name if self._adapter else 'base'})"

    def _rows(self, requests: list[Instance]) -> list[Completion]:
        """What each request's row will be, without the answer."""
        adapter = self._adapter.name if self._adapter else None
        seen: Counter[tuple[str, str]] = Counter()
        rows = []
        for request in requests:
            doc, task = request.doc, str(request.task_name)
            prompt_id = str(doc.get("prompt_id", request.doc_id))
            seen[task, prompt_id] += 1  # tasks that ask several times have the same request several times
            if seen[task, prompt_id] > 1:
                prompt_id += f"#{seen[task, prompt_id]}"
            category = doc.get("category")
            rows.append(
                Completion(
                    prompt_id=prompt_id,
                    task=task,
                    category=category if isinstance(category, str) else None,
                    prompt=self._prompt(doc, request),
                    response="",
                    finish_reason="stop",
                    model=self._settings.model,
                    adapter=adapter,
                    seed=method_and_seed(adapter)[1],
                    generation=self._generation(request),
                    references=self._references(doc),
                )
            )
        return rows

    def _prompt(self, doc: dict[str, Any], request: Instance) -> str:
        """The user's text; tasks of lm-eval whose documents have none get the request as it is sent."""
        prompt = doc.get("prompt")
        return prompt if isinstance(prompt, str) and _is_ours(request.task_name) else str(request.args[0])

    def _references(self, doc: dict[str, Any]) -> list[str]:
        response = doc.get("response")
        return [response] if isinstance(response, str) else []

    def _generation(self, request: Instance) -> dict[str, Any]:
        """The settings that decide the answer, and how much of the prompt does not fit."""
        options = dict(request.args[1])
        room = self.max_length - _most_new_tokens(options)
        cut = len(self.tok_encode(request.args[0])) - room
        return {
            **json.loads(json.dumps(options)),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "load_in_4bit": self._settings.load_in_4bit,
            "chat_template": self.tokenizer.chat_template is not None,
            **({"prompt_tokens_cut": cut} if cut > 0 else {}),
        }

    def _batches(self, missing: list[tuple[Instance, Completion]]) -> Iterator[list[tuple[Instance, Completion]]]:
        """Requests with the same settings, in the order in which HFLM sorts a batch."""

        def order(item: tuple[Instance, Completion]) -> tuple[str, int, str]:
            request = item[0]
            return json.dumps(request.args[1]), -len(self.tok_encode(request.args[0])), request.args[0]

        for _, group in groupby(sorted(missing, key=order), key=lambda item: json.dumps(item[0].args[1])):
            same = list(group)
            for start in range(0, len(same), self._settings.batch_size):
                yield same[start : start + self._settings.batch_size]

    def _answers(self, batch: list[tuple[Instance, Completion]]) -> Iterator[tuple[str, str]]:
        """Response and finish reason of each request of a batch."""
        responses = super().generate_until([request for request, _ in batch], disable_tqdm=True)
        for (request, _), response, tokens in zip(batch, responses, self._new_tokens, strict=True):
            ended = not self._end_ids.isdisjoint(tokens) or self.tok_decode(tokens) != response
            full = len(tokens) >= _most_new_tokens(request.args[1])
            yield response, "length" if full and not ended else "stop"

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        output = super()._model_generate(context, max_length, stop, **options)
        self._new_tokens = output[:, context.shape[1] :].tolist()
        return output


def answer_gap(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes between the generation prompt and an answer; "" without a template."""
    if tokenizer.chat_template is None:
        return ""
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
    return whole[len(prompt) : whole.rindex("answer")] if whole.startswith(prompt) else ""


def _is_ours(task: str | None) -> bool:
    return (TASKS / f"{task}.yaml").is_file()


def _check_same(before: Completion, now: Completion) -> None:
    """A row of the file answers the same prompt under the same settings, or the file is another run's."""
    for name in ("prompt", "generation"):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            raise ValueError(
                f"The {COMPLETIONS} of the output folder has an answer to prompt {now.prompt_id!r} of {now.task!r} "
                f"with another {name} ({old!r} there, {new!r} now). Choose another --output_dir, or repeat the old "
                "settings and data."
            )
