"""Features are computed once, by a frozen model, and never taken for those of another."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vision_bench import features, models
from vision_bench.corruptions import InputNoise, add_input_noise, add_pixel_noise
from vision_bench.features import embed, extract, load, missing, normalise, shards


@dataclass
class Images:
    images: torch.Tensor
    fingerprint: str = "abc"
    mean: tuple = (0.4, 0.5, 0.6)
    std: tuple = (0.2, 0.25, 0.3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = models.ModelConfig(backbone="small_conv", projector_hidden=16, projector_out=8, non_negative="relu")
    made = models.ContrastiveModel(config)
    made(torch.randn(16, 3, 8, 8))  # the statistics of the normalisation are no longer the initial ones
    return made.train()


@pytest.fixture
def images():
    return Images(torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(features, "SHARD_ROWS", 10)


def test_features_equal_one_image_at_a_time_in_eval_mode(model, images, tmp_path, small_shards):
    made = extract(tmp_path, model, images, "test", models.LAYERS, batch_size=4)
    model.eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images.mean, images.std))
    with torch.no_grad():
        one_by_one = [model(((image / 255 - mean) / std)[None]) for image in images.images]
    for layer in models.LAYERS:
        expected = torch.cat([getattr(f, layer) for f in one_by_one])
        torch.testing.assert_close(load(tmp_path, layer, made), expected, rtol=1e-5, atol=1e-6)
    assert [len(part) for part in shards(tmp_path, "output", made)] == [10, 10, 3]


def test_the_model_is_left_bit_identical_and_in_its_mode(model, images, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    extract(tmp_path, model, images, "test")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_rows_are_normalised_on_request(model, images, tmp_path):
    raw = load(tmp_path / "raw", "projector", extract(tmp_path / "raw", model, images, "test", ["projector"]))
    made = extract(tmp_path / "unit", model, images, "test", ["projector"], normalised=True)
    torch.testing.assert_close(load(tmp_path / "unit", "projector", made), F.normalize(raw))


def test_a_stopped_pass_continues_with_the_missing_shards(model, images, tmp_path, small_shards, monkeypatch):
    made = extract(tmp_path, model, images, "test")
    whole = load(tmp_path, "output", made)
    paths = sorted(tmp_path.iterdir())
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match="00001-of-00003"):
        load(tmp_path, "output", made)
    counts = []
    monkeypatch.setattr(features, "embed", lambda m, rows, *rest: counts.append(len(rows)) or embed(m, rows, *rest))
    extract(tmp_path, model, images, "test")
    assert counts == [10]
    assert torch.equal(load(tmp_path, "output", made), whole)


def test_features_of_something_else_are_refused(model, images, tmp_path):
    made = extract(tmp_path, model, images, "test")
    for change, message in (
        ({"checkpoint": "relu-0"}, "checkpoint: 'relu-.*' there, 'relu-0' now"),
        ({"data": "def"}, "data: 'abc' there, 'def' now"),
        ({"split": "train"}, "split: 'test' there, 'train' now"),
        ({"normalised": True}, "normalised: False there, True now"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, "output", replace(made, **change))
    with pytest.raises(ValueError, match="has the layers output, not 'backbone'"):
        load(tmp_path, "backbone", made)
    with torch.no_grad():
        model.projector[0].bias += 1
    with pytest.raises(ValueError, match=r"other features \(checkpoint: "):
        extract(tmp_path, model, images, "test")
    with pytest.raises(ValueError, match=r"layers has \['head'\]; it must be of backbone, projector, output"):
        extract(tmp_path / "new", model, images, "test", ["head"])


def test_a_plain_backbone_has_one_layer_and_no_other(model, images, tmp_path):
    model.eval()
    made = extract(tmp_path / "plain", model.backbone, images, "test")
    assert made.layers == ("backbone",)
    ours = embed(model, images.images, images.mean, images.std, ["backbone"])["backbone"]
    assert torch.equal(load(tmp_path / "plain", "backbone", made), ours)
    assert extract(tmp_path / "ours", model, images, "test").layers == ("output",)
    with pytest.raises(ValueError, match=r"layers has \['output'\]; it must be of backbone"):
        extract(tmp_path / "other", model.backbone, images, "test", ["output"])


def test_noise_on_an_image_follows_from_the_seed_and_its_place(model, images, tmp_path, small_shards):
    noise = InputNoise("gaussian", 0.5, seed=3)
    made = extract(tmp_path, model, images, "test", ["backbone"], batch_size=4, noise=noise)
    statistics = images.mean, images.std
    other_batches = noise.add(normalise(images.images, *statistics), 0, *statistics)
    with torch.no_grad():
        expected = model.eval()(other_batches).backbone
    torch.testing.assert_close(load(tmp_path, "backbone", made), expected, rtol=1e-5, atol=1e-6)
    assert made.noise == "gaussian 0.5 seed 3"
    x = normalise(images.images[7:9], images.mean, images.std)
    assert torch.equal(noise.add(x, 7, *statistics), other_batches[7:9])
    seed = int(np.random.SeedSequence((3, 8)).generate_state(1)[0])
    assert torch.equal(other_batches[8], add_input_noise(x[1], "gaussian", 0.5, torch.Generator().manual_seed(seed)))
    with pytest.raises(ValueError, match=r"noise: 'gaussian 0.5 seed 3' there, None now"):
        extract(tmp_path, model, images, "test", ["backbone"])


def test_noise_on_pixels_is_that_of_the_function_image_by_image(model, images, tmp_path, small_shards):
    statistics = images.mean, images.std
    noise = InputNoise("uniform", 0.3, seed=2, space="pixel")
    normalised = normalise(images.images, *statistics)
    noisy = noise.add(normalised, 0, *statistics)
    seed = int(np.random.SeedSequence((2, 5)).generate_state(1)[0])
    expected = add_pixel_noise(normalised[5], *statistics, "uniform", 0.3, torch.Generator().manual_seed(seed))
    assert torch.equal(noisy[5], expected)
    made = extract(tmp_path, model, images, "test", ["backbone"], batch_size=4, noise=noise)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path, "backbone", made), model.eval()(noisy).backbone)
    assert made.noise == "uniform 0.3 seed 2 on pixels"
    with pytest.raises(ValueError, match="space is 'image'; it must be one of normalised, pixel"):
        InputNoise("uniform", 0.3, space="image")


def test_other_statistics_are_other_features(model, images, tmp_path):
    extract(tmp_path, model, images, "test")
    with pytest.raises(ValueError, match=r"mean: \[0.4, 0.5, 0.6\] there, \[0.5, 0.5, 0.6\] now"):
        extract(tmp_path, model, replace(images, mean=(0.5, 0.5, 0.6)), "test")


def test_what_is_missing_is_known_without_a_pass(model, images, tmp_path, small_shards):
    wanted = features.source(model, images, "test")
    assert missing(tmp_path, wanted)
    extract(tmp_path, model, images, "test")
    assert not missing(tmp_path, wanted)
    next(tmp_path.iterdir()).unlink()
    assert missing(tmp_path, wanted)


@pytest.mark.parametrize(("size", "rows"), [(8, 8192), (32, 8192), (64, 2048), (224, 167), (1024, 32)])
def test_shards_are_smaller_where_images_are_larger(size, rows, model):
    images = Images(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    wanted = features.source(model, images, "test", checkpoint="known")
    assert wanted.shard_rows == rows
    assert wanted.image_size == (size, size)


class NotFinite(torch.nn.Module):
    """A backbone whose feature 1 of an image whose first pixel is above 0.9 is not finite."""

    def __init__(self, value):
        super().__init__()
        self.weight, self.value = torch.nn.Parameter(torch.ones(1)), value

    def forward(self, x):
        z = x.flatten(1)[:, :5] * self.weight
        z[:, 1] = torch.where(x[:, 0, 0, 0] > 0.9, self.value, z[:, 1])
        return z


def test_a_kill_loses_no_more_than_a_shard_and_progress_counts_images(tmp_path, monkeypatch, capsys):
    pixels = torch.randint(0, 256, (70, 3, 512, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    images, passes, model = Images(pixels), [], NotFinite(0.0)

    def outputs(model, x):
        passes.append(len(x))
        if sum(passes) > 40:
            raise KeyboardInterrupt
        return real(model, x)

    real = models.outputs
    with monkeypatch.context() as patch:
        patch.setattr(models, "outputs", outputs)
        with pytest.raises(KeyboardInterrupt):
            extract(tmp_path, model, images, "test", batch_size=8, progress=True)
    assert len(list(tmp_path.iterdir())) == 1  # of three shards of 32, 32 and 6 images
    shown = capsys.readouterr().err
    assert "| 40/70 " in shown
    assert "image/s" in shown or "s/image" in shown
    counts = []
    monkeypatch.setattr(features, "embed", lambda m, rows, *rest: counts.append(len(rows)) or embed(m, rows, *rest))
    extract(tmp_path, model, images, "test", batch_size=8)
    assert counts == [32, 6]


def test_a_fingerprint_that_is_given_is_not_computed_again(model, images, tmp_path, monkeypatch):
    checkpoint = models.fingerprint(model)
    monkeypatch.setattr(models, "fingerprint", lambda _: pytest.fail("the weights were hashed again"))
    made = extract(tmp_path, model, images, "test", checkpoint=checkpoint)
    assert made.checkpoint == checkpoint
    assert features.source(model, images, "test", checkpoint=checkpoint) == made


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_features_that_are_not_finite_are_refused_with_the_image(value, images, tmp_path, small_shards):
    plain = replace(images, images=images.images // 2, mean=(0.0,) * 3, std=(1.0,) * 3)
    plain.images[13, 0, 0, 0] = 255
    message = "the backbone of image 13 has values that are NaN or infinite"
    with pytest.raises(FloatingPointError, match=message):
        embed(NotFinite(value), plain.images, plain.mean, plain.std, batch_size=4)
    with pytest.raises(FloatingPointError, match=f"^test: {message}"):
        extract(tmp_path, NotFinite(value), plain, "test", batch_size=4)
    assert [path.name for path in tmp_path.iterdir()] == ["00000-of-00003.safetensors"]


class ChangingWidth(torch.nn.Module):
    """A backbone whose features are as many as a batch has images, or are maps."""

    def __init__(self, maps=False):
        super().__init__()
        self.weight, self.maps = torch.nn.Parameter(torch.ones(1)), maps

    def forward(self, x):
        return x * self.weight if self.maps else self.weight.expand(len(x), len(x))


def test_features_of_changing_size_are_refused(images, tmp_path, small_shards):
    with pytest.raises(ValueError, match=r"shape \(3, 3\) for images of \(3, 3, 8, 8\); it must be .*here \(3, 4\)"):
        embed(ChangingWidth(), images.images[:11], images.mean, images.std, batch_size=4)
    with pytest.raises(ValueError, match=r"the backbone of the model gives features of the shape \(4, 3, 8, 8\)"):
        embed(ChangingWidth(maps=True), images.images, images.mean, images.std, batch_size=4)
    made = extract(tmp_path, ChangingWidth(), images, "test", batch_size=16)  # shards of 10, 10 and 3 images
    with pytest.raises(ValueError, match="features of 10 and of 3 dimensions"):
        load(tmp_path, "backbone", made)
