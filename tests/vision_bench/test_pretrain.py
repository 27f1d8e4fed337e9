"""Pretraining trains, monitors, and continues to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import nn

from vision_bench import features, models, pretrain, storage
from vision_bench.data import ImageSet, load_images
from vision_bench.models import ModelConfig
from vision_bench.pretrain import PretrainConfig
from vision_bench.training import share_batch_norm

MODEL = ModelConfig(backbone="small_conv", projector_hidden=32, projector_out=16, non_negative="rep_relu")
MILD = {"crop_scale": [0.6, 1.0], "flip_probability": 0.0, "blur_probability": 0.0}
CONFIG = PretrainConfig(epochs=3, batch_size=64, warmup_epochs=1, seed=3)


@pytest.fixture(scope="module")
def digits():
    train, validation = load_images("digits", "train"), load_images("digits", "test")
    return train.subset(torch.arange(200)), validation.subset(torch.arange(100))


@pytest.fixture(scope="module")
def uninterrupted(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    pretrain.pretrain(folder, MODEL, CONFIG, *digits, monitor_epochs=2)
    return folder


class Stopped(Exception):
    pass


def stop_at(monkeypatch, step):
    """Training fails in the middle of a step, as a machine that goes down would."""
    real = pretrain._Run._step

    def limited(self, *batch):
        if self.step_number == step:
            raise Stopped
        real(self, *batch)

    monkeypatch.setattr(pretrain._Run, "_step", limited)


def log_of(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def test_training_lowers_the_loss_and_logs_accuracies_apart(digits, tmp_path):
    config = PretrainConfig(epochs=8, batch_size=50, warmup_epochs=1, views=MILD)
    model, log = pretrain.pretrain(tmp_path, MODEL, config, *digits, monitor_epochs=3)
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    assert log[-1]["online_probe_train_top1"] > log[0]["online_probe_train_top1"]
    assert [row["epoch"] for row in log if "knn_validation_top1" in row] == [3, 6, 8]
    assert 0.5 < log[-1]["knn_validation_top1"] <= 1
    assert log[-1]["online_probe_validation_top1"] != log[-1]["knn_validation_top1"]
    assert all(row["images_per_second"] > 0 for row in log)
    assert not model.training
    loaded, training = models.load(tmp_path / "model.safetensors")
    assert models.fingerprint(loaded) == models.fingerprint(model)
    images = digits[1]
    made = [features.embed(one, images.images, images.mean, images.std)["output"] for one in (model, loaded)]
    assert torch.equal(*made)  # a run that was stopped between training and features has the same rows
    assert training["config"]["epochs"] == 8
    assert training["data"] == digits[0].fingerprint


def test_the_learning_rate_warms_up_and_falls_as_a_cosine_per_step(digits, tmp_path, monkeypatch):
    rates = []
    real = pretrain._Run._step

    def recorded(self, *batch):
        real(self, *batch)
        rates.append([group["lr"] for group in self.optimizer.param_groups])

    monkeypatch.setattr(pretrain._Run, "_step", recorded)
    pretrain.pretrain(tmp_path, MODEL, CONFIG, digits[0])
    start, steps = 3e-5, 3  # 3 epochs of 3 steps, the first of them warm-up
    for group, peak in ((0, 0.4), (-1, 0.1)):
        warm = [start + (peak - start) * i / steps for i in range(steps)]
        falling = [peak * (1 + torch.cos(torch.tensor(torch.pi * i / 6)).item()) / 2 for i in range(6)]
        assert [r[group] for r in rates] == pytest.approx(warm + falling, abs=1e-6)


def test_biases_and_normalisations_are_neither_decayed_nor_adapted():
    torch.manual_seed(0)
    optimizer = pretrain._optimizer(pretrain._Trainee(models.ContrastiveModel(MODEL), 10), CONFIG)
    plain, decayed, classifier = optimizer.param_groups
    assert {p.ndim for p in plain["params"]} == {1}
    assert min(p.ndim for p in decayed["params"]) == 2
    assert (plain["weight_decay"], decayed["weight_decay"], classifier["weight_decay"]) == (0, 1e-4, 0)
    for group in optimizer.param_groups:
        assert (group["trust_coeff"], group["trust_clip"], group["always_adapt"]) == (0.02, True, False)


def test_the_online_probe_moves_nothing_of_the_model(digits, tmp_path):
    made = []
    for rate in (0.1, 0.0):
        config = PretrainConfig(epochs=2, batch_size=64, warmup_epochs=0, classifier_learning_rate=rate)
        made.append(pretrain.pretrain(tmp_path / str(rate), MODEL, config, digits[0]))
    assert models.fingerprint(made[0].model) == models.fingerprint(made[1].model)
    assert made[0].log[-1]["online_probe_train_top1"] != made[1].log[-1]["online_probe_train_top1"]


@pytest.mark.parametrize("step", [4, 7])
def test_an_interrupted_training_ends_in_the_same_bits(step, digits, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stopped):
            pretrain.pretrain(tmp_path, MODEL, CONFIG, *digits, monitor_epochs=2, checkpoint_minutes=0)
    assert storage.read_header(tmp_path / "training.safetensors", "training state")["step"] == step
    torch.manual_seed(99)  # whatever the caller drew before
    pretrain.pretrain(tmp_path, MODEL, CONFIG, *digits, monitor_epochs=2)
    whole, continued = (storage.load(f / "model.safetensors", models.KIND) for f in (uninterrupted, tmp_path))
    assert continued[1] == whole[1]
    assert all(torch.equal(tensor, continued[0][name]) for name, tensor in whole[0].items())
    assert log_of(tmp_path) == log_of(uninterrupted)
    assert not (tmp_path / "training.safetensors").exists()


def test_resuming_is_exact_with_an_optimiser_of_more_state(digits, tmp_path, monkeypatch):
    config = PretrainConfig(epochs=3, batch_size=64, warmup_epochs=1, optimizer="adamw", learning_rate=1e-3)
    whole = pretrain.pretrain(tmp_path / "whole", MODEL, config, digits[0])
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Stopped):
            pretrain.pretrain(tmp_path / "stopped", MODEL, config, digits[0], checkpoint_minutes=0)
    continued = pretrain.pretrain(tmp_path / "stopped", MODEL, config, digits[0])
    assert models.fingerprint(continued.model) == models.fingerprint(whole.model)


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_images_train_as_those_in_memory(workers, digits, tmp_path):
    for i, (image, label) in enumerate(zip(digits[0].images[:64], digits[0].labels, strict=False)):
        path = tmp_path / "images" / "train" / str(label.item()) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    config = PretrainConfig(epochs=2, batch_size=24, warmup_epochs=1)
    found = []
    for name, limit, count in (("memory", 2**30, 0), ("streamed", 1, workers)):
        images = load_images(str(tmp_path / "images"), "train", memory_limit=limit)
        assert isinstance(images.images, torch.Tensor) == (name == "memory")
        model, _ = pretrain.pretrain(tmp_path / name, MODEL, config, images, images, workers=count)
        found.append(models.fingerprint(model))
    assert found[0] == found[1]


def test_a_finished_training_is_returned_and_another_refused(digits, uninterrupted, tmp_path, monkeypatch):
    stop_at(monkeypatch, 0)  # no step may be taken
    model, log = pretrain.pretrain(uninterrupted, MODEL, CONFIG, *digits)
    assert models.fingerprint(model) == models.fingerprint(models.load(uninterrupted / "model.safetensors")[0])
    assert len(log) == 3
    other = PretrainConfig(epochs=3, batch_size=64, warmup_epochs=1, seed=4)
    with pytest.raises(ValueError, match=r"another training \(seed: 3 there, 4 now\)"):
        pretrain.pretrain(uninterrupted, MODEL, other, *digits)
    with pytest.raises(ValueError, match=r"another training \(data: "):
        pretrain.pretrain(uninterrupted, MODEL, CONFIG, digits[1])
    with pytest.raises(Stopped):
        pretrain.pretrain(tmp_path, MODEL, CONFIG, *digits)


def test_another_seed_gives_another_model(digits, uninterrupted, tmp_path):
    config = PretrainConfig(epochs=3, batch_size=64, warmup_epochs=1, seed=4)
    model, _ = pretrain.pretrain(tmp_path, MODEL, config, digits[0])
    assert models.fingerprint(model) != models.fingerprint(models.load(uninterrupted / "model.safetensors")[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1e18}, "diverged in epoch 1: the loss is nan. Lower learning_rate .here 1e.18. or"),
        ({"classifier_learning_rate": 1e38}, r"diverged in epoch 1: classifier\.weight is NaN or infinite\. Lower"),
        # one step an epoch: its loss is that of the initial weights
        (
            {"batch_size": 200, "learning_rate": 3e38},
            "diverged in epoch 1: the backbone of image 0 has values that are NaN or infinite",
        ),
    ],
)
def test_a_training_that_diverges_stops_and_leaves_no_model(settings, message, digits, tmp_path):
    config = PretrainConfig(**{"epochs": 2, "batch_size": 64, "warmup_epochs": 0, "optimizer": "sgd"} | settings)
    with pytest.raises(FloatingPointError, match=message):
        pretrain.pretrain(tmp_path, MODEL, config, *digits, monitor_epochs=1, checkpoint_minutes=0)
    assert not (tmp_path / "model.safetensors").exists()


def test_the_state_before_the_divergence_stays(digits, tmp_path, monkeypatch):
    real = pretrain._Run.step

    def broken(run, *batch):
        real(run, *batch)
        if run.step_number == 4:  # the second step of the second epoch of three
            with torch.no_grad():
                run.model.projector[0].bias[0] = torch.nan

    with monkeypatch.context() as patch:
        patch.setattr(pretrain._Run, "step", broken)
        with pytest.raises(
            FloatingPointError, match=r"epoch 2: .*delete .*, which keeps the state of step 4, to start"
        ):
            pretrain.pretrain(tmp_path, MODEL, CONFIG, *digits, checkpoint_minutes=0)
    tensors, header = storage.load(tmp_path / "training.safetensors", "training state")
    assert header["step"] == 4
    assert storage.non_finite(tensors) is None
    pretrain.pretrain(tmp_path, MODEL, CONFIG, *digits)  # goes on from there
    assert (tmp_path / "model.safetensors").exists()


def test_a_checkpoint_says_how_its_images_were_normalised(digits, tmp_path, uninterrupted):
    train, validation = digits
    expected = {"mean": list(train.mean), "std": list(train.std), "image_size": [8, 8]}
    assert models.load(uninterrupted / "model.safetensors")[1]["images"] == expected
    other = ImageSet.of(train.images, train.labels, train.class_names)  # of ImageNet's mean, as a folder of them has
    assert other.fingerprint == train.fingerprint
    with pytest.raises(ValueError, match=r"another training \(mean: .* there, .* now; std: "):
        pretrain.pretrain(uninterrupted, MODEL, CONFIG, other)
    with pytest.raises(
        ValueError, match=r"validation has another normalisation or size than train: mean .* instead of"
    ):
        pretrain.pretrain(tmp_path, MODEL, CONFIG, other, validation)
    model, training = models.load(uninterrupted / "model.safetensors")
    del training["images"]
    models.save(tmp_path / "model.safetensors", model, training)
    with pytest.warns(UserWarning, match="does not say how its images were normalised; it is taken to be with mean"):
        pretrain.pretrain(tmp_path, MODEL, CONFIG, train)


def test_accuracies_of_a_finished_training_are_of_its_own_validation_images(digits, uninterrupted):
    train, validation = digits
    names = ("online_probe_validation_top1", "knn_validation_top1")
    assert all(name in pretrain.pretrain(uninterrupted, MODEL, CONFIG, *digits).log[-1] for name in names)
    log = pretrain.pretrain(uninterrupted, MODEL, CONFIG, train, validation.subset(torch.arange(50))).log
    assert not any(name in entry for entry in log for name in names)
    assert log[-1]["online_probe_train_top1"] > 0


def test_two_processes_never_train_in_one_folder(digits, tmp_path, uninterrupted):
    with FileLock(tmp_path / ".lock"):
        with pytest.raises(ValueError, match="Another process is working in"):
            pretrain.pretrain(tmp_path, MODEL, CONFIG, *digits)
        assert not (tmp_path / "log.jsonl").exists()
    with FileLock(uninterrupted / ".lock"):  # a model that is there is read by anyone
        pretrain.pretrain(uninterrupted, MODEL, CONFIG, *digits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; it must be above 0 and finite"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; it must be at least 0 and finite"),
        ({"epochs": 3, "warmup_epochs": 3}, r"warmup_epochs is 3; it must be in \[0, 3\)"),
        ({"weight_decay": 0.0}, "weight_decay is 0, and timm's LARS"),
        ({"views": {"size": 8}}, "views is {'size': 8}, settings of SimCLRViews"),
        ({"views": {"hue": 2}}, "hue is 2"),
        ({"batch_size": 300}, "batch_size is 300 for 200 images"),
    ],
)
def test_bad_settings_are_named(settings, message, digits, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretrain.pretrain(tmp_path, MODEL, PretrainConfig(**settings), digits[0])
    assert not list(tmp_path.iterdir())


def test_a_stop_before_the_first_state_leaves_nothing_of_its_log(digits, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Stopped):
            pretrain.pretrain(tmp_path, MODEL, CONFIG, *digits, monitor_epochs=2)
    assert len(log_of(tmp_path)) == 1
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 2, "st')
    pretrain.pretrain(tmp_path, MODEL, CONFIG, *digits, monitor_epochs=2)
    assert log_of(tmp_path) == log_of(uninterrupted)


PROGRAM = """
import sys, torch
from accelerate import Accelerator
from vision_bench import pretrain
from vision_bench.data import load_images
from vision_bench.models import ModelConfig
torch.set_num_threads(1)
train = load_images("digits", "train").subset(torch.arange(200))
model = ModelConfig(backbone="small_conv", projector_hidden=32, projector_out=16)
config = pretrain.PretrainConfig(epochs=int(sys.argv[2]), batch_size=64, warmup_epochs=1)
precision, compiled = (*sys.argv[3:], "no", "")[:2]
accelerator = Accelerator(cpu=True, mixed_precision=precision)
options = {"checkpoint_minutes": 0, "compile_model": bool(compiled)}
pretrain.pretrain(sys.argv[1], model, config, train, None, accelerator, **options)
"""


@pytest.mark.slow
def test_a_killed_process_continues_to_the_same_bits(tmp_path):
    def command(name):
        return [sys.executable, "-c", PROGRAM, str(tmp_path / name), "20"]

    subprocess.run(command("whole"), check=True)
    process = subprocess.Popen(command("killed"))
    while not (tmp_path / "killed" / "log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    subprocess.run(command("killed"), check=True)
    whole, continued = (models.load(tmp_path / name / "model.safetensors")[0] for name in ("whole", "killed"))
    assert models.fingerprint(whole) == models.fingerprint(continued)


@pytest.mark.slow
def test_a_second_process_in_the_folder_ends_with_an_error_and_the_first_is_undisturbed(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), "60"]
    first = subprocess.Popen(command)
    while not (tmp_path / "log.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)  # so that it has not ended before the second one asks
    try:
        second = subprocess.run(command, capture_output=True, text=True)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert second.returncode != 0
    assert f"Another process is working in {tmp_path}; wait for it, or stop it." in second.stderr
    assert first.wait() == 0
    assert [row["epoch"] for row in log_of(tmp_path)] == list(range(1, 61))


@pytest.mark.slow
def test_bf16_and_compile_train_about_the_same(tmp_path):
    found = {}
    for options in (["no", ""], ["bf16", "compiled"]):
        folder = tmp_path / options[0]
        subprocess.run([sys.executable, "-c", PROGRAM, str(folder), "6", *options], check=True)
        found[options[0]] = [row["loss"] for row in log_of(folder)]
        assert models.load(folder / "model.safetensors")[1]["precision"] == options[0]
        assert next(models.load(folder / "model.safetensors")[0].parameters()).dtype == torch.float32
    assert found["bf16"] != found["no"]
    assert found["bf16"] == pytest.approx(found["no"], rel=0.05)


def test_processes_that_cannot_share_batch_statistics_are_pointed_out():
    with_batch_norm, without = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Conv2d(3, 4, 3)
    two, one = (SimpleNamespace(num_processes=number, device=torch.device("cpu")) for number in (2, 1))
    with pytest.warns(UserWarning, match="on cpu each of the 2 processes normalises .* another model"):
        share_batch_norm(with_batch_norm, two)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        share_batch_norm(without, two)
        share_batch_norm(with_batch_norm, one)
