"""The cache of Silence: which tokens it holds, how many batches it keeps while drawing, and where its rows are."""

import errno
import os
import weakref
from collections import Counter

import pytest
import torch

from mono_peft import Silence
from mono_peft.silent_inputs import draw_tokens

ALL = {"target_modules": "all-linear"}
IN_MEMORY = 9 * 3 * 4 * 32  # bytes of the rows of an input of 32 numbers: 9 tokens of 3 texts


@pytest.fixture
def model(llama, random_adapter):
    return random_adapter(llama, **ALL)


def gradients(model, silence):
    model.zero_grad()
    silence.add_gradients(0)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("budget", "inputs_in_memory"), [(0, 0), (2 * IN_MEMORY, 2), (2 * IN_MEMORY + 1, 2)])
def test_rows_on_disk_are_those_in_memory(model, input_ids, tmp_path, monkeypatch, budget, inputs_in_memory):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    in_memory = Silence(model, [{"input_ids": input_ids}])
    on_disk = Silence(model, [{"input_ids": input_ids}], memory_budget=budget)
    assert in_memory.mapped_bytes == 0
    assert on_disk.cached_bytes == in_memory.cached_bytes
    assert on_disk.mapped_bytes == on_disk.cached_bytes - inputs_in_memory * IN_MEMORY
    expected, found = gradients(model, in_memory), gradients(model, on_disk)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert on_disk.fired_by_module() == in_memory.fired_by_module()
    assert list(tmp_path.iterdir()) == []  # the file has no name, so that nobody has to remove it


def test_bfloat16_on_disk(llama, random_adapter, input_ids):
    model = random_adapter(llama.bfloat16(), **ALL)
    expected = gradients(model, Silence(model, [{"input_ids": input_ids}]))
    found = gradients(model, Silence(model, [{"input_ids": input_ids}], memory_budget=0))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_disk_without_room(model, input_ids, monkeypatch, tmp_path):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError, match=rf"cached rows in {tmp_path} \(No space left on device\): .* TMPDIR, raise"):
        Silence(model, [{"input_ids": input_ids}], memory_budget=0)
    assert list(tmp_path.iterdir()) == []


def test_a_negative_budget(model, input_ids):
    with pytest.raises(ValueError, match=r"`memory_budget` is a number of bytes and must not be negative, got -1"):
        Silence(model, [{"input_ids": input_ids}], memory_budget=-1)


def test_a_long_stream_is_drawn_from_and_not_kept(model):
    alive, most = weakref.WeakSet(), 0

    def stream():
        nonlocal most
        for number in range(2000):
            ids = torch.full((1, 3), 3 + number % 90)  # 90 texts, again and again
            alive.add(ids)
            yield {"input_ids": ids}
            del ids
            most = max(most, len(alive))

    silence = Silence(model, stream(), rows_per_module=10)
    assert 10 <= most <= 22
    assert 10 < silence.silent_tokens < 1000  # an estimate from ten, of 270
    # Of 2 layers: q, k, v share one input, gate and up one; o has one of 32, down one of 64 numbers.
    assert silence.cached_bytes == 2 * 10 * (3 * 32 + 64) * 4


@pytest.mark.parametrize("keys", [(), ("position_ids",)])
def test_every_token_is_drawn_equally_often(model, keys):
    """Also where they are not told apart by their prefixes."""
    lengths = [1, 7, 2, 2, 8]
    batches = [{"input_ids": torch.full((1, length), number)} for number, length in enumerate(lengths)]
    batches = [batch | {key: torch.arange(batch["input_ids"].shape[1])[None] for key in keys} for batch in batches]
    counts = Counter()
    for seed in range(1000):
        tokens, total = draw_tokens(model, batches, 3, seed)
        assert total == 20 or not keys  # else estimated from three
        assert sum(len(batch.positions) for batch in tokens) == 3
        for batch in tokens:
            number = next(i for i, given in enumerate(batches) if given["input_ids"] is batch.inputs["input_ids"])
            counts.update((number, position) for position in batch.positions.tolist())
    assert counts.keys() == {(i, position) for i, length in enumerate(lengths) for position in range(length)}
    assert all(abs(count - 150) < 57 for count in counts.values())  # five standard deviations of a binomial


def test_a_large_cache_is_computed_with_in_parts(model, input_ids, monkeypatch):
    silence = Silence(model, [{"input_ids": input_ids}])
    whole = silence.fired_by_module()
    assert 0 < min(whole.values()) < 1
    monkeypatch.setattr("mono_peft.hinge._PART", 5 * 64)
    assert silence.fired_by_module() == whole
