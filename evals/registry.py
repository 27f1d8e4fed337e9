"""What the commands know by name: kinds of judges, models that are built here, and folders of tasks.

A new judge is a file that defines a subclass of `evals.judges.Judge`, and a row of `JUDGES`. A program may add rows
before it calls the commands; nothing else names a judge:

    JUDGES["keywords"] = JudgeKind("keywords", "a list of words, unsafe if the response has one", make_keyword_judge)
    judge("runs/safety", ["keywords"])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import offline
from evals.records import REFUSED

if TYPE_CHECKING:
    from evals.judges import Judge


COHERENCE = "coherence"  # the judge that tells whether answers that count as safe are answers at all


class JudgeOptions(NamedTuple):
    """What the command line says of judges beside their names."""

    dtype: str = "auto"  # of the weights, one of `evals.settings.DTYPES`
    endpoint: str | None = None  # of an OpenAI-compatible server, which `chat` judges are asked at
    rubric: str | None = None  # path of a file, for `chat` judges
    perplexity_model: str | None = None  # folder or name on the hub, of what tells `coherence` how likely answers are


@dataclass(frozen=True)
class JudgeKind:
    """A kind of judge that `--judges KIND[=MODEL]` names: how it is made, and how tables and figures show it.

    Args:
        usage: "KIND[=MODEL]", "KIND=MODEL" where a model must be named, or "KIND".
        help: one line for the command's help.
        make: makes the judge of MODEL ("" if none is named), checked but not loaded; raises ValueError if it cannot
            be had.
        takes_rubric: --endpoint and --rubric are for it.
        takes_perplexity_model: --perplexity_model is for it.
        unsafe: what tables call the share of answers whose outcome is unsafe.
        labels: names of its scores that are 0 or 1, whose shares are rows in the place of mean scores.
        is_of_harm: safe and unsafe are about harm, so that it has a panel in the figure and may agree with others.
        harm_metric: the metric of its rows that stands for harm on figures and in tables of the paper's prompts.
        harm_label: the name of that on an axis.
        has_policies: its scores are those of ShieldGemma's policies, and it has their columns in Table 2.
    """

    usage: str
    help: str
    make: Callable[[str, JudgeOptions], Judge]
    takes_rubric: bool = False
    takes_perplexity_model: bool = False
    unsafe: str = "unsafe"
    labels: tuple[str, ...] = ()
    is_of_harm: bool = True
    harm_metric: str = "unsafe"
    harm_label: str = "judged unsafe, %"
    has_policies: bool = False


def _shieldgemma(model: str, options: JudgeOptions) -> Judge:
    from evals.judges.shieldgemma import SHIELDGEMMA, ShieldGemma

    return ShieldGemma(model or SHIELDGEMMA, options.dtype)


def _beaverdam(model: str, options: JudgeOptions) -> Judge:
    from evals.judges.beaverdam import BEAVERDAM, BeaverDam

    return BeaverDam(model or BEAVERDAM, options.dtype)


def _chat(model: str, options: JudgeOptions) -> Judge:
    from evals.judges.chat import RUBRIC, LocalChatJudge, read_rubric
    from evals.judges.endpoint import EndpointChatJudge

    rubric = read_rubric(options.rubric or RUBRIC)
    if options.endpoint:
        return EndpointChatJudge(options.endpoint, model, rubric)
    return LocalChatJudge(model, rubric, options.dtype)


def _refusal(patterns: str, options: JudgeOptions) -> Judge:
    from evals.judges.refusal import RefusalJudge

    return RefusalJudge(patterns)


def _coherence(_: str, options: JudgeOptions) -> Judge:
    from evals.judges.coherence import CoherenceJudge

    model = options.perplexity_model
    return CoherenceJudge(str(MODELS[model]()) if model in MODELS else model, options.dtype)


def _unknown(model: str, options: JudgeOptions) -> Judge:
    raise ValueError("A judge that is in no table cannot be made.")


JUDGES = {
    "shieldgemma": JudgeKind(
        "shieldgemma[=MODEL]",
        "ShieldGemma, the paper's 9b model by default: a probability of harm for each of four policies",
        _shieldgemma,
        harm_metric="score",
        harm_label="ShieldGemma, mean score x 100",
        has_policies=True,
    ),
    "beaverdam": JudgeKind(
        "beaverdam[=MODEL]",
        "BeaverDam, the paper's 7b model by default: flags any of 14 categories of harm",
        _beaverdam,
        harm_label="BeaverDam, flagged, %",
    ),
    "chat": JudgeKind(
        "chat=MODEL",
        "any chat model, loaded here or behind --endpoint, asked the question of --rubric",
        _chat,
        takes_rubric=True,
    ),
    "refusal": JudgeKind(
        "refusal[=PATTERNS]",
        "no model: full refusal, partial refusal or compliance by published phrases, and those of the file PATTERNS",
        _refusal,
        unsafe="answered",
        labels=("full_refusal", "partial_refusal", "compliance", REFUSED),
        harm_metric="answered",
        harm_label="answered, %",
    ),
    COHERENCE: JudgeKind(
        COHERENCE,
        "no model: empty, cut, repetitive, gibberish, in another language, or the prompt again",
        _coherence,
        takes_perplexity_model=True,
        unsafe="incoherent",
        labels=("empty", "cut", "repetition", "gibberish", "wrong_language", "prompt_echo"),
        is_of_harm=False,
    ),
    offline.NAME: JudgeKind(
        offline.NAME,
        "a small model that is trained here, for answers of the offline model only",
        lambda model, options: offline.make_judge(),
        has_policies=True,
    ),
}
# --model NAME: its folder, built if need be.
MODELS: dict[str, Callable[[], Path]] = {offline.NAME: offline.model_folder}
# By such a name, what its forgetting is measured on: the offline model has never read English.
NEUTRAL_TEXTS: dict[str, Callable[[], list[dict[str, Any]]]] = {offline.NAME: offline.neutral_rows}
TASK_FOLDERS = [Path(__file__).parent / "tasks", offline.TASKS]
# Prompts that ask for harm, and prompts that do not though some look so; by task and the category of the prompt.
_HARMFUL, _HARMLESS = ("unsafe", "harmful"), ("safe", "lookalike", "everyday")
_HARMFUL_TASKS = ("advbench", "beavertails_eval", "strongreject", "harmbench")
_HARMLESS_TASKS = ("dolly",)


def is_harmful(task: str, category: str | None) -> bool | None:
    """Whether a task's prompts of a category ask for harm; None where they are of both kinds or it is not known.

    Args:
        category: "" or None for all prompts of the task.
    """
    if category in _HARMFUL or (task in _HARMFUL_TASKS):
        return True
    if category in _HARMLESS or task in _HARMLESS_TASKS:
        return False
    return None


def judge_kind(name: str) -> JudgeKind:
    """The row of JUDGES for a judge as rows of results name it, KIND or KIND=MODEL; a plain one for other names."""
    return JUDGES.get(name.partition("=")[0], JudgeKind(name, "", _unknown))


def make_judge(name: str, options: JudgeOptions | None = None) -> Judge:
    """The judge that `--judges` names, checked but not loaded.

    Args:
        name: KIND or KIND=MODEL, as the `usage` of a row of JUDGES says; MODEL is a folder or a name on the hub.

    Raises:
        ValueError: there is no such judge, or it cannot be had.
    """
    kind, _, model = name.partition("=")
    if kind not in JUDGES or (not model and JUDGES[kind].usage.endswith("=MODEL")):
        *usages, last = (row.usage for row in JUDGES.values())
        raise ValueError(f"--judges has {name!r}; allowed are {', '.join(usages)} and {last}.")
    return JUDGES[kind].make(model, options or JudgeOptions())
