"""`python -m vision_bench MODEL [MODEL ...]`: how robust and how monosemantic are the features of frozen models?

    python -m vision_bench resnet18 runs/digits_ncl --dataset digits --output_dir runs/bench
    accelerate launch -m vision_bench hf-hub:timm/resnet50.a1_in1k --dataset imagenet100 --data_root DIR \\
        --corruptions label_noise=0.2,0.8 gaussian=0.6 folder=SKETCHES --output_dir runs/bench_in100

MODEL: a name of timm, hf-hub:USER/NAME, a checkpoint of vision_bench (file or folder), a folder with timm's
config.json and model.safetensors, or NAME=FILE.safetensors with a name of timm.
"""

from __future__ import annotations

import argparse
from functools import partial

from vision_bench.runs import parse, run_as_program


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and every default."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, write and print the table; errors of the user end in one line."""
    run_as_program(partial(_measure, arguments), stopped="The same command with --resume continues.")


def _measure(arguments: list[str] | None) -> None:
    from accelerate import PartialState

    from vision_bench import benchmark, benchmark_report
    from vision_bench.benchmark_settings import Settings
    from vision_bench.data import warnings_in_one_line

    (settings,) = parse(
        [Settings], arguments, prog="python -m vision_bench", description=__doc__, formatter_class=_Help
    )
    with warnings_in_one_line():
        subjects, rows = benchmark.run(settings)
    if PartialState().is_main_process:
        print(benchmark_report.write(subjects, rows, settings))


if __name__ == "__main__":
    main()
