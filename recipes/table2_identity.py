"""What identifies a run of Table 2's recipes: the settings and contents that decide its results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from arms import CACHED_TOKENS, Arm
from task import Content
from trl import ModelConfig, SFTConfig

if TYPE_CHECKING:
    from table2 import Table2Settings

# Settings that say where something is or how fast it is worked on. `contents` has what is there instead.
_PLACES = ("dataset_name", "train_file", "eval_file", "safety_file", "poison_file", "neutral_file",
           "judge_batch_size", "judges", "unaligned_model")  # fmt: skip
_MODEL_PLACES = ("model_name_or_path", "model_revision")
# Of TRL's: where to write, what to say, when to save, and how memory and data loading are organised.
_IRRELEVANT = re.compile(
    "^(seed|output_dir|resume_from_checkpoint|restore_callback_states_from_checkpoint|enable_jit_checkpoint|run_name"
    "|disable_tqdm|project|debug|do_(train|eval|predict)|local_rank|use_cpu|dataset_num_proc|skip_memory_metrics"
    "|per_device_eval_batch_size|batch_eval_metrics|prediction_loss_only|include_.*|torch_empty_cache_steps"
    "|(gradient|activation)_checkpointing(_kwargs)?|activation_offloading|ddp_(backend|timeout|bucket_cap_mb)"
    "|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor|multiprocessing_context)"
    "|(logging|log|report|save|eval|hub|push_to_hub|trackio)_.*|push_to_hub|(bf16|fp16)_full_eval)$"
)
# Recorded also where they are TRL's default, which another version of TRL may set otherwise.
_ALWAYS = frozenset(
    {
        "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "optim", "weight_decay",
        "per_device_train_batch_size", "gradient_accumulation_steps", "adam_beta1", "adam_beta2", "adam_epsilon",
        "max_grad_norm", "label_smoothing_factor", "max_length", "loss_type", "train_sampling_strategy",
    }
)  # fmt: skip


def identity(
    settings: Table2Settings,
    training: SFTConfig,
    options: ModelConfig,
    arms: Mapping[str, Arm],
    judges: list[str],
    contents: Mapping[str, Content],
    is_demonstration: bool,
) -> dict[str, Any]:
    """The settings that decide the results, for the run's folder and rows.

    Paths do not count, what they hold does: a moved file continues a run, and another file at the same path does not.

    Args:
        judges: their names in the rows.
        contents: by name, of everything that the results depend on.
        is_demonstration: whether the base is the offline model.
    """
    standard = SFTConfig(output_dir="", use_cpu=training.use_cpu, bf16=training.bf16).to_dict()
    chosen = {k: v for k, v in training.to_dict().items() if k in _ALWAYS or v != standard.get(k)}
    plugin = training.deepspeed_plugin
    names = ("gradient_clipping", "optimizer", "scheduler", "fp16", "bf16")
    return {
        **{k: v for k, v in asdict(settings).items() if k not in _PLACES},
        "judges": judges,
        "demonstration": is_demonstration,
        "thinking": "off",  # as prompts are written in training, in the task's score and in the evaluation
        "cached_tokens": CACHED_TOKENS if any(arm.caches_tokens for arm in arms.values()) else None,
        "model": {k: v for k, v in asdict(options).items() if k not in _MODEL_PLACES},
        "training": {k: v for k, v in chosen.items() if not _IRRELEVANT.match(k)},
        "num_processes": training.world_size,
        "distributed_type": training.distributed_state.distributed_type.value
        if plugin is None
        else f"ZERO{plugin.zero_stage}",
        "deepspeed": None
        if plugin is None
        else {name: plugin.deepspeed_config[name] for name in names if name in plugin.deepspeed_config},
        "device": training.device.type,
        "mixed_precision": training.mixed_precision,  # that of `accelerate launch` too
        "contents": {name: content.checksum for name, content in contents.items()},
    }
