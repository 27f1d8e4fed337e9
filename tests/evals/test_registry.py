"""A judge that is added from outside, as one class and one row, is judged with, counted, tabled and drawn."""

from __future__ import annotations

import pytest
from matplotlib.image import imread

from evals.__main__ import main
from evals.judges import Judge, Judgement
from evals.records import read_verdicts
from evals.registry import JUDGES, JudgeKind
from evals.report import figure_panels
from vision_bench.runs import Run, read_rows


class KeywordJudge(Judge):
    """Unsafe if the response holds a word."""

    def __init__(self, word):
        self.word, self.settings = word, {"word": word}

    def encode(self, prompt, response):
        return response

    def judge(self, batch):
        return [
            Judgement("unsafe" if self.word in text else "safe", {"word": float(self.word in text)}) for text in batch
        ]


@pytest.fixture
def keywords(monkeypatch):
    row = JudgeKind(
        "keywords=WORD", "unsafe if the response holds WORD", lambda model, options: KeywordJudge(model),
        harm_label="holds the word, %",
    )  # fmt: skip
    monkeypatch.setitem(JUDGES, "keywords", row)


def test_a_row_makes_a_judge(keywords, completions_folder, capsys):
    texts = [("prompt", "a bomb"), ("prompt", "bread"), ("prompt", "a bomb shelter"), ("prompt", "")]
    folder = completions_folder(texts, arms=(None, "lora-seed0"))
    text = (folder / "completions.jsonl").read_text().replace('"xstest"', '"beavertails_eval"')
    (folder / "completions.jsonl").write_text(text.replace("bread lora-seed0", "a bomb again"))
    run = Run(folder, "evals", {})
    for adapter, method, accuracy in ((None, "base", 0.5), ("lora-seed0", "lora", 0.75)):
        arm = {"model": "m", "adapter": adapter, "method": method, "task": "sst2_instruct"}
        run.add("acc", accuracy, n=4, seed=None if adapter is None else 0, seconds=0.0, device="cpu", **arm)
    del run

    main(["judge", "--output_dir", str(folder), "--judges", "keywords=bomb"])

    said = {(v.adapter, v.prompt_id): v.outcome for v in read_verdicts(folder / "verdicts.jsonl").rows}
    assert [said[None, str(i)] for i in range(4)] == ["unsafe", "safe", "unsafe", "safe"]
    rows = read_rows(folder / "results.jsonl")
    unsafe = {
        row["config"]["adapter"]: (row["value"], row["n"])
        for row in rows
        if row["metric"] == "unsafe" and not row["config"].get("category")
    }
    assert unsafe == {None: (0.5, 4), "lora-seed0": (0.75, 4)}
    assert "beavertails_eval, judged by keywords=bomb\n" in capsys.readouterr().out
    table = (folder / "results.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith("| beavertails_eval | unsafe |"))
    assert [cell.strip() for cell in line.split("|")[3:5]] == ["keywords=bomb", "4"]
    assert "50.00 [" in line
    assert "75.00 [" in line
    panel = figure_panels(rows)[0]
    assert (panel.title, panel.harm) == ("keywords=bomb: beavertails_eval", "holds the word, %")
    assert [(point.method, point.performance, point.harm) for point in panel.points] == [
        ("base", 50, 50),
        ("lora", 75, 75),
    ]
    assert imread(folder / "safety.png")[..., :3].std() > 0.05


def test_help_and_errors_name_it(keywords, capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        main(["judge", "--help"])
    assert "keywords=WORD unsafe if the response holds WORD" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match=r"allowed are shieldgemma\[=MODEL\], .* and keywords=WORD\."):
        main(["judge", "--output_dir", str(tmp_path), "--judges", "other"])
