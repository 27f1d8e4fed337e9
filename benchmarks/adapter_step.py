"""Time and memory of a training step with MonoLoRA, beside PEFT's LoRA and the frozen base alone.

    python benchmarks/adapter_step.py                              # every row: about half an hour on two cores
    python benchmarks/adapter_step.py --dims 1024 2048 --tokens 512 --ranks 8 --no_models

A step is forward and backward. The arms run one after another within each of `--steps` rounds, in one process, and the
table has medians and their ratios. "Saved" counts what autograd keeps between the passes beyond weights and input;
on a GPU the peak of allocated memory is added. Float32 on the CPU, bfloat16 with bfloat16 adapters on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from measuring import DEVICE, DTYPE, in_turn, machine, milliseconds, options_of, print_table
from small_models import ARMS, VOCABULARY, llama, with_adapters
from torch import nn

MIB = 2**20
SIZE = (2048, 16) if DEVICE == "cuda" else (512, 4)  # of the model: width, layers
SIZE_IN_WORDS = "Llama {} x {}".format(*SIZE)


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
) -> list[str]:
    """A line of the table: times of a step, their ratios, and memory."""

    def step(model: nn.Module) -> None:
        for tensor in (x, *model.parameters()):
            tensor.grad = None
        forward(model).backward()

    arms = {name: partial(step, model) for name, model in models.items()}
    medians = milliseconds(in_turn(arms, rounds, uncounted=3))
    saved = {name: saved_bytes(model, partial(forward, model), x) / MIB for name, model in models.items()}
    cells = [label, *(f"{medians[name]:.2f}" for name in ARMS)]
    cells += [f"{medians['MonoLoRA'] / medians[other]:.3f}" for other in ("LoRA", "base")]
    cells += [f"{saved[name]:.2f}" for name in ("LoRA", "MonoLoRA")]
    if torch.cuda.is_available():
        for name in ("LoRA", "MonoLoRA"):
            step(models[name])
            torch.cuda.reset_peak_memory_stats()
            step(models[name])
            cells.append(f"{torch.cuda.max_memory_allocated() / MIB:.1f}")
    return cells


def linear_rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Lines of single layers."""
    for d, tokens, r, dropout in itertools.product(options.dims, options.tokens, options.ranks, options.dropouts):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(d, d, bias=False)).to(DEVICE, DTYPE)
        models = with_adapters(base, target_modules=["0"], r=r, lora_dropout=dropout)
        x = torch.randn(1, tokens, d, device=DEVICE, dtype=DTYPE, requires_grad=True)

        def forward(model: nn.Module, x: torch.Tensor = x) -> torch.Tensor:
            output: torch.Tensor = model(x)
            return output.sum()

        yield row(f"Linear {d}, {tokens} tokens, r {r}, p {dropout}", models, forward, x, options.steps)


def model_rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Lines of a whole model."""
    base = llama(*SIZE)
    ids = torch.randint(0, VOCABULARY, (4, 128), device=DEVICE)
    for targets, dropout in itertools.product((["q_proj", "v_proj"], "all-linear"), options.dropouts):
        models = with_adapters(base, target_modules=targets, r=8, lora_dropout=dropout, task_type="CAUSAL_LM")
        embeddings = base.get_input_embeddings()(ids).detach().requires_grad_()

        def forward(model: nn.Module, x: torch.Tensor = embeddings) -> torch.Tensor:
            loss: torch.Tensor = model(inputs_embeds=x, labels=ids, use_cache=False).loss
            return loss

        label = (
            f"{SIZE_IN_WORDS}, {'all-linear' if targets == 'all-linear' else 'q, v'}, 4 x 128 tokens, r 8, p {dropout}"
        )
        yield row(label, models, forward, embeddings, options.steps)


def generate_row(options: argparse.Namespace) -> str:
    """The time of greedy generation."""
    models = with_adapters(llama(*SIZE), target_modules="all-linear", r=8, task_type="CAUSAL_LM")
    ids = torch.randint(0, VOCABULARY, (1, 16), device=DEVICE)
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}

    def run(model: Any) -> None:
        model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)

    runs = {name: partial(run, model) for name, model in models.items()}
    medians = milliseconds(in_turn(runs, max(5, options.steps // 5), uncounted=3))
    times = ", ".join(f"{name} {value:.0f} ms" for name, value in medians.items())
    ratio = medians["MonoLoRA"] / medians["LoRA"]
    return f"generate, {SIZE_IN_WORDS}, all-linear, 64 new tokens: {times}; ratio {ratio:.3f}"


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
    print(f"{machine('peft')}, {DTYPE}\n")
    columns = ["step", *(f"{arm}, ms" for arm in ARMS), "ratio to LoRA", "to base"]
    columns += ["LoRA saved, MiB", "MonoLoRA saved"]
    columns += ["LoRA peak, MiB", "MonoLoRA peak"] if DEVICE == "cuda" else []
    print_table(columns, itertools.chain(linear_rows(options), [] if options.no_models else model_rows(options)))
    if not options.no_models:
        print(f"\n{generate_row(options)}")


if __name__ == "__main__":
    main()
