"""The recipe of Table 1 at a size of seconds: rows, table, pictures, continuation and what it refuses."""

import json
import shutil

import probing
import pytest
import tables
import torch
from label_noise_probing import main
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.recipes.conftest import ACCURACY, ARMS, CONTROLLED, contents, keep_rows, rows
from vision_bench import kinds, models
from vision_bench.corruptions import flip_labels
from vision_bench.data import load_images
from vision_bench.features import embed
from vision_bench.probe import TRAINING, fit_linear_probes, probe_accuracy, training_accuracy
from vision_bench.runs import interval
from vision_bench.sparse_probes import fit_k_sparse_probes

SMALL = [*CONTROLLED, "--noise_rates", "0", "0.6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("label_noise")
    main(["--output_dir", str(path), *SMALL])
    return path


def values(folder, metric=ACCURACY, **arm):
    return [row["value"] for row in rows(folder, metric, **arm)]


def test_every_cell_has_a_row_and_the_arms_differ(folder):
    found = {(r["config"]["features"], r["config"]["noise_rate"], r["seed"]) for r in rows(folder, ACCURACY)}
    assert found == {(arm, rate, seed) for arm in ARMS for rate in (0, 0.6) for seed in (0, 1)}
    assert len(rows(folder, ACCURACY)) == (len(ARMS) + 1) * 4  # two weight decays of poly_decay
    assert all(0 <= row["value"] <= 1 and row["n"] == 360 for row in rows(folder, ACCURACY))
    clean = {arm: tuple(values(folder, features=arm, noise_rate=0)) for arm in ARMS - {"poly_decay"}}
    assert len(set(clean.values())) == len(clean)
    assert min(values(folder, features="poly", noise_rate=0)) > 0.3
    assert values(folder, features="poly", noise_rate=0, seed=0) != values(
        folder, features="poly", noise_rate=0, seed=1
    )


def test_what_the_features_are_stands_beside_their_accuracy(folder):
    for metric in ("semantic_consistency", "chance_consistency", "sparsity", "live_dimensions"):
        assert {(r["config"]["features"], r["seed"]) for r in rows(folder, metric)} == {
            (arm, seed) for arm in ARMS for seed in (0, 1)
        }
    assert values(folder, "sparsity", features="sae") == pytest.approx([1 - 4 / 32] * 2, abs=0.01)
    assert values(folder, "sparsity", features="random_mask") == pytest.approx([1 - 4 / 32] * 2, abs=1e-3)
    assert max(values(folder, "sparsity", features="poly")) < 0.01
    assert min(values(folder, "sparsity", features="ncl")) > 0.2
    consistency = {arm: min(values(folder, "semantic_consistency", features=arm)) for arm in ARMS}
    assert consistency["sae"] > consistency["random_mask"]
    assert values(folder, "semantic_consistency", features="poly_decay") == values(
        folder, "semantic_consistency", features="poly"
    )
    table = (folder / "results.md").read_text()
    assert "| poly, the paper, CIFAR-100 | 54.5 | 49.5 | - |" in table
    assert "| ncl, the paper, ImageNet-100 | -0.1 | +5.7 |" in table
    assert "| sae over random_relu |" in table
    assert "no signal is left at a rate of 90 %" in table


def test_what_probes_fit_of_their_own_labels_and_chance_stand_in_the_table(folder):
    train, test = load_images("digits", "train"), load_images("digits", "test")
    for metric in TRAINING:
        cells = {(r["config"]["features"], r["config"]["noise_rate"], r["seed"]) for r in rows(folder, metric)}
        assert cells == {(arm, rate, seed) for arm in ARMS for rate in (0, 0.6) for seed in (0, 1)}
        assert {row["n"] for row in rows(folder, metric)} == {1437}
    model, _ = models.load(folder / "models" / "ncl-1" / "model.safetensors")
    x = embed(model, train.images, train.mean, train.std, ["output"])["output"]
    noisy = flip_labels(train.labels, 0.6, 10, torch.Generator().manual_seed(1))[None]
    expected = training_accuracy(fit_linear_probes(x, noisy, 10, epochs=4, seeds=1), x, noisy)
    for metric, value in zip(TRAINING, expected, strict=True):
        assert values(folder, metric, features="ncl", noise_rate=0.6, seed=1) == pytest.approx(
            [value.item()], abs=2e-3
        )
    text = (folder / "results.md").read_text()
    table = text.split("on their own training labels, wrong ones included, %.")[1].split("## Points")[0]
    own, means = (interval([100 * v for v in values(folder, m, features="sae", noise_rate=0.6)]) for m in TRAINING)
    trained = "" if own.mean >= means.mean else " (not trained)"
    assert f" {own.text(1)}{trained} |" in next(line for line in table.splitlines() if line.startswith("| sae |"))
    assert ("**Warning: not trained.**" in table) == ("(not trained)" in table)
    (chance,) = values(folder, "chance_top1")
    assert chance == 37 / 360 == torch.bincount(test.labels).max().item() / len(test)
    assert "| chance level | 10.3 | 10.3 | - | - | - | - |" in text


def test_the_papers_protocol_can_be_run_and_its_rows_are_not_mixed_with_others(folder, tmp_path):
    command = ["--output_dir", str(tmp_path), *SMALL, "--checkpoints", str(folder / "models")]
    main([*command, "--rescale", "false"])
    train, test = load_images("digits", "train"), load_images("digits", "test")
    model, _ = models.load(folder / "models" / "ncl-1" / "model.safetensors")
    x, y = (embed(model, s.images, s.mean, s.std, ["output"])["output"] for s in (train, test))
    probes = fit_linear_probes(x, train.labels[None], 10, epochs=4, seeds=1, rescale=False)
    expected = probe_accuracy(*probes, y, test.labels, topk=(1,))[1].item()
    assert values(tmp_path, features="ncl", noise_rate=0, seed=1) == pytest.approx([expected], abs=1.1 / 360)
    assert values(tmp_path, features="poly_unit") != values(folder, features="poly_unit")
    assert "decides how far these probes come (rescale: false)" in (tmp_path / "results.md").read_text()
    assert "(rescale: false)" not in (folder / "results.md").read_text()
    with pytest.raises(ValueError, match=r"another configuration \(rescale: False there, True now\)"):
        main(command)
    described = json.loads((tmp_path / "config.json").read_text())
    del described["config"]["rescale"]  # as the folders were before there was the setting
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="another configuration"):
        main(command)


def test_a_seed_that_diverged_is_marked_and_the_others_are_measured(folder, tmp_path):
    shutil.copytree(folder / "models", tmp_path / "models")
    path = tmp_path / "models" / "ncl-1" / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[0] = torch.nan
    save_file(tensors, path, metadata)
    command = ["--output_dir", str(tmp_path / "out"), *SMALL, "--checkpoints", str(tmp_path / "models")]
    main(command)
    (mark,) = rows(tmp_path / "out", "diverged")
    assert mark["seed"] == 1
    assert "finite" in mark["config"]["reason"]
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert {row["seed"] for row in map(json.loads, lines) if row["metric"] != "diverged"} == {0, None}
    assert values(tmp_path / "out", seed=0) == values(folder, seed=0)
    text = (tmp_path / "out" / "results.md").read_text()
    assert f"**Diverged:** seeds 1 ({mark['config']['reason'].rstrip('.')})." in text
    assert "nan" not in text.split("**Diverged:**")[0].lower()
    shutil.rmtree(tmp_path / "models")  # neither seed is made again
    main(command)
    assert (tmp_path / "out" / "results.jsonl").read_text().splitlines() == lines


def test_where_every_seed_diverges_there_is_no_table(tmp_path):
    command = ["--output_dir", str(tmp_path), *SMALL, "--optimizer", "sgd", "--learning_rate", "1e30"]
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="every seed diverged, so that there is nothing to report: "):
            main(command)
    assert [row["seed"] for row in rows(tmp_path, "diverged")] == [0, 1]
    assert not (tmp_path / "results.md").exists()


def test_poor_autoencoders_are_pointed_out(folder, tmp_path):
    assert "variance unexplained" not in (folder / "results.md").read_text() or max(values(folder, "sae_fvu")) > 0.5
    command = ["--output_dir", str(tmp_path), *SMALL, "--checkpoints", str(folder / "models")]
    main([*command, "--sae_k", "1", "--sae_epochs", "1"])
    assert min(values(tmp_path, "sae_fvu")) > 0.5
    assert "**Warning: variance unexplained above 0.5:** sae (" in (tmp_path / "results.md").read_text()


def test_pictures_are_left(folder):
    for name in ("figure_1b", "all_rates", "gains_beside_paper"):
        assert (folder / f"{name}.png").stat().st_size > 5000
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_a_stopped_run_continues_to_the_same_rows(folder, tmp_path, monkeypatch):
    stopped = tmp_path / "stopped"
    shutil.copytree(folder, stopped)
    keep_rows(stopped, lambda lines: lines[: len(lines) // 3])
    shutil.rmtree(stopped / "models" / "ncl-1")  # and a model is trained anew
    shutil.rmtree(stopped / "features" / "ncl-1-train")
    shutil.rmtree(stopped / "sae" / "1")
    main(["--output_dir", str(stopped), *SMALL])

    assert contents(stopped) == contents(folder)


def test_same_settings_reprint_and_others_are_refused(folder, monkeypatch, capsys):
    before = (folder / "results.jsonl").read_bytes()
    monkeypatch.setattr(probing, "frozen_models", lambda *rest: pytest.fail("nothing is left to measure"))
    main(["--output_dir", str(folder), *SMALL])
    assert "Points gained over poly" in capsys.readouterr().out
    assert (folder / "results.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="another configuration"):
        main(["--output_dir", str(folder), *SMALL, "--sae_k", "5"])


def test_shared_pretraining_probes_one_model_with_every_seed(folder, tmp_path, monkeypatch):
    main(["--output_dir", str(tmp_path), *SMALL, "--shared_pretraining", "--checkpoints", str(folder / "models")])
    assert not (tmp_path / "models").exists()
    assert values(tmp_path, seed=0, features="poly") == values(folder, seed=0, features="poly")
    assert values(tmp_path, seed=1, features="poly") != values(folder, seed=1, features="poly")
    assert [row["seed"] for row in rows(tmp_path, "sparsity")] == [None] * len(ARMS)
    before = (tmp_path / "results.jsonl").read_bytes()
    monkeypatch.setattr(probing, "frozen_models", lambda *rest: pytest.fail("nothing is left to measure"))
    main(["--output_dir", str(tmp_path), *SMALL, "--shared_pretraining"])
    assert (tmp_path / "results.jsonl").read_bytes() == before
    tables.main(["--runs", str(tmp_path), "--output_dir", str(tmp_path.parent / "tables"), "--only", "figure_1b"])
    table = (tmp_path.parent / "tables" / "label_noise_probing" / "results.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith("| ncl |"))
    assert ["±" in cell for cell in line.split("|")[2:-1]] == [True, True, False, False, False, False]


def test_a_kind_of_features_that_is_added_to_the_table_gets_rows_and_lines(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(kinds.KINDS, "squared", kinds.of_base(lambda features, frozen: features.square()))
    command = ["--output_dir", str(tmp_path), *SMALL, "--checkpoints", str(folder / "models")]
    main([*command, "--arms", "poly", "ncl", "squared", "--learners", "probe", "k_sparse_1"])
    assert {row["config"]["features"] for row in rows(tmp_path, ACCURACY)} == {"poly", "ncl", "squared"}
    assert values(tmp_path, features="ncl") == values(folder, features="ncl")
    train, test = load_images("digits", "train"), load_images("digits", "test")
    model, _ = models.load(folder / "models" / "simclr-1" / "model.safetensors")
    x, y = (embed(model, s.images, s.mean, s.std, ["output"])["output"].square() for s in (train, test))
    labels = flip_labels(train.labels, 0.6, 10, torch.Generator().manual_seed(1))
    expected = probe_accuracy(*fit_linear_probes(x, labels[None], 10, epochs=4, seeds=1), y, test.labels, topk=(1,))[1]
    found = values(tmp_path, features="squared", noise_rate=0.6, seed=1)
    assert found == pytest.approx(expected.tolist(), abs=1.1 / 360)
    table = (tmp_path / "results.md").read_text()
    assert (
        table.count("| squared |") == 5
    )  # accuracies, own training labels, gains; those of k_sparse_1 but its labels
    assert "## k_sparse_1 (linear, 1 dimension for each class; not equivariant under rotations" in table
    chosen = values(tmp_path, "k_sparse_1_top1", features="squared", noise_rate=0.6, seed=1)
    sparse = fit_k_sparse_probes(x, labels[None], 10, 1)
    assert chosen == pytest.approx(probe_accuracy(*sparse, y, test.labels, topk=(1,))[1].tolist(), abs=1.1 / 360)
    assert "| poly_decay |" not in table
    for name in ("figure_1b", "all_rates", "gains_beside_paper"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise_rates", "0", "90"], "noise_rates has 90.0; each must be in"),
        (["--noise_rates", "0.1", "0.1"], "noise_rates takes different numbers"),
        (["--decays", "-1"], "decays is"),
        (["--learners", "tree"], "learners is .'tree'.; the tables need probe, give it too"),
        (["--arms", "poly", "csr"], "arms has csr, a head of a frozen model, which python -m vision_bench trains"),
        (["--decays", "0.1", "0.1"], "decays is .0.1, 0.1.; it takes different weight decays"),
        (["--decays", "nan"], "decays is .nan.; JSON has no NaN"),
        (["--probe_learning_rate", "inf"], "probe_learning_rate is inf; JSON has no NaN and no infinity"),
        (["--seeds", "1", "1"], "seeds takes different integers"),
        (["--seeds", "-1"], "seeds takes different integers of at least 0"),
        (["--layer", "head"], "layer is 'head'; it must be one of backbone, projector, output"),
        (["--sae_k", "99"], "sae_k is 99 for 32 latents"),
        (["--batch_size", "9999"], "batch_size is 9999 for 1437 images"),
        (["--probe_batch_size", "9999"], "probe_batch_size is 9999 for 1437 images"),
        (["--views", "{"], "views is '{', which is not JSON"),
        (["--data", "no-such-set"], "no-such-set"),
        (["--non_negative", "abs"], "non_negative is 'abs'"),
        (["--probe_optimizer", "adam"], "probe_optimizer is 'adam'"),
    ],
)
def test_bad_settings_are_named_before_training(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["--output_dir", str(tmp_path / "bad"), *SMALL, *arguments])
    assert not (tmp_path / "bad").exists()


def test_a_learner_that_takes_more_dimensions_than_features_have_is_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "pretrained", lambda *_: pytest.fail("pretrained"))
    command = ["--output_dir", str(tmp_path / "wide"), *SMALL]
    with pytest.raises(ValueError, match=r"learners has k_sparse_64, which takes 64 .* the features have 32"):
        main([*command, "--learners", "probe", "k_sparse_64"])
    command = ["--output_dir", str(tmp_path / "narrow"), *SMALL, "--sae_latents", "6"]
    with pytest.raises(ValueError, match=r"learners has k_sparse_8, which takes 8 .* the features have 6"):
        main([*command, "--learners", "probe", "k_sparse_8"])


def test_controls_and_the_labels_that_people_gave(folder, tmp_path, capsys):
    people = tmp_path / "people.csv"
    counts = 7 * torch.eye(10) + 3 * torch.eye(10).roll(1, dims=0)
    people.write_text("\n".join(",".join(f"{count:g}" for count in row) for row in counts.tolist()))
    arms = ["poly", "poly_unit", "sae", "sae_random_basis", "sae_frozen_decoder"]
    command = ["--output_dir", str(tmp_path / "run"), *SMALL, "--checkpoints", str(folder / "models"), "--arms", *arms]
    command += ["--learners", "probe", "tuned"]
    main([*command, "--pair_flips", "0.3", "--human_labels", str(people)])
    text = capsys.readouterr().out
    noises = {0: None, 0.6: None, "pair_flips 0.3": 0.3, "human": 0.3}
    for noise, share in noises.items():
        found = rows(tmp_path / "run", TRAINING[0], features="sae", noise_rate=noise)
        assert {row["seed"] for row in found} == {0, 1}
        wrong = [row["config"].get("wrong_labels") for row in found]
        assert wrong == [None, None] if share is None else wrong == pytest.approx([share] * 2, abs=0.02)
    assert "| features | 0 % | 60 % | 30 % pair flips | human labels (" in text
    assert "| sae, the paper, CIFAR-100 | 54.4 | 50.5 | - | - |" in text
    explained = text.split("## What the gains over poly consist of")[1].split("\nPoints of accuracy")[0]
    assert "| gain over raw | scale | tuning | kernel | basis |" in explained
    assert "| sae | human labels | " in explained
    assert (tmp_path / "run" / "gain_parts.png").exists()
    assert len(values(tmp_path / "run", "sae_fvu")) == 4  # of sae and of the one with a frozen decoder
    assert "sae_frozen_decoder on test images: FVU " in text
    people.write_text(people.read_text().replace("7", "8"))
    with pytest.raises(ValueError, match=r"of another configuration \(human_labels_sha256"):
        main([*command, "--pair_flips", "0.3", "--human_labels", str(people)])
    with pytest.raises(ValueError, match=r"pair_flips has 1\.5; each must be in"):
        main([*command, "--pair_flips", "1.5"])
    people.write_text("1,0\n0,1\n")
    with pytest.raises(ValueError, match="counts of 2 classes and the images are of 10"):
        main([*command, "--human_labels", str(people)])
