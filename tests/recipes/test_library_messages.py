"""What the language recipes do not show of libraries, and that they show the rest."""

import importlib
import logging
import warnings

import datasets.utils
import library_messages
import pytest
from lm_eval.api import task
from transformers.utils import logging as transformers_logging


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        ("torch.utils._pytree", "%s is an Enum subclass and is now natively supported by torch.compile"),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: %s."),
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, ..."),
    ],
)
def test_messages_go_by_their_text(logger, message):
    logger = logging.getLogger(logger)
    record = logging.LogRecord(logger.name, logging.WARNING, "", 0, message, ("x",), None)
    other = logging.LogRecord(logger.name, logging.WARNING, "", 0, "The disk is full.", (), None)
    assert not logger.filter(record)
    assert logger.filter(other)


def test_warnings_go_by_text_and_module():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        importlib.reload(library_messages)
        for text, category, module in [
            ("`gradient_checkpointing` is deprecated and ...", FutureWarning, "transformers.training_args"),
            ("`is_gradient_checkpointing` is deprecated and ...", FutureWarning, "transformers.modeling_utils"),
            ("`gradient_checkpointing` is deprecated and ...", FutureWarning, "mine"),
            ("`something` is deprecated", FutureWarning, "transformers.training_args"),
        ]:
            warnings.warn_explicit(text, category, "file.py", 1, module=module)
    assert [str(warning.message)[:16] for warning in seen] == ["`gradient_checkp", "`something` is d"]


def test_bars_come_back():
    bar = task.tqdm
    with library_messages.no_progress_bars():
        assert datasets.utils.are_progress_bars_disabled()
        assert not transformers_logging.is_progress_bar_enabled()
        assert task.tqdm([1]).disable
    assert task.tqdm is bar
    assert not datasets.utils.are_progress_bars_disabled()
    assert transformers_logging.is_progress_bar_enabled()
