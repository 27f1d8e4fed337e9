"""What an adapter with `activation="topk"` costs: of all units or of the active ones, and beside LoRA and ReLU.

    python benchmarks/topk_step.py                                    # about six minutes on one core
    python benchmarks/topk_step.py --ranks 1024 --ks 16 --no_decoding

Three tables, of linear layers of `--dim` in and out, float32, B not zero. First the update alone in training, forward
and backward: dense products of all units against sums over the active ones, which `mono_peft/sparse.py` chooses by the
share of active units. Then the update of one token without gradients: a dense product with B against its active
columns, gathered, by the same rule. Last a step of base and adapter: topk beside LoRA of rank k and ReLU of rank r.
The arms run in turn; the numbers are medians of `--rounds` rounds in milliseconds of processor time, which other
programs change little.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import in_turn, machine, milliseconds, options_of, print_table
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from mono_peft import MonoLoraConfig, sparse
from mono_peft.layer import MonoLoraLayer

timed = partial(in_turn, uncounted=2, clock=time.process_time)


def layer_of(dim: int, config: Any) -> Any:
    """A linear layer without bias and its adapter, in training mode."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(dim, dim, bias=False))
    return get_peft_model(base, config).train().base_model.model[0]


def mono(r: int, k: int | None) -> MonoLoraConfig:
    """Topk, or ReLU without k."""
    activation = "relu" if k is None else "topk"
    return MonoLoraConfig(r=r, k=k, activation=activation, target_modules=["0"], init_weights=False)


def step(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, layer: nn.Module) -> None:
    """A forward and a backward pass."""
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    function(x).sum().backward()


def training_row(options: argparse.Namespace, r: int, k: int) -> list[str]:
    """The update alone by all units and by active ones, whatever is chosen."""
    layer = layer_of(options.dim, mono(r, k))
    x = torch.randn(options.tokens, options.dim, requires_grad=True)
    encoder, activation = layer.monolora_encoder.default, layer.monolora_activation.default
    decoder, scaling = layer.monolora_decoder.default, layer.scaling["default"]
    arms = {
        "dense": lambda x: MonoLoraLayer.update(layer, "default", x),
        "active": lambda x: sparse.topk_update(x, encoder, activation, decoder, scaling),
    }
    found = milliseconds(timed({name: partial(step, arm, x, layer) for name, arm in arms.items()}, options.rounds))
    chosen = "active" if sparse.is_faster(x, encoder, activation, decoder) else "dense"
    cells = [f"{found[name]:.1f}" for name in arms]
    return [str(r), str(k), *cells, f"{found['active'] / found['dense']:.2f}", chosen]


@torch.no_grad()
def decoding_row(options: argparse.Namespace, r: int, k: int) -> list[str]:
    """The update of one token by all columns of B and by the active ones."""
    layer = layer_of(options.dim, mono(r, k))
    encoder, decoder = layer.monolora_encoder.default.weight, layer.monolora_decoder.default.weight
    activation, x = layer.monolora_activation.default, torch.randn(1, options.dim)

    def gathered() -> torch.Tensor:
        return sparse.decoded(functional.linear(x, encoder), k, decoder, None)

    def dense() -> torch.Tensor:
        return functional.linear(activation(functional.linear(x, encoder)), decoder)

    def repeated(function: Callable[[], torch.Tensor]) -> None:
        for _ in range(20):
            function()

    arms = {"dense": partial(repeated, dense), "gathered": partial(repeated, gathered)}
    found = milliseconds(timed(arms, options.rounds))
    cells = [f"{found[name] / 20:.3f}" for name in arms]
    return [str(r), str(k), *cells, f"{found['gathered'] / found['dense']:.2f}"]


def step_row(options: argparse.Namespace, r: int, k: int) -> list[str]:
    """A step of base and adapter, beside LoRA of rank k and ReLU of rank r."""
    lora = LoraConfig(r=k, target_modules=["0"], init_lora_weights=False)
    layers = {"LoRA": lora, "ReLU": mono(r, None), "topk": mono(r, k)}
    x = torch.randn(options.tokens, options.dim, requires_grad=True)
    arms = {}
    for name, config in layers.items():
        layer = layer_of(options.dim, config)
        arms[name] = partial(step, layer, x, layer)
    found = milliseconds(timed(arms, options.rounds))
    cells = [f"{found[name]:.1f}" for name in layers]
    return [str(r), str(k), *cells, *(f"{found['topk'] / found[name]:.2f}" for name in ("LoRA", "ReLU"))]


def main() -> None:
    """Print the tables."""
    parser = options_of(__doc__)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--ks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no_training", action="store_true", help="leave the first table out")
    parser.add_argument("--no_decoding", action="store_true", help="leave the second table out")
    options = parser.parse_args()
    print(f"{machine('peft')}, {options.dim} x {options.dim}, float32\n")
    sizes = list(itertools.product(options.ranks, options.ks))
    if not options.no_training:
        print(f"{options.tokens} tokens, the update's step; active ones up to a share of {sparse.LARGEST_SHARE}\n")
        header = ["r", "k", "all units (ms)", "active ones (ms)", "ratio", "chosen"]
        print_table(header, (training_row(options, *size) for size in sizes))
    if not options.no_decoding:
        print("\none token without gradients\n")
        print_table(["r", "k", "dense (ms)", "gathered (ms)", "ratio"], (decoding_row(options, *s) for s in sizes))
    print(f"\n{options.tokens} tokens, a step of base and adapter (ms)\n")
    header = ["r", "k", "LoRA of rank k", "ReLU of rank r", "topk", "topk / LoRA", "topk / ReLU"]
    print_table(header, (step_row(options, *size) for size in sizes))


if __name__ == "__main__":
    main()
