"""What Silence adds to a training step: the time of its hinge, and of lowering biases, beside that of the step.

    python benchmarks/silence_step.py                     # some minutes on two cores
    python benchmarks/silence_step.py --dims 1024 --rows 256 1024

A step is forward, backward and AdamW of a Llama with one layer, whose vocabulary of 1,024 makes it a cheap one. The
hinge takes some of the cached rows, lowering biases takes all (--cached of them; it is done every few steps, or not at
all). They run one after another within each round; on the CPU in processor time. The table has medians, and the median
and the range of their ratio to the step.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from statistics import median

import torch
from measuring import CLOCK, DEVICE, in_turn, machine, milliseconds, options_of, print_table, ratios
from peft import get_peft_model
from small_models import VOCABULARY, llama
from torch import nn
from torch.optim import AdamW

from mono_peft import MonoLoraConfig, Silence

TARGETS: dict[str, str | list[str]] = {"q, v": ["q_proj", "v_proj"], "all-linear": "all-linear"}


def table_rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Lines of the table."""
    for d, (label, targets), rows in itertools.product(options.dims, TARGETS.items(), options.rows):
        adapter = MonoLoraConfig(r=8, target_modules=targets, encoder_bias=True, task_type="CAUSAL_LM")
        model = get_peft_model(llama(d, layers=1), adapter).train()
        silent = torch.randint(0, VOCABULARY, (options.cached // 128, 16, 8), device=DEVICE)
        batches = [{"input_ids": ids} for ids in silent]
        silence = Silence(model, batches, rows_per_step=rows, rows_per_module=options.cached)
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
        ids = torch.randint(0, VOCABULARY, (4, options.tokens // 4), device=DEVICE)

        def step(model: nn.Module = model, ids: torch.Tensor = ids, optimizer: AdamW = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        steps = itertools.count()

        def hinge(silence: Silence = silence, steps: Iterator[int] = steps) -> None:
            silence.add_gradients(next(steps))

        parts: dict[str, Callable[[], object]] = {"step": step, "hinge": hinge, "lowering": silence.lower_biases}
        times = in_turn(parts, options.rounds, uncounted=2, clock=CLOCK)
        cells = [f"{value:.1f}" for value in milliseconds(times).values()]
        for name in ("hinge", "lowering"):
            shares = ratios(times, name, "step")
            cells.append(f"{median(shares):.2%} ({shares[0]:.2%} to {shares[-1]:.2%})")
        cells.append(f"{silence.cached_bytes / 2**20:.0f}")
        yield [f"{d}, {label}, {options.tokens} tokens, {rows} rows", *cells]


def main() -> None:
    """Time and print a line after another."""
    parser = options_of(__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--tokens", type=int, default=512, help="of a step, in four rows")
    parser.add_argument("--rows", type=int, nargs="+", default=[256], help="that a module's hinge is computed on")
    parser.add_argument("--cached", type=int, default=4096, help="rows of each module, a multiple of 128")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    print(f"{machine('transformers', 'peft')}, r 8, median of {options.rounds} rounds\n")
    header = ["step", "step, ms", "hinge, ms", "lowering, ms", "hinge / step", "lowering / step", "cache, MiB"]
    print_table(header, table_rows(options))


if __name__ == "__main__":
    main()
