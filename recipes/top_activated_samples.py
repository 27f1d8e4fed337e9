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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from probe_report import over, probe_table, where_there_is_one
from probing import FEATURES, NoisyProbeSettings, experiment, measure, noisy_grid, predictions, seed_of_models
from scipy.stats import spearmanr
from vision import PretrainingSettings, ProbingSettings, finish, start

from vision_bench import figures
from vision_bench.data import ImageSet
from vision_bench.metrics import purity, semantic_consistency, top_activated
from vision_bench.report import measured_cells, measured_header, untrained
from vision_bench.runs import Cell, Run, interval, markdown_table, option, over_seeds, run_as_program, select
from vision_bench.sweep import ACCURACY, Fitted, Measured

PURITY, PURITY_CHANCE, SHOWN = "top_purity", "chance_top_purity", "shown_dimensions"
CORRELATION = "accuracy_purity_correlation"
OF_RANDOM, OF_CLASS = "random_dimension_purity", "class_dimension_purity"
RANKS = ("worst", "best")


@dataclass
class TopActivatedSettings:
    """Settings of the images that are shown."""

    samples: int = option(9, help="Images for each dimension.")
    dimensions: int = option(2, help="Random dimensions of each kind of features.")

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}; the purity of fewer than 2 images is 1 whatever they show.")
        if self.dimensions < 1:
            raise ValueError(f"dimensions is {self.dimensions}; it must be at least 1.")

    def check(self, pretraining: PretrainingSettings, splits: Mapping[str, ImageSet]) -> None:
        """Raise ValueError for more images of a dimension than there are."""
        if self.samples > len(splits["test"]):
            raise ValueError(
                f"samples is {self.samples} for {len(splits['test'])} test images; it must not exceed them."
            )


SETTINGS = (PretrainingSettings, ProbingSettings, NoisyProbeSettings, TopActivatedSettings)


def class_accuracies(predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Share of each class's samples that are classified rightly, (num_classes,) float64; NaN without samples."""
    right = torch.bincount(labels[predicted == labels], minlength=num_classes)
    return right.double() / torch.bincount(labels, minlength=num_classes)


def study(
    config: Mapping[str, Any],
    images: ImageSet,
    name: str,
    fitted: Fitted,
    features: torch.Tensor,
    labels: torch.Tensor,
) -> list[Measured]:
    """What is measured of one kind of features, with the features (n, d) and labels (n,) of the test images.

    There is no correlation if all classes have the same accuracy, or their dimensions the same purity.

    Raises:
        ValueError: too few dimensions are activated by as many images as are shown.
    """
    samples, dimensions = config["samples"], config["dimensions"]
    top = top_activated(features, samples)
    shown = (top >= 0).all(dim=1).nonzero().squeeze(1)
    if len(shown) < dimensions:
        raise ValueError(
            f"{name}, seed {fitted.trainings[0].seed}: {len(shown)} of {len(top)} dimensions are activated by "
            f"{samples} test images or more, and {dimensions} are to be shown. Lower samples, or train the model "
            "longer."
        )
    pure = purity(top, labels)
    consistency = semantic_consistency(features, labels).per_dimension
    of_models = seed_of_models(config, fitted.trainings[0].seed)
    measured = [
        Measured(Cell(PURITY, of_models, {"features": name}), pure[shown].mean().item(), len(shown)),
        Measured(Cell(SHOWN, of_models, {"features": name}), float(len(shown)), len(features)),
    ]

    def add(metric: str, value: float, n: int, arm: Mapping[str, Any] = {}, **details: Any) -> None:
        measured.append(Measured(Cell(metric, training.seed, {"features": name, **arm}), value, n, details))

    def add_dimension(metric: str, index: int, arm: Mapping[str, Any], **details: Any) -> None:
        details |= {"samples_shown": top[index].tolist(), "consistency": consistency[index].item()}
        add(metric, pure[index].item(), samples, arm, **details)

    predicted = predictions(fitted.linear, features)
    for training, weights, classes in zip(fitted.trainings, fitted.linear.weights, predicted, strict=True):
        accuracy = class_accuracies(classes, labels, images.num_classes)
        generator = torch.Generator().manual_seed(training.seed)
        shuffled = labels[torch.randperm(len(labels), generator=generator)]
        for dimension in shown[torch.randperm(len(shown), generator=generator)[:dimensions]].tolist():
            add_dimension(OF_RANDOM, dimension, {"dimension": dimension})
        present = accuracy.isfinite().nonzero().squeeze(1)
        ranked = present[accuracy[present].argsort(stable=True)].tolist()
        dimension_of = shown[weights.cpu()[:, shown].argmax(dim=1)]  # of each class
        for rank, label in zip(RANKS, (ranked[0], ranked[-1]), strict=True):
            dimension = int(dimension_of[label])
            about = {"class_name": images.class_names[label], "class_accuracy": accuracy[label].item()}
            add_dimension(OF_CLASS, dimension, {"rank": rank}, dimension=dimension, **about)
        add(PURITY_CHANCE, purity(top[shown], shuffled).mean().item(), len(shown))
        both = accuracy[present], pure[dimension_of[present]]
        if all(len(values.unique()) > 1 for values in both):  # there is no correlation with a constant
            add(CORRELATION, spearmanr(*both).statistic, len(present))
        add(ACCURACY, accuracy[labels].mean().item(), len(features))
    return measured


def report(run: Run) -> str:
    """Purity of all dimensions, its correlation with accuracy, and the dimensions of the figures, as Markdown."""
    config = run.config
    table = probe_table(run, {"clean": {}}, FEATURES)
    own = {name: table.own_labels(name, "clean") for name in FEATURES}

    def mean(metric: str, name: str, digits: int) -> str:
        return over_seeds(select(table.rows, metric, features=name)["value"]).text(digits)

    header = ["features", "purity", "by chance", "dimensions", "top-1, %", "own training labels, %"]
    header += ["correlation of accuracy and purity", *measured_header()]
    lines = [
        [
            name,
            *(mean(metric, name, 3) for metric in (PURITY, PURITY_CHANCE)),
            mean(SHOWN, name, 0),
            table.mean(name, "clean").text(1),
            own[name].text,
            where_there_is_one(run, CORRELATION, name, 2),
            *measured_cells(table.rows, name),
        ]
        for name in FEATURES
    ]
    text = (
        f"# Images that activate a dimension most: {config['data']}, {config['backbone']}\n\n"
        f"The {config['samples']} test images with the largest value of a dimension, over all dimensions that so many "
        f"images activate;\nlinear probes trained with {100 * config['noise_rate']:g} % wrong labels.\n\n"
        f"{markdown_table(header, lines)}"
        f"{untrained([f'{name} ({labels.words})' for name, labels in own.items() if not labels.trained])}"
        f"\nChance level of top-1: {table.chance('clean'):.1f} %.\n"
        "\n## The dimension with the largest weight of the class with the lowest and the highest accuracy\n\n"
    )
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
        f"\n{over(config)} Purity:\n"
        "the share of the most frequent class among the images shown; by chance: with shuffled labels. Of classes\n"
        "with equal accuracy the first is the worst and the last the best. Correlation: Spearman's, over classes;\n"
        "-: there is none, as all accuracies or all purities are equal.\n"
        "The paper shows one class of each kind (jeans, boathouse; ResNet-18, ImageNet-100, 90 % noise), no number.\n"
    )


def image_grid(row: dict[str, Any], title: str, images: ImageSet) -> figures.ImageGrid:
    """Return the grid of the images that activate a row's dimension most."""
    config = row["config"]
    classes = [images.class_names[int(images.labels[i])] for i in config["samples_shown"]]
    count, most = max((classes.count(name), name) for name in classes)
    title += f"{count} of {len(classes)} are {figures.readable(most)}" if count > 1 else "no two of a class"
    return figures.ImageGrid(title, images.images[torch.tensor(config["samples_shown"])], classes)


def draw(run: Run, images: ImageSet) -> None:
    """Fig. 1(a) and Fig. 4(a, b) of the first seed that did not diverge; `images` are the test images."""
    seed = next(seed for seed in run.config["seeds"] if run.find(OF_RANDOM, seed=seed))
    random, of_class = dict[str, list[figures.ImageGrid]](), dict[str, list[figures.ImageGrid]]()
    for name in FEATURES:
        rows = run.find(OF_RANDOM, features=name, seed=seed)
        random[name] = [image_grid(row, f"dimension {row['config']['dimension']}: ", images) for row in rows]
        of_class[name] = []
        for rank in RANKS:
            (row,) = run.find(OF_CLASS, features=name, seed=seed, rank=rank)
            config = row["config"]
            title = f"{rank} class: {figures.readable(config['class_name'])}, {100 * config['class_accuracy']:.0f} %\n"
            of_class[name].append(image_grid(row, f"{title}dimension {config['dimension']}: ", images))
    for name, blocks in (("figure_1a", random), ("figure_4ab", of_class)):
        figures.save(run.folder / name, figures.image_grids(blocks))


EXPERIMENT = experiment(
    SETTINGS,
    noisy_grid,
    recipe="top_activated_samples",
    items=("figure_1a", "figure_4ab"),
    title="Figures 1(a), 4(a), 4(b): the images that activate a dimension most",
    claim="The paper: images of one class for a monosemantic dimension, of several for a polysemantic one; under "
    "90 % label noise the best class relies on a dimension that shows one class, the worst on one that does not "
    "(boathouse and jeans of ImageNet-100; pictures, no numbers).",
    pictures={
        "figure_1a": "Figure 1(a): random dimensions",
        "figure_4ab": "Figure 4(a, b): the dimension with the largest weight of the worst and of the best class",
    },
    report=report,
    draw=None,  # the images stand in no row
)


def main(arguments: list[str] | None = None) -> None:
    """Measure what the output folder has no rows of, then write and print the table and draw the figures."""
    settings, splits, accelerator, run = start("top_activated_samples", SETTINGS, arguments)
    images = splits["test"]
    measure(run, settings, splits, accelerator, noisy_grid, study=partial(study, run.config, images))
    finish(accelerator, run, report, lambda run: draw(run, images))


if __name__ == "__main__":
    run_as_program(main)
