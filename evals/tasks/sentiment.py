"""The sentiment tasks' prompt, answers and accuracy, which the SST-2 recipe shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evals.prompts import SST2_ANSWERS, sst2_prompt


def prompt(doc: dict[str, Any]) -> str:
    """The instruction with the sentence."""
    return sst2_prompt(doc["sentence"])


def answers(doc: dict[str, Any]) -> list[str]:
    """The words of the labels 0 and 1."""
    return list(SST2_ANSWERS)


def is_right(label: int, log_likelihoods: Sequence[float]) -> float:
    """1.0 if the word of the right label has the largest log-likelihood, the first of equal ones; else 0.0.

        >>> is_right(1, [-3.2, -0.5])
        1.0

    Args:
        log_likelihoods: finite, of each of SST2_ANSWERS.
    """
    return float(np.argmax(log_likelihoods) == label)


def accuracy(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """`is_right` of lm-eval's results, each a log-likelihood and whether greedy decoding gives the answer."""
    return {"acc": is_right(doc["label"], [log_likelihood for log_likelihood, _ in results])}
