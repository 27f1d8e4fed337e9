"""Which units of a wide top-k adapter never fire, and what helps: the SST-2 recipe's task on the offline model.

    python benchmarks/topk_dead_units.py                  # five arms, three seeds: a quarter of an hour on one core

A unit is dead if no token of the dev sentences' prompts makes it fire. The arms are `topk` as it is; A drawn `--scale`
times as large; `encoder_bias`, whose b starts at zero; the same with b = -A mean(x) at the start, so that no unit
fires on what all tokens share; and the auxiliary loss of top-k autoencoders (AuxK, arXiv:2406.04093): units that have
not fired for `--idle_steps` steps learn, `--auxiliary_k` of them a token, to add what the main ones lack. An
autoencoder lacks its reconstruction error; an adapter lacks what would lower the loss, the negative gradient in its
layer's output, taken as long as the update is. Printed are means with 95 % intervals over seeds, of the same data and
order in every arm.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from measuring import machine, options_of, print_table
from peft import get_peft_model
from torch import nn
from torch.nn import functional

from evals.answers import answer_log_likelihoods
from evals.prompts import SST2_ANSWERS, EncodedAnswer, encode_answer, sst2_prompt
from evals.tasks.sentiment import is_right
from mono_peft import MonoLoraConfig, activation_sparsity
from mono_peft.activity import active_adapters
from mono_peft.layer import MonoLoraLayer
from mono_peft.topk import TopK
from offline.language_model import offline_model, sentiment_task
from vision_bench.runs import interval

ARMS = ("topk", "larger A", "encoder_bias", "encoder_bias, centred", "auxiliary loss")


class Result(NamedTuple):
    """Of one arm and seed, in percent."""

    dead_before: float
    dead: float
    accuracy: float


class Task(NamedTuple):
    """The sentences as token ids."""

    train: list[EncodedAnswer]
    dev: list[EncodedAnswer]  # each sentence with either answer
    labels: list[int]
    prompts: list[dict[str, torch.Tensor]]  # of the dev sentences, in batches


def load_task(tokenizer: Any, options: argparse.Namespace) -> Task:
    """What `recipes/sst2_monolora.py` generates."""
    train, dev = sentiment_task("train", options.train_samples), sentiment_task("dev", options.dev_samples)
    answered = [encode_answer(tokenizer, sst2_prompt(row["sentence"]), SST2_ANSWERS[row["label"]]) for row in train]
    scored = [encode_answer(tokenizer, sst2_prompt(row["sentence"]), answer) for row in dev for answer in SST2_ANSWERS]
    ids = [answer.prompt_ids for answer in scored[::2]]
    prompts = [
        dict(tokenizer.pad({"input_ids": ids[i : i + 50]}, return_tensors="pt")) for i in range(0, len(ids), 50)
    ]
    return Task(answered, scored, [row["label"] for row in dev], prompts)


def training_row(answer: EncodedAnswer) -> dict[str, list[int]]:
    """Keyword arguments of the model, with the loss on the answer."""
    labels = [i if counts else -100 for i, counts in zip(*answer, strict=True)]
    return {"input_ids": answer.input_ids, "labels": labels}


@contextmanager
def kept_inputs(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, the last input (tokens, in) of each adapted layer by its name."""
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any) -> None:
        inputs[name] = args[0].detach().flatten(0, -2)

    layers = list(active_adapters(model))
    handles = [layer.register_forward_pre_hook(partial(keep, name)) for name, layer, _ in layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def centre(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Start b at -A mean(x) over the tokens of a batch that are no padding."""
    with kept_inputs(model) as inputs:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    counted = batch["attention_mask"].flatten().bool()
    for name, layer, adapter in active_adapters(model):
        encoder: Any = layer.monolora_encoder[adapter]
        encoder.bias.copy_(-encoder.weight @ inputs[name][counted].mean(0))


class AuxiliaryLoss:
    """Adds the gradient of AuxK to those of A and B after each backward pass."""

    def __init__(self, model: nn.Module, options: argparse.Namespace) -> None:
        self.layers: list[tuple[str, MonoLoraLayer, str]] = list(active_adapters(model))
        self.options = options
        self.idle = {name: torch.zeros(layer.r[adapter]) for name, layer, adapter in self.layers}
        self.gradients: dict[str, torch.Tensor] = {}
        for name, layer, _ in self.layers:
            layer.register_forward_hook(partial(self.watch, name))

    def watch(self, name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        """Hook of a layer: keep the gradient in its output, (tokens, out)."""

        def keep(gradient: torch.Tensor) -> None:
            self.gradients[name] = gradient.flatten(0, -2)

        if output.requires_grad:
            output.register_hook(keep)

    def add_gradients(self, inputs: dict[str, torch.Tensor]) -> None:
        """For the inputs and gradients of the last pass."""
        for name, layer, adapter in self.layers:
            encoder: Any = layer.monolora_encoder[adapter]
            decoder: Any = layer.monolora_decoder[adapter]
            sigma: Any = layer.monolora_activation[adapter]
            latents = functional.linear(inputs[name], encoder.weight)
            main = sigma(latents.detach())
            fired = (main != 0).any(0)
            self.idle[name] = torch.where(fired, 0, self.idle[name] + 1)
            dead = (self.idle[name] >= self.options.idle_steps).nonzero().flatten()
            length = functional.linear(main, decoder.weight.detach()).norm()
            if len(dead) == 0 or length == 0:
                continue
            lacking = -self.gradients[name]
            lacking *= length / lacking.norm()
            added = functional.linear(TopK(self.options.auxiliary_k)(latents[:, dead]), decoder.weight[:, dead])
            loss = (added - lacking).square().sum() / lacking.square().sum()
            (self.options.auxiliary_weight * loss).backward()


def run(arm: str, seed: int, task: Task, tokenizer: Any, folder: str, options: argparse.Namespace) -> Result:
    """Train an arm and measure it."""
    torch.manual_seed(seed)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model: Any = get_peft_model(
        base,
        MonoLoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], activation="topk", r=options.r, k=options.k,
            lora_alpha=options.r, encoder_bias=arm.startswith("encoder_bias"),
        ),
    )  # fmt: skip
    rows = [training_row(answer) for answer in random.Random(seed).sample(task.train, len(task.train))]
    collator = transformers.DataCollatorForSeq2Seq(tokenizer)
    batches = [collator(rows[i : i + 16]) for i in range(0, len(rows), 16)]
    if arm == "larger A":
        for _, layer, adapter in active_adapters(model):
            encoder: Any = layer.monolora_encoder[adapter]
            encoder.weight.data.mul_(options.scale)
    if arm == "encoder_bias, centred":
        centre(model, batches[0])
    dead_before = activation_sparsity(model, task.prompts).dead
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    auxiliary = AuxiliaryLoss(model, options) if arm == "auxiliary loss" else None
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        with kept_inputs(model) as inputs:
            model(**batch).loss.backward()
        if auxiliary is not None:
            auxiliary.add_gradients(inputs)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    scores = answer_log_likelihoods(model, task.dev, tokenizer.pad_token_id, 50).view(len(task.labels), 2).tolist()
    right = math.fsum(is_right(label, row) for label, row in zip(task.labels, scores, strict=True))
    dead = activation_sparsity(model, task.prompts).dead
    return Result(100 * dead_before, 100 * dead, 100 * right / len(task.labels))


def table_rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Lines of the table, each when the seeds of an arm are done."""
    folder = str(offline_model())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    task = load_task(tokenizer, options)
    first: list[Result] = []
    for arm in options.arms:
        results = [run(arm, seed, task, tokenizer, folder, options) for seed in options.seeds]
        before, dead, accuracy = (interval([result[i] for result in results]).text(1) for i in range(3))
        gap = interval([a.dead - b.dead for a, b in zip(results, first, strict=True)]).text(1) if first else ""
        first = first or results
        yield [arm, before, dead, gap, accuracy]


def main() -> None:
    """Run the arms and print the table."""
    parser = options_of(__doc__)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--r", type=int, default=256)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--train_samples", type=int, default=1000)
    parser.add_argument("--dev_samples", type=int, default=500)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--idle_steps", type=int, default=10)
    parser.add_argument("--auxiliary_k", type=int, default=32)
    parser.add_argument("--auxiliary_weight", type=float, default=1 / 32)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    print(
        f"{machine('transformers', 'peft')}, {time.strftime('%Y-%m-%d')}; r {options.r}, k {options.k}, "
        f"{options.train_samples} sentences, batch 16, one epoch, AdamW {options.learning_rate:g}, seeds "
        f"{options.seeds}, {options.dev_samples} dev sentences\n"
    )
    header = ["arm", "dead before, %", "dead after, %", "- topk, paired", "accuracy, %"]
    print_table(header, table_rows(options))


if __name__ == "__main__":
    main()
