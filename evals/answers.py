"""Log-likelihood of candidate answers: which of a few answers does a model prefer?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from mono_peft.activity import in_eval_mode

from .progress import Progress
from .prompts import EncodedAnswer

MOST_TOKENS = 2**14  # of a batch of several rows, with padding: each has logits of the whole vocabulary


@torch.no_grad()
def answer_log_likelihoods(
    model: nn.Module, answers: Sequence[EncodedAnswer], pad_token_id: int, batch_size: int = 32
) -> torch.Tensor:
    """Sum of log p(token | tokens before) over the answer's tokens, for each of `answers`.

    Rows are padded on the right and masked, so that a row's value does not depend on its batch. Of long rows a batch
    has fewer than `batch_size`, so that a few of them do not decide how many short ones fit the memory. Several
    processes share the rows and all get the whole result; each runs the same number of forward passes, as sharded
    models need.

    Args:
        model: a causal language model; it runs in eval mode and is put back.
        answers: n encoded prompts with answers.
        pad_token_id: any id of the vocabulary; padded positions are masked.
        batch_size: rows in one forward pass of a process, at most.

    Returns:
        float32 tensor of shape (n,) on the CPU, at most 0.
    """
    state = PartialState()
    lengths = [len(answer.input_ids) for answer in answers]
    # Longest first, so that a batch too large for the memory fails at once.
    order = sorted(range(len(answers)), key=lambda i: -lengths[i])
    share = -(-len(order) // state.num_processes)
    rows = list(islice(cycle(order), share * state.num_processes))
    starts = range(0, len(rows), state.num_processes)
    longest = [max(lengths[i] for i in rows[start : start + state.num_processes]) for start in starts]
    own = rows[state.process_index :: state.num_processes]
    batches = [own[part] for part in _batches(longest, batch_size)]

    values: list[tuple[int, float]] = []
    with in_eval_mode(model):
        progress = Progress("Scoring answers", len(batches), "batches", shown=state.is_main_process)
        for batch in batches:
            scores = batch_log_likelihoods(model, [answers[i] for i in batch], pad_token_id)
            values += zip(batch, scores.tolist(), strict=True)
            progress.update()
    result = torch.empty(len(answers))
    for index, value in gather_object(values):
        result[index] = value
    return result


def _batches(longest: Sequence[int], batch_size: int) -> Iterator[slice]:
    """Where rows are cut into batches, from the tokens of the longest row of any process at each place."""
    start = 0
    for end in range(1, len(longest) + 1):
        tokens = (end + 1 - start) * max(longest[start : end + 1])  # of a batch with the next row
        if end == len(longest) or end - start == batch_size or tokens > MOST_TOKENS:
            yield slice(start, end)
            start = end


@torch.no_grad()
def batch_log_likelihoods(model: nn.Module, answers: Sequence[EncodedAnswer], pad_token_id: int = 0) -> torch.Tensor:
    """The same of one batch in one forward pass of this process, in the model's mode and on its device, (n,)."""
    device = next(model.parameters()).device
    input_ids, attention_mask, counted = padded_answers(answers, device, pad_token_id)
    logits = token_logits(model, input_ids, attention_mask)
    rows, columns = counted.nonzero(as_tuple=True)  # the token at column + 1 is predicted at `column`
    log_probs = logits[rows, columns].float().log_softmax(-1)
    chosen = log_probs.gather(1, input_ids[rows, columns + 1][:, None])[:, 0]
    return torch.zeros(len(answers), device=device).index_add(0, rows, chosen)


def padded_answers(
    answers: Sequence[EncodedAnswer], device: torch.device, pad_token_id: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (n, tokens), padded on the right; which predictions count, (n, tokens - 1)."""

    def padded(rows: Iterable[list[int]], value: int = 0) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(device)

    ids = padded((answer.input_ids for answer in answers), pad_token_id)
    mask = padded([1] * len(answer.input_ids) for answer in answers)
    return ids, mask, padded(answer.completion_mask for answer in answers).bool()[:, 1:]


def token_logits(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Logits of the tokens of the input alone: some methods of PEFT put virtual tokens before them."""
    logits: torch.Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return logits[:, -input_ids.shape[1] :]
