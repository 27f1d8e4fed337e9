"""Finetuning equals a plain loop, keeps what it should, chooses on held-out images alone, and continues exactly."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock

from vision_bench import finetune, models, pretrain, storage, training
from vision_bench.corruptions import flip_labels
from vision_bench.data import ImageSet, load_images
from vision_bench.features import normalise
from vision_bench.finetune import FinetuneConfig
from vision_bench.models import ContrastiveModel, ModelConfig

CONFIG = FinetuneConfig(epochs=3, batch_size=32, learning_rate=0.05, seed=5)


@pytest.fixture(scope="module")
def digits():
    train, validation = load_images("digits", "train"), load_images("digits", "test")
    return train.subset(torch.arange(150)), validation.subset(torch.arange(100))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ContrastiveModel(ModelConfig(backbone="small_conv", projector_hidden=32, projector_out=16))


def changed(**settings):
    return FinetuneConfig(**({"epochs": 3, "batch_size": 32, "learning_rate": 0.05, "seed": 5} | settings))


def weights_of(folder):
    return storage.load(folder / "model.safetensors", finetune.KIND)


def log_of(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


class Stopped(Exception):
    pass


def stop_at(monkeypatch, step):
    real = finetune._Run._step

    def limited(self, *batch):
        if self.step_number == step:
            raise Stopped
        real(self, *batch)

    monkeypatch.setattr(finetune._Run, "_step", limited)


@pytest.mark.parametrize(("loss", "weight_decay"), [("ce", 0.0), ("nce", 0.0), ("nce", 0.1)])
def test_finetuning_equals_a_plain_loop(loss, weight_decay, digits, model, tmp_path):
    train, validation = digits
    config = changed(loss=loss, weight_decay=weight_decay, epochs=5, views=None, milestones=(0.6,))
    found = finetune.finetune(tmp_path, model, config, train, validation)

    torch.manual_seed(config.seed)
    plain, head = models.ContrastiveModel(model.config), torch.nn.Linear(16, 10)
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(config.seed)
    head.reset_parameters()
    parameters = [*plain.backbone.parameters(), *plain.projector.parameters(), *head.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim == 1]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    pixels, step = normalise(train.images, train.mean, train.std), 0

    def logits(images):
        features = plain.projector(plain.backbone(images))
        return head(features.clamp(min=0) if loss == "nce" else features)

    for epoch in range(5):
        order = torch.from_numpy(np.random.default_rng((5, training.ORDER, epoch)).permutation(150))
        for batch in order[:128].split(32):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 if step < 12 else 0.005  # 5 epochs of 4 steps, 60 %
            plain.train()
            optimizer.zero_grad()
            (-F.log_softmax(logits(pixels[batch]), dim=1)[range(32), train.labels[batch]].mean()).backward()
            optimizer.step()
            step += 1
    plain.eval()
    for name, tensor in plain.backbone.state_dict().items():
        torch.testing.assert_close(found.model.backbone.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.model.classifier.weight, head.weight, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        right = logits(normalise(validation.images, validation.mean, validation.std)).argmax(1) == validation.labels
        train_right = logits(pixels).argmax(1) == train.labels
    assert found.log[-1]["validation_top1"] == pytest.approx(right.float().mean().item(), abs=0.011)
    assert found.log[-1]["train_top1"] == pytest.approx(train_right.float().mean().item(), abs=0.011)
    assert found.log[-1]["loss"] < found.log[0]["loss"]


def test_the_losses_differ_in_the_relu_alone(digits, model):
    made = {}
    for loss in finetune.LOSSES:
        torch.manual_seed(1)
        made[loss] = finetune.Classifier(model, changed(loss=loss), 10)
    ce, nce = (finetune.embed(made[loss], digits[1]) for loss in finetune.LOSSES)
    assert ce.min() < 0
    assert torch.equal(ce.clamp(min=0), nce)
    assert torch.equal(made["ce"].classifier.weight, made["nce"].classifier.weight)
    images = normalise(digits[1].images[:4], digits[1].mean, digits[1].std)
    expected = F.linear(
        made["nce"].eval().features(images), made["nce"].classifier.weight, made["nce"].classifier.bias
    )
    assert torch.equal(made["nce"](images), expected)


def test_the_pretrained_model_stays_and_its_copy_moves(digits, model, tmp_path):
    before = models.fingerprint(model)
    found = finetune.finetune(tmp_path, model, CONFIG, *digits)
    assert models.fingerprint(model) == before
    assert not found.model.training
    assert found.epoch == 3
    for part in ("backbone", "projector"):
        now, then = (dict(getattr(m, part).named_parameters()) for m in (found.model, model))
        assert all(not torch.equal(now[name], then[name]) for name in then)


def test_frozen_parameters_are_bit_identical_afterwards(digits, tmp_path):
    torch.manual_seed(0)
    frozen = ContrastiveModel(ModelConfig(backbone="small_conv", projector_hidden=32, projector_out=16))
    frozen.requires_grad_(False)
    for decay in (0.0, 0.1):
        found = finetune.finetune(tmp_path / str(decay), frozen, changed(weight_decay=decay), *digits)
        assert found.log[-1]["loss"] < found.log[0]["loss"]
        for name, parameter in frozen.projector.named_parameters():
            assert torch.equal(parameter, found.model.projector.get_parameter(name))
        for name, parameter in frozen.backbone.named_parameters():
            assert torch.equal(parameter, found.model.backbone.get_parameter(name))


def test_accuracies_are_of_eval_mode_and_of_the_labels_trained_on(digits, model, tmp_path):
    train, validation = digits
    wrong = flip_labels(train.labels, 0.5, 10, torch.Generator().manual_seed(0))
    noisy = ImageSet.of(train.images, wrong, train.class_names, (train.mean, train.std))
    found = finetune.finetune(tmp_path, model, changed(epochs=2, dropout=0.5, monitor_epochs=2), noisy, validation)
    assert "train_top1" not in found.log[0]
    assert found.log[1]["train_top1"] == finetune.accuracy(found.model, noisy)
    assert found.log[1]["validation_top1"] == finetune.accuracy(found.model, validation)
    assert found.log[1]["online_train_top1"] != found.log[1]["train_top1"]
    assert "held_out_top1" not in found.log[1]


def test_early_stopping_takes_the_epoch_best_on_images_that_it_never_trains_on(digits, model, tmp_path, monkeypatch):
    seen = set()
    real = finetune._Run.step

    def recorded(self, images, labels, generator):
        seen.update(image.numpy().tobytes() for image in images)
        real(self, images, labels, generator)

    monkeypatch.setattr(finetune._Run, "step", recorded)
    config = changed(epochs=6, held_out=0.3, learning_rate=0.3)
    found = finetune.finetune(tmp_path, model, config, *digits)
    kept, held_out = finetune._split(digits[0], config)
    assert (len(kept), len(held_out)) == (105, 45)
    everything = {image.numpy().tobytes() for image in digits[0].images}
    out = {image.numpy().tobytes() for image in held_out.images}
    assert not seen & out
    assert out | {image.numpy().tobytes() for image in kept.images} == everything
    best = max(found.log, key=lambda entry: entry["held_out_top1"])
    assert found.epoch == best["epoch"]
    assert finetune.accuracy(found.model, held_out) == best["held_out_top1"]
    assert finetune.accuracy(found.model, digits[1]) == best["validation_top1"]


@pytest.mark.parametrize(("step", "held_out"), [(5, 0.0), (8, 0.0), (9, 0.2)])
def test_an_interrupted_finetuning_ends_in_the_same_bits(step, held_out, digits, model, tmp_path, monkeypatch):
    config = changed(epochs=4, held_out=held_out, dropout=0.2, loss="nce")
    finetune.finetune(tmp_path / "whole", model, config, *digits)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stopped):
            finetune.finetune(tmp_path / "cut", model, config, *digits, checkpoint_minutes=0)
    assert storage.read_header(tmp_path / "cut" / "training.safetensors", training.STATE_KIND)["step"] == step
    torch.manual_seed(99)  # whatever the caller drew before
    finetune.finetune(tmp_path / "cut", model, config, *digits)
    whole, continued = (weights_of(tmp_path / name) for name in ("whole", "cut"))
    assert continued[1] == whole[1]
    assert all(torch.equal(tensor, continued[0][name]) for name, tensor in whole[0].items())
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert not (tmp_path / "cut" / "training.safetensors").exists()


def test_a_finished_finetuning_is_returned_and_another_refused(digits, model, tmp_path, monkeypatch):
    found = finetune.finetune(tmp_path, model, CONFIG, *digits)
    stop_at(monkeypatch, 0)  # no step may be taken
    again = finetune.finetune(tmp_path, model, CONFIG, *digits)
    assert torch.equal(found.model.classifier.weight, again.model.classifier.weight)
    assert again.log == found.log
    with pytest.raises(ValueError, match=r"another training \(loss: 'ce' there, 'nce' now\)"):
        finetune.finetune(tmp_path, model, changed(loss="nce"), *digits)
    with pytest.raises(ValueError, match=r"r: None there, 4 now"):
        finetune.finetune(tmp_path, model, CONFIG, *digits, adapter={"r": 4})
    torch.manual_seed(1)
    another = ContrastiveModel(model.config)
    with pytest.raises(ValueError, match=r"another training \(weights: "):
        finetune.finetune(tmp_path, another, CONFIG, *digits)
    labels = digits[0].labels.roll(1)
    noisy = ImageSet.of(digits[0].images, labels, digits[0].class_names, (digits[0].mean, digits[0].std))
    with pytest.raises(ValueError, match=r"another training \(data: "):
        finetune.finetune(tmp_path, model, CONFIG, noisy, digits[1])


def test_another_seed_gives_another_model(digits, model, tmp_path):
    one, other = (finetune.finetune(tmp_path / str(s), model, changed(seed=s, epochs=1), *digits) for s in (1, 2))
    assert not torch.equal(one.model.classifier.weight, other.model.classifier.weight)


@pytest.mark.parametrize(
    "settings", [{}, {"loss": "nce"}, {"held_out": 0.3}, {"monitor_epochs": 3}, {"layer": "backbone"}]
)
@pytest.mark.parametrize("learning_rate", [1e10, 1e18])
def test_a_finetuning_that_diverges_stops(learning_rate, settings, digits, model, tmp_path):
    with pytest.raises(FloatingPointError, match=r"diverged in epoch \d: .*Lower learning_rate \(here 1e\+1"):
        finetune.finetune(tmp_path, model, changed(learning_rate=learning_rate, **settings), *digits)
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_that_break_in_the_last_step_are_noticed(digits, model, tmp_path):
    """One step: its loss is that of the pretrained weights, and the weights after it are infinite."""
    config = changed(epochs=1, batch_size=150, learning_rate=3e38)
    with pytest.raises(FloatingPointError, match=r"diverged in epoch 1: .* NaN or infinite"):
        finetune.finetune(tmp_path, model, config, *digits)


def test_accuracies_and_features_that_are_not_finite_are_no_numbers(digits, model):
    torch.manual_seed(0)
    classifier = finetune.Classifier(model, CONFIG, 10)
    with torch.no_grad():
        classifier.projector[2].bias.fill_(10.0)
        classifier.classifier.weight.fill_(3e38)  # finite, and the logits are not
    with pytest.raises(FloatingPointError, match="the logits of image 0 has values that are NaN or infinite"):
        finetune.accuracy(classifier, digits[1])
    with torch.no_grad():
        classifier.projector[2].bias[3] = torch.inf
    with pytest.raises(FloatingPointError, match="the features of image 0"):
        finetune.embed(classifier, digits[1])


def test_two_processes_never_finetune_in_one_folder(digits, model, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="Another process is working in"):
        finetune.finetune(tmp_path, model, CONFIG, *digits)


def test_images_that_are_normalised_otherwise_are_refused(digits, model, tmp_path):
    train, validation = digits
    other = ImageSet.of(train.images, train.labels, train.class_names)
    with pytest.raises(ValueError, match="validation has another normalisation or size than train"):
        finetune.finetune(tmp_path, model, CONFIG, other, validation)
    finetune.finetune(tmp_path, model, CONFIG, train, validation)
    both = (ImageSet.of(one.images, one.labels, one.class_names) for one in digits)
    with pytest.raises(ValueError, match=r"another training \(mean: .* there, .* now"):
        finetune.finetune(tmp_path, model, CONFIG, *both)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "mse"}, "loss is 'mse'; it must be one of ce, nce"),
        ({"layer": "output"}, "layer is 'output'; it must be one of projector, backbone"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"monitor_epochs": 0}, "monitor_epochs is 0; it must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it must be at least 0"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"held_out": 1.0}, r"held_out is 1.0; it must be in \[0, 1\)"),
        ({"held_out": 0.001}, "held_out is 0.001 of 150 images, which leaves 0"),
        ({"milestones": (1.5,)}, "milestones is"),
        ({"views": {"size": 8}}, "views is {'size': 8}, settings of SimCLRViews"),
        ({"batch_size": 151}, "batch_size is 151 for 150 images"),
        ({"batch_size": 140, "held_out": 0.2}, "batch_size is 140 for 120 images"),
    ],
)
def test_bad_settings_are_named(settings, message, digits, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune.finetune(tmp_path, model, changed(**settings), *digits)
    assert not list(tmp_path.iterdir())


def test_other_classes_in_validation_are_refused(digits, model, tmp_path):
    train, validation = digits
    other = ImageSet.of(validation.images, validation.labels, [f"class {i}" for i in range(11)])
    with pytest.raises(ValueError, match="validation has 11 classes and train 10"):
        finetune.finetune(tmp_path, model, CONFIG, train, other)


PROGRAM = """
import sys, torch
from accelerate import Accelerator
from vision_bench import finetune
from vision_bench.data import load_images
from vision_bench.models import ContrastiveModel, ModelConfig
torch.set_num_threads(1)
train, test = load_images("digits", "train").subset(torch.arange(200)), load_images("digits", "test")
torch.manual_seed(0)
model = ContrastiveModel(ModelConfig(backbone="small_conv", projector_hidden=32, projector_out=16))
config = finetune.FinetuneConfig(loss="nce", epochs=20, batch_size=32, learning_rate=0.05, held_out=0.2)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == int(sys.argv[2])
finetune.finetune(sys.argv[1], model, config, train, test, accelerator, checkpoint_minutes=0)
"""


@pytest.mark.slow
def test_a_killed_process_continues_to_the_same_bits(tmp_path):
    def command(name):
        return [sys.executable, "-c", PROGRAM, str(tmp_path / name), "1"]

    subprocess.run(command("whole"), check=True)
    process = subprocess.Popen(command("killed"))
    while not (tmp_path / "killed" / "log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    subprocess.run(command("killed"), check=True)
    whole, continued = (weights_of(tmp_path / name) for name in ("whole", "killed"))
    assert whole[1] == continued[1]
    assert all(torch.equal(tensor, continued[0][name]) for name, tensor in whole[0].items())


@pytest.mark.slow
def test_two_processes_finetune_one_model(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(tmp_path / "program.py"), str(tmp_path / "two"), "2"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-4000:]
    log = log_of(tmp_path / "two")
    assert [row["epoch"] for row in log] == list(range(1, 21))
    assert log[-1]["loss"] < log[0]["loss"]
    assert weights_of(tmp_path / "two")[1]["epoch"] == max(log, key=lambda row: row["held_out_top1"])["epoch"]


DIVERGING = """
import dataclasses
for rate in (1e10, 0.05):
    settings = dataclasses.replace(config, learning_rate=rate, epochs=2)
    try:
        finetune.finetune(f"{sys.argv[1]}/{rate:g}", model, settings, train, test, accelerator)
    except FloatingPointError as error:
        print(f"process {accelerator.process_index} of {accelerator.num_processes}: {error}", flush=True)
"""


@pytest.mark.slow
def test_two_processes_notice_a_divergence_together_and_go_on(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM.replace("finetune.finetune(sys", "# (") + DIVERGING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(tmp_path / "program.py"), str(tmp_path / "two"), "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    for process in (0, 1):
        assert f"process {process} of 2: The training diverged in epoch 1: " in result.stdout
    assert not (tmp_path / "two" / "1e+10" / "model.safetensors").exists()
    assert (tmp_path / "two" / "0.05" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_pretrained_model_finetunes_better_than_an_untrained_one(tmp_path):
    train, test = load_images("digits", "train"), load_images("digits", "test")
    config = ModelConfig(backbone="small_conv", projector_hidden=128, projector_out=64)
    views = {"crop_scale": [0.4, 1.0], "flip_probability": 0.0, "blur_probability": 0.0}
    settings = pretrain.PretrainConfig(epochs=10, batch_size=128, warmup_epochs=1, views=views)
    pretrained = pretrain.pretrain(tmp_path / "model", config, settings, train).model
    torch.manual_seed(0)
    few, found = train.subset(torch.arange(100)), {}
    for name, start in (("pretrained", pretrained), ("untrained", ContrastiveModel(config))):
        made = finetune.finetune(tmp_path / name, start, changed(epochs=8, views=None), few, test)
        found[name] = made.log[-1]["validation_top1"]
    assert found["pretrained"] > found["untrained"] + 0.05
