"""Which files and rows are images of a split, how they are decoded, and what is named or refused."""

import io
import os
import warnings

import numpy as np
import pytest
import torch
from picture_files import as_tensor, features, make_folder, parquet, pixels, png, rows
from PIL import Image

from vision_bench.data import load_images
from vision_bench.image_files import decode


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


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "avif", "tiff", "bmp", "jpeg2000"])
def test_bytes_of_every_format_that_cannot_be_decoded_are_named(kind):
    """Whatever Pillow raises for them."""
    whole = io.BytesIO()
    Image.fromarray(pixels(1, 24, 32)).save(whole, kind)
    generator = np.random.default_rng(0)
    named = decoded = 0
    for _ in range(60):
        content = bytearray(whole.getvalue()[: generator.integers(1, len(whole.getvalue()))])
        for place in generator.integers(0, len(content), 3):
            content[place] = generator.integers(256)
        try:
            assert decode(bytes(content), "the place", 8).shape == (3, 8, 8)
        except ValueError as error:
            named += "the place is not a readable image" in str(error) or "the place has mode" in str(error)
        else:
            decoded += 1
    assert named + decoded == 60
    assert named > 30


def test_a_photograph_with_broken_exif_data_is_read_as_it_is(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    Image.fromarray(pixels(1)).save(tmp_path / "train/a/0.webp", lossless=True, exif=b"Exif\x00\x00no such data")
    assert torch.equal(load_images(str(tmp_path), "train").images[0], as_tensor(pixels(1)))


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


@pytest.mark.parametrize(
    ("values", "kind", "error", "words"),
    [
        ([0.5, 1.0], "float32", TypeError, "column 'label' of .* has dtype float"),
        (["a", "b"], "string", TypeError, "class_encode_column"),
        ([-1, 0], "int64", ValueError, "from -1 to 0"),
        ([-7, -3], "int64", ValueError, "column 'label' of .* has labels from -7 to -3; the number of a class is at"),
        ([20_250_131, 0], "int64", ValueError, "values up to 20250131, which are no numbers of classes"),
        ([0, None], "int64", TypeError, "column 'label'"),
    ],
)
def test_labels_that_are_no_class_indices_are_refused(tmp_path, values, kind, error, words):
    import datasets

    made = datasets.Dataset.from_dict(rows(values), features=features(datasets.Value(kind)))
    made.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(error, match=words):
        load_images(str(tmp_path / "saved"), "train")


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


def test_decoding_in_threads_keeps_the_order(tmp_path, monkeypatch):
    make_folder(tmp_path, per_class=20)
    expected = load_images(str(tmp_path), "train").images
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(load_images(str(tmp_path), "train").images, expected)
    assert torch.equal(load_images(str(tmp_path), "train", memory_limit=0).images[:], expected)
