"""`python -m vision_bench`: the rows and the table of all probes, from features made once."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import rows, rows_of
from tests.vision_bench.conftest import QUICK, SMALL, measured, photographs
from vision_bench import benchmark, features, models, probe, sae
from vision_bench.__main__ import main
from vision_bench.corruptions import InputNoise, flip_labels
from vision_bench.data import load_images, stratified_fraction
from vision_bench.metrics import effective_rank, semantic_consistency
from vision_bench.probe import fit_linear_probes, probe_accuracy
from vision_bench.runs import interval, paired_difference
from vision_bench.shifts import load_shifted, synthetic
from vision_bench.sweep import ACCURACY

TESTS = ("clean", "gaussian 0.5", "rotated", "rotated + gaussian 0.5")


def test_every_cell_has_a_row_and_kinds_of_features_differ(benchmark_run, ncl_checkpoint):
    names = {str(ncl_checkpoint): 16, "small_conv": 128}
    arm = ("model", "features", "few_shots", "label_noise", "test")
    cells = {(*(row["config"][k] for k in arm), row["seed"]) for row in measured(benchmark_run)}
    assert cells == {
        (model, kind, shots, rate, test, seed)
        for model in names
        for kind in ("raw", "unit", "sae")
        for shots in (1, 0.5)
        for rate in (0, 0.4)
        for test in TESTS
        for seed in (0, 1)
    }
    assert len(measured(benchmark_run)) == len(cells)
    for model, width in names.items():
        assert {row["config"]["dimensions"] for row in measured(benchmark_run, model=model)} == {width}
        assert len({row["value"] for row in measured(benchmark_run, "sparsity", model=model, test="clean")}) >= 2
        sparsity = measured(benchmark_run, "sparsity", model=model, features="sae", test="clean")[0]["value"]
        assert sparsity == pytest.approx(1 - 1 / 8, abs=0.02)
        for metric in sae.QUALITY:
            assert len(measured(benchmark_run, metric, model=model)) == 1
        assert len(measured(benchmark_run, "effective_rank", model=model)) == 3
        # no feature of these two is negative
        assert [row["config"]["features"] for row in measured(benchmark_run, benchmark.SAME, model=model)] == ["relu"]
        training = measured(benchmark_run, probe.TRAINING[0], model=model)
        assert len(training) == len(measured(benchmark_run, probe.TRAINING[1], model=model)) == 3 * 2 * 2 * 2
        assert {row["n"] for row in training} == {299, 149}
    assert {row["config"]["random_init"] for row in measured(benchmark_run, model="small_conv")} == {True}
    arm = {"features": "raw", "few_shots": 1, "label_noise": 0, "test": "clean"}
    clean = measured(benchmark_run, model=str(ncl_checkpoint), **arm)
    assert clean[0]["value"] != clean[1]["value"]
    assert {row["n"] for row in measured(benchmark_run)} == {301}  # rounded in each class


@pytest.mark.parametrize(("kind", "shots", "test"), [("raw", 1, "clean"), ("unit", 0.5, "rotated + gaussian 0.5")])
def test_a_cell_equals_what_its_parts_give_one_by_one(benchmark_run, kind, shots, test):
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
    (row,) = measured(benchmark_run, few_shots=shots, label_noise=rate, seed=seed, **arm)
    assert row["value"] == pytest.approx(probe_accuracy(*fitted, y, images.labels, topk=(1,))[1].item(), abs=1e-9)
    expected = probe.training_accuracy(fitted, x[drawn], labels[None])
    for metric, value in zip(probe.TRAINING, expected, strict=True):
        (row,) = measured(
            benchmark_run, metric, few_shots=shots, label_noise=rate, seed=seed, model="small_conv", features=kind
        )
        assert row["value"] == pytest.approx(value.item(), abs=1e-9)
    what = semantic_consistency(y, images.labels)
    for metric, value in (("semantic_consistency", what.mean), ("sparsity", what.sparsity)):
        assert measured(benchmark_run, metric, **arm)[0]["value"] == pytest.approx(value, abs=1e-6)
    if test == "clean":
        (row,) = measured(benchmark_run, "effective_rank", model="small_conv", features=kind)
        assert row["value"] == pytest.approx(effective_rank(y), abs=1e-6)


def test_with_fit_each_seed_what_is_trained_or_drawn_follows_from_the_seed_of_the_probe(tmp_path):
    command = [*SMALL, "--limit", "100", "--probe_epochs", "2", "--sae_epochs", "1", "--head_epochs", "1"]
    command += ["--head_views", "2", "--corruptions", "gaussian=0.5"]
    command += ["--features", "raw", "pca", "sae", "csr", "raw_random_basis"]
    for name, seeds in (("both", ["0", "3"]), ("only", ["3"]), ("fixed", ["0", "3"])):
        own = [] if name == "fixed" else ["--fit_each_seed"]
        main([*command, *own, "--seeds", *seeds, "--output_dir", str(tmp_path / name)])
    for kind in ("raw", "pca", "sae", "csr", "raw_random_basis"):
        both, only, fixed = (measured(tmp_path / n, features=kind, test="clean") for n in ("both", "only", "fixed"))
        assert [row["seed"] for row in both] == [0, 3]
        assert both[1]["value"] == only[0]["value"]
        assert both[0]["value"] == fixed[0]["value"]
        arm = {"features": kind, "test": "clean"}
        one_for_all = measured(tmp_path / "both", "semantic_consistency", **arm)
        assert [row["seed"] for row in one_for_all] == ([None] if kind in ("raw", "pca") else [0, 3])
    for kind in ("sae", "csr"):
        unexplained = [row["value"] for row in measured(tmp_path / "both", "sae_fvu", features=kind)]
        assert len(set(unexplained)) == 2
        assert unexplained[0] == measured(tmp_path / "fixed", "sae_fvu", features=kind)[0]["value"]
        mean = sum(unexplained) / 2
        line = next(x for x in (tmp_path / "both" / "results.md").read_text().splitlines() if f"{mean:.3g} |" in x)
        assert line.startswith("| small_conv (random)" + (", csr" if kind == "csr" else " "))
    train, test = (load_images("digits", split) for split in ("train", "test"))
    train, test = (
        images.subset(stratified_fraction(images.labels, 100 / len(images), torch.Generator().manual_seed(0)))
        for images in (train, test)
    )
    torch.manual_seed(0)
    model = models.build_backbone(models.ModelConfig("small_conv"))
    x, y = (F.normalize(features.embed(model, s.images, s.mean, s.std)["backbone"]) for s in (train, test))
    fitted = sae.fit(x, 128, 16, epochs=1, batch_size=len(x), seed=3).autoencoder
    (row,) = measured(tmp_path / "only", "sae_fvu", features="sae")
    assert row["value"] == pytest.approx(sae.evaluate(fitted, y).fvu, rel=1e-4)
    words = "each has autoencoders, heads and random bases of its own"
    assert words in (tmp_path / "both" / "results.md").read_text()
    assert words not in (tmp_path / "fixed" / "results.md").read_text()


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


def test_the_table_says_what_is_pretrained_on_what_and_agrees_with_the_rows(benchmark_run):
    all_rows = rows(benchmark_run)
    text = (benchmark_run / "results.md").read_text()
    assert "- **ncl**: output at 8 x 8 pixels. Pretrained: self-supervised, NCL (relu), 1 epochs, seed 0, " in text
    assert "- **small_conv (random)**: backbone at 8 x 8 pixels. Pretrained: nothing: random initialisation" in text
    header = next(line for line in text.splitlines() if line.startswith("| model | features"))
    assert header.endswith("| semantic consistency | chance | sparsity | live | effective rank |")
    with (benchmark_run / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    cells = json.loads((benchmark_run / "results.json").read_text())["table"]
    assert len(table) == len(cells) == 2 * 3 * 2 * 2 * 4
    for line, cell in zip(table, cells, strict=True):
        arm = {k: cell[k] for k in ("features", "few_shots", "label_noise", "test", "features_id")}
        values = [100 * row["value"] for row in rows_of(all_rows, ACCURACY, **arm)]
        expected = interval(values)
        assert float(line["top1"]) == pytest.approx(expected.mean) == cell["top1"]
        assert cell["top1_half_width"] == pytest.approx(expected.half_width)
        base = rows_of(all_rows, ACCURACY, **arm | {"features": "raw"})
        if cell["features"] != "raw":
            gain = paired_difference(rows_of(all_rows, ACCURACY, **arm), base).scaled(100)
            assert (cell["gain_over_raw"], cell["gain_half_width"]) == pytest.approx(gain[:2])
            assert gain.text(1, sign=True) in text
        if cell["features"] == "sae":
            unit = rows_of(all_rows, ACCURACY, **arm | {"features": "unit"})
            gain = paired_difference(rows_of(all_rows, ACCURACY, **arm), unit).scaled(100)
            assert (cell["gain_over_unit"], cell["gain_over_unit_half_width"]) == pytest.approx(gain[:2])
            assert gain.text(1, sign=True) in text
        training = {k: v for k, v in arm.items() if k != "test"}
        own, means = (
            interval([100 * row["value"] for row in rows_of(all_rows, m, **training)]) for m in probe.TRAINING
        )
        assert (cell["training_top1"], cell["training_half_width"]) == pytest.approx(own[:2])
        assert cell["class_means_training_top1"] == pytest.approx(means.mean)
        assert cell["trained"] == (own.mean >= means.mean)
        assert f"| {own.text(1)}" in text
        assert cell["chance_top1"] == pytest.approx(100 * 31 / 301)  # of the test images
        assert expected.text(1) in text
        of_features = {k: arm[k] for k in ("features", "test", "features_id")}
        (row,) = rows_of(all_rows, "semantic_consistency", **of_features)
        assert cell["semantic_consistency"] == row["value"]
    digits = load_images("digits", "train")
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (digits.mean, digits.std))
    assert text.count("No feature is negative: `relu` equals `raw` and was not measured again.\n") == 2
    assert "| relu |" not in text
    assert "| chance level | - | - | - | 10.3 | 10.3 | 10.3 | 10.3 | - |" in text
    assert text.count(f"  Images: size as in the data set; mean {mean}, standard deviation {std}.\n") == 2
    assert (benchmark_run / "robustness.png").stat().st_size > 5000
    assert (benchmark_run / "robustness.pdf").read_bytes().startswith(b"%PDF")


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


def test_features_that_are_never_active_have_no_consistency_and_the_json_is_strict(tmp_path):
    command = ["--random_init", "odd_negative", "--features", "raw", "relu", "--corruptions", *QUICK]
    main([*command, "--output_dir", str(tmp_path)])

    def refuse(constant):
        raise AssertionError(constant)

    raw, relu = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)["table"]
    assert raw["live_dimensions"] == 3 * 8 * 8
    assert (relu["semantic_consistency"], relu["sparsity"], relu["live_dimensions"]) == (None, 1, 0)
    assert "| - | - | 1.000 | 0 of 192 |" in (tmp_path / "results.md").read_text()


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
