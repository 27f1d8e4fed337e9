"""What the recipes of Table 2 share: options, training of all arms and seeds, and their evaluation on one loaded base.

A recipe gives its data and how a model scores on them (`FinetuningTask`), `compare` does the rest. Training leaves an
adapter per arm and seed; after that `evals.generate` and `evals.judge` work in the folder `evaluation`, and their rows
are taken over into the run's own.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from accelerate import PartialState
from arms import (
    ArmArguments,
    adapter_of,
    check_arms,
    checkpoint,
    finetuning,
    load_base,
    load_tokenizer,
    not_sharded,
    trained_arms,
)
from datasets import Dataset
from evaluation import (
    Comparison,
    Trained,
    add_score,
    alignment_sparsity,
    arm_folder,
    base_contents,
    divergence,
    evaluate,
    generation,
    prompt_batches,
    score_checkpoints,
    task_contents,
)
from identity import Content, check_contents, identity
from mixtures import (
    Pair,
    check_enough,
    check_share,
    fitting,
    load_pairs,
    mixed,
    offline_poison,
    offline_safety,
)
from table2_report import Column, short_name, write_report
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, TrlParser

from evals.contents import checksum
from evals.judge import check_judging
from evals.models import Adapter, check_adapter
from evals.prompts import training_row
from mono_peft import SparsityCallback, activation_sparsity
from offline import NAME as OFFLINE
from offline.judge import offline_judge
from offline.language_model import offline_model
from vision_bench.runs import CONFIG, Run

CONFIGS = Path(__file__).parent / "configs"


@dataclass
class Table2Arguments(ArmArguments):
    """What is compared, on which data, and how it is evaluated; the rest is in TRL's ModelConfig and SFTConfig."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name of the training data on the hub."})
    train_file: str | None = field(default=None, metadata={"help": "Local training data instead."})
    train_samples: int | None = field(default=None, metadata={"help": "Rows drawn per seed; None: all."})
    eval_samples: int | None = field(default=None, metadata={"help": "The first so many are scored; None: all."})
    safety_file: str | None = field(default=None, metadata={"help": "jsonl: prompt, response; for arms with +safety."})
    poison_file: str | None = field(default=None, metadata={"help": "jsonl or jsonl.gz of harmful pairs, as above."})
    poison_share: float = field(default=0.0, metadata={"help": "Of every arm's training rows, in [0, 1]."})
    judges: list[str] = field(default_factory=list, metadata={"help": "As `python -m evals judge` takes them."})
    judge_batch_size: int = field(default=8, metadata={"help": "Conversations that a judge reads at a time."})
    safety_tasks: list[str] = field(
        default_factory=list, metadata={"help": "Prompts for the judges; with judges named: beavertails_eval."}
    )
    max_new_tokens: int | None = field(default=None, metadata={"help": "Of an answer; None: as the task says, 512."})
    refusal_prompts: int | None = field(
        default=None, metadata={"help": "Of refusal_offline: so many harmful and so many look-alikes; None: all."}
    )
    eval_every: int | None = field(
        default=None, metadata={"help": "Keep and evaluate a checkpoint every so many training steps."}
    )


class FinetuningTask(ABC):
    """The data of a recipe and how a model scores on them."""

    recipe: str
    paper: str  # which part of Table 2
    metric: str  # name of `score`, whose row says that an arm is trained
    performance: Sequence[Column]  # columns of the table; the first is an axis of the figure
    eval_tasks: Sequence[str] = ()  # of lm-eval, answered with the safety prompts
    task_data: dict[str, Any]  # arguments of their data functions
    prompts: list[str]  # that are scored

    @abstractmethod
    def training_pairs(self, seed: int) -> list[Pair]:
        """Prompts and answers to train on."""

    @abstractmethod
    def score(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> float:
        """The value of `metric`, not finite if a score behind it is not; every process calls it."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Numbers of rows, for the run's configuration."""

    @abstractmethod
    def contents(self) -> dict[str, Content]:
        """What is trained on, of which each seed draws, as `train`, and what is scored as `eval`."""

    @abstractmethod
    def check_lengths(self, tokenizer: PreTrainedTokenizerBase, context: int, max_length: int | None) -> None:
        """Raise ValueError if the data do not fit.

        Args:
            context: tokens that the model reads at most.
            max_length: tokens of a training row, None for no limit.
        """


Script = TypeVar("Script", bound=Table2Arguments)


def parse(
    arguments: list[str] | None, script: type[Script], recipe: str, offline: Path
) -> tuple[Script, SFTConfig, ModelConfig]:
    """Command line over `--config` over the offline default (if no model is named) over what the machine has."""
    parser = TrlParser((script, SFTConfig, ModelConfig))
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    parser.set_defaults_with_config(
        output_dir=f"runs/{recipe}",
        use_cpu=not torch.accelerator.is_available(),
        bf16=bf16,
        dtype="bfloat16" if bf16 else "float32",
        save_strategy="epoch",
        save_total_limit=2,
    )
    parsed = parser.parse_args_and_config(arguments)
    if parsed[2].model_name_or_path is None:
        parser.set_defaults_with_config(**yaml.safe_load(offline.read_text(encoding="utf-8")))
        parsed = parser.parse_args_and_config(arguments)
    script, training, model_args = parsed
    if script.judges and not script.safety_tasks:
        script.safety_tasks = ["beavertails_eval"]
    if script.eval_every is not None and script.eval_every > 0:
        training.save_strategy, training.save_steps, training.save_total_limit = "steps", script.eval_every, None
    return script, training, model_args


def check(script: Table2Arguments, training: SFTConfig, model_args: ModelConfig) -> None:
    """Raise ValueError for settings that contradict each other."""
    check_arms(script, training, model_args)
    for name in ("train_samples", "eval_samples"):
        value = getattr(script, name)
        if value is not None and value < 2:
            raise ValueError(f"--{name} must be at least 2, got {value}.")
    for name in ("judge_batch_size", "max_new_tokens", "refusal_prompts", "eval_every"):
        value = getattr(script, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    for name in ("poison_share", "safety_share"):
        check_share(f"--{name}", getattr(script, name))
    shares = script.poison_share + script.safety_share
    if any("+safety" in method for method in script.methods) and shares > 1:
        raise ValueError(f"--poison_share and --safety_share are {shares} together, allowed is 1 at most.")
    if script.poison_file and script.poison_share == 0:
        raise ValueError("--poison_file without --poison_share mixes nothing in; give a share above 0.")
    if model_args.model_name_or_path and script.poison_share and not script.poison_file:
        raise ValueError("--poison_share needs --poison_file: the generated pairs are for the offline model only.")
    needs_safety = any("+safety" in method for method in script.methods)
    if model_args.model_name_or_path and needs_safety and not script.safety_file:
        raise ValueError("An arm with +safety needs --safety_file: the generated pairs are for the offline model.")
    if script.dataset_name and script.train_file:
        raise ValueError("--dataset_name and --train_file are two sources of the same data; give one.")
    if training.packing:
        raise ValueError(
            "--packing is for long texts and changes what a step is; here each row is one example. Leave it out."
        )
    if training.model_init_kwargs or training.chat_template_path or training.eos_token:
        raise ValueError(
            "--model_init_kwargs, --chat_template_path and --eos_token would change the model that is trained and not "
            "the one that is evaluated. Leave them out; give a model's folder that has what they say."
        )
    if training.auto_find_batch_size:
        raise ValueError(
            "--auto_find_batch_size would train arms with different batches. Give --per_device_train_batch_size."
        )
    if model_args.load_in_4bit and (model_args.bnb_4bit_quant_type != "nf4" or not model_args.use_bnb_nested_quant):
        raise ValueError(
            "--load_in_4bit is evaluated as NF4 with double quantisation, so it must be trained so: give "
            "--use_bnb_nested_quant true and no other --bnb_4bit_quant_type."
        )
    if script.safety_tasks and model_args.model_revision not in (None, "main"):
        raise ValueError(f"--model_revision {model_args.model_revision} cannot be evaluated; give a local folder.")
    if script.safety_tasks and model_args.load_in_8bit:
        raise ValueError("--load_in_8bit cannot be evaluated as it was trained; use --load_in_4bit or neither.")


def compare(task: FinetuningTask, script: Table2Arguments, training: SFTConfig, model_args: ModelConfig) -> None:
    """Train and evaluate what the output folder has no results of, then write and print table and figure.

    Raises:
        ValueError: before training, for whatever cannot work.
    """
    arms = trained_arms(script, training, model_args)
    pairs = _mixture_pairs(script)
    rows = len(task.training_pairs(script.seeds[0]))
    _check_steps(script, training, rows)
    judges = _judge_names(script.judges)
    contents = task.contents() | {
        name: Content(f"--{name}_file {getattr(script, f'{name}_file') or '(generated)'}", checksum(some))
        for name, some in pairs.items()
    }
    if script.judges:
        made = check_judging(script.judges, batch_size=script.judge_batch_size)
        contents |= {
            f"judge {judges[given]}": Content(f"--judges {given}", checksum(judge.settings))
            for given, judge in made.items()
        }
    # The offline judge by its folder: building it is the work of all processes, judging that of one.
    judge_folders = {
        f"shieldgemma={offline_judge()}" if judge == OFFLINE else judge: name for judge, name in judges.items()
    }
    demonstration = model_args.model_name_or_path is None
    if demonstration:
        model_args.model_name_or_path = str(offline_model())
    tokenizer, config = load_tokenizer(
        training, model_args, [adapter_of(a, model_args, script.activation) for a in arms.values()]
    )
    context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    task.check_lengths(tokenizer, context, training.max_length)
    settings = generation(task, script, training, model_args)
    contents |= base_contents(model_args)
    contents |= task_contents(settings, tokenizer, config) if settings else {}
    check_contents(Path(training.output_dir), task.recipe, contents)
    state = PartialState()
    decisive = identity(script, training, model_args, task.sizes(), list(judges.values()), contents, demonstration)
    run = Run(training.output_dir, task.recipe, decisive, state.is_main_process)
    for name, share in (("poison", script.poison_share), ("safety", script.safety_share)):
        if name in pairs:
            pairs[name] = fitting(pairs[name], tokenizer, training.max_length, f"--{name}_share")
            check_enough(f"--{name}_share", share, rows, pairs[name])
    comparison = Comparison(task, run, script, training, model_args, arms, tokenizer, config)
    _check_checkpoints(comparison)

    run.bind()
    _train(comparison, pairs)
    score_checkpoints(comparison)
    if not state.is_main_process:
        return  # answers and verdicts are the work of one process
    if settings is not None:
        with not_sharded(training):
            evaluate(comparison, settings, judge_folders)
            alignment_sparsity(comparison)
    print(write_report(run, task.paper, task.performance, list(arms), list(judges.values()), demonstration))


def _judge_names(judges: Sequence[str]) -> dict[str, str]:
    """What the rows call each judge: without its folder, whose content the run knows, if that tells them apart."""
    names = {judge: short_name(judge) for judge in judges}
    return {judge: name if list(names.values()).count(name) == 1 else judge for judge, name in names.items()}


def _mixture_pairs(script: Table2Arguments) -> dict[str, list[Pair]]:
    """The pairs to mix in, as `poison` and `safety`; from the files, else generated."""
    pairs = {}
    if script.poison_share:
        file = script.poison_file
        pairs["poison"] = load_pairs(file, "--poison_file") if file else offline_poison()
    if any("+safety" in method for method in script.methods):
        file = script.safety_file
        pairs["safety"] = load_pairs(file, "--safety_file") if file else offline_safety()
    return pairs


def _check_steps(script: Table2Arguments, training: SFTConfig, rows: int) -> None:
    """Raise ValueError if no step of the training is a multiple of `eval_every`."""
    if script.eval_every is None:
        return
    batches = -(-rows // (training.per_device_train_batch_size * training.world_size))
    an_epoch = -(-batches // training.gradient_accumulation_steps)
    steps = training.max_steps if training.max_steps > 0 else round(an_epoch * training.num_train_epochs)
    if script.eval_every > steps:
        raise ValueError(
            f"--eval_every {script.eval_every} matches no checkpoint: training takes {steps} steps ({rows} rows). "
            f"Give 1 to {steps}."
        )


def _check_checkpoints(comparison: Comparison) -> None:
    """Raise ValueError if a checkpoint or adapter that is in the folder already is of another base or run."""
    run, training, model = comparison.run, comparison.training, str(comparison.model_args.model_name_or_path)
    for method in comparison.arms:
        for seed in comparison.script.seeds:
            folder = arm_folder(run, method, seed)
            newest = checkpoint(folder, training.resume_from_checkpoint)
            paths = [Path(newest)] if newest else []
            paths += [folder / "adapter"] if (folder / "adapter" / "adapter_config.json").exists() else []
            for path in paths:
                with not_sharded(training):
                    check_adapter(Adapter(f"{method}-seed{seed}={path}"), model, comparison.config)
            if newest and folder.resolve() not in Path(newest).resolve().parents:
                raise ValueError(
                    f"--resume_from_checkpoint {newest} is not of this run, whose checkpoints of {method} are in "
                    f"{folder}: what it was trained on is not known here. Leave it out."
                )
            if newest and not (run.folder / CONFIG).exists():
                raise ValueError(
                    f"{newest} is there without the {CONFIG} that says what it was trained on. Choose another "
                    "--output_dir, or --resume_from_checkpoint False to start anew."
                )


def _train(comparison: Comparison, pairs: dict[str, list[Pair]]) -> None:
    """Score the base, then train, save and score every arm and seed that is not done yet.

    Args:
        pairs: to mix in, as `poison` and `safety`.
    """
    task, run, script, training, model_args, arms, tokenizer, _ = comparison
    batches = prompt_batches(tokenizer, task.prompts, training.per_device_eval_batch_size)
    if "base" in script.methods and not comparison.is_done(None, method="base"):
        start = time.monotonic()
        score = comparison.score(load_base(training, model_args))
        common = comparison.common(start) | {"seed": None, "method": "base"}
        if math.isfinite(score):
            run.add(task.metric, score, **common)
        else:
            run.add_diverged(f"the {task.metric} is not finite", **common)
    for seed in script.seeds:
        of_seed: list[Pair] | None = None
        for method, arm in arms.items():
            if comparison.is_done(seed, method=method):
                continue
            start = time.monotonic()
            if of_seed is None:
                of_seed = fitting(task.training_pairs(seed), tokenizer, training.max_length, "--train_samples")
            mixtures = [(pairs.get("poison", []), script.poison_share), (pairs.get("safety", []), arm.safety_share)]
            rows = Dataset.from_list([training_row(tokenizer, *pair) for pair in mixed(of_seed, mixtures, seed)])
            options = copy.deepcopy(training)
            options.weight_decay = arm.weight_decay
            trained = Trained(method, seed, None, arm_folder(run, method, seed) / "adapter")
            newest = checkpoint(trained.folder.parent, training.resume_from_checkpoint)
            reason, score = divergence(Path(newest)) if newest else None, math.nan
            if reason is None:
                adapter = adapter_of(arm, model_args, script.activation)
                trainer = finetuning(trained.folder.parent, seed, rows, adapter, tokenizer, options, model_args)
                if arm.method == "monolora":
                    trainer.add_callback(SparsityCallback(trainer, batches[:1]))
                trainer.train(resume_from_checkpoint=newest)
                trainer.save_model(str(trained.folder))
                reason = divergence(trained.folder, trainer.state.log_history)
            if reason is None:
                score = comparison.score(trainer.model)
            if arm.method == "monolora" and math.isfinite(score):
                measured = activation_sparsity(trainer.model, batches)
                common = comparison.common(start) | {"seconds": 0, "seed": seed, "method": method}
                run.add("task_sparsity", measured.overall, **common)
                run.add("dead_units", measured.dead, **common)
            add_score(comparison, score, reason, start, trained)  # last, because this row says that the arm is done
