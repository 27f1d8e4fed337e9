"""Fig. 3(a, b): does non-negative tuning overfit less when there are few labels?

    python recipes/few_shot_finetuning.py --output_dir runs/few_shot
    accelerate launch recipes/few_shot_finetuning.py --config recipes/configs/few_shot_imagenet100.yaml \\
        --data_root /data/imagenet --output_dir runs/figure_3ab
    python recipes/few_shot_finetuning.py --output_dir runs/adapters --backbone test_vit \\
        --backbone_options '{"img_size": 8, "patch_size": 2}' --methods ce nce lora monolora

SimCLR's model is finetuned on class-stratified shares of the training set with every arm of recipes/finetuning.py.

The paper: NCE has the lower training and the higher validation accuracy, the more the fewer the labels, up to +3.9
points at 10 % (ImageNet-100). The default run, about two minutes of one core, is of another scale: 1,437 digits, a
network of three convolutions, 10 epochs. Expected there: NCE within 2 points of CE in both accuracies, as dropout and
weight decay; early stopping about 5 points below at 10 %, for want of the images that it holds out, and level above.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from finetuning import FinetuningArguments, curves, diverged, levels, measure, start, tables
from program import run_as_program
from vision_ladder import finish

from vision_bench import figures
from vision_bench.runs import Run

PAPER = {0.1: 3.9}  # points that NCE gains at most, by fraction (ImageNet-100)


@dataclass
class FewShotArguments(FinetuningArguments):
    """Settings of this recipe."""

    fractions: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.5], metadata={"help": "Shares of the training set, of each class."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fractions or len(set(self.fractions)) < len(self.fractions):
            raise ValueError(f"fractions takes different numbers, got {self.fractions}.")
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ValueError(f"fractions has {fraction}; each must be in (0, 1], 0.1 for 10 % of the images.")

    def conditions(self) -> list[dict[str, float]]:
        return [{"fraction": fraction, "noise_rate": 0.0} for fraction in self.fractions]


def report(run: Run, script: FewShotArguments) -> str:
    """The table with the paper's gain at 10 % beside ours."""
    known = [f"{PAPER[fraction]:+g} at most" if fraction in PAPER else "-" for fraction in script.fractions]
    paper = {"nce - ce, the paper, ImageNet-100": known}
    text = f"# Finetuning on few labels: {script.data}, {script.backbone}, {script.finetuning_epochs} epochs\n\n"
    return text + tables(run, script, lambda condition: f"{100 * condition['fraction']:g} %", paper)


def draw(run: Run, script: FewShotArguments) -> None:
    """Fig. 3(a, b) with the gains below, and the accuracies per epoch at the smallest fraction."""
    fewest = min(script.conditions(), key=lambda condition: condition["fraction"])
    percents = [100 * fraction for fraction in script.fractions]
    paper: dict[float | None, float] = {100 * at: PAPER[at] for at in script.fractions if at in PAPER}
    arms = script.methods
    notes = {arm: diverged(run, script, method=arm) for arm in arms}
    drawings = {
        "figure_3ab": figures.finetuning_curves(
            percents,
            levels(run, script),
            "share of the training set, %",
            logarithmic=True,
            published=paper,
            notes=notes,
        ),
        "epochs": figures.finetuning_curves(
            *curves(run, script, fewest),
            "epoch",
            notes={arm: diverged(run, script, method=arm, **fewest) for arm in arms},
        ),
    }
    for name, figure in drawings.items():
        figures.save(run.folder / name, figure)


def main(arguments: list[str] | None = None) -> None:
    """Finetune what the output folder has no rows of, then write and print the table and draw the figures."""
    script, splits, accelerator, run = start(FewShotArguments, arguments, "few_shot_finetuning")
    measure(run, script, splits, accelerator)
    finish(accelerator, run, lambda: report(run, script), lambda: draw(run, script))


if __name__ == "__main__":
    run_as_program(main)
