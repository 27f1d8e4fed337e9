"""All probes in one pass against nn.Linear trained alone by torch's and timm's optimisers, and kNN against a loop."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import Lars
from torch import nn
from torch.nn import functional as F

from vision_bench import probe
from vision_bench.corruptions import flip_labels
from vision_bench.data import load_images
from vision_bench.losses import symmetric_cross_entropy
from vision_bench.probe import fit_linear_probes, knn_accuracy, probe_accuracy, training_accuracy


def data(n=70, d=12, classes=5, k=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=generator, dtype=dtype) + 0.5
    return features, torch.randint(classes, (k, n), generator=generator)


def loss_of(logits, labels, alpha, beta):
    """alpha CE + beta RCE as published: probabilities clamped at 1e-7, the one-hot label at 1e-4."""
    onehot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    reverse = -(logits.softmax(1).clamp(1e-7, 1) * onehot.clamp(1e-4, 1).log()).sum(1).mean()
    return alpha * F.cross_entropy(logits, labels) + beta * reverse


def fit_plainly(
    features, labels, classes, *, epochs, batch_size, optimizer, rate, decay=0.0, momentum=0.9, schedule="cosine",
    alpha=1.0, beta=0.0, seed=0, order_seed=None, rescale=True,
):  # fmt: skip
    """One nn.Linear by autograd and a stock optimiser, on features whose rows have the mean square norm 64."""
    views = features if features.ndim == 3 else features[None]
    scale = 8 / views.double().square().sum(-1).mean().sqrt().item() if rescale else 1.0
    views = views * scale
    _, n, d = views.shape
    start = torch.Generator().manual_seed(seed)
    head = nn.Linear(d, classes).to(features.dtype)
    with torch.no_grad():
        head.weight.copy_((2 * torch.rand(classes, d, generator=start) - 1) / math.sqrt(d))
        head.bias.copy_((2 * torch.rand(classes, generator=start) - 1) / math.sqrt(d))
    groups = [{"params": [head.weight], "weight_decay": decay}, {"params": [head.bias], "weight_decay": 0.0}]
    if optimizer == "lars":
        groups[0]["always_adapt"] = True
        stock = Lars(groups, lr=rate, momentum=momentum, trust_coeff=0.02, trust_clip=True)
    else:
        stock = torch.optim.SGD(groups, lr=rate, momentum=momentum)
    order = torch.Generator().manual_seed(probe.order_stream(seed if order_seed is None else order_seed))
    steps = n // batch_size
    for epoch in range(epochs):
        permutation, drawn = torch.randperm(n, generator=order), torch.randint(len(views), (n,), generator=order)
        for step in range(steps):
            batch = permutation[step * batch_size : (step + 1) * batch_size]
            x = torch.stack([views[drawn[i], i] for i in batch])
            factor = 1.0
            if schedule == "cosine":
                factor = 0.5 * (1 + math.cos(math.pi * (epoch * steps + step) / (epochs * steps)))
            elif schedule == "step":
                factor = 1.0 if epoch < 0.6 * epochs else 0.1 if epoch < 0.8 * epochs else 0.01
            for group in stock.param_groups:
                group["lr"] = rate * factor
            stock.zero_grad()
            loss_of(head(x), labels[batch], alpha, beta).backward()
            stock.step()
    return head.weight.detach() * scale, head.bias.detach()


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
@pytest.mark.parametrize(("order_seed", "rescale"), [(None, True), (4, True), (4, False)])
def test_equals_separate_programs_with_settings_per_probe(optimizer, schedule, order_seed, rescale):
    x, y = data()
    rates = [0.4, 0.1, 1.5] if optimizer == "lars" else [0.1, 0.02, 0.2]
    decays, seeds, alphas, betas = [0.0, 1e-2, 0.3], [3, 1, 3], [1.0, 6.0, 0.5], [0.0, 0.1, 0.2]
    shared = {"epochs": 5, "batch_size": 16, "optimizer": optimizer, "schedule": schedule}
    shared |= {"order_seed": order_seed, "rescale": rescale}
    probes = fit_linear_probes(
        x, y, 5, learning_rate=rates, weight_decay=decays, alpha=alphas, beta=betas, seeds=seeds, **shared
    )
    assert probes.weights.shape == (3, 5, 12)
    assert probes.biases.shape == (3, 5)
    for i in range(3):
        own = {"rate": rates[i], "decay": decays[i], "alpha": alphas[i], "beta": betas[i], "seed": seeds[i]}
        weight, bias = fit_plainly(x, y[i], 5, **own, **shared)
        torch.testing.assert_close(probes.weights[i], weight, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(probes.biases[i], bias, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(4, 40), d=st.integers(1, 9), classes=st.integers(2, 6), k=st.integers(1, 5),
    batch=st.floats(0, 1), seed=st.integers(0, 99), beta=st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_equals_separate_programs_in_float64_for_any_shape(n, d, classes, k, batch, seed, beta):
    x, y = data(n, d, classes, k, seed, torch.float64)
    batch_size = 1 + int(batch * (n - 1))
    shared = {"epochs": 2, "batch_size": batch_size, "optimizer": "lars", "beta": beta}
    probes = fit_linear_probes(x, y, classes, learning_rate=0.3, seeds=range(k), **shared)
    for i in range(k):
        weight, bias = fit_plainly(x, y[i], classes, rate=0.3, seed=i, **shared)
        torch.testing.assert_close(probes.weights[i], weight, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(probes.biases[i], bias, rtol=1e-10, atol=1e-10)


def test_a_probe_does_not_depend_on_what_it_is_trained_beside():
    x, y = data(k=6)
    rates, seeds = [0.1, 0.2, 0.3, 0.1, 0.2, 0.3], [0, 0, 0, 1, 1, 2]
    together = fit_linear_probes(x, y, 5, epochs=10, batch_size=16, learning_rate=rates, seeds=seeds)
    for i in range(6):
        alone = fit_linear_probes(x, y[i : i + 1], 5, epochs=10, batch_size=16, learning_rate=rates[i], seeds=seeds[i])
        torch.testing.assert_close(together.weights[i], alone.weights[0], rtol=1e-5, atol=1e-5)


def test_wrong_labels_of_the_same_seed_do_not_come_first(monkeypatch):
    """One epoch over 2,000 samples of which 1,000 have wrong labels: each half of the steps sees about 500 of them."""
    features, labels = torch.zeros(2000, 3), torch.arange(2000) % 2
    noisy = flip_labels(labels, 0.5, 4, torch.Generator().manual_seed(7))
    seen, step = [], probe._Group.step

    def recorded(self, x, samples, factor):
        seen.append(int((noisy[samples] != labels[samples]).sum()))
        step(self, x, samples, factor)

    monkeypatch.setattr(probe._Group, "step", recorded)
    fit_linear_probes(features, noisy[None], 4, epochs=1, batch_size=100, seeds=7)
    assert sum(seen) == 1000
    assert 430 < sum(seen[:10]) < 570  # 500 +- 5 standard deviations are 56


def test_the_loss_is_that_of_the_losses_module():
    logits, labels = torch.randn(30, 5, dtype=torch.float64) * 9, data(30)[1][0]
    expected = symmetric_cross_entropy(logits, labels, 6.0, 0.1)
    torch.testing.assert_close(loss_of(logits, labels, 6.0, 0.1), expected)


def test_clamped_probabilities_have_no_reverse_gradient():
    x, y = data(40, 3, 4, 1, dtype=torch.float64)
    shared = {"epochs": 20, "batch_size": 8, "optimizer": "sgd", "schedule": "constant", "alpha": 6.0, "beta": 0.1}
    shared["rescale"] = False
    x = x * 40  # saturates the softmax
    probes = fit_linear_probes(x, y, 4, learning_rate=1.0, **shared)
    assert ((x @ probes.weights[0].T + probes.biases[0]).softmax(1) < 1e-7).any()
    weight, _ = fit_plainly(x, y[0], 4, rate=1.0, **shared)
    torch.testing.assert_close(probes.weights[0], weight, rtol=1e-8, atol=1e-8)


def test_views_are_drawn_for_each_sample_and_epoch():
    x, y = data(40, 6, 5, 2)
    views = torch.stack([x, x + 1, -x])
    shared = {"epochs": 4, "batch_size": 8, "optimizer": "sgd"}
    probes = fit_linear_probes(views, y, 5, learning_rate=0.1, seeds=[0, 7], **shared)
    for i, seed in enumerate((0, 7)):
        weight, _ = fit_plainly(views, y[i], 5, rate=0.1, seed=seed, **shared)
        torch.testing.assert_close(probes.weights[i], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rescale", [True, False])
def test_standardised_probes_apply_to_raw_features(rescale):
    x, y = data(dtype=torch.float64)
    x = x * torch.logspace(-3, 3, 12) + 5
    x[:, 4] = 3.7
    kept = [i for i in range(12) if i != 4]
    shared = {"epochs": 3, "batch_size": 16, "optimizer": "sgd", "rescale": rescale}
    raw = fit_linear_probes(x, y, 5, learning_rate=0.1, standardize=True, **shared)
    assert (raw.weights[:, :, 4] == 0).all()
    normal = (x - x.mean(0)) / x.std(0, correction=0)
    normal[:, 4] = 0
    for i in range(3):
        weight, bias = fit_plainly(normal, y[i], 5, rate=0.1, **shared)
        expected = normal[:, kept] @ weight[:, kept].T + bias
        torch.testing.assert_close(x @ raw.weights[i].T + raw.biases[i], expected, rtol=1e-6, atol=1e-6)


EVERY_SETTING = [
    {},
    {"optimizer": "sgd", "learning_rate": 0.1},
    {"optimizer": "sgd", "schedule": "step", "weight_decay": 0.3},
    {"weight_decay": [0.0, 1e-2, 0.3], "alpha": 6.0, "beta": 0.1},
    {"standardize": True, "weight_decay": 1e-2},
]


@pytest.mark.parametrize("setting", EVERY_SETTING)
@pytest.mark.parametrize("views", [1, 2])
def test_a_power_of_two_as_scale_of_the_features_changes_no_bit(setting, views):
    x, y = data()
    x = torch.stack([x, -x])[:views].squeeze(0)
    shared = {"epochs": 4, "batch_size": 16} | setting
    weights, biases = fit_linear_probes(x, y, 5, **shared)
    for scale in (2.0**-10, 0.5, 2.0**10):
        scaled = fit_linear_probes(scale * x, y, 5, **shared)
        assert torch.equal(scale * scaled.weights, weights)
        if "standardize" not in setting:
            assert torch.equal(scaled.biases, biases)
        torch.testing.assert_close(scaled.biases, biases, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-3, 1e3), setting=st.sampled_from(EVERY_SETTING), seed=st.integers(0, 99))
def test_the_scale_of_the_features_changes_no_logit(scale, setting, seed):
    x, y = data(seed=seed, dtype=torch.float64)
    shared = {"epochs": 4, "batch_size": 16, "seeds": seed} | setting
    first, second = (fit_linear_probes(c * x, y, 5, **shared) for c in (1.0, scale))
    for i in range(len(y)):
        logits = x @ first.weights[i].T + first.biases[i]
        torch.testing.assert_close(scale * x @ second.weights[i].T + second.biases[i], logits, rtol=1e-7, atol=1e-7)


def test_unscaled_probes_are_what_the_scale_makes_of_them_and_zeros_are_left_alone():
    x, y = data()
    first, second = (fit_linear_probes(c * x, y, 5, epochs=4, batch_size=16, rescale=False) for c in (1.0, 0.01))
    assert (first.weights - 0.01 * second.weights).abs().max() > 0.1
    weights, biases = fit_linear_probes(torch.zeros_like(x), y, 5, epochs=4, batch_size=16)
    assert weights.isfinite().all()
    assert biases.isfinite().all()


def real_features(dtype=torch.float32):
    digits = load_images("digits", "train")
    return digits.images[:, 0].flatten(1).to(dtype), digits.labels


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "sgd", "learning_rate": 0.4}])
def test_probes_of_features_of_any_scale_learn_what_a_converged_regression_does(optimizer):
    x, y = real_features()
    for features in (x, F.normalize(x), F.relu(x - x.mean(dim=0))):
        for scale in (1e-3, 1.0, 1e3):
            probes = fit_linear_probes(scale * features, y[None], 10, **optimizer)
            own, class_means = training_accuracy(probes, scale * features, y[None])
            assert own.item() > 0.985  # converged: 1.0
            assert own > class_means + 0.05


def test_an_untrained_probe_fits_its_labels_less_often_than_class_means():
    x, y = real_features()
    noisy = torch.stack([flip_labels(y, rate, 10, torch.Generator().manual_seed(0)) for rate in (0.0, 0.4, 0.8)])
    small = F.normalize(x) * 1e-2
    untrained = fit_linear_probes(small, noisy, 10, epochs=10, optimizer="sgd", rescale=False)
    own, class_means = training_accuracy(untrained, small, noisy)
    assert (own < class_means - 0.01).all()
    own, class_means = training_accuracy(fit_linear_probes(small, noisy, 10), small, noisy)
    assert (own > class_means).all()


def test_training_accuracies_equal_counting(monkeypatch):
    monkeypatch.setattr(probe, "CHUNK", 7)
    x, y = data(50, 6, 7, 4)
    y[3] %= 5  # two of the seven classes have no sample
    probes = probe.Probes(torch.randn(4, 7, 6), torch.randn(4, 7))
    own, class_means = training_accuracy(probes, x, y)
    for i in range(4):
        guesses = (x @ probes.weights[i].T + probes.biases[i]).argmax(dim=1)
        assert own[i].item() == pytest.approx((guesses == y[i]).double().mean().item())
        means = {c: x[y[i] == c].mean(dim=0) for c in y[i].unique().tolist()}
        nearest = [min(means, key=lambda c: (x[j] - means[c]).norm().item()) for j in range(50)]
        assert class_means[i].item() == pytest.approx(
            np.mean([n == int(t) for n, t in zip(nearest, y[i], strict=True)])
        )
    with pytest.raises(ValueError, match=r"label_sets has the shape \(3, 50\) .*; 4 probes of 6 features need"):
        training_accuracy(probes, x, y[:3])
    with pytest.raises(ValueError, match="label_sets has values from 0 to 7"):
        training_accuracy(probes, x, y + (y == 6).long())


def test_memory_mapped_and_half_precision_features(tmp_path):
    x, y = data()
    file = tmp_path / "features.npy"
    np.save(file, x.half().numpy())
    mapped = torch.from_numpy(np.load(file, mmap_mode="c"))
    shared = {"epochs": 2, "batch_size": 16}
    torch.testing.assert_close(
        fit_linear_probes(mapped, y, 5, **shared).weights, fit_linear_probes(x.half().float(), y, 5, **shared).weights
    )


def test_learns_what_is_separable_and_the_inputs_are_left_alone():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (600,), generator=generator)
    features = torch.randn(10, 20, generator=generator)[labels] + 0.3 * torch.randn(600, 20, generator=generator)
    features, before = features.requires_grad_(), features.clone()
    weights, biases = fit_linear_probes(features[:500], labels[None, :500], 10, epochs=20, batch_size=50)
    assert probe_accuracy(weights, biases, features[500:], labels[500:])[1].item() > 0.95
    assert not weights.requires_grad
    assert torch.equal(features, before)


def test_accuracy_equals_counting():
    x, y = data(50, 6, 7, 4)
    weights, biases = torch.randn(4, 7, 6), torch.randn(4, 7)
    result = probe_accuracy(weights, biases, x, y[0], topk=(1, 3))
    for i in range(4):
        ranks = [(x[j] @ weights[i].T + biases[i]).argsort(descending=True).tolist() for j in range(50)]
        for t in (1, 3):
            assert result[t][i].item() == pytest.approx(np.mean([y[0, j] in ranks[j][:t] for j in range(50)]))


def test_knn_equals_a_loop(monkeypatch):
    monkeypatch.setattr(probe, "CHUNK", 25)
    monkeypatch.setattr(probe, "NEIGHBOUR_CHUNK", 8)
    train, y = data(60, 5, 4, 1)
    validation, answers = data(30, 5, 4, 1, seed=1)
    hits = 0
    for row, answer in zip(validation, answers[0], strict=True):
        cosines = torch.stack([F.cosine_similarity(row, other, dim=0) for other in train])
        votes = [0.0] * 4
        for i in cosines.argsort(descending=True)[:7].tolist():
            votes[y[0, i]] += math.exp(cosines[i] / 0.1)
        hits += int(np.argmax(votes)) == answer
    assert knn_accuracy(train, y[0], validation, answers[0], k=7, temperature=0.1) == pytest.approx(hits / 30)
    assert knn_accuracy(train, y[0], train, y[0], k=5, temperature=1e-3) == 1.0  # exp(1 / t) would overflow


NAN = data()[0].clone()
NAN[7, 2] = float("nan")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"label_sets": data()[1].float()}, TypeError, "label_sets is torch.float32; it must be integer"),
        ({"label_sets": data()[1] + 1}, ValueError, r"label_sets has values from 1 to 5; they must be in \[0, 4\]"),
        ({"label_sets": data()[1] - 1}, ValueError, "label_sets has values from -1 to 3"),
        ({"label_sets": data()[1][0]}, ValueError, r"label_sets has the shape \(70,\) for 70 samples; .*\(k, 70\)"),
        ({"label_sets": data()[1][:, :60]}, ValueError, r"shape \(3, 60\) for 70 samples"),
        ({"num_classes": 1}, ValueError, "num_classes is 1"),
        ({"features": NAN}, ValueError, "features has NaN or infinite values, first in row 7"),
        ({"features": torch.stack([data()[0], NAN])}, ValueError, "first in row 7"),
        ({"features": data()[0].long()}, TypeError, "features is torch.int64"),
        ({"features": data()[0][0]}, ValueError, r"features has the shape \(12,\)"),
        ({"batch_size": 71}, ValueError, r"batch_size is 71 for 70 samples; it must be in \[1, 70\]"),
        ({"epochs": 0}, ValueError, "epochs is 0"),
        ({"optimizer": "adam"}, ValueError, "optimizer is 'adam'; it must be one of 'lars', 'sgd'"),
        ({"schedule": "linear"}, ValueError, "schedule is 'linear'"),
        ({"milestones": (30, 40)}, ValueError, r"milestones are \(30, 40\); they are shares of the epochs"),
        ({"learning_rate": [0.1, 0.2]}, ValueError, r"learning_rate has the shape \(2,\); give one number or 3"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay has -1; it must be at least 0"),
        ({"momentum": 1.0}, ValueError, "momentum is 1.0"),
        ({"seeds": [0, 1]}, ValueError, "seeds has 2 values for 3 rows"),
    ],
)
def test_bad_input(change, error, message):
    features, label_sets = data()
    with pytest.raises(error, match=message):
        fit_linear_probes(
            **{"features": features, "label_sets": label_sets, "num_classes": 5, "batch_size": 8, "epochs": 1} | change
        )


def test_bad_input_of_accuracies():
    x, y = data()
    weights, biases = torch.zeros(2, 5, 12), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"topk is \(1, 6\) for 5 classes"):
        probe_accuracy(weights, biases, x, y[0], topk=(1, 6))
    with pytest.raises(ValueError, match="features has 11 columns and the weights have 12"):
        probe_accuracy(weights, biases, x[:, 1:], y[0])
    with pytest.raises(ValueError, match=r"labels has values from 0 to 4; they must be in \[0, 3\]"):
        probe_accuracy(weights[:, :4], biases[:, :4], x, y[0], topk=(1,))
    with pytest.raises(ValueError, match="biases has the shape"):
        probe_accuracy(weights, biases[:1], x, y[0])
    with pytest.raises(ValueError, match=r"k is 71 for 70 training samples"):
        knn_accuracy(x, y[0], x, y[0], k=71)
    with pytest.raises(ValueError, match="temperature is 0"):
        knn_accuracy(x, y[0], x, y[0], temperature=0)
    with pytest.raises(ValueError, match="train has NaN"):
        knn_accuracy(NAN, y[0], x, y[0])


def test_probes_that_are_not_finite_have_no_accuracy():
    x, labels = torch.randn(20, 4), torch.arange(20) % 2
    weights, biases = torch.zeros(2, 2, 4), torch.zeros(2, 2)
    for broken in (weights, biases):
        broken[1, 1] = float("nan")
        for accuracy in (
            lambda: probe_accuracy(weights, biases, x, labels, topk=(1,)),
            lambda: training_accuracy(probe.Probes(weights, biases), x, labels.expand(2, -1)),
        ):
            with pytest.raises(ValueError, match="probe 1 has weights or biases that are NaN or infinite"):
                accuracy()
        broken.zero_()


@pytest.mark.parametrize("learning_rate", [3e38, [0.1, 3e38, 0.1]])
def test_a_probe_that_diverges_has_no_weights(learning_rate):
    torch.manual_seed(0)
    features, labels = torch.randn(200, 8), torch.randint(4, (3, 200))
    settings = {"epochs": 3, "batch_size": 50, "optimizer": "sgd", "learning_rate": learning_rate}
    with pytest.raises(FloatingPointError, match=r"the weights of \d of 3 probes, first \d, are NaN or infinite"):
        fit_linear_probes(features, labels, 4, **settings)
