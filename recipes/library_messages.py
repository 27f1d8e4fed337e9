"""Messages of libraries that nobody who runs a recipe can act on, left out by their text; all others stay.

A recipe imports this before anything else, because some of them are written while libraries are imported.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

# By logger: a part of the message, as it is before its arguments are filled in.
_LOGGED = {
    # torchao registers its own enums with torch in the way that torch gave up.
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
    # A faster kernel for 4-bit weights on CPUs, which bitsandbytes asks the hub for.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # DeepSpeed is asked for its accelerator also where it does not train.
    "DeepSpeed": "Setting accelerator to CPU",
}


def _without(part: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: part not in str(record.msg)


for _name, _part in _LOGGED.items():
    logging.getLogger(_name).addFilter(_without(_part))

# transformers 5 renames the option within itself and TRL; both names work, and older versions know one only.
warnings.filterwarnings(
    "ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning, module=r"transformers\."
)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Let libraries draw no bars, of weights that are read, rows that are tokenized and requests that are built."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from lm_eval.api import task
    from transformers.utils import logging

    of_datasets, of_transformers = not are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    of_lm_eval = task.tqdm
    disable_progress_bars()
    logging.disable_progress_bar()
    task.tqdm = partial(of_lm_eval, disable=True)  # lm-eval has no option for it
    try:
        yield
    finally:
        task.tqdm = of_lm_eval
        if of_datasets:
            enable_progress_bars()
        if of_transformers:
            logging.enable_progress_bar()
