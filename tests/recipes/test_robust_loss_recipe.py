"""The recipe of Fig. 6 at a size of seconds: rows against a probe of autograd, continuation and what it refuses."""

import shutil

import probing
import pytest
import torch
from robust_loss import main

from tests.recipes.conftest import ACCURACY, ARMS, CONTROLLED, contents, keep_rows, rows
from tests.recipes.conftest import value as value_of
from vision_bench import learners, models
from vision_bench.corruptions import flip_labels
from vision_bench.data import load_images
from vision_bench.features import embed
from vision_bench.losses import symmetric_cross_entropy
from vision_bench.probe import order_stream

SMALL = [*CONTROLLED, "--noise_rates", "0", "0.6", "--alpha", "2.0", "--beta", "1.5"]
# Plain SGD, which a few lines of autograd repeat.
SMALL += ["--probe_optimizer", "sgd", "--probe_schedule", "constant", "--probe_learning_rate", "0.05"]
LOSSES = ("ce", "sce", "ce_scaled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pretrained_models):
    path = tmp_path_factory.mktemp("robust_loss")
    shutil.copytree(pretrained_models, path / "models")
    main(["--output_dir", str(path), *SMALL])
    return path


def value(folder, **arm):
    return value_of(folder, ACCURACY, **arm)


def test_every_cell_has_a_row_and_the_losses_differ(folder):
    found = {
        (*(r["config"][k] for k in ("features", "loss", "noise_rate")), r["seed"]) for r in rows(folder, ACCURACY)
    }
    assert found == {(arm, loss, r, s) for arm in ARMS for loss in LOSSES for r in (0, 0.6) for s in (0, 1)}
    assert len(rows(folder, ACCURACY)) == (len(ARMS) + 1) * 3 * 2 * 2
    for arm in ("poly", "ncl"):
        cells = [{"noise_rate": rate, "seed": seed} for rate in (0, 0.6) for seed in (0, 1)]
        by_loss = {tuple(value(folder, features=arm, loss=loss, **cell) for cell in cells) for loss in LOSSES}
        assert len(by_loss) == 3
    for metric in ("semantic_consistency", "chance_consistency", "sparsity", "live_dimensions"):
        assert len(rows(folder, metric)) == len(ARMS) * 2


@pytest.mark.parametrize("loss", LOSSES)
def test_a_row_equals_a_probe_trained_with_the_loss_by_autograd(folder, loss):
    train, test = load_images("digits", "train"), load_images("digits", "test")
    model, _ = models.load(folder / "models" / "ncl-1" / "model.safetensors")
    x, validation = (embed(model, split.images, split.mean, split.std)["output"] for split in (train, test))
    scale = 8 / x.square().sum(dim=1).mean().sqrt()
    x, validation = scale * x, scale * validation
    labels = flip_labels(train.labels, 0.6, 10, torch.Generator().manual_seed(1))
    start = torch.Generator().manual_seed(1)
    probe = torch.nn.Linear(32, 10)
    with torch.no_grad():
        probe.weight.copy_((2 * torch.rand(10, 32, generator=start) - 1) / 32**0.5)
        probe.bias.copy_((2 * torch.rand(10, generator=start) - 1) / 32**0.5)
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(order_stream(1))
    alpha, beta = {"ce": (1.0, 0.0), "sce": (2.0, 1.5), "ce_scaled": (2.0, 0.0)}[loss]
    for _ in range(4):
        indices = torch.randperm(len(x), generator=order)
        torch.randint(1, (len(x),), generator=order)  # the view of each sample
        for batch in indices.split(256)[: len(x) // 256]:
            optimizer.zero_grad()
            symmetric_cross_entropy(probe(x[batch]), labels[batch], alpha, beta).backward()
            optimizer.step()
    right = (probe(validation).argmax(dim=1) == test.labels).double().mean().item()
    found = value(folder, features="ncl", loss=loss, noise_rate=0.6, seed=1)
    assert found == pytest.approx(right, abs=2.1 / 360)


def test_the_table_has_gains_what_the_loss_adds_and_their_interaction(folder):
    table = (folder / "results.md").read_text()
    accuracy = {
        (arm, loss): [100 * value(folder, features=arm, loss=loss, noise_rate=0.6, seed=seed) for seed in (0, 1)]
        for arm in ("poly", "ncl")
        for loss in LOSSES
    }

    def mean(values):
        return f"{sum(values) / len(values):+.1f}"

    def last(line_start, section):
        text = table.split(section)[1]
        return (
            next(line for line in text.splitlines() if line.startswith(line_start))
            .split("|")[-2]
            .split("±")[0]
            .strip()
        )

    adds = {
        arm: [a - b for a, b in zip(accuracy[arm, "sce"], accuracy[arm, "ce"], strict=True)] for arm in ("poly", "ncl")
    }
    assert last("| ncl: sce over ce |", "## Points that the loss adds") == mean(adds["ncl"])
    scaled = [a - b for a, b in zip(accuracy["ncl", "sce"], accuracy["ncl", "ce_scaled"], strict=True)]
    assert last("| ncl: sce over ce_scaled |", "## Points that the loss adds") == mean(scaled)
    more = [a - b for a, b in zip(adds["ncl"], adds["poly"], strict=True)]
    assert last("| ncl |", "## What sce adds to ce, less") == mean(more)
    gains = [a - b for a, b in zip(accuracy["ncl", "sce"], accuracy["poly", "sce"], strict=True)]
    assert last(
        "| ncl |",
        "## sce: symmetric cross entropy\n\n"
        + table.split("## sce: symmetric cross entropy\n\n")[1].split("Points gained over poly with the same loss")[0],
    ) == mean(gains)
    assert "alpha 2, beta 1.5" in table
    for name in ("figure_6", "all_rates"):
        assert (folder / f"{name}.png").stat().st_size > 5000
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_a_stopped_run_continues_to_the_same_rows_in_one_pass_for_each_kind(folder, tmp_path, monkeypatch):
    stopped = tmp_path / "stopped"
    shutil.copytree(folder, stopped)
    keep_rows(stopped, lambda lines: lines[: len(lines) // 3])
    passes, fit = [], learners.fit_linear_probes

    def counted(*arguments, **settings):
        passes.append(arguments[1].shape[0])
        return fit(*arguments, **settings)

    monkeypatch.setattr(learners, "fit_linear_probes", counted)
    main(["--output_dir", str(stopped), *SMALL])
    assert set(passes) == {3 * 2, 3 * 2 * 2}  # losses x rates (x decays) in each pass

    assert contents(stopped) == contents(folder)


def test_same_settings_reprint_and_others_are_refused(folder, monkeypatch, capsys):
    before = (folder / "results.jsonl").read_bytes()
    monkeypatch.setattr(probing, "frozen_models", lambda *rest: pytest.fail("nothing is left to measure"))
    main(["--output_dir", str(folder), *SMALL])
    assert "Points that the loss adds" in capsys.readouterr().out
    assert (folder / "results.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="another configuration"):
        main(["--output_dir", str(folder), *SMALL, "--beta", "2"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "0"], "alpha is 0.0; it must be above 0"),
        (["--beta", "-1"], "beta is -1.0; it must be above 0"),
        (["--beta", "nan"], "beta is nan"),
        (["--noise_rates", "90"], "noise_rates has 90.0; each must be in"),
        (["--noise_rates", "0.1", "0.1"], "noise_rates takes different numbers"),
        (["--sae_k", "99"], "sae_k is 99 for 32 latents"),
    ],
)
def test_bad_settings_are_named_before_training(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["--output_dir", str(tmp_path / "bad"), *SMALL, *arguments])
    assert not (tmp_path / "bad").exists()
