"""Answers, verdicts and task metrics during any Trainer's training, in its logs and in a folder of `evals`.

trainer = SFTTrainer(...)
trainer.add_callback(EvalsCallback(trainer, ["xstest", "sst2_instruct"], every=100, judges=["refusal", "coherence"]))
trainer.train()
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig, TrainerCallback

from evals.completions_lm import Arm, CompletionsLM, DivergedError
from evals.contents import task_checksums
from evals.generate import Generation, load_task, task_manager
from evals.judge import check_judging, judge
from evals.records import COMPLETIONS, SAMPLES, VERDICTS, has_answers, read_completions
from evals.registry import judge_kind
from evals.settings import Adapter, GenerateSettings
from evals.thoughts import thoughts_of
from mono_peft.activity import in_eval_mode
from vision_bench.runs import CONFIG, ROWS, LineAppender, Run, defaults, read_lines, recorded, write_atomic
from vision_bench.runs.lines import line

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

FOLDER = "evals"  # in the training's output folder
HEADLINES = ("refused", "score", "unparsed")  # and the share of unsafe answers, by whatever name a judge gives it
MODEL = "training"  # the model's name in rows and answers


class EvalsCallback(TrainerCallback):
    """Lets the model answer tasks before the first step, every so many steps and after the last; logs the measures.

    A training that another callback stops early is not measured after its last step.

    A line with `eval_{task}[_{category}][_{judge}]_{metric}` goes to `state.log_history` and every logger of
    `report_to`; of judges it has the metrics of HEADLINES. The folder `evals` of the training's output folder has all,
    answers and verdicts too, as of `python -m evals`, each step an arm (`step-100`), so that
    `python -m evals compare` compares steps. The model's
    mode, random numbers and generation config are afterwards as before, so that a training with this callback takes
    the same steps as one without it.

    Of several processes the main one measures and the others wait, which their timeout must allow.

    Args:
        trainer: the Trainer (or TRL trainer) that the callback is added to, with a tokenizer as processing class.
        tasks: as `--tasks` of `python -m evals generate`.
        every: steps between two measurements, at least 1.
        judges: as `--judges`; `refusal` and `coherence` need no model, others are loaded beside the training.
        limit: only the first so many prompts of each task.
        max_new_tokens: of an answer; None: as the task says, 512 in those of `evals`.
        batch_size: prompts at a time.

    Raises:
        ValueError: before the training: a task or judge cannot be had, a number is not allowed, the trainer has no
            tokenizer, or its weights are sharded.
    """

    def __init__(
        self,
        trainer: Trainer,
        tasks: Sequence[str],
        *,
        every: int,
        judges: Sequence[str] = (),
        limit: int | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 16,
    ) -> None:
        if every < 1:
            raise ValueError(f"`every` is {every}, allowed is 1 or more steps.")
        _check_whole(trainer)
        tokenizer = trainer.processing_class
        if tokenizer is None or not hasattr(tokenizer, "convert_tokens_to_ids"):
            raise ValueError("The trainer has no tokenizer to write prompts with; give it as `processing_class`.")
        self.trainer, self.tokenizer, self.every, self.judges = trainer, tokenizer, every, list(judges)
        folder = str(Path(trainer.args.output_dir) / FOLDER)
        self.settings = GenerateSettings(
            MODEL, list(tasks), folder, limit=limit, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        if self.judges:
            check_judging(self.judges)
        self.thoughts = thoughts_of(tokenizer, self.settings.thinking, None, "the trained model")
        self.manager = task_manager(self.settings.tasks)
        config = trainer.model.config
        self.loaded = {
            name: load_task(self.manager, name, self.settings, tokenizer, config) for name in self.settings.tasks
        }
        every_task = [task for tasks in self.loaded.values() for task in tasks]
        self.checksums = task_checksums(every_task, limit)
        self.diverged = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.is_world_process_zero():
            _forget_from(Path(self.settings.output_dir), state.global_step)
        if state.global_step == 0:
            self._measure(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(state)

    def _measure(self, state: TrainerState) -> None:
        if self.trainer.is_world_process_zero() and not self.diverged:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            with _as_before(model):
                start = time.monotonic()
                measures = self._measures(model, f"step-{state.global_step}")
                measures["eval_evals_seconds"] = round(time.monotonic() - start, 2)
                # In eval mode: TRL's trainers would add to this line, and forget, what they collect of the training.
                is_due = self.trainer.control.should_log  # the line of this step, which logging takes for written
                self.trainer.log(measures)
                self.trainer.control.should_log = is_due
        self.trainer.accelerator.wait_for_everyone()

    def _measures(self, model: Any, name: str) -> dict[str, float]:
        """Let the model answer, judge it, and return the rows of this step as numbers to log."""
        arm = Arm(Adapter(f"{name}={name}"), self.tokenizer, self.thoughts, {"training": name}, False)
        run = Run(self.settings.output_dir, "evals", recorded(self.settings), defaults=defaults(GenerateSettings))
        run.bind()
        generation = Generation(run, self.settings, [arm], self.manager, self.loaded, self.checksums)
        path = run.folder / COMPLETIONS
        answered = {row.key: row for row in read_completions(path).rows} if path.exists() else {}
        padding_side, pad_token = self.tokenizer.padding_side, self.tokenizer.pad_token
        try:
            with LineAppender(path) as file, LineAppender(run.folder / SAMPLES) as samples:
                lm = CompletionsLM(model, arm, self.settings, file=file, done=answered, tasks=self.checksums)
                try:
                    for task in self.loaded:
                        generation.evaluate(lm, arm, task, samples)
                except DivergedError as error:
                    generation.mark_diverged(arm, str(error))
                    self.diverged = True
                    return {}
        finally:
            self.tokenizer.padding_side, self.tokenizer.pad_token = padding_side, pad_token
        if self.judges and has_answers(run.folder):
            run = judge(run.folder, self.judges)
        rows = [row for row in run.rows if row["config"]["adapter"] == name and row["value"] is not None]
        return {_name(row): row["value"] for row in rows if row["metric"] != "seconds" and _is_headline(row)}


def _check_whole(trainer: Trainer) -> None:
    """Raise ValueError if no process has all weights, without which none can answer by itself."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    sharding = "FSDP" if getattr(trainer, "is_fsdp_enabled", False) else ""
    if plugin is not None and plugin.zero_stage == 3:
        sharding = "DeepSpeed ZeRO-3"
    if sharding:
        raise ValueError(
            f"The weights are sharded ({sharding}), and each token of an answer would gather all of them, in every "
            "process at once: evaluate the saved checkpoints by `python -m evals run` instead, or train with DDP or "
            "ZeRO-2."
        )


def _is_headline(row: dict[str, Any]) -> bool:
    config = row["config"]
    if any(config.get(name) for name in ("versus", "versus_judge")):
        return False
    judge = config.get("judge")
    return not judge or row["metric"] in (judge_kind(judge).unsafe, *HEADLINES)


def _name(row: dict[str, Any]) -> str:
    config = row["config"]
    parts = (config["task"], config.get("category"), config.get("judge"), row["metric"])
    return "eval_" + "_".join(str(part).replace(" ", "_") for part in parts if part)


@contextmanager
def _as_before(model: Any) -> Iterator[None]:
    """Eval mode, greedy decoding and random numbers of its own inside; afterwards all is as it was."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    own = base.generation_config
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - lm-eval seeds the global one
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    control = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    base.generation_config = GenerationConfig(**control)
    # lm-eval ties the weights of a model that it is given, which undoes what an adapter put in the place of one.
    model.tie_weights = lambda *_, **__: None
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), in_eval_mode(model):
            yield
    finally:
        del model.tie_weights
        base.generation_config = own
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def _forget_from(folder: Path, step: int) -> None:
    """Leave of the folder what is of steps before this one: a training from there on makes the others anew."""
    if step == 0:
        (folder / CONFIG).unlink(missing_ok=True)
    for name in (COMPLETIONS, SAMPLES, VERDICTS, ROWS):
        path = folder / name
        if path.is_file():
            rows = [row for _, row in read_lines(path).rows]
            write_atomic(path, "".join(line(row) for row in rows if step > 0 and _step(row) <= step))


def _step(row: dict[str, Any]) -> int:
    adapter = row["adapter"] if "adapter" in row else row["config"]["adapter"]
    return int(str(adapter).removeprefix("step-")) if adapter else 0
