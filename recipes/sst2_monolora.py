"""Table 2, SST-2: does MonoLoRA learn the task as well as LoRA, and how sparse are its latents?

The paper's setting (Llama-2-7b-chat; accuracy of the base 88.65, LoRA 92.78, MonoLoRA 94.84 %; task sparsity 36.71 %):

    accelerate launch recipes/sst2_monolora.py --config recipes/configs/paper.yaml --output_dir runs/sst2_paper

Any causal model and data, here local files with the columns `sentence` and `label`:

    python recipes/sst2_monolora.py --model_name_or_path MODEL --train_file train.tsv --eval_file dev.tsv \
        --seeds 0 1 2 --output_dir runs/my_data

Without a model it builds a small one itself, without data it generates them, and finetunes that, in about three
minutes on 2 cores: a demonstration, not the paper's experiment. The same command again continues a run that was
stopped, or prints its results. The alignment columns of Table 2 need judges and are not part of this recipe.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from _arms import METHODS, adapter_config, check_arms, checkpoint, finetuning, load_base, load_tokenizer
from _labelled_text import load_labelled_text
from _run import Run, device_name, interval, markdown_table, paired_difference
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, TrlParser

from evals.answers import answer_log_likelihoods
from evals.embedded import embedded_model, sentiment_task
from evals.prompts import SST2_ANSWERS, encode_answer, sst2_prompt, training_row
from mono_peft import SparsityCallback, activation_sparsity

PAPER = {"base": (88.65, None), "lora": (92.78, 0.0), "monolora": (94.84, 36.71)}  # accuracy and task sparsity, %
EMBEDDED = Path(__file__).parent / "configs" / "embedded.yaml"


@dataclass
class Sst2Arguments:
    """What is compared and on which data; model, adapter and training come from TRL's ModelConfig and SFTConfig."""

    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": f"Arms: {', '.join(METHODS)}"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One run of each arm per seed."})
    activation: str = field(default="relu", metadata={"help": "MonoLoRA's sigma."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub name, e.g. stanfordnlp/sst2."})
    train_file: str | None = field(default=None, metadata={"help": "tsv, csv, jsonl or parquet: sentence, label."})
    eval_file: str | None = field(default=None, metadata={"help": "The same, for the accuracy."})
    train_samples: int | None = field(default=None, metadata={"help": "Sentences drawn per seed; None: all."})
    eval_samples: int | None = field(default=None, metadata={"help": "The first so many are scored; None: all."})


def parse(arguments: list[str] | None) -> tuple[Sst2Arguments, SFTConfig, ModelConfig]:
    """Command line over `--config` over the embedded default (if no model is named) over what the machine has."""
    parser = TrlParser((Sst2Arguments, SFTConfig, ModelConfig))
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    parser.set_defaults_with_config(
        output_dir="runs/sst2_monolora",
        use_cpu=not torch.accelerator.is_available(),
        bf16=bf16,
        dtype="bfloat16" if bf16 else "float32",
        save_strategy="epoch",
        save_total_limit=2,
    )
    parsed = parser.parse_args_and_config(arguments)
    if parsed[2].model_name_or_path is None:
        parser.set_defaults_with_config(**yaml.safe_load(EMBEDDED.read_text(encoding="utf-8")))
        parsed = parser.parse_args_and_config(arguments)
    return parsed


def check(script: Sst2Arguments, training: SFTConfig, model_args: ModelConfig) -> None:
    """Raise ValueError for settings that contradict each other."""
    check_arms(script.methods, script.seeds, training, model_args)
    for name in ("train_samples", "eval_samples"):
        value = getattr(script, name)
        if value is not None and value < 2:
            raise ValueError(f"--{name} must be at least 2, got {value}.")
    if bool(script.train_file) != bool(script.eval_file):
        raise ValueError("--train_file and --eval_file belong together; give both or neither.")
    if script.dataset_name and script.train_file:
        raise ValueError("--dataset_name and --train_file are two sources of the same data; give one.")
    if model_args.model_name_or_path and not (script.dataset_name or script.train_file):
        raise ValueError(
            "--model_name_or_path needs data: --dataset_name stanfordnlp/sst2, or --train_file and --eval_file."
        )
    if training.packing:
        raise ValueError("--packing is for long texts; here each row is one sentence. Leave it out.")


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


def check_length(tokenizer: PreTrainedTokenizerBase, rows: Dataset, max_length: int | None) -> None:
    """Raise ValueError if the longest prompt and answer do not fit; TRL would cut the answer off without a word."""
    longest = sorted(rows["sentence"], key=len)[-100:]
    needed = 2 + max(len(encode_answer(tokenizer, sst2_prompt(s), SST2_ANSWERS[0]).input_ids) for s in longest)
    if max_length is not None and needed > max_length:
        raise ValueError(f"--max_length {max_length} cuts off answers: the longest row has {needed} tokens.")


def accuracy(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, dev: Dataset, batch_size: int) -> float:
    """Share of sentences whose right label word has the larger log-likelihood, in [0, 1]."""
    encoded = [encode_answer(tokenizer, sst2_prompt(s), answer) for s in dev["sentence"] for answer in SST2_ANSWERS]
    scores = answer_log_likelihoods(model, encoded, tokenizer.pad_token_id, batch_size)
    predicted = scores.view(len(dev), len(SST2_ANSWERS)).argmax(1)
    return (predicted == torch.tensor(dev["label"][:])).double().mean().item()


def prompt_batches(tokenizer: PreTrainedTokenizerBase, dev: Dataset, batch_size: int) -> list[dict[str, Any]]:
    """The task's inputs, prompts without answers, on which the task sparsity is measured."""
    prompts = [encode_answer(tokenizer, sst2_prompt(s), SST2_ANSWERS[0]) for s in dev["sentence"]]
    ids = [p.input_ids[: p.completion_mask.index(1)] for p in prompts]
    starts = range(0, len(ids), batch_size)
    return [dict(tokenizer.pad({"input_ids": ids[i : i + batch_size]}, return_tensors="pt")) for i in starts]


def identity(
    script: Sst2Arguments, training: SFTConfig, model_args: ModelConfig, data: dict[str, int]
) -> dict[str, Any]:
    """The settings that decide the results, for the run's folder and rows; of TRL's those that are not its default."""
    defaults = SFTConfig(output_dir="", use_cpu=training.use_cpu, bf16=training.bf16).to_dict()
    irrelevant = re.compile(
        "^seed$|output_dir|resume|run_name|disable_tqdm|hub|^(log|report|save|eval|trackio|project)"
    )
    chosen = {k: v for k, v in training.to_dict().items() if v != defaults[k] and not irrelevant.search(k)}
    model = {k: v for k, v in asdict(model_args).items() if v != ModelConfig.__dataclass_fields__[k].default}
    plugin = training.deepspeed_plugin
    kind = training.distributed_state.distributed_type.value if plugin is None else f"ZERO{plugin.zero_stage}"
    processes = {"num_processes": training.world_size, "distributed_type": kind}
    return asdict(script) | data | {"model": model, "training": chosen, "bf16": training.bf16} | processes


def report(run: Run, script: Sst2Arguments, demonstration: bool) -> str:
    """The table of this run beside the paper's, as Markdown."""
    table = []
    for method in (m for m in METHODS if m in script.methods):
        scores = interval([row["value"] for row in run.find("accuracy", method=method)])
        zeros = [row["value"] for row in run.find("task_sparsity", method=method)]
        sparsity = interval(zeros).scaled(100).text() if zeros else {"base": "-", "lora": "0"}[method]
        paper = ["-" if value is None else f"{value:.2f}" for value in PAPER[method]]
        table.append([method, scores.scaled(100).text(), sparsity, str(scores.n), *paper])
    text = "# SST-2: task accuracy and sparsity\n\n"
    if demonstration:
        text += (
            "A small-scale demonstration on the embedded model. The paper's columns are Llama-2-7b-chat on SST-2:\n"
        )
        text += "another experiment, printed for reference.\n\n"
    header = ["method", "accuracy, %", "task sparsity, %", "runs", "paper: accuracy, %", "paper: task sparsity, %"]
    text += markdown_table(header, table)
    text += "\nMean ± half-width of the 95 % interval over seeds, where there are several; accuracy on "
    text += f"{run.find('accuracy')[0]['n']} sentences.\nSparsity is the share of exact zeros in sigma(A x) on the "
    text += "prompts; LoRA has no sigma, so 0 by construction.\n"
    gain = paired_difference(run.find("accuracy", method="monolora"), run.find("accuracy", method="lora"))
    if gain is not None:
        text += f"\nMonoLoRA - LoRA, paired by seed: {gain.scaled(100).text(sign=True)} points of accuracy.\n"
    return text


def main(arguments: list[str] | None = None) -> None:
    """Run the arms and seeds that the output folder has no results of, then write and print the table."""
    script, training, model_args = parse(arguments)
    check(script, training, model_args)
    adapters = {m: adapter_config(m, model_args, script.activation) for m in script.methods if m != "base"}
    train_set, dev = load_data(script)
    sizes = {"train_sentences": len(train_set), "eval_sentences": len(dev)}
    config = identity(script, training, model_args, sizes)
    state = PartialState()
    run = Run(training.output_dir, "sst2_monolora", config, state.is_main_process)
    demonstration = model_args.model_name_or_path is None
    if demonstration:
        model_args.model_name_or_path = str(embedded_model())
    tokenizer = load_tokenizer(training, model_args, list(adapters.values()))
    check_length(tokenizer, train_set, training.max_length)
    device, batch_size = device_name(training.device), training.per_device_eval_batch_size
    batches = prompt_batches(tokenizer, dev, batch_size)

    if "base" in script.methods and not run.find("accuracy", method="base"):
        start = time.monotonic()
        score = accuracy(load_base(training, model_args), tokenizer, dev, batch_size)
        run.add(
            "accuracy", score, n=len(dev), seed=None, seconds=time.monotonic() - start, device=device, method="base"
        )
    for seed in script.seeds:
        rows = train_set.shuffle(seed=seed).select(range(script.train_samples or len(train_set)))
        rows = Dataset.from_list(
            [training_row(tokenizer, sst2_prompt(r["sentence"]), SST2_ANSWERS[r["label"]]) for r in rows]
        )
        for method, adapter in adapters.items():
            if run.find("accuracy", method=method, seed=seed):
                continue
            start = time.monotonic()
            folder = run.folder / f"{method}-seed{seed}"
            trainer = finetuning(folder, seed, rows, adapter, tokenizer, training, model_args)
            if method == "monolora":
                trainer.add_callback(SparsityCallback(trainer, batches[:1]))
            trainer.train(resume_from_checkpoint=checkpoint(folder, training.resume_from_checkpoint))
            trainer.save_model(str(folder / "adapter"))
            score = accuracy(trainer.model, tokenizer, dev, batch_size)
            common = {"n": len(dev), "seed": seed, "device": device, "method": method}
            if method == "monolora":
                measured = activation_sparsity(trainer.model, batches)
                run.add("task_sparsity", measured.overall, seconds=0, **common)
                run.add("dead_units", measured.dead, seconds=0, **common)
            # Last, because this row says that the arm is done.
            run.add("accuracy", score, seconds=time.monotonic() - start, **common)
    text = report(run, script, demonstration)
    run.write("results.md", text)
    state.print(text)


if __name__ == "__main__":
    main()
