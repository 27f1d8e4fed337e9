"""The recipes of Fig. 3 at a size of seconds: rows, table, pictures, adapters, continuation and what they refuse."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import few_shot_finetuning
import finetuning
import noisy_finetuning
import pytest
import tables
import torch
import yaml
from filelock import FileLock
from finetuning import adapted, drawn
from peft import LoraConfig

from tests.recipes.conftest import PRETRAINING, rows, value
from vision_bench import figures, models
from vision_bench.data import load_images
from vision_bench.finetune import finetune
from vision_bench.runs import Run, parse

CONFIGS = Path("recipes/configs")
SMALL = [*PRETRAINING, "--seeds", "0", "1", "--finetuning_epochs", "2", "--curve_epochs", "1"]
SMALL += ["--test_fraction", "0.3", "--control_weight_decay", "1"]
FEW = [*SMALL, "--fractions", "0.05", "0.1"]
NOISY = [*SMALL, "--fraction", "0.1", "--noise_rates", "0", "0.6", "--methods", "ce", "nce"]
ARMS = {"ce", "nce", "ce+weight_decay", "ce+dropout", "ce+early_stopping"}
VIT = ["--backbone", "test_vit", "--backbone_options", '{"img_size": 8, "patch_size": 4}', "--layer", "backbone"]
VIT += [*PRETRAINING, "--seeds", "0", "--train_fraction", "0.1", "--batch_size", "64", "--finetuning_epochs", "1"]


def recording(draw, figures):
    """The same function, which also keeps what it returns."""

    def recorded(*arguments, **named):
        figures.append(draw(*arguments, **named))
        return figures[-1]

    return recorded


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("few_shot")
    few_shot_finetuning.main(["--output_dir", str(path), *FEW])
    return path


def test_every_cell_has_rows_and_the_arms_differ(folder):
    final = rows(folder, "finetuned_validation_top1")
    found = {(row["config"]["method"], row["config"]["fraction"], row["seed"]) for row in final}
    assert found == {(arm, fraction, seed) for arm in ARMS for fraction in (0.05, 0.1) for seed in (0, 1)}
    assert len(final) == len(found)
    assert {row["n"] for row in final} == {107}
    assert {row["n"] for row in rows(folder, "finetuned_train_top1", fraction=0.1, method="nce")} == {142}
    kept = rows(folder, "finetuned_train_top1", fraction=0.1, method="ce+early_stopping")
    assert {row["n"] for row in kept} == {142 - 28}
    by_arm = {arm: tuple(row["value"] for row in rows(folder, "online_train_top1", method=arm)) for arm in ARMS}
    assert len(set(by_arm.values())) == len(ARMS)
    one, other = (rows(folder, "online_train_top1", seed=seed, method="ce") for seed in (0, 1))
    assert [row["value"] for row in one] != [row["value"] for row in other]


def test_accuracies_per_epoch_and_what_the_features_are_stand_in_the_rows(folder):
    for metric in ("train_top1", "validation_top1", "online_train_top1"):
        epochs = [row["config"]["epoch"] for row in rows(folder, metric, method="nce", fraction=0.1, seed=0)]
        assert epochs == [1, 2]
    last = rows(folder, "validation_top1", method="ce", fraction=0.1, seed=1, epoch=2)[0]["value"]
    assert rows(folder, "finetuned_validation_top1", method="ce", fraction=0.1, seed=1)[0]["value"] == last
    assert min(row["value"] for row in rows(folder, "sparsity", method="nce")) > 0.1
    assert max(row["value"] for row in rows(folder, "sparsity", method="ce")) < 0.01
    assert {row["metric"] for row in rows(folder)} > {"semantic_consistency", "chance_consistency", "live_dimensions"}


def test_table_and_pictures_are_left_and_no_models(folder):
    table = (folder / "results.md").read_text()
    assert "| 5 % | nce | " in table
    assert re.search(r"\| nce - ce\+early_stopping \| [+-]\d", table)
    assert "| nce - ce, the paper, ImageNet-100 | - | +3.9 at most |" in table
    for name in ("figure_3ab", "epochs"):
        assert (folder / f"{name}.png").stat().st_size > 5000
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert not list((folder / "finetuned").iterdir())


def test_a_stopped_run_continues_to_the_same_rows(folder, tmp_path, monkeypatch):
    stopped = tmp_path / "stopped"
    shutil.copytree(folder, stopped)
    whole = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(whole) if json.loads(line)["seed"] == 1) + 12  # one cell of seed 1 is whole
    cells = [i for i in range(cut) if json.loads(whole[i])["metric"] == "finetuned_validation_top1"]
    (stopped / "results.jsonl").write_text("".join(whole[: cells[-1] + 1]))
    trained = []

    def counted(folder, *rest, **settings):
        trained.append(folder.name)
        return finetune(folder, *rest, **settings)

    monkeypatch.setattr(finetuning, "finetune", counted)
    few_shot_finetuning.main(["--output_dir", str(stopped), *FEW])
    assert len(trained) == 20 - len(cells)

    def found(path):
        return {(json.dumps(row["config"], sort_keys=True), row["seed"], row["metric"], row["value"])
                for row in rows(path)}  # fmt: skip

    assert found(stopped) == found(folder)


def test_same_settings_reprint_and_others_are_refused(folder, monkeypatch, capsys):
    before = (folder / "results.jsonl").read_bytes()
    monkeypatch.setattr(finetuning, "finetune_cell", lambda *rest: pytest.fail("nothing is left to do"))
    few_shot_finetuning.main(["--output_dir", str(folder), *FEW])
    assert "points of test accuracy" in capsys.readouterr().out
    assert (folder / "results.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="another configuration"):
        few_shot_finetuning.main(["--output_dir", str(folder), *FEW, "--control_dropout", "0.4"])
    with pytest.raises(ValueError, match="recipe 'few_shot_finetuning'"):
        noisy_finetuning.main(["--output_dir", str(folder), *NOISY])


def test_noisy_finetuning_leaves_rows_table_and_pictures(folder, tmp_path):
    models = str(folder / "models")
    noisy_finetuning.main(["--output_dir", str(tmp_path), *NOISY, "--checkpoints", models, "--keep_models"])
    found = {(row["config"]["method"], row["config"]["noise_rate"]) for row in rows(tmp_path, "train_top1")}
    assert found == {(arm, rate) for arm in ("ce", "nce") for rate in (0, 0.6)}
    clean = [row["value"] for row in rows(tmp_path, "finetuned_validation_top1", noise_rate=0)]
    noisy = [row["value"] for row in rows(tmp_path, "finetuned_validation_top1", noise_rate=0.6)]
    assert sum(clean) > sum(noisy)
    few = rows(folder, "finetuned_validation_top1", fraction=0.1, method="nce", seed=1)[0]["value"]
    assert rows(tmp_path, "finetuned_validation_top1", noise_rate=0, method="nce", seed=1)[0]["value"] == few
    assert "+11.9 at most" in (tmp_path / "results.md").read_text()
    for name in ("figure_3c", "epochs"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert (tmp_path / "finetuned" / "nce-0.1-0.6-1" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [*FEW, "--methods", "ce", "nce", "ce+weight_decay", "ce+dropout", "ce+early_stopping"],
        [*VIT, "--fractions", "0.5", "--methods", "ce", "nce", "lora", "monolora"],
    ],
)
def test_arms_that_diverge_are_marked_and_have_no_numbers(arguments, tmp_path, monkeypatch):
    command = ["--output_dir", str(tmp_path), *arguments, "--finetuning_learning_rate", "1e10"]
    few_shot_finetuning.main(command)
    marked = rows(tmp_path, "diverged")
    config = marked[0]["config"]
    cells = {(s, m, f) for s in config["seeds"] for m in config["methods"] for f in config["fractions"]}
    assert {(row["seed"], row["config"]["method"], row["config"]["fraction"]) for row in marked} == cells
    assert {row["metric"] for row in rows(tmp_path)} == {"diverged"}
    assert "The training diverged in epoch" in marked[0]["config"]["reason"]
    table = (tmp_path / "results.md").read_text()
    for method, fraction in itertools.product(config["methods"], config["fractions"]):
        assert f"| {100 * fraction:g} % | {method} | diverged | diverged | - | - | - | - | - | - |" in table
    assert not list((tmp_path / "finetuned").iterdir())
    monkeypatch.setattr(finetuning, "finetune", lambda *_, **__: pytest.fail("it diverged already"))
    few_shot_finetuning.main(command)
    assert (tmp_path / "results.md").read_text() == table
    described = json.loads((tmp_path / "config.json").read_text())
    run = Run(tmp_path, "few_shot_finetuning", described["config"], facts=described["facts"])
    assert few_shot_finetuning.EXPERIMENT.lacking(run) is None


def test_the_other_arms_and_seeds_go_on_where_one_diverges(folder, tmp_path, monkeypatch):
    """nce diverges for one of two seeds; that seed has no number anywhere, and the legend says so."""
    drawn_with = []
    monkeypatch.setattr(figures, "band_curves", recording(figures.band_curves, drawn_with))

    def diverging(path, model, config, *rest, **named):
        if config.loss == "nce" and config.seed == 1:
            config = replace(config, learning_rate=1e10)
        return finetune(path, model, config, *rest, **named)

    monkeypatch.setattr(finetuning, "finetune", diverging)
    command = [*FEW, "--methods", "ce", "nce", "--checkpoints", str(folder / "models")]
    few_shot_finetuning.main(["--output_dir", str(tmp_path), *command])
    assert {(row["seed"], row["config"]["method"]) for row in rows(tmp_path, "diverged")} == {(1, "nce")}
    final = rows(tmp_path, "finetuned_validation_top1")
    assert {(row["seed"], row["config"]["method"]) for row in final} == {(0, "ce"), (1, "ce"), (0, "nce")}
    value = rows(tmp_path, "finetuned_validation_top1", method="nce", fraction=0.1)[0]["value"]
    assert f"| {100 * value:.1f} (1 of 2 diverged) | " in (tmp_path / "results.md").read_text()
    labels = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in drawn_with]
    assert labels == [["ce", "nce, 2 of 4 diverged"], ["ce", "nce, 1 of 2 diverged"]]


def test_a_pretraining_that_diverges_marks_the_arms_of_its_seed(tmp_path):
    command = ["--output_dir", str(tmp_path), *FEW, "--methods", "ce", "nce", "--learning_rate", "1e38"]
    few_shot_finetuning.main([*command, "--optimizer", "sgd"])
    marked = rows(tmp_path, "diverged")
    assert len(marked) == 2 * 2 * 2
    assert marked[0]["config"]["reason"].startswith("pretraining: The training diverged in epoch 1")


def test_a_folder_that_another_process_holds_is_refused_before_pretraining(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="Another process is working in"):
        few_shot_finetuning.main(["--output_dir", str(tmp_path), *FEW])
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []


def test_wrong_labels_are_drawn_after_the_images_and_the_same_for_all_arms():
    train = load_images("digits", "train")
    clean, noisy, again = drawn(train, 0.2, 3), drawn(train, 0.2, 3, 0.5), drawn(train, 0.2, 3, 0.5)
    assert torch.equal(clean.images, noisy.images)
    assert (clean.labels != noisy.labels).sum() == round(0.5 * len(clean))
    assert noisy.fingerprint == again.fingerprint != clean.fingerprint
    counts = torch.bincount(clean.labels).tolist()
    assert counts == [round(0.2 * count) for count in torch.bincount(train.labels).tolist()]
    assert not torch.equal(clean.images, drawn(train, 0.2, 4).images)


def test_adapters_of_a_vision_transformer_train_and_its_backbone_does_not(tmp_path):
    methods = ["ce", "nce", "lora", "monolora"]
    few_shot_finetuning.main(
        ["--output_dir", str(tmp_path), *VIT, "--fractions", "0.5", "--methods", *methods, "--keep_models"]
    )
    assert {row["config"]["method"] for row in rows(tmp_path, "finetuned_validation_top1")} == set(methods)
    zeros = rows(tmp_path, "adapter_sparsity")
    assert [row["config"]["method"] for row in zeros] == ["monolora"]
    assert 0 < zeros[0]["value"] < 1
    assert "| monolora - lora |" in (tmp_path / "results.md").read_text()

    from vision_bench import finetune, storage

    start, _ = models.load(tmp_path / "models" / "simclr-0" / "model.safetensors")
    pretrained = start.backbone.state_dict()
    for method, prefix in (("lora", "lora_"), ("monolora", "monolora_")):
        path = tmp_path / "finetuned" / f"{method}-0.5-0-0" / "model.safetensors"
        weights, header = storage.load(path, finetune.KIND)
        assert header["what"]["adapter"]["method"] == method
        adapters = {name: tensor for name, tensor in weights.items() if f".{prefix}" in name}
        seconds = [t for name, t in adapters.items() if "lora_B" in name or "decoder" in name]
        assert len(seconds) == 6  # one of each block
        assert all(tensor.abs().sum() > 0 for tensor in seconds)  # they started at zero
        base = {
            name: tensor for name, tensor in weights.items() if name.startswith("backbone.") and name not in adapters
        }
        assert len(base) == len(pretrained)
        for name, tensor in base.items():
            plain = name.removeprefix("backbone.base_model.model.").replace(".base_layer", "")
            assert torch.equal(tensor, pretrained[plain])


def test_an_arm_from_outside_is_a_row_of_the_table_of_arms(tmp_path, monkeypatch):
    """It is measured, named in table and figure, given a colour of its own, and shown on the page of results."""
    dora = finetuning.Arm(
        adapter=lambda settings: LoraConfig(use_dora=True, **settings.lora_options()), baseline="lora"
    )
    slow = finetuning.Arm(lambda settings: {"learning_rate": settings.finetuning_learning_rate / 10})
    monkeypatch.setattr(finetuning, "ARMS", finetuning.ARMS | {"dora": dora, "ce_slow": slow})
    drawn_with = []
    monkeypatch.setattr(figures, "band_curves", recording(figures.band_curves, drawn_with))
    methods = ["ce", "lora", "dora", "ce_slow"]
    arguments = [*VIT, "--fractions", "0.5", "--methods", *methods]
    few_shot_finetuning.main(["--output_dir", str(tmp_path / "run"), *arguments])
    final = {method: value(tmp_path / "run", "finetuned_validation_top1", method=method) for method in methods}
    table = (tmp_path / "run" / "results.md").read_text()
    for method in methods:
        assert f"| 50 % | {method} | " in table
    assert f"| dora - lora | {100 * (final['dora'] - final['lora']):+.1f} |" in table
    loss = {m: value(tmp_path / "run", "online_train_top1", method=m, epoch=1) for m in methods}
    assert loss["ce"] != loss["ce_slow"]
    lines = {line.get_label(): line.get_color() for line in drawn_with[0].axes[0].get_lines()}
    colours = [str(lines[label]) for label in ("ce", "lora", "dora", "ce slow")]
    assert len(set(colours)) == 4
    tables.main(["--runs", str(tmp_path / "run"), "--output_dir", str(tmp_path / "page"), "--only", "figure_3ab"])
    assert "| 50 % | dora | " in (tmp_path / "page" / "results.md").read_text()


def test_adapters_leave_the_features_as_they_are_at_first():
    settings = finetuning.FinetuningSettings(methods=["ce", "lora", "monolora"])
    torch.manual_seed(0)
    options = {"img_size": 8, "patch_size": 4}
    model = models.ContrastiveModel(models.ModelConfig(backbone="test_vit", backbone_options=options)).eval()
    images = torch.randn(2, 3, 8, 8)
    for method in ("lora", "monolora"):
        made, options = adapted(model, method, settings, 0)
        assert torch.equal(made.eval()(images).backbone, model(images).backbone)
        assert options["r"] == 8
        trained = [name for name, parameter in made.named_parameters() if parameter.requires_grad]
        assert len(trained) == 12
        assert all("lora" in name for name in trained)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fractions", "10"], r"fractions has 10.0; each must be in \(0, 1\]"),
        (["--fractions", "0.1", "0.1"], "fractions takes different numbers"),
        (["--fractions", "0.001"], "would be left with none"),
        (["--fractions", "0.02"], "finetuning_batch_size is 32, and a fraction of 0.02 leaves"),
        (["--methods", "ce", "sgd"], "methods is .*; it takes different names of ce, nce"),
        (["--methods", "nce", "ce"], "the first must be ce"),
        (["--methods", "ce", "lora"], "adapter_targets has qkv; small_conv has these linear layers: none"),
        (
            [*VIT, "--fractions", "0.5", "--methods", "ce", "lora", "--adapter_targets", "q_proj"],
            "adapter_targets has q_proj; test_vit has",
        ),
        (["--layer", "backbone"], "features of small_conv are never negative: nce would be ce"),
        (["--layer", "output"], "layer is 'output'; it must be one of projector, backbone"),
        (["--held_out", "0"], r"held_out is 0.0; it must be in \(0, 1\)"),
        (["--adapter_r", "0"], "adapter_r is 0"),
        (["--finetuning_learning_rate", "0"], "learning_rate is 0.0; it must be above 0"),
        (["--finetuning_views", "{"], "finetuning_views is '{', which is not JSON"),
        (["--backbone_options", "["], "backbone_options is '\\[', which is not JSON"),
        (["--batch_size", "9999"], "batch_size is 9999 for 1437 images"),
        (["--test_fraction", "2"], "fraction is 2.0; it must be in"),
    ],
)
def test_bad_settings_are_named_before_training(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        few_shot_finetuning.main(["--output_dir", str(tmp_path / "bad"), *FEW, *arguments])
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise_rates", "90"], "noise_rates has 90.0; each must be in"),
        (["--noise_rates", "0.1", "0.1"], "noise_rates takes different numbers"),
        (["--fraction", "0"], r"fraction is 0.0; it must be in \(0, 1\]"),
    ],
)
def test_bad_settings_of_noisy_finetuning_are_named(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        noisy_finetuning.main(["--output_dir", str(tmp_path / "bad"), *NOISY, *arguments])
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("recipe", "settings", "level"),
    [
        (few_shot_finetuning, {"fractions": [0.1, 0.2]}, 10),
        (few_shot_finetuning, {"fractions": [0.2, 0.5]}, None),
        (noisy_finetuning, {"noise_rates": [0.0, 0.5], "fraction": 0.1}, 0),
    ],
)
def test_the_papers_gain_stands_in_the_panel_of_gains(recipe, settings, level, tmp_path, monkeypatch):
    drawn_with = []
    monkeypatch.setattr(figures, "band_curves", recording(figures.band_curves, drawn_with))
    run = Run(tmp_path, recipe.__name__, {"seeds": [0], "methods": ["ce", "nce"]} | settings)
    measured = {"n": 9, "seed": 0, "seconds": 0.0, "device": "cpu", "epoch": 1}
    for condition, method in itertools.product(recipe.STUDY.conditions(run.config), ["ce", "nce"]):
        for metric in ("train_top1", "validation_top1", "finetuned_train_top1", "finetuned_validation_top1"):
            run.add(metric, 0.6 if method == "ce" else 0.61, method=method, **measured, **condition)
    recipe.STUDY.draw(run)
    levels, epochs = drawn_with
    assert not [text for ax in (*levels.axes[:-1], *epochs.axes) for text in ax.texts]
    gains = levels.axes[-1]
    said = [text.get_text() for text in gains.texts]
    if level is None:
        assert said == []
        return
    most = {few_shot_finetuning: 3.9, noisy_finetuning: 11.9}[recipe]
    assert said == [f"paper, ImageNet-100: +{most} at most"]
    found = [line for line in gains.lines if line.get_ydata()[0] == most]
    assert len(found) == 1
    assert found[0].get_xdata()[0] == level
    assert gains.get_ylim()[1] > most


@pytest.mark.parametrize(
    ("recipe", "name", "axes"),
    [
        (few_shot_finetuning, "few_shot", {"fractions": [0.1, 0.2, 0.5, 1.0]}),
        (noisy_finetuning, "noisy_finetuning", {"fraction": 1.0, "noise_rates": [i / 10 for i in range(10)]}),
    ],
)
def test_the_configuration_of_the_paper_is_read(recipe, name, axes, monkeypatch, tmp_path):
    seen = {}

    def stop(*arguments, **options):
        seen["settings"] = parse(*arguments, **options)
        raise InterruptedError

    monkeypatch.setattr(finetuning, "parse", stop)
    path = CONFIGS / f"{name}_imagenet100.yaml"
    with pytest.raises(InterruptedError):
        recipe.main(["--output_dir", str(tmp_path), "--config", str(path)])
    _, settings, own = seen["settings"]
    config = settings.finetune_config("nce", 0)
    assert (config.epochs, config.batch_size, config.learning_rate, config.optimizer) == (100, 256, 1.5, "momentum")
    assert (config.milestones, config.weight_decay, config.layer, config.loss) == ((0.6, 0.8), 0, "projector", "nce")
    assert {axis: getattr(own, axis) for axis in axes} == axes
    # all but the axes is the same in both, and what pretrains the model as in the other recipes
    settings = yaml.safe_load(path.read_text())
    for other in (*CONFIGS.glob("*_imagenet100.yaml"), CONFIGS / "imagenet100.yaml"):
        read = yaml.safe_load(other.read_text())
        shared = [key for key in settings.keys() & read.keys() if key not in axes]
        assert {key: settings[key] for key in shared} == {key: read[key] for key in shared}
        if other.stem != "imagenet100":
            assert settings.keys() - axes.keys() <= read.keys()
