"""Table 2, Dolly: instruction finetuning with LoRA and MonoLoRA; is the model as safe, and does it learn the task?

The paper's setting (Llama-2-7b-chat, one epoch; task performance, not defined there, of the base 10.21, LoRA 14.08,
MonoLoRA 14.48; ShieldGemma's average 4.83, 6.12, 6.04), with the cost that docs/table2.md estimates:

    accelerate launch recipes/dolly_monolora.py --config recipes/configs/paper_dolly.yaml --output_dir runs/dolly_paper

Any causal model, and a local copy of the data (jsonl or jsonl.gz: instruction, context, response, category):

    python recipes/dolly_monolora.py --model_name_or_path MODEL --train_file databricks-dolly-15k.jsonl.gz \
        --seeds 0 1 2 --judges shieldgemma beaverdam --output_dir runs/dolly

A fifteenth of the rows, chosen by the instruction's checksum, is kept for evaluation: ROUGE-1, -2, -L and BLEU of the
answers, and the human answers' negative log-likelihood. Without a model it builds a small one itself and generates
requests with a context to answer from, in about four minutes on 2 cores: a demonstration. The same command again
continues a run that was stopped, or prints its results.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from identity import Content
from labelled_text import hub_rows
from mixtures import Pair, fits
from program import run_as_program
from table2 import CONFIGS, FinetuningTask, Table2Arguments, check, compare, parse
from table2_report import Column
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from evals.answers import answer_log_likelihoods
from evals.contents import checksum
from evals.local_files import check_columns, check_text, file_rows
from evals.prompts import dolly_held_out, dolly_prompt, encode_answer
from evals.tasks.data import VARIABLE, dolly
from offline.grammar import KNOWN_WORDS, REVIEWED, VIEWERS
from vision_bench.runs import write_atomic

COLUMNS = ("instruction", "context", "response", "category")
GENERATED = "generated_dolly.jsonl"  # in the output folder, where no data are named
_QUESTIONS = (
    "What is said of the {n}?", "How is the {n} described?", "Tell me about the {n}.", "What do they say of the {n}?",
    "Say how the {n} was.", "Describe the {n}.", "What was the {n} like?", "Sum up the view of the {n}.",
)  # fmt: skip


def generated_rows(n: int) -> list[dict[str, str]]:
    """`n` rows in Dolly's format: a question about one of two things that the context describes, its answer."""
    rng = random.Random(0)
    words = [*KNOWN_WORDS[0], *KNOWN_WORDS[1]]
    rows = []
    for _ in range(n):
        first, second = rng.sample(REVIEWED, 2)
        one, other = rng.sample(words, 2)
        who, asked = rng.choice(VIEWERS), rng.random() < 0.5
        rows.append(
            {
                "instruction": rng.choice(_QUESTIONS).format(n=first if asked else second),
                "context": f"For {who} the {first} was {one}. The {second} was {other}.",
                "response": f"The {first} was {one}." if asked else f"The {second} was {other}.",
                "category": "closed_qa",
            }
        )
    return rows


def load_rows(source: str, is_file: bool) -> Dataset:
    """All rows of Dolly 15k with COLUMNS, of a file in its format or from the hub; no context is "".

    Raises:
        ValueError: they cannot be had, lack a column, have an empty instruction or response, or a value that is no
            text.
    """
    if is_file and not Path(source).is_file():
        raise ValueError(f"--train_file {source} does not exist; give a jsonl or jsonl.gz file.")
    try:
        rows = file_rows(source) if is_file else hub_rows(source, "train").to_list()
    except Exception as error:  # `datasets` raises many kinds for a missing network, set or licence, and broken files
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        advice = "Give jsonl or jsonl.gz." if is_file else "It needs network access; offline, give --train_file."
        raise ValueError(f"Cannot load {source} ({cause}). {advice}") from None
    check_columns(rows, COLUMNS, source)
    for name in COLUMNS:
        check_text(rows, name, source, may_be_empty=name in ("context", "category"))
    return Dataset.from_dict({name: [row.get(name) or "" for row in rows] for name in COLUMNS})


class Dolly(FinetuningTask):
    """Answers to requests; the score is the human answers' likelihood, lm-eval's task compares the texts."""

    recipe, paper, metric = "dolly_monolora", "Dolly", "answer_nll"
    performance = (
        Column("ROUGE-L", "rougeL", "dolly"),
        Column("ROUGE-1", "rouge1", "dolly"),
        Column("ROUGE-2", "rouge2", "dolly"),
        Column("BLEU", "bleu", "dolly"),
        Column("answer NLL, nats a token", "answer_nll"),
    )
    eval_tasks = ("dolly",)

    def __init__(self, script: Table2Arguments, rows: Dataset, file: str | None) -> None:
        held_out = [dolly_held_out(row) for row in rows]
        self.train = rows.select([i for i, held in enumerate(held_out) if not held])
        scored = rows.select([i for i, held in enumerate(held_out) if held][: script.eval_samples])
        if len(self.train) < 2 or not len(scored):
            raise ValueError(f"Of {len(rows)} rows {len(scored)} are held out by checksum, too few; give more rows.")
        if script.train_samples and script.train_samples > len(self.train):
            raise ValueError(f"--train_samples {script.train_samples}, but there are {len(self.train)} training rows.")
        self.drawn = script.train_samples or len(self.train)
        self.prompts = [dolly_prompt(row) for row in scored]
        self.responses = scored["response"][:]
        self.source = f"--dataset_name {script.dataset_name}" if script.dataset_name else f"--train_file {file}"
        self.task_data = {"dolly_rows": script.eval_samples} | ({"dolly_file": file} if file else {})

    def training_pairs(self, seed: int) -> list[Pair]:
        rows = self.train.shuffle(seed=seed).select(range(self.drawn))
        return [(dolly_prompt(row), row["response"]) for row in rows]

    def sizes(self) -> dict[str, int]:
        return {"train_rows": len(self.train), "eval_rows": len(self.prompts)}

    def contents(self) -> dict[str, Content]:
        train = [[dolly_prompt(row), row["response"]] for row in self.train]
        scored = list(zip(self.prompts, self.responses, strict=True))
        return {
            "train": Content(self.source, checksum(train)),
            "eval": Content(self.source, checksum(scored)),
        }

    def check_lengths(self, tokenizer: PreTrainedTokenizerBase, context: int, max_length: int | None) -> None:
        """Take the rows that do not fit `context` with their answer out of what is scored; says how many.

        Raises:
            ValueError: none of them fits, or no row to train on fits `max_length`.
        """
        scored = list(zip(self.prompts, self.responses, strict=True))
        pairs = [pair for pair in scored if len(encode_answer(tokenizer, *pair).input_ids) <= context]
        if not pairs:
            raise ValueError(
                f"None of the {len(scored)} held-out rows of {self.source} fits the model's context of {context} "
                "tokens. Give shorter rows, or a model with a longer context."
            )
        if len(pairs) < len(scored):
            print(
                f"{len(scored) - len(pairs)} of {len(scored)} held-out rows exceed the context of {context} tokens: "
                f"they are left out of {self.metric}."
            )
        self.prompts, self.responses = map(list, zip(*pairs, strict=True))
        rows = ((dolly_prompt(row), row["response"]) for row in self.train)
        if max_length is not None and not any(fits(pair, tokenizer, max_length) for pair in rows):
            raise ValueError(f"--max_length {max_length} is too short for every training row of {self.source}.")

    def score(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> float:
        """Negative log-likelihood of the human answers, in nats a token, a mean over rows that fit the context."""
        encoded = [encode_answer(tokenizer, *pair) for pair in zip(self.prompts, self.responses, strict=True)]
        scores = answer_log_likelihoods(model, encoded, tokenizer.pad_token_id, batch_size)
        lengths = torch.tensor([sum(answer.completion_mask) for answer in encoded])
        return -(scores / lengths).double().mean().item()


def check_data(script: Table2Arguments, model_args: ModelConfig) -> None:
    """Raise ValueError for a model without data."""
    if model_args.model_name_or_path and not (script.dataset_name or script.train_file):
        raise ValueError(
            "--model_name_or_path needs data: --dataset_name databricks/databricks-dolly-15k, or --train_file."
        )


def check_questions(task: Dolly) -> None:
    """Raise ValueError if lm-eval's task asks other rows than are held out here, whose answers may be trained on."""
    asked = dolly(**task.task_data)["test"]
    if (asked["prompt"][:], asked["response"][:]) != (task.prompts, task.responses):
        raise ValueError(
            f"The task dolly does not ask what is held out of {task.source}: it takes the folder that {VARIABLE} "
            "names, or databricks/databricks-dolly-15k. ROUGE and BLEU would be of other data than the training. Give "
            "the data as --train_file, jsonl or jsonl.gz."
        )


def load_task(script: Table2Arguments, output_dir: str) -> Dolly:
    """The task with the data that the options name; without any, generated data, which the output folder keeps."""
    if script.train_file or script.dataset_name:
        source = str(script.train_file or script.dataset_name)
        task = Dolly(script, load_rows(source, bool(script.train_file)), script.train_file)
        check_questions(task)
        return task
    rows = generated_rows(2000)
    file = Path(output_dir) / GENERATED
    with PartialState().main_process_first():
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))
    return Dolly(script, Dataset.from_list(rows), str(file))


def main(arguments: list[str] | None = None) -> None:
    """Run the arms and seeds that the output folder has no results of, then write and print the table."""
    script, training, model_args = parse(arguments, Table2Arguments, "dolly_monolora", CONFIGS / "offline_dolly.yaml")
    check(script, training, model_args)
    check_data(script, model_args)
    compare(load_task(script, training.output_dir), script, training, model_args)


if __name__ == "__main__":
    run_as_program(main)
