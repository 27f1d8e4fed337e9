"""Statistics over rows: means with 95 % intervals, paired differences, data frames and Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats


class Interval(NamedTuple):
    """Mean of n values with the half-width of its 95 % interval (Student's t), None for a single value."""

    mean: float  # NaN of no value
    half_width: float | None
    n: int

    def scaled(self, factor: float) -> Interval:
        """The interval of `factor` times the values, for instance 100 for percent."""
        return Interval(self.mean * factor, None if self.half_width is None else self.half_width * factor, self.n)

    def text(self, digits: int = 2, sign: bool = False) -> str:
        """'91.23 ± 0.45', or only the mean, or '-' where no value is defined."""
        if self.n == 0:
            return "-"
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.{digits}f}"


def interval(values: Sequence[float | None]) -> Interval:
    """95 % interval of the mean over seeds; None, an undefined value, is left out.

    Raises:
        ValueError: there are no values at all.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    numbers = [value for value in values if value is not None]
    n = len(numbers)
    if n < 2:
        return Interval(numbers[0] if numbers else math.nan, None, n)
    mean = sum(numbers) / n
    error = (sum((v - mean) ** 2 for v in numbers) / (n - 1) / n) ** 0.5
    return Interval(mean, float(stats.t.ppf(0.975, n - 1)) * error, n)


def paired_difference(first: Iterable[dict[str, Any]], second: Iterable[dict[str, Any]]) -> Interval | None:
    """Interval of first - second over the seeds that have a value in both, None if they share none."""
    by_seed = {row["seed"]: row["value"] for row in second if row["value"] is not None}
    pairs = [row for row in first if row["value"] is not None and row["seed"] in by_seed]
    differences = [row["value"] - by_seed[row["seed"]] for row in pairs]
    return interval(differences) if differences else None


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A GitHub table, the first `left` columns left-aligned, the others right-aligned."""
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A line for each row, with the columns metric, value, n and seed and one for each key of the rows' config.

    A value or seed of None becomes NaN, and so does a setting that a row lacks.

        from vision_bench.runs import frame, over_seeds, read_rows, select

        rows = frame(read_rows("runs/label_noise/results.jsonl"))
        print(over_seeds(select(rows, "sparsity", features="sae")["value"]).text(3))
    """
    names = ("metric", "value", "n", "seed")
    return pd.DataFrame([{**row["config"], **{name: row[name] for name in names}} for row in rows])


def select(rows: pd.DataFrame, metric: str, **settings: Any) -> pd.DataFrame:
    """The lines of a metric whose settings have these values; None selects lines that lack the setting."""
    chosen = rows[rows["metric"] == metric]
    for name, value in settings.items():
        column = chosen[name] if name in chosen else pd.Series(math.nan, chosen.index)
        chosen = chosen[column.isna() if value is None else column == value]
    return chosen


def over_seeds(values: pd.Series) -> Interval:
    """95 % interval of the mean; NaN is left out, and without any number the interval has n = 0."""
    numbers = values.dropna().tolist()
    return interval(numbers) if numbers else Interval(math.nan, None, 0)


def paired(first: pd.Series, second: pd.Series) -> Interval:
    """Interval of first - second, two series by seed, over the seeds that both have; n = 0 if they share none."""
    return over_seeds(first - second)
