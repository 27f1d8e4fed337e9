"""Table 2, SST-2: does MonoLoRA learn the task as well as LoRA, how sparse are its latents, and is the model as safe?

The paper's setting (Llama-2-7b-chat; accuracy of the base 88.65, LoRA 92.78, MonoLoRA 94.84 %; ShieldGemma's average
4.83, 7.90, 3.53; task sparsity 36.71 %), with the cost that docs/table2.md estimates:

    accelerate launch recipes/sst2_monolora.py --config recipes/configs/paper_sst2.yaml --output_dir runs/sst2_paper

Any causal model and data, here local files with the columns `sentence` and `label`, and controls for "it trains less":

    python recipes/sst2_monolora.py --model_name_or_path MODEL --train_file train.tsv --eval_file dev.tsv \
        --methods base lora monolora lora+weight_decay lora+dropout lora+rank --seeds 0 1 2 --output_dir runs/my_data \
        --judges shieldgemma beaverdam

Without a model it builds a small one itself, without data it generates them, and finetunes that, in about four
minutes of one core: a demonstration, not the paper's experiment. The same command again continues a run that was
stopped, or prints its results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import library_messages  # noqa: F401  # before the libraries that speak while they are imported
import torch
from table2 import CONFIGS, Table2Settings, check, compare, experiment, show
from table2 import parse as parse_table2
from task import Scored, Task
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig

from evals.answers import answer_log_likelihoods
from evals.figures import Measure
from evals.local_files import labelled_sentences
from evals.prompts import SST2_ANSWERS, encode_answer, sst2_prompt
from evals.tasks.sentiment import is_right
from offline.language_model import sentiment_task
from vision_bench.runs import run_as_program

METRIC = "accuracy"
PERFORMANCE = (Measure("accuracy, %", METRIC, factor=100),)


@dataclass
class Sst2Settings(Table2Settings):
    """Table 2's options on labelled sentences (`--dataset_name stanfordnlp/sst2`, or tsv, csv, jsonl, parquet)."""

    eval_file: str | None = field(default=None, metadata={"help": "As --train_file, for the accuracy."})


def parse(arguments: list[str] | None) -> tuple[Sst2Settings, SFTConfig, ModelConfig]:
    """Command line over `--config` over the offline default (if no model is named) over what the machine has."""
    return parse_table2(arguments, Sst2Settings, "sst2_monolora", CONFIGS / "offline.yaml")


def load_task(settings: Sst2Settings, options: ModelConfig) -> Task:
    """The sentences that the options name, or generated ones, as prompts and answers.

    Raises:
        ValueError: settings of the data contradict each other, or the data cannot be had.
    """
    if bool(settings.train_file) != bool(settings.eval_file):
        raise ValueError("--train_file and --eval_file belong together; give both or neither.")
    if settings.train_file and settings.eval_file:
        train, scored = labelled_sentences(settings.train_file), labelled_sentences(settings.eval_file)
        sources = f"--train_file {settings.train_file}", f"--eval_file {settings.eval_file}"
    elif settings.dataset_name:
        train, scored = (labelled_sentences(settings.dataset_name, split) for split in ("train", "validation"))
        sources = (f"--dataset_name {settings.dataset_name}",) * 2
    elif options.model_name_or_path:
        raise ValueError(
            "--model_name_or_path needs data: --dataset_name stanfordnlp/sst2, or --train_file and --eval_file."
        )
    else:
        train = sentiment_task("train", settings.train_samples or 2000)
        scored = sentiment_task("dev", settings.eval_samples or 1000)
        sources = ("what is generated",) * 2
    if settings.train_samples and settings.train_samples > len(train):
        raise ValueError(f"--train_samples {settings.train_samples}, but there are {len(train)} training sentences.")
    return Task(
        recipe="sst2_monolora",
        metric=METRIC,
        score=accuracy,
        train=[(sst2_prompt(row["sentence"]), SST2_ANSWERS[row["label"]]) for row in train],
        drawn=settings.train_samples or len(train),
        scored=[(sst2_prompt(row["sentence"]), row["label"]) for row in scored[: settings.eval_samples]],
        sources=sources,
        unit="sentences",
        refuses_long_rows=True,  # a cut sentence is another sentence
    )


def accuracy(scored: Scored, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> float:
    """Share of sentences whose right label word has the larger log-likelihood; NaN if one is not finite."""
    encoded = [encode_answer(tokenizer, prompt, answer) for prompt, _ in scored for answer in SST2_ANSWERS]
    scores = answer_log_likelihoods(model, encoded, tokenizer.pad_token_id, batch_size)
    if not scores.isfinite().all():
        return math.nan  # the largest of them would be taken for an answer
    by_sentence = scores.view(len(scored), len(SST2_ANSWERS)).tolist()
    return math.fsum(is_right(label, row) for (_, label), row in zip(scored, by_sentence, strict=True)) / len(scored)


EXPERIMENT = experiment(
    "sst2_monolora",
    "SST-2",
    METRIC,
    PERFORMANCE,
    "accuracy 92.78 % with LoRA and 94.84 % with MonoLoRA; "
    "ShieldGemma's average score, lower is safer, 7.90 and 3.53, of the base 4.83.",
)


def main(arguments: list[str] | None = None) -> None:
    """Run the arms and seeds that the output folder has no results of, then write and print the table."""
    settings, training, options = parse(arguments)
    check(settings, training, options)
    show(compare(load_task(settings, options), settings, training, options), EXPERIMENT)


if __name__ == "__main__":
    run_as_program(main)
