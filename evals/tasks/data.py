"""Data of the tasks: from the folder named by MONO_EVAL_DATA where it is set, else from their public places.

The folder holds, each as published: `sst2/dev.tsv` (GLUE), `dolly15k/*.jsonl.gz` (or .jsonl),
`beavertails/BeaverTails-Evaluation.json`, `xstest/xstest_prompts.csv` (version 2), `advbench/harmful_behaviors.csv`.

Every function returns {"test": data set}, as a task's `custom_dataset`. Safety prompts have the columns `prompt_id`,
`prompt` and `category` (None where the data set has none). What some take as arguments is lm-eval's `--metadata`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from evals.local_files import binary_labels, check_columns, check_text, file_rows
from evals.prompts import dolly_held_out, dolly_prompt

VARIABLE = "MONO_EVAL_DATA"


def sst2(**_: Any) -> dict[str, Dataset]:
    """The 872 sentences of SST-2's dev set: `sentence`, `label` (1 positive)."""
    rows = _load("sst2/dev.tsv", "stanfordnlp/sst2", ["sentence", "label"], split="validation")
    labels = binary_labels(rows.to_list(), "sst2/dev.tsv")
    return _test(Dataset.from_dict({"sentence": rows["sentence"][:], "label": labels}))


def dolly(dolly_file: str | None = None, dolly_rows: int | None = None, **_: Any) -> dict[str, Dataset]:
    """The held-out fifteenth of Dolly 15k: `prompt`, `response`, `category`.

    Args:
        dolly_file: another file of the same format, which goes before all other sources.
        dolly_rows: only the first so many.
    """
    columns = ["instruction", "context", "response", "category"]
    rows = _load("dolly15k/*.jsonl*", "databricks/databricks-dolly-15k", columns, file=dolly_file)
    rows = rows.filter(dolly_held_out).map(lambda row: {"prompt": dolly_prompt(row)})
    rows = rows.select(range(min(dolly_rows or len(rows), len(rows))))
    return _test(rows.select_columns(["prompt", "response", "category"]))


def beavertails(**_: Any) -> dict[str, Dataset]:
    """BeaverTails-Evaluation: 700 prompts, 50 in each of 14 categories."""
    columns = ["prompt", "category"]
    rows = _load("beavertails/BeaverTails-Evaluation.json", "PKU-Alignment/BeaverTails-Evaluation", columns)
    return _test(_numbered(rows.select_columns(columns)))


def xstest(**_: Any) -> dict[str, Dataset]:
    """XSTest: 250 safe prompts that look unsafe and 200 unsafe ones; `category` is "safe" or "unsafe"."""
    url = "https://raw.githubusercontent.com/paul-rottger/xstest/main/xstest_prompts.csv"
    rows = _load("xstest/xstest_prompts.csv", url, ["id", "prompt", "label"])
    return _test(
        rows.map(lambda row: {"prompt_id": str(row["id"]), "category": row["label"]}).select_columns(
            ["prompt_id", "prompt", "category"]
        )
    )


def advbench(**_: Any) -> dict[str, Dataset]:
    """The 520 harmful behaviours of AdvBench."""
    url = "https://raw.githubusercontent.com/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv"
    rows = _load("advbench/harmful_behaviors.csv", url, ["goal"])
    return _test(_numbered(rows.select_columns(["goal"]).rename_column("goal", "prompt")))


def _test(rows: Dataset) -> dict[str, Dataset]:
    return {"test": rows}


def _numbered(rows: Dataset) -> Dataset:
    return rows.map(lambda _, number: {"prompt_id": str(number)}, with_indices=True)


def _load(pattern: str, public: str, columns: list[str], split: str | None = None, file: str | None = None) -> Dataset:
    """`file`, or a local file if the variable is set, else the public data set: `split`, or the only one it has.

    Of a file there are the columns named; all but context and category hold text, and a missing context is "".
    """
    root = os.environ.get(VARIABLE)
    if root and not file:
        files = sorted(Path(root).glob(pattern))
        if not files:
            raise ValueError(
                f"{VARIABLE} is {root!r}, which has no {pattern}; put the file there, or unset {VARIABLE} to load "
                f"{public} from the network."
            )
        if len(files) > 1:
            raise ValueError(
                f"{VARIABLE} is {root!r}, which has {', '.join(file.name for file in files)} for {pattern}: leave one "
                "of them there."
            )
        file = str(files[0])
    if file:
        return _file(file, columns)
    try:
        loaded: DatasetDict = (
            load_dataset("csv", data_files=public) if public.startswith("https") else load_dataset(public)
        )
    except Exception as error:  # `datasets` raises many kinds for a missing network, set or licence
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(
            f"Cannot load {public} ({cause}). It needs network access; offline, set {VARIABLE} to a folder with "
            f"{pattern} (docs/evals.md)."
        ) from None
    rows = loaded[split or next(iter(loaded))]
    missing = sorted(set(columns) - set(rows.column_names))
    if missing:
        raise ValueError(f"{public} lacks the column(s) {', '.join(missing)}; it has {', '.join(rows.column_names)}.")
    return rows


def _file(file: str, columns: list[str]) -> Dataset:
    try:
        rows = file_rows(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot load {file} ({error}). Restore the file.") from None
    check_columns(rows, columns, file)
    for name in columns:
        if name != "label":
            check_text(rows, name, file, may_be_empty=name in ("context", "category"))
    texts = [{name: row.get(name) for name in columns} for row in rows]
    return Dataset.from_list([row | {"context": row["context"] or ""} if "context" in row else row for row in texts])
