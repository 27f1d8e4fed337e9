"""How the recipes of Table 2 question and judge what they trained: by `evals`, on one loaded base, in a folder of it.

Its rows are taken over into those of the run.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparison import Comparison, Trained, load_base
from task import Content, Task, check_contents
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig

from evals.contents import adapter_checksums, checksum, model_checksums, task_checksums
from evals.generate import GenerateSettings, generate, load_task, task_manager
from evals.judge import judge
from evals.models import attached, hub_commit
from evals.records import COMPLETIONS, has_answers, read_completions
from mono_peft import activation_sparsity
from vision_bench.runs import DIVERGED

if TYPE_CHECKING:
    from table2 import Table2Settings

EVALUATION = "evaluation"  # folder of completions and verdicts
BASE: dict[str, Any] = {"method": "base", "seed": None}


def generation(
    task: Task, settings: Table2Settings, training: SFTConfig, options: ModelConfig
) -> GenerateSettings | None:
    """How the base answers the prompts of all tasks; None if there are none."""
    tasks = [*task.eval_tasks, *settings.safety_tasks]
    data = dict(task.task_data)
    if settings.refusal_prompts is not None:
        data["refusal_prompts"] = dict.fromkeys(("harmful", "lookalike"), settings.refusal_prompts)
    if not tasks:
        return None
    return GenerateSettings(
        model=str(options.model_name_or_path),
        tasks=tasks,
        output_dir=str(Path(training.output_dir) / EVALUATION),
        max_new_tokens=settings.max_new_tokens,
        batch_size=training.per_device_eval_batch_size,
        dtype=options.dtype,
        load_in_4bit=options.load_in_4bit,
        task_data=data,
    )


def evaluation_contents(
    answers: GenerateSettings | None,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    options: ModelConfig,
) -> dict[str, Content]:
    """What an evaluation is made of: the base's weights, configuration and tokenizer, and the data of its tasks.

    Raises:
        ValueError: a task is unknown, its data cannot be had, or its answers do not fit the model's context.
    """
    name = str(options.model_name_or_path)
    checksums = model_checksums(name, hub_commit(name, options.model_revision))
    contents = {part: Content(f"--model_name_or_path {name} ({part})", value) for part, value in checksums.items()}
    if answers is not None:
        manager = task_manager(answers.tasks, answers.task_data)
        tasks = [t for task in answers.tasks for t in load_task(manager, task, answers, tokenizer, config)]
        checksums = task_checksums(tasks, None)
        contents |= {f"task {task}": Content(f"the data of the task {task}", v) for task, v in checksums.items()}
    return contents


def all_trained(comparison: Comparison) -> dict[str, Trained]:
    """Every adapter and checkpoint to evaluate by its name for `evals`: those that have a score.

    Raises:
        ValueError: one is not the adapter that was scored.
    """
    final = [comparison.trained(method, seed) for seed in comparison.settings.seeds for method in comparison.arms]
    scored = {}
    for trained in [*final, *comparison.checkpoints()]:
        rows = comparison.run.find(comparison.task.metric, **trained.arm)
        if not rows:
            continue
        if rows[0]["config"]["adapter_checksum"] != checksum(adapter_checksums(trained.folder)):
            raise ValueError(
                f"{trained.folder} does not hold the adapter that was trained and scored here. Restore it, or choose "
                "another --output_dir to train it anew."
            )
        scored[trained.adapter.name] = trained
    return scored


def evaluate(comparison: Comparison, answers: GenerateSettings, judges: dict[str, str]) -> None:
    """Answers of all adapters on one loaded base, verdicts, and their rows.

    Args:
        answers: how the base answers.
        judges: as `evals.judge` takes them, and the names that their rows get.

    Raises:
        ValueError: base, tasks or adapters are others by now.
    """
    run, settings = comparison.run, comparison.settings
    now = evaluation_contents(answers, comparison.tokenizer, comparison.config, comparison.options)
    check_contents(run.folder, run.recipe, now)
    trained = all_trained(comparison)
    with_base = bool(run.find(comparison.task.metric, method="base"))
    if not trained and not with_base:
        return
    answered = generate(replace(answers, adapters=[t.adapter for t in trained.values()], base=with_base))
    if settings.judges and has_answers(answered.folder):
        tasks, batch_size = settings.safety_tasks, settings.judge_batch_size
        answered = judge(answered.folder, list(judges), tasks=tasks, batch_size=batch_size)
    new, diverged = [], []
    for row in answered.rows:
        config = row["config"]
        if row["metric"] == "seconds" or any(config.get(k) for k in ("category", "versus", "versus_judge")):
            continue  # those stand in the folder's own table
        if config["adapter"] not in {None, *trained} or config.get("judge") not in {None, *judges}:
            continue  # of somebody who went on in the folder with `python -m evals`
        one = trained[config["adapter"]] if config["adapter"] else None
        arm, described = (BASE | {"step": None}, BASE) if one is None else (one.arm, one.described)
        measured = {"task": config["task"], "judge": judges.get(config.get("judge"))}
        if row["metric"] == DIVERGED:
            diverged.append((config["reason"], arm, described))
        elif not run.find(row["metric"], **arm, **measured):
            measured |= {name: config[name] for name in ("low", "high") if name in config}
            measured |= {"n": row["n"], "seconds": row["seconds"], "device": row["device"]}
            new.append(run.row(row["metric"], row["value"], **measured, **described))
    run.add_rows(new)
    for reason, arm, described in diverged:
        # The arm's other results go: its answers showed that it diverged.
        run.replace([r for r in run.rows if {n: (r["config"] | r).get(n) for n in arm} != arm])
        run.add_diverged(reason, **comparison.common(time.monotonic()), **described)


def alignment_sparsity(comparison: Comparison) -> None:
    """Share of zeros in sigma(A x) on the safety prompts, for the arms whose adapters have latents."""
    run, tasks = comparison.run, comparison.settings.safety_tasks
    lacking = [
        trained
        for trained in all_trained(comparison).values()
        if comparison.has_latents(trained.method)
        and trained.step is None
        and not run.find("alignment_sparsity", **trained.described)
    ]
    if not lacking or not tasks:
        return
    rows = read_completions(run.folder / EVALUATION / COMPLETIONS).rows
    batches = comparison.prompt_batches(
        prompts := list({(r.task, r.prompt_id): r.prompt for r in rows if r.task in tasks}.values())
    )
    base = load_base(comparison.training, comparison.options)
    for trained in lacking:
        start = time.monotonic()
        with attached(base, trained.adapter) as model:
            measured = activation_sparsity(model, batches)
        run.add("alignment_sparsity", measured.overall, **comparison.common(start, len(prompts)), **trained.described)
