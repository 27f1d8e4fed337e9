"""The arms that the language recipes compare: a base model as it is, finetuned with an adapter, and controls.

A control is written behind its adapter: `lora+weight_decay`, `monolora+safety`, `lora+dropout+rank`. Another kind of
adapter is a row of `ADAPTERS`; training, tables and figures take its name from there:

    ADAPTERS["vera"] = AdapterKind(
        lambda options, settings: VeraConfig(
            task_type=options.lora_task_type, r=options.lora_r, target_modules=options.lora_target_modules
        )
    )
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft import LoraConfig, PeftConfig
from trl import ModelConfig, SFTConfig

from mono_peft import MonoLoraConfig


@dataclass
class ArmSettings:
    """The arms, their seeds, and how strong the controls are."""

    methods: list[str] = field(
        default_factory=lambda: ["base", "lora", "monolora"],
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


class AdapterKind(NamedTuple):
    """A kind of adapter.

    `config` makes it from TRL's `lora_*` options, among them the arm's own rank, alpha and dropout, and the settings.
    Where `has_latents`, sparsity is measured on its sigma(A x).
    """

    config: Callable[[ModelConfig, ArmSettings], PeftConfig]
    has_latents: bool = False


def _shared(options: ModelConfig) -> dict[str, Any]:
    """Arguments that LoRA and MonoLoRA take under the same names."""
    return {
        "task_type": options.lora_task_type,
        "r": options.lora_r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "target_modules": options.lora_target_modules,
        "modules_to_save": options.lora_modules_to_save,
        "use_rslora": options.use_rslora,
        "use_dora": options.use_dora,
    }


ADAPTERS = {
    "lora": AdapterKind(lambda options, settings: LoraConfig(**_shared(options))),
    "monolora": AdapterKind(
        lambda options, settings: MonoLoraConfig(activation=settings.activation, **_shared(options)), has_latents=True
    ),
}


class Arm(NamedTuple):
    """How an arm is trained; two arms with the same values would be the same run."""

    method: str  # a name of ADAPTERS
    r: int
    alpha: float
    dropout: float
    weight_decay: float
    safety_share: float  # of the training rows, in [0, 1]


def _smaller(arm: Arm, rank: int | None) -> Arm:
    r = max(arm.r // 2, 1) if rank is None else rank
    return arm._replace(r=r, alpha=arm.alpha * r / arm.r)


# For the question whether MonoLoRA "just trains less": what each control changes in an arm.
CONTROLS: dict[str, Callable[[Arm, ArmSettings], Arm]] = {
    "weight_decay": lambda arm, settings: arm._replace(weight_decay=settings.control_weight_decay),
    "dropout": lambda arm, settings: arm._replace(dropout=settings.control_dropout),
    "rank": lambda arm, settings: _smaller(arm, settings.control_rank),
    "safety": lambda arm, settings: arm._replace(safety_share=settings.safety_share),
}


def trained_arms(settings: ArmSettings, training: SFTConfig, options: ModelConfig) -> dict[str, Arm]:
    """The arms that have an adapter, by name.

    Raises:
        ValueError: two of them are the same.
    """
    arms: dict[str, Arm] = {}
    for name in settings.methods:
        method, *controls = name.split("+")
        if method == "base":
            continue
        arm = Arm(method, options.lora_r, options.lora_alpha, options.lora_dropout, training.weight_decay, 0.0)
        for control in controls:
            arm = CONTROLS[control](arm, settings)
        same = next((other for other in arms if arms[other] == arm), None)
        if same is not None:
            raise ValueError(
                f"--methods has {same} and {name}, which are the same arm ({arm}). Leave one out, or change "
                "--control_weight_decay, --control_dropout, --control_rank or --safety_share."
            )
        arms[name] = arm
    return arms


def adapter_config(arm: Arm, settings: ArmSettings, options: ModelConfig) -> PeftConfig:
    """The arm's adapter, with its own rank, alpha and dropout in the place of the options'.

    Raises:
        ValueError: a value is not allowed.
    """
    options = copy.copy(options)
    options.lora_r, options.lora_alpha, options.lora_dropout = arm.r, arm.alpha, arm.dropout
    targets = options.lora_target_modules
    if isinstance(targets, str) and targets.isidentifier():
        # TRL unpacks a list of one, and PEFT would take the name as a pattern of whole paths.
        options.lora_target_modules = [targets]
    # PEFT's own adapters leave these unchecked; MonoLoRA's check of them serves all arms.
    MonoLoraConfig(r=options.lora_r, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout)
    return ADAPTERS[arm.method].config(options, settings)


def check_arms(settings: ArmSettings, training: SFTConfig, options: ModelConfig) -> None:
    """Raise ValueError for arms, seeds and options that contradict each other."""
    methods, seeds = settings.methods, settings.seeds
    parts = [name.split("+") for name in methods]
    are_allowed = all(
        method in ("base", *ADAPTERS) and not set(controls) - set(CONTROLS) and not (method == "base" and controls)
        for method, *controls in parts
    )
    if not methods or not are_allowed or len(set(methods)) < len(methods):
        raise ValueError(
            f"--methods takes each of {', '.join(('base', *ADAPTERS))} at most once, all but base also with controls "
            f"({', '.join(f'lora+{control}' for control in CONTROLS)}, lora+dropout+rank), got {methods}."
        )
    if settings.control_weight_decay < 0:
        raise ValueError(f"--control_weight_decay is {settings.control_weight_decay}, allowed is 0 or more.")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds takes different integers, got {seeds}.")
    if training.seed != type(training).__dataclass_fields__["seed"].default:
        raise ValueError(f"--seed {training.seed}: the seeds of the runs are --seeds, here {seeds}.")
    if training.completion_only_loss is False:
        raise ValueError("--completion_only_loss false: the loss is on the answers only, in every arm. Leave it out.")
    if options.use_peft and "base" in methods:
        raise ValueError(
            "--use_peft contradicts the arm `base`. Leave it out: --methods says which arms have an adapter, and the "
            "--lora_* options set its rank, alpha, dropout and targets."
        )
    if options.use_dora and any(method == "monolora" for method, *_ in parts):
        raise ValueError("--use_dora cannot be honoured by MonoLoRA, so the arms would differ; use --methods lora.")
    if options.lora_target_parameters:
        raise ValueError("--lora_target_parameters cannot be honoured by MonoLoRA; use --lora_target_modules.")
