"""What a unit causes: by how much the loss of texts changes where it is switched off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import nn

from .activity import in_eval_mode
from .selectivity import CONFIDENCE
from .texts import Texts
from .units import Unit, ablated

_LOGITS = 2**26  # most logits of one batch


class Effect(NamedTuple):
    """The change of the loss in the texts of a group, in nats a token: positive where the unit lowers the loss."""

    mean: float
    low: float  # 95 % interval over texts, paired: of the differences
    high: float


@torch.no_grad()
def losses(model: Any, texts: Texts) -> torch.Tensor:
    """The mean negative log-likelihood of each text's tokens, (texts,) float64; NaN for a text of one token.

    Only the tokens of the response count where there is one.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_output_embeddings().weight.shape[0]
    longest = max(1, max(len(texts.ids(number)) for number in range(len(texts))))
    result = torch.full((len(texts),), torch.nan, dtype=torch.float64)
    with in_eval_mode(model):
        for batch in texts.batches(max(1, min(16, _LOGITS // (vocabulary * longest)))):
            ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            token_losses = nn.functional.cross_entropy(
                logits.transpose(1, 2).float(), ids[:, 1:].to(logits.device), reduction="none"
            ).double()
            answers = torch.tensor([texts.answer(number) for number in batch.texts.tolist()])
            is_answer = torch.arange(1, ids.shape[1]) >= answers[:, None]
            counts = (is_answer & batch.attention_mask[:, 1:].bool()).to(logits.device)
            result[batch.texts] = ((token_losses * counts).sum(1) / counts.sum(1)).cpu()
    return result


def effects(model: Any, texts: Texts, units: Iterable[Unit | None]) -> Iterator[dict[str, Effect | None]]:
    """For each unit, what switching it off changes in each group; for None, what disabling the adapter changes.

    A group has none where fewer than two of its texts have a loss.

    Args:
        model: a PeftModel of a causal language model with one active MonoLoRA adapter.
        texts: on which the losses are compared; each unit costs a pass over all.
        units: to switch off, one at a time.
    """
    before = losses(model, texts)
    for unit in units:
        with model.disable_adapter() if unit is None else ablated(model, [unit]):
            change = losses(model, texts) - before
        yield {group: _effect(change[texts.group_of == i]) for i, group in enumerate(texts.groups)}


def _effect(changes: torch.Tensor) -> Effect | None:
    changes = changes[~changes.isnan()]
    if len(changes) < 2:
        return None
    half = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * float(changes.std()) / len(changes) ** 0.5
    mean = float(changes.mean())
    return Effect(mean, mean - half, mean + half)
