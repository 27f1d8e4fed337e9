"""What ProvenanceCallback adds to a training step: the same step without it, in turn.

    python benchmarks/provenance_step.py                  # some minutes on two cores
    python benchmarks/provenance_step.py --dims 576 --ranks 8

A step is what `Trainer` does with a batch: forward, backward and AdamW, of a Llama whose vocabulary of 1,024 makes it
a cheap one, with adapters on all linear layers. The arms run one after another within each round; on the CPU in
processor time. The table has medians, and the median and the range of their ratio.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from measuring import CLOCK, in_turn, machine, milliseconds, options_of, print_table, ratios
from peft import get_peft_model
from small_models import VOCABULARY, llama
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from mono_peft import MonoLoraConfig
from mono_peft.provenance import ProvenanceCallback

ROWS = 512  # of the dataset


def step_of(base: LlamaForCausalLM, adapter: dict[str, Any], rows: list[Any], batch: int, watched: bool) -> Callable:
    """A function that takes a step of a trainer on the next rows, with or without the callback."""
    torch.manual_seed(0)
    config = MonoLoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False, **adapter)
    arguments = TrainingArguments(
        tempfile.mkdtemp(), report_to="none", per_device_train_batch_size=batch, max_steps=1000, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)
    if watched:
        trainer.add_callback(ProvenanceCallback(trainer))
    loader = trainer.get_train_dataloader()
    handler = trainer.callback_handler
    trainer.create_optimizer_and_scheduler(1000)
    trainer.current_gradient_accumulation_steps = 1
    handler.train_dataloader = loader
    handler.on_train_begin(arguments, trainer.state, trainer.control)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> None:
        trainer.training_step(trainer.model, next(batches))
        trainer.optimizer.step()
        trainer.model.zero_grad()
        handler.on_step_end(arguments, trainer.state, trainer.control)

    return step


def table_rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Lines of the table."""
    for d, r in itertools.product(options.dims, options.ranks):
        ids = torch.randint(0, VOCABULARY, (ROWS, options.tokens // options.batch))
        rows = [{"input_ids": row, "labels": row} for row in ids]
        steps = {
            name: step_of(llama(d, options.layers, wider=3), {"r": r}, rows, options.batch, name == "watched")
            for name in ("plain", "watched")
        }
        times = in_turn(steps, options.rounds, uncounted=3, clock=CLOCK)
        shares = [ratio - 1 for ratio in ratios(times, "watched", "plain")]
        label = f"{d} x {options.layers}, {options.batch} rows of {options.tokens // options.batch}, r {r}"
        cells = [f"{value:.1f}" for value in milliseconds(times).values()]
        yield [label, *cells, f"{median(shares):.1%} ({shares[0]:.1%} to {shares[-1]:.1%})"]


def main() -> None:
    """Time and print a line after another."""
    parser = options_of(__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[576, 1024])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of a step")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    print(f"{machine('transformers', 'peft')}, median of {options.rounds} rounds\n")
    print_table(["step", "plain, ms", "watched, ms", "more"], table_rows(options))


if __name__ == "__main__":
    main()
