"""Table 2, SST-2: does MonoLoRA learn the task as well as LoRA, how sparse are its latents, and is the model as safe?

The paper's setting (Llama-2-7b-chat; accuracy of the base 88.65, LoRA 92.78, MonoLoRA 94.84 %; ShieldGemma's average
4.83, 7.90, 3.53; task sparsity 36.71 %), with the cost that docs/table2.md estimates:

    accelerate launch recipes/sst2_monolora.py --config recipes/configs/paper_sst2.yaml --output_dir runs/sst2_paper

Any causal model and data, here local files with the columns `sentence` and `label`, and controls for "it trains less":

    python recipes/sst2_monolora.py --model_name_or_path MODEL --train_file train.tsv --eval_file dev.tsv \
        --methods base lora monolora lora+weight_decay lora+dropout lora+rank --seeds 0 1 2 --output_dir runs/my_data \
        --judges shieldgemma beaverdam

Without a model it builds a small one itself, without data it generates them, and finetunes that, in about four
minutes on 2 cores: a demonstration, not the paper's experiment. The same command again continues a run that was
stopped, or prints its results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from identity import Content
from labelled_text import load_labelled_text
from mixtures import Pair
from program import run_as_program
from table2 import CONFIGS, FinetuningTask, Table2Arguments, check, compare
from table2 import parse as parse_table2
from table2_report import Column
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig

from evals.answers import answer_log_likelihoods
from evals.contents import checksum
from evals.prompts import SST2_ANSWERS, encode_answer, sst2_prompt
from offline.language_model import sentiment_task


@dataclass
class Sst2Arguments(Table2Arguments):
    """Table 2's options on labelled sentences (`--dataset_name stanfordnlp/sst2`, or tsv, csv, jsonl, parquet)."""

    eval_file: str | None = field(default=None, metadata={"help": "As --train_file, for the accuracy."})


def parse(arguments: list[str] | None) -> tuple[Sst2Arguments, SFTConfig, ModelConfig]:
    """Command line over `--config` over the offline default (if no model is named) over what the machine has."""
    return parse_table2(arguments, Sst2Arguments, "sst2_monolora", CONFIGS / "offline.yaml")


def check_data(script: Sst2Arguments, model_args: ModelConfig) -> None:
    """Raise ValueError for settings of the data that contradict each other."""
    if bool(script.train_file) != bool(script.eval_file):
        raise ValueError("--train_file and --eval_file belong together; give both or neither.")
    if model_args.model_name_or_path and not (script.dataset_name or script.train_file):
        raise ValueError(
            "--model_name_or_path needs data: --dataset_name stanfordnlp/sst2, or --train_file and --eval_file."
        )


def load_data(script: Sst2Arguments) -> tuple[Dataset, Dataset]:
    """Sentences to train on, of which each seed draws, and sentences to score."""
    if script.train_file and script.eval_file:
        train, dev = load_labelled_text(script.train_file), load_labelled_text(script.eval_file)
    elif script.dataset_name:
        train = load_labelled_text(script.dataset_name, split="train")
        dev = load_labelled_text(script.dataset_name, split="validation")
    else:
        train = Dataset.from_list(sentiment_task("train", script.train_samples or 2000))
        dev = Dataset.from_list(sentiment_task("dev", script.eval_samples or 1000))
    if script.train_samples and script.train_samples > len(train):
        raise ValueError(f"--train_samples {script.train_samples}, but there are {len(train)} training sentences.")
    return train, dev.select(range(min(script.eval_samples or len(dev), len(dev))))


class Sst2(FinetuningTask):
    """Classification of sentences by the label word with the larger log-likelihood."""

    recipe, paper, metric = "sst2_monolora", "SST-2", "accuracy"
    performance = (Column("accuracy, %", "accuracy", factor=100),)

    def __init__(self, script: Sst2Arguments) -> None:
        self.train, self.dev = load_data(script)
        self.drawn = script.train_samples or len(self.train)
        self.prompts = [sst2_prompt(sentence) for sentence in self.dev["sentence"]]
        self.task_data = {}
        name = f"--dataset_name {script.dataset_name}" if script.dataset_name else "what is generated"
        self.sources = (
            (f"--train_file {script.train_file}", f"--eval_file {script.eval_file}")
            if script.train_file
            else (name, name)
        )

    def training_pairs(self, seed: int) -> list[Pair]:
        rows = self.train.shuffle(seed=seed).select(range(self.drawn))
        return [(sst2_prompt(row["sentence"]), SST2_ANSWERS[row["label"]]) for row in rows]

    def sizes(self) -> dict[str, int]:
        return {"train_sentences": len(self.train), "eval_sentences": len(self.dev)}

    def contents(self) -> dict[str, Content]:
        train = [[sst2_prompt(row["sentence"]), SST2_ANSWERS[row["label"]]] for row in self.train]
        scored = list(zip(self.prompts, self.dev["label"], strict=True))
        return {
            "train": Content(self.sources[0], checksum(train)),
            "eval": Content(self.sources[1], checksum(scored)),
        }

    def check_lengths(self, tokenizer: PreTrainedTokenizerBase, context: int, max_length: int | None) -> None:
        """Raise ValueError if the longest prompt and answer do not fit; a cut sentence is another sentence."""
        longest = sorted(self.train["sentence"], key=len)[-100:]
        needed = 2 + max(len(encode_answer(tokenizer, sst2_prompt(s), SST2_ANSWERS[0]).input_ids) for s in longest)
        if max_length is not None and needed > max_length:
            raise ValueError(f"--max_length {max_length} cuts off answers: the longest row has {needed} tokens.")

    def score(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> float:
        """Share of sentences whose right label word has the larger log-likelihood; NaN if one is not finite."""
        encoded = [encode_answer(tokenizer, prompt, answer) for prompt in self.prompts for answer in SST2_ANSWERS]
        scores = answer_log_likelihoods(model, encoded, tokenizer.pad_token_id, batch_size)
        if not scores.isfinite().all():
            return math.nan  # argmax would take it for an answer
        predicted = scores.view(len(self.dev), len(SST2_ANSWERS)).argmax(1)
        return (predicted == torch.tensor(self.dev["label"][:])).double().mean().item()


def main(arguments: list[str] | None = None) -> None:
    """Run the arms and seeds that the output folder has no results of, then write and print the table."""
    script, training, model_args = parse(arguments)
    check(script, training, model_args)
    check_data(script, model_args)
    compare(Sst2(script), script, training, model_args)


if __name__ == "__main__":
    run_as_program(main)
