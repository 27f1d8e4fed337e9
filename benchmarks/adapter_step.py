"""Time and memory of a training step with MonoLoRA, beside PEFT's LoRA and the frozen base alone.

    python benchmarks/adapter_step.py                              # every row: about half an hour on two cores
    python benchmarks/adapter_step.py --dims 1024 2048 --tokens 512 --ranks 8 --no_models

A step is forward and backward. The arms run one after another within each of `--steps` rounds, in one process, and the
table has medians and their ratios. "Saved" counts what autograd keeps between the passes beyond weights and input;
on a GPU the peak of allocated memory is added. Float32 on the CPU, bfloat16 with bfloat16 adapters on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from measuring import in_turn, machine, options_of
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mono_peft import MonoLoraConfig

ARMS = ("base", "LoRA", "MonoLoRA")
MIB = 2**20


def with_adapters(base: nn.Module, **options: Any) -> dict[str, nn.Module]:
    """The frozen base, and it with either adapter; B is not zero, so that every product counts."""
    models = {"base": copy.deepcopy(base).requires_grad_(False)}
    for name, config in (
        ("LoRA", LoraConfig(init_lora_weights=False, **options)),
        ("MonoLoRA", MonoLoraConfig(init_weights=False, **options)),
    ):
        models[name] = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    return {name: model.train() for name, model in models.items()}


def milliseconds(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median of each run over the rounds."""
    return {name: 1e3 * median(values) for name, values in in_turn(runs, rounds, uncounted=3).items()}


def saved_bytes(model: nn.Module, forward: Callable[[], torch.Tensor], x: torch.Tensor) -> int:
    """What autograd keeps of a forward pass beyond weights, buffers and the input."""
    uncounted = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in uncounted:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = forward()  # else the storage of a freed tensor may be counted again
    del alive
    return sum(kept.values())


def row(
    label: str,
    models: dict[str, nn.Module],
    forward: Callable[[nn.Module], torch.Tensor],
    x: torch.Tensor,
    rounds: int,
) -> str:
    """A line of the table: times of a step, their ratios, and memory."""

    def step(model: nn.Module) -> None:
        for tensor in (x, *model.parameters()):
            tensor.grad = None
        forward(model).backward()

    medians = milliseconds({name: partial(step, model) for name, model in models.items()}, rounds)
    saved = {name: saved_bytes(model, partial(forward, model), x) / MIB for name, model in models.items()}
    cells = [f"{medians[name]:.2f}" for name in ARMS]
    cells += [f"{medians['MonoLoRA'] / medians[other]:.3f}" for other in ("LoRA", "base")]
    cells += [f"{saved[name]:.2f}" for name in ("LoRA", "MonoLoRA")]
    if torch.cuda.is_available():
        for name in ("LoRA", "MonoLoRA"):
            step(models[name])
            torch.cuda.reset_peak_memory_stats()
            step(models[name])
            cells.append(f"{torch.cuda.max_memory_allocated() / MIB:.1f}")
    return f"| {label} | " + " | ".join(cells) + " |"


def linear_rows(options: argparse.Namespace, device: str, dtype: torch.dtype) -> Iterator[str]:
    """Lines of single layers."""
    for d, tokens, r, dropout in itertools.product(options.dims, options.tokens, options.ranks, options.dropouts):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(d, d, bias=False)).to(device, dtype)
        models = with_adapters(base, target_modules=["0"], r=r, lora_dropout=dropout)
        x = torch.randn(1, tokens, d, device=device, dtype=dtype, requires_grad=True)

        def forward(model: nn.Module, x: torch.Tensor = x) -> torch.Tensor:
            output: torch.Tensor = model(x)
            return output.sum()

        yield row(f"Linear {d}, {tokens} tokens, r {r}, p {dropout}", models, forward, x, options.steps)


def llama(device: str, dtype: torch.dtype) -> tuple[Any, str]:
    """A Llama with random weights, and its size in words."""
    hidden, layers = (2048, 16) if device == "cuda" else (512, 4)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, dtype), f"Llama {hidden} x {layers}"


def model_rows(options: argparse.Namespace, device: str, dtype: torch.dtype) -> Iterator[str]:
    """Lines of a whole model."""
    base, size = llama(device, dtype)
    ids = torch.randint(0, 1024, (4, 128), device=device)
    for targets, dropout in itertools.product((["q_proj", "v_proj"], "all-linear"), options.dropouts):
        models = with_adapters(base, target_modules=targets, r=8, lora_dropout=dropout, task_type="CAUSAL_LM")
        embeddings = base.get_input_embeddings()(ids).detach().requires_grad_()

        def forward(model: nn.Module, x: torch.Tensor = embeddings) -> torch.Tensor:
            loss: torch.Tensor = model(inputs_embeds=x, labels=ids, use_cache=False).loss
            return loss

        label = f"{size}, {'all-linear' if targets == 'all-linear' else 'q, v'}, 4 x 128 tokens, r 8, p {dropout}"
        yield row(label, models, forward, embeddings, options.steps)


def generate_row(options: argparse.Namespace, device: str, dtype: torch.dtype) -> str:
    """The time of greedy generation."""
    base, size = llama(device, dtype)
    models = with_adapters(base, target_modules="all-linear", r=8, task_type="CAUSAL_LM")
    ids = torch.randint(0, 1024, (1, 16), device=device)
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}

    def run(model: Any) -> None:
        model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)

    runs = {name: partial(run, model) for name, model in models.items()}
    medians = milliseconds(runs, max(5, options.steps // 5))
    times = ", ".join(f"{name} {value:.0f} ms" for name, value in medians.items())
    return f"generate, {size}, all-linear, 64 new tokens: {times}; ratio {medians['MonoLoRA'] / medians['LoRA']:.3f}"


def main() -> None:
    """Time and print a line after another."""
    parser = options_of(__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--steps", type=int, default=30, help="rounds that count")
    parser.add_argument("--no_models", action="store_true", help="single layers only")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(f"{machine('peft')}, {dtype}\n")
    columns = [
        "step",
        *(f"{arm}, ms" for arm in ARMS),
        "ratio to LoRA",
        "to base",
        "LoRA saved, MiB",
        "MonoLoRA saved",
    ]
    columns += ["LoRA peak, MiB", "MonoLoRA peak"] if device == "cuda" else []
    print(f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")
    for line in linear_rows(options, device, dtype):
        print(line, flush=True)
    if not options.no_models:
        for line in model_rows(options, device, dtype):
            print(line, flush=True)
        print(f"\n{generate_row(options, device, dtype)}")


if __name__ == "__main__":
    main()
