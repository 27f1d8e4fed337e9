"""`python -m vision_bench MODEL [MODEL ...]`: how robust and how monosemantic are the features of frozen models?

    python -m vision_bench resnet18 runs/digits_ncl --dataset digits --output_dir runs/bench
    accelerate launch -m vision_bench hf-hub:timm/resnet50.a1_in1k --dataset imagenet100 --data_root DIR \\
        --corruptions label_noise=0.2,0.8 gaussian=0.6 folder=SKETCHES --output_dir runs/bench_in100

MODEL: a name of timm, hf-hub:USER/NAME, a checkpoint of vision_bench (file or folder), a folder with timm's
config.json and model.safetensors, or NAME=FILE.safetensors with a name of timm.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vision_bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="see above; its pretrained weights are taken")
    parser.add_argument(
        "--random_init", nargs="+", metavar="NAME", help="also timm's NAME, or small_conv, with random weights"
    )
    parser.add_argument("--output_dir", required=True, help="gets the table, the figure and results.jsonl")
    parser.add_argument(
        "--dataset", help="digits (default), cifar10, cifar100, imagenet100, a folder, a set of the hub"
    )
    parser.add_argument("--data_root", help="folder of the data set's files")
    parser.add_argument("--train_split", help="name of the split of the training images (default: train)")
    parser.add_argument(
        "--test_split", help="name of the split of the test images (default: test, else val or validation)"
    )
    parser.add_argument(
        "--test_fraction", type=float, help="share of the training split that is the test images, of each class"
    )
    parser.add_argument("--skip_corrupt", action="store_true", help="leave out images that cannot be decoded")
    parser.add_argument("--label_column", help="of a Hugging Face set, if it is not found")
    parser.add_argument("--image_size", type=int, help="pixels; by default what a model of timm was trained at")
    parser.add_argument("--limit", type=int, help="about so many images of the training and of the test set")
    parser.add_argument(
        "--corruptions", nargs="*", metavar="NAME[=NUMBERS]",
        help="label_noise, few_shots, gaussian, uniform, uniform_centred, rotated, inverted, thinned, folder=PATH; "
        "every combination is measured; by default label_noise=0.4,0.8 gaussian=0.6 few_shots=0.1",
    )  # fmt: skip
    parser.add_argument("--features", nargs="+", metavar="KIND", help="raw, unit, relu, sae (default: all)")
    parser.add_argument("--layer", help="backbone, projector or output; by default the last one that a model has")
    parser.add_argument("--seeds", type=int, nargs="+", help="of probes, wrong labels and drawn images (default: 0-4)")
    parser.add_argument("--sae_k", type=int, help="active latents (default: an eighth of the dimensions)")
    parser.add_argument("--sae_epochs", type=int, help="default: 50")
    parser.add_argument("--probe_epochs", type=int, help="default: 50")
    parser.add_argument("--standardize", action="store_true", help="standardise each feature before probing")
    parser.add_argument("--batch_size", type=int, help="images of a forward pass (default: 256)")
    parser.add_argument(
        "--cache_dir", help="of features and autoencoders, also of other runs (default: OUTPUT_DIR/cache)"
    )
    parser.add_argument("--resume", action="store_true", help="continue in an output_dir that has results")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Measure, write and print the table; errors of the user end in one line."""
    parser = _parser()
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}

    from accelerate import PartialState

    from vision_bench import benchmark, benchmark_report
    from vision_bench.data import warnings_in_one_line

    assert given.keys() <= {field.name for field in fields(benchmark.Settings)}
    try:
        settings = benchmark.Settings(**given)
        with warnings_in_one_line():
            subjects, rows = benchmark.run(settings)
        if PartialState().is_main_process:
            print(benchmark_report.write(subjects, rows, settings))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command with --resume continues.")


if __name__ == "__main__":
    main()
