"""Speed of greedy generation with an adapter beside the base model, MonoLoRA and PEFT's LoRA (not merged).

    OMP_NUM_THREADS=1 python benchmarks/decoding.py                # a random Llama of SmolLM2-135M's shape: 15 minutes
    OMP_NUM_THREADS=1 python benchmarks/decoding.py --model FOLDER --ranks 8 --batches 1
    OMP_NUM_THREADS=1 python benchmarks/decoding.py --compiled --ranks 8 --batches 1

A MonoLoRA adapter cannot be merged, so that its cost for each token stays. All linear layers are adapted. The arms run
one after another within each of `--rounds` rounds, in one process; a round is one call of `generate` with a prompt of
16 tokens. On a CPU it is timed by the processor's time, so use one thread. The overhead of an arm is its time for a
token of every sequence minus the base's; beside the ratio of the medians stands the middle half of the rounds' ratios.
"Bare operations" is MonoLoRA by its five operations in each layer with no check at all, the least it can cost in eager
mode. With `--compiled` the model's forward is compiled by `torch.compile` in one graph with a static cache.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from statistics import quantiles
from typing import Any
from unittest.mock import patch

import torch
from measuring import CLOCK, DEVICE, in_turn, machine, milliseconds, options_of, print_table, ratios
from small_models import ARMS, SMOLLM2_SHAPE, with_adapters
from torch.nn import functional
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, LlamaForCausalLM

from mono_peft.layer import MonoLoraLinear

PROMPT_TOKENS = 16


def base_model(folder: str | None, dtype: torch.dtype) -> Any:
    """The model in `folder`, or one of SmolLM2-135M's shape with random weights."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2_SHAPE)).to(dtype)


def generated(model: Any, ids: torch.Tensor, new_tokens: int, **settings: Any) -> torch.Tensor:
    """The tokens that greedy generation adds to `ids`: (sequences, new_tokens)."""
    output: torch.Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, pad_token_id=0, **settings,
    )  # fmt: skip
    return output[:, ids.shape[1] :]


def bare_forward(layer: MonoLoraLinear, x: torch.Tensor) -> torch.Tensor:
    """The operations of a MonoLoRA layer, and nothing looked at."""
    modules: Any = layer._modules
    encoder, decoder = (modules[f"monolora_{part}"]._modules["default"] for part in ("encoder", "decoder"))
    result = functional.linear(x, modules["base_layer"]._parameters["weight"])
    latents = torch.relu(functional.linear(x, encoder._parameters["weight"]))
    return torch.add(result, functional.linear(latents, decoder._parameters["weight"]), alpha=layer.scaling["default"])


@patch.object(MonoLoraLinear, "forward", bare_forward)
def generated_bare(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The same as `generated` of a MonoLoRA model, by its bare operations."""
    return generated(model, ids, new_tokens)


def compiled_settings() -> dict[str, Any]:
    """Options of `generate` that compile the model's forward, also on a CPU."""
    compile_config = CompileConfig(fullgraph=True)
    compile_config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compile_config}


def row(base: Any, r: int, batch: int, options: argparse.Namespace) -> list[str]:
    """A line of the table."""
    torch.compiler.reset()
    adapters = with_adapters(base, r=r, target_modules="all-linear", task_type="CAUSAL_LM")
    models = {name: model.eval() for name, model in adapters.items()}
    ids = torch.randint(0, base.config.vocab_size, (batch, PROMPT_TOKENS), device=base.device)
    settings = compiled_settings() if options.compiled else {}
    equal = []
    if options.compiled:
        for model in models.values():
            plain = generated(model, ids, options.new_tokens)
            equal.append((plain == generated(model, ids, options.new_tokens, **settings)).float().mean().item())
    runs = {n: partial(generated, m, ids, options.new_tokens, **settings) for n, m in models.items()}
    if not options.compiled:
        runs["operations"] = partial(generated_bare, models["MonoLoRA"], ids, options.new_tokens)
    times = in_turn(runs, options.rounds, clock=CLOCK)
    step = {name: value / options.new_tokens for name, value in milliseconds(times).items()}
    over_base = {
        name: [ours - theirs for ours, theirs in zip(values, times["base"], strict=True)]
        for name, values in times.items()
        if name != "base"
    }
    overheads = {name: step[name] - step["base"] for name in over_base}
    low, _, high = quantiles(ratios(over_base, "MonoLoRA", "LoRA"), n=4)
    return [
        f"r {r}, batch {batch}",
        *(f"{1e3 * batch / step[name]:.1f}" for name in ARMS),
        f"{step['base']:.2f}",
        *(f"{overhead:.2f}" for overhead in overheads.values()),
        f"{overheads['MonoLoRA'] / overheads['LoRA']:.2f} ({low:.2f} to {high:.2f})",
        *(["/".join(f"{100 * share:.0f}" for share in equal)] if equal else []),
    ]


def main() -> None:
    """Time and print a line after another."""
    parser = options_of(__doc__)
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of all weights"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count")
    parser.add_argument("--compiled", action="store_true", help="torch.compile with a static cache")
    options = parser.parse_args()
    base = base_model(options.model, getattr(torch, options.dtype)).to(DEVICE)
    print(f"{machine('peft', 'transformers')}, {options.dtype}\n")
    columns = ["all-linear", *(f"{arm}, tokens/s" for arm in ARMS), "base, ms", "LoRA's overhead, ms", "MonoLoRA's"]
    columns += [] if options.compiled else ["bare operations'"]
    columns += ["MonoLoRA's to LoRA's (middle half)", *(["equal to eager, %"] if options.compiled else [])]
    print_table(columns, (row(base, r, batch, options) for r, batch in product(options.ranks, options.batches)))


if __name__ == "__main__":
    main()
