"""The arms that the language recipes compare: a base model as it is, finetuned with LoRA, with MonoLoRA, and controls.

A control is written behind its method: `lora+weight_decay`, `monolora+safety`, `lora+dropout+rank`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import unset_hf_deepspeed_config
from trl import ModelConfig, SFTConfig, SFTTrainer, get_quantization_config

from evals.models import load_tokenizer_and_config
from evals.thoughts import thoughts_of
from mono_peft import MonoLoraConfig

METHODS = ("base", "lora", "monolora")


class Arm(NamedTuple):
    """How an arm is trained; two arms with the same values would be the same run."""

    method: str  # lora or monolora
    r: int
    alpha: float
    dropout: float
    weight_decay: float
    safety_share: float  # of the training rows, in [0, 1]


@dataclass
class ArmArguments:
    """The arms, their seeds, and how strong the controls are."""

    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": "Arms: base, lora, monolora, the latter two also with controls, as lora+weight_decay."},
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One run of each arm per seed."})
    activation: str = field(default="relu", metadata={"help": "MonoLoRA's sigma."})
    control_weight_decay: float = field(default=0.1, metadata={"help": "Of arms with +weight_decay."})
    control_dropout: float = field(default=0.5, metadata={"help": "Of arms with +dropout."})
    control_rank: int | None = field(
        default=None, metadata={"help": "Of arms with +rank, at the same alpha / r; None: half of --lora_r."}
    )
    safety_share: float = field(
        default=0.1, metadata={"help": "Of the training rows of arms with +safety, in [0, 1]."}
    )


def _smaller(arm: Arm, rank: int | None) -> Arm:
    r = max(arm.r // 2, 1) if rank is None else rank
    return arm._replace(r=r, alpha=arm.alpha * r / arm.r)


# For the question whether MonoLoRA "just trains less": what each control changes in an arm.
CONTROLS: dict[str, Callable[[Arm, ArmArguments], Arm]] = {
    "weight_decay": lambda arm, script: arm._replace(weight_decay=script.control_weight_decay),
    "dropout": lambda arm, script: arm._replace(dropout=script.control_dropout),
    "rank": lambda arm, script: _smaller(arm, script.control_rank),
    "safety": lambda arm, script: arm._replace(safety_share=script.safety_share),
}


def trained_arms(script: ArmArguments, training: SFTConfig, model_args: ModelConfig) -> dict[str, Arm]:
    """The arms that have an adapter, by name.

    Raises:
        ValueError: two of them are the same.
    """
    arms: dict[str, Arm] = {}
    for name in script.methods:
        method, *controls = name.split("+")
        if method == "base":
            continue
        values = (model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout, training.weight_decay, 0.0)
        arm = Arm(method, *values)
        for control in controls:
            arm = CONTROLS[control](arm, script)
        same = next((other for other, known in arms.items() if known == arm), None)
        if same is not None:
            raise ValueError(
                f"--methods has {same} and {name}, which are the same arm ({arm}). Leave one out, or change "
                "--control_weight_decay, --control_dropout, --control_rank or --safety_share."
            )
        arms[name] = arm
    return arms


def check_arms(script: ArmArguments, training: SFTConfig, model_args: ModelConfig) -> None:
    """Raise ValueError for arms, seeds and options that contradict each other."""
    methods, seeds = script.methods, script.seeds
    parts = [name.split("+") for name in methods]
    known = all(
        method in METHODS and not set(controls) - set(CONTROLS) and not (method == "base" and controls)
        for method, *controls in parts
    )
    if not methods or not known or len(set(methods)) < len(methods):
        raise ValueError(
            f"--methods takes each of {', '.join(METHODS)} at most once, lora and monolora also with controls "
            f"({', '.join(f'lora+{control}' for control in CONTROLS)}, lora+dropout+rank), got {methods}."
        )
    if script.control_weight_decay < 0:
        raise ValueError(f"--control_weight_decay is {script.control_weight_decay}, allowed is 0 or more.")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds takes different integers, got {seeds}.")
    if training.seed != type(training).__dataclass_fields__["seed"].default:
        raise ValueError(f"--seed {training.seed}: the seeds of the runs are --seeds, here {seeds}.")
    if training.completion_only_loss is False:
        raise ValueError("--completion_only_loss false: the loss is on the answers only, in every arm. Leave it out.")
    if model_args.use_peft and "base" in methods:
        raise ValueError(
            "--use_peft contradicts the arm `base`. Leave it out: --methods says which arms have an adapter, and the "
            "--lora_* options set its rank, alpha, dropout and targets."
        )
    if model_args.use_dora and any(method == "monolora" for method, *_ in parts):
        raise ValueError("--use_dora cannot be honoured by MonoLoRA, so the arms would differ; use --methods lora.")
    if model_args.lora_target_parameters:
        raise ValueError("--lora_target_parameters cannot be honoured by MonoLoRA; use --lora_target_modules.")
    wish = training.resume_from_checkpoint
    if _is_path(wish) and (len(seeds) > 1 or len(set(methods) - {"base"}) != 1):
        raise ValueError(
            f"--resume_from_checkpoint {wish} names one checkpoint, but there are several arms or seeds. Leave it "
            "out: each continues from its newest checkpoint in --output_dir. False starts them anew."
        )
    if _is_path(wish) and not is_whole(Path(str(wish))):
        raise ValueError(f"--resume_from_checkpoint {wish} is not a whole checkpoint of a trainer.")


def adapter_of(arm: Arm, model_args: ModelConfig, activation: str) -> PeftConfig:
    """The arm's adapter, with its own rank, alpha and dropout in the place of the options'."""
    options = copy.copy(model_args)
    options.lora_r, options.lora_alpha, options.lora_dropout = arm.r, arm.alpha, arm.dropout
    config = adapter_config(arm.method, options, activation)
    assert config is not None
    return config


def adapter_config(method: str, model_args: ModelConfig, activation: str) -> PeftConfig | None:
    """The arm's adapter from TRL's `lora_*` options, the same for LoRA and MonoLoRA; None for the base."""
    if method == "base":
        return None
    targets = model_args.lora_target_modules
    if isinstance(targets, str) and targets.isidentifier():
        targets = [targets]  # TRL unpacks a list of one, and PEFT would take the name as a pattern of whole paths
    # LoRA leaves these unchecked; MonoLoRA's own check of them serves both arms.
    MonoLoraConfig(r=model_args.lora_r, lora_alpha=model_args.lora_alpha, lora_dropout=model_args.lora_dropout)
    options: dict[str, Any] = {
        "task_type": model_args.lora_task_type,
        "r": model_args.lora_r,
        "lora_alpha": model_args.lora_alpha,
        "lora_dropout": model_args.lora_dropout,
        "target_modules": targets,
        "modules_to_save": model_args.lora_modules_to_save,
        "use_rslora": model_args.use_rslora,
        "use_dora": model_args.use_dora,
    }
    return LoraConfig(**options) if method == "lora" else MonoLoraConfig(activation=activation, **options)


def load_tokenizer(
    training: SFTConfig, model_args: ModelConfig, adapters: list[PeftConfig]
) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """The tokenizer and the model's configuration, after a check that the model takes the adapters.

    No weights are loaded for it.

    Raises:
        ValueError: the model is neither a local folder nor to be had from the hub, its chat template cannot do without
            thoughts, or an adapter's targets match none of its modules.
        TypeError: a target cannot be adapted.
    """
    tokenizer, config = load_tokenizer_and_config(str(model_args.model_name_or_path), model_args.model_revision)
    thoughts_of(tokenizer, "off", None, f"the model {model_args.model_name_or_path!r}")
    # MonoLoRA first: its error lists what the model has.
    for adapter in sorted(adapters, key=lambda a: not isinstance(a, MonoLoraConfig)):
        with torch.device("meta"), not_sharded(training):
            get_peft_model(AutoModelForCausalLM.from_config(config), copy.deepcopy(adapter))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as SFTTrainer does
    return tokenizer, config


def load_base(training: SFTConfig, model_args: ModelConfig) -> PreTrainedModel:
    """The base model on the device of `training`, whole in every process."""
    quantization = get_quantization_config(model_args)
    with not_sharded(training):
        model = AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path,
            **_model_options(model_args),
            quantization_config=quantization,
            device_map={"": training.device} if quantization is not None else None,
        )
    return model if quantization is not None else model.to(training.device)


def finetuning(
    folder: Path,
    seed: int,
    rows: Dataset,
    adapter: PeftConfig,
    tokenizer: PreTrainedTokenizerBase,
    training: SFTConfig,
    model_args: ModelConfig,
) -> SFTTrainer:
    """A trainer for one arm and seed, in its own folder; call `train(resume_from_checkpoint=checkpoint(...))`.

    Args:
        rows: TRL's prompt/completion rows; the loss is on the completions.
    """
    if training.deepspeed_plugin is not None:
        AcceleratorState._reset_state()  # else accelerate refuses a second trainer; Trainer's own sweeps do the same
    arguments = copy.deepcopy(training)
    arguments.output_dir = str(folder)
    arguments.seed = seed
    arguments.model_init_kwargs = _model_options(model_args)
    arguments.logging_nan_inf_filter = False  # else a loss that is not finite is logged as the one before it
    return SFTTrainer(
        model=model_args.model_name_or_path,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter,
        quantization_config=get_quantization_config(model_args),
    )


def checkpoint(folder: Path, wish: str | bool | None) -> str | None:
    """Where an arm continues: its newest whole checkpoint, none if `wish` is False, else the one that it names."""
    if _is_path(wish):
        return str(wish)
    if str(wish).lower() == "false":
        return None
    whole = [c for c in folder.glob("checkpoint-*") if is_whole(c)]
    return str(max(whole, key=lambda c: int(c.name.rpartition("-")[2]))) if whole else None


@contextmanager
def not_sharded(training: SFTConfig) -> Iterator[None]:
    """Under ZeRO-3 transformers shards every model that it builds, which only an engine can use; not so inside."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if training.deepspeed_plugin is not None:
            training.deepspeed_plugin.set_deepspeed_weakref()


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the trainer's state comes last, and a kill can cut it too."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _is_path(wish: str | bool | None) -> bool:
    # On the command line "True" and "False" arrive as text.
    return wish is not None and str(wish).lower() not in ("true", "false")


def _model_options(model_args: ModelConfig) -> dict[str, Any]:
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
