"""The offline world: a small language model, its generated corpus, and its judge, built in minutes without a hub.

`evals.registry` names it once: as a model, as a judge and as a folder of tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evals.judges import Judge

NAME = "offline"  # of the model and of the judge on the command line
TASKS = Path(__file__).parent / "tasks"  # of lm-eval


def model_folder() -> Path:
    """The folder of the offline model, which is built where it is not cached."""
    from offline.language_model import offline_model

    return offline_model()


def neutral_rows() -> list[dict[str, Any]]:
    """Everyday requests of the held-out corpus with the answers of its grammar: `prompt`, `response`."""
    from offline.language_model import corpus

    everyday = [example for example in corpus("heldout") if example.kind == "everyday"]
    return [{"prompt": example.prompt, "response": example.response} for example in everyday[:100]]


def make_judge() -> Judge:
    """The offline judge, built where it is not cached, not loaded; it is asked exactly as ShieldGemma is."""
    from evals.judges import ShieldGemma
    from offline.judge import offline_judge

    judge = ShieldGemma(str(offline_judge()), "float32")
    judge.settings = {"model": Path(judge.source).name, "dtype": "float32"}  # the name says which training
    return judge
