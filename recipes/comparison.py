"""A run of Table 2: its arms and seeds, their training and scores, each in a folder of its own.

An arm whose training loss, weights or scores are not finite gets a row that says so, and no others.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from arms import ADAPTERS, Arm, adapter_config
from datasets import Dataset
from peft import get_peft_model
from safety_controls import attach_safety_control
from task import Pair, Task, fitting, mixed
from training_progress import TrainingProgress
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
)
from transformers.integrations import unset_hf_deepspeed_config
from trl import ModelConfig, SFTConfig, SFTTrainer, get_quantization_config

from evals.contents import adapter_checksums, checksum, non_finite_of_file
from evals.models import WEIGHTS_FILE, Adapter, attached, check_adapter, load_tokenizer_and_config
from evals.progress import duration
from evals.prompts import encode_answer, training_row
from evals.thoughts import thoughts_of
from mono_peft import SparsityCallback, activation_sparsity
from mono_peft.silenceable import silenceable_adapters
from vision_bench.runs import CONFIG, DIVERGED, Cell, Run, device_name

if TYPE_CHECKING:
    from table2 import Table2Settings


class Trained(NamedTuple):
    """A saved adapter: of an arm and seed, after so many steps (None: at the end); or the base, without any."""

    method: str
    seed: int | None
    step: int | None
    folder: Path

    @property
    def name(self) -> str | None:
        """Its name for `evals`, which says method, step and seed; None for the base."""
        step = "" if self.step is None else f"@{self.step}"
        return None if self.seed is None else f"{self.method}{step}-seed{self.seed}"

    @property
    def adapter(self) -> Adapter:
        """The adapter in the form that `evals` takes."""
        return Adapter(f"{self.name}={self.folder}")

    @property
    def arm(self) -> dict[str, Any]:
        """The settings that tell its rows from those of others."""
        return {"method": self.method, "seed": self.seed, "step": self.step}


def cells(config: dict[str, Any], metric: str) -> Iterator[Cell]:
    """The rows of a task's metric in a whole run of a configuration, without those of checkpoints."""
    if "base" in config["methods"]:
        yield Cell(metric, None, {"method": "base", "step": None})
    for seed in config["seeds"]:
        for method in config["methods"]:
            if method != "base":
                yield Cell(metric, seed, {"method": method, "step": None})


@dataclass(frozen=True)
class Comparison:
    """The task, the settings and the base model that all arms and seeds of a run share."""

    task: Task
    run: Run
    settings: Table2Settings
    training: SFTConfig
    options: ModelConfig
    arms: dict[str, Arm]
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig  # of the base
    unaligned: str | None = None  # name of the model that Safe LoRA takes the base's difference to

    def trained(self, method: str, seed: int | None) -> Trained:
        """An arm's adapter at the end of its training, beside which its checkpoints lie; or the base."""
        return Trained(method, seed, None, self.run.folder / f"{method}-seed{seed}" / "adapter")

    def common(self, start: float, n: int | None = None) -> dict[str, Any]:
        """Fields that rows of a measurement from `start` on share; n is the number of scored prompts by default."""
        seconds = time.monotonic() - start
        return {"n": n or len(self.task.scored), "seconds": seconds, "device": device_name(self.training.device)}

    def say(self, text: str) -> None:
        """Print what is done now; the main process does."""
        if self.run.is_main:
            print(text, flush=True)

    def score(self, model: torch.nn.Module) -> float:
        """The task's metric, not finite if any score behind it is not."""
        batch_size = self.training.per_device_eval_batch_size
        return self.task.score(self.task.scored, model, self.tokenizer, batch_size)

    def prompt_batches(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """Prompts without answers, as a model sees them before it answers; what sparsity is measured on."""
        ids = [encode_answer(self.tokenizer, prompt, "Yes").prompt_ids for prompt in prompts]
        size = self.training.per_device_eval_batch_size
        starts = range(0, len(ids), size)
        return [dict(self.tokenizer.pad({"input_ids": ids[i : i + size]}, return_tensors="pt")) for i in starts]

    def has_latents(self, method: str) -> bool:
        """Whether the arm's adapter has a sigma(A x), whose sparsity is measured."""
        return ADAPTERS[self.arms[method].method].has_latents

    def checkpoints(self) -> Iterator[Trained]:
        """The checkpoints to evaluate, without the last of each arm, which is its adapter.

        Raises:
            ValueError: one that should be there is not.
        """
        every = self.settings.eval_every
        if every is None:
            return
        for seed in self.settings.seeds:
            for method in self.arms:
                folder = self.trained(method, seed).folder.parent
                steps = [_step(c) for c in folder.glob("checkpoint-*") if is_whole(c)]
                for step in range(every, max(steps, default=2 * every), every):
                    if step not in steps:
                        raise ValueError(
                            f"--eval_every {every}: {folder} has no checkpoint of step {step}, only of "
                            f"{sorted(steps)}. Choose another --output_dir to train it anew."
                        )
                    yield Trained(method, seed, step, folder / f"checkpoint-{step}")

    def check_checkpoints(self) -> None:
        """Raise ValueError if a checkpoint or adapter that is in the folder already is of another base or run."""
        wish = self.training.resume_from_checkpoint
        for trained in (self.trained(method, seed) for method in self.arms for seed in self.settings.seeds):
            folder = trained.folder.parent
            newest = checkpoint(folder, wish)
            paths = [Path(newest)] if newest else []
            paths += [trained.folder] if (trained.folder / "adapter_config.json").exists() else []
            for path in paths:
                adapter = trained._replace(folder=path).adapter
                with not_sharded(self.training):
                    check_adapter(adapter, str(self.options.model_name_or_path), self.config)
            if newest and folder.resolve() not in Path(newest).resolve().parents:
                raise ValueError(
                    f"--resume_from_checkpoint {newest} is not of this run, whose checkpoints of {trained.method} are "
                    f"in {folder}: what it was trained on is not known here. Leave it out."
                )
            if newest and not (self.run.folder / CONFIG).exists():
                raise ValueError(
                    f"{newest} is there without the {CONFIG} that says what it was trained on. Choose another "
                    "--output_dir, or --resume_from_checkpoint False to start anew."
                )


def train(comparison: Comparison, pairs: dict[str, list[Pair]]) -> None:
    """Score the base, then train, save and score every arm and seed that is not done yet, then score checkpoints.

    Args:
        pairs: to mix in, as `poison` and `safety`; the latter also for the arms that stay as the base is on them.
    """
    task, run, settings, training = comparison.task, comparison.run, comparison.settings, comparison.training
    batches = comparison.prompt_batches(task.prompts)
    drawn: dict[int, list[Pair]] = {}
    every = run.lacking(cells(run.config, task.metric))
    begin = time.monotonic()
    for place, cell in enumerate(every):
        start, score = time.monotonic(), math.nan
        trained = comparison.trained(cell.arm["method"], cell.seed)
        left = f", about {duration((start - begin) / place * (len(every) - place))} left" if place > 1 else ""
        what = "Scoring the base" if cell.seed is None else f"Training and scoring {trained.name}"
        comparison.say(f"{what} ({place + 1} of {len(every)}{left}).")
        if cell.seed is None:
            score = comparison.score(load_base(training, comparison.options))
            add_score(comparison, score, None, start, trained)
            continue
        if cell.seed not in drawn:
            rows = task.draw(cell.seed)
            drawn = {cell.seed: fitting(rows, comparison.tokenizer, training.max_length, "--train_samples")}
        safety_share = comparison.arms[trained.method].safety_share
        mixtures = [(pairs.get("poison", []), settings.poison_share), (pairs.get("safety", []), safety_share)]
        mixture = mixed(drawn[cell.seed], mixtures, cell.seed)
        newest = checkpoint(trained.folder.parent, training.resume_from_checkpoint)
        reason = divergence(Path(newest)) if newest else None
        if reason is None:
            rows = Dataset.from_list([training_row(comparison.tokenizer, *pair) for pair in mixture])
            trainer = finetuning(comparison, trained, rows)
            if comparison.has_latents(trained.method):
                trainer.add_callback(SparsityCallback(trainer, batches[:1]))
            arm = comparison.arms[trained.method]
            attach_safety_control(trainer, arm, settings, mixture, pairs.get("safety", []), comparison.unaligned)
            trainer.train(resume_from_checkpoint=newest)
            trainer.save_model(str(trained.folder))
            reason = divergence(trained.folder, trainer.state.log_history)
        if reason is None:
            score = comparison.score(trainer.model)
        if comparison.has_latents(trained.method) and math.isfinite(score):
            measured = activation_sparsity(trainer.model, batches)
            common = comparison.common(start) | {"seconds": 0}
            run.add("task_sparsity", measured.overall, **common, **trained.arm)
            run.add("dead_units", measured.dead, **common, **trained.arm)
        add_score(comparison, score, reason, start, trained)  # last, because this row says that the arm is done
    lacking = [t for t in comparison.checkpoints() if not run.find(task.metric, **t.arm) + run.find(DIVERGED, **t.arm)]
    base = load_base(training, comparison.options) if lacking else None
    for trained in lacking:
        start, score, reason = time.monotonic(), math.nan, divergence(trained.folder)
        if reason is None:
            with attached(base, trained.adapter) as model:
                score = comparison.score(model)
        add_score(comparison, score, reason, start, trained)


def add_score(comparison: Comparison, score: float, reason: str | None, start: float, trained: Trained) -> None:
    """Add an arm's score, or mark that it diverged: for `reason`, or because the score is not finite.

    The score's row names the adapter by its checksum, so that no other is evaluated for it later.
    """
    run, metric = comparison.run, comparison.task.metric
    if reason is None and not math.isfinite(score):
        reason = f"the {metric} is not finite"
    common = comparison.common(start) | trained.arm
    if reason is not None:
        if run.is_main:
            print(f"{trained.name or 'The base model'} diverged: {reason}.")
        run.add_diverged(reason, **common)
        return
    if trained.seed is not None and run.is_main:
        common["adapter_checksum"] = checksum(adapter_checksums(trained.folder))
    run.add(metric, score, **common)
    comparison.say(f"{trained.name or 'The base'}: {metric} {score:.3f}")


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


def finetuning(comparison: Comparison, trained: Trained, rows: Dataset) -> SFTTrainer:
    """A trainer for one arm and seed, in its own folder; call `train(resume_from_checkpoint=checkpoint(...))`.

    Args:
        rows: TRL's prompt/completion rows; the loss is on the completions.
    """
    options, arm = comparison.options, comparison.arms[trained.method]
    if comparison.training.deepspeed_plugin is not None:
        AcceleratorState._reset_state()  # else accelerate refuses a second trainer; Trainer's own sweeps do the same
    arguments = copy.deepcopy(comparison.training)
    arguments.output_dir = str(trained.folder.parent)
    arguments.seed = trained.seed
    arguments.weight_decay, arguments.learning_rate = arm.weight_decay, arm.learning_rate
    arguments.model_init_kwargs = _model_options(options)
    arguments.logging_nan_inf_filter = False  # else a loss that is not finite is logged as the one before it
    trainer = SFTTrainer(
        model=options.model_name_or_path,
        args=arguments,
        train_dataset=rows,
        processing_class=comparison.tokenizer,
        peft_config=adapter_config(arm, comparison.settings, options),
        quantization_config=get_quantization_config(options),
    )
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TrainingProgress(str(trained.name)))
    return trainer


def load_tokenizer(
    settings: Table2Settings, training: SFTConfig, options: ModelConfig, arms: dict[str, Arm]
) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """The tokenizer and the model's configuration, after a check that the model takes the adapters.

    No weights are loaded for it.

    Raises:
        ValueError: the model is neither a local folder nor to be had from the hub, its chat template cannot do without
            thoughts, or an adapter's targets match none of its modules.
        TypeError: a target cannot be adapted.
    """
    tokenizer, config = load_tokenizer_and_config(str(options.model_name_or_path), options.model_revision)
    thoughts_of(tokenizer, "off", None, f"the model {options.model_name_or_path!r}")
    # MonoLoRA first: its error lists what the model has.
    for arm in sorted(arms.values(), key=lambda arm: arm.method != "monolora"):
        with torch.device("meta"), not_sharded(training):
            model = get_peft_model(AutoModelForCausalLM.from_config(config), adapter_config(arm, settings, options))
        if arm.silence_weight:
            silenceable_adapters(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as SFTTrainer does
    return tokenizer, config


def load_base(training: SFTConfig, options: ModelConfig) -> PreTrainedModel:
    """The base model on the device of `training`, whole in every process."""
    quantization = get_quantization_config(options)
    with not_sharded(training):
        model = AutoModelForCausalLM.from_pretrained(
            options.model_name_or_path,
            **_model_options(options),
            quantization_config=quantization,
            device_map={"": training.device} if quantization is not None else None,
        )
    return model if quantization is not None else model.to(training.device)


def _model_options(options: ModelConfig) -> dict[str, Any]:
    return {
        "revision": options.model_revision,
        "attn_implementation": options.attn_implementation,
        "dtype": options.dtype,
    }


@contextmanager
def not_sharded(training: SFTConfig) -> Iterator[None]:
    """Under ZeRO-3 transformers shards every model that it builds, which only an engine can use; not so inside."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if training.deepspeed_plugin is not None:
            training.deepspeed_plugin.set_deepspeed_weakref()


def checkpoint(folder: Path, wish: str | bool | None) -> str | None:
    """Return where an arm continues: its newest whole checkpoint, None if `wish` is False, or the one it names."""
    if is_path(wish):
        return str(wish)
    if str(wish).lower() == "false":
        return None
    whole = [c for c in folder.glob("checkpoint-*") if is_whole(c)]
    return str(max(whole, key=_step)) if whole else None


def is_path(wish: str | bool | None) -> bool:
    """Whether --resume_from_checkpoint names a checkpoint; on the command line "True" and "False" arrive as text."""
    return wish is not None and str(wish).lower() not in ("true", "false")


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the trainer's state comes last, and a kill can cut it too."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
