"""FSDP2 (`fully_shard`) on two CPU processes: the adapter of one process, whole tensors saved, exact resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).parent / "fsdp2_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("options", "tensors"),
    [([], 2 * 7 * 2), (["--experts"], 2 * 6 * 2), (["--silence"], 2 * 7 * 3), (["--topk"], 2 * 7 * 2)],
    ids=["dense", "experts", "silence", "topk"],
)
def test_two_processes_train_and_resume_the_adapter_of_one(tmp_path, options, tensors):
    run(sys.executable, WORKER, tmp_path / "one", *options)
    run(*TORCHRUN, WORKER, tmp_path / "two", *options)
    expected, found = adapter(tmp_path / "one" / "adapter"), adapter(tmp_path / "two" / "adapter")
    assert found.keys() == expected.keys()
    assert len(found) == tensors
    for name in expected:
        assert found[name].shape == expected[name].shape
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5)
    assert all(found[name].abs().max() > 0 for name in found)

    run(*TORCHRUN, WORKER, tmp_path / "two", "--resume", *options)
    resumed = adapter(tmp_path / "two" / "resumed")
    assert all(torch.equal(resumed[name], found[name]) for name in found)
    if options == ["--silence"]:
        expected, *found = (
            json.loads((tmp_path / file).read_text())
            for file in ("one/measures-0.json", "two/measures-0.json", "two/measures-1.json")
        )
        assert 0 < expected["fired"] < 1
        for measures in found:
            by_module = measures.pop("by_module")
            assert by_module == pytest.approx(expected["by_module"], abs=1e-6)
            assert measures == pytest.approx({name: expected[name] for name in measures}, rel=1e-4)
