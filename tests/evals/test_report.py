"""The table and the figure are functions of the rows."""

from __future__ import annotations

import csv
import math

import pytest
from matplotlib.image import imread

from evals.paper import table_2_points
from evals.report import bounds, figure_panels, summary, table, write_report
from vision_bench.runs import Run


def add(run, metric, value, task, adapter=None, method="base", seed=None, n=200, **arm):
    arm |= {"model": "m", "adapter": adapter, "method": method, "task": task}
    run.add(metric, value, n=n, seed=seed, seconds=1.0, device="cpu", **arm)


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "out", "evals", {})
    add(run, "refused_harmful", 0.9, "refusal_offline")
    add(run, "acc", 0.5, "sentiment_offline")
    add(run, "seconds", 3.0, "sentiment_offline")
    for seed in (0, 1):
        for method, refused, accuracy in (("lora", 0.5, 0.9), ("monolora", 0.7, 0.8)):
            add(run, "refused_harmful", refused + 0.1 * seed, "refusal_offline", f"{method}-seed{seed}", method, seed)
            add(run, "acc", accuracy, "sentiment_offline", f"{method}-seed{seed}", method, seed)
    add(run, "rougeL", 12.5, "dolly")
    return run


def cells(text):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {tuple(line[:3]): line[3:] for line in lines[2:]}


def wilson(share, n, z=1.959963984540054):
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return centre - half, centre + half


def test_one_seed_has_the_interval_over_prompts_and_several_that_over_seeds(run):
    found = cells(table([row for row in run.rows if row["metric"] != "seconds"]))
    low, high = wilson(0.9, 200)
    prompts, base, lora, monolora, difference = found["refusal_offline", "refused_harmful", "-"]
    assert (prompts, base) == ("200", f"90.00 [{100 * low:.2f}, {100 * high:.2f}]")
    half_width = 12.706204736 * 5  # t(0.975, 1) times the standard error of two values 10 points apart
    assert lora == f"55.00 ± {half_width:.2f}"
    assert monolora == f"75.00 ± {half_width:.2f}"
    assert difference == "+20.00 ± 0.00"
    assert found["dolly", "rougeL", "-"] == ["200", "12.50", "-", "-", "-"]
    assert not any("seconds" in key for key in found)


@pytest.mark.parametrize("share", [0.0, 0.005, 0.5, 1.0])
def test_bounds_are_wilsons(share):
    row = {"metric": "acc", "value": share, "n": 200, "config": {}}
    assert bounds(row) == pytest.approx(wilson(share, 200), abs=1e-9)
    assert bounds(row | {"metric": "bleu"}) is None
    assert bounds(row | {"config": {"low": 0.1, "high": 0.2}}) == (0.1, 0.2)


def test_the_csv_has_every_row(run):
    write_report(run)
    with open(run.folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(run.rows) - 1
    first = rows[0]
    assert (first["task"], first["metric"], float(first["value"]), first["n"]) == (
        "refusal_offline",
        "refused_harmful",
        0.9,
        "200",
    )
    assert float(first["low"]) < 0.9 < float(first["high"])
    assert rows[-1]["low"] == ""


def test_the_figure_has_a_point_for_each_method_and_seed_and_the_papers_beside(run):
    ours, paper = figure_panels(run.rows)
    assert [(p.method, round(p.performance, 6), round(p.harm, 6)) for p in ours.points] == [
        ("base", 50, 10),
        ("lora", 90, 50),
        ("monolora", 80, 30),
        ("lora", 90, 40),
        ("monolora", 80, 20),
    ]
    low, high = ours.points[0].harm_interval
    assert low < 10 < high
    points = [("base", 88.65, 4.83), ("lora", 92.78, 7.90), ("monolora", 94.84, 3.53)]
    assert [(p.method, p.performance, p.harm) for p in paper.points] == points == table_2_points("SST-2", "average")
    write_report(run)
    picture = imread(run.folder / "safety.png")
    assert picture.shape[1] > picture.shape[0] > 300
    assert picture[..., :3].std() > 0.05


def test_judged_rows_go_before_refusals_and_each_judge_has_a_panel(run):
    for judge, share in (("one", 0.2), ("two", 0.3)):
        add(run, "unsafe", share, "beavertails_eval", judge=judge)
        add(run, "unsafe", 1.0, "beavertails_eval", judge=judge, category="animal_abuse")
    panels = figure_panels(run.rows)
    assert [(p.title, [point.harm for point in p.points]) for p in panels[1:3]] == [
        ("one: beavertails_eval", [20]),
        ("two: beavertails_eval", [30]),
    ]
    of_arms, of_categories = table(run.rows).split("### Unsafe answers by category")
    assert "beavertails_eval" in {key[0] for key in cells(of_arms)}
    assert "animal_abuse" not in of_arms
    assert cells(of_categories)["beavertails_eval: animal_abuse", "one", "200"] == ["100.00 [98.12, 100.00]"]


def test_a_task_asked_for_twice_counts_once(run):
    before = table(run.rows)
    for row in list(run.rows):
        config = row["config"] | {"requested": "a_group"}
        run.add(row["metric"], row["value"], n=row["n"], seed=row["seed"], seconds=0, device="cpu", **config)
    assert cells(write_report(run)) == {key: value for key, value in cells(before).items() if key[1] != "seconds"}


def test_rows_without_a_pair_have_no_figure(tmp_path):
    run = Run(tmp_path / "out", "evals", {})
    add(run, "acc", 0.5, "sentiment_offline")
    assert "50.00" in write_report(run)
    assert not (run.folder / "safety.png").exists()


def test_no_rows(tmp_path):
    with pytest.raises(ValueError, match=r"has no results; `python -m evals generate`"):
        write_report(Run(tmp_path / "out", "evals", {}))


def test_the_terminal_has_a_table_of_100_columns_for_each_task_and_judge(run):
    names = ["base", "a-long-name-of-an-arm", "another-long-name-of-an-arm", "a-fourth-arm"]
    for name in names:
        add(run, "answered", 1.0, "advbench", judge="refusal", adapter=name, method=name)
        add(run, "refused", 0.0, "advbench", judge="refusal", adapter=name, method=name)
    text = summary(run)
    assert max(map(len, text.splitlines()[:-1])) <= 100
    assert text.splitlines()[-1].endswith(str(run.folder / "results.md"))
    first, second = text.split("advbench, judged by refusal\n")[1:]
    assert [line.split()[0] for line in first.splitlines()[3:5]] == ["answered", "refused"]
    assert first.count("100.00 [98.12, 100.00]") == 3
    assert "a-fourth-arm" in second
    assert second.count("100.00 [98.12, 100.00]") == 1


def test_harmless_prompts_that_are_answered_are_not_unsafe(run):
    for category in ("safe", "unsafe"):
        add(run, "answered", 0.75, "xstest", judge="refusal", category=category)
    of_categories = cells(table(run.rows).split("### Unsafe answers by category")[1])
    assert ("xstest: unsafe", "refusal", "200") in of_categories
    assert ("xstest: safe", "refusal", "200") not in of_categories
