"""ProvenanceCallback on two processes: the rows and scores of one process, and exact resume."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mono_peft.provenance import read_provenance

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
WORKER = str(Path(__file__).parent / "provenance_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(*command):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".venv" / "torch_extensions"),
    }
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)


def test_two_processes_find_what_one_finds_and_resume_exactly(tmp_path):
    for launcher, folder in (([sys.executable], tmp_path / "one"), (TORCHRUN, tmp_path / "two")):
        result = run(*launcher, WORKER, folder)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    expected, found = (read_provenance(tmp_path / name / "adapter") for name in ("one", "two"))
    assert found.keys() == expected.keys()
    assert max(len(pairs) for pairs in found.values()) == 4
    for unit, pairs in expected.items():
        assert [score for _, score in found[unit]] == pytest.approx([score for _, score in pairs], rel=1e-3, abs=1e-8)
        clear = [a for a, b in zip(pairs, [*pairs[1:], (0, 0)], strict=True) if a[1] > 1.01 * b[1]]
        if len(clear) == len(pairs):
            assert [row for row, _ in found[unit]] == [row for row, _ in pairs]
    whole = (tmp_path / "two" / "checkpoint-6" / "provenance.json").read_text()
    (tmp_path / "two" / "checkpoint-6" / "provenance.json").unlink()
    result = run(*TORCHRUN, WORKER, tmp_path / "two", "--resume")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    assert (tmp_path / "two" / "checkpoint-6" / "provenance.json").read_text() == whole


def test_deepspeed_is_refused(tmp_path):
    config = ROOT / "recipes" / "accelerate" / "zero2.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    result = run(*launch, WORKER, tmp_path, "--one_pass_a_step")  # as the file says
    assert result.returncode != 0
    assert "works in one process and with DDP, and this is DEEPSPEED" in result.stderr
