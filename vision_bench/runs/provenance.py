"""With what a row was made: versions of packages, the commit of the code, the device."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = (
    "mono-peft", "torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "bitsandbytes", "lm_eval", "timm",
    "numpy", "scipy",
)  # fmt: skip


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results, those installed."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


@cache
def commit() -> str | None:
    """The commit of the repository that this file is part of, with "-dirty" if files differ from it.

    None outside a checkout, and for an installed copy, whatever repository the environment lies in.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if status.stdout.strip() else "")


def device_name(device: torch.device | str | None = None) -> str:
    """'cpu (2 threads)', or the name of the GPU; by default of what torch would use."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type == "cuda":
        return torch.cuda.get_device_name(kind)
    return f"cpu ({torch.get_num_threads()} threads)" if kind.type == "cpu" else kind.type
