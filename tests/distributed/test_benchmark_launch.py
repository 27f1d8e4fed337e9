"""`python -m vision_bench` in two processes gives the rows of one, and one that was killed continues to them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import results, rows
from vision_bench.sweep import ACCURACY

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
COMMAND = ["-m", "vision_bench", "--random_init", "small_conv", "test_resnet", "--image_size", "16"]
COMMAND += ["--limit", "400", "--seeds", "0", "1", "--probe_epochs", "20", "--sae_epochs", "10"]
COMMAND += ["--corruptions", "label_noise=0.4", "gaussian=0.5", "rotated", "few_shots=0.5"]


def run(launcher, folder, *arguments):
    command = [*launcher, *COMMAND, "--output_dir", str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result.stdout


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    run([sys.executable], folder)
    return folder


def test_two_processes_give_the_rows_of_one(one, tmp_path):
    # Shards of a few images, so that both processes have features to compute.
    program = (
        "import sys, accelerate; from vision_bench import features; from vision_bench.__main__ import main; "
        "features.SHARD_ROWS = 64; main(sys.argv[1:]); "
        "state = accelerate.PartialState(); print('process', state.process_index, 'of', state.num_processes)"
    )
    (tmp_path / "program.py").write_text(program)
    command = [*TORCHRUN, str(tmp_path / "program.py"), *COMMAND[2:], "--output_dir", str(tmp_path / "two")]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    for process in (0, 1):
        assert f"process {process} of 2" in result.stdout
    assert result.stdout.count("# Robustness and monosemanticity") == 1
    assert results(tmp_path / "two") == results(one)
    assert (tmp_path / "two" / "results.csv").read_text() == (one / "results.csv").read_text()


def test_all_processes_train_the_heads(tmp_path):
    command = [*TORCHRUN, *COMMAND[:4], "--limit", "120", "--seeds", "0", "--probe_epochs", "2", "--corruptions"]
    command += ["--features", "ncl_head", "csr", "raw", "--head_epochs", "2", "--output_dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    assert {row["config"]["features"] for row in rows(tmp_path, ACCURACY)} == {"ncl_head", "csr", "raw"}


def test_a_killed_run_continues_to_the_same_rows(one, tmp_path):
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, *COMMAND, "--output_dir", str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    path = folder / "results.jsonl"
    while (
        process.poll() is None and time.monotonic() < deadline and not (path.exists() and b"\n" in path.read_bytes())
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = results(folder)
    assert 0 < len(there) < len(results(one))
    run([sys.executable], folder, "--resume")
    assert results(folder) == results(one)
    assert set(there) <= set(results(folder))
