"""Silence on two processes: the adapter of one process, and refusals where it would be another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
WORKER = str(Path(__file__).parent / "silence_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(*command):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        # DeepSpeed compiles an operation at its first use; the folder keeps it for the next test.
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".venv" / "torch_extensions"),
    }
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)


def trained(*command, folder):
    result = run(*command, folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    log = [line for line in json.loads((folder / "log.json").read_text()) if "loss" in line]
    return load_file(folder / "adapter" / "adapter_model.safetensors"), log


def test_two_processes_train_the_adapter_of_one(tmp_path):
    expected, log = trained(sys.executable, WORKER, folder=tmp_path / "one")
    found, log_of_two = trained(*TORCHRUN, WORKER, folder=tmp_path / "two")
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 7 * 2
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5)
    assert len(log) == len(log_of_two) == 6
    assert 0 < log[-1]["silence_loss"] < log[0]["silence_loss"]
    for one, two in zip(log, log_of_two, strict=True):
        assert two["silence_loss"] == pytest.approx(one["silence_loss"], rel=1e-4)


def test_other_texts_in_each_process_are_refused(tmp_path):
    result = run(*TORCHRUN, WORKER, tmp_path, "--other_texts")
    assert result.returncode != 0
    assert "the processes have other batches, or options of Silence, than one another" in result.stderr


def test_deepspeed_is_refused(tmp_path):
    config = ROOT / "recipes" / "accelerate" / "zero2.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    result = run(*launch, WORKER, tmp_path)
    assert result.returncode != 0
    assert "this is DEEPSPEED, where gradients are sharded or used up before the callback" in result.stderr
