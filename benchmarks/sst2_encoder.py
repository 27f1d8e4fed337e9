"""MonoLoRA beside PEFT's LoRA on a pretrained encoder and real SST-2: is a gap the learning rate, the scale or sigma?

Each row is one setting over the same seeds (the same base, head, data order and dropout seed in every arm); printed
are the mean accuracy on the dev sentences with its 95 % interval and the paired difference to LoRA's row of the same
settings. `identity` is MonoLoRA without its non-linearity: it has to agree with LoRA.

    python benchmarks/sst2_encoder.py --model sentence-transformers/all-MiniLM-L6-v2 \
        --train_file train.tsv --eval_file dev.tsv --learning_rates 1e-3 3e-3 --alphas 16 32 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from statistics import mean

import torch
import transformers
from datasets import Dataset
from measuring import machine, options_of, print_table
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from evals.local_files import binary_labels, file_rows
from mono_peft import MonoLoraConfig, activation_sparsity
from vision_bench.runs import interval


def sentences(file: str, tokenizer: transformers.PreTrainedTokenizerBase) -> Dataset:
    """A GLUE file (tsv: sentence, label) as token ids and labels."""
    rows = file_rows(file)
    columns = {"sentence": [row["sentence"] for row in rows], "label": binary_labels(rows, file)}
    return Dataset.from_dict(columns).map(
        lambda batch: tokenizer(batch["sentence"]), batched=True, remove_columns=["sentence"]
    )


def accuracy(
    options: argparse.Namespace, arm: str, rate: float, alpha: float, r: int, seed: int
) -> tuple[float, float]:
    """Finetune one arm; returns dev accuracy in percent and the sparsity of its latents in percent (NaN for LoRA)."""
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
    shared = {"r": r, "lora_alpha": alpha, "lora_dropout": options.dropout, "target_modules": ["query", "value"]}
    if arm == "lora":
        config = LoraConfig(task_type="SEQ_CLS", **shared)
    else:
        config = MonoLoraConfig(task_type="SEQ_CLS", activation=arm, **shared)
    collator = DataCollatorWithPadding(options.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, seed=seed, learning_rate=rate, per_device_train_batch_size=32, per_device_eval_batch_size=64,
            num_train_epochs=1, train_sampling_strategy="group_by_length",
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not torch.accelerator.is_available(),
            logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(
            get_peft_model(model, config),
            arguments,
            collator,
            options.train.shuffle(seed=seed).select(range(options.train_samples)),
        )
        trainer.train()
        predicted = trainer.predict(options.dev)
    score = 100 * float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())
    if arm == "lora":
        return score, float("nan")
    rows = options.dev.remove_columns("label")
    batches = [collator([rows[j] for j in range(i, min(i + 64, len(rows)))]) for i in range(0, len(rows), 64)]
    return score, 100 * activation_sparsity(trainer.model, batches).overall


def table_rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Lines of the table, each when its seeds are done."""
    for rate, alpha, r in product(options.learning_rates, options.alphas, options.ranks):
        lora: list[float] = []
        for arm in options.arms:
            results = [accuracy(options, arm, rate, alpha, r, seed) for seed in options.seeds]
            scores = [score for score, _ in results]
            lora = scores if arm == "lora" else lora
            gap = interval([a - b for a, b in zip(scores, lora, strict=True)]).text(2) if lora else "-"
            sparsity = f"{mean(zero for _, zero in results):.1f}" if arm != "lora" else "-"
            yield [arm, f"{rate:g}", f"{alpha:g}", str(r), interval(scores).text(2), gap, sparsity]


def main() -> None:
    """Run the grid and print the table."""
    parser = options_of(__doc__)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--eval_file", required=True)
    parser.add_argument("--arms", nargs="+", default=["lora", "relu"], help="lora, or an activation of MonoLoRA")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--alphas", nargs="+", type=float, default=[16])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8])
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--train_samples", type=int, default=6400)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    options.tokenizer = AutoTokenizer.from_pretrained(options.model)
    options.train = sentences(options.train_file, options.tokenizer)
    options.dev = sentences(options.eval_file, options.tokenizer)

    print(
        f"{machine('transformers', 'peft')}, {time.strftime('%Y-%m-%d')}; {options.train_samples} "
        f"sentences, batch 32, one epoch, AdamW, seeds {options.seeds}, {len(options.dev)} dev sentences\n"
    )
    header = ["arm", "lr", "alpha", "r", "accuracy, %", "- LoRA, paired", "sparsity, %"]
    print_table(header, table_rows(options))


if __name__ == "__main__":
    main()
