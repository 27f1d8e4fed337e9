"""Labelled sentences from the hub or from local files, checked before anything long starts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from datasets import Dataset, load_dataset

from evals.local_files import binary_labels, check_columns, check_text, file_rows

_SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")


def load_labelled_text(source: str, split: str = "train") -> Dataset:
    """Load a data set with the columns `sentence` (text) and `label` (0 or 1), in the memory.

    Args:
        source: a local file (tsv, csv, jsonl, json, parquet) or the name of a data set on the hub.
        split: which split of a data set on the hub; a file is taken whole.

    Raises:
        ValueError: the file or data set cannot be had, lacks a column, is empty, has a label other than 0 and 1, a
            sentence that is empty or no text, or only one class.
    """
    path = Path(source)
    if path.suffix in _SUFFIXES:
        if not path.is_file():
            raise ValueError(f"The data file {source} does not exist.")
        try:
            rows = file_rows(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"Cannot read {source} as {path.suffix[1:]}: {error}") from None
    else:
        try:
            rows = hub_rows(source, split).to_list()
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"Cannot load the data set {source!r} ({_first_line(error)}). It is not a local file "
                f"({', '.join(_SUFFIXES)}); a data set on the hub needs network access, and some need `hf auth login`."
            ) from None
    check_columns(rows, ["sentence", "label"], source)
    labels = binary_labels(rows, source)
    if len(set(labels)) == 1:
        raise ValueError(f"{source} has only the label {labels[0]}; both classes are needed.")
    check_text(rows, "sentence", source)
    return Dataset.from_dict({"sentence": [row["sentence"] for row in rows], "label": labels})


def hub_rows(source: str, split: str) -> Dataset:
    """A split of a data set on the hub; a folder is read anew, because `datasets` knows its files by time and size."""
    if not Path(source).is_dir():
        return load_dataset(source, split=split)
    with tempfile.TemporaryDirectory() as cache:
        return load_dataset(source, split=split, cache_dir=cache, keep_in_memory=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
