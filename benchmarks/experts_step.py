"""Times of a training step with adapters on fused experts: MonoLoRA beside PEFT's LoRA, by the same names and rank.

    python benchmarks/experts_step.py
    python benchmarks/experts_step.py --models tiny --ranks 8 --steps 50

Random Qwen3-MoE models, all stacked weights of the experts adapted; a step is a forward and a backward pass of the
language model's loss. The arms run one after another within each of `--steps` rounds, in one process; the table has
medians, and the smallest and largest ratio of a round. "Trained" counts the adapter's numbers, equal in both. Float32
on the CPU, bfloat16 with bfloat16 adapters on a GPU.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from measuring import DEVICE, DTYPE, in_turn, machine, milliseconds, options_of, print_table, ratios
from small_models import VOCABULARY, with_adapters
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Layers, hidden size, experts, experts a token, intermediate size of an expert, sequences, tokens of each.
SIZES = {"tiny": (2, 64, 8, 2, 32, 4, 64), "mid": (4, 512, 32, 4, 256, 4, 256)}


def arms(size: str, r: int) -> tuple[dict[str, Any], torch.Tensor]:
    """The frozen base, and it with either adapter, and ids."""
    layers, hidden, experts, chosen, intermediate, sequences, tokens = SIZES[size]
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32,
        head_dim=32, num_key_value_heads=hidden // 32, num_experts=experts, num_experts_per_tok=chosen,
        moe_intermediate_size=intermediate,
    )  # fmt: skip
    torch.manual_seed(0)
    base = Qwen3MoeForCausalLM(config).to(DEVICE, DTYPE)
    models = with_adapters(base, r=r, target_modules=[], target_parameters=TARGETS)
    return models, torch.randint(0, VOCABULARY, (sequences, tokens), device=DEVICE)


def row(size: str, r: int, rounds: int) -> list[str]:
    """A line of the table."""
    models, ids = arms(size, r)
    embeddings = models["base"].get_input_embeddings()(ids).detach().requires_grad_()

    def step(model: nn.Module) -> None:
        for tensor in (embeddings, *model.parameters()):
            tensor.grad = None
        model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss.backward()

    times = in_turn({name: partial(step, model) for name, model in models.items()}, rounds, uncounted=3)
    medians = milliseconds(times)
    trained = {sum(p.numel() for p in models[n].parameters() if p.requires_grad) for n in ("LoRA", "MonoLoRA")}
    (trained_by_both,) = trained
    of_rounds = ratios(times, "MonoLoRA", "LoRA")
    layers, hidden, experts, chosen, intermediate, _, _ = SIZES[size]
    label = f"{size}: {layers} layers, hidden {hidden}, {experts} experts of {intermediate}, {chosen} a token"
    return [
        f"{label}; {' x '.join(map(str, ids.shape))} tokens, r {r}",
        f"{trained_by_both:,}",
        *(f"{medians[name]:.1f}" for name in models),
        f"{medians['MonoLoRA'] / medians['LoRA']:.3f}",
        f"{of_rounds[0]:.2f} to {of_rounds[-1]:.2f}",
        f"{medians['MonoLoRA'] / medians['base']:.2f}",
    ]


def main() -> None:
    """Time and print a line after another."""
    parser = options_of(__doc__)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--steps", type=int, default=20, help="rounds that count")
    options = parser.parse_args()
    print(f"{machine('peft', 'transformers')}\n")
    columns = ["Qwen3-MoE", "trained", "base, ms", "LoRA, ms", "MonoLoRA, ms", "ratio to LoRA", "rounds", "to base"]
    print_table(columns, (row(size, r, options.steps) for size, r in product(options.models, options.ranks)))


if __name__ == "__main__":
    main()
