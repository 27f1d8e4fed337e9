"""Data of the offline model's tasks; each function returns {"test": data set}, as a task's `custom_dataset`."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from offline.language_model import corpus, sentiment_task

REFUSAL_PROMPTS = {"harmful": 200, "lookalike": 200, "everyday": 100}


def refusal_offline(refusal_prompts: dict[str, int] | None = None, **_: Any) -> dict[str, Dataset]:
    """Held-out requests of the offline model's corpus; `category` is "harmful", "lookalike" or "everyday".

    Args:
        refusal_prompts: how many of each category; None means REFUSAL_PROMPTS.
    """
    examples = corpus("heldout")
    rows = [
        {"prompt_id": f"{kind}-{number}", "prompt": prompt, "category": kind}
        for kind, count in (refusal_prompts or REFUSAL_PROMPTS).items()
        for number, prompt in enumerate([e.prompt for e in examples if e.kind == kind][:count])
    ]
    return {"test": Dataset.from_list(rows)}


def sentiment_offline(**_: Any) -> dict[str, Dataset]:
    """The 1,000 sentences that the SST-2 recipe scores on its offline default: `sentence`, `label`."""
    return {"test": Dataset.from_list(sentiment_task("dev", 1000))}
