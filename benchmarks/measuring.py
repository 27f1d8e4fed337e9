"""What the benchmarks share: arms timed in turn, the ratios of their rounds, their tables, and the machine.

times = in_turn({"ours": ours, "plain": plain}, rounds=5)
print(f"{machine('timm')}: {median(times['ours']):.3f} s {spread(times, 'plain', 'ours')}")
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from statistics import median

import torch

# Where a step runs: on a GPU in bfloat16 and by the clock, else in float32 and by the processor's time.
DEVICE, DTYPE, CLOCK = (
    ("cuda", torch.bfloat16, time.perf_counter)
    if torch.cuda.is_available()
    else ("cpu", torch.float32, time.process_time)
)


def options_of(documentation: str | None) -> argparse.ArgumentParser:
    """A parser whose help starts with the docstring of the benchmark as it is written."""
    return argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)


def machine(*packages: str) -> str:
    """The processor or the GPU, the threads, and the versions of torch and of further packages."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, CPU"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    return f"{device}, {torch.get_num_threads()} threads, {versions}"


def seconds(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """How long a call takes, with what it left to do on a GPU."""
    start = clock()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def in_turn(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    uncounted: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """The seconds of each arm in each round; the arms run one after another, so that all meet the same disturbances.

    Args:
        arms: by name.
        rounds: that count.
        uncounted: rounds before them, since the first use of each operation is slower.
        clock: `time.process_time` for the time of the processor, which other programs change little.
    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(uncounted + rounds):
        for name, arm in arms.items():
            duration = seconds(arm, clock)
            if i >= uncounted:
                times[name].append(duration)
    return times


def milliseconds(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each arm over its rounds, in milliseconds."""
    return {name: 1e3 * median(values) for name, values in times.items()}


def ratios(times: Mapping[str, Sequence[float]], arm: str, over: str) -> list[float]:
    """How many times as long an arm takes as another one, in each round, ascending."""
    return sorted(ours / theirs for ours, theirs in zip(times[arm], times[over], strict=True))


def spread(times: Mapping[str, Sequence[float]], arm: str, over: str) -> str:
    """The least and the largest of the ratios, in words."""
    ascending = ratios(times, arm, over)
    return f"(rounds {ascending[0]:.1f} to {ascending[-1]:.1f})"


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table in Markdown, each line as soon as it is there; all columns but the first `left` are numbers."""
    print(f"| {' | '.join(header)} |\n|{'---|' * left}{'---:|' * (len(header) - left)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
