"""The sweep of probes: how they are trained x what they are tested on x kinds of features -> rows of results.

`Grid` says which rows there are, `sweep` measures those that are lacking, and `rows` makes rows of a run of them. The
recipes of Table 1, Fig. 2 and Fig. 6 and the command `python -m vision_bench` are grids of their own:

    import torch
    from vision_bench import kinds
    from vision_bench.sweep import Arm, Grid, Test, Training, sweep

    trainings = [Training(label_noise=rate, seed=seed) for seed in (0, 1) for rate in (0.0, 0.4)]
    grid = Grid(
        arms={"raw": Arm("raw", trainings), "unit": Arm("unit", trainings)},
        tests=[Test()],
        training_arm=lambda training: {"label_noise": training.label_noise},
        test_arm=lambda test: {"test": test.images},
    )
    labels = torch.arange(300) % 3
    features = {kinds.BASE: torch.randn(300, 8) + torch.nn.functional.one_hot(labels, 8)}
    frozen = kinds.Frozen(train=features)
    for batch in sweep(grid, frozen, labels, 3, load=lambda test: (features, labels), device="cpu"):
        for measured in batch:
            print(measured.cell.metric, measured.cell.seed, measured.cell.arm, measured.value)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from vision_bench import kinds, learners
from vision_bench.corruptions import CLEAN, InputNoise, stratified_fraction
from vision_bench.label_noise import HUMAN, HumanLabels, LabelNoise, given_labels, wrong_share
from vision_bench.learners import LEARNERS, PROBE, metrics_of
from vision_bench.metrics import MEASURED, semantic_consistency
from vision_bench.probe import Probes, training_accuracy
from vision_bench.runs import Cell, Run, device_name

ACCURACY, _ = metrics_of(PROBE)  # of a linear probe on test images
WRONG_LABELS = "wrong_labels"  # in rows of training labels: the real share of them, where the noise does not name it


class Training(NamedTuple):
    """Conditions under which a probe is trained."""

    label_noise: LabelNoise = 0.0  # wrong training labels: a share, uniformly, or another of `label_noise`
    fraction: float = 1.0  # share of the training images that have labels, drawn from each class, in (0, 1]
    alpha: float = 1.0  # loss = alpha * cross entropy + beta * reverse cross entropy
    beta: float = 0.0
    weight_decay: float = 0.0
    loss: str = ""  # a name of alpha and beta for the rows, where losses are compared
    learner: str = PROBE  # of `learners.LEARNERS`; those other than it take plain cross entropy alone
    seed: int = 0  # of the wrong labels, the drawn images, the initial weights and the order of the samples


class Test(NamedTuple):
    """What probes are tested on."""

    images: str = CLEAN  # name of the images, which the `load` of `sweep` understands
    noise: InputNoise | None = None  # on these images
    seeds: tuple[int, ...] | None = None  # of the probes that are tested; None: all, as the images are for all seeds


class Arm(NamedTuple):
    """A kind of features and the probes of it. Two arms may have one kind, such as `poly` and `poly_decay`."""

    kind: str  # of `kinds.KINDS`
    trainings: Sequence[Training]


class Measured(NamedTuple):
    """The value of a cell."""

    cell: Cell
    value: float | None
    n: int  # samples behind the value
    details: Mapping[str, Any] = {}  # what else stands in the row, and follows from the same measurement


class Fitted(NamedTuple):
    """k classifiers of one kind of features, of one learner."""

    trainings: list[Training]  # how each was trained
    probes: learners.Classifiers
    own: list[tuple[list[float], int]]  # of each: values of the training metrics of its learner, number of its images
    details: list[dict[str, Any]]  # of each: what else rows of its training labels say

    @property
    def linear(self) -> Probes:
        """The classifiers of a learner that is linear."""
        assert isinstance(self.probes, Probes)
        return self.probes


@dataclass(frozen=True)
class Grid:
    """The rows of a sweep with the frozen models of one pretraining.

    Args:
        arms: by the name that rows have as `features`.
        tests: every arm is tested on all of them.
        training_arm: what distinguishes the rows of a training, beside features and seed.
        test_arm: what distinguishes the rows of a test.
        all_described: whether rows say what features are (`MEASURED`) on every test; else they do on the first alone,
            and nothing distinguishes them but the features.
        model_seed: seed of rows that depend on the frozen models alone; None if several seeds share the models.
    """

    arms: Mapping[str, Arm]
    tests: Sequence[Test]
    training_arm: Callable[[Training], dict[str, Any]]
    test_arm: Callable[[Test], dict[str, Any]]
    all_described: bool = False
    model_seed: int | None = None

    def training_cells(self, name: str, training: Training) -> list[Cell]:
        """The cells of what a probe fits of its own training labels."""
        arm = {"features": name, **self.training_arm(training)}
        return [Cell(metric, training.seed, arm) for metric in metrics_of(training.learner)[1]]

    def accuracy_cell(self, name: str, training: Training, test: Test) -> Cell:
        """The cell of the accuracy of a probe."""
        arm = {"features": name, **self.test_arm(test), **self.training_arm(training)}
        return Cell(metrics_of(training.learner)[0], training.seed, arm)

    def described_cells(self, name: str, test: Test) -> list[Cell]:
        """The cells of `MEASURED`: what the features of an arm are on the images of a test."""
        if not self.all_described and test != self.tests[0]:
            return []
        arm = {"features": name, **(self.test_arm(test) if self.all_described else {})}
        return [Cell(metric, self.model_seed, arm) for metric in MEASURED]

    def test_cells(self, name: str, test: Test) -> list[Cell]:
        """All cells of an arm on one test."""
        accuracies = [self.accuracy_cell(name, training, test) for training in self.tested(name, test)]
        return accuracies + self.described_cells(name, test)

    def tested(self, name: str, test: Test) -> list[Training]:
        """The trainings of an arm whose probes are tested on the images of a test."""
        return [t for t in self.arms[name].trainings if test.seeds is None or t.seed in test.seeds]

    def cells(self, name: str, learner: str | None = None) -> list[Cell]:
        """Every cell of an arm, or those of its probes of one learner."""
        own = [training for training in self.arms[name].trainings if learner in (None, training.learner)]
        cells = [cell for training in own for cell in self.training_cells(name, training)]
        for test in self.tests:
            tested = [training for training in self.tested(name, test) if learner in (None, training.learner)]
            cells += [self.accuracy_cell(name, training, test) for training in tested]
            cells += self.described_cells(name, test) if learner is None else []
        return cells


def fit(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    trainings: Sequence[Training],
    *,
    device: torch.device | str,
    epochs: int = 50,
    batch_size: int = 256,
    human_labels: HumanLabels | None = None,
    progress: bool = False,
    **probe: Any,
) -> Fitted:
    """A classifier for each training. Those that see the same images are one pass, in the order of `trainings`.

    With all images this is one pass of all seeds. With a share of them each seed draws its own. Probes of few images
    take as many steps as those of all images, up to whole epochs.

    Args:
        features: (n, d) of the training images.
        labels: (n,) integer in [0, num_classes), the right ones.
        num_classes: at least 2.
        trainings: at least one, all of one learner.
        device: where to train.
        epochs: passes over all images.
        batch_size: of images; all of them where there are fewer.
        human_labels: of all images, for trainings on the labels that people gave; a share of the images takes its
            part of them.
        progress: show progress bars.
        probe: further arguments of `probe.fit_linear_probes`, shared by all probes.

    Raises:
        ValueError: as `fit_linear_probes`; the learner does not exist or does not take a training; or a class is left
            without images.
        FloatingPointError: the training of a probe diverged.
    """
    name = trainings[0].learner
    learners.check([name], features.shape[1])
    passes: dict[tuple[float, int | None], list[Training]] = {}
    for training in trainings:
        drawn_by = None if training.fraction == 1 else training.seed
        passes.setdefault((training.fraction, drawn_by), []).append(training)
    steps = epochs * (len(labels) // min(batch_size, len(labels)))  # an incomplete batch is no step
    parts, own, details = list[learners.Classifiers](), list[tuple[list[float], int]](), list[dict[str, Any]]()
    for (fraction, drawn_by), members in passes.items():
        x, y, drawn = features, labels, None
        if drawn_by is not None:
            drawn = stratified_fraction(labels, fraction, torch.Generator().manual_seed(drawn_by))
            x, y = features[drawn], labels[drawn]
        label_sets = torch.stack([_labels(labels, drawn, num_classes, t, human_labels) for t in members])
        shares = [
            {WRONG_LABELS: wrong_share(given, y)} if isinstance(t.label_noise, str) else {}
            for t, given in zip(members, label_sets, strict=True)
        ]
        batch = min(batch_size, len(y))
        settings = {
            "epochs": max(1, round(steps / (len(y) // batch))),
            "batch_size": batch,
            "weight_decay": [training.weight_decay for training in members],
            "alpha": [training.alpha for training in members],
            "beta": [training.beta for training in members],
            **probe,
        }
        task = learners.Task(
            x.to(device), label_sets, num_classes, [t.seed for t in members], device, progress, settings
        )
        learnt = LEARNERS[name].fit(task)
        parts.append(learnt.classifiers)
        if name == PROBE:
            assert isinstance(learnt.classifiers, Probes)
            accuracies = [*training_accuracy(learnt.classifiers, task.features, label_sets)]
            details += shares
        else:
            accuracies = [learners.accuracy(learnt.classifiers, task.features, label_sets)]
            about = {"learner": name, "rotation_equivariant": LEARNERS[name].is_equivariant(task.standardize)}
            details += [about | share | chosen for share, chosen in zip(shares, learnt.chosen, strict=True)]
        own += [(list(values), len(y)) for values in zip(*(each.tolist() for each in accuracies), strict=True)]
    fitted = [training for members in passes.values() for training in members]
    return Fitted(fitted, learners.joined(parts), own, details)


def _labels(
    labels: torch.Tensor,
    drawn: torch.Tensor | None,
    num_classes: int,
    training: Training,
    people: HumanLabels | None,
) -> torch.Tensor:
    """The labels that a probe is trained on, of all images or of those drawn."""
    of_images = labels if drawn is None else labels[drawn]
    generator = torch.Generator().manual_seed(training.seed)
    if training.label_noise != HUMAN:
        return given_labels(of_images, training.label_noise, num_classes, generator)
    given = given_labels(labels, HUMAN, num_classes, generator, people)
    return given if drawn is None else given[drawn]


def sweep(
    grid: Grid,
    frozen: kinds.Frozen,
    labels: torch.Tensor,
    num_classes: int,
    load: Callable[[Test], tuple[kinds.Outputs, torch.Tensor]],
    *,
    device: torch.device | str,
    lacking: Callable[[Iterable[Cell]], Sequence[Cell]] = list,
    study: Callable[[str, Fitted, torch.Tensor, torch.Tensor], list[Measured]] | None = None,
    progress: bool = False,
    **probe: Any,
) -> Iterator[list[Measured]]:
    """Measure the cells of a grid that are lacking.

    Every learner of an arm that lacks a cell is fitted as a whole, so that a run that was stopped goes on to the same
    values. The features of the images of a test are loaded once and serve all arms.

    Args:
        frozen: what the frozen models make of the training images, and what kinds of features need beside it.
        labels: (n,) integer, the right labels of the training images.
        num_classes: at least 2.
        load: gives for a test the features (m, d) of its images under each frozen model, and their labels (m,).
        device: where probes are trained and tested.
        lacking: gives the cells that are to be measured, such as `Run.lacking`.
        study: gives further cells of an arm on a test, from its name, its probes, and the features (m, d) and labels
            (m,) of the images. Cells of the grid that are among them are not measured again.
        progress: show progress bars.
        probe: further arguments of `fit`, such as epochs, batch_size and optimizer.

    Yields:
        The measured cells of an arm as soon as it is fitted, then those of each test.

    Raises:
        ValueError: a kind of features that does not exist; or as `fit`.
        FloatingPointError: the training of a probe diverged.
    """
    makers = {name: kinds.maker(arm.kind, frozen) for name, arm in grid.arms.items() if lacking(grid.cells(name))}
    fitted: dict[str, list[Fitted]] = {}
    for name, make in makers.items():
        fitted[name] = []
        train = make(frozen.train)
        for learner in dict.fromkeys(training.learner for training in grid.arms[name].trainings):
            if study is None and not lacking(grid.cells(name, learner)):
                continue
            trainings = [training for training in grid.arms[name].trainings if training.learner == learner]
            learnt = fit(train, labels, num_classes, trainings, device=device, progress=progress, **probe)
            fitted[name].append(learnt)
            yield [
                Measured(cell, value, n, details)
                for training, (values, n), details in zip(learnt.trainings, learnt.own, learnt.details, strict=True)
                for cell, value in zip(grid.training_cells(name, training), values, strict=True)
                if lacking([cell])
            ]
    tests = [test for test in grid.tests if any(lacking(grid.test_cells(name, test)) for name in makers)]
    for test in tqdm(tests, desc="test sets", unit="set", disable=not progress or len(tests) < 2):
        outputs, answers = load(test)
        measured: list[Measured] = []
        for name, make in makers.items():
            if not lacking(grid.test_cells(name, test)):
                continue
            features, tested = make(outputs), set(grid.tested(name, test))
            new, described = list[Measured](), grid.described_cells(name, test)
            for learnt in fitted[name]:
                measured += study(name, learnt, features, answers) if study else []
                chosen = [i for i, training in enumerate(learnt.trainings) if training in tested]
                accuracies = learners.accuracy(learners.select(learnt.probes, chosen), features, answers).tolist()
                new += [
                    Measured(
                        grid.accuracy_cell(name, learnt.trainings[i], test), value, len(answers), learnt.details[i]
                    )
                    for i, value in zip(chosen, accuracies, strict=True)
                ]
            if lacking(described):
                values = semantic_consistency(features, answers).summary.values()
                new += [Measured(cell, value, len(answers)) for cell, value in zip(described, values, strict=True)]
            studied = [measurement.cell for measurement in measured]
            measured += [measurement for measurement in new if measurement.cell not in studied]
        yield [measurement for measurement in measured if lacking([measurement.cell])]


def rows(
    run: Run, batches: Iterable[Sequence[Measured]], device: torch.device, **common: Any
) -> Iterator[list[dict[str, Any]]]:
    """Rows of a run, not yet in it, of each batch of `sweep`; `common` stands in the config of all of them."""
    start = time.monotonic()
    for batch in batches:
        timed: dict[str, Any] = {"seconds": time.monotonic() - start, "device": device_name(device)}
        yield [
            run.row(cell.metric, value, n=n, seed=cell.seed, **timed, **common, **cell.arm, **details)
            for cell, value, n, details in batch
        ]
        start = time.monotonic()
