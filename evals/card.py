"""The acceptance card: what an adapter has to keep, written as a YAML file before anything is measured.

    card = read_card("card.yaml")
    [line.name for line in card.lines]  # ["task", "harm", "over_refusal", ...]

`evals/cards/` has examples, docs/evals.md says what each line means.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evals.forgetting import KL, LOSS_DIFFERENCE
from evals.registry import JUDGES, REFUSED, judge_kind
from evals.settings import DTYPES


@dataclass(frozen=True)
class Kind:
    """A kind of line: the keys that it needs, those that it may have, and what its values are."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    judge: str = ""  # that is asked unless the line names one
    metric: str = ""  # unless the line names one; of a judge's line "" is its own share of unsafe outcomes
    bound: str = "at_most"  # or "at_least", "" for either
    is_share: bool = True  # in [0, 1], so that thresholds are


KINDS = {
    "task": Kind(("task", "metric"), ("category", "versus", "filter"), bound="", is_share=False),
    "harm": Kind(("task",), ("judge", "metric", "category", "versus"), judge="refusal"),
    "over_refusal": Kind(("task",), ("judge", "metric", "category", "versus"), judge="refusal", metric=REFUSED),
    "coherence": Kind(("task",), ("judge", "metric", "category", "versus"), judge="coherence"),
    "forgetting": Kind((), ("metric", "texts"), metric=KL, is_share=False),
    "silence": Kind(("prompts",), ("response_tokens",), metric="silent", bound="at_least"),
    "judge_flips": Kind((), ("judge", "answers"), judge="refusal", metric="flipped"),
}
FORGETTING_METRICS = (KL, LOSS_DIFFERENCE)
_ANSWERS = {
    "limit": int, "max_new_tokens": int, "batch_size": int, "dtype": str, "load_in_4bit": bool, "thinking": str,
    "task_data": dict,
}  # fmt: skip
_TEXTS = ("task", "metric", "judge", "category", "filter", "versus", "texts", "prompts")


@dataclass(frozen=True)
class Line:
    """One requirement: a measure, its threshold, and how far beyond it a good adapter is.

    The measure has to lie on the threshold's good side with its whole 95 % interval.
    """

    name: str  # of its kind, with a number where there are several
    kind: str
    task: str = ""
    metric: str = ""
    judge: str = ""
    category: str | None = None  # of the prompts; None: all
    filter: str = "none"  # of lm-eval
    versus: str | None = None  # "base": the difference to the base on the same prompts
    at_most: float | None = None
    at_least: float | None = None
    margin: float = 0.0  # a measure this far beyond the threshold is to be accepted with the card's power
    texts: str | None = None  # file of neutral texts
    prompts: str | None = None  # file of prompts that must be silent
    response_tokens: int = 0
    answers: int = 50  # of which a judge gets twins

    @property
    def threshold(self) -> float:
        """Whichever of the two the line has."""
        return self.at_most if self.at_most is not None else float(self.at_least or 0.0)

    @property
    def is_share(self) -> bool:
        """Whether the measure is a share of prompts, and not a difference or a mean."""
        return KINDS[self.kind].is_share and self.versus is None

    @property
    def text(self) -> str:
        """The requirement in words."""
        what = {
            "forgetting": "KL to the base, nats a token" if self.metric == KL else "rise of the loss, nats a token",
            "silence": f"silent prompts of {Path(self.prompts or '').name}",
            "judge_flips": f"flipped verdicts of {self.judge} on twins of answers",
        }.get(self.kind, f"{self.task} {self.metric}" + (f" ({self.judge})" if self.judge else ""))
        what += f", {self.category}" if self.category else ""
        what += " - base" if self.versus else ""
        return f"{what} {'<=' if self.at_most is not None else '>='} {self.threshold:g}"


@dataclass(frozen=True)
class Card:
    """A whole card."""

    title: str
    lines: list[Line]
    power: float = 0.8
    answers: dict[str, Any] = field(default_factory=dict)  # settings of `evals.settings.GenerateSettings`

    @property
    def tasks(self) -> list[str]:
        """The tasks to answer, each once."""
        return list(dict.fromkeys(line.task for line in self.lines if line.task))

    @property
    def judges(self) -> list[str]:
        """The judges of answers, each once."""
        return list(dict.fromkeys(line.judge for line in self.lines if line.judge and line.kind != "judge_flips"))

    def as_dict(self) -> dict[str, Any]:
        """What a JSON file holds of it."""
        return asdict(self)


class _CardLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML's loader would take the last and drop the first requirement."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, count in Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)).items():
            if count > 1:
                problem = f"{key} stands {count} times; several lines of a kind are a list"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def read_card(path: str | Path) -> Card:
    """Read and check a card; nothing else is read, so that a wrong one is told at once.

    Raises:
        ValueError: the file cannot be read, has an unknown key, lacks one, a value is not allowed, or a file that it
            names is not there; says which and what is allowed.
    """
    path = Path(path)
    try:
        told = yaml.load(path.read_text(encoding="utf-8"), _CardLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The card {path} cannot be read ({error}).") from None
    if not isinstance(told, dict):
        raise ValueError(f"The card {path} has no lines; it takes NAME: VALUE, see evals/cards/.")
    allowed = ("title", "power", "answers", *KINDS)
    if unknown := [str(key) for key in told if key not in allowed]:
        raise ValueError(f"The card {path} has {', '.join(unknown)}; allowed are {', '.join(allowed)}.")
    power = _number(told.get("power", 0.8), "power", path)
    if not 0.5 <= power < 1:
        raise ValueError(f"The card {path} has the power {power}; allowed is 0.5 to below 1, usual are 0.8 and 0.9.")
    lines = []
    for kind in KINDS:
        given = told.get(kind)
        parts = given if isinstance(given, list) else [] if given is None else [given]
        if kind in told and not parts:
            raise ValueError(f"The card {path} has an empty {kind}; give its keys, or leave it out.")
        for number, part in enumerate(parts, 1):
            lines.append(_line(f"{kind}_{number}" if len(parts) > 1 else kind, kind, part, path))
    if not lines:
        raise ValueError(f"The card {path} asks for nothing; name at least one of {', '.join(KINDS)}.")
    _check_judges(lines, path)
    answers = _answers(told.get("answers") or {}, path)
    if answers.get("load_in_4bit") and any(line.kind == "silence" for line in lines):
        raise ValueError(
            f"The card {path} has silence, which is certified on the base's own weights, and answers of a base in "
            "4 bits, whose activations are others: leave out one of the two."
        )
    return Card(str(told.get("title", path.stem)), lines, power, answers)


def _line(name: str, kind: str, told: Any, path: Path) -> Line:
    where = f"The card {path}, {name},"
    if not isinstance(told, Mapping):
        raise ValueError(f"{where} is {told!r}; it takes keys, such as at_most: 0.05.")
    rules = KINDS[kind]
    bounds = (rules.bound,) if rules.bound else ("at_least", "at_most")
    allowed = (*rules.required, *rules.optional, *bounds, "margin")
    if unknown := [str(key) for key in told if key not in allowed]:
        raise ValueError(f"{where} has {', '.join(unknown)}; allowed are {', '.join(allowed)}.")
    if missing := [key for key in rules.required if not told.get(key)]:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    if sum(told.get(bound) is not None for bound in bounds) != 1:
        raise ValueError(f"{where} needs {' or '.join(bounds)}, and one of them.")
    for key in _TEXTS:
        if told.get(key) is not None and not isinstance(told[key], str):
            raise ValueError(f"{where} has {told[key]!r} for {key}; a text is needed.")
    values = {key: value for key, value in told.items() if value is not None}
    bound = next(bound for bound in bounds if bound in values)
    values[bound] = _number(values[bound], f"{name}.{bound}", path)
    judge = values.get("judge", rules.judge)
    metric = values.get("metric") or rules.metric or (judge_kind(judge).unsafe if judge else "")
    line = Line(**{"name": name, "kind": kind, **values, "judge": judge, "metric": metric, "margin": 0.0})
    _check_threshold(line, bound, where)
    margin = _number(told["margin"], f"{name}.margin", path) if "margin" in told else _usual_margin(line)
    if not margin > 0:
        raise ValueError(f"{where} has the margin {margin}; it must be above 0.")
    if line.is_share:
        reach = line.threshold if bound == "at_most" else 1 - line.threshold
        if margin > reach:
            raise ValueError(f"{where} has the margin {margin}, but beyond {line.threshold} there is only {reach:g}.")
    if line.kind == "forgetting" and metric not in FORGETTING_METRICS:
        raise ValueError(f"{where} has the metric {metric!r}; allowed are {', '.join(FORGETTING_METRICS)}.")
    if line.versus not in (None, "base"):
        raise ValueError(f"{where} is versus {line.versus!r}; only base is allowed.")
    for key in ("response_tokens", "answers"):
        value = getattr(line, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < (key == "answers"):
            raise ValueError(f"{where} has {value!r} for {key}; a whole number is needed.")
    files = {}
    for key in ("texts", "prompts"):
        file = getattr(line, key)
        if file is not None:
            files[key] = str(found := next((p for p in (path.parent / file, Path(file)) if p.is_file()), file))
            if found == file:
                raise ValueError(f"{where} names the file {file}, which is neither beside the card nor here.")
    return Line(**{**asdict(line), "margin": margin, **files})


def _check_threshold(line: Line, bound: str, where: str) -> None:
    """Raise ValueError for a threshold that no measure, or every measure, would satisfy."""
    value = line.threshold
    if line.is_share and not 0 < value < 1:
        hint = " No number of prompts shows that a share is exactly 0 or 1." if value in (0, 1) else ""
        raise ValueError(f"{where} has {bound} {value:g}; allowed is a share between 0 and 1.{hint}")
    if line.versus and KINDS[line.kind].is_share and line.metric != "score" and not -1 < value < 1:
        raise ValueError(f"{where} has {bound} {value:g}; the difference of two shares is between -1 and 1.")
    if line.kind == "forgetting" and line.metric == KL and value <= 0:
        raise ValueError(
            f"{where} has at_most {value:g}; a divergence is above 0 for any adapter that does something."
        )


def _usual_margin(line: Line) -> float:
    """Half of the way to the best share, of other measures half of the threshold."""
    if line.is_share:
        return (line.threshold if line.at_most is not None else 1 - line.threshold) / 2
    return abs(line.threshold) / 2 or 0.02


def _check_judges(lines: list[Line], path: Path) -> None:
    for line in lines:
        if not line.judge:
            continue
        kind, _, model = line.judge.partition("=")
        if kind not in JUDGES or (not model and JUDGES[kind].usage.endswith("=MODEL")):
            usages = ", ".join(row.usage for row in JUDGES.values())
            raise ValueError(f"The card {path}, {line.name}, has the judge {line.judge!r}; allowed are {usages}.")
        graded = [] if JUDGES[kind].labels or line.is_share else ["score"]  # a mean x 100, which is no share
        known = {JUDGES[kind].unsafe, *JUDGES[kind].labels, "flipped", *graded}
        if line.metric not in known:
            raise ValueError(
                f"The card {path}, {line.name}, has the metric {line.metric!r}, which the judge {line.judge} does not "
                f"give; it gives {', '.join(sorted(known - {'flipped'}))}."
            )
    flips = Counter(line.judge for line in lines if line.kind == "judge_flips")
    twice = [judge for judge, count in flips.items() if count > 1]
    if twice:
        raise ValueError(
            f"The card {path} has judge_flips of {', '.join(twice)} more than once; name each judge once."
        )


def _answers(told: Any, path: Path) -> dict[str, Any]:
    if not isinstance(told, Mapping):
        raise ValueError(f"The card {path} has {told!r} for answers; it takes keys, such as max_new_tokens: 64.")
    if unknown := [str(key) for key in told if key not in _ANSWERS]:
        raise ValueError(f"The card {path}, answers, has {', '.join(unknown)}; allowed are {', '.join(_ANSWERS)}.")
    for key, value in told.items():
        kind = _ANSWERS[key]
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise ValueError(f"The card {path}, answers, has {value!r} for {key}; {kind.__name__} is needed.")
    if told.get("dtype", "auto") not in DTYPES:
        raise ValueError(
            f"The card {path}, answers, has the dtype {told['dtype']!r}; allowed are {', '.join(DTYPES)}."
        )
    return {key: value for key, value in told.items() if value is not None}


def _number(value: Any, name: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"The card {path} has {value!r} for {name}; a number is needed.")
    return float(value)
