"""The SST-2 recipe in real processes: launched, distributed, killed and resumed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vision_bench.runs import read_rows

ROOT = Path(__file__).parent.parent.parent
RECIPE = str(ROOT / "recipes" / "sst2_monolora.py")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def run(command, **more):
    result = subprocess.run(command, capture_output=True, text=True, env=environment(**more))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result


def rows_of(folder, metric="accuracy"):
    return {
        (r["config"]["method"], r["seed"]): r for r in read_rows(folder / "results.jsonl") if r["metric"] == metric
    }


@pytest.mark.timeout(1500)  # four minutes on two free cores
def test_the_offline_default_as_a_new_user_launches_it(tmp_path):
    """No option: the recipe builds its model and data; both adapters learn the task, which the base half knows."""
    command = [*LAUNCH, RECIPE, "--output_dir", str(tmp_path / "out")]
    result = run(command, XDG_CACHE_HOME=str(tmp_path / "cache"), OMP_NUM_THREADS=str(os.cpu_count()))
    rows = rows_of(tmp_path / "out")
    base, lora, mono = (rows[cell]["value"] for cell in (("base", None), ("lora", 0), ("monolora", 0)))
    assert 0.5 < base < 0.85
    assert lora > base + 0.05
    assert mono > base + 0.05
    sparsity = rows_of(tmp_path / "out", "task_sparsity")[("monolora", 0)]["value"]
    assert 0.05 < sparsity < 0.99
    assert "demonstration on the offline model" in (tmp_path / "out" / "results.md").read_text()
    assert f"monolora has {100 * mono:.2f} %" in result.stdout
    assert (tmp_path / "out" / "monolora-seed0" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.fixture
def options(small_model, sentiment_files):
    """Without dropout, whose masks depend on the process."""
    fixed = "--max_steps 6 --lora_dropout 0 --learning_rate 5e-3 --gradient_checkpointing False --lora_r 4"
    return ["--model_name_or_path", str(small_model), *sentiment_files, *fixed.split()]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["ddp", "zero2", "zero3"])
def test_two_processes_train_the_same_adapter_as_one(options, tmp_path, file):
    one, two = tmp_path / "one", tmp_path / "two"
    run([sys.executable, RECIPE, *options, "--per_device_train_batch_size", "8", "--output_dir", str(one)])
    config = ROOT / "recipes" / "accelerate" / f"{file}.yaml"
    command = [*LAUNCH, "--config_file", str(config), RECIPE, *options, "--per_device_train_batch_size", "4"]
    # DeepSpeed compiles an operation at its first use; the folder keeps it for the next test.
    run([*command, "--output_dir", str(two)], TORCH_EXTENSIONS_DIR=str(ROOT / ".venv" / "torch_extensions"))

    expected_type = {"ddp": "MULTI", "zero2": "ZERO2", "zero3": "ZERO3"}[file]
    for row in read_rows(two / "results.jsonl"):
        assert row["config"]["num_processes"] == 2
        assert expected_type in row["config"]["distributed_type"]
    assert yaml.safe_load(config.read_text())["num_processes"] == 2
    shards = list(two.glob("monolora-seed0/checkpoint-6/global_step6/*optim_states.pt"))
    assert len(shards) == (0 if file == "ddp" else 2)  # DeepSpeed really was at work
    for method in ("lora", "monolora"):
        name = f"{method}-seed0/adapter/adapter_model.safetensors"
        expected, found = load_file(one / name), load_file(two / name)
        assert found.keys() == expected.keys()
        for tensor in expected:
            assert found[tensor].numel() > 0
            torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=2e-5)
    for metric in ("accuracy", "task_sparsity"):
        first, second = rows_of(one, metric), rows_of(two, metric)
        assert {k: r["value"] for k, r in second.items()} == pytest.approx(
            {k: r["value"] for k, r in first.items()}, abs=2e-3
        )


@pytest.mark.slow
@pytest.mark.parametrize("file", ["ddp", "zero2", "zero3"])
def test_two_processes_resume_exactly(options, tmp_path, file):
    options = [*options, "--methods", "monolora", "--save_strategy", "steps", "--save_steps", "3"]
    config = ROOT / "recipes" / "accelerate" / f"{file}.yaml"
    command = [*LAUNCH, "--config_file", str(config), RECIPE, *options, "--per_device_train_batch_size", "4"]
    command += ["--output_dir", str(tmp_path)]
    run(command, TORCH_EXTENSIONS_DIR=str(ROOT / ".venv" / "torch_extensions"))
    expected = load_file(tmp_path / "monolora-seed0" / "adapter" / "adapter_model.safetensors")

    # As if killed after step 3: later checkpoints, adapter and rows do not exist.
    for path in ("monolora-seed0/checkpoint-6", "monolora-seed0/adapter"):
        shutil.rmtree(tmp_path / path)
    (tmp_path / "results.jsonl").unlink()
    run(command, TORCH_EXTENSIONS_DIR=str(ROOT / ".venv" / "torch_extensions"))
    found = load_file(tmp_path / "monolora-seed0" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.slow
def test_a_killed_process_of_two_leaves_a_checkpoint_that_resumes(options, tmp_path):
    options = [*options, "--max_steps", "40", "--save_strategy", "steps", "--save_steps", "5", "--methods", "monolora"]
    config = ROOT / "recipes" / "accelerate" / "ddp.yaml"
    launch = [*LAUNCH, "--config_file", str(config), RECIPE, *options, "--per_device_train_batch_size", "4"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run([*launch, "--output_dir", str(whole)])

    command = [*launch, "--output_dir", str(cut)]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    deadline = time.monotonic() + 240
    while not (cut / "monolora-seed0" / "checkpoint-10" / "trainer_state.json").exists():
        assert launcher.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks = [p for p in psutil.Process(launcher.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    assert len(ranks) == 1
    ranks[0].kill()
    assert launcher.wait(timeout=120) != 0  # the other process does not wait for ever
    assert not (cut / "monolora-seed0" / "adapter").exists()

    run(command)
    name = "monolora-seed0/adapter/adapter_model.safetensors"
    expected, found = load_file(whole / name), load_file(cut / name)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_result(options, tmp_path):
    options = [*options, "--max_steps", "40", "--lora_dropout", "0.1", "--save_strategy", "steps", "--save_steps", "5"]
    options += ["--methods", "lora", "monolora", "--per_device_train_batch_size", "8"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run([sys.executable, RECIPE, *options, "--output_dir", str(whole)])

    command = [sys.executable, RECIPE, *options, "--output_dir", str(cut)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    deadline = time.monotonic() + 240
    while not (cut / "monolora-seed0" / "checkpoint-10" / "trainer_state.json").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = rows_of(cut)
    assert set(finished) == {("lora", 0)}
    assert not (cut / "monolora-seed0" / "adapter").exists()
    # A checkpoint that was being written when the process died is passed over.
    (cut / "monolora-seed0" / "checkpoint-35").mkdir()

    run(command)
    assert rows_of(cut)[("lora", 0)] == finished[("lora", 0)]
    for method in ("lora", "monolora"):
        name = f"{method}-seed0/adapter/adapter_model.safetensors"
        expected, found = load_file(whole / name), load_file(cut / name)
        assert all(torch.equal(found[n], expected[n]) for n in expected)
    for metric in ("accuracy", "task_sparsity"):
        assert {k: r["value"] for k, r in rows_of(cut, metric).items()} == {
            k: r["value"] for k, r in rows_of(whole, metric).items()
        }


@pytest.mark.slow
def test_two_processes_train_and_one_judges(tmp_path):
    """The offline model and judge, safety columns and a checkpoint's, from a launch on two processes."""
    command = [*LAUNCH, "--config_file", str(ROOT / "recipes" / "accelerate" / "ddp.yaml"), RECIPE]
    options = "--train_samples 64 --eval_samples 16 --refusal_prompts 4 --eval_every 1 --methods base monolora"
    run([*command, *options.split(), "--output_dir", str(tmp_path)])
    assert len(list((tmp_path / "evaluation").glob("completions.jsonl"))) == 1
    rows = read_rows(tmp_path / "results.jsonl")
    found = {(r["metric"], r["config"]["method"], r["config"].get("step")): r for r in rows}
    for arm in (("base", None), ("monolora", None), ("monolora", 1)):
        assert found[("refused_harmful", *arm)]["n"] == 4
        assert found[("unsafe", *arm)]["config"]["judge"] == "offline"
        assert found[("accuracy", *arm)]["config"]["num_processes"] == 2
    assert 0 < found["alignment_sparsity", "monolora", None]["value"] < 1
