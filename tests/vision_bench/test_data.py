"""Data sets from real files in every format that is read, and the errors of files that are not as they should be."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import as_tensor, features, make_folder, pixels, rows
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from vision_bench.data import (
    IMAGENET100,
    STATISTICS,
    ImageSet,
    StreamedImages,
    load_images,
    stratified_fraction,
)

needs_data = pytest.mark.skipif("MONO_TEST_DATA" not in os.environ, reason="MONO_TEST_DATA, real images, is not set")


def test_digits_need_no_files_and_their_splits_are_disjoint():
    train, test = load_images("digits", "train"), load_images("digits", "test")
    assert train.images.shape == (1437, 3, 8, 8)
    assert test.images.shape == (360, 3, 8, 8)
    assert train.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64
    assert train.class_names == [str(i) for i in range(10)]
    assert train.num_classes == 10
    assert (train.images.min(), train.images.max()) == (0, 255)
    seen = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)
    assert bool((test.labels.bincount() >= 30).all())
    scaled = train.images.float() / 255
    assert scaled.mean().item() == pytest.approx(train.mean[0], abs=1e-4)
    assert scaled.std().item() == pytest.approx(train.std[0], abs=1e-4)
    assert load_images("digits", "train").fingerprint == train.fingerprint != test.fingerprint
    larger = load_images("digits", "val", image_size=16)
    assert larger.images.shape == (360, 3, 16, 16)
    assert torch.equal(larger.labels, test.labels)


@needs_data
def test_cifar100_from_parquet():
    root = Path(os.environ["MONO_TEST_DATA"]) / "cifar100"
    images = load_images("cifar100", "test", root)
    assert images.images.shape == (10_000, 3, 32, 32)
    assert images.num_classes == 100
    assert images.class_names[:3] == ["apple", "aquarium_fish", "baby"]
    assert torch.equal(images.labels.bincount(), torch.full((100,), 100))
    mean, std = STATISTICS["cifar100"]
    scaled = images.images.float() / 255
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.tensor(mean), rtol=0, atol=5e-3)
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.tensor(std), rtol=0, atol=5e-3)
    coarse = load_images("cifar100", "test", root, label_column="coarse_label", memory_limit=0)
    assert coarse.num_classes == 20
    assert torch.equal(coarse.images[100:110], images.images[100:110])
    assert coarse.fingerprint != images.fingerprint


@needs_data
def test_streamed_photographs_equal_those_in_memory():
    folder = str(Path(os.environ["MONO_TEST_DATA"]) / "imagenette224")
    streamed = load_images(folder, "test", image_size=96, memory_limit=10**6)
    assert isinstance(streamed.images, StreamedImages)
    assert streamed.images.shape == (1000, 3, 96, 96)
    assert streamed.class_names[0] == "tench"
    small = streamed.subset(torch.arange(0, 1000, 100))
    assert isinstance(small.images, StreamedImages)
    assert torch.equal(small.images[:], streamed.images[list(range(0, 1000, 100))])
    assert torch.equal(small.labels, streamed.labels[::100])
    image = Image.fromarray(load_images(folder, "val").images[300].permute(1, 2, 0).numpy())
    expected = np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC))
    assert (streamed.images[300].int() - as_tensor(expected).int()).abs().max().item() <= 1


def test_class_folders_in_memory_and_streamed(tmp_path):
    made = make_folder(tmp_path)
    loaded = load_images(str(tmp_path), "train")
    assert loaded.class_names == ["cat", "dog", "emu"]
    assert isinstance(loaded.images, torch.Tensor)
    for i, (_, label, seed) in enumerate(made[:12]):
        assert torch.equal(loaded.images[i], as_tensor(pixels(seed)))
        assert loaded.labels[i] == label
    streamed = load_images("any name", "train", tmp_path, memory_limit=100)
    assert isinstance(streamed.images, StreamedImages)
    assert streamed.images.shape == loaded.images.shape
    assert len(streamed.images) == 12
    for index in (3, -1, slice(2, 9, 3), [5, 0, 5], torch.tensor([7, 7]), torch.arange(12) > 8, slice(0, 0)):
        assert torch.equal(streamed.images[index], loaded.images[index])
    batches = DataLoader(
        streamed.images, batch_size=None, sampler=BatchSampler(SequentialSampler(range(12)), 5, False), num_workers=1
    )
    assert torch.equal(torch.cat(list(batches)), loaded.images)
    validation = load_images(str(tmp_path), "test")  # called val here
    assert torch.equal(validation.images[0], as_tensor(pixels(12)))
    assert loaded.fingerprint == streamed.fingerprint != validation.fingerprint


def test_the_fingerprint_follows_pixels_labels_and_order():
    images = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8)
    labels = torch.arange(20) % 3
    names = ["a", "b", "c"]
    first = ImageSet.of(images, labels, names)
    changed = images.clone()
    changed[7, 1, 2, 3] ^= 1
    prints = {
        first.fingerprint,
        ImageSet.of(changed, labels, names).fingerprint,
        ImageSet.of(images, labels.flip(0), names).fingerprint,
        first.subset(torch.arange(20).flip(0)).fingerprint,
        first.subset(torch.arange(19)).fingerprint,
        ImageSet.of(images, labels, ["a", "b", "d"]).fingerprint,
        ImageSet.of(images, labels, [*names, "d"]).fingerprint,
    }
    assert len(prints) == 7
    assert replace(first, labels=labels.flip(0)).fingerprint in prints
    assert first.subset(torch.arange(20)).fingerprint == first.fingerprint
    assert first.subset(torch.tensor([4, 2])).labels.tolist() == [1, 2]
    assert len(first.subset(torch.tensor([4, 2]))) == 2


def test_every_image_decides_the_fingerprint_held_and_streamed(tmp_path):
    """Also one of many that is replaced by one with the same name, size in bytes and time of change."""
    path = make_folder(tmp_path, splits=("train",), per_class=200, shape=(4, 4))[301][0]
    Image.fromarray(pixels(1, 4, 4)).save(path, "bmp")
    index = 200 + sorted(str(i) for i in range(200)).index("101")  # files are in alphabetical order
    size, times = path.stat().st_size, path.stat().st_mtime_ns

    def fingerprints(change):
        """The one fingerprint of held and streamed images after a change."""
        made = {change(load_images(str(tmp_path), "train", memory_limit=limit)).fingerprint for limit in (0, 2**30)}
        assert len(made) == 1
        return made.pop()

    changes = {
        "none": lambda images: images,
        "labels": lambda images: replace(images, labels=1 - images.labels.clamp(max=1)),
        "subset with it": lambda images: images.subset(torch.arange(index - 5, index + 5)),
        "subset without it": lambda images: images.subset(torch.arange(index + 1, index + 11)),
    }
    before = {name: fingerprints(change) for name, change in changes.items()}
    Image.fromarray(pixels(2, 4, 4)).save(path, "bmp")
    os.utime(path, ns=(times, times))
    assert path.stat().st_size == size
    after = {name: fingerprints(change) for name, change in changes.items()}
    assert len({*before.values(), *after.values()}) == 7
    assert before["subset without it"] == after["subset without it"]


def test_a_subset_of_streamed_images_reads_no_other_file(tmp_path):
    made = make_folder(tmp_path, splits=("train",))
    streamed = load_images(str(tmp_path), "train", memory_limit=0)
    for path, *_ in made[1:]:
        path.unlink()
    assert len(streamed.subset(torch.tensor([0, 5, 9])).fingerprint) == 18


def test_the_same_files_have_one_fingerprint_in_folders_and_in_parquet(tmp_path):
    import datasets

    made = make_folder(tmp_path / "folders", splits=("train",))
    content = {"picture": [{"bytes": path.read_bytes(), "path": None} for path, *_ in made]}
    content["label"] = [label for _, label, _ in made]
    kind = features(datasets.ClassLabel(names=["cat", "dog", "emu"]))
    datasets.Dataset.from_dict(content, features=kind).to_parquet(str(tmp_path / "train.parquet"))
    folders, parquet = (load_images(str(place), "train") for place in (tmp_path / "folders", tmp_path))
    assert folders.fingerprint == parquet.fingerprint


def test_imagenet100_takes_its_classes_out_of_all(tmp_path):
    assert len(set(IMAGENET100)) == 100
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in IMAGENET100)
    make_folder(tmp_path, splits=("val",), classes=[*IMAGENET100, "n00000000"], per_class=1, shape=(2, 2))
    loaded = load_images("imagenet100", "test", tmp_path)
    assert loaded.class_names == sorted(IMAGENET100)
    assert torch.equal(loaded.labels, torch.arange(100))
    with pytest.raises(ValueError, match=r"split is 'train'; .* has the folders val"):
        load_images("imagenet100", "train", tmp_path)
    (tmp_path / "val" / "n02869837").rename(tmp_path / "val" / "other")
    with pytest.raises(ValueError, match="missing: n02869837"):
        load_images("imagenet100", "test", tmp_path)
    with pytest.raises(ValueError, match="root is missing"):
        load_images("imagenet100", "test")


def test_a_name_that_does_not_fit_its_folder_is_refused(tmp_path):
    make_folder(tmp_path, splits=("train",), classes=[f"c{i}" for i in range(11)], per_class=1)
    with pytest.raises(ValueError, match=r"name is 'cifar10', and .* has 11 classes: c0, "):
        load_images("cifar10", "train", tmp_path)
    with pytest.raises(ValueError, match="and digits have none; name the data set there"):
        load_images("digits", "train", tmp_path)


def test_torchvisions_cifar_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    content = np.stack([pixels(seed, 32, 32) for seed in range(6)])
    batch = {"data": content.transpose(0, 3, 1, 2).reshape(6, -1), "fine_labels": [3, 1, 4, 1, 5, 9]}
    names = {"fine_label_names": [f"class {i}" for i in range(100)]}
    for file, value in (("train", batch), ("test", batch), ("meta", names)):
        (folder / file).write_bytes(pickle.dumps(value))
    # The files are not the published ones, so their checksums refuse them before anything is unpickled.
    with pytest.raises(ValueError, match="does not hold cifar100 complete"):
        load_images("cifar100", "train", tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    loaded = load_images("cifar100", "train", tmp_path)
    assert loaded.labels.tolist() == [3, 1, 4, 1, 5, 9]
    assert loaded.class_names[9] == "class 9"
    assert loaded.mean == STATISTICS["cifar100"][0]
    assert torch.equal(loaded.images[2], as_tensor(content[2]))
    assert load_images("cifar100", "test", tmp_path, image_size=16).images.shape == (6, 3, 16, 16)
    with pytest.raises(ValueError, match="name is 'cifar'"):
        load_images("cifar", "train", tmp_path)


def test_names_and_folders_that_are_not_there(tmp_path, monkeypatch):
    import datasets

    def unreachable(name, **_):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"name is 'cifar1O', which is neither digits.*doesn't exist"):
        load_images("cifar1O", "train")
    with pytest.raises(ValueError, match="is not a folder"):
        load_images("cifar100", "train", tmp_path / "missing")
    with pytest.raises(ValueError, match=r"split is 'train'; .* has the folders none"):
        load_images(str(tmp_path), "train")
    (tmp_path / "train" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty"):
        load_images(str(tmp_path), "train")
    with pytest.raises(ValueError, match="split is 'holdout'; digits has"):
        load_images("digits", "holdout")
    with pytest.raises(ValueError, match="image_size is 0"):
        load_images("digits", "train", image_size=0)


def test_a_name_of_the_hub_goes_through_datasets(tmp_path, monkeypatch):
    import datasets

    asked = []

    def give(name, **_):
        asked.append(name)
        label = datasets.ClassLabel(names=["x", "y"])
        split = datasets.Dataset.from_dict(rows([1, 0], "fine_label"), features=features(label, "fine_label"))
        return datasets.DatasetDict({"train": split, "test": split})

    monkeypatch.setattr(datasets, "load_dataset", give)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar100").mkdir()  # is not taken for the set
    assert load_images("cifar100", "test").labels.tolist() == [1, 0]
    assert load_images("someone/pictures", "train").labels.tolist() == [1, 0]
    assert asked == ["uoft-cs/cifar100", "someone/pictures"]


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(sum),
    fraction=st.floats(0.01, 1),
    seed=st.integers(0, 2**31),
)
def test_a_stratified_fraction_has_the_share_of_every_class(counts, fraction, seed):
    labels = torch.cat([torch.full((count,), index) for index, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    shares = [round(fraction * count) for count in counts]
    if any(count and not share for count, share in zip(counts, shares, strict=True)):
        with pytest.raises(ValueError, match="would be left with none"):
            stratified_fraction(labels, fraction, torch.Generator().manual_seed(seed))
        return
    chosen = stratified_fraction(labels, fraction, torch.Generator().manual_seed(seed))
    assert torch.bincount(labels[chosen], minlength=len(counts)).tolist() == shares
    assert torch.equal(chosen, chosen.unique())
    assert torch.equal(chosen, stratified_fraction(labels, fraction, torch.Generator().manual_seed(seed)))


def test_every_sample_is_as_likely_and_another_seed_draws_others():
    labels = torch.arange(40) % 4
    drawn = [stratified_fraction(labels, 0.5, torch.Generator().manual_seed(seed)) for seed in range(400)]
    counts = torch.cat(drawn).bincount(minlength=40)
    assert (counts - 200).abs().max().item() < 5 * 10
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    ("labels", "fraction", "error", "words"),
    [
        (torch.tensor([0, 1]), 0.0, ValueError, "fraction is 0.0"),
        (torch.tensor([0, 1]), 1.1, ValueError, "fraction is 1.1"),
        (torch.tensor([0, 1]), float("nan"), ValueError, "fraction is nan"),
        (torch.tensor([0.0, 1.0]), 0.5, TypeError, "labels has dtype torch.float32"),
        (torch.tensor([-1, 0]), 0.5, ValueError, "from -1 to 0"),
    ],
)
def test_bad_fractions_are_refused(labels, fraction, error, words):
    with pytest.raises(error, match=words):
        stratified_fraction(labels, fraction, torch.Generator())


@pytest.mark.parametrize(
    ("images", "labels", "error", "words"),
    [
        (torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), TypeError, "images has dtype torch.float32"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ValueError, r"shape \(2, 1, 4, 4\)"),
        (torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ValueError, "for 2 labels"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]), ValueError, r"must be in \[0, 1\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0.0, 1.0]), TypeError, "labels has dtype"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]).int(), TypeError, "must be int64"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0).long(), ValueError, "images is empty"),
    ],
)
def test_an_image_set_checks_what_it_is_made_of(images, labels, error, words):
    with pytest.raises(error, match=words):
        ImageSet.of(images, labels, ["a", "b"])


def test_images_put_in_the_place_of_others_have_a_fingerprint_of_their_own():
    digits = load_images("digits", "test")
    pixels = digits.images.clone()
    assert replace(digits, images=pixels).fingerprint == digits.fingerprint
    pixels[7, 0, 3, 3] += 1
    changed = replace(digits, images=pixels)
    assert changed.fingerprint != digits.fingerprint
    fresh = ImageSet.of(pixels, digits.labels, digits.class_names, (digits.mean, digits.std))
    assert changed.fingerprint == fresh.fingerprint
    part = torch.tensor([7, 2])
    assert replace(changed.subset(part), labels=torch.tensor([0, 1])).digests.equal(fresh.digests[part])
    assert replace(digits, images=pixels[:3], labels=digits.labels[:3]).digests.equal(fresh.digests[:3])
