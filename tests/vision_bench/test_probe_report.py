"""Tables of probes and rows as a frame against loops over the rows."""

import itertools
import math
import statistics

import pandas as pd
import pytest

from vision_bench.report import Comparison, OwnLabels, ProbeTable, unexplained, untrained
from vision_bench.runs import Interval, frame, interval, over_seeds, paired, select

SEEDS = (0, 1, 2)
DECAYS = (1e-3, 0.1)
RATES = (0.0, 0.5)
ARMS = ("poly", "sae", "poly_decay")


def row(metric, value, seed, **config):
    return {"metric": metric, "value": value, "n": 10, "seed": seed, "config": {"noise_rates": list(RATES)} | config}


def accuracy(arm, rate, seed, decay=0.0):
    return 0.6 + 0.1 * (arm == "sae") - 0.2 * rate + 0.013 * seed * (1 + rate) + (decay - 0.05) * (rate - 0.25)


@pytest.fixture
def rows():
    made = []
    for arm, rate, seed in itertools.product(ARMS, RATES, SEEDS):
        for decay in DECAYS if arm == "poly_decay" else (0.0,):
            config = {"features": arm, "noise_rate": rate, "probe_weight_decay": decay}
            made.append(row("offline_probe_top1", accuracy(arm, rate, seed, decay), seed, **config))
            made.append(row("probe_training_top1", 0.5 + 0.1 * decay - 0.4 * rate, seed, **config))
            made.append(row("class_means_training_top1", 0.4, seed, **config))
    for arm, seed in itertools.product(ARMS, SEEDS):
        made += [row(m, 0.2 + 0.1 * seed, seed, features=arm) for m in ("semantic_consistency", "chance_consistency")]
        made += [row("sparsity", None, seed, features=arm), row("live_dimensions", 7.0, seed, features=arm)]
    return [*made, row("chance_top1", 0.125, None, split="test")]


def table_of(rows):
    comparisons = [Comparison("sae", "sae", "poly"), Comparison("decay over sae", "poly_decay", "sae")]
    return ProbeTable(rows, {rate: {"noise_rate": rate} for rate in RATES}, ARMS, comparisons)


def test_accuracies_gains_and_their_growth(rows):
    table = table_of(rows)

    def points(arm, rate, decay=0.0):
        return [100 * accuracy(arm, rate, seed, decay) for seed in SEEDS]

    def gains(rate):
        return [a - b for a, b in zip(points("sae", rate), points("poly", rate), strict=True)]

    for rate in RATES:
        assert table.mean("sae", rate) == pytest.approx(interval(points("sae", rate)))
        assert table.gain("sae", rate) == pytest.approx(interval(gains(rate)))
        best = max(DECAYS, key=lambda decay: statistics.mean(points("poly_decay", rate, decay)))
        assert table.decays[rate]["poly_decay"] == best
        assert table.mean("poly_decay", rate) == pytest.approx(interval(points("poly_decay", rate, best)))
    assert {table.decays[rate]["poly_decay"] for rate in RATES} == set(DECAYS)
    growth = [late - early for late, early in zip(gains(0.5), gains(0.0), strict=True)]
    assert table.growth("sae", 0.5, 0.0) == pytest.approx(interval(growth), abs=1e-9)
    assert table.chance(0.5) == 12.5
    assert table.gain("ncl", 0.5).text(1) == "-"


def test_seeds_are_paired_and_several_rows_of_one_are_averaged(rows):
    kept = [one for one in rows if not (one["seed"] == 2 and one["config"].get("features") == "poly")]
    extra = row("offline_probe_top1", 0.9, 0, features="sae", noise_rate=0.5, probe_weight_decay=0.0)
    table = table_of([*kept, extra])
    expected = [50 * (accuracy("sae", 0.5, 0) + 0.9), 100 * accuracy("sae", 0.5, 1)]
    expected = [value - 100 * accuracy("poly", 0.5, seed) for seed, value in enumerate(expected)]
    assert table.gain("sae", 0.5) == pytest.approx(interval(expected))


def test_own_labels_are_those_of_the_decay_that_is_shown(rows):
    table = table_of(rows)
    own = table.own_labels("poly_decay", 0.0)
    assert own.accuracy.mean == pytest.approx(50 + 10 * table.decays[0.0]["poly_decay"])
    assert own.trained
    assert own.class_means.mean == pytest.approx(40)
    poor = table.own_labels("sae", 0.5)
    assert not poor.trained
    assert poor.text == "30.0 ± 0.0 (not trained)"
    text = table.training_table(["0 %", "50 %"], RATES)
    assert "- sae, 50 % (30.0 %, class means 40.0 %)\n" in text
    assert "sae, 0 %" not in text
    assert OwnLabels(Interval(40, None, 1), Interval(40, None, 1)).trained


def test_tables_have_a_line_for_each_arm_and_comparison(rows):
    table = table_of(rows)
    lines = table.accuracy_table(["0 %", "50 %"], RATES, [["the paper", "1", "2"]]).splitlines()
    assert lines[0] == (
        "| features | 0 % | 50 % | semantic consistency | chance consistency | sparsity | live dimensions |"
    )
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        *(f"| {arm}" for arm in ARMS),
        "| chance level",
        "| the paper",
    ]
    mean = table.mean("sae", 0.5).text(1)
    assert lines[3].endswith(f" | {mean} | 0.300 ± 0.248 | 0.300 ± 0.248 | - | 7 ± 0 |")
    assert lines[-2] == "| chance level | 12.5 | 12.5 | - | - | - | - |"
    assert lines[-1] == "| the paper | 1 | 2 | - | - | - | - |"
    gains = table.gain_table(["0 %"], RATES[:1]).splitlines()
    assert gains[2:] == [
        f"| sae | {table.gain('sae', 0.0).text(1, sign=True)} |",
        f"| decay over sae | {table.gain('poly_decay', 0.0, 'sae').text(1, sign=True)} |",
    ]
    assert table.growth_table(["50 %"], [0.5], [0.0]).splitlines()[2].startswith("| sae | ")
    bars, chance = table.bars({"clean": 0.0}, ["poly", "sae", "ncl"])
    assert (list(bars["clean"]), chance) == (["poly", "sae"], [12.5])
    panels = table.curves(RATES)
    assert list(panels) == ["accuracy, %", "gain over poly, points"]
    assert "poly" not in panels["gain over poly, points"]
    assert panels["accuracy, %"]["sae"][0] == [table.mean("sae", rate).mean for rate in RATES]


def test_rows_as_a_frame(rows):
    lines = frame(rows)
    assert len(lines) == len(rows)
    for metric, settings in (
        ("offline_probe_top1", {"features": "sae", "noise_rate": 0.5}),
        ("sparsity", {"noise_rate": None, "features": "poly"}),
        ("sparsity", {"no_such": None}),
        ("sparsity", {"no_such": 1}),
        ("offline_probe_top1", {"seed": 1}),
    ):
        by_loop = [
            one
            for one in rows
            if one["metric"] == metric
            and all((one["config"] | {"seed": one["seed"]}).get(k) == v for k, v in settings.items())
        ]
        assert len(select(lines, metric, **settings)) == len(by_loop)
    assert over_seeds(pd.Series([1.0, math.nan, 3.0])) == interval([1.0, 3.0])
    assert over_seeds(pd.Series([math.nan])).text() == "-"
    first, second = pd.Series({0: 1.0, 1: 2.0, 2: 4.0}), pd.Series({1: 1.0, 2: 1.0, 3: 0.0})
    assert paired(first, second) == interval([1.0, 3.0])
    assert paired(first, pd.Series(dtype=float)).n == 0


def test_warnings_are_nothing_where_there_is_nothing_to_be_said():
    assert untrained([]) == unexplained({"sae": 0.5}) == ""
    assert "sae (0.51)" in unexplained({"sae": 0.51})
    assert "sae (nan)" in unexplained({"sae": None})
