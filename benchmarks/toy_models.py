"""Training of 64 toy models at once against one after another, and whether equal seeds give equal models.

    python benchmarks/toy_models.py                # 4,000 steps: some minutes
    python benchmarks/toy_models.py --steps 200

n = 20, m = 5, batch 512, 8 sparsities x 8 seeds. "Plain" is the program one would write for a single model, autograd
and torch.optim.Adam in a loop, on the same random numbers; "alone" is our function called for one model at a time. A
round runs all three one after another, plain and alone for `--models` of the 64 models, their time scaled to 64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch
from measuring import in_turn, machine, options_of, spread

from vision_bench.superposition import train

SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
SEEDS = range(8)
N, M, IMPORTANCE, BATCH, LEARNING_RATE = 20, 5, 0.7, 512, 1e-2


def plain(sparsity: float, seed: int, steps: int) -> torch.Tensor:
    """W of one model, on the random numbers of `train`."""
    generator = np.random.default_rng(seed)
    start = generator.standard_normal((M, N), dtype=np.float32) * np.sqrt(2 / (N + M), dtype=np.float32)
    weight, bias = torch.nn.Parameter(torch.from_numpy(start)), torch.nn.Parameter(torch.zeros(N))
    importance = IMPORTANCE ** torch.arange(N)
    optimizer = torch.optim.Adam([weight, bias], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        u = torch.from_numpy(generator.random((N, BATCH), dtype=np.float32)).T
        x = torch.relu(u - sparsity) / (1 - sparsity)
        loss = (importance * (x - torch.relu(x @ weight.T @ weight + bias)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return weight.detach()


def alone(sparsity: float, seed: int, steps: int) -> torch.Tensor:
    """W of one model by our function."""
    return train(N, M, [sparsity], [seed], IMPORTANCE, steps=steps, batch_size=BATCH).weight[0, 0]


def main() -> None:
    """Time, compare and print."""
    parser = options_of(__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--models", type=int, default=8, help="models of a round that are trained one by one")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cells = [(i, j) for i in range(len(SPARSITIES)) for j in SEEDS]
    cells = cells[:: max(1, len(cells) // options.models)][: options.models]

    def batched() -> torch.Tensor:
        return train(N, M, SPARSITIES, SEEDS, IMPORTANCE, steps=options.steps, batch_size=BATCH).weight

    trained: dict[str, list[torch.Tensor]] = {}

    def one_by_one(name: str, program: Callable[[float, int, int], torch.Tensor]) -> None:
        trained[name] = [program(SPARSITIES[i], j, options.steps) for i, j in cells]

    train(N, M, SPARSITIES, SEEDS, steps=5)  # the first use of each operation is slower
    arms = {"alone": partial(one_by_one, "alone", alone), "plain": partial(one_by_one, "plain", plain)}
    times = in_turn({"batched": batched, **arms}, options.rounds, uncounted=0)
    times |= {name: [64 * value / len(cells) for value in times[name]] for name in arms}
    together = batched()
    medians = {name: median(values) for name, values in times.items()}
    print(f"64 models, {options.steps} steps, median of {options.rounds} rounds, {machine()}:")
    print(f"  batched            {medians['batched']:8.2f} s")
    for name in arms:
        pairs = zip(cells, trained[name], strict=True)
        largest = max((model - together[cell]).abs().max().item() for cell, model in pairs)
        print(
            f"  one by one, {name}  {medians[name]:8.2f} s, {medians[name] / medians['batched']:.1f} times as long "
            f"{spread(times, name, 'batched')}, largest difference of a weight {largest:.1e}"
        )


if __name__ == "__main__":
    main()
