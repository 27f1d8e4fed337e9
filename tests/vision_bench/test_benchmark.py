"""`python -m vision_bench`: one table of all probes from features made once, and what is refused before any work."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from odd_model import Odd
from timm.models import register_model
from torchvision.transforms.v2.functional import to_pil_image

from tests.conftest import results, rows
from vision_bench import benchmark, features, models, probe, sae, timm_models
from vision_bench.__main__ import main
from vision_bench.corruptions import InputNoise, flip_labels
from vision_bench.data import load_images, stratified_fraction
from vision_bench.metrics import semantic_consistency
from vision_bench.probe import fit_linear_probes, probe_accuracy
from vision_bench.runs import interval, paired_difference
from vision_bench.shifts import load_shifted, synthetic
from vision_bench.sweep import ACCURACY

QUICK = ["--limit", "300", "--seeds", "0", "1", "--probe_epochs", "20", "--sae_epochs", "3"]
CORRUPTIONS = ["--corruptions", "label_noise=0.4", "few_shots=0.5", "gaussian=0.5", "rotated"]
SMALL = ["--random_init", "small_conv"]
TESTS = ("clean", "gaussian 0.5", "rotated", "rotated + gaussian 0.5")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of an untrained NCL model, whose output has 16 dimensions."""
    folder = tmp_path_factory.mktemp("checkpoint") / "ncl"
    torch.manual_seed(0)
    config = models.ModelConfig("small_conv", projector_hidden=24, projector_out=16, non_negative="relu")
    model = models.ContrastiveModel(config)
    train = load_images("digits", "train")
    model(features.normalise(train.images[:256], train.mean, train.std))
    models.save(folder / "model.safetensors", model, {"config": {"epochs": 1, "seed": 0}, "data": "00ff"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint):
    """A finished benchmark of that model and of a random network."""
    path = tmp_path_factory.mktemp("benchmark") / "run"
    main([str(checkpoint), "--random_init", "small_conv", "--output_dir", str(path), *QUICK, *CORRUPTIONS])
    return path


def measured(folder, metric=ACCURACY, **arm):
    return rows(folder, metric, **arm)


def test_every_cell_has_a_row_and_kinds_of_features_differ(folder, checkpoint):
    names = {str(checkpoint): 16, "small_conv": 128}
    arm = ("model", "features", "few_shots", "label_noise", "test")
    cells = {(*(row["config"][k] for k in arm), row["seed"]) for row in measured(folder)}
    assert cells == {
        (model, kind, shots, rate, test, seed)
        for model in names
        for kind in ("raw", "unit", "sae")
        for shots in (1, 0.5)
        for rate in (0, 0.4)
        for test in TESTS
        for seed in (0, 1)
    }
    assert len(measured(folder)) == len(cells)
    for model, width in names.items():
        assert {row["config"]["dimensions"] for row in measured(folder, model=model)} == {width}
        assert len({row["value"] for row in measured(folder, "sparsity", model=model, test="clean")}) >= 2
        assert measured(folder, "sparsity", model=model, features="sae", test="clean")[0]["value"] == pytest.approx(
            1 - 1 / 8, abs=0.02
        )
        for metric in sae.QUALITY:
            assert len(measured(folder, metric, model=model)) == 1
        # no feature of these two is negative
        assert [row["config"]["features"] for row in measured(folder, benchmark.SAME, model=model)] == ["relu"]
        training = measured(folder, probe.TRAINING[0], model=model)
        assert len(training) == len(measured(folder, probe.TRAINING[1], model=model)) == 3 * 2 * 2 * 2
        assert {row["n"] for row in training} == {299, 149}
    assert {row["config"]["random_init"] for row in measured(folder, model="small_conv")} == {True}
    clean = measured(folder, model=str(checkpoint), features="raw", few_shots=1, label_noise=0, test="clean")
    assert clean[0]["value"] != clean[1]["value"]
    assert {row["n"] for row in measured(folder)} == {301}  # rounded in each class


@pytest.mark.parametrize(("kind", "shots", "test"), [("raw", 1, "clean"), ("unit", 0.5, "rotated + gaussian 0.5")])
def test_a_cell_equals_what_its_parts_give_one_by_one(folder, kind, shots, test):
    rate, seed = 0.4, 1
    torch.manual_seed(0)
    model = models.build_backbone(models.ModelConfig("small_conv"))
    train, clean = (load_images("digits", split) for split in ("train", "test"))
    train, clean = (
        images.subset(stratified_fraction(images.labels, 300 / len(images), torch.Generator().manual_seed(0)))
        for images in (train, clean)
    )
    images = synthetic("rotated", clean) if "rotated" in test else clean
    noise = InputNoise("gaussian", 0.5) if "gaussian" in test else None
    x = features.embed(model, train.images, train.mean, train.std)["backbone"]
    y = features.embed(model, images.images, images.mean, images.std, noise=noise)["backbone"]
    if kind == "unit":
        x, y = F.normalize(x), F.normalize(y)
    drawn = stratified_fraction(train.labels, shots, torch.Generator().manual_seed(seed))
    labels = flip_labels(train.labels[drawn], rate, 10, torch.Generator().manual_seed(seed))
    # 20 epochs of all 299 images are 20 steps, and so are 20 of the half: 149 images are less than one batch of 256
    fitted = fit_linear_probes(x[drawn], labels[None], 10, epochs=20, batch_size=min(256, len(drawn)), seeds=seed)
    arm = {"model": "small_conv", "features": kind, "test": test}
    (row,) = measured(folder, few_shots=shots, label_noise=rate, seed=seed, **arm)
    assert row["value"] == pytest.approx(probe_accuracy(*fitted, y, images.labels, topk=(1,))[1].item(), abs=1e-9)
    expected = probe.training_accuracy(fitted, x[drawn], labels[None])
    for metric, value in zip(probe.TRAINING, expected, strict=True):
        (row,) = measured(
            folder, metric, few_shots=shots, label_noise=rate, seed=seed, model="small_conv", features=kind
        )
        assert row["value"] == pytest.approx(value.item(), abs=1e-9)
    what = semantic_consistency(y, images.labels)
    for metric, value in (("semantic_consistency", what.mean), ("sparsity", what.sparsity)):
        assert measured(folder, metric, **arm)[0]["value"] == pytest.approx(value, abs=1e-6)


def test_probes_on_few_images_take_the_steps_of_all_up_to_whole_epochs(tmp_path, monkeypatch):
    steps, step = [], probe._Group.step

    def counted(group, x, *rest):
        steps.append(len(group.labels[0]))
        return step(group, x, *rest)

    monkeypatch.setattr(probe._Group, "step", counted)
    command = [*SMALL, "--features", "raw", "--seeds", "0", "--corruptions", "few_shots=0.6,0.1"]
    main([*command, "--output_dir", str(tmp_path)])
    # 1,437 images: 50 epochs of 5 steps; of about 862, 83 epochs of 3 steps; of about 144, 250 epochs of one step
    assert sorted(steps.count(images) for images in set(steps)) == [249, 250, 250]
    assert min(steps) < 150


def test_the_table_says_what_is_pretrained_on_what_and_agrees_with_the_rows(folder, checkpoint):
    text = (folder / "results.md").read_text()
    assert "- **ncl**: output at 8 x 8 pixels. Pretrained: self-supervised, NCL (relu), 1 epochs, seed 0, " in text
    assert "- **small_conv (random)**: backbone at 8 x 8 pixels. Pretrained: nothing: random initialisation" in text
    header = next(line for line in text.splitlines() if line.startswith("| model | features"))
    assert header.endswith("| semantic consistency | chance | sparsity | live |")
    with (folder / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    cells = json.loads((folder / "results.json").read_text())["table"]
    assert len(table) == len(cells) == 2 * 3 * 2 * 2 * 4
    for line, cell in zip(table, cells, strict=True):
        arm = {k: cell[k] for k in ("features", "few_shots", "label_noise", "test", "features_id")}
        values = [100 * row["value"] for row in measured(folder, **arm)]
        expected = interval(values)
        assert float(line["top1"]) == pytest.approx(expected.mean) == cell["top1"]
        assert cell["top1_half_width"] == pytest.approx(expected.half_width)
        base = measured(folder, **arm | {"features": "raw"})
        if cell["features"] != "raw":
            gain = paired_difference(measured(folder, **arm), base).scaled(100)
            assert (cell["gain_over_raw"], cell["gain_half_width"]) == pytest.approx(gain[:2])
            assert gain.text(1, sign=True) in text
        if cell["features"] == "sae":
            gain = paired_difference(measured(folder, **arm), measured(folder, **arm | {"features": "unit"})).scaled(
                100
            )
            assert (cell["gain_over_unit"], cell["gain_over_unit_half_width"]) == pytest.approx(gain[:2])
            assert gain.text(1, sign=True) in text
        training = {k: v for k, v in arm.items() if k != "test"}
        own, means = (
            interval([100 * row["value"] for row in measured(folder, m, **training)]) for m in probe.TRAINING
        )
        assert (cell["training_top1"], cell["training_half_width"]) == pytest.approx(own[:2])
        assert cell["class_means_training_top1"] == pytest.approx(means.mean)
        assert cell["trained"] == (own.mean >= means.mean)
        assert f"| {own.text(1)}" in text
        assert cell["chance_top1"] == pytest.approx(100 * 31 / 301)  # of the test images
        assert expected.text(1) in text
        assert (
            cell["semantic_consistency"]
            == measured(folder, "semantic_consistency", **{k: arm[k] for k in ("features", "test", "features_id")})[0][
                "value"
            ]
        )
    digits = load_images("digits", "train")
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (digits.mean, digits.std))
    assert text.count("No feature is negative: `relu` equals `raw` and was not measured again.\n") == 2
    assert "| relu |" not in text
    assert "| chance level | - | - | - | 10.3 | 10.3 | 10.3 | 10.3 | - |" in text
    assert text.count(f"  Images: size as in the data set; mean {mean}, standard deviation {std}.\n") == 2
    assert (folder / "robustness.png").stat().st_size > 5000
    assert (folder / "robustness.pdf").read_bytes().startswith(b"%PDF")


def test_the_table_says_whether_models_were_pretrained_on_the_images_here(tmp_path):
    train = load_images("digits", "train")
    part = train.subset(stratified_fraction(train.labels, 300 / len(train), torch.Generator().manual_seed(0)))
    expected = {
        "part": (part.fingerprint, " (the training images here)"),
        "whole": (train.fingerprint, " (all training images, of which those here are a part)"),
        "other": ("00ff", " (not the training images here, but some images may be in both)"),
    }
    for seed, (name, (fingerprint, _)) in enumerate(expected.items()):
        torch.manual_seed(seed)
        model = models.ContrastiveModel(models.ModelConfig("small_conv", projector_hidden=8, projector_out=4))
        models.save(tmp_path / name / "model.safetensors", model, {"data": fingerprint})
    command = [*(str(tmp_path / name) for name in expected), *SMALL, "--features", "raw", "--corruptions", *QUICK]
    main([*command, "--output_dir", str(tmp_path / "run")])
    text = (tmp_path / "run" / "results.md").read_text()
    for name, (fingerprint, words) in expected.items():
        (row,) = measured(tmp_path / "run", "sparsity", model=str(tmp_path / name))
        assert row["config"]["pretrained"].endswith(f"images of the fingerprint {fingerprint}{words}")
        assert f"fingerprint {fingerprint}{words}.\n" in text
    assert "Pretrained: nothing: random initialisation, seed 0.\n" in text


def no_pass(*_):
    raise AssertionError("a forward pass")


def test_a_second_run_with_the_same_features_makes_no_forward_pass(folder, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "outputs", no_pass)
    command = [str(checkpoint), "--output_dir", str(tmp_path / "b"), *QUICK, "--cache_dir", str(folder / "cache")]
    main([*command, "--corruptions", "label_noise=0.6", "gaussian=0.5"])
    assert {row["config"]["label_noise"] for row in measured(tmp_path / "b")} == {0, 0.6}
    arm = {"label_noise": 0, "few_shots": 1, "model": str(checkpoint)}
    for test in ("clean", "gaussian 0.5"):
        for kind in ("raw", "unit", "sae"):
            first, second = (measured(f, test=test, features=kind, **arm) for f in (folder, tmp_path / "b"))
            assert [row["value"] for row in first] == [row["value"] for row in second]
    with pytest.raises(SystemExit, match="a forward pass"):
        main([*command, "--corruptions", "gaussian=0.7", "--output_dir", str(tmp_path / "c")])


def test_too_many_active_latents_are_refused_also_where_features_are_cached(folder, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "outputs", no_pass)
    command = [str(checkpoint), "--output_dir", str(tmp_path / "run"), *QUICK, *CORRUPTIONS, "--sae_k", "17"]
    with pytest.raises(SystemExit, match=r"Error: sae_k is 17; .* has 16 features"):
        main([*command, "--cache_dir", str(folder / "cache")])
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_continues_to_the_same_rows(folder, checkpoint, tmp_path, monkeypatch, capsys):
    stopped = tmp_path / "run"
    command = [str(checkpoint), "--random_init", "small_conv", "--output_dir", str(stopped), *QUICK, *CORRUPTIONS]
    measure, calls = benchmark._measure, []

    def stopping(run, subject, kind, *rest):
        calls.append((subject.name, kind))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(run, subject, kind, *rest)

    monkeypatch.setattr(benchmark, "_measure", stopping)
    with pytest.raises(SystemExit, match=r"Stopped\. The same command with --resume continues."):
        main(command)
    assert 0 < len(results(stopped)) < len(results(folder))
    with pytest.raises(SystemExit, match=r"holds a benchmark already\. Give --resume to continue it"):
        main(command)
    main([*command, "--resume"])
    assert results(stopped) == results(folder)
    assert len(calls) == 3 + 6  # two of the eight pairs were there
    assert (stopped / "results.csv").read_text() == (folder / "results.csv").read_text()
    main([*command, "--resume"])
    assert len(calls) == 9
    with pytest.raises(SystemExit, match=r"of another configuration \(probe_epochs: 20 there, 5 now\)"):
        main([*command, "--resume", "--probe_epochs", "5"])


def test_rows_that_a_full_disk_cut_short_are_measured_anew_and_count_once(folder, checkpoint, tmp_path):
    cut = tmp_path / "run"
    shutil.copytree(folder, cut)
    lines = (cut / "results.jsonl").read_text().splitlines(keepends=True)
    (cut / "results.jsonl").write_text("".join(lines[:-5]) + lines[-5][:100])
    command = [str(checkpoint), "--random_init", "small_conv", "--output_dir", str(cut), *QUICK, *CORRUPTIONS]
    main([*command, "--resume"])
    assert len((cut / "results.jsonl").read_text().splitlines()) == len(lines)
    assert results(cut) == results(folder)
    assert (cut / "results.csv").read_text() == (folder / "results.csv").read_text()


def test_models_and_kinds_of_features_may_be_added(folder, checkpoint, tmp_path):
    grown = tmp_path / "run"
    shutil.copytree(folder, grown)
    before = results(grown)
    torch.manual_seed(0)
    model = models.ContrastiveModel(models.ModelConfig("test_resnet", projector_hidden=8, projector_out=4))
    timm_models.save(tmp_path / "resnet", model, load_images("digits", "test", image_size=32), {})
    main([str(tmp_path / "resnet"), "--features", "raw", "--output_dir", str(grown), *QUICK, *CORRUPTIONS, "--resume"])
    assert len(results(grown)) == len(before) + 4 * (2 * 2 * 2 + 4) + 2 * (2 * 2 * 2)
    assert measured(grown, model=str(tmp_path / "resnet"))[0]["config"]["image_size"] == [32, 32]
    assert set(before) < set(results(grown))


@register_model
def odd_width_by_batch(pretrained, **kwargs):
    return Odd(lambda x: torch.ones(len(x), len(x)))


@register_model
def odd_width_by_image(pretrained, **kwargs):
    return Odd(lambda x: x.flatten(1)[:, : 40 if x.mean() > 0.5 else 30])


@register_model
def odd_negative(pretrained, **kwargs):
    return Odd(lambda x: -x.flatten(1).abs() - 1)


@register_model
def odd_pixels(pretrained, **kwargs):
    return Odd(lambda x: x.flatten(1))


@register_model
def odd_large_pixels(pretrained, **kwargs):
    return Odd(lambda x: 2.0**9 * x.flatten(1))


@register_model
def odd_silent(pretrained, **kwargs):
    """Nothing for images of some brightness."""
    return Odd(lambda x: x.flatten(1) * (x.mean(dim=(1, 2, 3)) > -0.05)[:, None])


def test_the_scale_of_a_models_features_decides_nothing(tmp_path):
    for name in ("odd_pixels", "odd_large_pixels"):
        command = ["--random_init", name, "--output_dir", str(tmp_path / name), "--corruptions", "label_noise=0.4"]
        main([*command, "few_shots=0.5", *QUICK])
    metrics = (ACCURACY, *probe.TRAINING, *sae.QUALITY)
    for metric in metrics:
        first, second = (
            {
                (*(row["config"].get(k) for k in ("features", "few_shots", "label_noise")), row["seed"]): row["value"]
                for row in measured(tmp_path / name, metric)
            }
            for name in ("odd_pixels", "odd_large_pixels")
        )
        assert first == second
        if metric in (ACCURACY, *probe.TRAINING):
            assert {key[0] for key in first} == {"raw", "unit", "relu", "sae"}
    clean = measured(tmp_path / "odd_large_pixels", features="raw", label_noise=0, few_shots=1)
    assert min(row["value"] for row in clean) > 0.5


def test_probes_that_are_not_trained_and_autoencoders_that_explain_little_are_pointed_out(tmp_path):
    command = ["--random_init", "odd_pixels", "--features", "raw", "sae", "--corruptions", "--limit", "300"]
    main([*command, "--output_dir", str(tmp_path / "few"), "--probe_epochs", "1", "--sae_epochs", "1", "--sae_k", "1"])
    text = (tmp_path / "few" / "results.md").read_text()
    own, means = (measured(tmp_path / "few", metric, features="raw") for metric in probe.TRAINING)
    own, means = (100 * sum(row["value"] for row in rows) / 5 for rows in (own, means))
    assert own < means
    warning = (
        f"odd_pixels (random), raw, 100 % of the images, 0 % wrong labels ({own:.1f} %, class means {means:.1f} %)"
    )
    assert f"\n- {warning}\n" in text.split("**Warning: not trained.**")[1]
    assert " (not trained) |" in text
    (row,) = measured(tmp_path / "few", "sae_fvu")
    assert row["value"] > 0.5
    assert f"**Warning: variance unexplained above 0.5:** odd_pixels (random) ({row['value']:.2f})." in text
    trained = json.loads((tmp_path / "few" / "results.json").read_text())["table"][0]["trained"]
    assert trained is False
    main([*command, "--output_dir", str(tmp_path / "many")])
    assert measured(tmp_path / "many", "sae_fvu")[0]["value"] < 0.5
    assert "not trained" not in (tmp_path / "many" / "results.md").read_text()
    assert "Warning" not in (tmp_path / "many" / "results.md").read_text()


def test_rows_of_zeros_among_the_features_do_not_end_the_command(tmp_path):
    main(["--random_init", "odd_silent", "--features", "raw", "unit", "relu", "--output_dir", str(tmp_path), *QUICK])
    test = load_images("digits", "test")
    silent = features.normalise(test.images, test.mean, test.std).mean(dim=(1, 2, 3)) <= -0.05
    assert 0.2 < silent.double().mean() < 0.8
    assert {row["config"]["features"] for row in measured(tmp_path)} == {"raw", "unit", "relu"}


def test_relu_that_equals_raw_is_measured_only_without_raw(tmp_path, monkeypatch):
    command = [*SMALL, "--output_dir", str(tmp_path), "--corruptions", *QUICK]
    main([*command, "--features", "relu"])
    alone = measured(tmp_path, features="relu")
    assert len(alone) == 2
    assert "| relu | 100 %" in (tmp_path / "results.md").read_text()
    main([*command, "--features", "raw", "relu", "--resume"])
    assert [row["value"] for row in measured(tmp_path, features="raw")] == [row["value"] for row in alone]
    assert measured(tmp_path, features="relu") == alone
    other = [*command, "--output_dir", str(tmp_path / "b"), "--cache_dir", str(tmp_path / "cache")]
    main([*other, "--features", "relu", "raw"])
    assert len(measured(tmp_path / "b", benchmark.SAME)) == 1
    assert not measured(tmp_path / "b", features="relu")
    main([*other, "--features", "relu", "--resume"])
    assert [row["value"] for row in measured(tmp_path / "b", features="relu")] == [row["value"] for row in alone]
    assert "| relu | 100 %" in (tmp_path / "b" / "results.md").read_text()
    monkeypatch.setattr(benchmark, "_measure", no_pass)
    main(
        [
            *command,
            "--output_dir",
            str(tmp_path / "b"),
            "--cache_dir",
            str(tmp_path / "cache"),
            "--resume",
            "--features",
            "raw",
            "relu",
        ]
    )


def test_a_single_seed_has_no_interval_and_the_table_says_so_also_with_settings_of_a_file(tmp_path):
    settings = (
        "random_init: [small_conv]\nfeatures: [raw]\nlimit: 300\nprobe_epochs: 20\nseeds: [0, 1]\ncorruptions: []\n"
    )
    (tmp_path / "settings.yaml").write_text(settings)
    output = tmp_path / "run"
    main(["--config", str(tmp_path / "settings.yaml"), "--seeds", "3", "--output_dir", str(output)])
    assert {row["config"]["test"] for row in measured(output)} == {"clean"}
    text = (output / "results.md").read_text()
    assert "One seed (3) of probes, wrong labels and drawn images, so there are no intervals" in text
    assert "±" not in text


def test_a_folder_of_probes_that_the_scale_decided_on_is_refused(folder, checkpoint, tmp_path):
    old = tmp_path / "run"
    shutil.copytree(folder, old)
    described = json.loads((old / "config.json").read_text())
    del described["config"]["probe_norm"]
    (old / "config.json").write_text(json.dumps(described))
    with pytest.raises(SystemExit, match=r"of another configuration \(probe_norm"):
        main([str(checkpoint), *SMALL, "--output_dir", str(old), *QUICK, *CORRUPTIONS, "--resume"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "models is empty; name at least one"),
        (["resnet19"], "has no model 'resnet19'; near it: resnet18"),
        (["resnet18"], "the weights of resnet18 cannot be had .* Offline: fetch them"),
        (["--resume", "resnet19"], "has no model 'resnet19'"),  # a switch takes no value
        (["small_conv"], "no pretrained weights of 'small_conv'.*--random_init small_conv"),
        ([*SMALL, "--corruptions", "gausian=1"], "unknown; there are .* Do you mean gaussian?"),
        ([*SMALL, "--corruptions", "folder=/nowhere"], "'/nowhere', which is neither digits"),
        (
            [*SMALL, "--corruptions", "few_shots=0.001"],
            "few_shots is 0.001 of 1437 images: .* would be left with none",
        ),
        (
            ["--random_init", "small_conv", "--features", "pca"],
            r"features has \['pca'\]; it must be of raw, unit, relu, sae",
        ),
        ([*SMALL, "--layer", "output"], "layer is 'output'; small_conv has backbone"),
        ([*SMALL, "resnet19", "--dataset", "mnist1"], "has no model 'resnet19'"),  # models before images are read
        ([*SMALL, "--layer", "output", "--dataset", "mnist1"], "layer is 'output'; small_conv has backbone"),
        ([*SMALL, "--cache_dir", __file__], "cache_dir is .*test_benchmark.py, which is a file; name a folder"),
        ([*SMALL, "--layer", "head"], "layer is 'head'; it must be one of backbone"),
        ([*SMALL, "--sae_k", "129"], "sae_k is 129; small_conv has 128 features"),
        ([*SMALL, "--limit", "3"], "limit is 3 of 1437 images: .* would be left with none"),
        ([*SMALL, "--seeds", "0", "0"], r"seeds is \[0, 0\]; each may stand there once"),
        ([*SMALL, "--seeds", "-1"], r"seeds is \[-1\]; it takes integers of at least 0"),
        ([*SMALL, "--probe_epochs", "0"], "probe_epochs is 0; it must be at least 1"),
        ([*SMALL, "--dataset", "mnist1"], "name is 'mnist1', which is neither digits"),
        (
            ["--random_init", "vit_tiny_patch16_224", "--image_size", "32"],
            "vit_tiny_patch16_224 gives no features of train images of 32 x 32 pixels.*224",
        ),
        (["--random_init", "odd_width_by_batch"], "odd_width_by_batch gives no features .* here"),
        (
            ["--random_init", "odd_width_by_image", "--corruptions", "inverted"],
            "different sizes: {'train': 30, 'clean'",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=f"Error: .*{message}"):
        main([*arguments, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_one_model_under_two_names_is_refused(checkpoint, tmp_path):
    names = [str(checkpoint), str(checkpoint / "model.safetensors")]
    with pytest.raises(SystemExit, match="one and the same model"):
        main([*names, "--output_dir", str(tmp_path / "run"), *QUICK])


def photographs(folder, names):
    """A labelled folder of bright images of 20 pixels, four of each class."""
    for index, name in enumerate(names):
        for i in range(4):
            path = folder / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            generator = torch.Generator().manual_seed(10 * index + i)
            image = torch.randint(128, 256, (3, 20, 20), generator=generator, dtype=torch.uint8)
            to_pil_image(image).save(path)
    return folder


def test_images_of_a_single_class_are_refused_before_any_work(tmp_path):
    photographs(tmp_path / "data" / "train", ["cat"])
    with pytest.raises(SystemExit, match=r"data has images of one class, cat; a probe needs at least two"):
        main(
            [
                *SMALL,
                "--dataset",
                str(tmp_path / "data"),
                "--test_fraction",
                "0.5",
                "--output_dir",
                str(tmp_path / "run"),
            ]
        )
    assert not (tmp_path / "run").exists()


def test_a_folder_of_other_images_is_matched_by_the_names_of_its_classes(tmp_path):
    place = photographs(tmp_path / "bright", [*map(str, range(10)), "ten"])
    command = [*SMALL, "--features", "raw", *QUICK]
    main([*command, "--corruptions", f"folder={place}", "--output_dir", str(tmp_path / "run")])
    assert {row["n"] for row in measured(tmp_path / "run", test=f"folder {place}")} == {40}
    train = load_images("digits", "train")
    other = load_shifted(place, train)
    torch.manual_seed(0)
    model = models.build_backbone(models.ModelConfig("small_conv"))
    z = features.embed(model, other.images, train.mean, train.std)["backbone"]
    (row,) = measured(tmp_path / "run", "semantic_consistency", test=f"folder {place}")
    assert row["value"] == pytest.approx(semantic_consistency(z, other.labels).mean, abs=1e-6)
    few = photographs(tmp_path / "few", ["3", "seven"])
    with pytest.raises(SystemExit, match=r"9 of the 10 classes .* are left without .* classes 3, seven"):
        main([*command, "--corruptions", f"folder={few}", "--output_dir", str(tmp_path / "new")])


def test_a_folder_of_something_else_is_refused(tmp_path, folder):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "config.json").write_text(json.dumps({"recipe": "pretrain", "config": {}}))
    command = ["--random_init", "small_conv", *QUICK]
    with pytest.raises(SystemExit, match="holds results of the recipe 'pretrain'"):
        main([*command, "--output_dir", str(tmp_path / "recipe"), "--resume"])
    (tmp_path / "rows").mkdir()
    shutil.copy(folder / "results.jsonl", tmp_path / "rows")
    with pytest.raises(SystemExit, match=r"has a results.jsonl without the config.json it was made with"):
        main([*command, "--output_dir", str(tmp_path / "rows")])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="is a file; name a folder"):
        main([*command, "--output_dir", str(tmp_path / "file")])


def test_features_that_are_never_active_have_no_consistency_and_the_json_is_strict(tmp_path):
    command = ["--random_init", "odd_negative", "--features", "raw", "relu", "--corruptions", *QUICK]
    main([*command, "--output_dir", str(tmp_path)])

    def refuse(constant):
        raise AssertionError(constant)

    raw, relu = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)["table"]
    assert raw["live_dimensions"] == 3 * 8 * 8
    assert (relu["semantic_consistency"], relu["sparsity"], relu["live_dimensions"]) == (None, 1, 0)
    assert "| - | - | 1.000 | 0 of 192 |" in (tmp_path / "results.md").read_text()


HOLD = """
import sys, time, pathlib, vision_bench.runs as runs
with runs.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3)
"""


@pytest.mark.slow
def test_a_run_waits_for_an_autoencoder_that_another_one_trains_in_the_same_cache(tmp_path):
    command = [*SMALL, "--features", "sae", "--corruptions", *QUICK, "--cache_dir", str(tmp_path / "cache")]
    main([*command, "--output_dir", str(tmp_path / "first")])
    (checkpoint,) = (tmp_path / "cache").glob("sae-*/checkpoint.safetensors")
    checkpoint.unlink()
    script = [sys.executable, "-c", HOLD, str(checkpoint.parent)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        main([*command, "--output_dir", str(tmp_path / "second")])
    assert results(tmp_path / "second") == results(tmp_path / "first")


@pytest.mark.slow
@pytest.mark.skipif("MONO_TEST_DATA" not in os.environ, reason="MONO_TEST_DATA, real images, is not set")
def test_real_images_of_a_hundred_classes(tmp_path):
    root = str(Path(os.environ["MONO_TEST_DATA"]) / "cifar100")
    command = ["--random_init", "small_conv", "--dataset", "cifar100", "--data_root", root, "--limit", "1000"]
    command += ["--seeds", "0", "1", "--features", "raw", "sae", "--corruptions", "gaussian=0.5", "--standardize"]
    main([*command, "--output_dir", str(tmp_path)])
    clean = measured(tmp_path, features="raw", test="clean")
    assert [row["n"] for row in clean] == [1000, 1000]
    assert min(row["value"] for row in clean) > 0.02  # chance is 0.01
    assert "random initialisation" in (tmp_path / "results.md").read_text()
