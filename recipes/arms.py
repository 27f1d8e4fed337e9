"""The arms that the language recipes compare: a base model as it is, finetuned with an adapter, and controls.

A control is written behind its adapter: `lora+weight_decay`, `monolora+safety`, `lora+dropout+rank`. How strong it
is, a setting says, or a number behind it, so that a run can have several: `lora+safety0.05 lora+safety0.3`. Another
kind of adapter is a row of `ADAPTERS`; training, tables and figures take its name from there:

    ADAPTERS["vera"] = AdapterKind(
        lambda options, settings: VeraConfig(
            task_type=options.lora_task_type, r=options.lora_r, target_modules=options.lora_target_modules
        )
    )
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
    monolora_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the arms of MonoLoRA; None: --learning_rate, as of all others."}
    )
    control_weight_decay: float = field(default=0.1, metadata={"help": "Of arms with +weight_decay."})
    control_dropout: float = field(default=0.5, metadata={"help": "Of arms with +dropout."})
    control_rank: int | None = field(
        default=None, metadata={"help": "Of arms with +rank, at the same alpha / r; None: half of --lora_r."}
    )
    control_rate: float = field(default=1e-3, metadata={"help": "Learning rate of arms with +rate."})
    topk_units: int = field(
        default=4, metadata={"help": "Latents of a token that arms with +topk keep, the largest positive ones."}
    )
    safety_share: float = field(
        default=0.1, metadata={"help": "Of the training rows of arms with +safety, in [0, 1]."}
    )
    silence_weight: float = field(default=10.0, metadata={"help": "Of the hinge of arms with +silence."})
    silence_margin: float = field(default=0.1, metadata={"help": "How far they keep A x below zero on safety texts."})
    silence_rows: int = field(
        default=4096, metadata={"help": "Tokens of the safety texts whose inputs they keep, of each module."}
    )
    silence_lower_every: int = field(
        default=5, metadata={"help": "Steps after which arms with +apart lower the units that fire on those tokens."}
    )
    kl_weight: float = field(
        default=1.0, metadata={"help": "Of the KL divergence to the base on safety answers, of arms with +kl."}
    )
    nullspace_energy: float = field(
        default=0.95,
        metadata={"help": "Of the safety inputs: arms with +nullspace do nothing on directions with this share."},
    )
    safelora_share: float = field(
        default=0.5, metadata={"help": "Of the modules of arms with +safelora: so many are projected after training."}
    )
    unaligned_model: str | None = field(
        default=None, metadata={"help": "The model before its alignment, for arms with +safelora."}
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


# Which tokens of the safety pairs are cached. Earlier versions cached others, so that theirs is another training.
CACHED_TOKENS = "distinct, as often as they are there"


class Arm(NamedTuple):
    """How an arm is trained; two arms with the same values would be the same run."""

    method: str  # a name of ADAPTERS
    r: int
    alpha: float
    dropout: float
    weight_decay: float
    learning_rate: float
    safety_share: float = 0.0  # of the training rows, in [0, 1]
    encoder_bias: bool = False  # whether MonoLoRA's sigma acts on A x + b
    frozen_encoder: bool = False  # whether MonoLoRA's A stays as it was drawn, so that B alone trains
    topk_units: int = 0  # latents of a token that MonoLoRA keeps; 0: those that the sigma of the settings leaves
    # What is done for the safety pairs beside; 0 where it is not.
    silence_weight: float = 0.0
    starts_apart: bool = False  # whether units start on the task, and stay off the safety pairs by their biases
    kl_weight: float = 0.0
    nullspace_energy: float = 0.0
    safelora_share: float = 0.0

    @property
    def needs_safety_pairs(self) -> bool:
        """Whether its training depends on the safety pairs."""
        return any((self.safety_share, self.silence_weight, self.kl_weight, self.nullspace_energy))

    @property
    def caches_tokens(self) -> bool:
        """Whether its training depends on which tokens of the safety pairs are cached."""
        return any((self.silence_weight, self.nullspace_energy))


class Control(NamedTuple):
    """What a control changes in an arm.

    Args:
        setting: of ArmSettings, how strong the control is; a number behind its name goes before it. None: it has no
            strength.
        change: the arm with the control, from the arm without and the strength.
        allowed: whether a strength is, and the words that say which are; None: what trains says it.
        methods: the adapters that can have it.
    """

    setting: str | None
    change: Callable[[Arm, Any], Arm]
    allowed: tuple[Callable[[float], bool], str] | None = None
    methods: tuple[str, ...] | None = None  # None: all


def _smaller(arm: Arm, rank: float | None) -> Arm:
    r: Any = max(arm.r // 2, 1) if rank is None else int(rank) if rank == int(rank) else rank
    return arm._replace(r=r, alpha=arm.alpha * r / arm.r)


_POSITIVE: tuple[Callable[[float], bool], str] = (lambda value: value > 0, "more than 0")
CONTROLS = {
    # For the question whether MonoLoRA "just trains less".
    "weight_decay": Control(
        "control_weight_decay",
        lambda arm, value: arm._replace(weight_decay=value),
        (lambda value: value >= 0, "0 or more"),
    ),
    "dropout": Control("control_dropout", lambda arm, value: arm._replace(dropout=value)),
    "rank": Control("control_rank", _smaller),
    # For the question which learning rate is the best of each adapter.
    "rate": Control("control_rate", lambda arm, value: arm._replace(learning_rate=value), _POSITIVE),
    "bias": Control(None, lambda arm, _: arm._replace(encoder_bias=True), methods=("monolora",)),
    # For the questions whether learnt units are needed, and whether few of them are enough.
    "frozen": Control(None, lambda arm, _: arm._replace(frozen_encoder=True), methods=("monolora",)),
    "topk": Control(
        "topk_units",
        lambda arm, value: arm._replace(topk_units=int(value)),
        (lambda value: value >= 1 and value == int(value), "a whole number of units, 1 or more"),
        ("monolora",),
    ),
    # What keeps a model as it is on safety pairs (`safety_controls`).
    "safety": Control(
        "safety_share",
        lambda arm, value: arm._replace(safety_share=value),
        (lambda value: 0 <= value <= 1, "a share of the training rows from 0 to 1"),
    ),
    "silence": Control(
        "silence_weight", lambda arm, value: arm._replace(silence_weight=value), _POSITIVE, ("monolora",)
    ),
    "apart": Control(None, lambda arm, _: arm._replace(starts_apart=True, encoder_bias=True), methods=("monolora",)),
    "kl": Control("kl_weight", lambda arm, value: arm._replace(kl_weight=value), _POSITIVE, ("lora", "monolora")),
    "nullspace": Control(
        "nullspace_energy",
        lambda arm, value: arm._replace(nullspace_energy=value),
        (lambda value: 0 < value < 1, "a share between 0 and 1"),
        ("lora", "monolora"),
    ),
    "safelora": Control(
        "safelora_share",
        lambda arm, value: arm._replace(safelora_share=value),
        (lambda value: 0 < value <= 1, "a share of the modules above 0"),
        ("lora",),  # the projection of B is one of the update B A
    ),
}


def _parts(name: str) -> tuple[str, list[tuple[str, float | None]]]:
    """An arm's adapter, and its controls with the numbers behind them."""
    method, *controls = name.split("+")
    parts = []
    for control in controls:
        match = re.fullmatch(r"(.*?)(\d+\.?\d*|)", control)
        assert match is not None  # it matches every text of one line
        parts.append((match[1], float(match[2]) if match[2] else None))
    return method, parts


def _strength(control: Control, number: float | None, settings: ArmSettings) -> Any:
    return getattr(settings, control.setting) if number is None and control.setting is not None else number


def trained_arms(settings: ArmSettings, training: SFTConfig, options: ModelConfig) -> dict[str, Arm]:
    """The arms that have an adapter, by name.

    Raises:
        ValueError: two of them are the same.
    """
    arms: dict[str, Arm] = {}
    for name in settings.methods:
        method, controls = _parts(name)
        if method == "base":
            continue
        rate = settings.monolora_learning_rate if method == "monolora" else None
        rate = training.learning_rate if rate is None else rate
        arm = Arm(method, options.lora_r, options.lora_alpha, options.lora_dropout, training.weight_decay, rate)
        for control, number in controls:
            arm = CONTROLS[control].change(arm, _strength(CONTROLS[control], number, settings))
        same = next((other for other in arms if arms[other] == arm), None)
        if same is not None:
            by_setting = ", ".join(f"--{control.setting}" for control in CONTROLS.values() if control.setting)
            raise ValueError(
                f"--methods has {same} and {name}, which are the same arm ({arm}). Leave one out, or change how "
                f"strong a control is: {by_setting}, or a number behind it, as in lora+safety0.3."
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
    config = ADAPTERS[arm.method].config(options, settings)
    own: dict[str, Any] = {name: True for name in ("encoder_bias", "frozen_encoder") if getattr(arm, name)}
    if arm.topk_units:
        own |= {"activation": "topk", "k": arm.topk_units}
    return replace(config, **own) if own else config


def check_arms(settings: ArmSettings, training: SFTConfig, options: ModelConfig) -> None:
    """Raise ValueError for arms, seeds and options that contradict each other."""
    methods, seeds = settings.methods, settings.seeds
    parts = [_parts(name) for name in methods]
    are_allowed = all(
        method in ("base", *ADAPTERS)
        and all(control in CONTROLS for control, _ in controls)
        and not (method == "base" and controls)
        for method, controls in parts
    )
    if not methods or not are_allowed or len(set(methods)) < len(methods):
        raise ValueError(
            f"--methods takes each of {', '.join(('base', *ADAPTERS))} at most once, all but base also with controls "
            f"({', '.join(f'lora+{control}' for control in CONTROLS)}, lora+dropout+rank, lora+safety0.3), got "
            f"{methods}."
        )
    for method, controls in parts:
        names = [name for name, _ in controls]
        if "apart" in names and "silence" not in names:
            raise ValueError(f"--methods has {method}+apart without silence: apart from what? Give +apart+silence.")
        if "nullspace" in names and {"bias", "apart"} & set(names):
            raise ValueError(
                f"--methods has {method} with nullspace and a bias: sigma(A x + b) may be above zero where A x = 0, "
                "so that the pairs would not be in a null space. Leave one of them out."
            )
        if {"frozen", "silence"} <= set(names):
            raise ValueError(
                f"--methods has {method} with frozen and silence: what keeps it silent is its A, and a frozen one "
                "stays as it was drawn. Leave one of them out."
            )
        for name, number in controls:
            control = CONTROLS[name]
            strength = _strength(control, number, settings)
            if control.setting is None and number is not None:
                raise ValueError(f"--methods has {name}{number:g}, and {name} has no strength: leave the number out.")
            if control.methods is not None and method not in control.methods:
                raise ValueError(f"--methods has {method}+{name}, and {name} is for {', '.join(control.methods)}.")
            if control.allowed is not None and not control.allowed[0](strength):
                given = f"--{control.setting} is {strength}" if number is None else f"--methods has {name}{number:g}"
                raise ValueError(f"{given}, allowed is {control.allowed[1]}.")
    for name in ("silence_rows", "silence_lower_every"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name} is {getattr(settings, name)}, allowed is 1 or more.")
    if settings.activation == "topk":
        raise ValueError("--activation topk does not say how many units stay: name the arm monolora+topk4, for 4.")
    rate = settings.monolora_learning_rate
    if rate is not None and rate <= 0:
        raise ValueError(f"--monolora_learning_rate is {rate}, allowed is more than 0.")
    if settings.silence_margin < 0:
        raise ValueError(f"--silence_margin is {settings.silence_margin}, allowed is 0 or more.")
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
    if options.use_dora and any(method == "monolora" for method, _ in parts):
        raise ValueError("--use_dora cannot be honoured by MonoLoRA, so the arms would differ; use --methods lora.")
    if options.lora_target_parameters:
        raise ValueError("--lora_target_parameters cannot be honoured by MonoLoRA; use --lora_target_modules.")
