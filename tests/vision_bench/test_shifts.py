"""Shifted test images: synthetic ones against loops, folders and arrays from real files, and what is refused."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from vision_bench import shifts
from vision_bench.corruptions import shift_names
from vision_bench.data import ImageSet, StreamedImages, load_images

COLOURS = {"cat": (250, 10, 10), "dog": (10, 250, 10), "emu": (10, 10, 250), "fox": (120, 120, 120)}


def training_set(names=("cat", "dog", "emu"), side=8):
    images = torch.randint(256, (len(names), 3, side, side), dtype=torch.uint8)
    return ImageSet.of(images, torch.arange(len(names)), names, ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))


def make_folder(root, names, per_class=2, shape=(10, 12)):
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            Image.new("RGB", shape, COLOURS[name]).save(root / name / f"{i}.png")
    return root


def make_corruptions(folder, names=("fog", "snow", "spatter"), per_severity=6, classes=3, side=8):
    """Arrays in the format of CIFAR-C whose every pixel is 50 * corruption + 10 * severity + image."""
    folder.mkdir()
    for c, name in enumerate(names):
        values = [50 * c + 10 * s + i for s in range(1, 6) for i in range(per_severity)]
        np.save(
            folder / f"{name}.npy", np.array(values, np.uint8)[:, None, None, None] * np.ones((side, side, 3), "u1")
        )
    np.save(folder / "labels.npy", np.tile(np.arange(per_severity) % classes, 5))
    return folder


def test_synthetic_shifts_keep_labels_and_equal_slow_twins():
    digits = load_images("digits", "test").subset(torch.arange(12))
    changed = {kind: shifts.synthetic(kind, digits) for kind in shift_names()}
    for images in changed.values():
        assert torch.equal(images.labels, digits.labels)
        assert images.images.dtype == torch.uint8
        assert (images.mean, images.std) == (digits.mean, digits.std)
    assert len({images.fingerprint for images in (digits, *changed.values())}) == 4
    assert torch.equal(changed["inverted"].images.int() + digits.images, torch.full(digits.images.shape, 255).int())

    # Turned counter-clockwise: each pixel is interpolated from four around its source; rows count downwards.
    grey, angle = digits.images[3, 0].numpy().astype(float), math.radians(25)
    expected = np.zeros((8, 8))
    for y, x in itertools.product(range(8), repeat=2):
        right, down = x - 3.5, y - 3.5
        source_x = math.cos(angle) * right - math.sin(angle) * down + 3.5
        source_y = math.sin(angle) * right + math.cos(angle) * down + 3.5
        for j, i in itertools.product((math.floor(source_y), math.floor(source_y) + 1), (0, 1)):
            i += math.floor(source_x)
            if 0 <= i < 8 and 0 <= j < 8:
                expected[y, x] += (1 - abs(source_x - i)) * (1 - abs(source_y - j)) * grey[j, i]
    np.testing.assert_allclose(changed["rotated"].images[3, 0].numpy(), expected, atol=0.51)

    # 8 pixels enlarged to 32, the least value within 2 to each side, means of 4 x 4.
    fine = torch.nn.functional.interpolate(digits.images[5:6, :1].float(), size=(32, 32), mode="bilinear")[0, 0]
    least = np.array(
        [[float(fine[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].min()) for x in range(32)] for y in range(32)]
    )
    expected = least.reshape(8, 4, 8, 4).mean(axis=(1, 3)).round()
    np.testing.assert_array_equal(changed["thinned"].images[5, 0].numpy(), expected)
    with pytest.raises(ValueError, match="kind is 'mirrored'; it must be one of rotated, inverted, thinned"):
        shifts.synthetic("mirrored", digits)
    assert torch.equal(shifts.synthetic("rotated", digits, 25).images, changed["rotated"].images)
    assert not torch.equal(shifts.synthetic("rotated", digits, 10).images, changed["rotated"].images)
    with pytest.raises(ValueError, match=r"strength is 0.7; for thinned it must be in \(0, 0.5\)"):
        shifts.synthetic("thinned", digits, 0.7)
    with pytest.raises(ValueError, match="strength is 3; inverted takes none"):
        shifts.synthetic("inverted", digits, 3)


@pytest.mark.parametrize("memory_limit", [2**30, 0])
def test_a_folder_of_class_folders_is_restricted_to_the_training_classes(tmp_path, memory_limit):
    like = training_set()
    # A neighbour that load_images would take for another data set must not matter.
    (tmp_path / "cifar-10-batches-py").mkdir()
    folder = make_folder(tmp_path / "sketch", ["emu", "fox", "dog", "cat"])
    found = shifts.load_shifted(folder, like, memory_limit=memory_limit)
    assert isinstance(found.images, StreamedImages) == (memory_limit == 0)
    assert found.images[:].shape == (6, 3, 8, 8)
    assert found.class_names == like.class_names
    assert (found.mean, found.std) == (like.mean, like.std)
    for image, label in zip(found.images[:], found.labels.tolist(), strict=True):
        assert tuple(image[:, 4, 4].tolist()) == COLOURS[like.class_names[label]]
    assert shifts.load_shifted(folder, like).fingerprint == shifts.load_shifted(str(folder), like).fingerprint


def test_a_class_map_renames_and_joins_classes(tmp_path):
    like = training_set(("pet", "bird"))
    folder = make_folder(tmp_path / "ood" / "val", ["cat", "dog", "emu", "fox"]).parent
    found = shifts.load_shifted(folder, like, class_map={"cat": "pet", "dog": "pet", "emu": "bird"})
    assert found.labels.bincount().tolist() == [4, 2]
    assert set(found.images[found.labels == 1][:, 2, 0, 0].tolist()) == {250}
    split = shifts.load_shifted(folder, like, split="val", class_map={"fox": "pet", "emu": "bird"})
    assert split.labels.bincount().tolist() == [2, 2]


def test_a_saved_hugging_face_set_serves_too(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [Image.new("RGB", (8, 8), COLOURS[n]) for n in ("dog", "cat", "emu", "fox")],
        "label": [1, 0, 2, 3],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))})
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "set")
    found = shifts.load_shifted(tmp_path / "set", training_set(), split="train")
    assert found.labels.tolist() == [1, 0, 2]
    with pytest.raises(ValueError, match=r"split is 'test'; .* has the splits train"):
        shifts.load_shifted(tmp_path / "set", training_set())


def test_classes_that_do_not_fit_are_listed(tmp_path):
    folder = make_folder(tmp_path / "ood", ["dog", "fox"])
    with pytest.raises(
        ValueError, match=r"2 of the 3 classes .* left without images of .*ood: cat, emu\. It has the "
    ):
        shifts.load_shifted(folder, training_set())
    with pytest.raises(ValueError, match="It has the classes dog, fox; a class_map says which is which"):
        shifts.load_shifted(folder, training_set())
    with pytest.raises(ValueError, match=r"1 of the 2 classes .* left without images of .*: cat"):
        shifts.load_shifted(folder, training_set(("cat", "dog")), class_map={"dog": "dog", "fox": "dog"})
    with pytest.raises(ValueError, match=r"class_map has the classes wolf; .* has dog, fox"):
        shifts.load_shifted(folder, training_set(), class_map={"wolf": "dog"})
    with pytest.raises(ValueError, match="class_map leads to bear; the training set has the classes cat, dog, emu"):
        shifts.load_shifted(folder, training_set(), class_map={"fox": "bear"})
    with pytest.raises(ValueError, match="several classes of the same name"):
        shifts.load_shifted(folder, training_set(("dog", "dog")))
    with pytest.raises(ValueError, match="nor a folder"):
        shifts.load_shifted(tmp_path / "absent", training_set())
    wide = training_set()
    wide = ImageSet.of(torch.zeros(3, 3, 8, 9, dtype=torch.uint8), wide.labels, wide.class_names)
    with pytest.raises(ValueError, match="training images have 8 x 9 pixels; give image_size"):
        shifts.load_shifted(folder, wide)


def test_every_corruption_and_severity_is_its_part_of_the_array(tmp_path):
    like = training_set()
    found = shifts.load_corruptions(make_corruptions(tmp_path / "c"), like)
    assert list(found.files) == ["fog", "snow", "spatter"]
    for c, name in enumerate(found.files):
        for severity in (1, 3, 5):
            images = found.load(name, severity)
            assert images.images.shape == (6, 3, 8, 8)
            assert images.images[:, 1, 2, 3].tolist() == [50 * c + 10 * severity + i for i in range(6)]
            assert images.labels.tolist() == [0, 1, 2, 0, 1, 2]
            assert (images.class_names, images.mean) == (like.class_names, like.mean)
    enlarged = shifts.load_corruptions(tmp_path / "c", training_set(side=16)).load("snow", 2)
    assert enlarged.images.shape == (6, 3, 16, 16)
    assert enlarged.images[4, 0, 0, 0] == 74
    other = make_corruptions(tmp_path / "d", names=("fog", "snow", "zoom_blur"))
    assert shifts.load_corruptions(other, like).fingerprint != found.fingerprint


def test_a_pair_of_arrays_is_a_test_set(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "cifar10.1_v6_data.npy", images)
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.array([2, 1, 0, 0, 1, 2], dtype=np.int32))
    found = shifts.load_arrays(tmp_path / "cifar10.1_v6_data.npy", training_set())
    assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), images)
    assert found.labels.tolist() == [2, 1, 0, 0, 1, 2]


def test_every_pixel_of_the_arrays_decides_the_fingerprint(tmp_path):
    before = shifts.load_corruptions(make_corruptions(tmp_path / "c", per_severity=60), training_set())
    fog = np.load(tmp_path / "c/fog.npy")
    fog[201, 3, 4, 1] ^= 1
    np.save(tmp_path / "c/fog.npy", fog)
    assert shifts.load_corruptions(tmp_path / "c", training_set()).fingerprint != before.fingerprint


def test_arrays_are_matched_by_the_number_that_a_class_had_before_others_were_dropped(tmp_path):
    like = training_set(("cat", "dog", "emu", "fox")).subset(torch.tensor([1, 3])).with_classes(torch.tensor([1, 3]))
    assert (like.class_names, like.labels.tolist()) == (["dog", "fox"], [0, 1])
    np.save(tmp_path / "x_data.npy", np.zeros((3, 8, 8, 3), np.uint8))
    np.save(tmp_path / "x_labels.npy", np.array([3, 1, 3]))
    assert shifts.load_arrays(tmp_path / "x_data.npy", like).labels.tolist() == [1, 0, 1]
    np.save(tmp_path / "x_labels.npy", np.array([0, 1, 3]))
    with pytest.raises(ValueError, match=r"has the labels 0; the training set has 2 classes: 1 \(dog\), 3 \(fox\)"):
        shifts.load_arrays(tmp_path / "x_data.npy", like)


def test_shifted_images_that_are_training_images_are_counted(tmp_path):
    folder = make_folder(tmp_path / "photos/train", ["cat", "dog"])
    like = load_images(str(tmp_path / "photos"), "train")
    make_folder(tmp_path / "shift", ["cat", "dog"], shape=(12, 14))
    (tmp_path / "shift/cat/1.png").write_bytes((folder / "cat/1.png").read_bytes())
    like = load_images(str(tmp_path / "photos"), "train", image_size=8)
    with pytest.warns(UserWarning, match=r"1 of the 4 images of .*shift are training images too"):
        shifts.load_shifted(tmp_path / "shift", like)
    with pytest.raises(ValueError, match=r"all 4 images of .*train are training images"):
        shifts.load_shifted(folder, like)


def test_a_class_that_is_left_with_broken_images_only_is_named(tmp_path):
    folder = make_folder(tmp_path / "shift", ["cat", "dog", "emu"])
    for i in range(2):
        (folder / f"dog/{i}.png").write_text("no image")
    with (
        pytest.warns(UserWarning, match="cannot be decoded"),
        pytest.raises(ValueError, match=r"left without .*: dog"),
    ):
        shifts.load_shifted(folder, training_set(), skip_corrupt=True)


class Trap:
    def __reduce__(self):
        return (open, ("sprung", "w"))


def test_pickled_arrays_are_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_corruptions(tmp_path / "c")
    np.save(folder / "fog.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"fog.npy is not a plain array"):
        shifts.load_corruptions(folder, training_set())
    (folder / "fog.npy").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"fog.npy is not a plain array"):
        shifts.load_corruptions(folder, training_set())
    assert not (tmp_path / "sprung").exists()


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    folder = make_corruptions(tmp_path / "c")
    with pytest.raises(ValueError, match=r"1 of the 4 classes .* without images of .*: fox"):
        shifts.load_corruptions(folder, training_set(tuple(COLOURS)))
    with pytest.raises(ValueError, match=r"has the labels 2; the training set has 2 classes: 0 \(cat\), 1 \(dog\)"):
        shifts.load_corruptions(folder, training_set(("cat", "dog")))
    np.save(folder / "fog.npy", np.zeros((29, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"fog.npy has 29 images for the 30 labels"):
        shifts.load_corruptions(folder, training_set())
    np.save(folder / "fog.npy", np.zeros((30, 3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"fog.npy is uint8 \(30, 3, 8, 8\); it must be uint8 \(n, h, w, 3\)"):
        shifts.load_corruptions(folder, training_set())
    np.save(folder / "labels.npy", np.arange(30) % 3 * (np.arange(30) > 5))
    with pytest.raises(ValueError, match="not those of the same images 5 times"):
        shifts.load_corruptions(folder, training_set())
    np.save(folder / "labels.npy", np.zeros(30))
    with pytest.raises(TypeError, match="dtype float64; labels are integers"):
        shifts.load_corruptions(folder, training_set())
    np.save(folder / "labels.npy", np.zeros((30, 2), int))
    with pytest.raises(ValueError, match=r"shape \(30, 2\)"):
        shifts.load_corruptions(folder, training_set())
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "empty" / "labels.npy", np.tile(np.arange(3), 5))
    with pytest.raises(ValueError, match="no array of a corruption"):
        shifts.load_corruptions(tmp_path / "empty", training_set())

    np.save(tmp_path / "x_data.npy", np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"x_labels.npy is not a plain array"):
        shifts.load_arrays(tmp_path / "x_data.npy", training_set())
    np.save(tmp_path / "x_labels.npy", np.zeros(2, int))
    with pytest.raises(ValueError, match="has 3 images for 2 labels"):
        shifts.load_arrays(tmp_path / "x_data.npy", training_set())
    with pytest.raises(ValueError, match=r"must be called NAME_data.npy"):
        shifts.load_arrays(tmp_path / "x_labels.npy", training_set())
