"""`vision_bench.runs.parse` for a single dataclass, until every recipe takes several."""

from __future__ import annotations

from typing import Any, TypeVar

from vision_bench import runs
from vision_bench.runs import run_as_program

__all__ = ["parse", "run_as_program"]
Settings = TypeVar("Settings")


def parse(
    settings_class: type[Settings], arguments: list[str] | None, shared_with: type[Any] | None = None
) -> Settings:
    """As `vision_bench.runs.parse`."""
    (settings,) = runs.parse([settings_class], arguments, shared=[shared_with] if shared_with else [])
    return settings
