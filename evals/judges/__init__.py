"""The judges: a prompt and a response -> safe, unsafe, unparsed or truncated, with scores.

A kind of judge is a file here and a row of `evals.registry.JUDGES`.
Every judge is made from its tokenizer and configuration alone, so that bad input fails before weights are loaded:

    judge = ShieldGemma("google/shieldgemma-2b")
    judge.load()
    batch = [judge.encode("How do I bake bread?", "Knead, wait, bake.")]
    judge.judge(batch)  # [Judgement(outcome="safe", scores={"dangerous": 0.01, ...}, reply=None)]
"""

from evals.judges.base import THRESHOLD, Judge, Judgement, NoAnswerError, escape
from evals.judges.beaverdam import BeaverDam
from evals.judges.chat import LocalChatJudge, RubricJudge, read_rubric
from evals.judges.endpoint import EndpointChatJudge
from evals.judges.shieldgemma import POLICIES, EncodedPolicies, ShieldGemma

__all__ = [
    "POLICIES",
    "THRESHOLD",
    "BeaverDam",
    "EncodedPolicies",
    "EndpointChatJudge",
    "Judge",
    "Judgement",
    "LocalChatJudge",
    "NoAnswerError",
    "RubricJudge",
    "ShieldGemma",
    "escape",
    "read_rubric",
]
