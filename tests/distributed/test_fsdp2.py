"""FSDP2 (`fully_shard`) on two CPU processes: the adapter of one process, whole tensors saved, exact resume."""

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


@pytest.mark.parametrize(("options", "layers"), [([], 7), (["--experts"], 6)], ids=["dense", "experts"])
def test_two_processes_train_and_resume_the_adapter_of_one(tmp_path, options, layers):
    run(sys.executable, WORKER, tmp_path / "one", *options)
    run(*TORCHRUN, WORKER, tmp_path / "two", *options)
    expected, found = adapter(tmp_path / "one" / "adapter"), adapter(tmp_path / "two" / "adapter")
    assert found.keys() == expected.keys()
    assert len(found) == 2 * layers * 2
    for name in expected:
        assert found[name].shape == expected[name].shape
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5)
    assert all(found[name].abs().max() > 0 for name in found)

    run(*TORCHRUN, WORKER, tmp_path / "two", "--resume", *options)
    resumed = adapter(tmp_path / "two" / "resumed")
    assert all(torch.equal(resumed[name], found[name]) for name in found)
