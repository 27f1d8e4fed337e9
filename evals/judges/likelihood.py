"""How likely a language model, such as the base, finds an answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evals.judges.base import LocalJudge, left_padded, positions
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
        self.limit = int(getattr(self.config, "max_position_embeddings", 0) or self.tokenizer.model_max_length)

    def encode(self, prompt: str, response: str) -> EncodedAnswer | None:
        """The conversation's tokens, without the beginning that does not fit; None for an empty answer."""
        if not response.strip():
            return None
        ids, mask = encode_answer(self.tokenizer, prompt, response)
        return EncodedAnswer(ids[-self.limit :], mask[-self.limit :])

    @torch.inference_mode()
    def surprises(self, batch: Sequence[EncodedAnswer | None]) -> list[float | None]:
        """The mean of -log p over each answer's tokens, in nats: the logarithm of its perplexity; None without one."""
        rows = [answer for answer in batch if answer is not None and any(answer.completion_mask[1:])]
        if not rows:
            return [None] * len(batch)
        ids, mask = (tensor.to(self.model.device) for tensor in left_padded([row.input_ids for row in rows]))
        counted = left_padded([row.completion_mask for row in rows])[0][:, 1:].to(self.model.device)
        options = {"attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
        logits = self.model(input_ids=ids, **options).logits
        row, column = counted.nonzero(as_tuple=True)  # the token at column + 1 is predicted at `column`
        log_probs = logits[row, column].float().log_softmax(-1).gather(-1, ids[row, column + 1, None])[:, 0]
        sums = torch.zeros(len(rows), device=ids.device).index_add(0, row, -log_probs)
        means = iter((sums / counted.sum(-1)).tolist())
        return [next(means) if answer is not None and any(answer.completion_mask[1:]) else None for answer in batch]
