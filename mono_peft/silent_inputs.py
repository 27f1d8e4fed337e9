"""What a base model feeds the layers that have adapters, on tokens drawn from texts."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import nn

from .activity import in_eval_mode
from .layer import MonoLoraLayer
from .padding import right_padded
from .prefixes import DistinctPrefixes, is_causal, is_text_only, prefix_numbers
from .row_storage import RowStorage


class Tokens(NamedTuple):
    """The tokens of a batch whose inputs are kept."""

    batch: dict[str, Any]  # as it was given, padded on the right
    positions: torch.Tensor  # int64, of the kept tokens in the flattened batch
    counts: torch.Tensor  # int64, how often each was there

    @property
    def inputs(self) -> dict[str, Any]:
        """Of the model."""
        return {key: value for key, value in self.batch.items() if key != "silent_mask"}


class Group(NamedTuple):
    """Modules with the same input."""

    rows: torch.Tensor  # (rows, in_features), as the base computes them
    encoders: dict[str, nn.Linear]  # A of each, by the module's name
    mapped: bool  # whether the rows are in a file, and not on the modules' device

    @property
    def device(self) -> torch.device:
        """Of the modules."""
        return next(iter(self.encoders.values())).weight.device

    def on_device(self) -> Group:
        """The same with its rows on the modules' device."""
        return self._replace(rows=self.rows.to(self.device))

    def as_computed(self) -> torch.Tensor:
        """All rows on the modules' device, in the precision in which A x is judged."""
        dtype = torch.promote_types(next(iter(self.encoders.values())).weight.dtype, torch.float32)
        return self.rows.to(self.device, dtype)


def draw_tokens(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], budget: int, seed: int
) -> tuple[list[Tokens], int]:
    """Draw at most `budget` of the distinct tokens that count, without repetition.

    In a causal model (`mono_peft.prefixes.is_causal`) tokens with the same prefix have the same inputs. They are one
    token here. In other models, and in batches with other keys than `input_ids`, `attention_mask` and `silent_mask`,
    each token is distinct. A random number is drawn for each token of each text, the lowest of a distinct token is
    its own, and the tokens with the lowest are drawn. So one that many texts have, as of a system prompt, is drawn all
    but surely, since none of these texts is silent where it is not, and those of one text each are all alike.

    The batches are gone through once, and only those are kept of which a token may still be drawn: no more than twice
    the budget, however many there are.

    Returns:
        The batches of which a token is drawn, in their order, and the number of distinct tokens that count. It is
        exact up to the budget, and where no token may be the same as another; else it is estimated with a relative
        standard error of 1.6 %.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("an encoder-decoder model has two texts a row, and `input_ids` names one: not supported.")
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = getattr(embeddings, "num_embeddings", len(embeddings.weight))  # ZeRO-3's weights are empty
    causal = is_causal(model)
    generator = random.Random(seed)
    drawn, distinct = _Drawn(budget), DistinctPrefixes()
    total = alone = 0  # tokens that count, and those of them that are distinct whatever their prefix is
    for batch_number, batch in enumerate(batches):
        batch = right_padded(batch)
        counted = counted_tokens(batch, batch_number, vocabulary)
        positions = counted.flatten().nonzero().flatten().tolist()
        total += len(positions)
        if causal and is_text_only(batch):
            names = list(prefix_numbers(batch, counted, seed))
            distinct.add(names)
        else:
            names = [-(alone + i) for i in range(1, len(positions) + 1)]  # below those of prefixes
            alone += len(positions)
        drawn.add(batch_number, batch, positions, names, [generator.random() for _ in positions])
    if total == 0:
        raise ValueError("`batches` has no token that counts: it is empty, or its masks are zero everywhere.")
    drawn.keep_the_lowest()
    if drawn.highest == math.inf:  # no token was left out
        return drawn.tokens(), len(drawn.places)
    return drawn.tokens(), total if alone == total else max(alone + distinct.estimate(), budget + 1)


class _Drawn:
    """The distinct tokens with the `budget` lowest numbers of all that were added, and at most as many others."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        # By the token's name: its lowest number, a batch that has it, the position in it, flattened, and how often it
        # was added since it is here.
        self.places: dict[int, tuple[float, int, int, int]] = {}
        self.batches: dict[int, dict[str, Any]] = {}  # those of the places
        self.highest = math.inf  # no token with a number from here on is among the lowest

    def add(
        self, batch_number: int, batch: dict[str, Any], positions: list[int], names: list[int], numbers: list[float]
    ) -> None:
        before = len(self.places)
        for position, name, number in zip(positions, names, numbers, strict=True):
            if number < self.highest or name in self.places:
                lowest, batch_of_it, place, count = self.places.get(name, (number, batch_number, position, 0))
                self.places[name] = (min(number, lowest), batch_of_it, place, count + 1)
        if len(self.places) > before:
            self.batches[batch_number] = batch
        if len(self.places) > 2 * self.budget:
            self.keep_the_lowest()

    def keep_the_lowest(self) -> None:
        if len(self.places) <= self.budget:
            return
        *lowest, (_, (self.highest, *_)) = sorted(self.places.items(), key=itemgetter(1))[: self.budget + 1]
        self.places = dict(lowest)
        self.batches = {number: self.batches[number] for _, number, _, _ in self.places.values()}

    def tokens(self) -> list[Tokens]:
        tokens = []
        for number, places in groupby(sorted(place for _, *place in self.places.values()), key=itemgetter(0)):
            _, positions, counts = zip(*places, strict=True)
            tokens.append(Tokens(self.batches[number], torch.tensor(positions), torch.tensor(counts)))
        return tokens


def counted_tokens(batch: Mapping[str, Any], number: int, vocabulary: int) -> torch.Tensor:
    """Which tokens count: bool of shape (batch, tokens)."""
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(f"batch {number} has no `input_ids` of shape (batch, tokens), as a tokenizer returns them.")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"batch {number} has the token {int(ids.max() if ids.min() >= 0 else ids.min())}, and the model has "
            f"{vocabulary} tokens: it was made with another model's tokenizer."
        )
    counts = torch.ones_like(ids, dtype=torch.bool)
    for name in ("attention_mask", "silent_mask"):
        mask = batch.get(name)
        if mask is None:
            continue
        if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
            shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(f"`{name}` of batch {number} must have the shape {tuple(ids.shape)}, got {shape}.")
        counts &= mask.to(ids.device).bool()
    return counts


def digest_of(tokens: list[Tokens], options: object) -> str:
    """Checksum of the tokens and options, by which processes see that they have the same."""
    digest = hashlib.sha256(repr(options).encode())
    for batch, *places in tokens:
        digest.update(batch["input_ids"].cpu().numpy().tobytes())
        for tensor in places:
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def without_adapters(layers: Iterable[MonoLoraLayer]) -> Iterator[None]:
    """Disable the adapters inside. PEFT's own way would also change what requires gradients."""
    before = {layer: layer._disable_adapters for layer in layers}
    try:
        for layer in before:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in before.items():
            layer._disable_adapters = disabled


def base_inputs(
    model: nn.Module, layers: list[tuple[str, MonoLoraLayer, nn.Linear]], tokens: list[Tokens], storage: RowStorage
) -> list[Group]:
    """The inputs of the layers on these tokens, without adapters. Layers that are called with one tensor share it."""
    encoders = {name: encoder for name, _, encoder in layers}
    pieces: dict[str, list[torch.Tensor]] = {}  # of the present batch, by call
    last: list[torch.Tensor] = []  # the input seen last, and its rows
    batch: Tokens

    def keep(name: str, module: nn.Module, args: Any) -> None:
        layer_input = args[0]
        if not (last and last[0] is layer_input):
            ids = batch.batch["input_ids"]
            if layer_input.shape[:-1].numel() != ids.numel():
                raise ValueError(
                    f"{name} sees {layer_input.shape[:-1].numel()} rows of a batch of {ids.numel()} tokens, so that "
                    "it cannot be told which row is which token's. Leave it out of `target_modules`."
                )
            rows = layer_input.reshape(-1, layer_input.shape[-1])
            last[:] = layer_input, rows[batch.positions.to(rows.device)]
        pieces[name].append(last[1])

    device = next(model.parameters()).device
    total = sum(len(batch.positions) for batch in tokens)
    groups: dict[tuple[str, ...], Group] = {}
    filled = 0  # tokens whose rows are there
    with (
        ExitStack() as hooks,
        without_adapters(layer for _, layer, _ in layers),
        in_eval_mode(model),
        torch.no_grad(),
    ):
        for name, layer, _ in layers:
            hooks.enter_context(layer.register_forward_pre_hook(partial(keep, name)))
        for batch in tokens:
            pieces.update((name, []) for name in encoders)
            model(**send_to_device(batch.inputs, device))
            last.clear()
            by_names = _by_names(pieces)
            if not groups:
                for names, (calls, rows) in by_names.items():
                    room, mapped = storage.new_rows(total * calls, rows.shape[1], rows.dtype, rows.device)
                    groups[names] = Group(room, {name: encoders[name] for name in names}, mapped)
            if groups.keys() != by_names.keys():
                raise ValueError("the layers with adapters share their inputs on some batches and not on others.")
            for names, (calls, rows) in by_names.items():
                groups[names].rows[filled * calls :][: len(rows)] = rows
            filled += len(batch.positions)
    return list(groups.values())


def _by_names(pieces: dict[str, list[torch.Tensor]]) -> dict[tuple[str, ...], tuple[int, torch.Tensor]]:
    """By the names of the modules that share them, the number of calls in a pass, and the rows of these, in order."""
    names: dict[tuple[int, ...], list[str]] = {}
    for name, calls in pieces.items():
        if not calls:
            raise ValueError(f"{name} is not called in the model's forward pass. Leave it out of `target_modules`.")
        names.setdefault(tuple(map(id, calls)), []).append(name)
    shared = {tuple(group): pieces[group[0]] for group in names.values()}
    for (name, *_), calls in shared.items():
        if not all(torch.isfinite(rows).all() for rows in calls):
            raise ValueError(f"the base model computes NaN or infinity for {name} on the silent texts.")
    return {group: (len(calls), torch.cat(calls)) for group, calls in shared.items()}
