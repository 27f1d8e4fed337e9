"""The recipes of Fig. 1, 2, 4 and 6 as processes: their default runs, and one that is killed and continued."""

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.recipes.conftest import ACCURACY, PRETRAINING, contents, rows

RECIPES = Path(__file__).parents[2] / "recipes"
PICTURES = {
    "input_noise_probing": ("figure_1b", "figure_2_uniform", "figure_2_gaussian"),
    "ood_probing": ("figure_2c",),
    "robust_loss": ("figure_6", "all_rates"),
    "salient_features": ("figure_4c",),
    "top_activated_samples": ("figure_1a", "figure_4ab"),
}
SMALL = [*PRETRAINING, "--sae_k", "4", "--sae_epochs", "4", "--probe_epochs", "4"]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes, on an idle machine
@pytest.mark.parametrize("recipe", PICTURES)
def test_the_default_run(recipe, tmp_path):
    command = [sys.executable, str(RECIPES / f"{recipe}.py"), "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-2000:]
    found = rows(tmp_path, ACCURACY)
    assert all(math.isfinite(row["value"]) for row in rows(tmp_path))
    by_seed = {seed: [row["value"] for row in found if row["seed"] == seed] for seed in range(5)}
    assert len({len(values) for values in by_seed.values()}) == 1
    assert len({tuple(values) for values in by_seed.values()}) == 5
    assert (tmp_path / "results.md").read_text() in done.stdout
    for name in PICTURES[recipe]:
        assert (tmp_path / f"{name}.png").exists()
        assert (tmp_path / f"{name}.pdf").exists()


@pytest.mark.slow
def test_two_processes_share_the_pretraining_and_one_tests(tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(RECIPES / "accelerate/ddp.yaml"),
    ]
    command = [*launch, str(RECIPES / "ood_probing.py"), "--output_dir", str(tmp_path), *SMALL, "--seeds", "0", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("# Linear probes on frozen features under a shift") == 1
    found = rows(tmp_path, ACCURACY)
    cells = {
        (row["config"]["features"], row["config"]["probe_weight_decay"], row["config"]["shift"], row["seed"])
        for row in found
    }
    assert len(found) == len(cells) == 10 * 4 * 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PICTURES)
def test_a_killed_run_continues_to_the_rows_of_a_whole_one(recipe, tmp_path):
    def command(name):
        return [sys.executable, str(RECIPES / f"{recipe}.py"), "--output_dir", str(tmp_path / name), *SMALL]

    subprocess.run(command("whole"), check=True, capture_output=True, timeout=500)
    process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results = tmp_path / "killed" / "results.jsonl"
    for _ in range(6000):
        if results.exists() and len(results.read_text().splitlines()) > 40:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = len(rows(tmp_path / "killed"))
    subprocess.run(command("killed"), check=True, capture_output=True, timeout=500)
    assert stopped < len(rows(tmp_path / "whole"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
