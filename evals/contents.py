"""What a model and an adapter are, whatever their folders are called: checksums of the files that decide answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from safetensors import safe_open

from evals.records import Completion
from mono_peft.serve import TOKENIZER_FILES
from vision_bench.runs import Run, file_checksum

_MODEL_PARTS = {
    "model weights": ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin"),
    "model config": ("config.json",),
    "model generation config": ("generation_config.json",),
    "model tokenizer and chat template": TOKENIZER_FILES,
}
_ADAPTER_PARTS = {
    "adapter weights": ("*.safetensors",),
    "adapter config": ("adapter_config.json",),
    "adapter tokenizer and chat template": TOKENIZER_FILES,
}


def model_checksums(name: str, commit: str | None) -> dict[str, str]:
    """Checksums of a model's parts; of a folder every byte is read, of a model on the hub the commit is known.

    Args:
        name: folder or name on the hub.
        commit: of the hub's repository, None for a folder.
    """
    return _checksums(Path(name), _MODEL_PARTS) if Path(name).is_dir() else {"model commit": str(commit)}


def adapter_checksums(folder: Path) -> dict[str, str]:
    """Checksums of an adapter's parts."""
    return _checksums(folder, _ADAPTER_PARTS)


def _checksums(folder: Path, parts: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """16 hexadecimal digits for each part, from names and SHA-256 of its files; a part without files has none."""
    checksums = {}
    with ThreadPoolExecutor() as pool:  # a large model has many files
        for part, patterns in parts.items():
            files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
            if files:
                names = [str(path.relative_to(folder)) for path in files]
                checksums[part] = checksum(list(zip(names, pool.map(_file_checksum, files), strict=True)))
    return checksums


def _file_checksum(path: Path) -> str:
    status = path.stat()
    return _unchanged_file_checksum(path.resolve(), status.st_ino, status.st_size, status.st_ctime_ns)


@cache
def _unchanged_file_checksum(path: Path, inode: int, size: int, changed: int) -> str:
    """Within a process a file is read for its checksum once, unless the system says that it was written since.

    No program can set back the time `changed`, in ns, as it can that of the modification.
    """
    return file_checksum(path)


def _parts(checksums: Mapping[str, str] | None, kind: str) -> dict[str, str]:
    """The checksums of the parts of a model, an adapter or a task."""
    return {part: value for part, value in (checksums or {}).items() if part.startswith(kind)}


def task_checksums(tasks: Iterable[Task | Group], limit: int | None) -> dict[str, str]:
    """The checksum of each task by name, and of each group from those of its tasks.

    Args:
        limit: only the first so many documents of a task are asked, and matter.
    """
    checksums: dict[str, str] = {}
    for task in tasks:
        if isinstance(task, Group):
            members = task_checksums(task.get_all_tasks(), limit)
            checksums |= members | {task.name: checksum(members)}
        else:
            checksums[str(task.task_name)] = _task_checksum(task, limit)
    return checksums


def _task_checksum(task: Task, limit: int | None) -> str:
    """Checksum of a task's settings and of the documents that are asked, with those that examples are taken from."""
    config = task.dump_config()
    for name in ("metadata", "custom_dataset", "dataset_kwargs"):  # where the data lie, which themselves are counted
        config.pop(name, None)
    contents: list[Any] = [config, list(islice(task.eval_docs, limit))]
    if config.get("num_fewshot"):
        contents.append(list(task.fewshot_docs() or []))
    return checksum(contents)


def _sources(
    run: Run, completions: Iterable[Completion]
) -> Iterator[tuple[str, str | None, str | None, dict[str, str] | None]]:
    """Model, adapter, task and checksums of everything that a folder holds but verdicts, which know texts instead."""
    for config in (row["config"] for row in run.rows):
        if "judge" not in config:
            yield config["model"], config["adapter"], config["task"], config.get("checksums")
    for row in completions:
        yield row.model, row.adapter, row.task, row.generation.get("checksums")


def name_of_model(run: Run, completions: Iterable[Completion], model: str, checksums: Mapping[str, str]) -> str:
    """The name under which a folder has a model already, by which it is known there also where it has moved since.

    Args:
        model: its name now, which it gets if the folder does not have it.
        checksums: of the model, also with those of an adapter.
    """
    parts = _parts(checksums, "model")
    names = {name for name, _, _, before in _sources(run, completions) if _parts(before, "model") == parts}
    return model if model in names else min(names, default=model)


def check_contents(
    run: Run,
    model: str,
    completions: Iterable[Completion],
    arms: Mapping[str | None, dict[str, str]],
    tasks: Mapping[str, str],
) -> None:
    """Check that what a folder holds was made by the contents that have these names now.

    Args:
        model: name of the base model.
        completions: the folder's answers.
        arms: checksums by the adapter's name, None for the base model.
        tasks: checksums by the task's name.

    Raises:
        ValueError: a row or an answer was made by others, or does not say by which; names what changed.
    """
    base = _parts(next(iter(arms.values())), "model")
    names = {checksum(_parts(checksums, "adapter")): arm for arm, checksums in arms.items() if arm is not None}
    for name, adapter, task, before in _sources(run, completions):
        now = arms.get(adapter, base) if name == model else {}
        same = names.get(checksum(_parts(before, "adapter")), adapter)
        # Without a task it is an arm that diverged, and weights that are all NaN are the same in every such adapter.
        if name == model and None not in (adapter, task) and same != adapter:
            raise ValueError(
                f"{run.folder} has the adapter {same!r} under the name {adapter!r} already, byte for byte: the table "
                f"would count it twice. Write {adapter}=FOLDER."
            )
        if task is not None and task in tasks:
            now = now | {"task": tasks[task]}
        kinds = {part.partition(" ")[0] for part in now}
        if before is None and now:
            raise ValueError(
                f"{run.folder} holds answers or results of {name!r} that do not say which weights and data made "
                "them (an earlier version wrote them): choose another --output_dir."
            )
        then = {part: value for part, value in (before or {}).items() if part.partition(" ")[0] in kinds}
        changed = [part for part in sorted(then.keys() | now.keys()) if then.get(part) != now.get(part)]
        if changed:
            parts = [f"data or settings of the task {task!r}" if part == "task" else part for part in changed]
            arm = f"{name!r}" if adapter is None else f"the adapter {adapter!r} of {name!r}"
            raise ValueError(
                f"{run.folder} holds answers or results of {arm} that other contents under the same names made: "
                f"{', '.join(parts)} changed since. Choose another --output_dir, or another NAME=FOLDER where only an "
                "adapter changed; or restore what changed, to continue."
            )


def checksum(content: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a value as JSON; functions in it stand for their names."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_name).encode()).hexdigest()[:16]


def _name(value: Any) -> str:
    if isinstance(value, (set, frozenset)):
        value = sorted(map(str, value))
    return str(getattr(value, "__qualname__", None) or re.sub(r" at 0x[0-9a-f]+", "", str(value)))


def non_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or an infinity, None if there is none.

    Integers, such as weights of 4 bits, and tensors that are not in memory pass; their logits show it.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta:
            wide = tensor if tensor.element_size() > 1 else tensor.to(torch.bfloat16)  # no isfinite for 8 bits
            if not bool(wide.isfinite().all()):
                return name
    return None


def non_finite_of_file(path: str | Path) -> str | None:
    """`non_finite` of the tensors of a safetensors file, one of which is in memory at a time."""
    with safe_open(path, framework="pt") as file:
        return non_finite((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - no mapping
