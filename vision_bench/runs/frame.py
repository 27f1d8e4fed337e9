"""Rows of a run as a pandas data frame: one column per setting, for tables that group and pair them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from vision_bench.runs.statistics import Interval, interval


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
