"""`MonoLoraConfig`: the options of a MonoLoRA adapter and their validation."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key

from .layer import ACTIVATIONS
from .names import peft_type

FORMAT_VERSION = 2  # of a saved adapter; raise it when an older mono_peft could not read what this one writes
_FIRST_FORMAT = 1  # without a bias and with an A that trains, which the first version reads

_ALIASES = {
    "lora_alpha": "monolora_alpha",
    "lora_dropout": "monolora_dropout",
    "init_lora_weights": "init_weights",
}
# LoRA options that change nothing here.
_IRRELEVANT = ("fan_in_fan_out", "megatron_core", "qalora_group_size")
_FROM_WEIGHT = "it derives A and B from W or its gradients for a linear update B A x, which sigma breaks"
_LORA_ONLY = {
    "use_dora": "DoRA renormalises the matrix W + s B A, and MonoLoRA's update is not a matrix",
    "loftq_config": _FROM_WEIGHT,
    "eva_config": _FROM_WEIGHT,
    "corda_config": _FROM_WEIGHT,
    "lora_ga_config": _FROM_WEIGHT,
    "kasa_config": _FROM_WEIGHT,
    "use_qalora": "QA-LoRA pools x so that the update can be merged into quantised weights; MonoLoRA cannot merge",
    "use_bdlora": "block-diagonal LoRA shards a linear update",
    "velora_config": "VeLoRA compresses the input for a linear backward pass",
    "monteclora_config": "MonteCLoRA samples around a linear update",
    "arrow_config": "Arrow routes by the singular vectors of B A, which describe a linear update only",
    "lora_bias": "it serves to merge a bias into the base, and MonoLoRA cannot merge",
    "megatron_config": "Megatron's parallel layers split x or the output, and sigma needs the whole of A x",
    "runtime_config": "ephemeral GPU offload serves DoRA and merging",
}

_ACTIVATIONS = (*ACTIVATIONS, "topk")

ConfigClass = TypeVar("ConfigClass", bound=type)


def _accepts_lora_signature(cls: ConfigClass) -> ConfigClass:
    """Let an existing `LoraConfig(...)` call work: translate its spellings, refuse what sigma makes impossible."""
    init = cls.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for alias, name in _ALIASES.items():
            if alias in kwargs:
                if name in kwargs:
                    raise ValueError(f"`{alias}` and `{name}` are two names of one option; pass one of them.")
                kwargs[name] = kwargs.pop(alias)
        for option in _IRRELEVANT:
            kwargs.pop(option, None)
        for option, reason in _LORA_ONLY.items():
            value = kwargs.pop(option, None)
            if value and any(getattr(value, "__dict__", {"value": value}).values()):
                raise ValueError(
                    f"MonoLoraConfig does not support `{option}={value!r}`: {reason}. Remove it, or use LoraConfig."
                )
        init(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


@_accepts_lora_signature
@dataclass
class MonoLoraConfig(PeftConfig):
    """Options of a MonoLoRA adapter, h = W x + s B sigma(A dropout(x)) (eq. 5 of the paper).

    A drop-in for `peft.LoraConfig`: the constructor also takes LoRA's spellings `lora_alpha`, `lora_dropout` and
    `init_lora_weights`, and LoRA options that cannot work with a non-linear update only at their "off" value.

    Args:
        r: rank, the number of latents per adapted layer; positive.
        target_modules: names (or suffixes) of the modules to adapt, a regular expression, or "all-linear"; None
            takes PEFT's LoRA default of the model type (q_proj and v_proj on Llama).
        target_parameters: names (or suffixes) of the stacked weights of fused experts to adapt, such as
            "mlp.experts.gate_up_proj" and "mlp.experts.down_proj"; every expert gets an A and a B of rank r. As with
            LoRA, `target_modules=None` adapts the model type's default modules too, and [] none.
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        monolora_alpha: numerator of the scale s = monolora_alpha / r; positive.
        monolora_dropout: probability in [0, 1) of zeroing an element of x before A, in training.
        activation: sigma: "relu", "relu2", "relu6", "sigmoid", "softplus", "identity" (linear, equals LoRA), or
            "topk", which keeps the `k` largest positive latents of a token, of equal ones those of the lowest index,
            and makes all others zero.
        bias: "none", "all", or "monolora_only" (LoRA's "lora_only" is understood): which biases of the base train and
            are saved.
        use_rslora: s = monolora_alpha / sqrt(r), arXiv:2312.03732.
        modules_to_save: further modules that train in full and are saved, such as a classification head.
        init_weights: True: A Kaiming uniform, B zero, so that training starts at the base model; "gaussian": A normal
            with standard deviation 1 / r, B zero; False: both Kaiming uniform, for tests.
        layers_to_transform: indices of the layers to adapt; only with a list of `target_modules`.
        layers_pattern: name of the module list that `layers_to_transform` counts in.
        rank_pattern: regular expression of module names -> r, where it differs; the first that matches counts.
        alpha_pattern: regular expression of module names -> monolora_alpha, where it differs; the first that matches
            counts.
        trainable_token_indices: token ids whose embeddings train, as in `LoraConfig`.
        layer_replication: ranges (first, last + 1) of the base's layers, which are put one after another in the place
            of its layers, as in `LoraConfig`; they share the base's weights, and each has an adapter of its own.
        alora_invocation_tokens: token ids that make an activated adapter of it (arXiv:2504.12397), which acts from
            their last occurrence in a row on. Before them the model is the base, whose key-value cache can be used.
        ensure_weight_tying: the trained copy of an embedding in `modules_to_save` is that of the head tied to it too,
            and tied `trainable_token_indices` must be the same; as in `LoraConfig`, but not for adapted embeddings.
        k: of `activation="topk"`, how many latents of a token stay; 1 to the r of every module.
        encoder_bias: sigma acts on A x + b in place of A x: the half-space where a unit fires need not end at the
            origin. b, r numbers, starts at zero (at random with `init_weights=False` and with `frozen_encoder`),
            trains and is saved with A. Not for embeddings.
        frozen_encoder: A and b stay as they were drawn, and B alone trains: the control for whether learned units are
            needed. They are saved and loaded all the same.
        format_version: of the saved adapter; set by the package.

    Example:
        >>> config = MonoLoraConfig(r=16, monolora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        >>> model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained("gpt2"), config)

    Raises:
        ValueError: an option is out of range, given under two names, or cannot work with a non-linear update.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | set[str] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    monolora_alpha: float = 8
    monolora_dropout: float = 0.0
    activation: str = "relu"
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layer_replication: list[list[int]] | None = None
    alora_invocation_tokens: list[int] | None = None
    ensure_weight_tying: bool = False
    k: int | None = None
    encoder_bias: bool = False
    frozen_encoder: bool = False
    format_version: int = _FIRST_FORMAT

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This adapter was saved in format {self.format_version}; this mono_peft reads up to "
                f"{FORMAT_VERSION}. Upgrade mono-peft."
            )
        if self.encoder_bias or self.frozen_encoder:
            self.format_version = FORMAT_VERSION
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        if self.ensure_weight_tying and not hasattr(BaseTuner, "_add_targets_to_tie"):
            raise ValueError("`ensure_weight_tying` needs peft >= 0.19: older versions would not tie anything.")
        self._check_ranges()
        self._check_layer_selection()
        self._check_invocation()
        for name in ("target_modules", "target_parameters", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))  # PEFT compares and saves them as sets

    def _check_ranges(self) -> None:
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        for name, rank in ranks.items():
            if not isinstance(rank, Integral) or isinstance(rank, bool) or rank <= 0:
                raise ValueError(f"`{name}` must be a positive integer, got {rank!r}; 8 is the usual choice.")
        alphas = {"monolora_alpha": self.monolora_alpha}
        alphas |= {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if not _is_number(alpha) or not 0 < alpha < math.inf:
                raise ValueError(f"`{name}` must be a positive, finite number, got {alpha!r}; r or r / 2 is usual.")
        if not _is_number(self.monolora_dropout) or not 0 <= self.monolora_dropout < 1:
            raise ValueError(f"`monolora_dropout` must lie in [0, 1), got {self.monolora_dropout!r}.")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"`activation` must be one of {', '.join(_ACTIVATIONS)}; got {self.activation!r}.")
        self._check_k(ranks)
        for name in ("encoder_bias", "frozen_encoder"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if self.bias == "lora_only":
            self.bias = "monolora_only"
        if self.bias not in ("none", "all", "monolora_only"):
            raise ValueError(f"`bias` must be 'none', 'all' or 'monolora_only', got {self.bias!r}.")
        if not (isinstance(self.init_weights, bool) or self.init_weights == "gaussian"):
            raise ValueError(
                f"`init_weights` must be True, False or 'gaussian', got {self.init_weights!r}: LoRA's other "
                "initialisations (pissa, olora, eva, corda, loftq, orthogonal, ...) cannot be used, because each "
                f"assumes a linear update B A x, which sigma breaks. Use True, or LoraConfig."
            )

    def _check_k(self, ranks: dict[str, int]) -> None:
        if self.activation != "topk":
            if self.k is not None:
                raise ValueError(
                    f"`k={self.k!r}` is an option of `activation='topk'`, got {self.activation!r}: remove `k`."
                )
            return
        if self.k is None or not _is_index(self.k) or self.k == 0:
            raise ValueError(
                f"`activation='topk'` needs a positive integer `k`, got {self.k!r}; with r = 1024, 16 is a start."
            )
        for name, rank in ranks.items():
            if self.k > rank:
                raise ValueError(
                    f"`k={self.k}` is more than `{name}={rank}`, and a token has no more latents than that: lower `k`."
                )

    def _check_layer_selection(self) -> None:
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` needs `target_modules` as a list of names, got the string {self.target_modules!r}; "
                    "write the layers into the regular expression, or pass a list."
                )
        if isinstance(self.target_parameters, str):
            raise ValueError(
                f"`target_parameters` must be a list of names, got the string {self.target_parameters!r}."
            )
        if self.target_parameters and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` chooses among `target_modules` only. Name the layer in each of "
                "`target_parameters`, as in 'layers.0.mlp.experts.down_proj'."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`: the indices of the layers to adapt.")

        if self.layer_replication is not None:
            self.layer_replication = [list(part) for part in self.layer_replication]  # as JSON has them
            if not self.layer_replication or not all(_is_range(part) for part in self.layer_replication):
                raise ValueError(
                    "`layer_replication` must be a list of ranges of layers [first, last + 1], such as [[0, 4], "
                    f"[2, 5]], got {self.layer_replication!r}."
                )

    def _check_invocation(self) -> None:
        tokens = self.alora_invocation_tokens
        if tokens is None:
            return
        if not isinstance(tokens, (list, tuple)) or not tokens or not all(_is_index(token) for token in tokens):
            raise ValueError(f"`alora_invocation_tokens` must be a list of token ids, got {tokens!r}.")
        self.alora_invocation_tokens = list(tokens)
        if self.task_type != "CAUSAL_LM":
            raise ValueError(
                f"`alora_invocation_tokens` needs `task_type='CAUSAL_LM'`, got {self.task_type!r}: other models do "
                "not look for the tokens, so that the adapter would never act."
            )
        if self.bias != "none":
            raise ValueError(
                f"`bias={self.bias!r}` with `alora_invocation_tokens`: trained biases would act before the tokens too."
            )
        if self.target_parameters:
            raise ValueError(
                "`target_parameters` with `alora_invocation_tokens`: fused experts get the tokens of all rows in one "
                "list and do not know which come after the invocation. Use `target_modules`."
            )

    def rank_and_scale(self, module_name: str) -> tuple[int, float]:
        """r and s = alpha / r (alpha / sqrt(r) with `use_rslora`) of a module, by its name in the base model."""
        rank = self.rank_pattern.get(get_pattern_key(self.rank_pattern.keys(), module_name), self.r)
        alpha = self.alpha_pattern.get(get_pattern_key(self.alpha_pattern.keys(), module_name), self.monolora_alpha)
        return rank, alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json as PEFT does, but with the patterns in their order, of which the first counts."""
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / CONFIG_NAME
        # PEFT sorts all keys, so that a module that two patterns match would be loaded with another r or scale.
        patterns = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        path.write_text(json.dumps(json.loads(path.read_text()) | patterns, indent=2))

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse a saved configuration of another method; PEFT calls this before it builds the config."""
        method = kwargs.get("peft_type", peft_type())
        if method != peft_type():
            raise ValueError(
                f"This folder holds a {method} adapter, not a {peft_type().value} one. Load it with "
                "`PeftConfig.from_pretrained` or `PeftModel.from_pretrained`, which pick the class by themselves."
            )
        return super().check_kwargs(**kwargs)


def _is_index(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _is_range(part: list[Any]) -> bool:
    return len(part) == 2 and all(_is_index(index) for index in part) and part[0] < part[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
