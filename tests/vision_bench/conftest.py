"""What `python -m vision_bench` is tested with, and a finished run of it."""

import odd_models  # noqa: F401, which registers the models of these names
import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

from tests.conftest import rows
from vision_bench import features, models
from vision_bench.__main__ import main
from vision_bench.data import load_images
from vision_bench.sweep import ACCURACY

QUICK = ["--limit", "300", "--seeds", "0", "1", "--probe_epochs", "20", "--sae_epochs", "3"]
CORRUPTIONS = ["--corruptions", "label_noise=0.4", "few_shots=0.5", "gaussian=0.5", "rotated"]
SMALL = ["--random_init", "small_conv"]


@pytest.fixture(scope="session")
def ncl_checkpoint(tmp_path_factory):
    """The folder of an untrained NCL model, whose output has 16 dimensions."""
    folder = tmp_path_factory.mktemp("checkpoint") / "ncl"
    torch.manual_seed(0)
    config = models.ModelConfig("small_conv", projector_hidden=24, projector_out=16, non_negative="relu")
    model = models.ContrastiveModel(config)
    train = load_images("digits", "train")
    model(features.normalise(train.images[:256], train.mean, train.std))
    models.save(folder / "model.safetensors", model, {"config": {"epochs": 1, "seed": 0}, "data": "00ff"})
    return folder


@pytest.fixture(scope="session")
def benchmark_run(tmp_path_factory, ncl_checkpoint):
    """A finished benchmark of that model and of a random network."""
    path = tmp_path_factory.mktemp("benchmark") / "run"
    main([str(ncl_checkpoint), "--random_init", "small_conv", "--output_dir", str(path), *QUICK, *CORRUPTIONS])
    return path


def measured(folder, metric=ACCURACY, **arm):
    """The rows of a benchmark, of accuracies if no metric is named."""
    return rows(folder, metric, **arm)


def no_pass(*_):
    """In the place of what must not be called: nothing is measured again."""
    raise AssertionError("a forward pass")


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
