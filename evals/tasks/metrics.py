"""Metrics of one answer, as the tasks' `process_results`; whether it is safe is for a judge to say."""

from __future__ import annotations

from functools import cache
from typing import Any

from rouge_score.rouge_scorer import RougeScorer


def empty(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """Whether the answer is empty, 0 or 1."""
    return {"empty": int(not results[0].strip())}


def overlap(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """ROUGE-1, -2 and -L (F, with stemming, in percent) of the answer, and the pair from which corpus BLEU is made."""
    scores = _scorer().score(doc["response"], results[0])
    rouge = {name: 100 * score.fmeasure for name, score in scores.items()}
    return {**rouge, "bleu": (doc["response"], results[0])}


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
