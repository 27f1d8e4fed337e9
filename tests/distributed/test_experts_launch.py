"""Adapters on fused experts in two CPU processes: DDP, ZeRO-2 and ZeRO-3 train what one process does, and resume."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
WORKER = str(Path(__file__).parent / "experts_worker.py")


def run(*command):
    # DeepSpeed compiles an operation at its first use; the folder keeps it for the next test.
    more = {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(ROOT / ".venv" / "torch_extensions")}
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | more)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]


@pytest.mark.parametrize("file", ["ddp", "zero2", "zero3"])
def test_two_processes_train_and_resume_the_adapter_of_one(tmp_path, file):
    one, two = tmp_path / "one", tmp_path / "two"
    run(sys.executable, WORKER, one, "8")
    config = str(ROOT / "recipes" / "accelerate" / f"{file}.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, WORKER, str(two), "4"]
    run(*launch)
    shards = list(two.glob("checkpoint-3/global_step3/*optim_states.pt"))
    assert len(shards) == (0 if file == "ddp" else 2)  # DeepSpeed really was at work
    expected, found = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 3 * 2
    for name in expected:
        assert found[name].abs().max() > 0
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5)

    run(*launch, "--resume")
    resumed = load_file(two / "resumed" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], found[name]) for name in found)
