"""Checksums of what a result is made of, which tell models and data apart where paths do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from result_rows import file_checksum

_SETTINGS = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")  # of configuration, tokenizer and chat template


def rows_checksum(rows: Iterable[Any]) -> str:
    """SHA-256 of rows that JSON can hold, in their order; what it cannot hold counts by its text."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def model_contents(source: str, config: PretrainedConfig) -> dict[str, str]:
    """Checksums of a model's weights and of its other files, or, of a model on the hub, its name and commit.

    Args:
        source: folder or name on the hub.
        config: as loaded from there; of a model on the hub it knows the commit.

    Returns:
        `weights` and `tokenizer_and_config`, SHA-256 over names and bytes; or `commit`, NAME@COMMIT.
    """
    folder = Path(source)
    if not folder.is_dir():
        return {"commit": f"{source}@{getattr(config, '_commit_hash', None)}"}
    weights = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    settings = [path for path in folder.iterdir() if path.suffix in _SETTINGS]
    settings += folder.glob("additional_chat_templates/*")
    return {"weights": _files_checksum(folder, weights), "tokenizer_and_config": _files_checksum(folder, settings)}


def adapter_checksum(folder: Path) -> str:
    """SHA-256 over an adapter's weights and configuration."""
    return _files_checksum(folder, [*folder.glob("adapter_model.*"), *folder.glob("adapter_config.json")])


def _files_checksum(folder: Path, paths: Iterable[Path]) -> str:
    return rows_checksum([path.relative_to(folder).as_posix(), _checksum(path)] for path in sorted(paths))


def _checksum(path: Path) -> str:
    status = path.stat()
    return _cached_checksum(path.resolve(), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@cache
def _cached_checksum(path: Path, *version: int) -> str:
    """A process that loads the same weights several times reads them for their checksum once."""
    return file_checksum(path)
