"""Features are computed once, by a frozen model, and never taken for those of another."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from vision_bench import features, models
from vision_bench.features import embed, extract, load, shards


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


def test_what_becomes_of_the_images_before_the_model_is_in_their_order(model, images):
    seen = []

    def perturb(x):
        seen.append(x)
        return x + 0.1 * len(seen)

    made = embed(model, images.images, images.mean, images.std, batch_size=10, perturb=perturb)["output"]
    assert [len(part) for part in seen] == [10, 10, 3]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images.mean, images.std))
    inputs = (images.images / 255 - mean) / std
    torch.testing.assert_close(torch.cat(seen), inputs)
    shift = 0.1 * (1 + torch.arange(23) // 10).view(-1, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(made, model.eval()(inputs + shift).output, rtol=1e-5, atol=1e-6)
    model.train()


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
        ({"checkpoint": "relu-0"}, "checkpoint: 'relu-.*' there, 'relu-0' wanted"),
        ({"data": "def"}, "data: 'abc' there, 'def' wanted"),
        ({"split": "train"}, "split: 'test' there, 'train' wanted"),
        ({"normalised": True}, "normalised: False there, True wanted"),
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
