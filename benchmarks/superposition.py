"""Training of 64 toy models at once against one after another, and whether equal seeds give equal models.

    python benchmarks/superposition.py                # 4,000 steps: some minutes
    python benchmarks/superposition.py --steps 200

n = 20, m = 5, batch 512, 8 sparsities x 8 seeds. "Plain" is the program one would write for a single model, autograd
and torch.optim.Adam in a loop, on the same random numbers; "alone" is our function called for one model at a time. A
round runs all three one after another, plain and alone for `--models` of the 64 models, their time scaled to 64.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--models", type=int, default=8, help="models of a round that are trained one by one")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cells = [(i, j) for i in range(len(SPARSITIES)) for j in SEEDS]
    cells = cells[:: max(1, len(cells) // options.models)][: options.models]

    def batched() -> torch.Tensor:
        return train(N, M, SPARSITIES, SEEDS, IMPORTANCE, steps=options.steps, batch_size=BATCH).weight

    train(N, M, SPARSITIES, SEEDS, steps=5)  # the first use of each operation is slower
    times: dict[str, list[float]] = {"batched": [], "alone": [], "plain": []}
    worst = {"alone": 0.0, "plain": 0.0}
    for _ in range(options.rounds):
        start = time.perf_counter()
        together = batched()
        times["batched"].append(time.perf_counter() - start)
        for name, program in (("alone", alone), ("plain", plain)):
            start = time.perf_counter()
            models = [program(SPARSITIES[i], j, options.steps) for i, j in cells]
            times[name].append((time.perf_counter() - start) * 64 / len(cells))
            difference = max(
                (model - together[cell]).abs().max().item() for cell, model in zip(cells, models, strict=True)
            )
            worst[name] = max(worst[name], difference)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"64 models, {options.steps} steps, median of {options.rounds} rounds, {torch.get_num_threads()} threads:")
    print(f"  batched            {medians['batched']:8.2f} s")
    for name in ("alone", "plain"):
        ratios = sorted(other / ours for other, ours in zip(times[name], times["batched"], strict=True))
        print(
            f"  one by one, {name}  {medians[name]:8.2f} s, {medians[name] / medians['batched']:.1f} times as long "
            f"(rounds {ratios[0]:.1f} to {ratios[-1]:.1f}), largest difference of a weight {worst[name]:.1e}"
        )


if __name__ == "__main__":
    main()
