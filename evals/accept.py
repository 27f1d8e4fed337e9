"""`python -m evals accept BASE ADAPTER --card card.yaml`: does an adapter keep what its card asks for?

What is missing is measured: answers, verdicts, forgetting, silence, and how easily the judges are fooled; the same
command continues a run that was stopped. The exit code is 0 to accept, 1 if a line of the card fails, and 2 if that
cannot be told, because there are too few prompts, a judge is too easily fooled, or something cannot be read.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import time
import traceback
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals.card import Card, Line, read_card
from evals.card_page import write_page
from evals.contents import adapter_checksums, checksum, model_checksums
from evals.decision import (
    CANNOT_TELL,
    EXIT_CODES,
    FAILS,
    Decided,
    Decision,
    Measured,
    decide,
    decide_line,
    difference_measured,
    needed_for,
    share_measured,
)
from evals.forgetting_rows import measure_forgetting
from evals.generate import generate, task_manager
from evals.intervals import bootstrap, mean
from evals.judge import check_judging, judge
from evals.models import check_adapter, check_base, hub_commit
from evals.records import COMPLETIONS, Completion, has_answers, read_completions
from evals.registry import MODELS
from evals.settings import Adapter, ForgettingSettings, GenerateSettings
from evals.stress import ALL, stress
from evals.terminal import table_text
from evals.values import ArmValues, read_arms
from evals.values import Measured as Measure
from mono_peft import certify
from mono_peft.loading import adapter_config
from mono_peft.names import peft_type
from vision_bench.runs import DIVERGED, Run, commit, device_name, file_checksum, versions, write_atomic

CARD_JSON, CARD_HTML, ANSWERS, SILENCE = "card.json", "card.html", "answers", "silence.json"
ADAPTER = "adapter"  # its name in the folder of answers
_MOST_EXAMPLES = 3


class Example(NamedTuple):
    """An answer that counts against a line."""

    prompt: str
    response: str


def accept(base: str, adapter: str, card: Card, output_dir: str | Path, *, batch_size: int = 16) -> Decision:
    """Measure what the folder lacks, decide, and write `card.json` and `card.html` into it.

    Args:
        base: folder or name on the hub, or `offline`.
        adapter: folder or name on the hub.
        card: what is asked for; a folder keeps the card that it was begun with.
        batch_size: prompts at a time, unless the card says so.

    Raises:
        ValueError: before weights are loaded: base, adapter, tasks, data or judges cannot be had, or the folder was
            begun with another card, base or adapter.
    """
    start = time.monotonic()
    folder = Path(output_dir)
    identity = _identity(base, adapter)
    _check_begun(folder, card, identity)
    _check_tasks(card)
    settings = GenerateSettings(
        model=base,
        tasks=card.tasks or ["none"],
        output_dir=str(folder / ANSWERS),
        adapters=[Adapter(f"{ADAPTER}={adapter}")],
        base=any(line.versus for line in card.lines),
        **{"batch_size": batch_size} | card.answers,
    )
    if card.judges:
        check_judging(card.judges)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "begun.json", json.dumps({"card": card.as_dict(), **identity}, indent=2) + "\n")
    measures = _Measures(card, settings, folder)
    lines = [measures.decided(line) for line in card.lines]
    decision = decide(card, lines)
    record = {
        "decision": decision.outcome,
        "exit_code": decision.exit_code,
        "decided_by": decision.decided_by,
        "lines": [_as_dict(one) for one in decision.lines],
        "card": card.as_dict(),
        **identity,
        "seconds": round(time.monotonic() - start, 1),
        "device": device_name(),
        "versions": versions(),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_atomic(folder / CARD_JSON, json.dumps(record, indent=2) + "\n")
    write_page(folder / CARD_HTML, decision, record, measures.examples)
    return decision


def _identity(base: str, adapter: str) -> dict[str, Any]:
    """Base and adapter by name and content, checked without their weights."""
    source = str(MODELS[base]()) if base in MODELS else base
    _, config = check_base(source)
    folder = check_adapter(Adapter(f"{ADAPTER}={adapter}"), source, config)
    contents = model_checksums(source, hub_commit(source)) | adapter_checksums(folder)
    return {"base": base, "adapter": adapter, "checksums": contents}


def _check_tasks(card: Card) -> None:
    """Check the lines against their tasks' metrics and prompts, and say of which there are too few.

    Raises:
        ValueError: a task, its data, a metric of it or a category of its prompts does not exist.
    """
    limit = card.answers.get("limit")
    loaded = task_manager(card.tasks, card.answers.get("task_data")).load(card.tasks)["tasks"] if card.tasks else {}
    for line in card.lines:
        task = loaded.get(line.task)  # a group has tasks of other names
        if task is None:
            continue
        metrics = sorted(metric["metric"] for metric in task.get_config("metric_list"))
        if line.kind == "task" and line.metric not in metrics:
            raise ValueError(f"{line.name}: the task {line.task} has no {line.metric}; it has {', '.join(metrics)}.")
        categories = [document.get("category") for document in islice(task.eval_docs, limit)]
        chosen = [category for category in categories if line.category in (None, category)]
        if not chosen:
            there = ", ".join(sorted({str(category) for category in categories}))
            raise ValueError(f"{line.name}: no prompt of {line.task} is {line.category!r}; there are {there}.")
        needed = needed_for(line, card.power)
        if line.is_share and (needed is None or len(chosen) < needed):
            print(f"{line.name} has {len(chosen)} prompts, too few to pass: give a larger margin, or more prompts.")


def _check_begun(folder: Path, card: Card, identity: dict[str, Any]) -> None:
    """Raise ValueError if the folder has results of another card, base or adapter."""
    path = folder / "begun.json"
    if not path.is_file() or not any(folder.rglob("*.jsonl")):
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    if begun["card"] != json.loads(json.dumps(card.as_dict())):
        raise ValueError(
            f"{folder} was begun with another card, and thresholds that are changed after a look at the results "
            "decide nothing: choose another --output_dir for the new card."
        )
    if begun["checksums"] != identity["checksums"]:
        raise ValueError(
            f"{folder} was begun with another base or adapter under these names: choose another --output_dir."
        )


class _Answered(NamedTuple):
    """Values on the prompts by arm, the base and the adapter, and why there are none of one that diverged."""

    arms: dict[str, ArmValues]
    diverged: str | None = None


class _Measures:
    """The measures of a card's lines; what is not in the folder is made when a line asks for it first."""

    def __init__(self, card: Card, settings: GenerateSettings, folder: Path) -> None:
        self.card, self.settings, self.folder = card, settings, folder
        self.examples: dict[str, list[Example]] = {}

    def decided(self, line: Line) -> Decided:
        """The line with its outcome, before judges that are fooled are known."""
        measure = {
            "forgetting": self._forgetting,
            "silence": self._silence,
            "judge_flips": self._flips,
        }.get(line.kind, self._of_answers)
        measured = measure(line)
        if isinstance(measured, Measured):
            return decide_line(line, measured, self.card.power)
        outcome, reason = measured
        return Decided(line, outcome, reason, None, needed_for(line, self.card.power))

    @cached_property
    def answered(self) -> _Answered:
        """What the prompts gave, which are answered and judged if they are not."""
        run: Run = generate(self.settings)
        marks = run.find(DIVERGED)
        if self.card.judges and has_answers(run.folder):
            judge(run.folder, self.card.judges)
        if marks:  # the folder of an adapter that diverged may hold no answer at all
            return _Answered({}, f"it diverged: {marks[0]['config']['reason']}")
        return _Answered({arm.name: arm for arm in read_arms(str(run.folder))})

    def _of_answers(self, line: Line) -> Measured | tuple[str, str]:
        arms, diverged = self.answered
        if diverged is not None:
            return FAILS, diverged
        key = Measure(line.task, line.metric, line.judge, "" if line.judge else line.filter)
        have = sorted({k.metric for k in arms[ADAPTER].values if k.task == line.task})
        if key not in arms[ADAPTER].values:
            raise ValueError(
                f"{line.name}: the task {line.task!r} gives no {line.metric}; it gives {', '.join(have)}."
            )
        found = arms[ADAPTER].values[key]
        chosen = [prompt for prompt, value in found.items() if line.category in (None, value.category)]
        values = [found[prompt].value for prompt in chosen]
        if all(value is None for value in values):
            return CANNOT_TELL, "the judge decided on no answer" if line.judge else f"no answer has {line.metric}"
        self._add_examples(line, [p for p, v in zip(chosen, values, strict=True) if v == (line.at_most is not None)])
        others = [arms["base"].values[key][prompt].value for prompt in chosen] if line.versus else []
        missing = sum(value is None for value in (*values, *others))
        if missing and not {*values, *others} <= {None, 0.0, 1.0}:
            return CANNOT_TELL, f"{missing} answers have no {line.metric}, which could be anything"
        if line.versus:
            if not any(a is not None and b is not None for a, b in zip(values, others, strict=True)):
                return CANNOT_TELL, "the judge decided on no prompt for both, adapter and base"
            return difference_measured(values, others)
        if line.is_share:
            return share_measured(values)
        numbers = [value for value in values if value is not None]
        if set(numbers) <= {0.0, 1.0}:
            t = min(max(line.threshold, 0.0), 1.0)
            return share_measured(values)._replace(deviation=math.sqrt(t * (1 - t)))
        low, high = bootstrap(mean, numbers)
        return Measured(float(np.mean(numbers)), low, high, len(numbers), float(np.std(numbers, ddof=1)))

    def _add_examples(self, line: Line, prompts: Sequence[str]) -> None:
        if line.judge:
            rows: list[Completion] = read_completions(Path(self.settings.output_dir) / COMPLETIONS).rows
            of = {row.prompt_id: row for row in rows if (row.task, row.adapter) == (line.task, ADAPTER)}
            shown = [of[prompt] for prompt in prompts[:_MOST_EXAMPLES]]
            self.examples[line.name] = [Example(row.prompt, row.response) for row in shown]

    def _forgetting(self, line: Line) -> Measured | tuple[str, str]:
        # The answers come first, as the folder is theirs.
        if self.card.tasks and self.answered.diverged is not None:
            return FAILS, self.answered.diverged
        shared = {name: self.card.answers[name] for name in ("dtype", "load_in_4bit") if name in self.card.answers}
        output_dir = self.folder / f"forgetting-{checksum(line.texts and file_checksum(line.texts))[:8]}"
        run = measure_forgetting(
            ForgettingSettings(
                self.settings.model, str(output_dir), self.settings.adapters, texts=line.texts, **shared
            )
        )
        rows = run.find(line.metric, adapter=ADAPTER)
        if not rows:
            return FAILS, "it diverged: its weights or its probabilities are not finite"
        row = rows[0]
        low, high, n = row["config"]["low"], row["config"]["high"], row["n"]
        deviation = (high - low) / (2 * 1.96) * math.sqrt(n)
        return Measured(row["value"], low, high, n, deviation)

    def _silence(self, line: Line) -> Measured | tuple[str, str]:
        adapter = self.settings.adapters[0].source
        if (kind := adapter_config(adapter).peft_type) != peft_type():
            return FAILS, f"a {kind.value} adapter is silent on no text: it has no activation that is exactly zero"
        path = self.folder / SILENCE
        about = {"prompts": file_checksum(str(line.prompts)), "response_tokens": line.response_tokens}
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if told.get("about") != about:
            source = str(MODELS[self.settings.model]()) if self.settings.model in MODELS else self.settings.model
            lines, said = self.folder / "silence.jsonl", io.StringIO()
            arguments = [source, adapter, "--prompts", str(line.prompts), "--output", str(lines), "--min_silent", "0"]
            arguments += ["--dtype", self.card.answers.get("dtype", "auto")]
            with contextlib.redirect_stdout(said):
                code = certify.main([*arguments, "--response_tokens", str(line.response_tokens)])
            if code:
                return CANNOT_TELL, " ".join(said.getvalue().split())
            prompts = [json.loads(text) for text in lines.read_text(encoding="utf-8").splitlines()]
            told = {"about": about, "silent": [prompt["silent"] for prompt in prompts]}
            write_atomic(path, json.dumps(told) + "\n")
        return share_measured([float(silent) for silent in told["silent"]])

    def _flips(self, line: Line) -> Measured | tuple[str, str]:
        folder = self.folder / "stress"
        result = stress(None, [line.judge], output_dir=folder, limit=line.answers)
        flips = next((one for one in result.flips if one.kind == ALL), None)
        if flips is None:
            return CANNOT_TELL, "the judge decided on no twin"
        low, high = flips.interval
        return Measured(flips.share, low, high, flips.n, undecided=flips.undecided)


def _as_dict(one: Decided) -> dict[str, Any]:
    measured = {} if one.measured is None else one.measured._asdict()
    return {"name": one.line.name, "requirement": one.line.text, "outcome": one.outcome, "reason": one.reason,
            **measured, "needed": one.needed}  # fmt: skip


def decision_text(decision: Decision) -> str:
    """A table of at most 100 columns, and which line decided."""
    body = []
    for one in decision.lines:
        m = one.measured
        shown = "-" if m is None else f"{m.value:.3g} [{m.low:.3g}, {m.high:.3g}]"
        counts = "-" if m is None else f"{m.n}" + (f" / {one.needed}" if one.needed else "")
        body.append([one.line.name, f"{one.line.text}: {one.reason}", shown, counts, one.outcome])
    header = ["line", "asked for", "measured [95 %]", "n / needed", "outcome"]
    text = table_text(f"Decision: {decision.outcome}", header, body, left=2)
    names = ", ".join(decision.decided_by)
    how = "the closest line is" if decision.exit_code == 0 else "decided by"
    return f"{text}\n{decision.outcome.capitalize()} ({how} {names}).\n"


def needs_text(card: Card) -> str:
    """What the card takes, before anything is measured."""
    lines = []
    for line in card.lines:
        needed = needed_for(line, card.power)
        many = f"{needed:,}" if needed is not None else "more than 50,000"
        takes = f"{many} for a margin of {line.margin:g}" if line.is_share else "as many as its spread asks for"
        lines.append(f"  {line.name}: {line.text}; takes {takes}\n")
    return f"{card.title}, with a power of {card.power:g}:\n{''.join(lines)}"


def main(arguments: list[str]) -> int:
    """Run the command and return the exit code."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m evals accept", description=__doc__, formatter_class=formatter)
    parser.add_argument("base", metavar="BASE", help="the base model's folder or name on the hub; or `offline`")
    parser.add_argument("adapter", metavar="ADAPTER", help="the adapter's folder or name on the hub")
    parser.add_argument("--card", type=Path, required=True, metavar="FILE", help="YAML, see evals/cards/")
    parser.add_argument("--output_dir", type=Path, help="for all results (default: runs/accept/ADAPTER)")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts at a time (default: 16)")
    options = parser.parse_args(arguments)
    try:
        card = read_card(options.card)
        print(needs_text(card))
        folder = options.output_dir or Path("runs/accept") / Path(options.adapter).name
        decision = accept(options.base, options.adapter, card, folder, batch_size=options.batch_size)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return EXIT_CODES[CANNOT_TELL]
    except KeyboardInterrupt:
        print("Stopped. The same command continues.", file=sys.stderr)
        return EXIT_CODES[CANNOT_TELL]
    except Exception:  # Python's own exit code would be 1, as if the adapter had failed
        traceback.print_exc()
        return EXIT_CODES[CANNOT_TELL]
    print(decision_text(decision))
    print(f"The card is {folder / CARD_HTML}, for programs {folder / CARD_JSON}.")
    return decision.exit_code
