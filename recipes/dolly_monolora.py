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
from pathlib import Path

import library_messages  # noqa: F401  # before the libraries that speak while they are imported
import torch
from accelerate import PartialState
from table2 import CONFIGS, Table2Settings, check, compare, experiment, parse, show
from task import Scored, Task
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from evals.answers import answer_log_likelihoods
from evals.figures import Measure
from evals.local_files import Row, text_rows
from evals.prompts import dolly_held_out, dolly_prompt, encode_answer
from evals.tasks.data import DOLLY_COLUMNS, VARIABLE, dolly
from offline.finetuning import generated_rows
from vision_bench.runs import run_as_program, write_atomic

METRIC = "answer_nll"
PERFORMANCE = (
    Measure("ROUGE-L", "rougeL", "dolly"),
    Measure("ROUGE-1", "rouge1", "dolly"),
    Measure("ROUGE-2", "rouge2", "dolly"),
    Measure("BLEU", "bleu", "dolly"),
    Measure("answer NLL, nats a token", METRIC),
)
GENERATED = "generated_dolly.jsonl"  # in the output folder, where no data are named


def load_rows(source: str, is_file: bool) -> list[Row]:
    """All rows of Dolly 15k, of a file in its format or of a data set on the hub; the context may be missing.

    Raises:
        ValueError: they cannot be had, lack a column, have an empty instruction or response, or a value that is no
            text.
    """
    by_file = "Give --train_file a jsonl or jsonl.gz file."
    advice = by_file if is_file else "It needs network access; offline, give --train_file."
    return text_rows(source, DOLLY_COLUMNS, split=None if is_file else "train", advice=advice)


def as_task(settings: Table2Settings, rows: list[Row], file: str | None) -> Task:
    """The task of finetuning on rows and scoring those that are held out.

    Args:
        file: where the rows are from; None: `--dataset_name`.

    Raises:
        ValueError: there are too few rows.
    """
    train = [(dolly_prompt(row), row["response"]) for row in rows if not dolly_held_out(row)]
    scored = [(dolly_prompt(row), row["response"]) for row in rows if dolly_held_out(row)][: settings.eval_samples]
    if len(train) < 2 or not scored:
        raise ValueError(f"Of {len(rows)} rows {len(scored)} are held out by checksum, too few; give more rows.")
    if settings.train_samples and settings.train_samples > len(train):
        raise ValueError(f"--train_samples {settings.train_samples}, but there are {len(train)} training rows.")
    source = f"--dataset_name {settings.dataset_name}" if settings.dataset_name else f"--train_file {file}"
    return Task(
        recipe="dolly_monolora",
        metric=METRIC,
        score=answer_nll,
        train=train,
        drawn=settings.train_samples or len(train),
        scored=scored,
        sources=(source, source),
        eval_tasks=("dolly",),
        task_data={"dolly_rows": settings.eval_samples} | ({"dolly_file": file} if file else {}),
    )


def answer_nll(scored: Scored, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> float:
    """Negative log-likelihood of the human answers, in nats a token, a mean over rows that fit the context."""
    encoded = [encode_answer(tokenizer, *row) for row in scored]
    scores = answer_log_likelihoods(model, encoded, tokenizer.pad_token_id, batch_size)
    lengths = torch.tensor([sum(answer.completion_mask) for answer in encoded])
    return -(scores / lengths).double().mean().item()


def load_task(settings: Table2Settings, options: ModelConfig, output_dir: str) -> Task:
    """The task with the data that the options name; without any, generated data, which the output folder keeps.

    Raises:
        ValueError: a model is named without data, the data cannot be had, or lm-eval's task asks other rows than are
            held out here, whose answers may be trained on.
    """
    if settings.train_file or settings.dataset_name:
        rows = load_rows(str(settings.train_file or settings.dataset_name), bool(settings.train_file))
        task = as_task(settings, rows, settings.train_file)
        asked = dolly(**task.task_data)["test"]
        if list(zip(asked["prompt"][:], asked["response"][:], strict=True)) != task.scored:
            raise ValueError(
                f"The task dolly does not ask what is held out of {task.sources[1]}: it takes the folder that "
                f"{VARIABLE} names, or databricks/databricks-dolly-15k. ROUGE and BLEU would be of other data than "
                "the training. Give the data as --train_file, jsonl or jsonl.gz."
            )
        return task
    if options.model_name_or_path:
        raise ValueError(
            "--model_name_or_path needs data: --dataset_name databricks/databricks-dolly-15k, or --train_file."
        )
    rows = generated_rows(2000)
    file = Path(output_dir) / GENERATED
    with PartialState().main_process_first():
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))
    return as_task(settings, rows, str(file))


EXPERIMENT = experiment(
    "dolly_monolora",
    "Dolly",
    METRIC,
    PERFORMANCE,
    "task performance 14.08 with LoRA and 14.48 with MonoLoRA; "
    "ShieldGemma's average score 6.12 and 6.04, of the base 4.83.",
)


def main(arguments: list[str] | None = None) -> None:
    """Run the arms and seeds that the output folder has no results of, then write and print the table."""
    settings, training, options = parse(arguments, Table2Settings, "dolly_monolora", CONFIGS / "offline_dolly.yaml")
    check(settings, training, options)
    task = load_task(settings, options, training.output_dir)
    show(compare(task, settings, training, options), EXPERIMENT)


if __name__ == "__main__":
    run_as_program(main)
