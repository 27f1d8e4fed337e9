"""The command on sets of images that are not as `digits` is: names without images, other splits, broken files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vision_bench import models
from vision_bench.__main__ import main
from vision_bench.data import load_images
from vision_bench.runs import read_rows
from vision_bench.sweep import ACCURACY

QUICK = ["--random_init", "small_conv", "--features", "raw", "--seeds", "0", "--probe_epochs", "2"]


def run(output, *arguments):
    """The rows by metric, test and label noise."""
    main([*QUICK, "--corruptions", "label_noise=0.4", "--output_dir", str(output), *arguments])
    return {
        (row["metric"], row["config"].get("test"), row["config"].get("label_noise")): row["value"]
        for row in read_rows(output / "results.jsonl")
    }


@pytest.fixture(scope="module")
def digit_images():
    """Splits of digits: encoded images and labels."""
    import io

    splits = {}
    for split in ("train", "test"):
        images = load_images("digits", split).subset(torch.arange(200))
        encoded = []
        for pixels in images.images:
            buffer = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "png")
            encoded.append(buffer.getvalue())
        splits[split] = encoded, images.labels.tolist()
    return splits


def save(folder, splits, names, shift=0):
    import datasets

    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    made = {
        split: datasets.Dataset.from_dict(
            {
                "image": [{"bytes": one, "path": None} for one in encoded],
                "label": [label + shift if label >= 0 else label for label in labels],
            },
            features=datasets.Features({"image": datasets.Image(), "label": kind}),
        )
        for split, (encoded, labels) in splits.items()
    }
    datasets.DatasetDict(made).save_to_disk(str(folder))
    return str(folder)


def test_names_of_classes_without_images_change_no_number(tmp_path, digit_images, capsys):
    names = [f"class {i}" for i in range(1000)]
    plain = save(tmp_path / "plain", digit_images, names[300:310])
    filtered = save(tmp_path / "filtered", digit_images, names, shift=300)
    from_one = save(tmp_path / "from_one", digit_images, None, shift=1)
    expected = run(tmp_path / "a", "--dataset", plain)
    capsys.readouterr()
    assert run(tmp_path / "b", "--dataset", filtered) == expected
    lines = [line for line in capsys.readouterr().err.splitlines() if "Warning" in line]
    assert lines == [
        f"Warning: 990 of the 1000 classes of {filtered} have no image and are dropped: "
        f"{', '.join(names[:10])} and 980 more"
    ]
    assert run(tmp_path / "c", "--dataset", from_one) == expected


def test_other_splits_and_a_share_of_one(tmp_path, digit_images):
    hidden = digit_images["test"][0], [-1] * 200
    place = save(tmp_path / "set", {"train": digit_images["train"], "dev": digit_images["test"], "test": hidden}, None)
    with pytest.raises(SystemExit, match=r"200 of 200 are -1.*test_split"):
        run(tmp_path / "a", "--dataset", place)
    named = run(tmp_path / "a", "--dataset", place, "--test_split", "dev")
    plain = save(tmp_path / "plain", digit_images, None)
    assert named == run(tmp_path / "b", "--dataset", plain)
    only_train = save(tmp_path / "only_train", {"train": digit_images["train"]}, None)
    with pytest.raises(SystemExit, match=r"splits train\..*test_fraction .* draws"):
        run(tmp_path / "c", "--dataset", only_train)
    assert run(tmp_path / "c", "--dataset", only_train, "--test_fraction", "0.25").keys() == named.keys()
    rows = [json.loads(line) for line in (tmp_path / "c/results.jsonl").read_text().splitlines()]
    assert {row["config"]["training_images"] for row in rows} == {150}
    assert {row["n"] for row in rows if row["metric"] == ACCURACY} == {50}


def test_a_file_that_cannot_be_decoded(tmp_path, capsys):
    folder = tmp_path / "photos"
    for index, split in enumerate(("train", "test")):
        for label, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(100 * index + 10 * label + i).integers(
                    0, 256, (8, 8, 3), dtype=np.uint8
                )
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    broken = folder / "train/dog/2.png"
    broken.write_bytes(broken.read_bytes()[:80])
    with pytest.raises(SystemExit, match=r"train/dog/2.png is not a readable image.*skip_corrupt"):
        run(tmp_path / "a", "--dataset", str(folder))
    assert run(tmp_path / "a", "--dataset", str(folder), "--skip_corrupt")
    assert f"Warning: 1 of 8 images cannot be decoded and are left out: {broken}" in capsys.readouterr().err


def test_the_images_of_a_checkpoint_of_an_earlier_version_are_unknown(tmp_path):
    """Its fingerprint cannot be that of the images here, even if it was trained on them."""
    model = models.ContrastiveModel(models.ModelConfig("small_conv", projector_hidden=8, projector_out=4))
    models.save(tmp_path / "old/model.safetensors", model, {"data": "0123456789abcdef"})
    main([str(tmp_path / "old"), *QUICK[2:], "--limit", "200", "--corruptions", "--output_dir", str(tmp_path / "run")])
    text = (tmp_path / "run/results.md").read_text()
    assert "0123456789abcdef (of an earlier version, so that they may be the training images here)" in text
