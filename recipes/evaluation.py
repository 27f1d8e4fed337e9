"""How the recipes of Table 2 question and judge what they trained: by `evals`, on one loaded base, in a folder of it.

Its rows are taken over into those of the run.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from comparison import Comparison, Trained, load_base
from task import Content, Task, check_contents
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig

from evals.contents import adapter_checksums, checksum, model_checksums, task_checksums
from evals.forgetting import (
    LOSS,
    TASK,
    ForgettingError,
    NeutralTexts,
    adapter_measures,
    loss_per_token,
    losses,
)
from evals.generate import GenerateSettings, generate, load_task, task_manager
from evals.judge import judge
from evals.models import attached, hub_commit
from evals.records import COMPLETIONS, has_answers, read_completions
from evals.registry import is_harmful
from mono_peft import activation_sparsity
from mono_peft.certify import CertificateError, binomial_lower_bound, certify
from mono_peft.silenceable import NeverSilentError
from vision_bench.runs import DIVERGED, Run

if TYPE_CHECKING:
    from table2 import Table2Settings

EVALUATION = "evaluation"  # folder of completions and verdicts


def generation(
    task: Task, settings: Table2Settings, training: SFTConfig, options: ModelConfig
) -> GenerateSettings | None:
    """How the base answers the prompts of all tasks; None if there are none."""
    tasks = [*task.eval_tasks, *settings.safety_tasks]
    data = dict(task.task_data)
    if settings.refusal_prompts is not None:
        data["refusal_prompts"] = dict.fromkeys(("harmful", "lookalike"), settings.refusal_prompts)
    if settings.safety_prompts is not None:
        data["safety_prompts"] = settings.safety_prompts
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


def all_scored(comparison: Comparison) -> list[Trained]:
    """The base and every adapter and checkpoint to evaluate: those that have a score.

    Raises:
        ValueError: one is not the adapter that was scored.
    """
    run, seeds = comparison.run, comparison.settings.seeds
    adapters = [comparison.trained(method, seed) for seed in seeds for method in comparison.arms]
    scored = []
    for trained in [comparison.trained("base", None), *adapters, *comparison.checkpoints()]:
        rows = run.find(comparison.task.metric, **trained.arm)
        if not rows:
            continue
        content = rows[0]["config"].get("adapter_checksum")
        if trained.seed is not None and content != checksum(adapter_checksums(trained.folder)):
            raise ValueError(
                f"{trained.folder} does not hold the adapter that was trained and scored here. Restore it, or choose "
                "another --output_dir to train it anew."
            )
        scored.append(trained)
    return scored


def evaluate(comparison: Comparison, answers: GenerateSettings, judges: dict[str, str]) -> None:
    """Answers of all adapters on one loaded base, verdicts, and their rows.

    Args:
        judges: as `evals.judge` takes them, and the names that their rows get.

    Raises:
        ValueError: base, tasks or adapters are others by now.
    """
    run, settings = comparison.run, comparison.settings
    now = evaluation_contents(answers, comparison.tokenizer, comparison.config, comparison.options)
    check_contents(run.folder, run.recipe, now)
    scored = {trained.name: trained for trained in all_scored(comparison)}
    if not scored:
        return
    adapters = [trained.adapter for name, trained in scored.items() if name]
    names = ", ".join(name or "the base" for name in scored)
    comparison.say(f"Making the answers to {', '.join(answers.tasks)} that are missing: {names}.")
    answered = generate(replace(answers, adapters=adapters, base=None in scored))
    if settings.judges and has_answers(answered.folder):
        tasks, batch_size = settings.safety_tasks, settings.judge_batch_size
        comparison.say(f"Judging the answers that are not judged yet: {', '.join(judges.values())}.")
        answered = judge(answered.folder, list(judges), tasks=tasks, batch_size=batch_size)
    new = []
    for row in answered.rows:
        config, metric = row["config"], row["metric"]
        if metric == "seconds" or any(config.get(name) for name in ("category", "versus", "versus_judge")):
            continue  # those stand in the folder's own table
        if config["adapter"] not in scored or config.get("judge") not in {None, *judges}:
            continue  # of somebody who went on in the folder with `python -m evals`
        arm = scored[config["adapter"]].arm
        asked = {"task": config["task"], "judge": judges.get(config.get("judge"))}
        if metric == DIVERGED:
            # The arm's other results go: its answers showed that it diverged.
            run.replace([r for r in run.rows if {name: (r["config"] | r).get(name) for name in arm} != arm])
            run.add_diverged(config["reason"], **comparison.common(time.monotonic()), **arm)
        elif not run.find(metric, **arm, **asked):
            asked |= {name: config[name] for name in ("low", "high") if name in config}
            asked |= {name: row[name] for name in ("n", "seconds", "device")}
            new.append(run.row(metric, row["value"], **arm, **asked))
    run.add_rows(new)


def alignment_sparsity(comparison: Comparison) -> None:
    """Share of zeros in sigma(A x) on the safety prompts, for the arms whose adapters have latents."""
    run, tasks = comparison.run, comparison.settings.safety_tasks
    lacking = [
        trained
        for trained in all_scored(comparison)
        if trained.step is None
        and trained.seed is not None
        and comparison.has_latents(trained.method)
        and not run.find("alignment_sparsity", **trained.arm)
    ]
    if not lacking or not tasks:
        return
    rows = read_completions(run.folder / EVALUATION / COMPLETIONS).rows
    prompts = list({(row.task, row.prompt_id): row.prompt for row in rows if row.task in tasks}.values())
    batches = comparison.prompt_batches(prompts)
    comparison.say("Measuring the sparsity of latents on the safety prompts.")
    base = load_base(comparison.training, comparison.options)
    for trained in lacking:
        start = time.monotonic()
        with attached(base, trained.adapter) as model:
            measured = activation_sparsity(model, batches)
        run.add("alignment_sparsity", measured.overall, **comparison.common(start, len(prompts)), **trained.arm)


def certified_silence(comparison: Comparison) -> None:
    """Share of harmful prompts on which nothing of an adapter fires, where an arm of the run was trained for that.

    Of all arms with latents, at each checkpoint too; of a task's harmful prompts `--certified_prompts`, drawn at
    random and the same for all arms, with as many tokens of the base's responses as `--certified_tokens`. In the rows,
    `fired` is the share of the pairs of a module and a token of the prompts on which a unit fires.
    """
    run, settings = comparison.run, comparison.settings
    if not settings.certified_prompts or not any(arm.silence_weight for arm in comparison.arms.values()):
        return
    lacking = [
        (trained, task)
        for trained in all_scored(comparison)
        for task in settings.safety_tasks
        if trained.seed is not None
        and comparison.has_latents(trained.method)
        and not run.find("certified_silent", task=task, **trained.arm)
    ]
    if not lacking:
        return
    rows = read_completions(run.folder / EVALUATION / COMPLETIONS).rows
    comparison.say("Certifying on which harmful prompts the adapters are silent.")
    base = load_base(comparison.training, comparison.options)
    for trained, task in lacking:
        harmful = {r.prompt_id: r.prompt for r in rows if r.task == task and is_harmful(task, r.category) is not False}
        if not harmful:
            continue
        drawn = random.Random(0).sample(sorted(harmful), min(settings.certified_prompts, len(harmful)))
        prompts = [harmful[prompt_id] for prompt_id in drawn]
        batches = [dict(batch) for prompt in prompts for batch in comparison.prompt_batches([prompt])]
        start, share, said = time.monotonic(), None, {}
        with attached(base, trained.adapter) as model:
            try:
                certificate = certify(model, batches)
                fired = math.fsum(prompt.fired for prompt in certificate.prompts) / len(prompts)
                # Only there the base has to answer, which takes time: behind other prompts no answer is silent.
                silent = [batch for batch, on in zip(batches, certificate.prompts, strict=True) if on.silent]
                if silent and settings.certified_tokens:
                    silent_prompts = certify(model, silent, response_tokens=settings.certified_tokens).silent
                else:
                    silent_prompts = len(silent)
                share = silent_prompts / len(prompts)
                said = {"lower_bound": binomial_lower_bound(silent_prompts, len(prompts)), "fired": fired}
            except (CertificateError, NeverSilentError) as error:
                print(f"{trained.name}, {task}: not certified, {error}")
        run.add("certified_silent", share, **comparison.common(start, len(prompts)), task=task, **trained.arm, **said)


def check_neutral_texts(run: Run, texts: NeutralTexts) -> None:
    """Raise ValueError if the folder's forgetting was measured on other texts."""
    if any(row["config"].get("neutral_texts") != texts.checksum for row in run.find(LOSS)):
        raise ValueError(
            f"{run.folder} holds forgetting measured on other neutral texts: choose another --output_dir, or give "
            "--neutral_file as before."
        )


def forgetting_rows(comparison: Comparison, texts: NeutralTexts) -> None:
    """KL to the base and loss on neutral texts, of the base and of every adapter at the end of its training."""
    run, batch_size = comparison.run, comparison.training.per_device_eval_batch_size
    every = [trained for trained in all_scored(comparison) if trained.step is None]
    lacking = [trained for trained in every if not run.find(LOSS, task=TASK, **trained.arm)]
    if not lacking:
        return
    comparison.say("Measuring how far the adapters are from the base on neutral texts.")
    base = load_base(comparison.training, comparison.options)
    before = losses(base, texts, batch_size=batch_size)
    for trained in lacking:
        start, rows = time.monotonic(), [(LOSS, loss_per_token(before))]
        if trained.seed is not None:
            try:
                measured = adapter_measures(base, trained.adapter, texts, before, batch_size=batch_size)
            except (ForgettingError, FloatingPointError) as error:
                print(f"{trained.name}: {error}")
                continue
            rows = [(metric, estimate) for metric, estimate, row in measured if not row]
        for metric, estimate in rows:
            about = {"task": TASK, "neutral_texts": texts.checksum, "low": estimate.low, "high": estimate.high}
            if not run.find(metric, task=TASK, **trained.arm):
                run.add(metric, estimate.value, **comparison.common(start, estimate.n), **about, **trained.arm)
