"""Texts of several formats in named groups, in tokens, and what is wrong with them."""

import gzip
import json

import pytest

from mono_peft.loading import LoadError
from mono_peft.texts import named_files, read_texts


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer(chat=True)


def written(folder, name, rows):
    path = folder / name
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def decoded(tokenizer, texts, number):
    ids = texts.ids(number)
    return tokenizer.decode(ids[: texts.answer(number)]), tokenizer.decode(ids[texts.answer(number) :])


CONVERSATION = [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "Yes"}]


@pytest.mark.parametrize(
    ("row", "before", "behind"),
    [
        ({"prompt": "Is it good?", "response": "Yes"}, "<|user|> Is it good?<|assistant|>", " Yes<|end|>\n"),
        ({"prompt": "Is it good?"}, "", "<|user|> Is it good?<|assistant|>"),
        ({"prompt": CONVERSATION[:1], "response": "Yes"}, "<|user|> Is it good?<|assistant|>", " Yes<|end|>\n"),
        ({"messages": CONVERSATION}, "<|user|> Is it good?<|assistant|>", " Yes<|end|>\n"),
        ({"messages": CONVERSATION[:1]}, "", "<|user|> Is it good?<|assistant|>"),
        ({"text": "a film"}, "", "a film"),
        ({"sentence": "a film", "label": 1}, "", "a film"),
    ],
)
def test_rows_with_a_chat_template(tokenizer, tmp_path, row, before, behind):
    path = written(tmp_path, "rows.jsonl", [row])
    texts = read_texts([("task", path)], tokenizer, 200)
    assert decoded(tokenizer, texts, 0) == (before, behind)
    assert texts.place(0) == ("task", "rows.jsonl", 1)


def test_rows_without_a_chat_template(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    path = written(tmp_path, "rows.jsonl", [{"prompt": "Is it good?", "response": "Yes"}, {"prompt": "Is it?"}])
    texts = read_texts([("task", path)], tokenizer, 200)
    assert decoded(tokenizer, texts, 0) == ("Is it good?", " Yes")
    assert decoded(tokenizer, texts, 1) == ("", "Is it?")


def test_groups_files_and_batches(tokenizer, tmp_path):
    first = written(tmp_path, "a.jsonl", [{"text": "one two three"}, "", {"text": "x"}])
    second = written(tmp_path, "b.tsv", ["sentence\tlabel", 'a "bare mark\t1'])
    third = written(tmp_path, "c.tsv.gz", ["text", "two words"])
    named = named_files([f"task={first}", str(second), f"task={third}"])
    assert named == [("task", first), ("b", second), ("task", third)]
    texts = read_texts(named, tokenizer, 200)
    assert texts.groups == ["task", "b"]
    assert texts.group_of.tolist() == [0, 0, 1, 0]
    assert [texts.place(i)[1:] for i in range(4)] == [("a.jsonl", 1), ("a.jsonl", 2), ("b.tsv", 1), ("c.tsv.gz", 1)]
    assert tokenizer.decode(texts.ids(2)) == 'a "bare mark'
    seen = {}
    for batch in texts.batches(3):
        for number, ids, mask in zip(batch.texts.tolist(), batch.input_ids, batch.attention_mask, strict=True):
            seen[number] = ids[: mask.sum()].tolist()
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
    assert seen == {number: texts.ids(number) for number in range(4)}


def test_long_texts_are_cut(tokenizer, tmp_path):
    path = written(tmp_path, "a.jsonl", [{"text": "one two three four"}, {"text": "x"}])
    texts = read_texts([("a", path)], tokenizer, 3)
    assert (texts.cut, len(texts.ids(0)), texts.tokens) == (1, 3, 4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"question": "b"}], r"row 2 of .*a\.jsonl has 'question', and none of `messages`, `prompt`"),
        (["{"], r"row 1 of .* is no JSON"),
        (["[1]"], r"row 1 of .* is no JSON object"),
        ([{"prompt": 3}], r"the `prompt` of row 1 .* neither a text nor"),
        ([{"prompt": "a", "response": 3}], r"the `response` of row 1 .* is no text"),
        ([{"messages": []}], r"the `messages` of row 1"),
        ([{"messages": [{"content": "a"}]}], r"the `messages` of row 1"),
        ([{"text": ""}], r"row 1 of .* is empty"),
        ([], r"has no text, so that the group 'a'"),
    ],
)
def test_rows_that_are_refused(tokenizer, tmp_path, rows, message):
    path = written(tmp_path, "a.jsonl", rows)
    with pytest.raises(LoadError, match=message):
        read_texts([("a", path)], tokenizer, 200)


def test_messages_need_a_template(make_tokenizer, tmp_path):
    path = written(tmp_path, "a.jsonl", [{"messages": CONVERSATION}])
    with pytest.raises(LoadError, match="no chat template"):
        read_texts([("a", path)], make_tokenizer(), 200)


def test_a_broken_tsv_and_gzip(tokenizer, tmp_path):
    path = written(tmp_path, "a.tsv", ["text\tlabel", "only one"])
    with pytest.raises(LoadError, match=r"row 1 .* has 1 fields, and the header has 2"):
        read_texts([("a", path)], tokenizer, 200)
    cut = tmp_path / "b.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "a"}\n' * 50)[:-9])
    with pytest.raises(LoadError, match="cannot be read"):
        read_texts([("b", cut)], tokenizer, 200)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("task=nowhere.jsonl", "nowhere.jsonl is no file"),
        ("nowhere.jsonl", "nowhere.jsonl is no file"),
        ("={there}", "has no name"),
        ("task={other}", r"is no \.jsonl or \.tsv file"),
    ],
)
def test_files_that_are_refused(tmp_path, argument, message):
    there, other = written(tmp_path, "a.jsonl", [{"text": "a"}]), written(tmp_path, "a.json", [{"text": "a"}])
    with pytest.raises(LoadError, match=message):
        named_files([argument.format(there=there, other=other)])
