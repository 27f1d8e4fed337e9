"""Data files, good and bad."""

import pandas
import pytest
from _labelled_text import load_labelled_text

ROWS = [('it \'s "odd" , "very', 0), ("fine , really", 1), ("so-so", 0)]


def write(path, rows=ROWS, columns=("sentence", "label")):
    frame = pandas.DataFrame(rows, columns=list(columns))
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        path.write_text("\n".join(["\t".join(columns), *("\t".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    loaded = load_labelled_text(write(tmp_path / f"data{suffix}"))
    assert loaded.column_names == ["sentence", "label"]
    assert [(row["sentence"], row["label"]) for row in loaded] == ROWS


def test_labels_written_as_floats(tmp_path):
    loaded = load_labelled_text(write(tmp_path / "data.csv", [("a", 0.0), ("b", 1.0)]))
    assert loaded["label"][:] == [0, 1]
    assert all(type(label) is int for label in loaded["label"][:])


def test_other_columns_are_dropped(tmp_path):
    rows = [(i, *row) for i, row in enumerate(ROWS)]
    assert load_labelled_text(write(tmp_path / "data.csv", rows, ("idx", "sentence", "label"))).column_names == [
        "sentence",
        "label",
    ]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (ROWS, ("text", "label"), r"lacks the column\(s\) sentence; it has text, label"),
        ([], ("sentence", "label"), "has no rows|Cannot read"),
        ([("a", 0), ("b", 2)], ("sentence", "label"), r"row 2: the label is 2; 0 \(negative\) or 1 is needed"),
        ([("a", "positive"), ("b", "negative")], ("sentence", "label"), "row 1: the label is 'positive'"),
        ([("a", -1), ("b", -1)], ("sentence", "label"), "the label is -1"),
        ([("a", 1), ("b", 1)], ("sentence", "label"), "has only the label 1; both classes are needed"),
        ([("a", 1), (" ", 0)], ("sentence", "label"), "row 2: the sentence is empty"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_bad_files(tmp_path, suffix, rows, columns, message):
    path = write(tmp_path / f"data{suffix}", rows, columns)
    with pytest.raises(ValueError, match=message) as error:
        load_labelled_text(path)
    assert path in str(error.value)


def test_an_empty_file(tmp_path):
    (tmp_path / "data.tsv").write_text("")
    with pytest.raises(ValueError, match=r"Cannot read .*data\.tsv"):
        load_labelled_text(str(tmp_path / "data.tsv"))


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match=r"data file nowhere\.tsv does not exist"):
        load_labelled_text("nowhere.tsv")


def test_a_hub_name_without_a_network():
    with pytest.raises(ValueError, match=r"Cannot load the data set 'stanfordnlp/sst2' .*hf auth login"):
        load_labelled_text("stanfordnlp/sst2", split="validation")
