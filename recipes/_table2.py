"""What the recipes of Table 2 share: options, training of all arms and seeds, and their evaluation on one loaded base.

A recipe gives its data and how a model scores on them (`FinetuningTask`), `compare` does the rest. Training leaves an
adapter per arm and seed; after that `evals.generate` and `evals.judge` work in the folder `evaluation`, and their rows
are taken over into the run's own.
"""

from __future__ import annotations

import copy
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import yaml
from _arms import (
    Arm,
    ArmArguments,
    adapter_of,
    check_arms,
    checkpoint,
    finetuning,
    is_whole,
    load_base,
    load_tokenizer,
    not_sharded,
    trained_arms,
)
from _mixtures import (
    Pair,
    check_enough,
    check_share,
    embedded_poison,
    embedded_safety,
    fitting,
    load_pairs,
    mixed,
)
from _run import Run, device_name
from _table2_report import Column, write_report
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, TrlParser

from evals.completions import read_completions
from evals.embedded import embedded_model
from evals.embedded_judge import embedded_judge
from evals.generate import COMPLETIONS, EMBEDDED, GenerateSettings, generate, task_manager
from evals.judge import check_judging, judge
from evals.models import Adapter, attached, check_adapter
from evals.prompts import encode_answer, training_row
from mono_peft import SparsityCallback, activation_sparsity

CONFIGS = Path(__file__).parent / "configs"
EVALUATION = "evaluation"  # folder of completions and verdicts


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
        default=None, metadata={"help": "Of refusal_embedded: so many harmful and so many look-alikes; None: all."}
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
        """The value of `metric`; every process calls it."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Numbers of rows, for the run's configuration."""

    def check_lengths(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:  # noqa: B027
        """Raise ValueError if the data do not fit."""


Script = TypeVar("Script", bound=Table2Arguments)


def parse(
    arguments: list[str] | None, script: type[Script], recipe: str, embedded: Path
) -> tuple[Script, SFTConfig, ModelConfig]:
    """Command line over `--config` over the embedded default (if no model is named) over what the machine has."""
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
        parser.set_defaults_with_config(**yaml.safe_load(embedded.read_text(encoding="utf-8")))
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
        raise ValueError("--poison_share needs --poison_file: the generated pairs are for the embedded model only.")
    needs_safety = any("+safety" in method for method in script.methods)
    if model_args.model_name_or_path and needs_safety and not script.safety_file:
        raise ValueError("An arm with +safety needs --safety_file: the generated pairs are for the embedded model.")
    if script.dataset_name and script.train_file:
        raise ValueError("--dataset_name and --train_file are two sources of the same data; give one.")
    if training.packing:
        raise ValueError(
            "--packing is for long texts and changes what a step is; here each row is one example. Leave it out."
        )
    if script.safety_tasks and model_args.model_revision not in (None, "main"):
        raise ValueError(f"--model_revision {model_args.model_revision} cannot be evaluated; give a local folder.")
    if script.safety_tasks and model_args.load_in_8bit:
        raise ValueError("--load_in_8bit cannot be evaluated as it was trained; use --load_in_4bit or neither.")


def identity(
    script: Table2Arguments, training: SFTConfig, model_args: ModelConfig, data: dict[str, int]
) -> dict[str, Any]:
    """The settings that decide the results, for the run's folder and rows; of TRL's those that are not its default."""
    defaults = SFTConfig(output_dir="", use_cpu=training.use_cpu, bf16=training.bf16).to_dict()
    irrelevant = re.compile(
        "^seed$|output_dir|resume|run_name|disable_tqdm|hub|^(log|report|save|eval|trackio|project)"
    )
    chosen = {k: v for k, v in training.to_dict().items() if v != defaults[k] and not irrelevant.search(k)}
    model = {k: v for k, v in asdict(model_args).items() if v != ModelConfig.__dataclass_fields__[k].default}
    plugin = training.deepspeed_plugin
    kind = training.distributed_state.distributed_type.value if plugin is None else f"ZERO{plugin.zero_stage}"
    processes = {"num_processes": training.world_size, "distributed_type": kind}
    # Prompts are written with thoughts turned off in training, in the task's score and in the evaluation.
    modes = {"bf16": training.bf16, "thinking": "off"}
    return asdict(script) | data | {"model": model, "training": chosen} | modes | processes


def prompt_batches(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], batch_size: int
) -> list[dict[str, Any]]:
    """Prompts without answers, as a model sees them before it answers; what sparsity is measured on."""
    encoded = [encode_answer(tokenizer, prompt, "Yes") for prompt in prompts]
    ids = [e.input_ids[: e.completion_mask.index(1)] for e in encoded]
    starts = range(0, len(ids), batch_size)
    return [dict(tokenizer.pad({"input_ids": ids[i : i + batch_size]}, return_tensors="pt")) for i in starts]


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


def compare(task: FinetuningTask, script: Table2Arguments, training: SFTConfig, model_args: ModelConfig) -> None:
    """Train and evaluate what the output folder has no results of, then write and print table and figure.

    Raises:
        ValueError: before training, for whatever cannot work.
    """
    arms = trained_arms(script, training, model_args)
    pairs = _mixture_pairs(script)
    rows = len(task.training_pairs(script.seeds[0]))
    _check_steps(script, training, rows)
    # The embedded judge by its folder: building it is the work of all processes, judging that of one.
    judges = {f"shieldgemma={embedded_judge()}" if given == EMBEDDED else given: given for given in script.judges}
    if script.judges:
        check_judging(list(judges), batch_size=script.judge_batch_size)
    if script.safety_tasks or task.eval_tasks:
        task_manager([*task.eval_tasks, *script.safety_tasks])
    state = PartialState()
    run = Run(
        training.output_dir, task.recipe, identity(script, training, model_args, task.sizes()), state.is_main_process
    )
    demonstration = model_args.model_name_or_path is None
    if demonstration:
        model_args.model_name_or_path = str(embedded_model())
    tokenizer = load_tokenizer(
        training, model_args, [adapter_of(a, model_args, script.activation) for a in arms.values()]
    )
    task.check_lengths(tokenizer, training.max_length)
    pairs = {option: fitting(some, tokenizer, training.max_length, option) for option, some in pairs.items()}
    for option, share in (("--poison_share", script.poison_share), ("--safety_share", script.safety_share)):
        if option in pairs:
            check_enough(option, share, rows, pairs[option])
    _check_checkpoints(run, script, training, model_args, arms)

    _train(task, run, script, training, model_args, arms, pairs, tokenizer)
    _score_checkpoints(task, run, script, training, model_args, arms, tokenizer)
    if not state.is_main_process:
        return  # answers and verdicts are the work of one process
    if script.safety_tasks or task.eval_tasks:
        with not_sharded(training):
            _evaluate(task, run, script, training, model_args, arms, judges)
            _alignment_sparsity(run, script, training, model_args, arms, tokenizer)
    print(write_report(run, task.paper, task.performance, list(arms), script.judges, demonstration))


def _mixture_pairs(script: Table2Arguments) -> dict[str, list[Pair]]:
    """The pairs to mix in, by the option of their share; from the files, else generated."""
    pairs = {}
    if script.poison_share:
        file = script.poison_file
        pairs["--poison_share"] = load_pairs(file, "--poison_file") if file else embedded_poison()
    if any("+safety" in method for method in script.methods):
        file = script.safety_file
        pairs["--safety_share"] = load_pairs(file, "--safety_file") if file else embedded_safety()
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


def _check_checkpoints(
    run: Run, script: Table2Arguments, training: SFTConfig, model_args: ModelConfig, arms: dict[str, Arm]
) -> None:
    """Raise ValueError if a checkpoint or adapter that is in the folder already is of another base."""
    config = None
    for method in arms:
        for seed in script.seeds:
            folder = arm_folder(run, method, seed)
            newest = checkpoint(folder, training.resume_from_checkpoint)
            known = [Path(newest)] if newest else []
            known += [folder / "adapter"] if (folder / "adapter" / "adapter_config.json").exists() else []
            for one in known:
                config = config or AutoConfig.from_pretrained(
                    model_args.model_name_or_path, revision=model_args.model_revision
                )
                with not_sharded(training):
                    check_adapter(Adapter(f"{method}-seed{seed}={one}"), str(model_args.model_name_or_path), config)


def _train(
    task: FinetuningTask,
    run: Run,
    script: Table2Arguments,
    training: SFTConfig,
    model_args: ModelConfig,
    arms: dict[str, Arm],
    pairs: dict[str, list[Pair]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Score the base, then train, save and score every arm and seed that has no row yet."""
    device, batch_size, n = device_name(training.device), training.per_device_eval_batch_size, len(task.prompts)
    batches = prompt_batches(tokenizer, task.prompts, batch_size)
    if "base" in script.methods and not run.find(task.metric, method="base"):
        start = time.monotonic()
        score = task.score(load_base(training, model_args), tokenizer, batch_size)
        run.add(task.metric, score, n=n, seed=None, seconds=time.monotonic() - start, device=device, method="base")
    for seed in script.seeds:
        of_seed: list[Pair] | None = None
        for method, arm in arms.items():
            if run.find(task.metric, method=method, seed=seed, step=None):
                continue
            start = time.monotonic()
            if of_seed is None:
                of_seed = fitting(task.training_pairs(seed), tokenizer, training.max_length, "--train_samples")
            mixtures = [
                (pairs.get("--poison_share", []), script.poison_share),
                (pairs.get("--safety_share", []), arm.safety_share),
            ]
            rows = Dataset.from_list([training_row(tokenizer, *pair) for pair in mixed(of_seed, mixtures, seed)])
            options = copy.deepcopy(training)
            options.weight_decay = arm.weight_decay
            folder = arm_folder(run, method, seed)
            adapter = adapter_of(arm, model_args, script.activation)
            trainer = finetuning(folder, seed, rows, adapter, tokenizer, options, model_args)
            if arm.method == "monolora":
                trainer.add_callback(SparsityCallback(trainer, batches[:1]))
            trainer.train(resume_from_checkpoint=checkpoint(folder, training.resume_from_checkpoint))
            trainer.save_model(str(folder / "adapter"))
            score = task.score(trainer.model, tokenizer, batch_size)
            common = {"n": n, "seed": seed, "device": device, "method": method}
            if arm.method == "monolora":
                measured = activation_sparsity(trainer.model, batches)
                run.add("task_sparsity", measured.overall, seconds=0, **common)
                run.add("dead_units", measured.dead, seconds=0, **common)
            # Last, because this row says that the arm is done.
            run.add(task.metric, score, seconds=time.monotonic() - start, **common)


def _checkpoints(run: Run, script: Table2Arguments, arms: dict[str, Arm]) -> Iterator[Trained]:
    """The checkpoints to evaluate, without the last of each arm, which is its adapter.

    Raises:
        ValueError: one that should be there is not.
    """
    if script.eval_every is None:
        return
    for seed in script.seeds:
        for method in arms:
            folder = arm_folder(run, method, seed)
            steps = [int(c.name.rpartition("-")[2]) for c in folder.glob("checkpoint-*") if is_whole(c)]
            for step in range(script.eval_every, max(steps, default=2 * script.eval_every), script.eval_every):
                if step not in steps:
                    raise ValueError(
                        f"--eval_every {script.eval_every}: {folder} has no checkpoint of step {step}, only of "
                        f"{sorted(steps)}. Choose another --output_dir to train it anew."
                    )
                yield Trained(method, seed, step, folder / f"checkpoint-{step}")


def _score_checkpoints(
    task: FinetuningTask,
    run: Run,
    script: Table2Arguments,
    training: SFTConfig,
    model_args: ModelConfig,
    arms: dict[str, Arm],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The task's score of every checkpoint, all on one loaded base."""
    missing = [t for t in _checkpoints(run, script, arms) if not run.find(task.metric, seed=t.seed, **t.arm)]
    if not missing:
        return
    base = load_base(training, model_args)
    for trained in missing:
        start = time.monotonic()
        with attached(base, trained.adapter) as model:
            score = task.score(model, tokenizer, training.per_device_eval_batch_size)
        run.add(
            task.metric, score, n=len(task.prompts), seed=trained.seed, seconds=time.monotonic() - start,
            device=device_name(training.device), **trained.arm,
        )  # fmt: skip


def _all_trained(run: Run, script: Table2Arguments, arms: dict[str, Arm]) -> list[Trained]:
    """Every adapter and checkpoint to evaluate."""
    final = [Trained(m, seed, None, arm_folder(run, m, seed) / "adapter") for seed in script.seeds for m in arms]
    return [*final, *_checkpoints(run, script, arms)]


def _evaluate(
    task: FinetuningTask,
    run: Run,
    script: Table2Arguments,
    training: SFTConfig,
    model_args: ModelConfig,
    arms: dict[str, Arm],
    judges: dict[str, str],
) -> None:
    """Answers of all adapters on one loaded base, verdicts, and their rows.

    Args:
        judges: as `evals.judge` takes them, and the names that their rows get.
    """
    trained = {t.adapter.name: t for t in _all_trained(run, script, arms)}
    data = dict(task.task_data)
    if script.refusal_prompts is not None:
        data["refusal_prompts"] = dict.fromkeys(("harmful", "lookalike"), script.refusal_prompts)
    settings = GenerateSettings(
        model=str(model_args.model_name_or_path),
        tasks=[*task.eval_tasks, *script.safety_tasks],
        output_dir=str(run.folder / EVALUATION),
        adapters=[t.adapter for t in trained.values()],
        base="base" in script.methods,
        max_new_tokens=script.max_new_tokens,
        batch_size=training.per_device_eval_batch_size,
        dtype=model_args.dtype,
        load_in_4bit=model_args.load_in_4bit,
        task_data=data,
    )
    answered = generate(settings)
    if script.judges:
        answered = judge(answered.folder, list(judges), tasks=script.safety_tasks, batch_size=script.judge_batch_size)
    new = []
    for row in answered.rows:
        config = row["config"]
        if row["metric"] == "seconds" or any(config.get(k) for k in ("category", "versus", "versus_judge")):
            continue  # those stand in the folder's own table
        one = trained[config["adapter"]] if config["adapter"] else None
        where = {"task": config["task"], "judge": judges.get(config.get("judge"))} | (
            one.arm if one else {"method": "base"}
        )
        seed = one.seed if one else None
        if not run.find(row["metric"], seed=seed, **({"step": None} | where)):
            where |= {name: config[name] for name in ("low", "high") if name in config}
            new.append(
                run.row(
                    row["metric"], row["value"], n=row["n"], seed=seed, seconds=row["seconds"], device=row["device"],
                    **where,
                )
            )  # fmt: skip
    if new:
        run.replace([*run.rows, *new])


def _alignment_sparsity(
    run: Run,
    script: Table2Arguments,
    training: SFTConfig,
    model_args: ModelConfig,
    arms: dict[str, Arm],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Share of zeros in sigma(A x) on the safety prompts, for the MonoLoRA arms."""
    missing = [
        t
        for t in _all_trained(run, script, arms)
        if arms[t.method].method == "monolora"
        and t.step is None
        and not run.find("alignment_sparsity", seed=t.seed, **t.arm)
    ]
    if not missing or not script.safety_tasks:
        return
    rows = read_completions(run.folder / EVALUATION / COMPLETIONS).rows
    prompts = list({(r.task, r.prompt_id): r.prompt for r in rows if r.task in script.safety_tasks}.values())
    batches = prompt_batches(tokenizer, prompts, training.per_device_eval_batch_size)
    base = load_base(training, model_args)
    for trained in missing:
        start = time.monotonic()
        with attached(base, trained.adapter) as model:
            measured = activation_sparsity(model, batches)
        run.add(
            "alignment_sparsity", measured.overall, n=len(prompts), seed=trained.seed,
            seconds=time.monotonic() - start, device=device_name(training.device), **trained.arm,
        )  # fmt: skip
