"""How far an adapter moves its base on texts that it was not trained on: KL divergence and loss, per token.

    texts = neutral_texts(tokenizer, read_neutral_texts())
    print(forgetting(peft_model, texts).kl)  # Estimate(value=0.013, low=0.011, high=0.015, n=48), in nats per token

`python -m evals forgetting --model BASE --adapters A B --output_dir DIR` writes rows of it, for several adapters on
one loaded base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.answers import batch_log_likelihoods, padded_answers, token_logits
from evals.contents import checksum
from evals.intervals import bootstrap
from evals.local_files import Row, check_columns, check_text, file_rows
from evals.models import Adapter, attached
from evals.progress import Progress
from evals.prompts import EncodedAnswer, encode_answer
from mono_peft.activity import in_eval_mode

NEUTRAL_TEXT = Path(__file__).parent / "neutral_text.jsonl"  # 48 paragraphs that were written for this
TASK = "neutral_text"  # in the rows
KL, LOSS, LOSS_DIFFERENCE = "neutral_kl", "neutral_loss", "neutral_loss_difference"
_POSITIONS = 512  # whose probabilities of all tokens are in memory at a time
_TOLERANCE = 1e-4  # nats by which kernels may differ between two passes of the base in float32, per token


class ForgettingError(ValueError):
    """With its adapter switched off the model is not the base, or a text cannot be measured."""


class NeutralTexts(NamedTuple):
    """Texts as tokens, with the mask of those that count, and a checksum of what was read."""

    rows: list[EncodedAnswer]
    checksum: str
    cut: int  # texts that were longer than the model's context, and lost their end


class Estimate(NamedTuple):
    """A mean over tokens with its 95 % interval over n texts, whose tokens are drawn together."""

    value: float
    low: float
    high: float
    n: int


class Forgetting(NamedTuple):
    """An adapter beside its base on texts, in nats per token."""

    kl: Estimate  # KL(base || adapter) of the next token, at least 0
    loss: Estimate  # negative log-likelihood of the texts under the adapter
    base_loss: Estimate
    loss_difference: Estimate  # loss - base_loss, on the same tokens
    tokens: int


def read_neutral_texts(file: str | Path | None = None) -> list[Row]:
    """Rows of the shipped texts, or of a file of yours with the column `text`, or `prompt` and `response`.

    Raises:
        ValueError: the file cannot be read, has neither, or an empty text; names the row.
    """
    path = Path(file) if file is not None else NEUTRAL_TEXT
    try:
        rows = file_rows(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"The neutral texts {path} cannot be read ({error}).") from None
    columns = ["text"] if any("text" in row for row in rows) else ["prompt", "response"]
    if not any(name in row for row in rows for name in columns):
        columns = ["text"]  # so that the error names what is easiest to give
    check_columns(rows, columns, str(path))
    for column in columns:
        check_text(rows, column, str(path))
    if len(rows) < 2:
        raise ValueError(f"{path} has one text; an interval over texts needs two or more, better 30.")
    return [{column: row[column] for column in columns} for row in rows]


def neutral_texts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, context: int | None = None
) -> NeutralTexts:
    """Encode texts.

    All tokens of a text count but the first, before which there is nothing; of a conversation those of the response,
    written by the chat template.

    Args:
        rows: as `read_neutral_texts` gives them, with `text`, or `prompt` and `response`.
        context: most tokens of a text, 1,024 at most; longer ones lose their end.

    Raises:
        ValueError: a text has no token that counts; names the row.
    """
    most = min(context or 1024, 1024)
    encoded, cut = [], 0
    for number, row in enumerate(rows, 1):
        if "text" in row:
            ids = tokenizer(row["text"])["input_ids"]
            one = EncodedAnswer(ids, [0] + [1] * (len(ids) - 1))
        else:
            one = encode_answer(tokenizer, row["prompt"], row["response"])
        cut += len(one.input_ids) > most
        one = EncodedAnswer(one.input_ids[:most], one.completion_mask[:most])
        if not any(one.completion_mask[1:]):
            raise ValueError(f"Row {number} of the neutral texts has no token that counts within the first {most}.")
        encoded.append(one)
    return NeutralTexts(encoded, checksum(list(rows)), cut)


@torch.no_grad()
def forgetting(model: PeftModel, texts: NeutralTexts, *, batch_size: int = 4, progress: bool = False) -> Forgetting:
    """Measure an adapter against its base, which is the same model with the adapter disabled.

    The model runs in eval mode; its mode and adapters are as before afterwards. Probabilities are float32.

    Args:
        model: with the adapter active; any method of PEFT that `disable_adapter` takes away wholly, which
            `check_base_beneath` tells.
        batch_size: texts at a time; twice (batch, tokens, vocabulary) logits are in memory.

    Raises:
        FloatingPointError: a probability is not finite.
    """
    order = sorted(range(len(texts.rows)), key=lambda i: -len(texts.rows[i].input_ids))
    starts = range(0, len(order), batch_size)
    sums = np.zeros((len(order), 4))  # KL, loss, base's loss and number of tokens of each text
    with in_eval_mode(model):
        lines = Progress("Neutral texts", len(starts), "batches", shown=progress)
        for start in starts:
            batch = order[start : start + batch_size]
            ids, mask, counted = padded_answers([texts.rows[i] for i in batch], next(model.parameters()).device)
            adapted = token_logits(model, ids, mask)
            with model.disable_adapter():
                base = token_logits(model, ids, mask)
            sums[batch] = _sums(adapted, base, ids, counted.to(adapted.device))
            lines.update()
    if not np.isfinite(sums).all():
        raise FloatingPointError("probabilities on the neutral texts are not finite: adapter or base diverged.")
    kl, loss, base_loss, tokens = sums.T
    return Forgetting(
        kl=_per_token(kl, tokens),
        loss=_per_token(loss, tokens),
        base_loss=_per_token(base_loss, tokens),
        loss_difference=_per_token(loss - base_loss, tokens),
        tokens=int(tokens.sum()),
    )


@torch.no_grad()
def losses(model: PreTrainedModel, texts: NeutralTexts, *, batch_size: int = 4) -> np.ndarray:
    """The summed negative log-likelihood, in nats, and the number of tokens of each text, (texts, 2)."""
    sums = np.zeros((len(texts.rows), 2))
    with in_eval_mode(model):
        for start in range(0, len(texts.rows), batch_size):
            batch = texts.rows[start : start + batch_size]
            sums[start : start + batch_size, 0] = -batch_log_likelihoods(model, batch).cpu().numpy()
            sums[start : start + batch_size, 1] = [sum(row.completion_mask[1:]) for row in batch]
    return sums


def loss_per_token(sums: np.ndarray) -> Estimate:
    """The mean loss of `losses` over tokens."""
    return _per_token(sums[:, 0], sums[:, 1])


def check_base_beneath(model: PeftModel, texts: NeutralTexts, before: np.ndarray) -> None:
    """Check that the model without its adapter is the base that it was before the adapter was attached.

    Args:
        before: `losses` of the base alone.

    Raises:
        ForgettingError: it is not, as where an adapter holds biases or embeddings, which PEFT writes into the base.
    """
    first = texts._replace(rows=texts.rows[:2])
    with model.disable_adapter():
        now = losses(model, first)
    gap = float(np.abs(now[:, 0] - before[:2, 0]).max() / now[:, 1].min())
    tolerance = _TOLERANCE if next(model.parameters()).dtype == torch.float32 else 100 * _TOLERANCE
    if not gap <= tolerance:
        raise ForgettingError(
            f"With its adapter disabled the model is not the base (their losses differ by {gap:.2g} nats a token): "
            "the adapter holds biases or embeddings that PEFT writes into the base, so that its KL cannot be measured."
        )


def _sums(adapted: torch.Tensor, base: torch.Tensor, ids: torch.Tensor, counted: torch.Tensor) -> np.ndarray:
    """KL, loss, the base's loss and the number of tokens, summed over the counted tokens of each row."""
    sums = torch.zeros(len(ids), 4, dtype=torch.float64)
    rows, columns = counted.nonzero(as_tuple=True)  # the token at column + 1 is predicted at `column`
    for start in range(0, len(rows), _POSITIONS):
        row, column = rows[start : start + _POSITIONS], columns[start : start + _POSITIONS]
        p, q = (logits[row, column].float().log_softmax(-1) for logits in (base, adapted))
        kl = torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(-1).clamp(min=0)  # below 0 by rounding alone
        target = ids[row, column + 1][:, None]
        values = torch.stack([kl, -q.gather(1, target)[:, 0], -p.gather(1, target)[:, 0], torch.ones_like(kl)], 1)
        sums.index_add_(0, row.cpu(), values.double().cpu())
    return sums.numpy()


def _per_token(values: np.ndarray, tokens: np.ndarray) -> Estimate:
    def ratio(resampled: np.ndarray) -> np.ndarray:
        sums = resampled.sum(1)
        quotient: np.ndarray = sums[:, 0] / sums[:, 1]
        return quotient

    low, high = bootstrap(ratio, np.stack([values, tokens], 1))
    return Estimate(float(values.sum() / tokens.sum()), low, high, len(values))


def adapter_measures(
    base: PreTrainedModel,
    adapter: Adapter,
    texts: NeutralTexts,
    before: np.ndarray,
    *,
    batch_size: int = 4,
    progress: bool = False,
) -> list[tuple[str, Estimate, dict[str, Any]]]:
    """Attach an adapter to a loaded base, measure it, and give the base back.

    Args:
        before: `losses` of the base on these texts.

    Returns:
        Metric, value and the settings of the row, for each row of the adapter.

    Raises:
        ForgettingError: the base is another one while the adapter is disabled.
        FloatingPointError: a probability is not finite.
    """
    with attached(base, adapter) as model:
        check_base_beneath(model, texts, before)
        measured = forgetting(model, texts, batch_size=batch_size, progress=progress)
    versus = {"versus": "base", "versus_adapter": None}
    return [(KL, measured.kl, {}), (LOSS, measured.loss, {}), (LOSS_DIFFERENCE, measured.loss_difference, versus)]
