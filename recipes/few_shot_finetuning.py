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

from dataclasses import dataclass

from finetuning import Study
from paper import FEW_SHOT_GAINS

from vision_bench.runs import option, run_as_program


@dataclass
class FewShotSettings:
    """The settings of this recipe alone."""

    fractions: list[float] = option([0.1, 0.2, 0.5], help="Shares of the training set, of each class.")

    def __post_init__(self) -> None:
        if not self.fractions or len(set(self.fractions)) < len(self.fractions):
            raise ValueError(f"fractions takes different numbers, got {self.fractions}.")
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ValueError(f"fractions has {fraction}; each must be in (0, 1], 0.1 for 10 % of the images.")


STUDY = Study(
    recipe="few_shot_finetuning",
    settings=FewShotSettings,
    conditions=lambda config: [{"fraction": fraction, "noise_rate": 0.0} for fraction in config["fractions"]],
    axis="fraction",
    hardest=min,
    title="few labels",
    picture="figure_3ab",
    label="share of the training set, %",
    published=FEW_SHOT_GAINS,
    logarithmic=True,
)
EXPERIMENT = STUDY.experiment(
    items=("figure_3ab",),
    title="Figures 3(a), 3(b): finetuning on few labels",
    claim="The paper: non-negative tuning (NCE) has the lower training and the higher validation accuracy, the "
    f"more the fewer the labels, up to {FEW_SHOT_GAINS[0.1]:+g} points at 10 % of ImageNet-100.",
    pictures={"figure_3ab": "Figure 3(a, b): ours", "epochs": "Accuracy per epoch at the smallest fraction, ours"},
)
main = STUDY.main


if __name__ == "__main__":
    run_as_program(main)
