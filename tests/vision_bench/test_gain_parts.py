"""What gains consist of: from rows that are written here, and from a run of the command."""

import csv

import pytest
import torch

from tests.conftest import rows
from tests.vision_bench.conftest import SMALL
from vision_bench import gain_parts
from vision_bench.__main__ import main
from vision_bench.gain_parts import RawNames
from vision_bench.label_noise import read_human_labels
from vision_bench.probe import TRAINING
from vision_bench.report import ProbeTable
from vision_bench.runs import interval
from vision_bench.sweep import ACCURACY

NAMES = RawNames("raw", "unit")
# Accuracies in percent of two seeds under two noises.
POINTS = {
    "raw": {0.0: (60, 62), 0.8: (10, 14)},
    "unit": {0.0: (61, 63), 0.8: (30, 36)},
    "sae": {0.0: (59, 60), 0.8: (29, 33)},
    "sae_random_basis": {0.0: (58, 60), 0.8: (31, 32)},
    "relu": {0.0: (50, 50), 0.8: (20, 20)},
}


def table(points):
    written = [
        {"metric": ACCURACY, "value": value / 100, "n": 9, "seed": seed, "config": {"features": arm, "noise": noise}}
        for arm, by_noise in points.items()
        for noise, values in by_noise.items()
        for seed, value in enumerate(values)
    ]
    return ProbeTable(written, {noise: {"noise": noise} for noise in (0.0, 0.8)}, list(points))


def test_parts_are_paired_by_seed_and_add_up():
    of_all = table(POINTS)
    assert gain_parts.explained_kinds(of_all.arms, NAMES) == ["sae"]
    found = gain_parts.parts(of_all, "sae", 0.8, NAMES)
    expected = {"gain over raw": [19, 19], "scale": [20, 22], "kernel": [1, -4], "basis": [-2, 1]}
    assert list(found) == list(expected)
    for part, values in expected.items():
        assert found[part] == pytest.approx(interval(values))
    assert sum(found[part].mean for part in ("scale", "kernel", "basis")) == pytest.approx(found["gain over raw"].mean)
    tuned = table({"raw": {0.0: (60, 62), 0.8: (40, 46)}})
    assert gain_parts.parts(of_all, "sae", 0.8, NAMES, tuned)["tuning"] == pytest.approx(interval([30, 32]))


def test_the_table_says_what_a_learner_can_tell():
    text = gain_parts.markdown(table(POINTS), {"clean": 0.0, "80 % wrong labels": 0.8}, NAMES)
    assert text.startswith("| features | corruption | gain over raw | scale | kernel | basis |\n")
    assert "| sae | clean | -1.5 ± 6.4 | +1.0 ± 0.0 | -3.0 ± 0.0 | +0.5 ± 6.4 |" in text
    assert "| sae | 80 % wrong labels | +19.0 ± 0.0 | +21.0 ± 12.7 |" in text
    assert "cannot tell one basis from another" in text
    tuned = gain_parts.markdown(table(POINTS), {"clean": 0.0}, NAMES, table(POINTS), is_equivariant=False)
    assert "| gain over raw | scale | tuning | kernel | basis |" in tuned
    assert "To this learner axes matter" in tuned


@pytest.mark.parametrize("lacking", ["raw", "unit", "sae", "sae_random_basis"])
def test_without_what_it_takes_nothing_is_explained(lacking):
    left = table({arm: points for arm, points in POINTS.items() if arm != lacking})
    assert gain_parts.explained_kinds(left.arms, NAMES) == []
    assert gain_parts.dots(left, {"clean": 0.0}, NAMES) == {}


def test_the_command_shows_controls_and_the_labels_that_people_gave(tmp_path):
    counts = torch.eye(10, dtype=torch.long) * 70 + torch.eye(10, dtype=torch.long).roll(3, dims=1) * 30
    people = tmp_path / "people.csv"
    people.write_text("\n".join(",".join(map(str, row)) for row in counts.tolist()) + "\n")
    kinds = ["raw", "unit", "sae", "sae_random_basis", "sae_frozen_decoder", "pca"]
    command = [*SMALL, "--limit", "300", "--seeds", "0", "1", "--probe_epochs", "20", "--sae_epochs", "2"]
    command += ["--output_dir", str(tmp_path / "run"), "--features", *kinds]
    command += ["--learners", "probe", "k_sparse_1"]
    corrupted = ["--corruptions", "label_noise=0.4,human", "pair_flips=0.3", "few_shots=0.5"]
    with pytest.raises(SystemExit, match="corruptions label_noise=human needs human_labels FILE"):
        main([*command, *corrupted])
    with pytest.raises(SystemExit, match="human_labels FILE needs corruptions label_noise=human"):
        main([*command, "--human_labels", str(people)])
    main([*command, *corrupted, "--human_labels", str(people)])
    measured = rows(tmp_path / "run", TRAINING[0], features="raw", few_shots=1, label_noise="human")
    assert {row["seed"]: row["n"] for row in measured} == {0: 299, 1: 299}
    labels = torch.cat([torch.full((30,), c) for c in range(10)])
    share = (read_human_labels(people).draw(labels, torch.Generator().manual_seed(0)) != labels).double().mean()
    assert all(abs(row["config"]["wrong_labels"] - share) < 0.1 for row in measured)
    text = (tmp_path / "run" / "results.md").read_text()
    real = 100 * sum(row["config"]["wrong_labels"] for row in measured) / 2
    assert f"| raw | 100 % | human labels ({real:.1f} %) |" in text
    assert "| raw | 100 % | 30 % pair flips |" in text
    assert "(random), sae_frozen_decoder | 0." in text
    sections = text.split("what the gains over raw features consist of.")[1:]
    explained, for_axes = (section.split("\n\n")[:3] for section in sections)
    assert "cannot tell one basis from another" in explained[2]
    assert "To this learner axes matter" in for_axes[2]
    assert [line.split(" | ")[1] for line in explained[1].splitlines()[2:]] == [
        "clean", "40 % wrong labels", "human labels", "30 % pair flips", "50 % of the images"
    ]  # fmt: skip
    with (tmp_path / "run" / "results.csv").open() as file:
        lines = {(x["features"], x["learner"], x["few_shots"], x["label_noise"]): x for x in csv.DictReader(file)}
    for learner, (_, table_of_parts, _) in (("probe", explained), ("k_sparse_1", for_axes)):
        gain = float(lines["sae", learner, "1.0", "human"]["gain_over_raw"])
        assert f"| sae | human labels | {gain:+.1f} " in table_of_parts
    assert float(lines["raw", "probe", "1.0", "pair_flips 0.3"]["wrong_labels"]) == pytest.approx(0.3, abs=0.01)
    assert (tmp_path / "run" / "gain_parts.png").exists()
    people.write_text(people.read_text().replace("70", "60"))
    with pytest.raises(SystemExit, match=r"of another configuration \(human_labels_sha256"):
        main([*command, *corrupted, "--human_labels", str(people), "--resume"])
