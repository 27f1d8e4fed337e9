"""The recipe of Fig. 2(c) at a size of seconds: synthetic shifts, folders and arrays, and what it refuses."""

import json
import shutil

import numpy as np
import probing
import pytest
import torch
from ood_probing import main
from PIL import Image

from tests.recipes.conftest import ACCURACY, ARMS, contents, keep_rows, rows
from tests.recipes.conftest import CONTROLLED as SMALL
from tests.recipes.conftest import value as value_of
from vision_bench import models
from vision_bench.data import load_images
from vision_bench.probe import fit_linear_probes
from vision_bench.shifts import synthetic


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pretrained_models):
    path = tmp_path_factory.mktemp("ood")
    shutil.copytree(pretrained_models, path / "models")
    main(["--output_dir", str(path), *SMALL])
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The digits' test images as sets of other formats: class folders, CIFAR-C arrays, a pair of arrays."""
    root = tmp_path_factory.mktemp("sets")
    test = load_images("digits", "test")
    pixels = test.images.permute(0, 2, 3, 1).numpy()
    for i, label in enumerate(test.labels.tolist()):
        place = root / "folders" / f"digit-{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(place / f"{i}.png")
    (root / "map.yaml").write_text("drawn:\n" + "".join(f"  digit-{i}: {i}\n" for i in range(10)))

    (root / "digits-c").mkdir()
    generator = np.random.default_rng(0)
    arrays = {"gaussian_noise": 25, "impulse_noise": 60, "spatter": 200}  # the last is not of the benchmark
    for name, strength in arrays.items():
        noisy = [pixels + strength * s / 5 * generator.standard_normal(pixels.shape) for s in range(1, 6)]
        np.save(root / "digits-c" / f"{name}.npy", np.concatenate(noisy).clip(0, 255).astype(np.uint8))
    np.save(root / "digits-c" / "labels.npy", np.tile(test.labels.numpy(), 5))
    np.save(root / "again_data.npy", pixels)
    np.save(root / "again_labels.npy", test.labels.numpy())
    return root


@pytest.fixture(scope="module")
def arrays(folder, sets, tmp_path_factory):
    """A run on sets that are read, with the models of the first run."""
    path = tmp_path_factory.mktemp("arrays")
    shifts = [f"drawn={sets / 'folders'}", f"digits_c={sets / 'digits-c'}", f"again={sets / 'again_data.npy'}"]
    more = ["--class_map", str(sets / "map.yaml"), "--checkpoints", str(folder / "models")]
    main(["--output_dir", str(path), *SMALL, "--shifts", *shifts, *more])
    return path, [*SMALL, "--shifts", *shifts, *more]


def value(folder, **arm):
    return value_of(folder, ACCURACY, **arm)


def test_every_shift_has_a_row_of_every_arm(folder):
    found = {(r["config"]["features"], r["config"]["shift"], r["seed"]) for r in rows(folder, ACCURACY)}
    shifts = ("none", "rotated", "inverted", "thinned")
    assert found == {(arm, shift, seed) for arm in ARMS for shift in shifts for seed in (0, 1)}
    for arm in ("poly", "sae", "ncl"):
        values = [value(folder, features=arm, shift=shift, seed=0) for shift in shifts]
        assert values[0] > values[2] + 0.1  # negatives are another world
        assert len(set(values)) > 2
    assert len(rows(folder, "semantic_consistency")) == len(ARMS) * 2
    table = (folder / "results.md").read_text()
    assert "| features | none | rotated | inverted | thinned | semantic consistency |" in table
    assert "Synthetic shifts, made from the test images: rotated, inverted, thinned." in table
    assert "| sae over random_relu |" in table
    assert (folder / "figure_2c.png").stat().st_size > 5000
    assert (folder / "figure_2c.pdf").read_bytes().startswith(b"%PDF")


def test_a_row_equals_the_shift_probed_by_hand(folder):
    train, test = load_images("digits", "train"), load_images("digits", "test")
    model, _ = models.load(folder / "models" / "ncl-0" / "model.safetensors")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (test.mean, test.std))
    with torch.no_grad():
        clean, turned = (
            model.eval()((images.images / 255 - mean) / std).output for images in (train, synthetic("rotated", test))
        )
    weights, biases = fit_linear_probes(clean, train.labels[None], 10, epochs=4, seeds=0)
    right = (turned @ weights[0].T + biases[0]).argmax(dim=1) == test.labels
    found = value(folder, features="ncl", shift="rotated", seed=0)
    assert found == pytest.approx(right.double().mean().item(), abs=1.1 / 360)


def test_the_chance_level_is_that_of_the_images_of_a_shift(folder):
    test = load_images("digits", "test")
    level = torch.bincount(test.labels).max().item() / len(test)
    levels = {row["config"].get("shift"): row["value"] for row in rows(folder, "chance_top1")}
    assert levels == dict.fromkeys([None, "none", "rotated", "inverted", "thinned"], level)
    assert "| chance level | 10.3 |" in (folder / "results.md").read_text()


def test_sets_that_are_read_give_what_the_same_images_give_elsewhere(folder, arrays):
    for arm in ("poly", "sae", "ncl"):
        for seed in (0, 1):
            clean = value(folder, features=arm, shift="none", seed=seed)
            for shift in ("none", "drawn", "again"):  # all of them the test images
                assert value(arrays[0], features=arm, shift=shift, seed=seed) == pytest.approx(clean, abs=1.1 / 360)


def test_all_corruptions_and_severities_and_the_mean_corruption_error(arrays):
    found = {
        (r["config"]["corruption"], r["config"]["severity"], r["seed"])
        for r in rows(arrays[0], ACCURACY, shift="digits_c", features="poly")
    }
    names = ("gaussian_noise", "impulse_noise", "spatter")
    assert found == {(name, severity, seed) for name in names for severity in range(1, 6) for seed in (0, 1)}

    def errors(features, corruption):
        arm = {"features": features, "corruption": corruption}
        return [
            np.mean([100 - 100 * r["value"] for r in rows(arrays[0], ACCURACY, **arm, seed=seed)]) for seed in (0, 1)
        ]

    both = np.array([errors("ncl", name) for name in names[:2]])
    poly = np.array([errors("poly", name) for name in names[:2]])
    table = (arrays[0] / "results.md").read_text()
    section = table.split("## digits_c: error in %")[1]
    cells = [
        cell.strip() for cell in next(line for line in section.splitlines() if line.startswith("| ncl |")).split("|")
    ]
    assert cells[2].split(" ")[0] == f"{both.mean():.1f}"
    assert cells[3].split(" ")[0] == f"{100 * (both / poly).mean():.1f}"
    assert cells[4].split(" ")[0] == f"{both[0].mean():.1f}"
    accuracy = next(line for line in table.splitlines() if line.startswith("| ncl |")).split("|")
    assert accuracy[4].strip().split(" ")[0] == f"{100 - both.mean():.1f}"
    assert (arrays[0] / "severities_digits_c.png").stat().st_size > 5000
    assert "digits-c" not in (arrays[0] / "results.jsonl").read_text()  # names and fingerprints, no paths
    facts = json.loads((arrays[0] / "config.json").read_text())["facts"]
    assert facts["corruptions"] == {"digits_c": list(names)}


def test_the_notes_have_the_weight_decay_of_each_column_of_the_tables(folder, arrays):
    for path in (folder, arrays[0]):
        _, decays = (path / "results.md").read_text().split("column after column of all tables: ")
        assert len(decays.split(");")[0].split(", ")) == 4  # also where corruptions and severities have their own


def test_resume_reprint_and_refusal(arrays, sets, tmp_path, monkeypatch, capsys):
    folder, settings = arrays
    whole = contents(folder)
    keep_rows(folder, lambda lines: [line for line in lines if '"severity": 4' not in line])
    main(["--output_dir", str(folder), *settings])
    assert contents(folder) == whole
    capsys.readouterr()
    monkeypatch.setattr(probing, "frozen_models", lambda *rest: pytest.fail("nothing is left to measure"))
    main(["--output_dir", str(folder), *settings])
    assert "mean corruption error" in capsys.readouterr().out
    np.save(sets / "again_labels.npy", np.load(sets / "again_labels.npy")[::-1])
    try:
        with pytest.raises(ValueError, match="another configuration"):  # the same name, other images
            main(["--output_dir", str(folder), *settings])
    finally:
        np.save(sets / "again_labels.npy", np.load(sets / "again_labels.npy")[::-1])


@pytest.mark.parametrize(
    ("shifts", "class_map", "message"),
    [
        (["mirrored"], None, r"shifts has 'mirrored'; each is NAME=PLACE, .* one of rotated, inverted, thinned"),
        (["drawn="], None, "shifts has 'drawn='"),
        (["a/b={root}/folders"], None, "shifts has 'a/b="),
        (["drawn={root}/folders@nowhere"], None, "split is 'nowhere'"),
        (["rotated", "rotated"], None, "shifts takes different names"),
        (["none={root}/folders"], None, "shifts takes different names other than 'none'"),
        (["drawn={root}/folders"], None, r"10 of the 10 classes .* 0, 1, 2.*It has the classes digit-0, digit-1"),
        (["drawn={root}/folders"], "drawn: {{digit-1: 1, digit-2: 2}}", "8 of the 10 classes .* without images"),
        (["drawn={root}/folders"], "drawn: {{digit-x: 1}}", "class_map has the classes digit-x"),
        (["rotated"], "rotated: {{a: b}}", "has the shifts rotated; with classes to be matched there are none"),
        (["c={root}/digits-c"], "c: {{a: b}}", "arrays have no names of classes"),
        (["drawn={root}/folders"], "[1]", "must have, for the name of a shift, class: class"),
        (["drawn={root}/folders"], "{{", "cannot be read"),
        (["drawn=no-such-set"], None, "no-such-set"),
        (["drawn={root}/absent_data.npy"], None, "is not a plain array"),
    ],
)
def test_bad_shifts_are_named_before_training(shifts, class_map, message, sets, tmp_path):
    arguments = ["--shifts", *(shift.format(root=sets) for shift in shifts)]
    if class_map is not None:
        (tmp_path / "map.yaml").write_text(class_map.format(root=sets))
        arguments += ["--class_map", str(tmp_path / "map.yaml")]
    with pytest.raises(ValueError, match=message):
        main(["--output_dir", str(tmp_path / "bad"), *SMALL, *arguments])
    assert not (tmp_path / "bad").exists()
