"""The images of the recipes: splits, classes and files that are not as usual, and streaming, which changes nothing."""

import io
import json

import pytest
import torch
from finetuning import drawn
from PIL import Image
from pretrain import main
from vision import PretrainingSettings, load_splits

from vision_bench.data import load_images

SMALL = ["--seeds", "0", "--methods", "simclr", "--pretraining_epochs", "2", "--warmup_epochs", "1"]
SMALL += ["--batch_size", "32", "--projector_hidden", "16", "--projector_out", "16"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """96 digits of each split as a data set without names of classes, whose labels are from 1, and two broken rows."""
    import datasets

    splits = {}
    for split, name in (("train", "train"), ("test", "dev")):
        images = load_images("digits", split).subset(torch.arange(96))
        encoded = []
        for pixels in images.images:
            buffer = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "png")
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        encoded[7] = {"bytes": b"no image", "path": None}
        rows = {"image": encoded, "label": (images.labels + 1).tolist()}
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        splits[name] = datasets.Dataset.from_dict(rows, features=kinds)
    folder = tmp_path_factory.mktemp("sets") / "digits"
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return str(folder)


def test_what_is_odd_about_the_images_is_one_line_each(place, tmp_path, capsys):
    settings = PretrainingSettings(str(tmp_path), data=place, test_split="dev")
    with pytest.raises(ValueError, match=r"row 7 of .*skip_corrupt"):
        load_splits(settings)
    settings.skip_corrupt = True
    capsys.readouterr()
    train, test = load_splits(settings).values()
    assert train.class_names == test.class_names == [str(i) for i in range(1, 11)]
    assert (len(train), len(test)) == (95, 95)
    lines = [line for line in capsys.readouterr().err.splitlines() if "arning" in line]
    assert lines == [
        f"Warning: 1 of 96 images cannot be decoded and are left out: row 7 of {place} (train)",
        f"Warning: 1 of 96 images cannot be decoded and are left out: row 7 of {place} (dev)",
        f"Warning: 1 of the 11 classes of {place} have no image and are dropped: 0",
    ]


def test_test_images_of_a_set_with_one_split(place, tmp_path):
    settings = PretrainingSettings(str(tmp_path), data=place, skip_corrupt=True)
    with pytest.raises(ValueError, match=r"splits train, dev\..*in recipes test_from_train"):
        load_splits(settings)
    settings.test_from_train = 0.2
    train, test = load_splits(settings).values()
    assert len(train) + len(test) == 95
    counts = (train.labels.bincount() + test.labels.bincount()).tolist()
    assert test.labels.bincount().tolist() == [round(0.2 * count) for count in counts]


def test_wrong_labels_of_held_and_streamed_images_have_one_fingerprint(place, tmp_path):
    settings = {"data": place, "test_split": "dev", "skip_corrupt": True}
    held, streamed = (
        load_splits(PretrainingSettings(str(tmp_path), memory_gib=gib, **settings))["train"] for gib in (4.0, 0.0)
    )
    assert isinstance(held.images, torch.Tensor) != isinstance(streamed.images, torch.Tensor)
    noisy = [drawn(images, 0.5, seed=0, noise_rate=0.4) for images in (held, streamed)]
    assert noisy[0].fingerprint == noisy[1].fingerprint != drawn(held, 0.5, seed=0).fingerprint


def test_a_run_with_held_images_goes_on_with_streamed_ones(place, tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--data", place, "--test_split", "dev", "--skip_corrupt", *SMALL]
    main(arguments)
    model = tmp_path / "models/simclr-0/model.safetensors"
    written = model.stat().st_mtime_ns
    rows = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").unlink()
    main([*arguments, "--memory_gib", "0"])
    assert model.stat().st_mtime_ns == written  # it was not trained again
    values = [
        {row["metric"]: row["value"] for row in map(json.loads, text.splitlines())}
        for text in (rows, (tmp_path / "results.jsonl").read_text())
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize("changed", ["train", "test"])
def test_a_whole_run_is_refused_for_other_images_at_the_same_place(tmp_path, changed):
    images = load_images("digits", "train").subset(torch.arange(96))
    for split, part in (("train", range(64)), ("test", range(64, 96))):
        for i in part:
            file = tmp_path / "set" / split / images.class_names[int(images.labels[i])] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.images[i].permute(1, 2, 0).numpy()).save(file)
    arguments = ["--output_dir", str(tmp_path / "run"), "--data", str(tmp_path / "set"), *SMALL]
    main(arguments)
    rows = (tmp_path / "run/results.jsonl").read_text()
    main(arguments)
    assert (tmp_path / "run/results.jsonl").read_text() == rows
    file = next((tmp_path / "set" / changed).rglob("*.png"))
    Image.new("RGB", (8, 8)).save(file)
    with pytest.raises(ValueError, match=r"another configuration \(images: {'test': '.*', 'train': '.*'} there"):
        main(arguments)
    assert (tmp_path / "run/results.jsonl").read_text() == rows
