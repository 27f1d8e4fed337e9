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

from _run import Run, device_name, interval, markdown_table, run_as_program
from _settings import parse
from _vision import (
    METHODS,
    PretrainingArguments,
    ProbingArguments,
    finish,
    load_splits,
    pretrained,
    results_config,
    start_accelerator,
)

from vision_bench.features import embed
from vision_bench.metrics import MEASURED, semantic_consistency

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
        cells = [interval([row["value"] for row in found]).text(3) for found in rows.values()]
        lines.append([method, str(len(rows["loss"])), *cells])
    header = ["method", "seeds", *((*LOGGED, *MEASURED))]
    text = f"# Pretraining on {script.data}: {script.backbone}, {script.pretraining_epochs} epochs\n\n"
    text += markdown_table([name.replace("_", " ") for name in header], lines)
    return text + (
        "\nMean ± half-width of the 95 % interval over seeds. Loss and online probe in training: mean over the last\n"
        "epoch, on augmented views. The other accuracies are on test images: the online probe as trained beside the\n"
        "model, and 20 nearest neighbours, both on the backbone's features. Consistency, its chance level\n"
        "(shuffled labels), sparsity and live dimensions are of the model's output on test images.\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """Train the models that the output folder lacks, then write and print the table."""
    script = parse(PretrainArguments, arguments, shared_with=ProbingArguments)
    train, validation = load_splits(script)
    accelerator = start_accelerator(script, "pretrain")
    run = Run(script.output_dir, "pretrain", results_config(script), is_main=accelerator.is_main_process)
    for seed in script.seeds:
        for method in script.methods:
            arm = {"seed": seed, "method": method}
            if all(run.find(metric, **arm) for metric in (*LOGGED, *MEASURED)):
                continue
            start = time.monotonic()
            model, log = pretrained(script, method, seed, train, validation, accelerator)
            if not accelerator.is_main_process:
                continue
            seconds = time.monotonic() - start
            made = embed(model, validation.images, validation.mean, validation.std)["output"]
            found = semantic_consistency(made, validation.labels).summary
            for metric, value in ({name: log[-1][name] for name in LOGGED} | found).items():
                if not run.find(metric, **arm):
                    n = len(train.labels if "validation" not in metric and metric in LOGGED else validation.labels)
                    run.add(metric, value, n=n, seconds=seconds, device=device_name(), **arm)
    finish(accelerator, run, lambda: report(run, script))


if __name__ == "__main__":
    run_as_program(main)
