"""`python -m vision_bench` a second time: what is there already is not made again, and what is lacking is added."""

import shutil
import subprocess
import sys

import pytest
import torch

from tests.conftest import results
from tests.vision_bench.conftest import CORRUPTIONS, QUICK, SMALL, measured, no_pass
from vision_bench import benchmark, models, timm_models
from vision_bench.__main__ import main
from vision_bench.data import load_images


def test_a_second_run_with_the_same_features_makes_no_forward_pass(
    benchmark_run, ncl_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "outputs", no_pass)
    command = [str(ncl_checkpoint), "--output_dir", str(tmp_path / "b"), *QUICK]
    command += ["--cache_dir", str(benchmark_run / "cache")]
    main([*command, "--corruptions", "label_noise=0.6", "gaussian=0.5"])
    assert {row["config"]["label_noise"] for row in measured(tmp_path / "b")} == {0, 0.6}
    arm = {"label_noise": 0, "few_shots": 1, "model": str(ncl_checkpoint)}
    for test in ("clean", "gaussian 0.5"):
        for kind in ("raw", "unit", "sae"):
            first, second = (measured(f, test=test, features=kind, **arm) for f in (benchmark_run, tmp_path / "b"))
            assert [row["value"] for row in first] == [row["value"] for row in second]
    with pytest.raises(SystemExit, match="a forward pass"):
        main([*command, "--corruptions", "gaussian=0.7", "--output_dir", str(tmp_path / "c")])


def test_a_stopped_run_continues_to_the_same_rows(benchmark_run, ncl_checkpoint, tmp_path, monkeypatch, capsys):
    stopped = tmp_path / "run"
    command = [str(ncl_checkpoint), "--random_init", "small_conv", "--output_dir", str(stopped), *QUICK, *CORRUPTIONS]
    measure, calls = benchmark._measure, []

    def stopping(run, subject, kind, *rest):
        calls.append((subject.name, kind))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(run, subject, kind, *rest)

    monkeypatch.setattr(benchmark, "_measure", stopping)
    with pytest.raises(SystemExit, match=r"Stopped\. The same command with --resume continues."):
        main(command)
    assert 0 < len(results(stopped)) < len(results(benchmark_run))
    with pytest.raises(SystemExit, match=r"holds a benchmark already\. Give --resume to continue it"):
        main(command)
    main([*command, "--resume"])
    assert results(stopped) == results(benchmark_run)
    assert len(calls) == 3 + 6  # two of the eight pairs were there
    assert (stopped / "results.csv").read_text() == (benchmark_run / "results.csv").read_text()
    main([*command, "--resume"])
    assert len(calls) == 9
    with pytest.raises(SystemExit, match=r"of another configuration \(probe_epochs: 20 there, 5 now\)"):
        main([*command, "--resume", "--probe_epochs", "5"])


def test_rows_that_a_full_disk_cut_short_are_measured_anew_and_count_once(benchmark_run, ncl_checkpoint, tmp_path):
    cut = tmp_path / "run"
    shutil.copytree(benchmark_run, cut)
    lines = (cut / "results.jsonl").read_text().splitlines(keepends=True)
    (cut / "results.jsonl").write_text("".join(lines[:-5]) + lines[-5][:100])
    command = [str(ncl_checkpoint), "--random_init", "small_conv", "--output_dir", str(cut), *QUICK, *CORRUPTIONS]
    main([*command, "--resume"])
    assert len((cut / "results.jsonl").read_text().splitlines()) == len(lines)
    assert results(cut) == results(benchmark_run)
    assert (cut / "results.csv").read_text() == (benchmark_run / "results.csv").read_text()


def test_models_and_kinds_of_features_may_be_added(benchmark_run, ncl_checkpoint, tmp_path):
    grown = tmp_path / "run"
    shutil.copytree(benchmark_run, grown)
    before = results(grown)
    torch.manual_seed(0)
    model = models.ContrastiveModel(models.ModelConfig("test_resnet", projector_hidden=8, projector_out=4))
    timm_models.save(tmp_path / "resnet", model, load_images("digits", "test", image_size=32), {})
    main([str(tmp_path / "resnet"), "--features", "raw", "--output_dir", str(grown), *QUICK, *CORRUPTIONS, "--resume"])
    assert len(results(grown)) == len(before) + 4 * (2 * 2 * 2 + 4) + 2 * (2 * 2 * 2) + 1
    assert measured(grown, model=str(tmp_path / "resnet"))[0]["config"]["image_size"] == [32, 32]
    assert set(before) < set(results(grown))


def test_relu_that_equals_raw_is_measured_only_without_raw(tmp_path, monkeypatch):
    command = [*SMALL, "--output_dir", str(tmp_path), "--corruptions", *QUICK]
    main([*command, "--features", "relu"])
    alone = measured(tmp_path, features="relu")
    assert len(alone) == 2
    assert "| relu | 100 %" in (tmp_path / "results.md").read_text()
    main([*command, "--features", "raw", "relu", "--resume"])
    assert [row["value"] for row in measured(tmp_path, features="raw")] == [row["value"] for row in alone]
    assert measured(tmp_path, features="relu") == alone
    other = [*command, "--output_dir", str(tmp_path / "b"), "--cache_dir", str(tmp_path / "cache")]
    main([*other, "--features", "relu", "raw"])
    assert len(measured(tmp_path / "b", benchmark.SAME)) == 1
    assert not measured(tmp_path / "b", features="relu")
    main([*other, "--features", "relu", "--resume"])
    assert [row["value"] for row in measured(tmp_path / "b", features="relu")] == [row["value"] for row in alone]
    assert "| relu | 100 %" in (tmp_path / "b" / "results.md").read_text()
    monkeypatch.setattr(benchmark, "_measure", no_pass)
    main([*other, "--resume", "--features", "raw", "relu"])


HOLD = """
import sys, time, pathlib, vision_bench.runs as runs
with runs.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3)
"""


@pytest.mark.slow
def test_a_run_waits_for_an_autoencoder_that_another_one_trains_in_the_same_cache(tmp_path):
    command = [*SMALL, "--features", "sae", "--corruptions", *QUICK, "--cache_dir", str(tmp_path / "cache")]
    main([*command, "--output_dir", str(tmp_path / "first")])
    (checkpoint,) = (tmp_path / "cache").glob("sae-*/autoencoder.safetensors")
    checkpoint.unlink()
    script = [sys.executable, "-c", HOLD, str(checkpoint.parent)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        main([*command, "--output_dir", str(tmp_path / "second")])
    assert results(tmp_path / "second") == results(tmp_path / "first")
