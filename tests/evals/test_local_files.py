"""Data files, good and bad."""

import os

import pandas
import pytest

from evals.local_files import labelled_sentences

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
    loaded = labelled_sentences(write(tmp_path / f"data{suffix}"))
    assert loaded == [{"sentence": sentence, "label": label} for sentence, label in ROWS]


def test_labels_written_as_floats(tmp_path):
    loaded = labelled_sentences(write(tmp_path / "data.csv", [("a", 0.0), ("b", 1.0)]))
    assert [row["label"] for row in loaded] == [0, 1]
    assert all(type(row["label"]) is int for row in loaded)


def test_other_columns_are_dropped(tmp_path):
    rows = [(i, *row) for i, row in enumerate(ROWS)]
    loaded = labelled_sentences(write(tmp_path / "data.csv", rows, ("idx", "sentence", "label")))
    assert loaded == [{"sentence": sentence, "label": label} for sentence, label in ROWS]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (ROWS, ("text", "label"), r"lacks the column\(s\) sentence; it has text, label"),
        ([], ("sentence", "label"), "has no rows|Cannot load"),
        ([("a", 0), ("b", 2)], ("sentence", "label"), r"row 2: the label is '?2'?; 0 \(negative\) or 1 is needed"),
        ([("a", "positive"), ("b", "negative")], ("sentence", "label"), "row 1: the label is 'positive'"),
        ([("a", -1), ("b", -1)], ("sentence", "label"), "the label is '?-1"),
        ([("a", 1), ("b", 1)], ("sentence", "label"), "has only the label 1; both classes are needed"),
        ([("a", 1), (" ", 0)], ("sentence", "label"), "row 2: the sentence is empty"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_bad_files(tmp_path, suffix, rows, columns, message):
    path = write(tmp_path / f"data{suffix}", rows, columns)
    with pytest.raises(ValueError, match=message) as error:
        labelled_sentences(path)
    assert path in str(error.value)


def test_an_empty_file(tmp_path):
    (tmp_path / "data.tsv").write_text("")
    with pytest.raises(ValueError, match=r"Cannot load .*data\.tsv"):
        labelled_sentences(str(tmp_path / "data.tsv"))


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match=r"data file nowhere\.tsv does not exist"):
        labelled_sentences("nowhere.tsv")


def test_a_hub_name_without_a_network():
    with pytest.raises(ValueError, match=r"Cannot load the data set 'stanfordnlp/sst2' .*hf auth login"):
        labelled_sentences("stanfordnlp/sst2", split="validation")


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_a_file_that_was_replaced_is_read_anew(tmp_path, suffix):
    """Also if path, size and time of change are those of before."""
    path = write(tmp_path / f"data{suffix}")
    labelled_sentences(path)
    before = os.stat(path)
    corrected = [(sentence, 1 - label) for sentence, label in ROWS]
    write(tmp_path / f"data{suffix}", corrected)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size
    assert [(row["sentence"], row["label"]) for row in labelled_sentences(path)] == corrected


def test_a_folder_that_was_replaced_is_read_anew(tmp_path):
    for labels in (["0", "1"], ["1", "0"]):
        (tmp_path / "set").mkdir(exist_ok=True)
        file = tmp_path / "set" / "train.csv"
        file.write_text(f"sentence,label\na,{labels[0]}\nb,{labels[1]}\n")
        os.utime(file, (1, 1))
        rows = labelled_sentences(str(tmp_path / "set"))
        assert [row["label"] for row in rows] == [int(label) for label in labels]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", "sentence\tlabel\na\t1\nb\t0\tmore\n", "row 2 has 3 fields, the header has 2"),
        ("x.csv", "sentence,label\na\nb,0\n", "row 1 has 1 fields, the header has 2"),
        ("x.csv", "sentence,label,label\na,1,0\nb,0,1\n", "names a column twice: sentence, label, label"),
        ("x.csv", 'sentence,label\n"a,1\nb,0\n', "line 3: unexpected end of data"),
        ("x.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b", "lab', "line 2 is not JSON"),
        ("x.jsonl", '{"sentence": "a", "label": 1}\n3\n', "row 2 is 3, not an object"),
        ("x.json", '[{"sentence": "a", "label": 1},', "it is not JSON"),
        ("x.jsonl", '{"sentence": 3, "label": 1}\n{"sentence": "b", "label": 0}', "row 1: the sentence is 3"),
        ("x.jsonl", '{"sentence": "b", "label": 1}\n{"label": 0}', "row 2: the sentence is missing"),
        ("x.jsonl", '{"sentence": "b", "label": 1}\n{"sentence": "c"}', "row 2: the label is None"),
        ("x.jsonl", '{"sentence": "b", "label": 1}\n{"sentence": "\\ud83d", "label": 0}', "row 2: .* half a"),
        ("x.csv", "sentence,label\na,1\nb,\n", "row 2: the label is ''"),
        ("x.parquet", "sentence,label\n", "Cannot load"),
    ],
)  # fmt: skip
def test_torn_and_ragged_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        labelled_sentences(str(tmp_path / name))


def test_words_that_pandas_takes_for_nothing_are_sentences(tmp_path):
    (tmp_path / "x.csv").write_text("\ufeffsentence,label\nNA,1\nnull,0\n12,1\n", encoding="utf-8")
    assert [row["sentence"] for row in labelled_sentences(str(tmp_path / "x.csv"))] == ["NA", "null", "12"]


def test_separators_of_unicode_end_no_row(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        '{"sentence": "a\u2028b", "label": 1}\n{"sentence": "c\x85", "label": 0}\n', encoding="utf-8"
    )
    assert [row["sentence"] for row in labelled_sentences(str(tmp_path / "x.jsonl"))] == ["a\u2028b", "c\x85"]
