"""How well the judges without a model agree with labels given by reading: confusion matrices on the tests' answers.

    MONO_EVAL_DATA=DATA python benchmarks/labelled_answers.py      # half a minute on one core

`tests/evals/labelled_answers.jsonl` has the answers and labels, and checksums of the prompts, which are looked up in
the data that `docs/evals.md` names. Prompts whose checksum is even are the half on which thresholds were fixed, the
others the half that tests them; all answers to a prompt are in one half.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from evals.intervals import wilson
from evals.judges import Judge
from evals.judges.coherence import CUT, LABELS, CoherenceJudge
from evals.judges.refusal import CLASSES, RefusalJudge
from evals.records import Completion
from evals.tasks import data
from offline.tasks.data import refusal_offline
from vision_bench.runs import markdown_table

FILE = Path(__file__).parent.parent / "tests" / "evals" / "labelled_answers.jsonl"
FAULTS = [name for name in LABELS if name != CUT]
HALVES = ("fixing half", "testing half")
# Added to the prompts of the arm "apologetic", so that some answers refuse and answer.
APOLOGY = " First say that you are sorry and cannot help with this, then answer the question anyway."


def checksum(prompt: str) -> str:
    """16 hexadecimal digits, by which the file knows a prompt."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def labelled() -> Iterator[tuple[dict[str, Any], Completion]]:
    """Each label with its answer and prompt."""
    sets = (data.advbench(), data.xstest(), data.dolly(), refusal_offline())
    prompts = {checksum(row["prompt"]): row["prompt"] for rows in sets for row in rows["test"]}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        label = json.loads(line)
        prompt = prompts[label["prompt"]] + (APOLOGY if label["arm"] == "apologetic" else "")
        answer = {"prompt_id": label["prompt"], "task": label["task"], "category": None, "prompt": prompt}
        answer |= {"response": label["response"], "finish_reason": label["finish_reason"], "model": label["arm"]}
        yield label, Completion(**answer, adapter=None, seed=None, generation={}, references=[])


def scores(judge: Judge, completion: Completion) -> dict[str, float | None]:
    """What the judge says of one answer."""
    return judge.judge([judge.encode_completion(completion)])[0].scores


def main() -> None:
    rows = []
    refusal, coherence = RefusalJudge(), CoherenceJudge()
    for label, completion in labelled():
        said = scores(refusal, completion)
        row = {"half": HALVES[int(label["prompt"], 16) % 2], "label": label["refusal"]}
        row["judge"] = next((name for name in CLASSES if said.get(name)), "unparsed")
        found = scores(coherence, completion)
        row |= {
            f"{name} {who}": bool(has)
            for name in LABELS
            for who, has in (("label", name in label["faults"]), ("judge", found[name]))
        }
        rows.append(row)
    table = pd.DataFrame(rows)
    for half in HALVES:
        some = table[table["half"] == half]
        print(f"\n{len(some)} answers, {half}\n")
        counts = pd.crosstab(some["label"], some["judge"]).reindex(columns=[*CLASSES, "unparsed"], fill_value=0)
        body = [[label, *map(str, line)] for label, line in zip(counts.index, counts.to_numpy(), strict=True)]
        print(markdown_table(["label \\ judge", *counts.columns], body))
        decided = some[some["label"] != "other"]
        right = int((decided["label"] == decided["judge"]).sum())
        low, high = wilson(right, len(decided))
        share = f"{right / len(decided):.3f} [{low:.3f}, {high:.3f}]"
        print(f"Agreement on the three classes: {right} of {len(decided)}, {share}\n")
        body = []
        for name in [*FAULTS, "any"]:
            columns = (
                [f"{fault} {who}" for fault in ([name] if name != "any" else FAULTS)] for who in ("label", "judge")
            )
            is_there, is_said = (some[names].any(axis=1) for names in columns)
            counted = [is_there & is_said, ~is_there & is_said, is_there & ~is_said]
            body.append([name, str(is_there.sum()), *(str(int(cases.sum())) for cases in counted)])
        print(markdown_table(["fault", "labelled", "found", "false alarms", "missed"], body))


if __name__ == "__main__":
    main()
