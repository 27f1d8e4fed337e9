"""How likely a language model, such as the base, finds an answer."""

from __future__ import annotations

from collections.abc import Sequence

from evals.answers import batch_log_likelihoods
from evals.judges.base import LocalJudge
from evals.prompts import EncodedAnswer, encode_answer


class Likelihood(LocalJudge):
    """A causal language model that reads answers after their prompts.

    Args:
        source: folder or hub name.
        dtype: of the weights, one of `evals.settings.DTYPES`.

    Raises:
        ValueError: it cannot be had.
    """

    def __init__(self, source: str, dtype: str = "auto") -> None:
        super().__init__(source, dtype)
        self.settings = {f"perplexity_{name}": value for name, value in self.settings.items()}

    def encode(self, prompt: str, response: str) -> EncodedAnswer | None:
        """The conversation's tokens, without the beginning that does not fit; None for an empty answer."""
        if not response.strip():
            return None
        ids, mask = encode_answer(self.tokenizer, prompt, response)
        return EncodedAnswer(ids[-self.limit :], mask[-self.limit :])

    def surprises(self, batch: Sequence[EncodedAnswer | None]) -> list[float | None]:
        """The mean of -log p over each answer's tokens, in nats: the logarithm of its perplexity; None without one."""
        rows = [answer for answer in batch if answer is not None and any(answer.completion_mask[1:])]
        if not rows:
            return [None] * len(batch)
        sums = batch_log_likelihoods(self.model, rows).tolist()
        means = iter([-value / sum(row.completion_mask[1:]) for value, row in zip(sums, rows, strict=True)])
        return [next(means) if answer is not None and any(answer.completion_mask[1:]) else None for answer in batch]
