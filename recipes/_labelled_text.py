"""Labelled sentences from the hub or from local files, checked before anything long starts."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, Value, load_dataset

_LOADERS = {
    ".tsv": ("csv", {"sep": "\t", "quoting": 3}),  # GLUE's files hold bare quotation marks
    ".csv": ("csv", {}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}


def load_labelled_text(source: str, split: str = "train") -> Dataset:
    """Load a data set with the columns `sentence` (text) and `label` (0 or 1).

    Args:
        source: a local file (tsv, csv, jsonl, json, parquet) or the name of a data set on the hub.
        split: which split of a data set on the hub; a file is taken whole.

    Raises:
        ValueError: the file or data set cannot be had, lacks a column, is empty, has a label other than 0 and 1, an
            empty sentence, or only one class.
    """
    path = Path(source)
    if path.suffix in _LOADERS:
        if not path.is_file():
            raise ValueError(f"The data file {source} does not exist.")
        kind, options = _LOADERS[path.suffix]
        try:
            rows = load_dataset(kind, data_files=source, split="train", **options)
        except Exception as error:  # `datasets` wraps the parsers' errors in its own, and an empty file in others
            cause = error.__cause__ or error
            raise ValueError(f"Cannot read {source} as {path.suffix[1:]}: {cause}") from None
    else:
        try:
            rows = load_dataset(source, split=split)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"Cannot load the data set {source!r} ({_first_line(error)}). It is not a local file "
                f"({', '.join(_LOADERS)}); a data set on the hub needs network access, and some need `hf auth login`."
            ) from None
    _check(rows, source)
    return rows.select_columns(["sentence", "label"]).cast_column("label", Value("int64"))


def _check(rows: Dataset, source: str) -> None:
    missing = {"sentence", "label"} - set(rows.column_names)
    if missing:
        raise ValueError(
            f"{source} lacks the column(s) {', '.join(sorted(missing))}; it has {', '.join(rows.column_names)}. "
            "Needed are `sentence` (text) and `label` (0 negative, 1 positive)."
        )
    if len(rows) == 0:
        raise ValueError(f"{source} has no rows.")
    labels = rows["label"][:]
    wrong = next((i for i, label in enumerate(labels) if label not in (0, 1)), None)
    if wrong is not None:
        raise ValueError(f"{source}, row {wrong + 1}: the label is {labels[wrong]!r}; 0 (negative) or 1 is needed.")
    if len(set(labels)) == 1:
        raise ValueError(f"{source} has only the label {labels[0]}; both classes are needed.")
    empty = next((i for i, s in enumerate(rows["sentence"][:]) if not isinstance(s, str) or not s.strip()), None)
    if empty is not None:
        raise ValueError(f"{source}, row {empty + 1}: the sentence is empty or not text.")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
