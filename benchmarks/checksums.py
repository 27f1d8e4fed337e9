"""What it costs to know results by the contents that made them: a checksum of weights, a fingerprint, and rows.

    python benchmarks/checksums.py --model FOLDER --timm_model vit_base_patch16_224

Medians of `--rounds`, one after another in one process. The files are in the cache of the operating system after the
first round, so that the time is that of the processor, to which a disk adds its own.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import timm
from measuring import options_of, seconds

from vision_bench import models
from vision_bench.runs import Run, file_checksum

ROWS = 2000


def add_rows(one_at_a_time: bool) -> None:
    """Look for and add rows of results, each with its own sync to the disk or with one for all."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, "benchmark", {"setting": 0})
        rows = []
        for seed in range(ROWS):
            arm = {"features": f"kind {seed % 7}", "noise_rate": seed % 10 / 10}
            if run.find("accuracy", seed=seed, **arm):
                raise AssertionError("a new folder has no rows")
            rows.append(run.row("accuracy", 0.5, n=1, seed=seed, seconds=0, device="cpu", **arm))
            if one_at_a_time:
                run.add_rows(rows)
                rows = []
        run.add_rows(rows)


def main() -> None:
    """Time and print."""
    parser = options_of(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder with safetensors files")
    parser.add_argument("--timm_model", default="vit_base_patch16_224")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    files = sorted(options.model.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files) / 1e6
    duration = median(seconds(lambda: [file_checksum(path) for path in files]) for _ in range(options.rounds))
    print(f"checksum of {options.model.name}: {size:.0f} MB, {duration:.2f} s, {size / duration:.0f} MB/s")

    model = timm.create_model(options.timm_model, num_classes=0)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    duration = median(seconds(lambda: models.fingerprint(model)) for _ in range(options.rounds))
    print(f"fingerprint of {options.timm_model}: {millions:.0f} M weights, {duration:.2f} s")

    for words, one_at_a_time in (("one at a time", True), ("at once", False)):
        duration = median(seconds(partial(add_rows, one_at_a_time)) for _ in range(options.rounds))
        print(f"{ROWS} rows, {words}: {duration:.2f} s")


if __name__ == "__main__":
    main()
