"""Rows of Dolly: those without a context, broken ones, and ones beyond the model's context."""

import json
from typing import ClassVar

import dolly_monolora
import pytest

from evals.prompts import dolly_held_out, dolly_prompt
from vision_bench.runs import read_rows


class TestDollyRows:
    ROW: ClassVar = {"instruction": "a", "context": "c", "response": "b", "category": "qa"}

    def rows(self, tmp_path, *rows):
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return dolly_monolora.load_rows(str(tmp_path / "x.jsonl"), True)

    def test_no_context(self, tmp_path):
        without = {name: value for name, value in self.ROW.items() if name != "context"}
        rows = self.rows(tmp_path, self.ROW, self.ROW | {"context": None}, without, self.ROW | {"context": " "})
        assert [dolly_prompt(row) for row in rows] == ["a\n\nc", "a", "a", "a"]

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"instruction": None}, "row 2: the instruction is missing"),
            ({"response": " \n"}, "row 2: the response is empty"),
            ({"response": 3}, "row 2: the response is 3, which is not text"),
            ({"context": ["a"]}, r"row 2: the context is \['a'\], which is not text"),
            ({"category": 1.5}, "row 2: the category is 1.5, which is not text"),
            ({"response": "\ud83d"}, "row 2: the response is .* half a surrogate pair"),
        ],
    )
    def test_values_that_are_no_text(self, tmp_path, values, message):
        with pytest.raises(ValueError, match=message):
            self.rows(tmp_path, self.ROW, self.ROW | values)

    @pytest.fixture
    def dolly_arguments(self, small_model, eval_data, tmp_path):
        options = "--methods base --max_new_tokens 2"
        return ["--model_name_or_path", str(small_model), "--output_dir", str(tmp_path / "out"), *options.split()]

    def many(self, path, is_long=lambda row: False):
        """90 rows, of which 9 are held out; a long one has some 6,000 tokens."""
        rows = [self.ROW | {"instruction": f"Say {i}"} for i in range(90)]
        rows = [row | {"response": "so " * 3000} if is_long(row) else row for row in rows]
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    @pytest.mark.usefixtures("no_training")
    def test_another_data_set_than_the_task_asks(self, dolly_arguments, tmp_path):
        self.many(tmp_path / "set" / "train.jsonl")
        with pytest.raises(ValueError, match=r"does not ask what is held out of --dataset_name .*/set: "):
            dolly_monolora.main([*dolly_arguments, "--dataset_name", str(tmp_path / "set")])

    def test_rows_beyond_the_context_are_counted(self, dolly_arguments, tmp_path, capsys):
        file = self.many(tmp_path / "x.jsonl", lambda row: row["instruction"] in ("Say 12", "Say 16"))
        dolly_monolora.main([*dolly_arguments, "--train_file", file])
        assert "2 of 9 held-out rows exceed the context of 2048 tokens" in capsys.readouterr().out
        rows = read_rows(tmp_path / "out" / "results.jsonl")
        assert {(row["metric"], row["n"]) for row in rows} >= {("answer_nll", 7), ("rougeL", 9)}

    @pytest.mark.usefixtures("no_training")
    def test_no_row_fits(self, dolly_arguments, tmp_path):
        file = self.many(tmp_path / "x.jsonl", lambda row: True)
        with pytest.raises(ValueError, match=r"None of the 9 held-out rows of --train_file .* context of 2048 tokens"):
            dolly_monolora.main([*dolly_arguments, "--train_file", file])
        file = self.many(tmp_path / "x.jsonl", lambda row: not dolly_held_out(row))
        with pytest.raises(ValueError, match="--max_length 1024 is too short for every training row"):
            dolly_monolora.main([*dolly_arguments, "--train_file", file])
