"""Rows that are shown in no table: of several configurations, not whole, unreadable or of another version."""

import json
import re
import shutil

import pytest
from experiments import CannotShow, Experiment
from tables import main
from written_runs import label_noise, probed, salient, shifted, write


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("figure_6", r"figure_6 needs rows of robust_loss, .*`python recipes/robust_loss.py"),
        ("figure_5", r"figure_5 needs rows of superposition, .*`python recipes/superposition.py"),
        (
            "table_2",
            r"rows of sst2_monolora or dolly_monolora, .*sst2_monolora.py .* or `python recipes/dolly_monolora.py",
        ),
        ("figure_7", r"only has 'figure_7'; it takes figure_1a, figure_4ab, table_1"),
    ],
)
def test_a_figure_without_rows_is_an_error_if_asked_for(item, message, runs, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["--runs", str(runs), "--output_dir", str(tmp_path / "out"), "--only", item])
    assert not (tmp_path / "out").exists()


def test_two_configurations_share_no_table(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    label_noise(tmp_path / "runs" / "more", sae_k=16, batch_size=64)
    arguments = ["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"2 configurations of label_noise_probing .*sae_k: None / 16.*--split"):
        main(arguments)
    assert not (tmp_path / "out").exists()
    main([*arguments, "--only", "figure_4c"])  # they are not on this page
    main([*arguments, "--split"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert '<section id="label_noise_probing-1">' in page
    assert '<section id="label_noise_probing-2">' in page
    assert "(2: more)</h2>" in page
    assert (tmp_path / "out" / "label_noise_probing-2" / "figure_1b.png").exists()


def test_rows_of_two_configurations_in_one_file(tmp_path):
    one, other = label_noise(tmp_path / "runs" / "a", sae_k=8), label_noise(tmp_path / "b", sae_k=16)
    with (one / "results.jsonl").open("a") as file:
        file.write((other / "results.jsonl").read_text())
    arguments = ["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"2 configurations .*/runs/a \(sae_k: 8 / 16\)"):
        main(arguments)
    main([*arguments, "--split"])
    assert (tmp_path / "out" / "label_noise_probing-2" / "results.md").exists()


def test_the_same_run_twice_is_not_counted_twice(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs" / "first")
    shutil.copytree(runs, tmp_path / "runs" / "copy")
    with pytest.raises(ValueError, match=r"copy/label_noise, .*first/label_noise \(the same settings\)"):
        main(["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")])


def test_a_stopped_run_is_not_shown_as_whole(runs, tmp_path):
    folder = label_noise(tmp_path / "runs" / "label_noise")
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    kept = [r for r in rows if not (r["config"].get("features") == "ncl" and r["seed"] == 1)]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    lacks = "lacks rows of the metric probe_training_top1 (features ncl, noise_rate 0.0, probe_weight_decay 0.0, "
    lacks += "seed 1 and 12 more)"
    main(["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")])
    assert re.search(f"Not whole: .*{re.escape(lacks)}", (tmp_path / "out" / "results.md").read_text())
    assert not (tmp_path / "out" / "label_noise_probing").exists()
    with pytest.raises(ValueError, match=re.escape(lacks)):
        main(["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out"), "--only", "table_1"])


@pytest.mark.parametrize(
    ("left_out", "lacks"),
    [
        ({"corruption": "snow", "severity": 5, "seed": 1}, "corruption snow, severity 5, .*, seed 1 and 6 more"),
        ({"corruption": "snow"}, "corruption snow, severity 1, .*, seed 0 and 69 more"),
    ],
)
def test_corruptions_that_were_not_reached_are_missed(left_out, lacks, tmp_path):
    folder = shifted(tmp_path / "runs", corruptions={"c": ["fog", "snow"]})
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    kept = [r for r in rows if any((r["config"] | {"seed": r["seed"]}).get(k) != v for k, v in left_out.items())]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    arguments = ["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out"), "--only", "figure_2c"]
    with pytest.raises(ValueError, match=rf"offline_probe_top1 \(features poly, shift c, {lacks}\)"):
        main(arguments)


def test_corruptions_that_the_configuration_does_not_name_are_not_averaged(tmp_path):
    shifted(tmp_path / "runs")
    arguments = ["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out"), "--only", "figure_2c"]
    with pytest.raises(ValueError, match="do not say which corruptions of c there were"):
        main(arguments)


def test_folders_that_cannot_be_read(runs, tmp_path):
    out = ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="which is no folder"):
        main(["--runs", str(tmp_path / "none"), *out])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there is no results.jsonl below .*empty; run a recipe"):
        main(["--runs", str(tmp_path / "empty"), *out])
    shutil.copytree(runs / "label_noise", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"bare/results.jsonl has no config.json beside it"):
        main(["--runs", str(tmp_path / "bare"), *out])
    with pytest.raises(ValueError, match=r"output_dir is /proc/self/x, which cannot be written to"):
        main(["--runs", str(runs), "--output_dir", "/proc/self/x"])
    with pytest.raises(ValueError, match=r"output_dir is .*runs0, which holds the run"):
        main(["--runs", str(runs), "--output_dir", str(runs)])
    broken = salient(tmp_path / "broken")
    (broken / "results.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"broken/results.jsonl, line 1: not JSON"):
        main(["--runs", str(broken), *out])
    label_noise(tmp_path / "other_version", no_such_setting=1)
    with pytest.raises(
        ValueError, match=r"have the settings no_such_setting, which recipes/label_noise_probing.py lacks"
    ):
        main(["--runs", str(tmp_path / "other_version"), *out, "--only", "table_1"])
    known = {"data": "my_images", "noise_rates": [0.0], "decays": [0.1]}
    write(tmp_path / "older", "label_noise_probing", known, probed(noise_rate=[0.0]))
    with pytest.raises(ValueError, match="rows of label_noise_probing do not say the num_classes"):
        main(["--runs", str(tmp_path / "older"), *out, "--only", "table_1"])
    main(["--runs", str(tmp_path / "older"), *out])
    assert (
        "Not shown: rows of label_noise_probing do not say the num_classes"
        in (tmp_path / "out" / "index.html").read_text()
    )
    label_noise(tmp_path / "own_data", data="my_images")  # whose classes stand in its configuration
    main(["--runs", str(tmp_path / "own_data"), *out, "--only", "table_1"])


def test_judges_by_an_earlier_name_are_not_left_out_without_a_word(tmp_path):
    arm = {"task": "refusal_embedded", "judge": "embedded", "step": None, "method": "base"}
    rows = [("accuracy", 0.9, {"method": "base", "task": None, "judge": None, "step": None}), ("unsafe", 0.1, arm)]
    config = {"methods": ["base"], "judges": ["embedded"], "demonstration": True}
    write(tmp_path / "runs", "sst2_monolora", config, rows)
    main(["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Not shown: rows of sst2_monolora are of the judge embedded" in page


@pytest.mark.parametrize(
    ("settings", "facts", "message"),
    [
        ({"rate": 0.1}, {}, "rows of lamps do not say the num_classes: they are of an older version"),
        ({"rate": 0.1, "speed": 3}, {"num_classes": 2}, "have the settings speed, which recipes/lamps.py lacks"),
    ],
)
def test_configurations_of_other_versions(settings, facts, message):
    lamps = Experiment(
        "lamps", (), "", "", {}, cells=list, report=str, draw=None,
        facts=("num_classes",), defaults={"rate": 0.5, "batch_size": 8},
    )  # fmt: skip
    with pytest.raises(CannotShow, match=message):
        lamps.configuration(settings, facts)
    known = {"rate": 0.1, "batch_size": 8, "num_classes": 2}
    assert lamps.configuration({"rate": 0.1}, {"num_classes": 2}) == known
