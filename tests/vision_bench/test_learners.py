"""Learners against scikit-learn's, on features whose axes mean something and on rotations of these."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from vision_bench import learners, sparse_probes
from vision_bench.corruptions import flip_labels, seed_of
from vision_bench.learners import LEARNERS, Task
from vision_bench.probe import fit_linear_probes, probe_accuracy

N, D, CLASSES = 200, 70, 3
PROBE = {"epochs": 4, "batch_size": 32}


def data(n, seed):
    """Features whose first three axes are one class each, as far as 67 axes of noise let them be."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    return torch.randn(n, D, generator=generator) + 1.5 * torch.eye(D)[labels] + 1, labels


X, LABELS = data(N, 0)
TEST, ANSWERS = data(120, 1)
SETS = torch.stack([flip_labels(LABELS, rate, CLASSES, torch.Generator().manual_seed(0)) for rate in (0.0, 0.3)])


def top1(name, train=X, test=TEST, **task):
    learnt = LEARNERS[name].fit(Task(train, SETS, CLASSES, **task))
    return learners.accuracy(learnt.classifiers, test, ANSWERS).tolist()


@pytest.mark.parametrize("k", [1, 5])
def test_k_sparse_probes_are_least_squares_on_the_dimensions_of_the_largest_f_statistic(k):
    weights, biases = sparse_probes.fit_k_sparse_probes(X.double(), SETS, CLASSES, k)
    for i, c in itertools.product(range(2), range(CLASSES)):
        indicator = (SETS[i] == c).double().numpy()
        chosen = SelectKBest(f_classif, k=k).fit(X.double().numpy(), indicator).get_support()
        fitted = LinearRegression().fit(X.double().numpy()[:, chosen], indicator)
        assert (weights[i, c].numpy() != 0).tolist() == chosen.tolist()
        np.testing.assert_allclose(weights[i, c].numpy()[chosen], fitted.coef_, rtol=1e-4)
        assert biases[i, c].item() == pytest.approx(fitted.intercept_, rel=1e-4)


def test_k_sparse_probes_of_constant_and_of_equal_dimensions():
    same = torch.cat([X[:, :1], X[:, :1], torch.ones(N, 1)], dim=1)
    weights, biases = sparse_probes.fit_k_sparse_probes(same, SETS, CLASSES, 3)
    assert weights.isfinite().all()
    assert biases.isfinite().all()
    assert (weights[..., 2] == 0).all()
    with pytest.raises(ValueError, match=r"k is 71 for features of 70 dimensions; it must be in \[1, 70\]"):
        sparse_probes.fit_k_sparse_probes(X, SETS, CLASSES, 71)


@pytest.mark.parametrize("standardize", [False, True])
def test_l1_probes_are_scikit_learns(standardize):
    x = X[:, :8].double() * torch.linspace(0.5, 2, 8).double()
    strength = torch.tensor([0.3, 0.05])
    probes = sparse_probes.fit_l1_probes(x, SETS, CLASSES, strength, standardize=standardize, tolerance=1e-6)
    spread = x.std(dim=0, correction=0).numpy()
    for i in range(2):
        seen = x.numpy() / (spread if standardize else 1)
        targets = np.eye(CLASSES)[SETS[i].numpy()]
        largest = np.abs((targets.mean(axis=0) - targets).T @ (seen - seen.mean(axis=0))).max()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # how an L1 penalty is asked for changes between versions
            twin = LogisticRegression(
                penalty="l1", solver="saga", C=1 / (strength[i].item() * largest), max_iter=20000, tol=1e-7
            ).fit(seen, SETS[i].numpy())
        assert 0 < (twin.coef_ != 0).mean() < 1
        coefficients = probes.weights[i].numpy() * (spread if standardize else 1)
        np.testing.assert_allclose(coefficients, twin.coef_, atol=2e-4)
        biases = probes.biases[i].numpy()
        np.testing.assert_allclose(biases - biases.mean(), twin.intercept_ - twin.intercept_.mean(), atol=2e-3)


def test_a_penalty_of_strength_1_leaves_no_weight_and_a_scale_changes_nothing():
    nothing = sparse_probes.fit_l1_probes(X, SETS, CLASSES, 1.0)
    assert nothing.weights.abs().max() < 1e-6
    some = sparse_probes.fit_l1_probes(X.double(), SETS, CLASSES, 0.2, tolerance=1e-6)
    scaled = sparse_probes.fit_l1_probes(100 * X.double() + 3, SETS, CLASSES, 0.2, tolerance=1e-6)
    torch.testing.assert_close(100 * scaled.weights, some.weights, atol=1e-5, rtol=1e-4)
    with pytest.warns(
        UserWarning, match="2 of 2 probes with an L1 penalty took 2 passes and are within .* give a lar"
    ):
        sparse_probes.fit_l1_probes(X, SETS, CLASSES, 0.01, max_iterations=2)


def test_trees_are_scikit_learns():
    twins = [DecisionTreeClassifier(max_depth=8, random_state=s).fit(X, y) for s, y in zip((4, 5), SETS, strict=True)]
    expected = [twin.score(TEST, ANSWERS) for twin in twins]
    assert top1("tree", seeds=[4, 5]) == pytest.approx(expected)


def test_tuned_is_the_probe_of_the_settings_that_are_best_on_held_out_noisy_labels(monkeypatch):
    monkeypatch.setattr(learners, "NORMS", (8.0, 0.5))
    monkeypatch.setattr(learners, "WEIGHT_DECAYS", (0.0, 0.3))
    learnt = LEARNERS["tuned"].fit(Task(X, SETS, CLASSES, [6, 6], probe=PROBE))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed_of(6, 2)))
    held_out, kept = order[: N // 5], order[N // 5 :]
    for i, labels in enumerate(SETS):

        def right(norm, decay, labels=labels):
            options = {**PROBE, "norm": norm, "weight_decay": decay, "seeds": 6}
            probes = fit_linear_probes(X[kept], labels[kept][None], CLASSES, **options)
            return probe_accuracy(*probes, X[held_out], labels[held_out], topk=(1,))[1].item()

        norm = max((8.0, 0.5), key=lambda norm: right(norm, 0.0))
        decay = max((0.0, 0.3), key=lambda decay, norm=norm: right(norm, decay))
        assert learnt.chosen[i] == {"chosen_norm": norm, "chosen_weight_decay": decay}
        options = {**PROBE, "norm": norm, "weight_decay": decay, "seeds": 6}
        (weights,), (biases,) = fit_linear_probes(X, labels[None], CLASSES, **options)
        torch.testing.assert_close(learnt.classifiers.weights[i], weights)
        torch.testing.assert_close(learnt.classifiers.biases[i], biases)


def test_settings_with_which_training_diverges_are_not_chosen(monkeypatch):
    monkeypatch.setattr(learners, "NORMS", (1e25, 8.0))
    settings = {**PROBE, "optimizer": "sgd", "learning_rate": 0.1}
    learnt = LEARNERS["tuned"].fit(Task(X, SETS, CLASSES, [0, 0], probe=settings))
    assert [chosen["chosen_norm"] for chosen in learnt.chosen] == [8.0, 8.0]
    monkeypatch.setattr(learners, "NORMS", (1e25,))
    with pytest.raises(FloatingPointError, match="their training diverged"):
        LEARNERS["tuned"].fit(Task(X, SETS, CLASSES, [0, 0], probe=settings))


def test_a_setting_that_diverges_takes_no_other_with_it(monkeypatch):
    monkeypatch.setattr(learners, "NORMS", (8.0,))
    settings = {**PROBE, "epochs": 20, "optimizer": "sgd", "schedule": "constant", "learning_rate": 20.0}
    for decays in ((0.0, 1e-3), (0.0, 1e-3, 0.3)):  # SGD with this learning rate does not bear the last one
        monkeypatch.setattr(learners, "WEIGHT_DECAYS", decays)
        learnt = LEARNERS["tuned"].fit(Task(X, SETS, CLASSES, [1, 1], probe=settings))
        assert [chosen["chosen_weight_decay"] for chosen in learnt.chosen] == [1e-3, 1e-3]


@pytest.mark.parametrize("name", ["probe", "tuned", "k_sparse_1", "k_sparse_4", "l1", "tree"])
def test_learners_that_are_not_equivariant_lose_by_a_rotation_and_the_others_do_not(name, monkeypatch):
    monkeypatch.setattr(learners, "NORMS", (3.0, 1.0))
    rotation = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2)))[0]
    train, test = (features + 0.7 * torch.eye(D)[labels] for features, labels in ((X, LABELS), (TEST, ANSWERS)))
    accuracies = []
    for turn in (torch.eye(D), rotation):
        task = Task(train[:100] @ turn, LABELS[None, :100], CLASSES, [0], probe={**PROBE, "epochs": 10})
        learnt = LEARNERS[name].fit(task)
        accuracies.append(learners.accuracy(learnt.classifiers, test @ turn, ANSWERS).item())
    straight, turned = accuracies
    if LEARNERS[name].rotation_equivariant:
        # The initial weights are drawn in the new directions, which moves a few of 120 samples.
        assert turned == pytest.approx(straight, abs=0.07)
    else:
        assert straight > turned + 0.1


def test_a_learner_is_one_row_of_the_table_and_names_are_checked(monkeypatch):
    with pytest.raises(ValueError, match=r"learners is .'forest'.; it takes names of probe, tuned, l1, k_sparse_1"):
        learners.check(["forest"])
    with pytest.raises(
        ValueError, match=r"learners has k_sparse_64, which takes 64 dimensions .* the features have 32"
    ):
        learners.check(["probe", "k_sparse_64"], 32)
    with pytest.raises(ValueError, match=r"alpha is \[6.0, 6.0\]; the learner tree takes 1 alone"):
        top1("tree", probe={"alpha": [6.0, 6.0]})
    assert learners.metrics_of("tree") == ("tree_top1", ("tree_training_top1",))
