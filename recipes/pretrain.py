"""Contrastive pretraining: SimCLR (polysemantic features) and NCL (monosemantic ones), a model for each seed.

    python recipes/pretrain.py --output_dir runs/pretrain
    accelerate launch recipes/pretrain.py --config recipes/configs/cifar100.yaml --output_dir runs/cifar100

The first trains a small network on scikit-learn's digits in about a minute; the second is the paper's setting and for
a GPU. The models, `models/METHOD-SEED/model.safetensors` in the output folder, serve the other vision recipes through
`--checkpoints runs/pretrain/models`. A run that was stopped continues when the same command is given again.

Expected: NCL's features are sparse and of a higher semantic consistency, at a similar accuracy. The accuracies of the
online probe, of nearest neighbours and of the linear probes of label_noise_probing.py are not the same measure.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from accelerate import Accelerator
from vision import METHODS, PretrainingSettings, ProbingSettings, finish, pretrained, start

from vision_bench.data import ImageSet
from vision_bench.features import embed
from vision_bench.metrics import MEASURED, semantic_consistency
from vision_bench.runs import DIVERGED, Cell, Run, device_name, interval, markdown_table, option, run_as_program

LOGGED = ("loss", "online_probe_train_top1", "online_probe_validation_top1", "knn_validation_top1")


@dataclass
class MethodsSettings:
    """The settings of this recipe alone."""

    methods: list[str] = option(list(METHODS), help=f"Of {', '.join(METHODS)}.")

    def __post_init__(self) -> None:
        if not self.methods or set(self.methods) - set(METHODS):
            raise ValueError(f"methods is {self.methods}; it takes {', '.join(METHODS)}.")


def cells(config: Mapping[str, Any]) -> Iterator[Cell]:
    """Every row of a whole run, all of a model one after the other."""
    for seed, method, metric in product(config["seeds"], config["methods"], (*LOGGED, *MEASURED)):
        yield Cell(metric, seed, {"method": method})


def report(run: Run) -> str:
    """Means over the seeds with 95 % intervals as Markdown."""
    lines = []
    for method in run.config["methods"]:
        rows = {metric: run.find(metric, method=method) for metric in (*LOGGED, *MEASURED)}
        count = len(run.find(DIVERGED, method=method))
        means = [interval([row["value"] for row in rows[metric]] or [None]).text(3) for metric in rows]
        seeds = str(len(rows["loss"])) + (f" ({count} more diverged)" if count else "")
        lines.append([method, seeds, *means])
    header = ["method", "seeds", *LOGGED, *MEASURED]
    text = "# Pretraining on {data}: {backbone}, {pretraining_epochs} epochs\n\n".format(**run.config)
    text += markdown_table([name.replace("_", " ") for name in header], lines)
    return text + (
        "\nMean ± half-width of the 95 % interval over seeds. Loss and online probe in training: mean over the last\n"
        "epoch, on augmented views. The other accuracies are on test images: the online probe as trained beside the\n"
        "model, and 20 nearest neighbours, both on the backbone's features. Consistency, its chance level\n"
        "(shuffled labels), sparsity and live dimensions are of the model's output on test images.\n"
    )


def measured(
    pretraining: PretrainingSettings, method: str, seed: int, splits: Mapping[str, ImageSet], accelerator: Accelerator
) -> dict[str, float | None]:
    """The metrics of a model, trained now or before, by name; in the main process.

    Raises:
        FloatingPointError: the training diverged.
        ValueError: the model's log has no accuracies on these test images.
    """
    model, log = pretrained(pretraining, method, seed, splits, accelerator)
    if not accelerator.is_main_process:
        return {}
    if lacking := [name for name in LOGGED if name not in log[-1]]:
        raise ValueError(
            f"the model of {method}, seed {seed}, was trained beside other test images or by an older version: its "
            f"log has no {', '.join(lacking)} on these; choose another --checkpoints."
        )
    test = splits["test"]
    features = embed(model.to(accelerator.device), test.images, test.mean, test.std)["output"]
    return {name: log[-1][name] for name in LOGGED} | semantic_consistency(features, test.labels).summary


def main(arguments: list[str] | None = None) -> None:
    """Train the models that the output folder lacks, then write and print the table."""
    classes = (PretrainingSettings, MethodsSettings)
    (pretraining, _), splits, accelerator, run = start("pretrain", classes, arguments, shared=[ProbingSettings])
    lacking = run.lacking(cells(run.config))
    for seed, method in dict.fromkeys((cell.seed, cell.arm["method"]) for cell in lacking):
        assert seed is not None
        begun = time.monotonic()
        arm: dict[str, Any] = {"seed": seed, "method": method, "device": device_name(accelerator.device)}
        try:
            values = measured(pretraining, method, seed, splits, accelerator)
        except FloatingPointError as error:
            run.add_diverged(str(error), n=len(splits["train"]), seconds=time.monotonic() - begun, **arm)
            continue
        metrics = [cell.metric for cell in lacking if (cell.seed, cell.arm["method"]) == (seed, method)]
        counts = {metric: len(splits["train" if metric in LOGGED[:2] else "test"]) for metric in metrics}
        seconds = time.monotonic() - begun
        if accelerator.is_main_process:
            run.add_rows([run.row(m, values[m], n=counts[m], seconds=seconds, **arm) for m in metrics])
    finish(accelerator, run, report)


if __name__ == "__main__":
    run_as_program(main)
