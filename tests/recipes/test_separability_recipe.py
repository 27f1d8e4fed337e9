"""The recipe of the theorems: its rows, verdicts, table and figure."""

import pytest
from separability import main

from tests.recipes.conftest import rows
from vision_bench.separability import criterion, moments

SMALL = ["--draws", "100000", "--sparsities", "0.55"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("separability")
    main(["--output_dir", str(path), *SMALL])
    return path


def test_every_theorem_has_three_sources_that_agree(folder):
    values = [row for row in rows(folder) if row["metric"] == "value"]
    theorems = {"4.1", "4.2", "B.1", "B.3", "B.4", "B.5", "B.6", "B.7", "B.8", "B.9"}
    for source in ("closed form", "quadrature", "simulation"):
        found = [row for row in values if row["config"]["source"] == source]
        assert {row["config"]["theorem"] for row in found} == theorems
        assert {row["config"]["sparsity"] for row in found} == {0.55}
        assert {row["seed"] for row in found} == ({0} if source == "simulation" else {None})
    closed = {row["config"]["quantity"]: row["value"] for row in values if row["config"]["source"] == "closed form"}
    expected = criterion(moments(0.55))
    assert closed["J(u), clean"] == pytest.approx(float(expected.mono))
    assert closed["J(v), clean"] == pytest.approx(float(expected.poly))
    table = (folder / "results.md").read_text()
    assert "NO" not in table
    assert table.count("| yes |") == 27


def test_verdicts(folder):
    verdicts = {
        (row["config"]["ties"], row["config"]["kind"], row["config"]["claim"]): row["config"]["verdict"]
        for row in rows(folder)
        if row["metric"] == "claim"
    }
    overtakes = "mono overtakes (label noise)"
    assert verdicts["coin", "fisher", "poly ahead without noise"] == "holds"
    assert verdicts["coin", "fisher", "mono falls more slowly (label noise)"] == "holds"
    assert verdicts["coin", "fisher", overtakes] == "fails"
    assert verdicts["zero", "fisher", overtakes] == "only 0.535 <= S <= 0.62"
    assert verdicts["zero", "weighted", overtakes] == "fails"
    assert verdicts["coin", "difference", overtakes] == "holds"
    assert verdicts["zero", None, "D shrinks to (1 - 2 eta) D"] == "only S = 0"
    assert verdicts["drop", None, "equal variances, y = 1"] == "holds"


def test_pictures_are_left(folder):
    assert (folder / "criterion.png").stat().st_size > 10_000
    assert (folder / "criterion.pdf").read_bytes().startswith(b"%PDF")


def test_same_settings_continue_and_others_are_refused(folder, capsys):
    before = (folder / "results.jsonl").read_bytes()
    main(["--output_dir", str(folder), *SMALL])
    assert (folder / "results.jsonl").read_bytes() == before
    assert "Where mono overtakes poly (coin, fisher)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"another configuration .*ties: 'coin' there, 'zero' now"):
        main(["--output_dir", str(folder), *SMALL, "--ties", "zero"])


def test_yaml_is_overridden_by_the_command_line_and_seeds_matter(folder, tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text("draws: 100000\nsparsities: [0.55]\nties: zero\nkind: absolute\n")
    main(["--output_dir", str(tmp_path / "run"), "--config", str(config), "--ties", "coin", "--seeds", "1"])
    found = [row["config"] for row in rows(tmp_path / "run") if row["metric"] == "value"]
    assert {(config["kind"], config["ties"], config["sparsity"]) for config in found} == {("absolute", "coin", 0.55)}

    def simulated_mean(path):
        (row,) = [
            row
            for row in rows(path)
            if row["config"].get("source") == "simulation" and row["config"]["quantity"] == "mean of u, y = 0"
        ]
        return row["value"]

    assert simulated_mean(tmp_path / "run") != simulated_mean(folder)


def test_bad_settings_are_named_before_work(tmp_path, capsys):
    for arguments, message in (
        (["--sparsities", "1.0"], "sparsities has 1.0"),
        (["--ties", "both"], "ties is 'both'"),
        (["--kind", "lda"], "kind is 'lda'"),
        (["--draws", "10"], "draws is 10"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["--output_dir", str(tmp_path / "bad"), *arguments])
    (tmp_path / "bad.yaml").write_text("tie: zero\n")
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path / "bad"), "--config", str(tmp_path / "bad.yaml")])
    assert "sets tie, which this recipe does not have" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
