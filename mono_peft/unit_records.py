"""All that is known of each unit, as one record a unit: the lines of `units.jsonl`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .effects import Effect
from .inventory import BEFORE, BEHIND, BINS, Examples, ModuleStatistics, explorable
from .layer import MonoLoraEmbedding, MonoLoraLayer
from .lens import Unembedding, nearest
from .selectivity import beyond_chance, preference, rates_of_texts, rates_of_tokens
from .stream import STREAM, Stream
from .texts import Texts
from .units import Unit

TOKENS, NEIGHBOURS = 8, 3  # of the unembedding, on each side; units nearest by A, and by B
_DIGITS = 4  # of the numbers in a record


class _Kept:
    """Examples of a layer as arrays, of which a unit's part is taken faster."""

    def __init__(self, examples: Examples) -> None:
        self.texts, self.positions = examples.texts.numpy(), examples.positions.numpy()
        self.latents = examples.latents.numpy()
        self.of_unit = [[k for k, score in enumerate(scores) if score > 0] for scores in examples.scores.T.tolist()]


class UnitRecords:
    """The records of all units of an adapter, in the order of its layers.

    Args:
        model: a PeftModel with one active MonoLoRA adapter.
        statistics: of each layer, on all `texts`.
        stream, unembedding: of this model.
    """

    def __init__(
        self,
        model: Any,
        statistics: Mapping[str, ModuleStatistics],
        texts: Texts,
        tokenizer: PreTrainedTokenizerBase,
        stream: Stream,
        unembedding: Unembedding | None,
    ) -> None:
        self.statistics, self.texts, self.stream = statistics, texts, stream
        self.unembedding = unembedding
        self.layers = {name: (layer, adapter) for name, layer, adapter in explorable(model)}
        firsts = accumulate((part.r for part in statistics.values()), initial=0)
        self.offsets = dict(zip(statistics, firsts, strict=False))  # the number of each layer's first unit
        self.units = [Unit(name, index) for name, part in statistics.items() for index in range(part.r)]
        self.fires = torch.cat([part.tokens_fired > 0 for part in statistics.values()])  # (units,)
        self.group_sizes = texts.group_of.bincount(minlength=len(texts.groups))
        self.preferences = {name: preference(part, self.group_sizes) for name, part in statistics.items()}
        self.threshold = beyond_chance(len(self.units) * len(texts.groups))
        self.effects: dict[Unit, dict[str, Effect | None]] = {}  # of each switched off alone
        self.without_adapter: dict[str, Effect | None] = {}  # of all of them
        self.provenance: Mapping[Unit, Sequence[tuple[int, float]]] = {}  # rows of the training data, and scores

        @cache
        def token(id_: int) -> str:
            return token_text(tokenizer, id_)

        self.token = token

    def __len__(self) -> int:
        return len(self.units)

    def most_selective(self, count: int) -> list[Unit]:
        """The most selective units of those beyond chance, then the others, equal ones by z.

        With one group, those that are strongest in the mean over texts.
        """
        if len(self.texts.groups) == 1:
            order = torch.cat([part.strength[0] for part in self.preferences.values()])
            return [self.units[number] for number in order.topk(min(count, int(self.fires.sum()))).indices.tolist()]
        z = torch.cat([part.z for part in self.preferences.values()])
        selectivity = torch.cat([part.selectivity for part in self.preferences.values()])
        worth = torch.where(self.fires, selectivity + (z > self.threshold).double(), -1)
        by_z = z.argsort(descending=True)
        best = by_z[worth[by_z].argsort(descending=True, stable=True)][: min(count, int(self.fires.sum()))]
        return [self.units[number] for number in best.tolist()]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        by_encoder, by_decoder = self._neighbours("encoder"), self._neighbours("decoder")
        for name, part in self.statistics.items():
            of_texts, of_tokens = (rates(part, self.group_sizes) for rates in (rates_of_texts, rates_of_tokens))
            texts_rates, tokens_rates = ([table.tolist() for table in rates] for rates in (of_texts, of_tokens))
            preferred = self.preferences[name]
            strength, groups = preferred.strength.tolist(), preferred.group.tolist()
            selectivity, z = preferred.selectivity.tolist(), preferred.z.tolist()
            layer, adapter = self.layers[name]
            norms = (decoder_columns(layer, adapter).norm(dim=1) * scale_of(layer, adapter)).tolist()
            changes = self._logit_changes(name, part)
            top, sampled = _Kept(part.top), _Kept(part.sampled)
            for i, fired in enumerate(part.tokens_fired.tolist()):
                number = self.offsets[name] + i
                record: dict[str, Any] = {
                    "module": name,
                    "index": i,
                    "density": fired / self.texts.tokens,
                    "dead": not fired,
                    "largest": float(part.largest[i]),
                    "groups": {
                        group: {
                            "texts": [texts_rates[kind][g][i] for kind in range(3)],  # share, and its interval
                            "tokens": [tokens_rates[kind][g][i] for kind in range(3)],
                            "strength": strength[g][i],
                        }
                        for g, group in enumerate(self.texts.groups)
                    },
                    "chance": {"texts": texts_rates[3][i], "tokens": tokens_rates[3][i]},
                    "group": self.texts.groups[groups[i]] if fired else None,
                    "selectivity": selectivity[i],
                    "z": z[i],
                    "beyond_chance": z[i] > self.threshold,
                    "decoder_norm": norms[i],
                    "histogram": {
                        "bin": math.ldexp(1, int(part.histogram.exponents[i])) / BINS if fired else None,
                        "tokens": part.histogram.counts[i].tolist(),
                    },
                    "examples": self._examples(top, i),
                    "sample": self._examples(sampled, i),
                    "writes": STREAM if name in self.stream.writers else None,
                    "logits": None if changes is None or not fired else self._written_tokens(changes, i),
                    "nearest": {
                        "encoder": self._named(by_encoder, number),
                        "decoder": self._named(by_decoder, number),
                    },
                }
                unit = self.units[number]
                if unit in self.effects:
                    record["ablation"] = {group: effect and [*effect] for group, effect in self.effects[unit].items()}
                if made_by := self.provenance.get(unit):
                    record["provenance"] = [[*row] for row in made_by]
                yield rounded(record)

    def _examples(self, kept: _Kept, unit: int) -> list[dict[str, Any]]:
        """The examples of a unit, the strongest first."""
        examples = []
        for k in kept.of_unit[unit]:
            number, position = int(kept.texts[k, unit]), int(kept.positions[k, unit])
            ids = self.texts.ids(number)
            first, end = max(0, position - BEFORE), min(len(ids), position + BEHIND + 1)
            group, file, row = self.texts.place(number)
            examples.append(
                {
                    "group": group,
                    "file": file,
                    "row": row,
                    "text": number,
                    "first": first,
                    "peak": position - first,
                    "tokens": [self.token(id_) for id_ in ids[first:end]],
                    "latents": kept.latents[k, unit, first - position + BEFORE : end - position + BEFORE].tolist(),
                }
            )
        return sorted(examples, key=lambda example: -abs(example["latents"][example["peak"]]))

    def _logit_changes(self, name: str, part: ModuleStatistics) -> dict[str, tuple[list[Any], list[Any]]] | None:
        """Of the tokens that each unit raises and lowers most, their ids, and the changes at the largest latent."""
        if self.unembedding is None or name not in self.stream.writers:
            return None
        layer, adapter = self.layers[name]
        factor = scale_of(layer, adapter) * self.stream.writers[name]
        changes = self.unembedding.changes(decoder_columns(layer, adapter) * factor, TOKENS)
        largest = part.largest[:, None]
        return {
            "raised": (changes.raised.tolist(), (changes.raised_by * largest).tolist()),
            "lowered": (changes.lowered.tolist(), (changes.lowered_by * largest).tolist()),
        }

    def _written_tokens(self, changes: dict[str, tuple[list[Any], list[Any]]], unit: int) -> dict[str, Any]:
        return {
            side: [[self.token(id_), change] for id_, change in zip(ids[unit], by[unit], strict=True)]
            for side, (ids, by) in changes.items()
        }

    def _neighbours(self, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers, (units, NEIGHBOURS), of the units that are nearest, -1 for none, and their cosines.

        Units that fire are compared with those whose vectors lie in the same space: the residual stream, if their
        layers read or write it, else that of their layer alone.
        """
        numbers = torch.full((len(self), NEIGHBOURS), -1)
        cosines = torch.zeros(len(self), NEIGHBOURS)
        vectors_of = encoder_rows if part == "encoder" else decoder_columns
        members = self.stream.readers if part == "encoder" else self.stream.writers
        modules_of: dict[str, list[str]] = defaultdict(list)
        for name in self.layers:
            modules_of[STREAM if name in members else name].append(name)
        for modules in modules_of.values():
            alive = [torch.arange(self.statistics[name].r) for name in modules]
            alive = [own[self.fires[self.offsets[name] + own]] for name, own in zip(modules, alive, strict=True)]
            rows = torch.cat([self.offsets[name] + own for name, own in zip(modules, alive, strict=True)])
            if len(rows) < 2:
                continue
            vectors = [vectors_of(*self.layers[name]) for name in modules]
            device = vectors[0].device
            alike = [v[own.to(v.device)].to(device) for v, own in zip(vectors, alive, strict=True)]
            found, cosine = nearest(torch.cat(alike), NEIGHBOURS)
            numbers[rows, : found.shape[1]] = rows[found]
            cosines[rows, : found.shape[1]] = cosine
        return numbers, cosines

    def _named(self, neighbours: tuple[torch.Tensor, torch.Tensor], number: int) -> list[list[Any]]:
        numbers, cosines = (part[number].tolist() for part in neighbours)
        return [[*self.units[n], cosine] for n, cosine in zip(numbers, cosines, strict=True) if n >= 0]


def encoder_rows(layer: MonoLoraLayer, adapter: str) -> torch.Tensor:
    """What each unit reads, (r, in_features) float32."""
    encoder: Any = layer.monolora_encoder[adapter]
    weight: torch.Tensor = encoder.weight.detach().float()
    return weight.T if isinstance(layer, MonoLoraEmbedding) else weight


def decoder_columns(layer: MonoLoraLayer, adapter: str) -> torch.Tensor:
    """What each unit writes, without the scale s, (r, out_features) float32."""
    decoder: Any = layer.monolora_decoder[adapter]
    weight: torch.Tensor = decoder.weight.detach().float()
    return weight.T


def scale_of(layer: MonoLoraLayer, adapter: str) -> float:
    """What a latent times its column of B is multiplied by: s, and in embeddings that scale their output that, too."""
    return layer.scaling[adapter] * float(getattr(layer.get_base_layer(), "embed_scale", 1))


def token_text(tokenizer: PreTrainedTokenizerBase, id_: int) -> str:
    """A token as it stands in a text, with the space before it that some tokenizers leave out of a lone token."""
    text = str(tokenizer.decode([id_]))
    piece = tokenizer.convert_ids_to_tokens(id_)
    return f" {text}" if str(piece).startswith("▁") and not text.startswith(" ") else text


def rounded(value: Any) -> Any:
    """The same with all numbers of `_DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value
