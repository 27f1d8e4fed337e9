"""What a run of Table 2 is a result of: the settings that decide it, and the contents of its data and models.

Paths do not count, what they hold does: a moved file continues a run, and another file at the same path does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from arms import ArmArguments
from trl import ModelConfig, SFTConfig

from vision_bench.runs import CONFIG

# Settings that say where something is or how fast it is worked on. `contents` has what is there instead.
_PLACES = ("dataset_name", "train_file", "eval_file", "safety_file", "poison_file", "judge_batch_size", "judges")
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


class Content(NamedTuple):
    """What a run was made of: how the user named it, and its checksum."""

    source: str
    checksum: str


def identity(
    script: ArmArguments,
    training: SFTConfig,
    model_args: ModelConfig,
    sizes: Mapping[str, int],
    judges: list[str],
    contents: Mapping[str, Content],
    demonstration: bool,
) -> dict[str, Any]:
    """The settings that decide the results, for the run's folder and rows.

    Args:
        sizes: numbers of rows.
        judges: their names in the rows.
        contents: by name, of everything that the results depend on.
        demonstration: whether the base is the offline model.
    """
    defaults = SFTConfig(output_dir="", use_cpu=training.use_cpu, bf16=training.bf16).to_dict()
    chosen = {k: v for k, v in training.to_dict().items() if k in _ALWAYS or v != defaults.get(k)}
    plugin = training.deepspeed_plugin
    processes = {
        "num_processes": training.world_size,
        "distributed_type": training.distributed_state.distributed_type.value
        if plugin is None
        else f"ZERO{plugin.zero_stage}",
        "deepspeed": None if plugin is None else _deciding(plugin.deepspeed_config),
        "device": training.device.type,
        "mixed_precision": training.mixed_precision,  # that of `accelerate launch` too
    }
    return {
        **{k: v for k, v in asdict(script).items() if k not in _PLACES},
        **sizes,
        "judges": judges,
        "demonstration": demonstration,
        "thinking": "off",  # as prompts are written in training, in the task's score and in the evaluation
        "model": {k: v for k, v in asdict(model_args).items() if k not in _MODEL_PLACES},
        "training": {k: v for k, v in chosen.items() if not _IRRELEVANT.match(k)},
        **processes,
        "contents": {name: content.checksum for name, content in contents.items()},
    }


def _deciding(deepspeed_config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("gradient_clipping", "optimizer", "scheduler", "fp16", "bf16")
    return {name: deepspeed_config[name] for name in names if name in deepspeed_config}


def check_contents(folder: Path, recipe: str, contents: Mapping[str, Content]) -> None:
    """Raise ValueError if the folder's results of a recipe were made with other contents; says of which option."""
    path = folder / CONFIG
    made = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before = made["config"].get("contents", {}) if made.get("recipe") == recipe else {}
    changed = [
        f"{content.source} has other content ({before[name][:80]} there, {content.checksum[:80]} now)"
        for name, content in contents.items()
        if name in before and before[name] != content.checksum
    ]
    if changed:
        raise ValueError(
            f"{folder} holds results of other data or models: {'; '.join(changed)}. Choose another --output_dir, or "
            "restore what was there to continue that run."
        )
