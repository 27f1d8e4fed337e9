"""The run folder: rows, resuming, refusing, atomic writing; intervals and paired differences."""

import json
import math

import pytest
from _run import Interval, Run, interval, markdown_table, paired_difference, read_rows, write_atomic
from scipy import stats

KEYS = {"recipe", "metric", "value", "n", "seed", "config", "seconds", "device", "versions", "commit", "time"}


def add(run, value=0.5, seed=0, **arm):
    run.add("accuracy", value, n=10, seed=seed, seconds=1.23456, device="cpu (2 threads)", **arm)


def test_rows_have_the_agreed_format_and_come_back(tmp_path):
    run = Run(tmp_path / "new" / "folder", "recipe", {"rate": 0.1, "names": ("a", "b")})
    add(run, method="lora")
    (row,) = read_rows(tmp_path / "new" / "folder" / "results.jsonl")
    assert set(row) == KEYS
    assert row["config"] == {"rate": 0.1, "names": ["a", "b"], "method": "lora"}
    assert (row["recipe"], row["metric"], row["value"], row["n"], row["seed"]) == ("recipe", "accuracy", 0.5, 10, 0)
    assert row["versions"]["torch"]
    assert row["seconds"] == 1.235
    again = Run(tmp_path / "new" / "folder", "recipe", {"rate": 0.1, "names": ["a", "b"]})
    assert again.rows == run.rows


def test_find_selects_by_metric_arm_and_seed(tmp_path):
    run = Run(tmp_path, "recipe", {"targets": ["q"]})
    add(run, 0.1, seed=0, method="lora")
    add(run, 0.2, seed=1, method="lora")
    add(run, 0.3, seed=0, method="monolora")
    assert [r["value"] for r in run.find("accuracy", method="lora")] == [0.1, 0.2]
    assert [r["value"] for r in run.find("accuracy", seed=0, targets=["q"])] == [0.1, 0.3]
    assert run.find("sparsity") == []


def test_another_configuration_or_recipe_is_refused_and_nothing_is_lost(tmp_path):
    add(Run(tmp_path, "recipe", {"rate": 0.1, "old": 1}))
    before = (tmp_path / "results.jsonl").read_bytes()
    message = r"another configuration \(new: None there, 2 now; old: 1 there, None now; rate: 0.1 there, 0.2 now\)"
    with pytest.raises(ValueError, match=message):
        Run(tmp_path, "recipe", {"rate": 0.2, "new": 2})
    with pytest.raises(ValueError, match="results of the recipe 'recipe'"):
        Run(tmp_path, "other", {"rate": 0.1, "old": 1})
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_run_without_results_leaves_the_folder_free(tmp_path):
    Run(tmp_path / "x", "recipe", {"rate": 0.1})
    assert not (tmp_path / "x").exists()
    Run(tmp_path / "x", "recipe", {"rate": 0.2})


def test_other_things_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        Run(tmp_path / "file", "recipe", {})
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"has a results\.jsonl without the config\.json"):
        Run(tmp_path, "recipe", {})
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "recipe", "config": {}}))
    (tmp_path / "results.jsonl").write_text('{"metric": "a"}\n{"metr')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        Run(tmp_path, "recipe", {})


def test_only_the_main_process_writes(tmp_path):
    run = Run(tmp_path / "x", "recipe", {}, is_main=False)
    add(run)
    run.write("results.md", "text")
    assert len(run.rows) == 1
    assert not (tmp_path / "x").exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "results.md"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_intervals():
    values = [1.0, 2.0, 4.0, 7.0]
    found = interval(values)
    low, high = stats.t.interval(0.95, 3, loc=3.5, scale=stats.sem(values))
    assert found.mean == 3.5
    assert math.isclose(found.half_width, (high - low) / 2)
    assert interval([2.0]) == Interval(2.0, None, 1)
    assert interval([0.5, 0.5]).half_width == 0
    with pytest.raises(ValueError, match="at least one value"):
        interval([])
    assert Interval(0.91234, 0.004, 3).scaled(100).text() == "91.23 ± 0.40"
    assert Interval(-1.0, None, 1).text(1) == "-1.0"
    assert Interval(1.0, None, 1).text(1, sign=True) == "+1.0"


def test_differences_are_paired_by_seed():
    first = [{"seed": s, "value": v} for s, v in ((0, 10.0), (1, 20.0), (5, 99.0))]
    second = [{"seed": s, "value": v} for s, v in ((1, 18.0), (0, 9.0), (7, -99.0))]
    assert paired_difference(first, second) == interval([1.0, 2.0])
    assert paired_difference(first, []) is None


def test_tables():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"
