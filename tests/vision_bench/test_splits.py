"""Training and test images together: the same classes, other splits, a share of one, and images in both."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from picture_files import features, make_folder, rows, save_splits

from vision_bench.data import load_images, load_splits

needs_data = pytest.mark.skipif("MONO_TEST_DATA" not in os.environ, reason="MONO_TEST_DATA, real images, is not set")


def test_classes_without_any_image_are_dropped_by_name(tmp_path):
    """As of a filtered set, which keeps all names."""
    import datasets

    names = datasets.ClassLabel(names=[f"class {i}" for i in range(1000)])
    place = save_splits(tmp_path / "s", train=[7, 500, 7, 999, 500], test=[999, 7, 500], label=names)
    with pytest.warns(UserWarning, match=r"997 of the 1000 classes of .* have no image and are dropped: class 0, "):
        train, test = load_splits(place)
    assert train.class_names == test.class_names == ["class 7", "class 500", "class 999"]
    assert train.labels.tolist() == [0, 1, 0, 2, 1]
    assert test.labels.tolist() == [2, 0, 1]
    assert train.class_numbers == (7, 500, 999)
    assert train.subset(torch.tensor([3, 0])).class_numbers == (7, 500, 999)


def test_labels_from_1_and_with_gaps(tmp_path):
    """Without names of classes; the class of the highest number has no test image."""
    place = save_splits(tmp_path / "s", train=[1, 2, 4, 5, 5], validation=[4, 2, 1])
    with warnings.catch_warnings(record=True) as caught:
        train, test = load_splits(place)
    words = [str(warning.message) for warning in caught]
    assert any("2 of the 6 classes" in line and line.endswith("dropped: 0, 3") for line in words)
    assert any("1 of the 6 classes" in line and line.endswith("no test image: 5") for line in words)
    assert train.class_names == test.class_names == ["1", "2", "4", "5"]
    assert train.labels.tolist() == [0, 1, 2, 3, 3]
    assert test.labels.tolist() == [2, 1, 0]


def test_splits_with_other_classes_are_refused_by_name(tmp_path):
    import datasets

    place = save_splits(tmp_path / "s", train=[0, 1, 1], test=[0, 2, 3], label=datasets.ClassLabel(names=list("wxyz")))
    with pytest.raises(ValueError, match=r"2 classes of .* have test images and no training image: y, z;"):
        load_splits(place)
    make_folder(tmp_path / "f", splits=("train",), classes=("cat", "dog", "emu"))
    make_folder(tmp_path / "f", splits=("test",), classes=("Cat", "dog"))
    with pytest.raises(ValueError, match=r"only the training split has cat, emu; only the test split has Cat\."):
        load_splits(str(tmp_path / "f"))
    kinds = [datasets.ClassLabel(names=names) for names in (["x", "y"], ["y", "x"])]
    made = {
        split: datasets.Dataset.from_dict(rows([0, 1]), features=features(kind))
        for split, kind in zip(("train", "test"), kinds, strict=True)
    }
    for split, part in made.items():
        part.to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(ValueError, match=r"in another order: x, y; and y, x"):
        load_splits(str(tmp_path))


def test_test_images_that_are_training_images_are_counted(tmp_path):
    made = make_folder(tmp_path)
    copied, same = made[2][0], made[14][0]
    same.write_bytes(copied.read_bytes())
    for limit in (0, 2**30):
        with pytest.warns(UserWarning, match=r"^1 of the 12 test images of .* are training images too"):
            load_splits(str(tmp_path), memory_limit=limit)
    with pytest.raises(ValueError, match=r"all test images of .* train_split 'val' and test_split 'test'"):
        load_splits(str(tmp_path), train_split="val")


@needs_data
def test_cifar100_has_ten_test_images_that_are_training_images():
    root = Path(os.environ["MONO_TEST_DATA"]) / "cifar100"
    with pytest.warns(UserWarning, match="10 of the 10000 test images of cifar100 are training images too"):
        train, test = load_splits("cifar100", root, memory_limit=0)
    assert (len(train), len(test)) == (50_000, 10_000)


def test_hidden_labels_are_named_with_what_to_do(tmp_path):
    place = save_splits(tmp_path / "s", train=[0, 1, 0, 1], validation=[1, 0], test=[-1, -1, -1])
    with pytest.raises(
        ValueError, match=r"split test\) has labels from -1 to -1: 3 of 3 are -1.*test_split.*test_frac"
    ):
        load_splits(place)
    train, test = load_splits(place, test_split="validation")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 0, 1], [1, 0])


def test_a_fraction_of_a_set_with_one_split(tmp_path):
    place = save_splits(tmp_path / "s", train=[0, 1] * 10)
    with pytest.raises(ValueError, match=r"split is 'test'; .* splits train\. .*test_fraction .* draws"):
        load_splits(place)
    train, test = load_splits(place, test_fraction=0.2)
    whole = load_images(place, "train")
    assert test.labels.bincount().tolist() == [2, 2]
    assert train.labels.bincount().tolist() == [8, 8]
    assert sorted([*train.digests.tolist(), *test.digests.tolist()]) == sorted(whole.digests.tolist())
    again = load_splits(place, test_fraction=0.2, memory_limit=0)
    assert [part.fingerprint for part in again] == [train.fingerprint, test.fingerprint]
    with pytest.raises(ValueError, match=r"test_fraction is 1; it must be in \(0, 1\)"):
        load_splits(place, test_fraction=1)
    with pytest.raises(ValueError, match=r"test_fraction is 0.2 and test_split 'validation'; give one of them"):
        load_splits(place, test_fraction=0.2, test_split="validation")
    with pytest.raises(ValueError, match=r"test_fraction is 0.01 of 20 images: .* class 0 has 10 samples"):
        load_splits(place, test_fraction=0.01)
    make_folder(tmp_path / "one", splits=("val",))
    with pytest.warns(UserWarning, match="has no split called train; val, its only one, is read"):
        train, test = load_splits(str(tmp_path / "one"), test_fraction=0.5)
    assert (train.labels.bincount().tolist(), test.labels.bincount().tolist()) == ([2, 2, 2], [2, 2, 2])
    make_folder(tmp_path / "f", splits=(".",))
    with pytest.raises(ValueError, match=r"the folders cat, dog, emu; if these are classes, the split is '\.'"):
        load_splits(str(tmp_path / "f"), test_fraction=0.25)
    train, test = load_splits(str(tmp_path / "f"), train_split=".", test_fraction=0.25)
    assert (train.labels.bincount().tolist(), test.labels.bincount().tolist()) == ([3, 3, 3], [1, 1, 1])


def test_a_saved_set_without_splits_is_no_test_set(tmp_path):
    """Its images would be both training and test images."""
    import datasets

    made = datasets.Dataset.from_dict(rows([0, 1, 0]), features=features(datasets.Value("int64")))
    made.save_to_disk(str(tmp_path / "saved"))
    assert len(load_images(str(tmp_path / "saved"), "train")) == len(load_images(str(tmp_path / "saved"), ".")) == 3
    with pytest.raises(ValueError, match=r"split is 'test'; .* has the splits train"):
        load_images(str(tmp_path / "saved"), "test")


def test_a_missing_split_is_named_before_any_image_is_read(tmp_path):
    for path, *_ in make_folder(tmp_path, splits=("train",)):
        path.write_text("no image")
    with pytest.raises(ValueError, match=r"split is 'test'; .* has the folders train\. train_split and test_split"):
        load_splits(str(tmp_path))
