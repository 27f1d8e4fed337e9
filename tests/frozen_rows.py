"""Whether a change of the code changed any number: the rows of the default runs, before and after.

    python tests/frozen_rows.py run /tmp/before --checkout ../before   # of a checkout of an earlier commit
    python tests/frozen_rows.py run /tmp/after                         # of this one
    python tests/frozen_rows.py compare /tmp/before /tmp/after

`run` runs every recipe without options but its folder, and two benchmarks, with one thread, so that sums are in one
order: about half an hour on one core. `compare` takes a row before and looks for the one after with the same metric,
seed and arm; values must be equal to the last bit. It is no part of the default tests, because it needs two checkouts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPES = (
    "label_noise_probing", "input_noise_probing", "ood_probing", "robust_loss", "salient_features",
    "top_activated_samples", "pretrain", "few_shot_finetuning", "noisy_finetuning", "separability", "superposition",
    "sst2_monolora", "dolly_monolora",
)  # fmt: skip
BENCHMARKS = {
    "bench1": "--random_init resnet18 small_conv --limit 600",
    "bench2": "--random_init small_conv --corruptions label_noise=0.2,0.6 gaussian=0.3,0.6 rotated thinned "
    "few_shots=0.2 --seeds 0 1 2",
}
# What a row says beside its metric, seed and value that follows from paths, times or the code's own text.
IGNORED = {
    "features_id", "reason", "preprocessing", "pretrained", "images", "contents", "model", "adapter",
    "adapter_checksum",
}  # fmt: skip
# Values that were renamed on purpose: name -> value before -> value after.
RENAMED = {
    "task": {"refusal_embedded": "refusal_offline", "sentiment_embedded": "sentiment_offline"},
    "judge": {"embedded": "offline"},
}


def run(folder: Path, checkout: Path, only: list[str]) -> None:
    """Make the rows of the default runs in `folder`; a run that is whole already reprints its results."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    commands = {name: [f"recipes/{name}.py"] for name in RECIPES}
    commands |= {name: ["-m", "vision_bench", *options.split()] for name, options in BENCHMARKS.items()}
    for name, command in commands.items():
        if only and name not in only:
            continue
        resume = ["--resume"] if name in BENCHMARKS and (folder / name).exists() else []
        arguments = [sys.executable, *command, "--output_dir", str(folder / name), *resume]
        print(f"{name}: {' '.join(arguments)}", flush=True)
        start = time.monotonic()
        subprocess.run(arguments, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def rows(folder: Path, renamed: bool) -> Iterator[tuple[tuple[str, int | None], dict[str, Any], float | None]]:
    """Metric and seed, arm, and value of each row; the arm is what its configuration has beyond that of the run."""
    shared = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
    for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        arm = {}
        for name, value in row["config"].items():
            if name in IGNORED or (name in shared and shared[name] == value):
                continue
            arm[name] = RENAMED.get(name, {}).get(value, value) if renamed and isinstance(value, str) else value
        yield (row["metric"], row["seed"]), arm, row["value"]


def compare(before: Path, after: Path) -> bool:
    """Print how many rows of each run are equal, and the first that are not; whether all are."""
    equal = True
    for folder in sorted(path.parent for path in before.glob("*/results.jsonl")):
        if not (after / folder.name / "results.jsonl").exists():
            print(f"{folder.name}: not run after")
            equal = False
            continue
        candidates = defaultdict(list)
        for key, arm, value in rows(after / folder.name, renamed=False):
            candidates[key].append((arm, value))
        same, problems = 0, []
        for key, arm, value in rows(folder, renamed=True):
            # An arm may have got further names; one that has none but these goes before.
            values = [v for other, v in candidates[key] if other == arm] or [
                v for other, v in candidates[key] if all(other.get(name) == arm[name] for name in arm)
            ]
            if values == [value]:
                same += 1
            else:
                problems.append(f"  {key} {arm}: {value} before, {values if values else 'no row'} after")
        print(f"{folder.name}: {same} rows equal, {len(problems)} not; {sum(map(len, candidates.values()))} after")
        print(*problems[:5], sep="\n", end="\n" if problems else "")
        equal &= not problems
    return equal


def main() -> None:
    """Run, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("--checkout", type=Path, default=ROOT, help="of the code; by default the one of this file")
    running.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=[*RECIPES, *BENCHMARKS])
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "run":
        run(options.folder.resolve(), options.checkout.resolve(), options.only)
    elif not compare(options.before, options.after):
        sys.exit("The rows differ.")


if __name__ == "__main__":
    main()
