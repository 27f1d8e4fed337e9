"""The recipe of Fig. 5 at a size of seconds: its rows, table, pictures and continuation."""

import json

import pytest
from superposition import main

from tests.recipes.conftest import rows

SMALL = ["--sizes", "12x3", "--samples", "400", "--sample_sizes", "200", "400", "--sparsities", "0.5", "0.8"]
SMALL += ["--sparsity", "0.8", "--noise_rate", "0.6", "--input_noises", "0.2", "--steps", "150", "--epochs", "2"]
SMALL += ["--seeds", "0", "1", "2", "--neighbour_seeds", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("superposition")
    main(["--output_dir", str(path), *SMALL])
    return path


def test_every_cell_has_both_arms_noises_and_seeds(folder):
    found = rows(folder, "accuracy")
    cells = {(row["config"]["sparsity"], row["config"]["samples"]) for row in found}
    assert cells == {(0.5, 200), (0.5, 400), (0.8, 200), (0.8, 400)}
    for cell in cells:
        here = [r for r in found if (r["config"]["sparsity"], r["config"]["samples"]) == cell]
        arms = {(r["config"]["noise"], r["config"]["level"], r["config"]["features"], r["seed"]) for r in here}
        seeds = range(3) if cell == (0.8, 400) else range(2)
        noises = (("clean", 0.0), ("label", 0.6), ("input", 0.2))
        assert arms == {(*noise, arm, seed) for noise in noises for arm in ("mono", "poly") for seed in seeds}
        assert len(here) == len(arms)
    assert all(0 <= row["value"] <= 1 for row in found)
    clean = {a: [r["value"] for r in found if r["config"]["features"] == a] for a in ("mono", "poly")}
    assert clean["mono"] != clean["poly"]
    assert {row["config"]["features"] for row in rows(folder, "superposition")} == {"mono", "poly"}


def test_table_and_pictures_are_left(folder):
    table = (folder / "results.md").read_text()
    assert "| 12x3, others, 0.8, 400 | 3 |" in table
    assert table.count("12x3, others") == 4
    for name in ("gram", "accuracy", "phase"):
        assert (folder / f"{name}.png").stat().st_size > 5000
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_a_stopped_run_continues_to_the_same_rows(folder, tmp_path, capsys):
    whole = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "config.json").write_text((folder / "config.json").read_text())
    (stopped / "results.jsonl").write_text("".join(whole[: len(whole) // 2]))
    main(["--output_dir", str(stopped), *SMALL])

    def found(path):
        return {
            (json.dumps(r["config"], sort_keys=True), r["seed"], r["metric"], round(r["value"], 3))
            for metric in ("accuracy", "represented", "superposition")
            for r in rows(path, metric)
        }

    assert found(stopped) == found(folder)
    assert "mono - poly" in capsys.readouterr().out


def test_same_settings_reprint_and_others_are_refused(folder):
    before = (folder / "results.jsonl").read_bytes()
    main(["--output_dir", str(folder), *SMALL])
    assert (folder / "results.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="another configuration"):
        main(["--output_dir", str(folder), *SMALL, "--flips", "all"])


def test_bad_settings_are_named_before_training(tmp_path):
    for arguments, message in (
        (["--sizes", "12"], "sizes has '12'; write features x dimensions"),
        (["--sizes", "3x12"], "n_dims is 12"),
        (["--samples", "5"], "samples is 5 for 12 classes"),
        (["--sparsity", "1.0"], "sparsity is 1.0"),
        (["--flips", "some"], "flips has 'some'"),
        (
            ["--seeds", "0", "1", "0"],
            "seeds takes different values, got .0, 1, 0.",
        ),  # its interval would be too narrow
        (["--seeds", "-1"], "seeds is .-1.; each must be at least 0"),
        (["--input_noises", "0.2", "0.2"], "input_noises takes different values"),
        (["--input_noises", "nan"], "input_noises has nan"),
        (["--noise_rate", "1.5"], "noise_rate is 1.5; it must be in .0, 1."),
        (["--steps", "0"], "steps is 0"),
        (["--epochs", "0"], "epochs is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["--output_dir", str(tmp_path / "bad"), *SMALL, *arguments])
    assert not (tmp_path / "bad").exists()
