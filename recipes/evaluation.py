"""How the recipes of Table 2 score, question and judge what they trained, all on one loaded base.

An arm whose weights or scores are not finite gets a row that says so, and no others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from arms import Arm, is_whole, load_base
from identity import Content, check_contents
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig

from evals.contents import adapter_checksums, checksum, model_checksums, non_finite_of_file, task_checksums
from evals.generate import COMPLETIONS, GenerateSettings, generate, load_task, task_manager
from evals.judge import judge
from evals.models import WEIGHTS_FILE, Adapter, attached, hub_commit
from evals.prompts import encode_answer
from evals.records import has_answers, read_completions
from mono_peft import activation_sparsity
from vision_bench.runs import DIVERGED, Run, device_name

if TYPE_CHECKING:
    from table2 import FinetuningTask, Table2Arguments

EVALUATION = "evaluation"  # folder of completions and verdicts


class Comparison(NamedTuple):
    """What all arms and seeds of a run share."""

    task: FinetuningTask
    run: Run
    script: Table2Arguments
    training: SFTConfig
    model_args: ModelConfig
    arms: dict[str, Arm]
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig  # of the base

    def common(self, start: float, n: int | None = None) -> dict[str, Any]:
        """What the rows of a measurement share that began at `start`; n is the number of scored prompts by default."""
        seconds, prompts = time.monotonic() - start, len(self.task.prompts)
        return {"n": n or prompts, "seconds": seconds, "device": device_name(self.training.device)}

    def score(self, model: torch.nn.Module) -> float:
        """The task's metric, not finite if any score behind it is not."""
        return self.task.score(model, self.tokenizer, self.training.per_device_eval_batch_size)

    def is_done(self, seed: int | None, **arm: Any) -> bool:
        """Whether an arm has its score or has diverged."""
        metrics = (self.task.metric, DIVERGED)
        return any(self.run.find(metric, seed=seed, **({"step": None} | arm)) for metric in metrics)


class Trained(NamedTuple):
    """A saved adapter: of an arm and seed, after so many steps (None: at the end)."""

    method: str
    seed: int
    step: int | None
    folder: Path

    @property
    def adapter(self) -> Adapter:
        """As `evals` takes it; its name says method, step and seed."""
        method = self.method if self.step is None else f"{self.method}@{self.step}"
        return Adapter(f"{method}-seed{self.seed}={self.folder}")

    @property
    def arm(self) -> dict[str, Any]:
        """What tells its rows from others."""
        return {"method": self.method} | ({} if self.step is None else {"step": self.step})


def arm_folder(run: Run, method: str, seed: int) -> Path:
    """Where an arm's checkpoints and adapter are."""
    return run.folder / f"{method}-seed{seed}"


def prompt_batches(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], batch_size: int
) -> list[dict[str, Any]]:
    """Prompts without answers, as a model sees them before it answers; what sparsity is measured on."""
    encoded = [encode_answer(tokenizer, prompt, "Yes") for prompt in prompts]
    ids = [e.input_ids[: e.completion_mask.index(1)] for e in encoded]
    starts = range(0, len(ids), batch_size)
    return [dict(tokenizer.pad({"input_ids": ids[i : i + batch_size]}, return_tensors="pt")) for i in starts]


def divergence(adapter: Path, log: Sequence[dict[str, Any]] = ()) -> str | None:
    """Why a trained adapter is no result: the training loss or a saved weight is NaN or infinite; else None.

    Every process calls it, and gets what the first one read.

    Args:
        adapter: its folder.
        log: of the trainer, unfiltered.
    """
    losses = [line[name] for line in log for name in ("loss", "train_loss") if name in line]
    reason = None
    if not all(map(math.isfinite, losses)):
        reason = "the training loss is not finite"
    elif (adapter / WEIGHTS_FILE).is_file():
        name = non_finite_of_file(adapter / WEIGHTS_FILE)
        reason = f"the adapter's {name} is not finite" if name else None
    agreed: list[str | None] = broadcast_object_list([reason])
    return agreed[0]


def task_contents(
    settings: GenerateSettings, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> dict[str, Content]:
    """The data of the evaluation's tasks.

    Raises:
        ValueError: a task is unknown, its data cannot be had, or its answers do not fit the model's context.
    """
    manager = task_manager(settings.tasks, settings.task_data)
    loaded = [t for name in settings.tasks for t in load_task(manager, name, settings, tokenizer, config)]
    checksums = task_checksums(loaded, None)
    return {f"task {name}": Content(f"the data of the task {name}", value) for name, value in checksums.items()}


def base_contents(model_args: ModelConfig) -> dict[str, Content]:
    """The base model's weights, configuration and tokenizer."""
    name = str(model_args.model_name_or_path)
    checksums = model_checksums(name, hub_commit(name, model_args.model_revision))
    return {part: Content(f"--model_name_or_path {name} ({part})", value) for part, value in checksums.items()}


def generation(
    task: FinetuningTask, script: Table2Arguments, training: SFTConfig, model_args: ModelConfig
) -> GenerateSettings | None:
    """How the base answers the prompts of all tasks; None if there are none."""
    tasks = [*task.eval_tasks, *script.safety_tasks]
    data = dict(task.task_data)
    if script.refusal_prompts is not None:
        data["refusal_prompts"] = dict.fromkeys(("harmful", "lookalike"), script.refusal_prompts)
    if not tasks:
        return None
    return GenerateSettings(
        model=str(model_args.model_name_or_path),
        tasks=tasks,
        output_dir=str(Path(training.output_dir) / EVALUATION),
        max_new_tokens=script.max_new_tokens,
        batch_size=training.per_device_eval_batch_size,
        dtype=model_args.dtype,
        load_in_4bit=model_args.load_in_4bit,
        task_data=data,
    )


def checkpoints(comparison: Comparison) -> Iterator[Trained]:
    """The checkpoints to evaluate, without the last of each arm, which is its adapter.

    Raises:
        ValueError: one that should be there is not.
    """
    every = comparison.script.eval_every
    if every is None:
        return
    for seed in comparison.script.seeds:
        for method in comparison.arms:
            folder = arm_folder(comparison.run, method, seed)
            steps = [int(c.name.rpartition("-")[2]) for c in folder.glob("checkpoint-*") if is_whole(c)]
            for step in range(every, max(steps, default=2 * every), every):
                if step not in steps:
                    raise ValueError(
                        f"--eval_every {every}: {folder} has no checkpoint of step {step}, only of {sorted(steps)}. "
                        "Choose another --output_dir to train it anew."
                    )
                yield Trained(method, seed, step, folder / f"checkpoint-{step}")


def score_checkpoints(comparison: Comparison) -> None:
    """The task's score of every checkpoint, all on one loaded base; those that diverged are marked."""
    missing = [t for t in checkpoints(comparison) if not comparison.is_done(t.seed, **t.arm)]
    if not missing:
        return
    base = load_base(comparison.training, comparison.model_args)
    for trained in missing:
        start = time.monotonic()
        reason, score = divergence(trained.folder), math.nan
        if reason is None:
            with attached(base, trained.adapter) as model:
                score = comparison.score(model)
        add_score(comparison, score, reason, start, trained)


def add_score(comparison: Comparison, score: float, reason: str | None, start: float, trained: Trained) -> None:
    """Add an adapter's score, or mark that it diverged: for `reason`, or because the score is not finite.

    The score's row names the adapter by its checksum, so that no other is evaluated for it later.
    """
    run = comparison.run
    if reason is None and not math.isfinite(score):
        reason = f"the {comparison.task.metric} is not finite"
    common = comparison.common(start) | {"seed": trained.seed} | trained.arm
    if reason is None:
        content = checksum(adapter_checksums(trained.folder)) if run.is_main else None
        run.add(comparison.task.metric, score, **common, adapter_checksum=content)
    else:
        if run.is_main:
            print(f"{trained.adapter.name} diverged: {reason}.")
        run.add_diverged(reason, **common)


def all_trained(comparison: Comparison) -> list[Trained]:
    """Every adapter and checkpoint to evaluate: those that have a score.

    Raises:
        ValueError: one is not the adapter that was scored.
    """
    final = [
        Trained(method, seed, None, arm_folder(comparison.run, method, seed) / "adapter")
        for seed in comparison.script.seeds
        for method in comparison.arms
    ]
    trained = []
    for one in [*final, *checkpoints(comparison)]:
        rows = comparison.run.find(comparison.task.metric, seed=one.seed, **({"step": None} | one.arm))
        if not rows:
            continue
        if rows[0]["config"]["adapter_checksum"] != checksum(adapter_checksums(one.folder)):
            raise ValueError(
                f"{one.folder} does not hold the adapter that was trained and scored here. Restore it, or choose "
                "another --output_dir to train it anew."
            )
        trained.append(one)
    return trained


def evaluate(comparison: Comparison, settings: GenerateSettings, judges: dict[str, str]) -> None:
    """Answers of all adapters on one loaded base, verdicts, and their rows.

    Args:
        settings: of the base's answers.
        judges: as `evals.judge` takes them, and the names that their rows get.

    Raises:
        ValueError: base, tasks or adapters are others by now.
    """
    run, script = comparison.run, comparison.script
    now = base_contents(comparison.model_args)
    check_contents(run.folder, run.recipe, now | task_contents(settings, comparison.tokenizer, comparison.config))
    trained = {t.adapter.name: t for t in all_trained(comparison)}
    with_base = bool(run.find(comparison.task.metric, method="base"))
    if not trained and not with_base:
        return
    answered = generate(replace(settings, adapters=[t.adapter for t in trained.values()], base=with_base))
    if script.judges and has_answers(answered.folder):
        answered = judge(answered.folder, list(judges), tasks=script.safety_tasks, batch_size=script.judge_batch_size)
    new, diverged = [], []
    for row in answered.rows:
        config = row["config"]
        if row["metric"] == "seconds" or any(config.get(k) for k in ("category", "versus", "versus_judge")):
            continue  # those stand in the folder's own table
        if config["adapter"] not in {None, *trained} or config.get("judge") not in {None, *judges}:
            continue  # of somebody who went on in the folder with `python -m evals`
        one = trained[config["adapter"]] if config["adapter"] else None
        where = {"task": config["task"], "judge": judges.get(config.get("judge"))} | (
            one.arm if one else {"method": "base"}
        )
        seed = one.seed if one else None
        if row["metric"] == DIVERGED:
            diverged.append((config["reason"], seed, one.arm if one else {"method": "base"}))
        elif not run.find(row["metric"], seed=seed, **({"step": None} | where)):
            where |= {name: config[name] for name in ("low", "high") if name in config}
            measured = {"n": row["n"], "seconds": row["seconds"], "device": row["device"]}
            new.append(run.row(row["metric"], row["value"], seed=seed, **measured, **where))
    run.add_rows(new)
    for reason, seed, arm in diverged:
        _forget(run, seed, {"step": None} | arm)
        run.add_diverged(reason, seed=seed, **comparison.common(time.monotonic()), **arm)


def _forget(run: Run, seed: int | None, arm: dict[str, Any]) -> None:
    """Drop the results of an arm whose answers showed that it diverged."""
    run.replace([r for r in run.rows if r["seed"] != seed or {n: r["config"].get(n) for n in arm} != arm])


def alignment_sparsity(comparison: Comparison) -> None:
    """Share of zeros in sigma(A x) on the safety prompts, for the MonoLoRA arms."""
    run, script = comparison.run, comparison.script
    missing = [
        t
        for t in all_trained(comparison)
        if comparison.arms[t.method].method == "monolora"
        and t.step is None
        and not run.find("alignment_sparsity", seed=t.seed, **t.arm)
    ]
    if not missing or not script.safety_tasks:
        return
    rows = read_completions(run.folder / EVALUATION / COMPLETIONS).rows
    prompts = list({(r.task, r.prompt_id): r.prompt for r in rows if r.task in script.safety_tasks}.values())
    batches = prompt_batches(comparison.tokenizer, prompts, comparison.training.per_device_eval_batch_size)
    base = load_base(comparison.training, comparison.model_args)
    for trained in missing:
        start = time.monotonic()
        with attached(base, trained.adapter) as model:
            measured = activation_sparsity(model, batches)
        common = comparison.common(start, len(prompts))
        run.add("alignment_sparsity", measured.overall, seed=trained.seed, **common, **trained.arm)
