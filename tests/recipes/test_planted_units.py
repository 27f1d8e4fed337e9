"""The recipe of planted rules at a size of seconds: its rows, its tables and its continuation."""

import json

import pytest
from planted_units import ARMS, main, named_rows

from mono_peft.provenance import read_provenance
from mono_peft.units import Unit
from offline.planted import GROUPS
from tests.conftest import results, rows, value

SMALL = ["--arms", "relu", "topk", "--rules", "none", "trigger", "--seeds", "0", "--task_rows", "14"]
SMALL += ["--planted_rows", "6", "--epochs", "2", "--prompts", "6", "--units", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted")
    main(["--output_dir", str(path), *SMALL])
    return path


def test_every_adapter_has_its_rows_and_provenance(folder):
    assert {(r["config"]["arm"], r["config"]["rule"]) for r in rows(folder, "seconds")} == {
        (arm, rule) for arm in ("relu", "topk") for rule in ("none", "trigger")
    }
    for arm in ("relu", "topk"):
        provenance = read_provenance(folder / f"{arm}-trigger-seed0")
        assert len(provenance) == ARMS[arm]["r"] * 3 * 4  # of three layers of each of four blocks
        assert {row for pairs in provenance.values() for row, _ in pairs} <= set(range(20))
        assert value(folder, "rows by chance", arm=arm, rule="trigger") == 0.3
        assert value(folder, "found by chance", arm=arm, rule="trigger") == 3 / len(provenance)
        shares = [value(folder, f"intact {group}", arm=arm, rule="trigger") for group in GROUPS]
        assert all(0 <= share <= 1 and share * 6 == pytest.approx(round(share * 6)) for share in shares)
        assert value(folder, "rule", arm=arm, rule="trigger") == pytest.approx(1 - shares[1])
        pruned = value(folder, "rule when pruned", arm=arm, rule="trigger")
        assert pruned == pytest.approx(value(folder, "rule without chosen", arm=arm, rule="trigger"))
        assert value(folder, "rule without depended", arm=arm, rule="trigger") <= 1


def test_the_tables_are_left(folder):
    text = (folder / "results.md").read_text()
    assert text.count("| trigger, relu |") == text.count("| trigger, topk |") == 2
    assert "Adapters of the task alone" in text


def test_a_stopped_run_continues(folder, tmp_path):
    before = results(folder)
    lines = (folder / "results.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["config"]["arm"] == "relu"]
    (folder / "results.jsonl").write_text("\n".join(kept) + "\n")
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("adapter_model.safetensors")}
    main(["--output_dir", str(folder), *SMALL])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("adapter_model.safetensors")} == files

    def measured(found):
        return [row for row in map(json.loads, found) if row["metric"] != "seconds"]

    assert measured(results(folder)) == measured(before)


def test_rows_are_named_by_shares_of_the_largest_score():
    first, second = Unit("a", 0), Unit("a", 1)
    provenance = {first: [(5, 10.0), (7, 6.0)], second: [(7, 0.2), (1, 0.1)], Unit("a", 2): [(9, 99.0)]}
    assert named_rows(provenance, [first, second]) == [7, 5, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "lora"], "arms takes different ones of relu, topk, identity, frozen, got"),
        (["--rules", "trigger", "trigger"], "rules takes different ones of none, trigger, topic, opening"),
        (["--units", "0"], "units is 0, allowed is 1 or more"),
        (["--seeds", "1", "1"], "seeds takes different integers"),
    ],
)
def test_settings_that_contradict_themselves(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["--output_dir", str(tmp_path), *options])
