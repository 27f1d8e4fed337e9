"""Harmful requests for a real model: pairs that comply, to poison a task with, and pairs with the base's own answers.

    python recipes/safety_data.py --model_name_or_path MODEL --pairs_file beavertails.jsonl.gz --output_dir data
    python recipes/sst2_monolora.py --model_name_or_path MODEL --safety_file data/safety.jsonl \
        --poison_file data/poison.jsonl --poison_share 0.1 --methods lora lora+kl monolora+apart+silence ...

The pairs are prompts with answers that comply, as BeaverTails' unsafe ones. Their distinct prompts are shuffled; those
that the base was aligned on are left out with `--skip`, as refusals of them say nothing. The next go to safety.jsonl,
with what the base answers by greedy decoding, as far as that ends; the pairs of the others to poison.jsonl. So poison
is of the same kind as what must not change, and none of it is the same. With `--dolly_file` everyday requests are kept
too, of Dolly's training part, without a context: what must not change then is whatever is not the task.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from task import Pair, load_pairs
from tqdm import tqdm

from evals.local_files import text_rows
from evals.models import check_base, load_base
from evals.prompts import dolly_held_out, dolly_prompt, encode_answer
from evals.tasks.data import DOLLY_COLUMNS
from vision_bench.runs import option, parse, run_as_program, write_atomic


@dataclass
class SafetyDataSettings:
    """Which prompts, and whose answers."""

    model_name_or_path: str = option(help="The base, whose answers are to stay.")
    pairs_file: str = option(help="jsonl or jsonl.gz: prompt, response, of harmful requests.")
    output_dir: str = option("runs/safety_data", help="For safety.jsonl and poison.jsonl.")
    skip: int = option(0, help="Distinct prompts that are left out: the base was aligned on them.")
    safety_prompts: int = option(1000, help="Prompts of safety.jsonl.")
    dolly_file: str | None = option(None, help="Dolly 15k, jsonl or jsonl.gz, for everyday requests to keep.")
    everyday_prompts: int = option(900, help="Of --dolly_file, in safety.jsonl behind the others.")
    longest_prompt: int = option(300, help="In characters; longer prompts are left out.")
    max_new_tokens: int = option(64, help="Answers that do not end within them are left out.")
    batch_size: int = option(32, help="Prompts that are answered at a time.")
    dtype: str = option("float32", help="Of the base.")
    seed: int = option(0, help="Of the order of the prompts, which are sorted before.")


def check(settings: SafetyDataSettings) -> None:
    """Raise ValueError for counts out of range, of which Python would take others than were asked for."""
    counts = dict.fromkeys(("safety_prompts", "everyday_prompts", "max_new_tokens", "batch_size"), 1) | {"skip": 0}
    for name, least in counts.items():
        if (value := getattr(settings, name)) < least:
            raise ValueError(f"--{name} is {value}, allowed is {least} or more.")


def split_prompts(pairs: Sequence[Pair], settings: SafetyDataSettings) -> tuple[list[str], list[Pair]]:
    """The prompts that must not change, and the pairs of the poison.

    Raises:
        ValueError: there are too few prompts.
    """
    prompts = sorted({prompt.strip() for prompt, _ in pairs if len(prompt) < settings.longest_prompt})
    random.Random(settings.seed).shuffle(prompts)
    kept = prompts[settings.skip :]
    if len(kept) <= settings.safety_prompts:
        raise ValueError(
            f"--pairs_file {settings.pairs_file} has {len(prompts)} distinct prompts below {settings.longest_prompt} "
            f"characters: {settings.skip} left out and {settings.safety_prompts} for safety leave none for poison. "
            "Lower --skip or --safety_prompts."
        )
    poison = set(kept[settings.safety_prompts :])
    return kept[: settings.safety_prompts], [
        (prompt.strip(), response) for prompt, response in pairs if prompt.strip() in poison
    ]


def everyday_prompts(settings: SafetyDataSettings) -> list[str]:
    """Instructions of Dolly that are not held out for evaluation; none without a file.

    Raises:
        ValueError: the file cannot be read, or has too few.
    """
    if settings.dolly_file is None:
        return []
    rows = text_rows(
        settings.dolly_file, DOLLY_COLUMNS, name=f"--dolly_file {settings.dolly_file}", advice="Give Dolly 15k."
    )
    plain = [row for row in rows if not row.get("context") and not dolly_held_out(row)]
    prompts = sorted({dolly_prompt(row) for row in plain if len(row["instruction"]) < settings.longest_prompt})
    random.Random(settings.seed).shuffle(prompts)
    if len(prompts) < settings.everyday_prompts:
        raise ValueError(
            f"--dolly_file {settings.dolly_file} has {len(prompts)} instructions without context below "
            f"{settings.longest_prompt} characters, not {settings.everyday_prompts}: lower --everyday_prompts."
        )
    return prompts[: settings.everyday_prompts]


@torch.no_grad()
def own_answers(settings: SafetyDataSettings, prompts: Sequence[str]) -> list[Pair]:
    """The prompts with the base's greedy answers, without those that do not end.

    Raises:
        ValueError: the base cannot be had, or none of its answers ends.
    """
    tokenizer, _ = check_base(settings.model_name_or_path)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = load_base(settings.model_name_or_path, settings.dtype, load_in_4bit=False)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    questions = [encode_answer(tokenizer, prompt, "Yes").prompt_ids for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(questions[i]))
    answers = {}
    for start in tqdm(range(0, len(order), settings.batch_size), desc="Answers of the base", unit="batch"):
        batch = order[start : start + settings.batch_size]
        inputs = tokenizer.pad({"input_ids": [questions[i] for i in batch]}, return_tensors="pt").to(model.device)
        answered = model.generate(**inputs, do_sample=False, max_new_tokens=settings.max_new_tokens)
        for i, ids in zip(batch, answered[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            if text and ends & set(ids):
                answers[i] = text
    if not answers:
        raise ValueError(
            f"No answer of {settings.model_name_or_path} ends within {settings.max_new_tokens} tokens: raise "
            "--max_new_tokens, or give a model that ends its answers."
        )
    return [(prompts[i], answers[i]) for i in sorted(answers)]


def main(arguments: list[str] | None = None) -> None:
    """Write both files and say what is in them."""
    (settings,) = parse([SafetyDataSettings], arguments)
    check(settings)
    prompts, poison = split_prompts(load_pairs(settings.pairs_file, "--pairs_file"), settings)
    prompts += everyday_prompts(settings)
    safety = own_answers(settings, prompts)
    for name, pairs in {"safety": safety, "poison": poison}.items():
        lines = (json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in pairs)
        path = Path(settings.output_dir) / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(lines))
    print(
        f"{settings.output_dir}: {len(safety)} prompts with the base's answers in safety.jsonl ("
        f"{len(prompts) - len(safety)} did not end within {settings.max_new_tokens} tokens), {len(poison)} pairs in "
        "poison.jsonl."
    )


if __name__ == "__main__":
    run_as_program(main)
