"""What learns labels from frozen features. A new learner is one entry of `LEARNERS`.

A linear probe that starts at random in all directions alike and has an L2 penalty is equivariant under rotations: for
features Q x with an orthogonal Q it finds W Q^T and b, so that its accuracies cannot say whether axes mean anything.
Learners for which this does not hold are beside it. They are trained on the same labels, wrong ones included:

- `probe`: the linear probe of `probe.fit_linear_probes`.
- `tuned`: the same at the scale of the features and the weight decay that are best on a part of its own training
  data, with their noisy labels, as a user would have to choose them.
- `l1`: logistic regression with an L1 penalty, whose strength is chosen in the same way.
- `k_sparse_1` to `k_sparse_64`: linear, with so many dimensions for each class.
- `tree`: a decision tree of depth 8.

    import torch
    from vision_bench import learners

    labels = torch.arange(300) % 3
    features = torch.randn(300, 8) + 3 * torch.nn.functional.one_hot(labels, 8)
    learnt = learners.LEARNERS["tree"].fit(learners.Task(features, labels[None], num_classes=3))
    print(learners.accuracy(learnt.classifiers, features, labels))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from sklearn.tree import DecisionTreeClassifier
from tqdm.auto import tqdm

from vision_bench.corruptions import seed_of
from vision_bench.probe import NORM, TRAINING, Probes, fit_linear_probes, probe_accuracy
from vision_bench.sparse_probes import fit_k_sparse_probes, fit_l1_probes

PROBE, TUNED = "probe", "tuned"
HELD_OUT = 0.2  # share of the training data by which settings are chosen
HELD_OUT_STREAM = 2  # of the random numbers of a seed, of which `probe.order_stream` is 1
NORMS = (0.3, 1.0, 3.0, NORM, 24.0)  # roots of the mean square norm of the features, that `tuned` chooses from
WEIGHT_DECAYS = (0.0, 1e-3, 1e-2, 1e-1)
STRENGTHS = (0.5, 0.2, 0.1, 0.05)  # shares of the L1 penalty that leaves no weight
TREE_DEPTH = 8
DIMENSIONS = (1, 2, 4, 8, 16, 32, 64)  # of the k-sparse probes
LOSSES = ("weight_decay", "alpha", "beta")  # settings of `Task.probe` that only the linear probe takes


@dataclass(frozen=True)
class Task:
    """k classification tasks on the same features.

    Args:
        features: (n, d) floating.
        label_sets: (k, n) integer in [0, num_classes), with which each is trained.
        num_classes: at least 2.
        seeds: of each of the k; 0 for all if there are none.
        device: where to train.
        progress: show progress bars.
        probe: further arguments of `fit_linear_probes`, such as epochs and standardize, for learners that train so.
    """

    features: torch.Tensor
    label_sets: torch.Tensor
    num_classes: int
    seeds: Sequence[int] = ()
    device: torch.device | str = "cpu"
    progress: bool = False
    probe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def each_seed(self) -> list[int]:
        """A seed for each of the k."""
        return list(self.seeds) or [0] * len(self.label_sets)

    @property
    def standardize(self) -> bool:
        """Whether each feature is standardised before."""
        return bool(self.probe.get("standardize", False))


Trees = list[DecisionTreeClassifier]
Classifiers = Probes | Trees


class Learnt(NamedTuple):
    """k trained classifiers, and what was chosen for each, by name."""

    classifiers: Classifiers
    chosen: list[dict[str, float]]


class Learner(NamedTuple):
    """A way to learn labels from features.

    Args:
        fit: trains the classifiers of a task.
        rotation_equivariant: whether features that are rotated as a whole get the same predictions, but for rounding
            and the draw of the initial weights; not of features that are standardised each.
        words: what it is, for tables.
        dimensions: the least d that it takes.
    """

    fit: Callable[[Task], Learnt]
    rotation_equivariant: bool
    words: str
    dimensions: int = 1

    def is_equivariant(self, standardize: bool) -> bool:
        """`rotation_equivariant`, of features that are standardised each or not."""
        return self.rotation_equivariant and not standardize


def metrics_of(learner: str) -> tuple[str, tuple[str, ...]]:
    """Names of the accuracy on test images, and of what says how well the training labels are fitted."""
    if learner == PROBE:
        return "offline_probe_top1", TRAINING
    return f"{learner}_top1", (f"{learner}_training_top1",)


def check(names: Sequence[str], dimensions: int | None = None) -> None:
    """Raise ValueError unless `names`, a setting learners, has names of `LEARNERS`, each once.

    Args:
        dimensions: of the features, where they are known; a learner that takes more is refused too.
    """
    unknown = [name for name in names if name not in LEARNERS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"learners is {list(names)}; it takes names of {', '.join(LEARNERS)}, each once.")
    for name in names:
        if dimensions is not None and LEARNERS[name].dimensions > dimensions:
            raise ValueError(
                f"learners has {name}, which takes {LEARNERS[name].dimensions} dimensions for each class; the "
                f"features have {dimensions}."
            )


def accuracy(classifiers: Classifiers, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Share (k,) float64 of the samples to which each classifier gives their label.

    Args:
        features: (n, d) floating.
        labels: integer, (n,) for all or (k, n), of each.

    Raises:
        TypeError, ValueError: as `probe.probe_accuracy`.
    """
    if isinstance(classifiers, Probes):
        return probe_accuracy(*classifiers, features, labels, topk=(1,))[1]
    x, answers = features.cpu().numpy(), labels.cpu().expand(len(classifiers), -1).numpy()
    shares = [(tree.predict(x) == own).mean() for tree, own in zip(classifiers, answers, strict=True)]
    return torch.tensor(shares, dtype=torch.float64)


def select(classifiers: Classifiers, indices: Sequence[int]) -> Classifiers:
    """Those of the classifiers at the indices."""
    if isinstance(classifiers, Probes):
        weights, biases = classifiers
        return Probes(weights[list(indices)], biases[list(indices)])
    return [classifiers[i] for i in indices]


def joined(parts: Sequence[Classifiers]) -> Classifiers:
    """All classifiers of the parts, which are of one learner and of the same features."""
    probes = [part for part in parts if isinstance(part, Probes)]
    if probes:
        return Probes(*(torch.cat(tensors) for tensors in zip(*probes, strict=True)))
    return [tree for part in parts for tree in part]


def _linear(task: Task) -> Probes:
    return fit_linear_probes(
        task.features,
        task.label_sets,
        task.num_classes,
        seeds=task.each_seed,
        device=task.device,
        progress=task.progress,
        **task.probe,
    )


def _probe(task: Task) -> Learnt:
    return Learnt(_linear(task), [{} for _ in task.label_sets])


def _tuned(task: Task) -> Learnt:
    """The scale first, without weight decay, and then the weight decay at this scale, as one tunes by hand.

    The scale is chosen whatever the setting `rescale` of other probes is.
    """
    task = _without_losses(task, TUNED)

    def fit(part: Task, settings: Sequence[Mapping[str, float]]) -> Probes:
        """Probes with the norm and the weight decay of each; those of one norm are trained in one pass."""
        norms = [setting["chosen_norm"] for setting in settings]
        passes, order = list[Probes](), list[int]()
        for norm in dict.fromkeys(norms):
            members = [i for i, value in enumerate(norms) if value == norm]
            probe = {**part.probe, "rescale": True, "norm": norm}
            probe["weight_decay"] = [settings[i]["chosen_weight_decay"] for i in members]
            seeds = [part.each_seed[i] for i in members]
            own = replace(part, label_sets=part.label_sets[members], seeds=seeds, probe=probe)
            passes.append(_linear(own) if part is task else _linear_if_finite(own))  # those of the task are chosen
            order += members
        places = torch.tensor(order).argsort()
        return Probes(*(torch.cat(tensors)[places] for tensors in zip(*passes, strict=True)))

    start = {"chosen_norm": NORM, "chosen_weight_decay": 0.0}
    settings = _chosen(task, fit, [start | {"chosen_norm": norm} for norm in NORMS])
    settings = _chosen(task, fit, [{"chosen_weight_decay": decay} for decay in WEIGHT_DECAYS], settings)
    return Learnt(fit(task, settings), settings)


def _linear_if_finite(task: Task) -> Probes:
    """The probes of a task, and in the place of those whose training diverges ones that give all samples one class.

    Settings with which a probe diverges are thus not chosen, and the other probes are what they would be without it.
    """
    try:
        return _linear(task)
    except FloatingPointError:
        if len(task.label_sets) == 1:
            weights = task.features.new_zeros(1, task.num_classes, task.features.shape[1])
            return Probes(weights, weights[..., 0])
    alone = [
        replace(task, label_sets=labels[None], seeds=[seed], probe={**task.probe, "weight_decay": decay})
        for labels, seed, decay in zip(task.label_sets, task.each_seed, task.probe["weight_decay"], strict=True)
    ]
    return Probes(*(torch.cat(tensors) for tensors in zip(*map(_linear_if_finite, alone), strict=True)))


def _l1(task: Task) -> Learnt:
    task = _without_losses(task, "l1")

    def fit(part: Task, settings: Sequence[Mapping[str, float]]) -> Probes:
        strengths = [setting["chosen_strength"] for setting in settings]
        options: dict[str, Any] = {"standardize": part.standardize, "device": part.device, "progress": part.progress}
        return fit_l1_probes(part.features, part.label_sets, part.num_classes, strengths, **options)

    settings = _chosen(task, fit, [{"chosen_strength": strength} for strength in STRENGTHS])
    return Learnt(fit(task, settings), settings)


def _chosen(
    task: Task,
    fit: Callable[[Task, Sequence[Mapping[str, float]]], Probes],
    candidates: Sequence[Mapping[str, float]],
    given: Sequence[Mapping[str, float]] | None = None,
) -> list[dict[str, float]]:
    """For each of the k tasks the best of the candidates on a held-out part of its data with their noisy labels.

    The first of equally good candidates is taken. Tasks of one seed hold back the same samples.

    Args:
        given: further settings of each task.
    """
    n, k = len(task.features), len(task.label_sets)
    given = given or [{} for _ in range(k)]
    best: list[dict[str, float]] = [{} for _ in range(k)]
    for seed in dict.fromkeys(task.each_seed):
        members = [i for i in range(k) if task.each_seed[i] == seed]
        generator = torch.Generator().manual_seed(seed_of(seed, HELD_OUT_STREAM))
        order = torch.randperm(n, generator=generator)
        held_out, kept = order.split([max(1, round(HELD_OUT * n)), n - max(1, round(HELD_OUT * n))])
        settings = [{**given[i], **candidate} for candidate in candidates for i in members]
        probe = dict(task.probe)
        if "batch_size" in probe:
            probe["batch_size"] = min(probe["batch_size"], len(kept))
        part = replace(
            task,
            features=task.features[kept],
            label_sets=task.label_sets[members][:, kept].repeat(len(candidates), 1),
            seeds=[seed] * len(settings),
            probe=probe,
        )
        labels = task.label_sets[members][:, held_out].repeat(len(candidates), 1)
        right = accuracy(fit(part, settings), task.features[held_out], labels).view(len(candidates), len(members))
        for place, i in enumerate(members):
            best[i] = dict(settings[int(right[:, place].argmax()) * len(members) + place])
    return best


def _k_sparse(task: Task, k: int) -> Learnt:
    task = _without_losses(task, f"k_sparse_{k}")
    probes = fit_k_sparse_probes(task.features, task.label_sets, task.num_classes, k, task.device)
    return Learnt(probes, [{} for _ in task.label_sets])


def _tree(task: Task) -> Learnt:
    task = _without_losses(task, "tree")
    x = task.features.cpu().numpy()
    trees = [
        DecisionTreeClassifier(max_depth=TREE_DEPTH, random_state=seed).fit(x, labels.cpu().numpy())
        for labels, seed in zip(tqdm(task.label_sets, "trees", disable=not task.progress), task.each_seed, strict=True)
    ]
    return Learnt(trees, [{} for _ in trees])


def _without_losses(task: Task, name: str) -> Task:
    """The task without settings of the loss; raises ValueError if they are not those of plain cross entropy."""
    plain = {"weight_decay": 0.0, "alpha": 1.0, "beta": 0.0}
    for setting in LOSSES:
        values = torch.as_tensor(task.probe.get(setting, plain[setting]), dtype=torch.float64)
        if not (values == plain[setting]).all():
            raise ValueError(f"{setting} is {values.tolist()}; the learner {name} takes {plain[setting]:g} alone.")
    return replace(task, probe={name: value for name, value in task.probe.items() if name not in LOSSES})


LEARNERS: dict[str, Learner] = {
    PROBE: Learner(_probe, True, "linear probe"),
    TUNED: Learner(_tuned, True, "linear probe, scale and weight decay chosen on held-out training data"),
    "l1": Learner(_l1, False, "logistic regression with an L1 penalty chosen on held-out training data"),
    **{
        f"k_sparse_{k}": Learner(
            partial(_k_sparse, k=k), False, f"linear, {k} dimension{'s' * (k > 1)} for each class", k
        )
        for k in DIMENSIONS
    },
    "tree": Learner(_tree, False, f"decision tree of depth {TREE_DEPTH}"),
}
