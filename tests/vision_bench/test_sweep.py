"""The sweep of probes against probes one by one, its cells, and what is measured again."""

import itertools

import pytest
import torch

from vision_bench import kinds, sweep
from vision_bench.corruptions import InputNoise, flip_labels, stratified_fraction
from vision_bench.label_noise import HumanLabels
from vision_bench.metrics import MEASURED, semantic_consistency
from vision_bench.probe import TRAINING, fit_linear_probes, probe_accuracy, training_accuracy
from vision_bench.runs import Cell, Run
from vision_bench.sweep import ACCURACY, Arm, Grid, Training

PROBE = {"epochs": 3, "batch_size": 32, "learning_rate": 0.2}
NOISY = sweep.Test(noise=InputNoise("gaussian", 0.5, 1), seeds=(1,))
TRAININGS = [
    Training(label_noise=rate, fraction=fraction, alpha=alpha, beta=beta, weight_decay=decay, seed=seed)
    for fraction, (alpha, beta), decay, seed, rate in itertools.product(
        (1.0, 0.5), ((1.0, 0.0), (2.0, 0.5)), (0.0, 0.1), (0, 1), (0.0, 0.4)
    )
]


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return {kinds.BASE: torch.randn(n, 5, generator=generator) + 2 * torch.eye(5)[labels]}, labels


TRAIN, LABELS = data(120, 0)
SETS = {sweep.Test(): data(45, 1), NOISY: data(30, 2)}


def grid(trainings=TRAININGS, **more):
    return Grid(
        {"raw": Arm("raw", trainings), "unit": Arm("unit", trainings[:2])},
        list(SETS),
        lambda t: {"rate": t.label_noise, "share": t.fraction, "loss": [t.alpha, t.beta], "decay": t.weight_decay},
        lambda test: {"noise": test.noise.kind if test.noise else "none"},
        **more,
    )


def measure(whole, **more):
    frozen = kinds.Frozen(TRAIN)
    batches = sweep.sweep(whole, frozen, LABELS, 3, SETS.__getitem__, device="cpu", **PROBE, **more)
    return [measured for batch in batches for measured in batch]


def key(cell):
    return cell.metric, cell.seed, str(sorted(cell.arm.items()))


def by_hand(training, features, labels):
    """One probe, trained alone, with the accuracies on its own labels."""
    drawn = stratified_fraction(LABELS, training.fraction, torch.Generator().manual_seed(training.seed))
    x, right = features[drawn], LABELS[drawn]
    noisy = flip_labels(right, training.label_noise, 3, torch.Generator().manual_seed(training.seed))[None]
    # three epochs of 120 images are 9 steps of 32, and so many are 9 epochs of 60
    settings = PROBE | {"epochs": 3 if len(x) == 120 else 9}
    losses = {"alpha": training.alpha, "beta": training.beta, "weight_decay": training.weight_decay}
    probes = fit_linear_probes(x, noisy, 3, **settings, **losses, seeds=training.seed)
    own = [values.item() for values in training_accuracy(probes, x, noisy)]
    return {test: probe_accuracy(*probes, *pair, topk=(1,))[1].item() for test, pair in labels.items()}, own


def test_every_cell_is_what_a_probe_trained_alone_gives():
    whole = grid()
    found = {key(cell): (value, n) for cell, value, n, _ in measure(whole)}
    cells = [cell for name in whole.arms for cell in whole.cells(name)]
    assert found.keys() == {key(cell) for cell in cells}
    assert len(found) == len(cells)
    for training in TRAININGS:
        pairs = {test: (outputs[kinds.BASE], labels) for test, (outputs, labels) in SETS.items()}
        accuracies, own = by_hand(training, TRAIN[kinds.BASE], pairs)
        for cell, value in zip(whole.training_cells("raw", training), own, strict=True):
            assert found[key(cell)] == (pytest.approx(value, abs=1.1 / 60), 120 if training.fraction == 1 else 60)
        for test, value in accuracies.items():
            if test.seeds is None or training.seed in test.seeds:
                cell = whole.accuracy_cell("raw", training, test)
                assert found[key(cell)] == (pytest.approx(value, abs=1.1 / 30), len(SETS[test][1]))
    features, labels = SETS[sweep.Test()]
    for metric, value in semantic_consistency(features[kinds.BASE], labels).summary.items():
        assert found[key(Cell(metric, None, {"features": "raw"}))] == (value, 45)


def test_the_cells_of_a_grid():
    whole = grid(model_seed=7)
    accuracies = [cell for cell in whole.cells("raw") if cell.metric == ACCURACY]
    # the noise of seed 1 tests the probes of seed 1 alone
    assert len(accuracies) == len(TRAININGS) + len(TRAININGS) // 2
    assert {cell.seed for cell in accuracies if cell.arm["noise"] == "gaussian"} == {1}
    assert sum(cell.metric in TRAINING for cell in whole.cells("raw")) == 2 * len(TRAININGS)
    described = [cell for cell in whole.cells("unit") if cell.metric in MEASURED]
    assert described == [Cell(metric, 7, {"features": "unit"}) for metric in MEASURED]
    every = grid(all_described=True)
    assert sum(cell.metric in MEASURED for cell in every.cells("unit")) == 2 * len(MEASURED)


def test_only_arms_and_tests_that_lack_a_cell_are_measured(monkeypatch):
    whole, fitted, fit = grid(), [], sweep.fit
    monkeypatch.setattr(sweep, "fit", lambda features, *rest, **more: fitted.append(1) or fit(features, *rest, **more))
    first = {key(measured.cell): measured.value for measured in measure(whole)}
    assert len(fitted) == 2
    lost = whole.accuracy_cell("unit", TRAININGS[0], sweep.Test())
    again = measure(whole, lacking=lambda cells: [cell for cell in cells if cell == lost])
    assert len(fitted) == 3
    assert [measured.cell for measured in again] == [lost]
    assert again[0].value == first[key(lost)]
    assert measure(whole, lacking=lambda cells: []) == []
    assert len(fitted) == 3


def test_a_study_adds_cells_and_takes_the_place_of_those_of_the_grid():
    whole = Grid({"raw": Arm("raw", TRAININGS[:1])}, [sweep.Test()], lambda training: {}, lambda test: {})
    cell = whole.accuracy_cell("raw", TRAININGS[0], sweep.Test())

    def study(name, fitted, features, labels):
        assert name == "raw"
        assert torch.equal(features, SETS[sweep.Test()][0][kinds.BASE])
        assert fitted.trainings == TRAININGS[:1]
        own = sweep.Measured(Cell("largest", 0, {"features": "raw"}), features.max().item(), 45, {"at": "here"})
        return [own, sweep.Measured(cell, 0.25, 45)]

    found = {measured.cell.metric: measured for measured in measure(whole, study=study)}
    assert found[ACCURACY].value == 0.25
    assert found["largest"].details == {"at": "here"}
    assert len(found) == 1 + 1 + len(TRAINING) + len(MEASURED)


def test_rows_have_the_arm_and_the_details_in_their_config(tmp_path):
    run = Run(tmp_path, "my_recipe", {"seeds": [0]})
    measured = sweep.Measured(Cell("largest", 0, {"features": "raw"}), 1.5, 45, {"at": "here"})
    (batch,) = sweep.rows(run, [[measured]], torch.device("cpu"), model="m")
    run.add_rows(batch)
    (row,) = run.find("largest", seed=0, features="raw", model="m")
    assert (row["value"], row["n"], row["config"]["at"]) == (1.5, 45, "here")
    assert run.lacking([measured.cell]) == []


def test_people_label_all_images_and_a_share_of_them_takes_its_part():
    people = HumanLabels(torch.tensor([[30, 10, 0], [0, 40, 0], [8, 8, 24]]))
    noises = [Training("human", fraction, seed=seed) for seed in (0, 1) for fraction in (1.0, 0.5)]
    fitted = sweep.fit(
        TRAIN[kinds.BASE], LABELS, 3, [*noises, Training(0.4)], device="cpu", human_labels=people, **PROBE
    )
    for training, own, details in zip(fitted.trainings, fitted.own, fitted.details, strict=True):
        if training.label_noise == 0.4:
            assert details == {}
            continue
        given = people.draw(LABELS, torch.Generator().manual_seed(training.seed))
        part = torch.arange(120)
        if training.fraction < 1:
            part = stratified_fraction(LABELS, 0.5, torch.Generator().manual_seed(training.seed))
        assert details == {"wrong_labels": pytest.approx((given[part] != LABELS[part]).double().mean().item())}
        settings = PROBE | {"epochs": 3 if len(part) == 120 else 9}
        probes = fit_linear_probes(TRAIN[kinds.BASE][part], given[part][None], 3, **settings, seeds=training.seed)
        expected = training_accuracy(probes, TRAIN[kinds.BASE][part], given[part][None])
        assert own == ([pytest.approx(value.item(), abs=1.1 / 60) for value in expected], len(part))
