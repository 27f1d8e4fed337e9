"""Where rows of numbers are kept between steps: in memory up to a budget, beyond it mapped from a temporary file."""

from __future__ import annotations

import mmap
import os
import tempfile

import torch


class RowStorage:
    """Gives out room for rows, in memory as long as the budget lasts.

    What is not in memory is in a file that has no name, in the folder that the environment variable TMPDIR names. The
    system removes it with the last tensor on it, or with the process, also one that was killed, so that nobody ever
    sees a part of it. The pages that are read stay in the system's cache of files as long as there is room.

    Args:
        memory_budget: bytes, not negative.
    """

    def __init__(self, memory_budget: float) -> None:
        self._left = memory_budget

    def new_rows(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, bool]:
        """Room for (rows, width) numbers on `device`, or where the budget is used up, mapped; and whether it is.

        Raises:
            OSError: the folder has no room for the file.
        """
        size = rows * width * dtype.itemsize
        if size <= self._left:
            self._left -= size
            return torch.empty(rows, width, dtype=dtype, device=device), False
        return _mapped(size).view(dtype).view(rows, width), True


def _mapped(size: int) -> torch.Tensor:
    with tempfile.TemporaryFile() as file:
        try:
            # Writing to a mapped page that the disk has no room for would kill the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise OSError(
                f"no room for {size / 2**20:.0f} MiB of cached rows in {tempfile.gettempdir()} ({error.strerror}): "
                "name another folder in the environment variable TMPDIR, raise `memory_budget`, or lower "
                "`rows_per_module`."
            ) from None
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
