"""Small images as files, rows and data sets, for the tests of what reads them."""

import io

import numpy as np
import torch
from PIL import Image


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


def png(array, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png", **options)
    return buffer.getvalue()


def rows(values, column="label"):
    encoded = [{"bytes": png(pixels(seed)), "path": None} for seed in range(len(values))]
    return {"picture": encoded, column: values}


def features(label, column="label"):
    import datasets

    return datasets.Features({"picture": datasets.Image(), column: label})


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


def parquet(path, values):
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows(values), features=features(datasets.Value("int64"))).to_parquet(str(path))
