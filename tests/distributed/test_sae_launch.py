"""The sparse autoencoder trained by two processes, or killed, and continued, against one process left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vision_bench import sae, storage

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).parent / "sae_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]


def test_two_processes_train_and_continue_what_one_does(tmp_path):
    run(sys.executable, WORKER, str(tmp_path / "one"), "4")
    run(*TORCHRUN, WORKER, str(tmp_path / "two"), "2")
    run(*TORCHRUN, WORKER, str(tmp_path / "two"), "4")
    expected, one = storage.load(tmp_path / "one" / "sae.safetensors", "autoencoder")
    found, two = storage.load(tmp_path / "two" / "sae.safetensors", "autoencoder")
    assert (one["processes"], two["processes"]) == (1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert [row["step"] for row in two["log"]] == list(range(4, 41, 4))
    for mine, other in zip(two["log"], one["log"], strict=True):
        assert mine == pytest.approx(other, rel=1e-3)
    assert max(row["dead_share"] for row in two["log"]) > 0


def test_a_killed_training_continues_exactly(tmp_path):
    run(sys.executable, WORKER, str(tmp_path / "straight"), "300")
    command = [sys.executable, WORKER, str(tmp_path / "killed"), "300"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "training" / sae.CHECKPOINT
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it had not finished
    reached = storage.read_header(checkpoint, sae.CHECKPOINT_KIND)["step"]
    assert 0 < reached < 3000
    run(*command)
    expected, one = storage.load(tmp_path / "straight" / "sae.safetensors", "autoencoder")
    found, other = storage.load(tmp_path / "killed" / "sae.safetensors", "autoencoder")
    assert one == other
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
