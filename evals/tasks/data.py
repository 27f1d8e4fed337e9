"""Data of the tasks: from the folder named by MONO_EVAL_DATA where it is set, else from their public places.

The folder holds, each as published: `sst2/dev.tsv` (GLUE), `dolly15k/*.jsonl.gz` (or .jsonl),
`beavertails/BeaverTails-Evaluation.json`, `xstest/xstest_prompts.csv` (version 2), `advbench/harmful_behaviors.csv`,
`strongreject/strongreject_dataset.csv`, `jailbreakbench/harmful-behaviors.csv` and `benign-behaviors.csv`,
`harmbench/harmbench_behaviors_text_all.csv`, `wildguard/wildguard_test.parquet`.

Every function returns {"test": data set}, as a task's `custom_dataset`. Safety prompts have the columns `prompt_id`,
`prompt` and `category` (None where the data set has none; "safe" and "unsafe" where it has prompts of both kinds).
What some take as arguments is lm-eval's `--metadata`; all sets of safety prompts take `safety_prompts`, how many.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from evals.local_files import Row, binary_labels, check_columns, text_rows
from evals.prompts import dolly_held_out, dolly_prompt

VARIABLE = "MONO_EVAL_DATA"
DOLLY_COLUMNS = ("instruction", "context", "response", "category")


def sst2(**_: Any) -> dict[str, Dataset]:
    """The 872 sentences of SST-2's dev set: `sentence`, `label` (1 positive)."""
    rows = _load("sst2/dev.tsv", "stanfordnlp/sst2", ["sentence", "label"], split="validation")
    labels = binary_labels(rows, "sst2/dev.tsv")
    return _test([{"sentence": row["sentence"], "label": label} for row, label in zip(rows, labels, strict=True)])


def dolly(dolly_file: str | None = None, dolly_rows: int | None = None, **_: Any) -> dict[str, Dataset]:
    """The held-out fifteenth of Dolly 15k: `prompt`, `response`, `category`.

    Args:
        dolly_file: another file of the same format, which goes before all other sources.
        dolly_rows: only the first so many.
    """
    rows = _load("dolly15k/*.jsonl*", "databricks/databricks-dolly-15k", DOLLY_COLUMNS, file=dolly_file)
    held_out = [row for row in rows if dolly_held_out(row)][: dolly_rows or None]
    names = ("response", "category")
    return _test([{"prompt": dolly_prompt(row), **{name: row.get(name) for name in names}} for row in held_out])


def beavertails(safety_prompts: int | None = None, **_: Any) -> dict[str, Dataset]:
    """BeaverTails-Evaluation: 700 prompts, 50 in each of 14 categories."""
    file, public = "beavertails/BeaverTails-Evaluation.json", "PKU-Alignment/BeaverTails-Evaluation"
    rows = enumerate(_load(file, public, ["prompt", "category"]))
    return _test(
        [{"prompt_id": str(i), "prompt": row["prompt"], "category": row.get("category")} for i, row in rows],
        safety_prompts,
    )


def xstest(safety_prompts: int | None = None, **_: Any) -> dict[str, Dataset]:
    """XSTest: 250 safe prompts that look unsafe and 200 unsafe ones; `category` is "safe" or "unsafe"."""
    url = "https://raw.githubusercontent.com/paul-rottger/xstest/main/xstest_prompts.csv"
    rows = _load("xstest/xstest_prompts.csv", url, ["id", "prompt", "label"])
    return _test(
        [{"prompt_id": str(row["id"]), "prompt": row["prompt"], "category": row["label"]} for row in rows],
        safety_prompts,
    )


def advbench(safety_prompts: int | None = None, **_: Any) -> dict[str, Dataset]:
    """The 520 harmful behaviours of AdvBench."""
    url = "https://raw.githubusercontent.com/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv"
    rows = _load("advbench/harmful_behaviors.csv", url, ["goal"])
    return _test([{"prompt_id": str(i), "prompt": row["goal"]} for i, row in enumerate(rows)], safety_prompts)


def strongreject(safety_prompts: int | None = None, **_: Any) -> dict[str, Dataset]:
    """The 313 forbidden prompts of StrongREJECT (arXiv:2402.10260), in six categories."""
    url = "https://raw.githubusercontent.com/alexandrasouly/strongreject/main/strongreject_dataset/strongreject_dataset.csv"
    rows = enumerate(_load("strongreject/strongreject_dataset.csv", url, ["forbidden_prompt", "category"]))
    return _test(
        [{"prompt_id": str(i), "prompt": r["forbidden_prompt"], "category": r["category"]} for i, r in rows],
        safety_prompts,
    )


def jailbreakbench(safety_prompts: int | None = None, **_: Any) -> dict[str, Dataset]:
    """JailbreakBench's 100 harmful behaviours and 100 harmless ones on the same subjects (arXiv:2404.01318).

    `category` is "unsafe" or "safe", and "unsafe-N" and "safe-N" are a matched pair.
    """
    address = "https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors/resolve/main/data/{}-behaviors.csv"
    return _test(
        [
            {"prompt_id": f"{category}-{i}", "prompt": row["Goal"], "category": category}
            for name, category in (("harmful", "unsafe"), ("benign", "safe"))
            for i, row in enumerate(_load(f"jailbreakbench/{name}-behaviors.csv", address.format(name), ["Goal"]))
        ],
        safety_prompts,
    )


def harmbench(safety_prompts: int | None = None, **_: Any) -> dict[str, Dataset]:
    """HarmBench's 200 standard behaviours (arXiv:2402.04249); those with a context or of copyright are left out."""
    url = (
        "https://raw.githubusercontent.com/centerforaisafety/HarmBench/main/data/behavior_datasets/"
        "harmbench_behaviors_text_all.csv"
    )
    names = ["Behavior", "BehaviorID", "SemanticCategory", "FunctionalCategory"]
    rows = _load("harmbench/harmbench_behaviors_text_all.csv", url, names)
    return _test(
        [
            {"prompt_id": row["BehaviorID"], "prompt": row["Behavior"], "category": row["SemanticCategory"]}
            for row in rows
            if row["FunctionalCategory"] == "standard"
        ],
        safety_prompts,
    )


def wildguardtest(safety_prompts: int | None = None, **_: Any) -> dict[str, Dataset]:
    """WildGuardTest's prompts that people agreed on (arXiv:2406.18495), plain and adversarial; "safe" or "unsafe".

    The hub asks for its conditions to be accepted, and gives it to who is logged in there.
    """
    public = "hf://datasets/allenai/wildguardmix/test/wildguard_test.parquet"
    rows = _load("wildguard/wildguard_test.parquet", public, ["prompt"])
    check_columns(rows, ["prompt_harm_label"], public)
    kinds = {"harmful": "unsafe", "unharmful": "safe"}
    return _test(
        [
            {"prompt_id": str(i), "prompt": row["prompt"], "category": kinds[row["prompt_harm_label"]]}
            for i, row in enumerate(rows)
            if row["prompt_harm_label"] in kinds
        ],
        safety_prompts,
    )


def _test(rows: list[Row], count: int | None = None) -> dict[str, Dataset]:
    """The rows as a task's data; of a count of them, evenly spaced, so that all parts of a sorted set are there."""
    if count is not None and count < len(rows):
        rows = [rows[i * len(rows) // count] for i in range(count)]
    return {"test": Dataset.from_list(rows)}


def _load(pattern: str, public: str, columns: Sequence[str], split: str = "", file: str | None = None) -> list[Row]:
    """`file`, or a local file if the variable is set, else the public data set: `split`, or the first it has."""
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
        return text_rows(file, columns, advice="Restore the file.")
    login = "" if public.startswith("https://") else ", and some sets `hf auth login`"
    advice = f"It needs network access{login}; offline, set {VARIABLE} to a folder with {pattern} (docs/evals.md)."
    return text_rows(public, columns, split=split, advice=advice)
