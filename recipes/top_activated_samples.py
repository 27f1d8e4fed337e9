"""Fig. 1(a) and Fig. 4(a, b): the images that activate a dimension most; do they show one thing?

    python recipes/top_activated_samples.py --output_dir runs/top_activated
    accelerate launch recipes/top_activated_samples.py --config recipes/configs/cifar100.yaml --output_dir runs/top

Fig. 1(a): random dimensions of each kind of features (poly, sae, ncl; vision_bench/kinds.py), and for each the test
images that activate it most, with the names of their classes. Fig. 4(a, b): a linear classifier is trained with 90 %
wrong labels; of the class that it gets right least often and of the one that it gets right most often, the dimension
with the largest weight, and the images that activate that dimension most.

The paper shows two classes (jeans and boathouse). Two chosen pictures say little, so here are the numbers of all:
the purity of a dimension (the share of the most frequent class among the images that activate it most) over all
dimensions beside its chance level, and Spearman's correlation, over all classes, of a class's accuracy with the purity
of the dimension with its largest weight, which the paper's reading expects to be positive. Dimensions that fewer
images activate than are shown are left out.

The default run, about two minutes on 2 cores, is of another scale: 1,437 digits, a network of three convolutions, and
80 % wrong labels, since 90 % leave 10 classes no signal. Expected there: a purity of 0.74 for poly, 0.80 for sae and
0.82 for ncl, by chance 0.28, and no correlation.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from frozen_features import FEATURES, describe, frozen_models, seed_of
from noisy_probe import (
    ACCURACY,
    NoisyProbeArguments,
    is_complete,
    noisy_probes,
    over_seeds,
    predictions,
    where_there_is_one,
)
from program import run_as_program
from scipy.stats import spearmanr
from training_accuracies import chance_percent, own_labels
from vision_ladder import SPLITS, finish, measure_seeds, start

from vision_bench import figures
from vision_bench import report as cautions
from vision_bench.data import ImageSet
from vision_bench.metrics import MEASURED, purity, semantic_consistency, top_activated
from vision_bench.runs import Run, device_name, interval, markdown_table

PURITY, PURITY_CHANCE, SHOWN = "top_purity", "chance_top_purity", "shown_dimensions"
CORRELATION = "accuracy_purity_correlation"
OF_RANDOM, OF_CLASS = "random_dimension_purity", "class_dimension_purity"
RANKS = ("worst", "best")


@dataclass
class TopActivatedArguments(NoisyProbeArguments):
    """Settings of this recipe."""

    samples: int = field(default=9, metadata={"help": "Images for each dimension."})
    dimensions: int = field(default=2, metadata={"help": "Random dimensions of each kind of features."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}; the purity of fewer than 2 images is 1 whatever they show.")
        if self.dimensions < 1:
            raise ValueError(f"dimensions is {self.dimensions}; it must be at least 1.")

    def check(self, train: ImageSet, test: ImageSet) -> None:
        """As `NoisyProbeArguments`, and no more images of a dimension than there are."""
        super().check(train, test)
        if self.samples > len(test):
            raise ValueError(f"samples is {self.samples} for {len(test)} test images; it must not exceed them.")


def class_accuracies(predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Share of each class's samples that are classified rightly, (num_classes,) float64; NaN without samples."""
    right = torch.bincount(labels[predicted == labels], minlength=num_classes)
    return right.double() / torch.bincount(labels, minlength=num_classes)


def add_seed(
    run: Run, script: TopActivatedArguments, name: str, test: torch.Tensor, images: ImageSet, weights: torch.Tensor,
    accuracy: torch.Tensor, seed: int, of_models: int | None, measured: dict[str, Any],
) -> None:  # fmt: skip
    """The rows of one kind of features and one seed that the run lacks.

    There is none of the correlation if all classes have the same accuracy, or their dimensions the same purity.

    Args:
        of_models: the seed of rows that depend on the models alone, as of `seed_of`.
        test: features (n, d) of the test images.
        weights: (num_classes, d) of the classifier.
        accuracy: (num_classes,) of the classifier.

    Raises:
        ValueError: too few dimensions are activated by as many images as are shown.
    """
    top = top_activated(test, script.samples)
    shown = (top >= 0).all(dim=1).nonzero().squeeze(1)
    if len(shown) < script.dimensions:
        raise ValueError(
            f"{name}, seed {seed}: {len(shown)} of {len(top)} dimensions are activated by {script.samples} test "
            f"images or more, and {script.dimensions} are to be shown. Lower samples, or train the model longer."
        )
    pure = purity(top, images.labels)
    generator = torch.Generator().manual_seed(seed)
    shuffled = images.labels[torch.randperm(len(images), generator=generator)]
    consistency = semantic_consistency(test, images.labels).per_dimension
    known = accuracy.isfinite().nonzero().squeeze(1)
    dimension_of = shown[weights.cpu()[:, shown].argmax(dim=1)]  # of each class

    def add(metric: str, value: float, n: int, seed: int | None = seed, **arm: Any) -> None:
        if not run.find(metric, seed=seed, features=name, **arm):
            run.add(metric, value, n=n, seed=seed, features=name, **measured, **arm)

    def add_dimension(metric: str, dimension: int, **arm: Any) -> None:
        arm |= {"dimension": dimension, "samples_shown": top[dimension].tolist()}
        add(metric, pure[dimension].item(), script.samples, consistency=consistency[dimension].item(), **arm)

    for dimension in shown[torch.randperm(len(shown), generator=generator)[: script.dimensions]].tolist():
        add_dimension(OF_RANDOM, dimension)
    ranked = known[accuracy[known].argsort(stable=True)].tolist()
    for rank, label in zip(RANKS, (ranked[0], ranked[-1]), strict=True):
        of = {"class_name": images.class_names[label], "class_accuracy": accuracy[label].item()}
        add_dimension(OF_CLASS, int(dimension_of[label]), rank=rank, **of)
    add(PURITY, pure[shown].mean().item(), len(shown), of_models)
    add(PURITY_CHANCE, purity(top[shown], shuffled).mean().item(), len(shown))
    add(SHOWN, float(len(shown)), len(test), of_models)
    both = accuracy[known], pure[dimension_of[known]]
    if all(len(values.unique()) > 1 for values in both):  # there is no correlation with a constant
        add(CORRELATION, spearmanr(*both).statistic, len(known))
    add(ACCURACY, accuracy[images.labels].mean().item(), len(test))


def measure(
    run: Run, script: TopActivatedArguments, seed: int, splits: dict[str, ImageSet], accelerator: Accelerator
) -> None:
    """Rows of the models of one pretraining seed that the folder lacks."""
    seeds = script.models_of()[seed]
    missing = [name for name in FEATURES if not is_complete(run, name, seeds)]
    if not missing:
        return
    models, made = frozen_models(run, script, seed, splits, accelerator)
    if not accelerator.is_main_process:
        return
    device, images = accelerator.device, splits["test"]
    for name in missing:
        start = time.monotonic()
        train, test = (models.features(name, made[split]) for split in SPLITS)
        probes = noisy_probes(run, script, name, train, splits["train"], seeds, device)
        measured = {"seconds": time.monotonic() - start, "device": device_name(device)}
        for one, weights, predicted in zip(seeds, probes.weights, predictions(probes, test), strict=True):
            accuracy = class_accuracies(predicted, images.labels, images.num_classes)
            add_seed(run, script, name, test, images, weights, accuracy, one, seed_of(seeds), measured)
        describe(run, name, test, images.labels, seeds, device)


def report(run: Run, script: TopActivatedArguments) -> str:
    """Purity of all dimensions, its correlation with accuracy, and the dimensions of the figures, as Markdown."""
    text = f"# Images that activate a dimension most: {script.data}, {script.backbone}\n\n"
    text += (
        f"The {script.samples} test images with the largest value of a dimension, over all dimensions that so many "
    )
    text += f"images activate;\nlinear probes trained with {100 * script.noise_rate:g} % wrong labels.\n\n"
    header = [
        "features",
        "purity",
        "by chance",
        "dimensions",
        "top-1, %",
        "own training labels, %",
        "correlation of accuracy and purity",
    ]
    lines = [
        [
            name,
            *(over_seeds(run, metric, name).text(3) for metric in (PURITY, PURITY_CHANCE)),
            over_seeds(run, SHOWN, name).text(0),
            over_seeds(run, ACCURACY, name).scaled(100).text(1),
            own_labels(run, features=name)[0],
            where_there_is_one(run, script, CORRELATION, name, 2),
            *(over_seeds(run, metric, name).text(0 if "live" in metric else 3) for metric in MEASURED),
        ]
        for name in FEATURES
    ]
    text += markdown_table([*header, *(metric.replace("_", " ") for metric in MEASURED)], lines)
    untrained = [f"{name} ({why})" for name in FEATURES if (why := own_labels(run, features=name)[1])]
    text += cautions.untrained(untrained) + f"\nChance level of top-1: {chance_percent(run):.1f} %.\n"
    text += "\n## The dimension with the largest weight of the class with the lowest and the highest accuracy\n\n"
    lines = []
    for name, rank in itertools.product(FEATURES, RANKS):
        rows = run.find(OF_CLASS, features=name, rank=rank)
        consistency = interval([row["config"]["consistency"] for row in rows])
        accuracy = interval([100 * row["config"]["class_accuracy"] for row in rows])
        lines.append([f"{name}, {rank} class", accuracy.text(1)])
        lines[-1] += [interval([row["value"] for row in rows]).text(3), consistency.text(3)]
        lines[-1] += [", ".join(row["config"]["class_name"] for row in rows)]
    header = ["features", "its accuracy, %", "purity", "semantic consistency", "classes, by seed"]
    text += markdown_table(header, lines)
    return text + (
        f"\n{script.over} Purity:\n"
        "the share of the most frequent class among the images shown; by chance: with shuffled labels. Of classes\n"
        "with equal accuracy the first is the worst and the last the best. Correlation: Spearman's, over classes;\n"
        "-: there is none, as all accuracies or all purities are equal.\n"
        "The paper shows one class of each kind (jeans, boathouse; ResNet-18, ImageNet-100, 90 % noise), no number.\n"
    )


def grid(row: dict[str, Any], title: str, images: ImageSet) -> figures.ImageGrid:
    """What a row's dimension shows."""
    config = row["config"]
    classes = [images.class_names[int(images.labels[i])] for i in config["samples_shown"]]
    count, most = max((classes.count(name), name) for name in classes)
    title += f"{count} of {len(classes)} are {figures.readable(most)}" if count > 1 else "no two of a class"
    return figures.ImageGrid(title, images.images[torch.tensor(config["samples_shown"])], classes)


def draw(run: Run, script: TopActivatedArguments, images: ImageSet) -> None:
    """Fig. 1(a) and Fig. 4(a, b) of the first seed that did not diverge."""
    shown = next(seed for seed in script.seeds if run.find(OF_RANDOM, seed=seed))
    random, of_class = {}, {}
    for name in FEATURES:
        rows = run.find(OF_RANDOM, features=name, seed=shown)
        random[name] = [grid(row, f"dimension {row['config']['dimension']}: ", images) for row in rows]
        of_class[name] = []
        for rank in RANKS:
            (row,) = run.find(OF_CLASS, features=name, seed=shown, rank=rank)
            config = row["config"]
            title = f"{rank} class: {figures.readable(config['class_name'])}, {100 * config['class_accuracy']:.0f} %\n"
            of_class[name].append(grid(row, f"{title}dimension {config['dimension']}: ", images))
    for name, blocks in (("figure_1a", random), ("figure_4ab", of_class)):
        figures.save(run.folder / name, figures.image_grids(blocks))


def main(arguments: list[str] | None = None) -> None:
    """Measure what the output folder has no rows of, then write and print the table and draw the figures."""
    script, splits, accelerator, run = start(TopActivatedArguments, arguments, "top_activated_samples")
    measure_seeds(run, script, accelerator, lambda seed: measure(run, script, seed, splits, accelerator))
    finish(accelerator, run, lambda: report(run, script), lambda: draw(run, script, splits["test"]))


if __name__ == "__main__":
    run_as_program(main)
