"""What the units of an adapter do on texts, counted in one pass: how often, how strongly, where most, in which group.

Whatever is kept has a fixed size for each unit (`bytes_per_unit`), however many texts there are. A unit fires on a
token where its latent is not exactly zero; how strong it is there is the latent's absolute value. A text counts once
in each mean over texts, whatever its length, because the tokens of a text depend on one another.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .activity import active_adapters, in_eval_mode, latents_watched, uncompiled
from .experts import MonoLoraExpertsProjection, Routing
from .layer import MonoLoraConvolution, MonoLoraLayer
from .state_dicts import DivergedError
from .texts import Batch, Texts

TOP, SAMPLED = 8, 4  # examples of a unit: the texts where it is strongest, and some drawn from all where it fires
BEFORE, BEHIND = 19, 12  # tokens of an example, before and behind the one where the unit is strongest
BINS = 32  # of a histogram


class Examples:
    """For each unit the `count` texts of highest score, with the latents around the token where it is strongest."""

    def __init__(self, count: int, r: int, device: torch.device) -> None:
        self.window = BEFORE + 1 + BEHIND
        self.scores = torch.zeros(count, r, device=device)  # zero: no text yet
        self.texts = torch.zeros(count, r, dtype=torch.int32, device=device)
        self.positions = torch.zeros(count, r, dtype=torch.int32, device=device)  # of the strongest token
        self.latents = torch.zeros(count, r, self.window, device=device)

    def update(
        self, scores: torch.Tensor, texts: torch.Tensor, positions: torch.Tensor, latents: torch.Tensor
    ) -> None:
        """Take the texts of a batch in where their scores are higher.

        Args:
            scores: (batch, r), not negative; zeros are never taken.
            texts: (batch,), their numbers.
            positions: (batch, r) int64, of the strongest token.
            latents: (batch, tokens, r).
        """
        if not (scores > self.scores.min(0).values).any():
            return
        count, tokens = len(self.scores), latents.shape[1]
        self.scores, chosen = torch.cat([self.scores, scores]).topk(count, dim=0)
        is_new, kept, row = chosen >= count, chosen.clamp(max=count - 1), (chosen - count).clamp(min=0)
        position = positions.gather(0, row)
        places = position.unsqueeze(-1) + torch.arange(-BEFORE, BEHIND + 1, device=position.device)
        units = torch.arange(latents.shape[2], device=position.device)[:, None]
        around = latents[row.unsqueeze(-1), places.clamp(0, tokens - 1), units]
        old = self.latents.gather(0, kept.unsqueeze(-1).expand(-1, -1, self.window))
        self.latents = torch.where(is_new.unsqueeze(-1), around, old)
        self.texts = torch.where(is_new, texts.int()[row], self.texts.gather(0, kept))
        self.positions = torch.where(is_new, position.int(), self.positions.gather(0, kept))


class Histogram:
    """How many tokens have a latent of which strength, in `BINS` equal bins from 0 to 2**exponent of each unit.

    The exponent is the smallest that fits, as far as the texts have been seen. Where it grows, bins are merged, so
    that no count is ever estimated.
    """

    def __init__(self, r: int, device: torch.device) -> None:
        self.counts = torch.zeros(r, BINS, dtype=torch.int64, device=device)
        self.exponents = torch.full((r,), -126, dtype=torch.int32, device=device)

    def update(self, strengths: torch.Tensor, units: torch.Tensor, largest: torch.Tensor) -> None:
        """Count latents.

        Args:
            strengths: (n,), positive.
            units: (n,) int64, of which unit each is.
            largest: (r,), the largest of each unit's, 0 for none.
        """
        wanted = torch.where(largest > 0, torch.frexp(largest).exponent, self.exponents)
        exponents = torch.maximum(self.exponents, wanted)
        shift = (exponents - self.exponents).clamp(max=BINS.bit_length())
        if shift.any():
            bins = torch.arange(BINS, device=shift.device).expand(len(shift), -1) >> shift[:, None]
            self.counts = torch.zeros_like(self.counts).scatter_add_(1, bins, self.counts)
            self.exponents = exponents
        bins = torch.ldexp(strengths, BINS.bit_length() - 1 - self.exponents[units]).long().clamp(max=BINS - 1)
        self.counts += torch.bincount(units * BINS + bins, minlength=self.counts.numel()).view_as(self.counts)


class ModuleStatistics:
    """What the units of one adapted layer did on the texts so far. G is the number of groups, r that of units."""

    def __init__(self, r: int, groups: int, device: torch.device) -> None:
        self.r = r
        # Texts with a token where it fires.
        self.texts_fired = torch.zeros(groups, r, dtype=torch.int64, device=device)
        # Sums over the texts of a group, and of squares: of the share of a text's tokens on which the unit fires, and
        # of its mean strength over a text's tokens.
        self.share, self.share_squared = (torch.zeros(groups, r, dtype=torch.float64, device=device) for _ in range(2))
        self.strength = torch.zeros(groups, r, dtype=torch.float64, device=device)
        self.strength_squared = torch.zeros(groups, r, dtype=torch.float64, device=device)
        self.strength_cubed = torch.zeros(r, dtype=torch.float64, device=device)  # over all texts
        self.tokens_fired = torch.zeros(r, dtype=torch.int64, device=device)
        self.largest = torch.zeros(r, device=device)  # strength
        self.histogram = Histogram(r, device)
        self.top, self.sampled = Examples(TOP, r, device), Examples(SAMPLED, r, device)

    def update(
        self, latents: torch.Tensor, mask: torch.Tensor, groups: torch.Tensor, texts: torch.Tensor, draws: torch.Tensor
    ) -> None:
        """Count a batch.

        Args:
            latents: (batch, tokens, r).
            mask: (batch, tokens), bool: which tokens are of a text.
            groups: (batch, G) float64, 1 for the group that a text is of.
            texts: (batch,) int64, their numbers.
            draws: (batch,) float32, a random number in (0, 1) for each text.

        Raises:
            DivergedError: a latent is NaN or infinite.
        """
        latents = latents.float().masked_fill(~mask.unsqueeze(-1), 0)
        strengths = latents.abs()
        fires = strengths > 0
        lengths = mask.sum(1, keepdim=True)
        strongest, positions = strengths.max(1)
        if not torch.isfinite(strongest).all():
            raise DivergedError("a latent is NaN or infinite")
        fired_tokens = fires.sum(1)
        share, strength = fired_tokens / lengths, strengths.sum(1) / lengths
        of_group = groups.T
        self.texts_fired += (of_group @ (fired_tokens > 0).double()).long()
        for values, total, squared in (
            (share.double(), self.share, self.share_squared),
            (strength.double(), self.strength, self.strength_squared),
        ):
            total += of_group @ values
            squared += of_group @ values.square()
        self.strength_cubed += strength.double().pow(3).sum(0)
        self.tokens_fired += fired_tokens.sum(0)
        largest = strongest.max(0).values
        self.largest = torch.maximum(self.largest, largest)
        *_, units = fires.nonzero(as_tuple=True)
        self.histogram.update(strengths[fires], units, largest)
        self.top.update(strongest, texts, positions, latents)
        self.sampled.update(torch.where(strongest > 0, draws[:, None], 0), texts, positions, latents)

    def to(self, device: str) -> ModuleStatistics:
        """Move all to a device."""
        for part in (self, self.histogram, self.top, self.sampled):
            for name, value in vars(part).items():
                if isinstance(value, torch.Tensor):
                    setattr(part, name, value.to(device))
        return self


def bytes_per_unit(groups: int) -> int:
    """What is kept of a unit while texts pass, in bytes."""
    window = 4 * (BEFORE + 1 + BEHIND) + 12
    return (TOP + SAMPLED) * window + 8 * BINS + 4 + 5 * 8 * groups + 8 + 8 + 4


def explorable(model: nn.Module) -> list[tuple[str, MonoLoraLayer, str]]:
    """Name of the layer, layer and adapter's name of all active adapters.

    Raises:
        ValueError: there is none, or one has no unit for each token of a text.
    """
    layers = list(active_adapters(model))
    if not layers:
        raise ValueError("the model has no active MonoLoRA adapter whose units could be explored.")
    if len({adapter for _, _, adapter in layers}) > 1:
        raise ValueError("several adapters are active; explore one at a time (`set_adapter`).")
    for name, layer, _ in layers:
        if isinstance(layer, MonoLoraExpertsProjection):
            raise ValueError(
                f"{name} is of fused experts (`target_parameters`), of which each token reaches some only: their "
                "units cannot be explored yet."
            )
        if isinstance(layer, MonoLoraConvolution):
            raise ValueError(f"{name} is a convolution, whose positions are no tokens: it cannot be explored.")
    return layers


class _Collection:
    """The statistics of all layers."""

    def __init__(self, layers: list[tuple[str, MonoLoraLayer, str]], texts: Texts) -> None:
        self.layers = layers
        self.groups = nn.functional.one_hot(texts.group_of, len(texts.groups)).double()
        self.draws = torch.rand(len(texts), generator=torch.Generator().manual_seed(0)).clamp(min=1e-7)
        self.statistics: dict[str, ModuleStatistics] = {}
        self.batch: Batch
        self.noted: set[str]  # layers that were called in its pass
        self.placed: dict[torch.device, tuple[torch.Tensor, ...]] = {}  # what `update` takes, by device

    def begin(self, batch: Batch) -> None:
        """Expect the latents of a batch."""
        self.batch, self.placed, self.noted = batch, {}, set[str]()

    def note(self, name: str, latents: torch.Tensor, routing: Routing | None, acting: torch.Tensor | None) -> None:
        """Add a layer's latents, as `latents_watched` tells them."""
        if name in self.noted:
            raise ValueError(
                f"{name} is called several times in a pass, so that its units have several latents for each token: "
                "they cannot be explored."
            )
        self.noted.add(name)
        if latents.shape[:2] != self.batch.input_ids.shape:
            raise ValueError(
                f"{name} sees an input of shape {tuple(latents.shape[:-1])} where the texts are "
                f"{tuple(self.batch.input_ids.shape)}, so that it cannot be told which row is which token's."
            )
        device, chosen = latents.device, self.batch.texts
        if device not in self.placed:
            parts = (self.batch.attention_mask.bool(), self.groups[chosen], chosen, self.draws[chosen])
            self.placed[device] = tuple(part.to(device) for part in parts)
        if name not in self.statistics:
            self.statistics[name] = ModuleStatistics(latents.shape[-1], self.groups.shape[1], device)
        try:
            self.statistics[name].update(latents, *self.placed[device])
        except DivergedError:
            raise DivergedError(
                f"the latents of {name} hold NaN or infinity: the base's weights do, or its dtype overflowed "
                "(--dtype float32)."
            ) from None


@torch.no_grad()
def collect(model: nn.Module, texts: Texts, batches: Iterable[Batch]) -> dict[str, ModuleStatistics]:
    """Run texts through base and adapter once, and count what each unit does.

    Args:
        model: a causal language model with one active MonoLoRA adapter; it runs in eval mode.
        texts: in groups.
        batches: of them, each text in one.

    Returns:
        By the name of the adapted layer, on the CPU, in the order of `explorable`.

    Raises:
        ValueError: see `explorable`; or a layer does not see one row for each token, or is not called once in a pass.
        DivergedError: a latent is NaN or infinite.
    """
    model = uncompiled(model)
    collection = _Collection(explorable(model), texts)
    device = next(model.parameters()).device
    with in_eval_mode(model), latents_watched(collection.layers, collection.note):
        for batch in batches:
            collection.begin(batch)
            ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    for name, _, _ in collection.layers:
        if name not in collection.statistics:
            raise ValueError(f"{name} is not called in the model's forward pass, so that its units do nothing.")
    return {name: collection.statistics[name].to("cpu") for name, _, _ in collection.layers}
