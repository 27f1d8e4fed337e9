"""Tensors on disk: whole or not at all, with a header that is checked."""

import os

import pytest
import torch

from vision_bench import storage

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}


def test_tensors_and_header_come_back(tmp_path):
    storage.save(tmp_path / "new" / "x.safetensors", "thing", TENSORS, {"seed": 3, "names": ["p", "q"]})
    tensors, header = storage.load(tmp_path / "new" / "x.safetensors", "thing")
    assert header == {"seed": 3, "names": ["p", "q"]}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert storage.fingerprint(tensors) == storage.fingerprint(TENSORS)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.safetensors"]


def test_other_memory_formats_are_saved_as_the_values_they_hold(tmp_path):
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    storage.save(tmp_path / "x.safetensors", "thing", {"w": weight}, {})
    assert torch.equal(storage.load(tmp_path / "x.safetensors", "thing")[0]["w"], weight)


@pytest.mark.parametrize(
    "changed",
    [
        {"a": TENSORS["a"] + 1, "b": TENSORS["b"]},
        {"a": TENSORS["a"].view(3, 2), "b": TENSORS["b"]},
        {"a": TENSORS["a"].double(), "b": TENSORS["b"]},
        {"c": TENSORS["a"], "b": TENSORS["b"]},
    ],
)
def test_a_fingerprint_tells_other_tensors(changed):
    assert storage.fingerprint(changed) != storage.fingerprint(TENSORS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_tensor_that_is_not_finite_is_named(value):
    assert storage.non_finite(TENSORS) is None
    assert storage.non_finite({"count": torch.tensor(3)}) is None
    broken = torch.tensor([0.0, value], dtype=torch.bfloat16)
    assert storage.non_finite(TENSORS | {"broken": broken, "more": broken}) == "broken"


def test_a_failed_write_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    storage.save(path, "thing", TENSORS, {"seed": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"Cannot write .*x\.safetensors .*No space left"):
        storage.save(path, "thing", TENSORS, {"seed": 2})
    assert storage.load(path, "thing")[1] == {"seed": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_cannot_be_trusted_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="There is no file"):
        storage.load(path, "thing")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no header of vision_bench"):
        storage.load(path, "thing")
    storage.save(path, "thing", TENSORS, {})
    with pytest.raises(ValueError, match="holds a thing; expected a model"):
        storage.load(path, "model")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        storage.load(path, "thing")
