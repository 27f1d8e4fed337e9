"""Data sets from real files in every format that is read, and the errors of files that are not as they should be."""

import io
import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from vision_bench.data import (
    IMAGENET100,
    STATISTICS,
    ImageSet,
    StreamedImages,
    load_images,
    load_splits,
    stratified_fraction,
)

needs_data = pytest.mark.skipif("MONO_TEST_DATA" not in os.environ, reason="MONO_TEST_DATA, real images, is not set")


def pixels(seed, height=10, width=10):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_folder(root, splits=("train", "val"), classes=("cat", "dog", "emu"), per_class=4, shape=(10, 10)):
    """PNG files root/split/class/i.png, of which pixels(seed) of the returned (path, class, seed) are the content."""
    made = []
    for split in splits:
        for index, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                path, seed = root / split / name / f"{i}.png", len(made)
                Image.fromarray(pixels(seed, *shape)).save(path)
                made.append((path, index, seed))
    return made


def as_tensor(array):
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


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


def test_decoding_in_threads_keeps_the_order(tmp_path, monkeypatch):
    make_folder(tmp_path, per_class=20)
    expected = load_images(str(tmp_path), "train").images
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(load_images(str(tmp_path), "train").images, expected)
    assert torch.equal(load_images(str(tmp_path), "train", memory_limit=0).images[:], expected)


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
    assert len(streamed.subset(torch.tensor([0, 5, 9])).fingerprint) == 16


def test_the_same_files_have_one_fingerprint_in_folders_and_in_parquet(tmp_path):
    import datasets

    made = make_folder(tmp_path / "folders", splits=("train",))
    content = {"picture": [{"bytes": path.read_bytes(), "path": None} for path, *_ in made]}
    content["label"] = [label for _, label, _ in made]
    kind = features(datasets.ClassLabel(names=["cat", "dog", "emu"]))
    datasets.Dataset.from_dict(content, features=kind).to_parquet(str(tmp_path / "train.parquet"))
    folders, parquet = (load_images(str(place), "train") for place in (tmp_path / "folders", tmp_path))
    assert folders.fingerprint == parquet.fingerprint


def test_a_broken_file_is_named_and_skipped_only_where_asked(tmp_path):
    made = make_folder(tmp_path)
    cut, text = made[5][0], made[9][0]
    cut.write_bytes(cut.read_bytes()[:100])
    text.write_text("not an image")
    with pytest.raises(ValueError, match=rf"{cut}.*skip_corrupt"):
        load_images(str(tmp_path), "train")
    for limit in (2**30, 100):
        with pytest.warns(UserWarning, match=rf"2 of 12 images.*{cut}, {text}"):
            rest = load_images(str(tmp_path), "train", skip_corrupt=True, memory_limit=limit)
        assert rest.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert torch.equal(rest.images[4:6], torch.stack([as_tensor(pixels(4)), as_tensor(pixels(6))]))
    streamed = load_images(str(tmp_path), "train", memory_limit=100)
    with pytest.raises(ValueError, match=str(cut)):
        streamed.images[3:8]


def png(array, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png", **options)
    return buffer.getvalue()


def test_files_that_are_no_images_are_named_and_hidden_ones_do_not_count(tmp_path):
    make_folder(tmp_path, splits=("train",))
    cat = tmp_path / "train/cat"
    for hidden in (tmp_path / "train/.ipynb_checkpoints", cat / ".ipynb_checkpoints", tmp_path / "train/@eaDir"):
        hidden.mkdir()
        Image.fromarray(pixels(1)).save(hidden / "0.png")
    (cat / "._0.png").write_bytes(b"of a Mac")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = load_images(str(tmp_path), "train")
    assert images.class_names == ["cat", "dog", "emu"]
    assert len(images) == 12
    (cat / "Thumbs.db").write_bytes(b"")
    (cat / "notes.TXT").write_text("two cats")
    (tmp_path / "train" / "loose.png").write_bytes(png(pixels(1)))
    with pytest.warns(
        UserWarning, match=r"3 files in .*train are not read as images.*: cat/Thumbs.db, cat/notes.TXT, loose"
    ):
        assert len(load_images(str(tmp_path), "train")) == 12
    (cat / "phone.HEIC").write_bytes(b"")
    for limit in (0, 2**30):
        with pytest.raises(ValueError, match=r"1 images in formats .* cannot read here: cat/phone.HEIC. Convert them"):
            load_images(str(tmp_path), "train", memory_limit=limit)
    with pytest.warns(UserWarning, match=r"4 files .* cat/phone.HEIC"):
        assert len(load_images(str(tmp_path), "train", skip_corrupt=True)) == 12


def test_a_format_of_a_plugin_is_read(tmp_path, monkeypatch):
    make_folder(tmp_path, splits=("train",), classes=("a",))
    (tmp_path / "train/a/4.heic").write_bytes(png(pixels(7)))
    monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")
    assert torch.equal(load_images(str(tmp_path), "train").images[4], as_tensor(pixels(7)))


@pytest.mark.parametrize("suffix", [".jfif", ".gif", ".avif", ".jpe", ".JPG", ".webp", ".tif", ".jp2"])
def test_every_format_that_pillow_decodes_is_read(tmp_path, suffix):
    (tmp_path / "train/a").mkdir(parents=True)
    flat = np.full((8, 8, 3), (200, 30, 60), np.uint8)
    Image.fromarray(flat).save(tmp_path / f"train/a/0{suffix}")
    images = load_images(str(tmp_path), "train").images
    assert images.shape == (1, 3, 8, 8)
    assert (images[0].int() - as_tensor(flat).int()).abs().max() <= 6


@pytest.mark.parametrize("memory_limit", [0, 2**30])
def test_photographs_stand_upright(tmp_path, memory_limit):
    """For every orientation of EXIF the image equals the upright one, also in parquet files."""
    import datasets

    turns = [
        lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1],
        lambda a: a.transpose(1, 0, 2), lambda a: np.rot90(a), lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        lambda a: np.rot90(a, 3),
    ]  # fmt: skip
    upright = pixels(3, 6, 8)
    encoded = []
    (tmp_path / "folders/train/a").mkdir(parents=True)
    for orientation, turn in enumerate(turns, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        encoded.append({"bytes": png(np.ascontiguousarray(turn(upright)), exif=exif), "path": None})
        (tmp_path / f"folders/train/a/{orientation}.png").write_bytes(encoded[-1]["bytes"])
    content = {"picture": encoded, "label": [0] * 8}
    kind = features(datasets.ClassLabel(names=["a"]))
    datasets.Dataset.from_dict(content, features=kind).to_parquet(str(tmp_path / "train.parquet"))
    for place in (tmp_path / "folders", tmp_path):
        images = load_images(str(place), "train", memory_limit=memory_limit).images
        assert torch.equal(images[:], as_tensor(upright).expand(8, -1, -1, -1))


def test_transparent_images_are_on_white_and_of_several_frames_the_first_counts(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    folder = tmp_path / "train/a"
    opaque = pixels(1, 4, 4)
    alpha = np.full((4, 4, 1), 255, np.uint8)
    alpha[1, 2] = 0
    expected = np.where(alpha, opaque, 255)
    Image.fromarray(np.concatenate([opaque, alpha], 2)).save(folder / "0.png")
    grey = np.concatenate([opaque[..., :1], alpha], 2)
    Image.fromarray(grey, "LA").save(folder / "1.png")
    palette = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), "P")
    palette.putpalette([*opaque.reshape(-1).tolist()])
    palette.save(folder / "2.png", transparency=6)  # of the pixel at (1, 2)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "3.gif", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (4, 4), (255, 0, 0, 0)).save(folder / "4.tif")
    images = load_images(str(tmp_path), "train").images
    assert torch.equal(images[0], as_tensor(expected))
    assert torch.equal(images[1], as_tensor(expected[..., :1]).expand(3, -1, -1))
    assert torch.equal(images[2], as_tensor(expected))
    assert images[3:, :, 0, 0].tolist() == [[255, 0, 0], [0, 255, 255]]


def test_folders_in_class_folders_and_names_that_differ_in_case_are_named(tmp_path):
    make_folder(tmp_path, splits=("train",), classes=("bird", "cat/images", "dog/big", "dog/small", "Bird"))
    with warnings.catch_warnings(record=True) as caught:
        images = load_images(str(tmp_path), "train")
    assert images.class_names == ["Bird", "bird", "cat", "dog"]
    assert images.labels.bincount().tolist() == [4, 4, 4, 8]
    words = [str(warning.message) for warning in caught]
    assert len(words) == 2
    assert any("differ in case only: Bird, bird" in line for line in words)
    assert any("the class folders dog have images in folders of their own" in line for line in words)


def test_links_are_followed_but_not_in_circles(tmp_path):
    make_folder(tmp_path, splits=("train",))
    make_folder(tmp_path / "elsewhere", splits=("more",), classes=("fox",))
    (tmp_path / "train/fox").symlink_to(tmp_path / "elsewhere/more/fox")
    assert load_images(str(tmp_path), "train").labels.bincount().tolist() == [4, 4, 4, 4]
    (tmp_path / "train/cat/all").symlink_to(tmp_path / "train")
    with pytest.raises(ValueError, match=r"cat/all is a link to a folder that it is in"):
        load_images(str(tmp_path), "train")
    (tmp_path / "train/cat/all").unlink()
    (tmp_path / "train/cat/gone.png").symlink_to(tmp_path / "gone.png")
    for limit in (0, 2**30):
        with pytest.raises(ValueError, match=r"cat/gone.png is not a readable image"):
            load_images(str(tmp_path), "train", memory_limit=limit)


def test_folders_with_numbers_are_in_their_order(tmp_path):
    make_folder(tmp_path, splits=("train",), classes=[str(i) for i in range(12)], per_class=1)
    images = load_images(str(tmp_path), "train")
    assert images.class_names == [str(i) for i in range(12)]
    assert torch.equal(images.images[10], as_tensor(pixels(10)))


def test_a_class_without_an_image_is_named(tmp_path):
    make_folder(tmp_path, splits=("train",))
    (tmp_path / "train/fox").mkdir()
    (tmp_path / "train/fox/.DS_Store").write_text("")
    with pytest.raises(ValueError, match="1 classes without an image: fox"):
        load_images(str(tmp_path), "train")


def test_a_set_whose_first_image_or_every_image_is_broken(tmp_path):
    made = make_folder(tmp_path, splits=("train",))
    made[0][0].write_text("")
    with pytest.warns(UserWarning, match="1 of 12"):
        assert len(load_images(str(tmp_path), "train", skip_corrupt=True)) == 11
    for path, *_ in made:
        path.write_text("")
    with pytest.raises(ValueError, match="no readable image"):
        load_images(str(tmp_path), "train", skip_corrupt=True)


def test_images_of_several_sizes_need_image_size(tmp_path):
    made = make_folder(tmp_path, splits=("train",), shape=(10, 14))
    Image.fromarray(pixels(99, 30, 20)).save(made[7][0])
    with pytest.raises(ValueError, match=rf"{made[7][0]} has 30 x 20 pixels and the first image 10 x 14; give image_"):
        load_images(str(tmp_path), "train")
    assert load_images(str(tmp_path), "train", image_size=8).images.shape == (12, 3, 8, 8)


def test_grey_palette_and_transparent_images_become_rgb_and_16_bits_are_refused(tmp_path):
    make_folder(tmp_path, splits=("train",), classes=("a",), per_class=1)
    grey = pixels(1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "train/a/1.png")
    Image.fromarray(pixels(2)).convert("RGBA").save(tmp_path / "train/a/2.png")
    images = load_images(str(tmp_path), "train").images
    assert torch.equal(images[1], torch.from_numpy(grey).expand(3, -1, -1))
    assert torch.equal(images[2], as_tensor(pixels(2)))
    Image.fromarray(grey.astype(np.uint16) * 200).save(tmp_path / "train/a/3.png")
    with pytest.raises(ValueError, match=r"3\.png has mode I;16"):
        load_images(str(tmp_path), "train")


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


def rows(values, column="label"):
    from io import BytesIO

    encoded = []
    for seed in range(len(values)):
        buffer = BytesIO()
        Image.fromarray(pixels(seed)).save(buffer, "png")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    return {"picture": encoded, column: values}


def features(label, column="label"):
    import datasets

    return datasets.Features({"picture": datasets.Image(), column: label})


def test_hugging_face_sets_saved_to_disk_and_as_parquet(tmp_path):
    import datasets

    label = datasets.ClassLabel(names=["x", "y", "z"])
    train = datasets.Dataset.from_dict(rows([2, 0, 1, 2]), features=features(label))
    test = datasets.Dataset.from_dict(rows([1, 1]), features=features(label))
    datasets.DatasetDict({"train": train, "validation": test}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet/data").mkdir(parents=True)
    train.to_parquet(str(tmp_path / "parquet/data/train-00000-of-00001.parquet"))
    test.to_parquet(str(tmp_path / "parquet/data/validation-00000-of-00001.parquet"))
    prints = set()
    for place in ("saved", "parquet"):
        loaded = load_images(str(tmp_path / place), "train")
        assert loaded.labels.tolist() == [2, 0, 1, 2]
        assert loaded.class_names == ["x", "y", "z"]
        assert torch.equal(loaded.images[3], as_tensor(pixels(3)))
        assert load_images(str(tmp_path / place), "test").labels.tolist() == [1, 1]
        prints.add(loaded.fingerprint)
        with pytest.raises(ValueError, match=r"split is 'holdout'; .* splits.* train"):
            load_images(str(tmp_path / place), "holdout")
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("values", "kind", "error", "words"),
    [
        ([0.5, 1.0], "float32", TypeError, "column 'label' of .* has dtype float"),
        (["a", "b"], "string", TypeError, "class_encode_column"),
        ([-1, 0], "int64", ValueError, "from -1 to 0"),
        ([0, None], "int64", TypeError, "column 'label'"),
    ],
)
def test_labels_that_are_no_class_indices_are_refused(tmp_path, values, kind, error, words):
    import datasets

    made = datasets.Dataset.from_dict(rows(values), features=features(datasets.Value(kind)))
    made.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(error, match=words):
        load_images(str(tmp_path / "saved"), "train")


def save_splits(folder, **splits):
    """A set of `save_to_disk` with labels by split, other images in each."""
    import datasets

    label = splits.pop("label", datasets.Value("int64"))
    seeds = iter(range(10_000))
    made = {}
    for split, values in splits.items():
        encoded = [{"bytes": png(pixels(next(seeds), 4, 4)), "path": None} for _ in values]
        made[split] = datasets.Dataset.from_dict({"picture": encoded, "label": values}, features=features(label))
    datasets.DatasetDict(made).save_to_disk(str(folder))
    return str(folder)


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
    with pytest.raises(ValueError, match=r"split is 'test'; .* splits train\. .*test_fraction draws"):
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
    with pytest.raises(ValueError, match=r"test_fraction is 0.01 of 20 images: .* would be left with none"):
        load_splits(place, test_fraction=0.01)
    make_folder(tmp_path / "f", splits=(".",))
    with pytest.raises(ValueError, match=r"If these are classes, the split is '\.' \(train_split\)"):
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


def parquet(path, values):
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows(values), features=features(datasets.Value("int64"))).to_parquet(str(path))


def test_parquet_files_of_a_split_are_not_mixed_with_those_of_another(tmp_path):
    parquet(tmp_path / "a/train.parquet", [0, 1, 1])
    parquet(tmp_path / "a/train_10pct.parquet", [1])
    parquet(tmp_path / "a/.train.parquet", [1])
    assert load_images(str(tmp_path / "a"), "train").labels.tolist() == [0, 1, 1]
    assert load_images(str(tmp_path / "a"), "train_10pct").labels.tolist() == [1]
    with pytest.raises(ValueError, match=r"split is 'test'; .* parquet files of the splits train, train_10pct\."):
        load_images(str(tmp_path / "a"), "test")
    parquet(tmp_path / "a/train-00000-of-00001.parquet", [0])
    with pytest.raises(
        ValueError, match=r"several files that may be .* 'train': train-00000-of-00001.parquet, train.parq"
    ):
        load_images(str(tmp_path / "a"), "train")

    for part, values in enumerate(([0, 1], [1], [1, 1, 0])):
        parquet(tmp_path / f"b/data/train-0000{part}-of-00003.parquet", values)
    assert load_images(str(tmp_path / "b"), "train").labels.tolist() == [0, 1, 1, 1, 1, 0]
    (tmp_path / "b/data/train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match=r"has 2 of 3 files of the split 'train'; parts 1 are missing"):
        load_images(str(tmp_path / "b"), "train")

    parquet(tmp_path / "c/one/train-00000-of-00001.parquet", [0])
    parquet(tmp_path / "c/two/train-00000-of-00001.parquet", [1])
    with pytest.raises(ValueError, match=r"several files .* one/train-00000-of-00001.parquet, two/"):
        load_images(str(tmp_path / "c"), "train")

    parquet(tmp_path / "d/train/0000.parquet", [0])
    parquet(tmp_path / "d/train/0001.parquet", [1])
    parquet(tmp_path / "d/test/0000.parquet", [1])
    assert load_images(str(tmp_path / "d"), "train").labels.tolist() == [0, 1]
    assert load_images(str(tmp_path / "d"), "test").labels.tolist() == [1]
    parquet(tmp_path / "d/train/small.parquet", [1])
    with pytest.raises(ValueError, match=r"several files that may be the split 'train': train/0000.parquet"):
        load_images(str(tmp_path / "d"), "train")

    parquet(tmp_path / "e/val_1k.parquet", [0, 1])
    with pytest.warns(UserWarning, match="has no split called test; val_1k is read instead"):
        assert load_images(str(tmp_path / "e"), "test").labels.tolist() == [0, 1]
    parquet(tmp_path / "e/val_2k.parquet", [0, 1])
    with pytest.raises(ValueError, match=r"split is 'test'; .* of the splits val_1k, val_2k\."):
        load_images(str(tmp_path / "e"), "test")


def test_a_parquet_file_with_the_time_of_change_of_another_is_not_taken_for_it(tmp_path):
    path = tmp_path / "train.parquet"
    parquet(path, [0, 1])
    times = path.stat().st_mtime_ns
    assert load_images(str(tmp_path), "train").labels.tolist() == [0, 1]
    parquet(path, [1, 0])
    os.utime(path, ns=(times, times))
    assert load_images(str(tmp_path), "train").labels.tolist() == [1, 0]


def test_a_name_that_does_not_fit_its_folder_is_refused(tmp_path):
    make_folder(tmp_path, splits=("train",), classes=[f"c{i}" for i in range(11)], per_class=1)
    with pytest.raises(ValueError, match=r"name is 'cifar10', and .* has 11 classes: c0, "):
        load_images("cifar10", "train", tmp_path)
    with pytest.raises(ValueError, match="and digits is embedded"):
        load_images("digits", "train", tmp_path)


def test_columns_that_are_missing_are_listed(tmp_path):
    import datasets

    kind = datasets.Value("int64")
    datasets.Dataset.from_dict(rows([0, 1], "kind"), features=features(kind, "kind")).save_to_disk(str(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"label_column is None; .* picture, kind"):
        load_images(str(tmp_path / "s"), "train")
    assert load_images(str(tmp_path / "s"), "train", label_column="kind").class_names == ["0", "1"]
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path / "t"))
    with pytest.raises(ValueError, match="0 columns of images among text, label"):
        load_images(str(tmp_path / "t"), "train")


def test_a_row_without_an_image_is_named(tmp_path):
    import datasets

    content = rows([0, 1])
    content["picture"][1] = None
    datasets.Dataset.from_dict(content, features=features(datasets.Value("int64"))).save_to_disk(str(tmp_path / "s"))
    for limit in (0, 2**30):
        with pytest.raises(ValueError, match=r"row 1 of .* \(the row has no image\); skip_corrupt"):
            load_images(str(tmp_path / "s"), "train", memory_limit=limit)


def test_a_broken_row_is_named(tmp_path):
    import datasets

    content = rows([0, 1, 0])
    content["picture"][1]["bytes"] = b"no image"
    made = datasets.Dataset.from_dict(content, features=features(datasets.ClassLabel(names=["x", "y"])))
    made.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"row 1 of .*saved \(train\) is not a readable image"):
        load_images(str(tmp_path / "saved"), "train")
    with pytest.warns(UserWarning, match="row 1 of"):
        assert load_images(str(tmp_path / "saved"), "train", skip_corrupt=True).labels.tolist() == [0, 0]


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
