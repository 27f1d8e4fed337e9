"""`python -m evals compare A B [...]`: do two or more runs differ on the same prompts?

print(compare(["runs/safety:base", "runs/safety:lora-seed0", "theirs=lm_eval_output/their-model"]).text())
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from evals.paired import POWER, holm, paired_test
from evals.registry import REFUSED, judge_kind
from evals.terminal import WIDTH, table_text
from evals.values import ArmValues, Measured, read_arms
from vision_bench.runs import write_atomic
from vision_bench.runs.settings import differences

_MOST_NAMED = 5  # prompts that a refusal names


class Comparison(NamedTuple):
    """Every comparison with the first arm, a row each, and what could not be compared."""

    rows: pd.DataFrame
    not_compared: list[str]  # sentences

    def text(self) -> str:
        """A table of at most 100 columns, and what it says."""
        body = [
            [
                f"{row.task} {row.metric}" + (f", {row.category}" if row.category else "") + _by(row),
                row.arm,
                f"{row.n}" + (f" (-{row.left_out})" if row.left_out else ""),
                _number(row.reference_value, row),
                _number(row.value, row),
                f"{_number(row.difference, row, '+')} [{_number(row.low, row)}, {_number(row.high, row)}]",
                f"{row.p_value:.2g}",
                f"{row.p_holm:.2g}",
                _number(row.detectable, row),
            ]
            for row in self.rows.itertuples()
        ]
        reference = self.rows["reference"].iloc[0]
        header = ["measure", "arm", "prompts", reference, "arm's", "difference [95 %]", "p", "Holm", "detectable"]
        text = table_text(f"Compared with {reference} on the same prompts", header, body, left=2)
        found = int((self.rows["p_holm"] < 0.05).sum())
        sentences = [
            "Shares in percent. p: McNemar's exact test of shares, sign flips of other values. Holm: adjusted for all "
            f"{len(self.rows)} rows, {found} of which are below 0.05.",
            "Detectable: the smallest difference that so many prompts show at 5 % in "
            f"{POWER:.0%} of cases; where a difference is smaller, finding none does not mean that there is none.",
            *(f"Not compared: {sentence}" for sentence in self.not_compared),
        ]
        return text + "".join(f"{textwrap.fill(sentence, WIDTH)}\n" for sentence in sentences)

    def write(self, path: Path) -> None:
        """Write all columns of the rows as .csv or .json."""
        check_output(path)
        rows = self.rows
        text = rows.to_csv(index=False, lineterminator="\n") if path.suffix == ".csv" else _json(rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)


def check_output(path: Path) -> None:
    """Raise ValueError if the rows cannot be written there."""
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"--output is {path}, which must end in .csv or .json.")
    if path.is_dir():
        raise ValueError(f"--output is {path}, which is a folder; name a file in it.")


def _json(rows: pd.DataFrame) -> str:
    return json.dumps(rows.astype(object).where(rows.notna(), None).to_dict("records"), indent=2) + "\n"


def _by(row: object) -> str:
    judge, kind = str(row.judge), str(row.filter)  # type: ignore[attr-defined]
    return f" ({judge or kind})" if judge or kind not in ("", "none") else ""


def _number(value: float, row: object, sign: str = "") -> str:
    is_share = row.test == "McNemar"  # type: ignore[attr-defined]
    return f"{100 * value:{sign}.1f}" if is_share else f"{value:{sign}.3g}"


def compare(runs: Sequence[str], *, categories: bool = False, allow: Iterable[str] = ()) -> Comparison:
    """Compare the first arm of the runs with every other, on each measure that both have.

    Args:
        runs: as `evals.values.read_arms` takes them; the first arm of the first is the reference.
        categories: a row for each category of prompts too.
        allow: settings that the arms may differ in, because they are what is compared.

    Raises:
        ValueError: a run cannot be read, there is only one arm, two have one name or share no measure, or the arms
            were asked other prompts or under other settings; says which.
    """
    arms = [arm for run in runs for arm in read_arms(run)]
    twice = [name for name, count in Counter(arm.name for arm in arms).items() if count > 1]
    if twice:
        raise ValueError(f"Two arms are called {', '.join(twice)}; tell them apart by NAME=PATH.")
    if len(arms) < 2:
        raise ValueError(f"There is nothing to compare {arms[0].name if arms else 'no arm'} with; name two runs.")
    reference, *others = arms
    rows: list[dict[str, object]] = []
    not_compared = []
    for other in others:
        shared = [key for key in reference.values if key in other.values and _is_compared(key)]
        if not shared:
            raise ValueError(
                f"{reference.name} and {other.name} share no measure. The first has "
                f"{_named(map(str, reference.values))}; the second {_named(map(str, other.values))}."
            )
        problems = [problem for key in shared for problem in _problems(key, reference, other, set(allow))]
        if problems:
            listed = "".join(f"\n- {problem}" for problem in dict.fromkeys(problems))
            raise ValueError(f"{reference.name} and {other.name} cannot be compared prompt by prompt:{listed}")
        for arm, lacks in ((reference, other), (other, reference)):
            lacking = [str(key) for key in arm.values if key not in lacks.values and _is_compared(key)]
            if lacking:
                not_compared.append(f"{lacks.name} lacks {_named(lacking)} of {arm.name}.")
        for key in shared:
            rows += _rows(key, reference, other, categories)
    table = pd.DataFrame(rows)
    if table.empty:
        raise ValueError("No prompt has a value in both arms: the judges decided none of them.")
    table.insert(table.columns.get_loc("p_value") + 1, "p_holm", holm(table["p_value"].tolist()))
    counts = ["only_arm", "only_reference"]
    return Comparison(table.astype(dict.fromkeys(counts, "Int64")), not_compared)


def _is_compared(key: Measured) -> bool:
    """Whether a measure is more than a part of another, for which Holm's adjustment would charge all others."""
    return key.metric not in judge_kind(key.judge).labels or key.metric == REFUSED


def _problems(key: Measured, reference: ArmValues, other: ArmValues, allowed: set[str]) -> Iterable[str]:
    """What differs between two arms in prompts and settings of a measure."""
    first, second = reference.values[key], other.values[key]
    for name, some, rest in ((reference.name, first, second), (other.name, second, first)):
        only = [prompt for prompt in some if prompt not in rest]
        if only:
            yield f"{key.task}: {len(only)} of {len(some)} prompts are in {name} alone ({_named(only)})"
    both = [prompt for prompt in first if prompt in second]
    changed = {prompt: _changed(first[prompt].asked, second[prompt].asked) for prompt in both}
    changed = {prompt: parts for prompt, parts in changed.items() if parts}
    if changed:
        parts = sorted(set().union(*changed.values()))
        yield f"{key.task}: {len(changed)} prompts have another {' and '.join(parts)} ({_named(changed)})"
    one, two = (arm.settings[key] for arm in (reference, other))
    # Samples of lm-eval say less of how they were made than ours, and without their results file nothing.
    known = (one.keys() | two.keys() if key.judge else one.keys() & two.keys()) - allowed
    one, two = ({name: value for name, value in settings.items() if name in known} for settings in (one, two))
    told = differences(one, two, nested=True)
    if told:
        yield f"{key}, settings ({reference.name} there, {other.name} now): {told}"


def _changed(first: dict[str, str], second: dict[str, str]) -> set[str]:
    return {part for part in first.keys() & second.keys() if first[part] != second[part]}


def _rows(key: Measured, reference: ArmValues, other: ArmValues, categories: bool) -> Iterable[dict[str, object]]:
    first, second = other.values[key], reference.values[key]
    of_categories = {value.category for value in first.values()} - {None}
    for category in [None, *sorted(of_categories, key=str)] if categories and len(of_categories) > 1 else [None]:
        asked = [prompt for prompt in first if category in (None, first[prompt].category)]
        pairs = [(first[prompt].value, second[prompt].value) for prompt in asked]
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        if not both:
            continue
        test = paired_test([a for a, _ in both], [b for _, b in both])
        yield {
            **key._asdict(),
            "category": category or "",
            "arm": other.name,
            "reference": reference.name,
            "n": test.n,
            "left_out": len(pairs) - len(both),  # a judge did not decide on one of the two answers
            "value": test.first,
            "reference_value": test.second,
            "difference": test.difference,
            "low": test.low,
            "high": test.high,
            "test": test.test,
            "p_value": test.p_value,
            "detectable": test.detectable,
            "only_arm": test.only_first,
            "only_reference": test.only_second,
        }


def _named(names: Iterable[str]) -> str:
    """The first few of names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _MOST_NAMED} more" if len(listed) > _MOST_NAMED else ""
    return ", ".join(listed[:_MOST_NAMED]) + more
