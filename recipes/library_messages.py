"""Messages of libraries that nobody who runs a recipe can act on, left out by their text; all others stay.

A recipe imports this before anything else, because some of them are written while libraries are imported.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# By logger: a part of the message, as it is before its arguments are filled in.
_LOGGED = {
    # torchao registers its own enums with torch in the way that torch gave up.
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
    # A faster kernel for 4-bit weights on CPUs, which bitsandbytes asks the hub for.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # DeepSpeed is asked for its accelerator also where it does not train.
    "DeepSpeed": "Setting accelerator to CPU",
}

for _name, _part in _LOGGED.items():
    logging.getLogger(_name).addFilter(lambda record, part=_part: part not in str(record.msg))

# transformers 5 renames the option within itself and TRL; both names work, and older versions know one only.
warnings.filterwarnings(
    "ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning, module=r"transformers\."
)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Let transformers and datasets draw no bars, of files that are read and rows that are tokenized."""
    import datasets
    from transformers.utils import logging as transformers_logging

    libraries = [
        (datasets.is_progress_bar_enabled, datasets.disable_progress_bars, datasets.enable_progress_bars),
        (
            transformers_logging.is_progress_bar_enabled,
            transformers_logging.disable_progress_bar,
            transformers_logging.enable_progress_bar,
        ),
    ]
    enabled = [(disable, enable) for is_enabled, disable, enable in libraries if is_enabled()]
    for disable, _ in enabled:
        disable()
    try:
        yield
    finally:
        for _, enable in enabled:
            enable()
