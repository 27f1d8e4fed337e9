"""Silence on two processes (DDP, ZeRO-2, ZeRO-3): the adapter of one, and a refusal where it would be another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
WORKER = str(Path(__file__).parent / "silence_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


@pytest.fixture
def worker(tmp_path):
    """The worker and the folder of its base."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    base.save_pretrained(tmp_path / "base")
    return WORKER, tmp_path / "base"


def run(*command):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        # DeepSpeed compiles an operation at its first use; the folder keeps it for the next test.
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".venv" / "torch_extensions"),
    }
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)


def trained(*command, folder, options=()):
    result = run(*command, folder, *options)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    log = [line for line in json.loads((folder / "log.json").read_text()) if "loss" in line]
    return load_file(folder / "adapter" / "adapter_model.safetensors"), log


def check_equal(one, two, tolerance=2e-5):
    (expected, log), (found, log_of_two) = one, two
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance)
    assert len(log) == len(log_of_two) == 6
    assert 0 < log[-1]["silence_loss"] < log[0]["silence_loss"]
    for line, line_of_two in zip(log, log_of_two, strict=True):
        for measure in ("silence_loss", "silence_fired"):
            assert line_of_two[measure] == pytest.approx(line[measure], rel=1e-4)


@pytest.mark.parametrize("options", [["--clip"], ["--bias", "--lower"]])
def test_two_processes_train_the_adapter_of_one(worker, tmp_path, options):
    one = trained(sys.executable, *worker, folder=tmp_path / "one", options=options)
    assert len(one[0]) == 2 * 7 * (2 + ("--bias" in options))
    check_equal(one, trained(*TORCHRUN, *worker, folder=tmp_path / "two", options=options))


@pytest.mark.parametrize("file", ["zero2", "zero3"])
def test_deepspeed_trains_the_adapter_of_one_process(worker, tmp_path, file):
    """Sharded gradients, each step in two passes with activation checkpointing, beside one process in one pass."""
    one = trained(sys.executable, *worker, folder=tmp_path / "one", options=["--bias"])
    assert len(one[0]) == 2 * 7 * 3
    launch = [*LAUNCH, "--config_file", ROOT / "recipes" / "accelerate" / f"{file}.yaml"]
    launch += ["--gradient_accumulation_steps", "2"]
    folder = tmp_path / "two"
    # Sums of other order, which Adam makes steps of one size of; without a step's hinge they would differ by 1e-2.
    check_equal(one, trained(*launch, *worker, folder=folder, options=["--bias", "--accumulate"]), tolerance=2e-4)
    assert f"'stage': {file[-1]}" in json.loads((folder / "engine.json").read_text())


def test_other_texts_in_each_process_are_refused(worker, tmp_path):
    result = run(*TORCHRUN, *worker, tmp_path, "--other_texts")
    assert result.returncode != 0
    assert "the processes have other batches, or options of Silence, than one another" in result.stderr
