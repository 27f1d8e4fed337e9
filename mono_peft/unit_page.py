"""The page of an adapter's units: one file of HTML to open from disk or to send, that needs nothing else.

Numbers of all units are in one table, which the page shows a part of at a time. What only a unit's panel shows is kept
as text, a piece for each layer, and parsed when a panel is opened. Latents of examples are letters: "." is exactly
zero, "a" to "z" are 26 equal steps up to the unit's largest strength, "A" to "Z" the same below zero.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from .inventory import SAMPLED, TOP
from .texts import Texts

MOST_BYTES = 24 * 2**20  # of panels; beyond that they get fewer examples, then the least selective units none
FEWER_EXAMPLES = ((TOP, SAMPLED), (4, 2), (2, 1))  # strongest and drawn ones of a unit
_LEVELS = 26


class UnitPage:
    """Takes the records of all units in their order, and gives the page.

    Args:
        facts: what the head of the page says, by name.
        texts: that the records are of.
        threshold: the z from which on a preference is beyond chance.
    """

    def __init__(self, facts: Mapping[str, str], texts: Texts, threshold: float) -> None:
        self.facts, self.texts, self.threshold = facts, texts, threshold
        self.modules: list[str] = []
        self.summary: dict[str, list[Any]] = defaultdict(list)
        self.panels: list[str] = []  # JSON, without examples
        self.examples: list[list[list[str]]] = []  # of each unit: the strongest, and drawn ones; JSON
        self.shown_texts: list[list[list[int]]] = []  # the texts that these are of
        self.vocabulary: dict[str, int] = {}
        self.numbers: dict[tuple[str, int], int] = {}  # of the units
        self.neighbours: list[list[list[list[Any]]]] = []

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a unit's record (`unit_records.py`)."""
        if record["module"] not in self.modules[-1:]:
            self.modules.append(record["module"])
        self.numbers[record["module"], record["index"]] = len(self.panels)
        effects = [effect[0] for effect in (record.get("ablation") or {}).values() if effect]
        lens = record["logits"]
        row = {
            "module": len(self.modules) - 1,
            "index": record["index"],
            "density": record["density"],
            "largest": record["largest"],
            "group": -1 if record["group"] is None else self.texts.groups.index(record["group"]),
            "selectivity": record["selectivity"],
            "z": record["z"],
            "norm": record["decoder_norm"],
            "effect": max(effects, key=abs) if effects else None,
            "token": self._peak(record),
            "raises": self._word(lens["raised"][0][0]) if lens else -1,
        }
        for name, value in row.items():
            self.summary[name].append(_short(value))
        groups = [[*g["texts"], *g["tokens"], g["strength"]] for g in record["groups"].values()]
        ablation = record.get("ablation")
        panel = [
            [record["histogram"]["bin"], record["histogram"]["tokens"]],
            groups,
            [record["chance"]["texts"], record["chance"]["tokens"]],
            lens and [[[self._word(token), change] for token, change in lens[side]] for side in ("raised", "lowered")],
            bool(record["writes"]),
            ablation and list(ablation.values()),
            record.get("provenance"),
        ]
        self.panels.append(_json(_short(panel)))
        kinds = [record["examples"], record["sample"]]
        largest = record["largest"]
        self.examples.append([[self._example(example, largest) for example in kind] for kind in kinds])
        self.shown_texts.append([[example["text"] for example in kind] for kind in kinds])
        self.neighbours.append([record["nearest"]["encoder"], record["nearest"]["decoder"]])

    def _peak(self, record: Mapping[str, Any]) -> int:
        if not record["examples"]:
            return -1
        strongest = record["examples"][0]
        return self._word(strongest["tokens"][strongest["peak"]])

    def _word(self, token: str) -> int:
        return self.vocabulary.setdefault(token, len(self.vocabulary))

    def _example(self, example: Mapping[str, Any], largest: float) -> str:
        letters = "".join(_letter(latent, largest) for latent in example["latents"])
        return _json([example["text"], example["first"], example["peak"], letters])

    def render(self, token: Any) -> str:
        """The page.

        Args:
            token: gives the text of a token id.
        """
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        (strongest, drawn), with_panel = self._within_limit()
        details: list[list[str]] = [[] for _ in self.modules]
        texts: set[int] = set()
        for number, panel in enumerate(self.panels):
            if number not in with_panel:
                details[self.summary["module"][number]].append("null")
                continue
            limits = (strongest, drawn)
            shown = [kind[:limit] for kind, limit in zip(self.examples[number], limits, strict=True)]
            for kind, limit in zip(self.shown_texts[number], limits, strict=True):
                texts.update(kind[:limit])
            near = [
                [[self.numbers[module, index], cosine] for module, index, cosine in neighbours]
                for neighbours in self.neighbours[number]
            ]
            lists = ",".join(f"[{','.join(kind)}]" for kind in shown)
            details[self.summary["module"][number]].append(f"{panel[:-1]},{_json(near)},[{lists}]]")
        written = {}
        for number in sorted(texts):
            group, file, row = self.texts.place(number)
            words = [self._word(token(id_)) for id_ in self.texts.ids(number)]
            written[number] = [self.texts.groups.index(group), file, row, words]
        common = _common_prefix(self.modules)
        data = {
            "modules": [module[len(common) :] for module in self.modules],
            "groups": self.texts.groups,
            "sizes": self.texts.group_of.bincount(minlength=len(self.texts.groups)).tolist(),
            "threshold": self.threshold,
            "units": self.summary,
            "words": list(self.vocabulary),
            "hasEffects": any(effect is not None for effect in self.summary["effect"]),
        }
        folder = files("mono_peft") / "page"
        environment = Environment(loader=FileSystemLoader(str(folder)), undefined=StrictUndefined, autoescape=True)
        environment.filters["script"] = _in_script
        return environment.get_template("units.html.j2").render(
            facts=self.facts,
            prefix=common,
            data=_json(data),
            texts=_json(written),
            details=[f"[{','.join(parts)}]" for parts in details],
            style=(folder / "units.css").read_text(encoding="utf-8"),
            program=(folder / "units.js").read_text(encoding="utf-8"),
            examples=(strongest, drawn),
            left_out=len(self.panels) - len(with_panel),
        )

    def _within_limit(self) -> tuple[tuple[int, int], set[int]]:
        """How many examples of each kind units get, and the units with a panel."""

        def size(number: int, limits: Sequence[int]) -> int:
            kinds = zip(self.examples[number], limits, strict=True)
            return len(self.panels[number]) + 200 + sum(len(e) + 1 for kind, limit in kinds for e in kind[:limit])

        everyone = range(len(self.panels))
        for limits in FEWER_EXAMPLES:
            sizes = [size(number, limits) for number in everyone]
            if sum(sizes) <= MOST_BYTES:
                return limits, set(everyone)
        chosen, used = set(), 0
        z, selectivity = self.summary["z"], self.summary["selectivity"]
        for number in sorted(everyone, key=lambda n: (z[n] < self.threshold, -selectivity[n])):
            used += sizes[number]
            if used > MOST_BYTES:
                break
            chosen.add(number)
        return limits, chosen


def _letter(latent: float, largest: float) -> str:
    if latent == 0 or largest == 0:
        return "."
    level = min(_LEVELS, max(1, math.ceil(abs(latent) / largest * _LEVELS)))
    return chr(ord("a" if latent > 0 else "A") + level - 1)


def _short(value: Any) -> Any:
    """The same with floats of three significant digits, as short as JSON has them."""
    if isinstance(value, float):
        number = float(f"{value:.3g}")
        return int(number) if number.is_integer() and abs(number) < 1e6 else number
    return [_short(item) for item in value] if isinstance(value, (list, tuple)) else value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _in_script(text: str) -> str:
    """JSON as it may stand in a script element: no `<`, so that nothing in it can end the element."""
    return text.replace("<", "\\u003c")


def _common_prefix(modules: Sequence[str]) -> str:
    """What all names begin with, up to a point, as in "base_model.model.model.layers."."""
    first = re.split(r"(?<=\.)", modules[0])[:-1]
    while first and not all(module.startswith("".join(first)) for module in modules):
        first.pop()
    return "".join(first)
