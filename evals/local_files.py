"""Rows of text, from local files and from the hub, with their columns and values checked.

Local files are read from their bytes at every call: `datasets.load_dataset` keeps a copy under a file's path, size and
time of change, so it could give the rows of a file that was replaced since.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset

Row = dict[str, Any]
SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
MAY_BE_EMPTY = ("context", "category")  # of the columns with these names


def text_rows(
    source: str, columns: Sequence[str], *, name: str | None = None, split: str | None = None, advice: str
) -> list[Row]:
    """The rows of a local file or of a data set on the hub, all of whose columns but `label` hold text.

        >>> text_rows("pairs.jsonl.gz", ["prompt", "response"], advice="Give a jsonl or jsonl.gz file.")

    Args:
        source: a file, as `file_rows` reads it; where `split` is given, a name on the hub, the folder of a data set,
            or the address of a csv or parquet file, on the hub also "hf://...".
        columns: that every row must have; those of MAY_BE_EMPTY may be missing in a row, or null.
        name: what errors call the source; None: as it is written.
        split: which rows of a data set, "" for the first split it has; None: the source is a file, taken whole.
        advice: a sentence that says what to give instead.

    Raises:
        ValueError: the source cannot be had, lacks a column, is empty, or has a value that is no text.
    """
    if split is None and not Path(source).is_file():
        raise ValueError(f"{name or f'The data file {source}'} does not exist. {advice}")
    name = name or source
    try:
        rows = file_rows(source) if split is None else _hub_rows(source, split)
    except Exception as error:  # `datasets` raises many kinds for a missing network, set or licence, and broken files
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"Cannot load {name} ({cause}). {advice}") from None
    check_columns(rows, columns, name)
    for column in columns:
        # Labels may be numbers, and so may ids that `datasets` has read from a csv.
        if column != "label" and not (column == "id" and split is not None):
            check_text(rows, column, name, may_be_empty=column in MAY_BE_EMPTY)
    return rows


def labelled_sentences(source: str, split: str = "train") -> list[Row]:
    """The columns `sentence` (text) and `label` (0 or 1) of a data file or of a data set on the hub.

    Args:
        source: a local file, by its suffix one of SUFFIXES, or the name of a data set.
        split: which rows of a data set; a file is taken whole.

    Raises:
        ValueError: as `text_rows`; or a label is neither 0 nor 1, or all are the same.
    """
    is_file = Path(source).suffix in SUFFIXES
    kinds = ", ".join(SUFFIXES)
    rows = text_rows(
        source,
        ["label", "sentence"],
        name=None if is_file else f"the data set {source!r}",
        split=None if is_file else split,
        advice=f"Give a local file ({kinds}) or a data set on the hub, which needs network access, and some of them "
        "`hf auth login`.",
    )
    labels = binary_labels(rows, source)
    if len(set(labels)) == 1:
        raise ValueError(f"{source} has only the label {labels[0]}; both classes are needed.")
    return [{"sentence": row["sentence"], "label": label} for row, label in zip(rows, labels, strict=True)]


def _hub_rows(source: str, split: str) -> list[Row]:
    """A split of a data set; a folder is read anew, because `datasets` knows its files by time and size."""
    with tempfile.TemporaryDirectory() as cache:
        options: dict[str, Any] = {"split": split} if split else {}
        options |= {"cache_dir": cache, "keep_in_memory": True} if Path(source).is_dir() else {}
        if source.startswith(("https://", "hf://")):
            loaded = load_dataset(Path(source).suffix[1:], data_files=source, **options)
        else:
            loaded = load_dataset(source, **options)
        return list((loaded if split else next(iter(loaded.values()))).to_list())


def file_rows(path: str | Path) -> list[Row]:
    """The rows of a csv, tsv, parquet, json or jsonl file, also gzipped; a name that says none of these is json.

    A tsv has no quotation marks, as GLUE's files hold bare ones. All values of a csv or tsv are text. A json file
    holds a list of objects, or an object a line.

    Raises:
        ValueError: the file is not what its name says; names the row or line.
        OSError: the file cannot be read.
    """
    path = Path(path)
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        content, path = _unzipped(content), path.with_suffix("") if path.suffix == ".gz" else path
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows: list[Row] = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
        return rows
    text = content.decode("utf-8-sig")  # without the byte order mark that some editors write
    if path.suffix in (".csv", ".tsv"):
        return _separated(text, path.suffix == ".tsv")
    return _json(text)


def _unzipped(content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except EOFError as error:
        raise ValueError(f"the gzip file is cut off ({error})") from None


def _separated(text: str, is_tsv: bool) -> list[Row]:
    source = io.StringIO(text, newline="")
    reader = csv.reader(source, delimiter="\t", quoting=csv.QUOTE_NONE) if is_tsv else csv.reader(source, strict=True)
    try:
        lines = [line for line in reader if line]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    if not lines:
        raise ValueError("the file is empty")
    header, *body = lines
    if len(set(header)) < len(header):
        raise ValueError(f"the header names a column twice: {', '.join(header)}")
    for number, line in enumerate(body, 1):
        if len(line) != len(header):
            raise ValueError(f"row {number} has {len(line)} fields, the header has {len(header)}")
    return [dict(zip(header, line, strict=True)) for line in body]


def _json(text: str) -> list[Row]:
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:  # not splitlines(), which would also cut at separators that text may hold
            rows = [_json_line(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    other = next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if other is not None:
        raise ValueError(f"row {other} is {rows[other - 1]!r:.80}, not an object")
    return list(rows)


def _json_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON ({error})") from None


def check_columns(rows: Sequence[Row], columns: Sequence[str], source: str) -> None:
    """Raise ValueError if there are no rows, or if no row has one of the columns."""
    if not rows:
        raise ValueError(f"{source} has no rows.")
    names = list(dict.fromkeys(name for row in rows for name in row))
    missing = sorted(set(columns) - set(names))
    if missing:
        raise ValueError(f"{source} lacks the column(s) {', '.join(missing)}; it has {', '.join(names)}.")


def check_text(rows: Sequence[Row], column: str, source: str, may_be_empty: bool = False) -> None:
    """Raise ValueError for the first row (counted from 1) whose value is not text, or only white space.

    Args:
        may_be_empty: allows white space, nothing, null and a missing value.
    """
    for number, row in enumerate(rows, 1):
        value = row.get(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            if may_be_empty:
                continue
            problem = "missing" if value is None else "empty"
        elif not isinstance(value, str):
            problem = f"{value!r:.80}, which is not text"
        elif not value.isprintable() and any(0xD800 <= ord(character) < 0xE000 for character in value):
            problem = f"{value!r:.80}, which holds half a surrogate pair"
        else:
            continue
        raise ValueError(f"{source}, row {number}: the {column} is {problem}.")


def binary_labels(rows: Sequence[Row], source: str) -> list[int]:
    """The column `label`, 0 or 1, also written as 0.0 and 1.0 or, in a csv or tsv, as text.

    Raises:
        ValueError: another label; names the first row (counted from 1) that has one.
    """
    texts = {"0": 0, "0.0": 0, "1": 1, "1.0": 1} if Path(source).suffix in (".csv", ".tsv") else {}
    labels = []
    for number, row in enumerate(rows, 1):
        value = row.get("label")
        label = texts.get(value) if isinstance(value, str) else value
        if label not in (0, 1):
            raise ValueError(f"{source}, row {number}: the label is {value!r}; 0 (negative) or 1 is needed.")
        labels.append(int(label))
    return labels
