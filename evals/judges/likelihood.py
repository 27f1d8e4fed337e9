"""How likely a language model, such as the base, finds an answer, and how much it expected to be surprised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from evals.judges.base import LocalJudge, left_padded, positions
from evals.prompts import EncodedAnswer, encode_answer


class Likely(NamedTuple):
    """What a model says of one answer, means over its tokens."""

    surprise: float  # -log p of the token, in nats: the logarithm of the perplexity
    excess: float  # surprise less the entropy of what the model predicts: about 0 for what the model would say itself


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
        self.limit = int(getattr(self.config, "max_position_embeddings", 0) or self.tokenizer.model_max_length)

    def encode(self, prompt: str, response: str) -> EncodedAnswer | None:
        """The conversation's tokens, without the beginning that does not fit; None for an empty answer."""
        if not response.strip():
            return None
        ids, mask = encode_answer(self.tokenizer, prompt, response)
        return EncodedAnswer(ids[-self.limit :], mask[-self.limit :])

    @torch.inference_mode()
    def of(self, batch: Sequence[EncodedAnswer | None]) -> list[Likely | None]:
        """What the model says of each answer, None for those that are empty."""
        rows = [answer for answer in batch if answer is not None and any(answer.completion_mask[1:])]
        if not rows:
            return [None] * len(batch)
        ids, mask = left_padded([row.input_ids for row in rows])
        counted = left_padded([row.completion_mask for row in rows])[0][:, 1:].to(self.model.device)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        options = {"attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
        log_probs = self.model(input_ids=ids, **options).logits[:, :-1].float().log_softmax(-1)
        surprise = -log_probs.gather(-1, ids[:, 1:, None])[..., 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        means = [((values * counted).sum(-1) / counted.sum(-1)).tolist() for values in (surprise, surprise - entropy)]
        likely = map(Likely, *means)
        return [next(likely) if answer is not None and any(answer.completion_mask[1:]) else None for answer in batch]
