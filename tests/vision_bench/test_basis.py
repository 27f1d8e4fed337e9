"""Learners that do not know in which basis features are given, and what makes them know it (docs/basis.md)."""

import pytest
import torch
import torch.nn.functional as F

from vision_bench import kinds, probe, sae
from vision_bench.metrics import semantic_consistency
from vision_bench.probe import fit_linear_probes, probe_accuracy

D, CLASSES = 12, 4


def images(n, seed):
    """Features (n, 12) of different scales in float64 and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64) + F.one_hot(labels, D)
    return x * torch.linspace(0.2, 3, D), labels


TRAIN, TEST = images(200, 0), images(2000, 1)
BASIS = kinds.random_orthogonal(D, 5)


def fitted(x, **settings):
    return fit_linear_probes(x, TRAIN[1][None], CLASSES, rescale=False, **settings)


def top1(probes, x):
    return probe_accuracy(*probes, x, TEST[1], topk=(1,))[1]


def turn_the_start(monkeypatch):
    """Let the next probes start from the weights W Q where they would from W: a start that knows of no axes."""
    initial = probe._initial

    def turned(*arguments):
        start = initial(*arguments)
        return start._replace(weights=start.weights @ BASIS)

    monkeypatch.setattr(probe, "_initial", turned)


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_probe_on_turned_features_is_the_turned_probe(optimizer, weight_decay, monkeypatch):
    settings = {"optimizer": optimizer, "weight_decay": weight_decay, "epochs": 20, "batch_size": 32}
    plain = fitted(TRAIN[0], **settings)
    turn_the_start(monkeypatch)
    turned = fitted(TRAIN[0] @ BASIS, **settings)
    assert torch.allclose(turned.weights, plain.weights @ BASIS, atol=1e-10)
    accuracies = [top1(plain, TEST[0]), top1(turned, TEST[0] @ BASIS)]
    assert torch.equal(*accuracies)
    assert accuracies[0].item() > 0.4


def test_standardised_features_tell_the_basis(monkeypatch):
    settings = {"standardize": True, "epochs": 20, "batch_size": 32}
    plain = fitted(TRAIN[0], **settings)
    turn_the_start(monkeypatch)
    turned = fitted(TRAIN[0] @ BASIS, **settings)
    assert not torch.allclose(turned.weights, plain.weights @ BASIS, atol=1e-2)


def test_a_penalised_probe_forgets_its_start_so_that_the_twin_has_the_same_accuracy():
    settings = {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.2, "epochs": 600, "batch_size": 200}
    plain, turned = fitted(TRAIN[0], **settings), fitted(TRAIN[0] @ BASIS, **settings)
    assert torch.allclose(turned.weights, plain.weights @ BASIS, atol=1e-4)
    accuracies = [top1(plain, TEST[0]), top1(turned, TEST[0] @ BASIS)]
    assert accuracies[0].item() == pytest.approx(accuracies[1].item(), abs=1.1 / len(TEST[1]))


def test_the_consistency_of_a_twin_falls_to_chance():
    x, labels = (part for part in images(1000, 2))
    torch.manual_seed(0)
    encoder = sae.TopKAutoencoder(D, 40, 4)
    frozen = kinds.Frozen({kinds.BASE: x.float()}, lambda half: encoder)
    consistency = {
        name: semantic_consistency(kinds.maker(name, frozen)(frozen.train), labels)
        for name in ("sae", "sae_random_basis")
    }
    assert consistency["sae"].mean > consistency["sae"].chance + 0.02
    twin = consistency["sae_random_basis"]
    assert twin.mean == pytest.approx(twin.chance, abs=1e-3)
