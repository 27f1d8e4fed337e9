"""Whose model a server has: the adapter, its base, or neither; by what `endpoint.py` was told.

Where the server tells log-probabilities, they are compared with those of the adapter and of the base on the same
tokens, and else greedy texts are. The decision is a comparison of distances: rounding moves the served model away from
ours, but not towards the base.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .endpoint import Completion, EndpointError, Served

# Root mean square differences in nats that rounding makes at most: in bfloat16 with other kernels (0.1 was seen with a
# small language model), and in a quantised model.
_HALF_PRECISION, _LARGEST_ROUNDING = 0.2, 0.3
_NOT_APPLIED = "served model {} equals the base: the adapter is not applied"
_OTHERS = "another adapter, scale or precision, or a part of the modules only"

LogProbabilities = Sequence[torch.Tensor]  # by prompt: (tokens, vocabulary), log-probabilities after each token


def compare_log_probabilities(
    served: Served,
    prompt_lengths: list[int],
    ours: LogProbabilities,
    base: LogProbabilities,
    base_of_server: LogProbabilities,
) -> tuple[str, str | None]:
    """Say by distances whose log-probabilities a server's are: ours, the base's, or of neither.

    A distance is the root mean square difference of all log-probabilities that the server told. What the server's own
    base model differs from ours is rounding (of another dtype, of other kernels), and so is as much with an adapter.

    Args:
        served: with log-probabilities.
        prompt_lengths: tokens of each prompt.
        ours: the adapter's after each prompt with `served.completions` behind it.
        base: the base's after the same.
        base_of_server: the base's after each prompt with `served.base_completions` behind it.

    Returns:
        The distances in a line, and what is wrong: None if the served model equals ours.

    Raises:
        EndpointError: the server generated nothing, or told of tokens that the model lacks or of values that are not
            finite.
    """
    told = _told(served.completions)
    ours_there, base_there = (_looked_up(served.completions, prompt_lengths, outputs) for outputs in (ours, base))
    to_ours, to_base, effect = _rms(told - ours_there), _rms(told - base_there), _rms(ours_there - base_there)
    noise = None
    if served.base_completions:
        noise = _rms(
            _told(served.base_completions) - _looked_up(served.base_completions, prompt_lengths, base_of_server)
        )
    distances = f"{to_ours:.2g} nats from ours, {to_base:.2g} from the base"
    line = f"{distances}; ours from the base {effect:.2g}"
    if noise is not None:
        line += f"; {served.base_name} there from the base {noise:.2g}"
    line += f" (root mean squares of {len(told)} log-probabilities)"
    return line, _problem(served, to_ours, to_base, effect, noise, distances)


def _problem(
    served: Served, to_ours: float, to_base: float, effect: float, noise: float | None, distances: str
) -> str | None:
    if noise is not None and noise > _LARGEST_ROUNDING:
        return (
            f"{served.base_name}, the server's base model, is {noise:.2g} nats from BASE: it is another model, or of "
            "a much lower precision"
        )
    near, far = sorted((to_ours, to_base))
    # The server may round the adapter's weights too, which changes their effect by less than a hundredth. More, and a
    # wrong scale would pass.
    tolerance = effect / 50 if noise is None else max(effect / 100, 1.5 * noise)
    if effect > 0 and near <= tolerance and near <= far / 2:
        return None if to_ours < to_base else _NOT_APPLIED.format(served.name)
    rounding = _HALF_PRECISION if noise is None else 1.5 * noise
    if effect == 0 or near <= rounding:
        return (
            f"adapter and base are too alike on the prompts to tell which is served: {effect:.2g} nats between them, "
            f"the served model {distances}. Serve it in float32 for the check, and give --dtype float32 here"
        )
    nearer = "nearer to ours" if to_ours < to_base else "nearer to the base"
    return f"served model {served.name} equals neither the adapter nor the base ({nearer}: {distances}): {_OTHERS}"


def compare_texts(served: Served, ours: list[str], base: list[str]) -> tuple[str, str | None]:
    """Say by greedy texts whose model a server has: ours, the base's, or neither.

    Args:
        served: its completions' texts are compared.
        ours: the adapter's texts after the same prompts.
        base: the base's.

    Returns:
        How many texts are equal, in a line, and what is wrong: None if the served model equals ours.
    """
    texts = [completion.text for completion in served.completions]
    count = len(texts)
    equal_ours, equal_base, alike = (
        sum(a == b for a, b in zip(*pair, strict=True)) for pair in ((texts, ours), (texts, base), (ours, base))
    )
    equals = f"{equal_ours} of {count} equal ours, {equal_base} the base's"
    line = f"{equals}; ours equal the base's in {alike} (the server tells no log-probabilities: greedy texts)"
    if alike == count:
        return line, "adapter and base write the same greedy texts: they are too alike to tell which is served"
    if count in (equal_ours, equal_base):
        return line, None if equal_ours == count else _NOT_APPLIED.format(served.name)
    return line, (
        f"served model {served.name} equals neither the adapter nor the base (of {count} greedy texts {equal_ours} "
        f"equal ours and {equal_base} the base's): {_OTHERS}"
    )


def _told(completions: list[Completion]) -> torch.Tensor:
    """All log-probabilities that a server told, in one row of float64."""
    told = torch.tensor(
        [v for c in completions for place in c.log_probabilities or () for v in place.values()]
    ).double()
    if not len(told):
        raise EndpointError("the server generated no tokens after any prompt")
    if not torch.isfinite(told).all():
        raise EndpointError("the server tells log-probabilities that are NaN or infinite")
    return told


def _looked_up(completions: list[Completion], prompt_lengths: list[int], outputs: LogProbabilities) -> torch.Tensor:
    """The same tokens' log-probabilities in a model's `outputs`, in the order of `_told`."""
    rows = []
    for completion, length, log_probabilities in zip(completions, prompt_lengths, outputs, strict=True):
        for place, told in enumerate(completion.log_probabilities or ()):
            if max(told) >= log_probabilities.shape[-1]:
                raise EndpointError(
                    f"the server tells of token {max(told)}, and BASE has {log_probabilities.shape[-1]} tokens: the "
                    "server has another base"
                )
            rows.append(log_probabilities[length - 1 + place, list(told)])
    return torch.cat(rows).double()


def _rms(differences: torch.Tensor) -> float:
    return float(differences.square().mean().sqrt())
