"""The tables of what gains consist of, from rows of runs of the command: against its own tables, and by hand."""

import basis_tables
import pandas as pd
import pytest

from tests.conftest import rows
from vision_bench import gain_parts
from vision_bench.__main__ import main
from vision_bench.runs import interval


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of a model, with other learners and features."""
    folder = tmp_path_factory.mktemp("basis")
    command = ["--random_init", "small_conv", "--limit", "100", "--probe_epochs", "2", "--sae_epochs", "1"]
    command += ["--seeds", "0", "1", "--fit_each_seed", "--cache_dir", str(folder / "cache")]
    first = ["--corruptions", "label_noise=0.4", "pair_flips=0.2", "gaussian=0.5", "--learners", "probe", "k_sparse_2"]
    first += ["--features", "raw", "unit", "sae", "sae_random_basis"]
    main([*command, *first, "--output_dir", str(folder / "a")])
    main([*command, "--corruptions", "few_shots=0.5", "--features", "raw", "sae", "--output_dir", str(folder / "b")])
    return folder


def test_rows_of_several_runs_give_the_tables_of_the_command(runs, tmp_path):
    file = tmp_path / "rows.csv"
    basis_tables.collect([runs / "a", runs / "b"]).to_csv(file, index=False)
    text = basis_tables.tables(basis_tables.read(file))
    # Every line of the command's tables of parts is there; the clean condition is of one run, not of both.
    results = (runs / "a" / "results.md").read_text()
    parts = [line for line in results.splitlines() if line.startswith("| sae | ") and line.count("|") == 7]
    assert len(parts) == 2 * 4
    for line in parts:
        assert line in text
    sae, raw = (
        [row["value"] for row in rows(runs / "b", "offline_probe_top1", features=kind, few_shots=0.5)]
        for kind in ("sae", "raw")
    )
    header = next(line for line in text.splitlines() if line.startswith("| difference"))
    line = next(line for line in text.splitlines() if line.startswith("| sae - raw"))
    by_column = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    differences = interval([100 * (a - b) for a, b in zip(sae, raw, strict=True)])
    assert by_column["50 % of the images |"].removesuffix(" |") == differences.text(1, sign=True)
    assert by_column["20 % pair flips"] != "-"
    unexplained = interval([row["value"] for row in rows(runs / "a", "sae_fvu", features="sae")]).text(3)
    described = next(line for line in text.splitlines() if line.startswith("| sae | "))
    assert f"| {unexplained} |" in described
    own = interval(
        [100 * row["value"] for row in rows(runs / "a", "probe_training_top1", features="sae", label_noise=0.4)]
    )
    lines = text.partition("on their own training labels")[2].splitlines()
    header, line = (next(line for line in lines if line.startswith(start)) for start in ("| features", "| sae |"))
    by_column = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert by_column["40 % wrong labels"].startswith(own.text(1))
    assert "gaussian 0.5" not in header  # probes of clean images, trained on the same labels as those of `clean`
    line = next(line for line in lines if line.startswith("| unit |"))
    assert line.endswith("| - |")  # `unit` was not measured with half of the images, which is no warning


def test_tuned_probes_of_raw_features_stand_beside_the_others(runs, tmp_path):
    file = tmp_path / "rows.csv"
    found = basis_tables.collect([runs / "a"])
    tuned = found[(found["metric"] == "offline_probe_top1") & (found["features"] == "raw")].copy()
    tuned["metric"], tuned["value"] = "tuned_top1", tuned["value"] + 0.125
    pd.concat([found, tuned]).to_csv(file, index=False)
    text = basis_tables.tables(basis_tables.read(file))
    line = next(line for line in text.splitlines() if line.startswith("| raw - tuned raw"))
    assert line == "| raw - tuned raw |" + " -12.5 ± 0.0 |" * 4
    assert f"| {gain_parts.TUNING} |" in text


def test_runs_of_two_models_are_refused(runs, tmp_path):
    command = ["--random_init", "test_resnet", "--image_size", "32", "--limit", "100", "--probe_epochs", "1"]
    main([*command, "--seeds", "0", "--corruptions", "--features", "raw", "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="runs are of small_conv, test_resnet; name those of one model"):
        basis_tables.collect([runs / "a", tmp_path])
