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
from dataclasses import dataclass, field

from accelerate import Accelerator
from program import parse, run_as_program
from vision import (
    METHODS,
    PretrainingArguments,
    ProbingArguments,
    finish,
    load_splits,
    pretrained,
    results_config,
    start_accelerator,
)

from vision_bench.data import ImageSet
from vision_bench.features import embed
from vision_bench.metrics import MEASURED, semantic_consistency
from vision_bench.runs import DIVERGED, Run, device_name, interval, markdown_table

LOGGED = ("loss", "online_probe_train_top1", "online_probe_validation_top1", "knn_validation_top1")


@dataclass
class PretrainArguments(PretrainingArguments):
    """Settings of this recipe."""

    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": f"Of {', '.join(METHODS)}."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods or set(self.methods) - set(METHODS):
            raise ValueError(f"methods is {self.methods}; it takes {', '.join(METHODS)}.")


def report(run: Run, script: PretrainArguments) -> str:
    """Means over the seeds with 95 % intervals as Markdown."""
    lines = []
    for method in script.methods:
        rows = {metric: run.find(metric, method=method) for metric in (*LOGGED, *MEASURED)}
        count = len(run.find(DIVERGED, method=method))
        cells = [interval([row["value"] for row in found] or [None]).text(3) for found in rows.values()]
        seeds = str(len(rows["loss"])) + (f" ({count} more diverged)" if count else "")
        lines.append([method, seeds, *cells])
    header = ["method", "seeds", *((*LOGGED, *MEASURED))]
    text = f"# Pretraining on {script.data}: {script.backbone}, {script.pretraining_epochs} epochs\n\n"
    text += markdown_table([name.replace("_", " ") for name in header], lines)
    return text + (
        "\nMean ± half-width of the 95 % interval over seeds. Loss and online probe in training: mean over the last\n"
        "epoch, on augmented views. The other accuracies are on test images: the online probe as trained beside the\n"
        "model, and 20 nearest neighbours, both on the backbone's features. Consistency, its chance level\n"
        "(shuffled labels), sparsity and live dimensions are of the model's output on test images.\n"
    )


def measured(
    script: PretrainArguments,
    method: str,
    seed: int,
    train: ImageSet,
    validation: ImageSet,
    accelerator: Accelerator,
) -> dict[str, float | None]:
    """What the table says of a model, trained now or before; in the main process.

    Raises:
        FloatingPointError: the training diverged.
        ValueError: the model's log has no accuracies on these test images.
    """
    model, log = pretrained(script, method, seed, train, validation, accelerator)
    if not accelerator.is_main_process:
        return {}
    if lacking := [name for name in LOGGED if name not in log[-1]]:
        raise ValueError(
            f"the model of {method}, seed {seed}, was trained beside other test images or by an older version: its "
            f"log has no {', '.join(lacking)} on these; choose another --checkpoints."
        )
    made = embed(model.to(accelerator.device), validation.images, validation.mean, validation.std)["output"]
    return {name: log[-1][name] for name in LOGGED} | semantic_consistency(made, validation.labels).summary


def main(arguments: list[str] | None = None) -> None:
    """Train the models that the output folder lacks, then write and print the table."""
    script = parse(PretrainArguments, arguments, shared_with=ProbingArguments)
    train, validation = load_splits(script)
    accelerator = start_accelerator(script, "pretrain")
    described = results_config(script, train, validation)
    run = Run(script.output_dir, "pretrain", described, is_main=accelerator.is_main_process)
    run.bind()
    for seed in script.seeds:
        for method in script.methods:
            arm = {"seed": seed, "method": method}
            if run.find(DIVERGED, **arm) or all(run.find(metric, **arm) for metric in (*LOGGED, *MEASURED)):
                continue
            start = time.monotonic()
            try:
                values = measured(script, method, seed, train, validation, accelerator)
            except FloatingPointError as error:
                seconds = time.monotonic() - start
                run.add_diverged(
                    str(error), n=len(train), seconds=seconds, device=device_name(accelerator.device), **arm
                )
                continue
            if not accelerator.is_main_process:
                continue
            common = {"seconds": time.monotonic() - start, "device": device_name(accelerator.device), **arm}
            counts = {metric: len(train if metric in LOGGED[:2] else validation) for metric in values}
            missing = [metric for metric in values if not run.find(metric, **arm)]
            run.add_rows([run.row(metric, values[metric], n=counts[metric], **common) for metric in missing])
    finish(accelerator, run, lambda: report(run, script))


if __name__ == "__main__":
    run_as_program(main)
