"""Texts in named groups, read from files and put in tokens: what `python -m mono_peft.explore` runs a model on."""

from __future__ import annotations

import csv
import gzip
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .loading import LoadError
from .overlap import common_prefix

FIELDS = "`messages`, `prompt` (with `response`, where there is one), `text` or `sentence`"
_SUFFIXES = (".jsonl", ".tsv")  # each also with .gz behind it
_ROWS_SORTED = 512  # texts whose lengths are brought in order, so that batches hold little padding


class Batch(NamedTuple):
    """Texts of similar length, padded on the right."""

    texts: torch.Tensor  # (batch,) int64, their numbers
    input_ids: torch.Tensor  # (batch, tokens) int64
    attention_mask: torch.Tensor  # (batch, tokens) int64, 0 where there is padding


class Texts:
    """Token ids of texts, 4 bytes a token, with the group, the file and the row that each text is of.

    Args:
        groups: their names, in the order of the command line.
        files: what the texts were read from.
    """

    def __init__(self, groups: Sequence[str], files: Sequence[Path]) -> None:
        self.groups, self.files = list(groups), list(files)
        self.cut = 0  # texts that are longer than what was kept of them
        self._ids, self._starts = array("i"), array("q", [0])
        self._group, self._file, self._row, self._answer = array("i"), array("i"), array("q"), array("i")

    def add(self, ids: Sequence[int], answer: int, group: int, file: int, row: int) -> None:
        """Add a text.

        Args:
            ids: of its tokens.
            answer: how many of its tokens come before the response.
            group, file: positions in `groups` and `files`.
            row: in its file, from 1.
        """
        self._ids.extend(ids)
        self._starts.append(len(self._ids))
        for values, value in ((self._answer, answer), (self._group, group), (self._file, file), (self._row, row)):
            values.append(value)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def tokens(self) -> int:
        """The number of tokens of all texts."""
        return len(self._ids)

    @property
    def largest_id(self) -> int:
        """The largest token id in any text."""
        return max(self._ids)

    @property
    def group_of(self) -> torch.Tensor:
        """(texts,) int64, positions in `groups`."""
        return torch.tensor(self._group, dtype=torch.int64)

    def ids(self, number: int) -> list[int]:
        """The token ids of a text."""
        return self._ids[self._starts[number] : self._starts[number + 1]].tolist()

    def answer(self, number: int) -> int:
        """How many tokens of a text come before its response; 0 for a text without one."""
        return self._answer[number]

    def place(self, number: int) -> tuple[str, str, int]:
        """The group, the file's name and the row, from 1, of a text."""
        return self.groups[self._group[number]], self.files[self._file[number]].name, self._row[number]

    def batches(self, size: int, padding: int = 0) -> Iterator[Batch]:
        """All texts, in batches of at most `size`; `padding` is the id behind shorter ones."""
        for first in range(0, len(self), _ROWS_SORTED):
            numbers = range(first, min(first + _ROWS_SORTED, len(self)))
            ordered = sorted(numbers, key=lambda number: self._starts[number + 1] - self._starts[number])
            for start in range(0, len(ordered), size):
                chosen = ordered[start : start + size]
                rows = [torch.tensor(self.ids(number)) for number in chosen]
                lengths = torch.tensor([len(row) for row in rows])
                ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
                mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
                yield Batch(torch.tensor(chosen), ids, mask)


def named_files(arguments: Sequence[str]) -> list[tuple[str, Path]]:
    """The group and the file of each `[GROUP=]FILE`; a group without a name is called as its file.

    Raises:
        LoadError: a file does not exist, is of no kind that is read, or a group has no name.
    """
    named = []
    for argument in arguments:
        group, separator, rest = argument.partition("=")
        if not separator or Path(argument).is_file():
            path = Path(argument)
            group = path.name.split(".")[0]
        else:
            path = Path(rest)
        if not path.is_file():
            raise LoadError(f"the data {path} is no file; give [GROUP=]FILE, such as harmful=prompts.jsonl")
        if not group:
            raise LoadError(f"the group of {path} has no name; give GROUP=FILE")
        if not path.name.removesuffix(".gz").endswith(_SUFFIXES):
            raise LoadError(f"the data {path} is no {' or '.join(_SUFFIXES)} file, also with .gz behind")
        named.append((group, path))
    return named


def read_texts(named: Sequence[tuple[str, Path]], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Texts:
    """Read files of rows and put each row in tokens.

    A row with `prompt` and `response` is a conversation where the tokenizer has a chat template, else the text of both
    with a space between; `messages` are a conversation; `text` and `sentence` are taken as they are. A prompt without
    a response ends where the model would answer.

    Args:
        named: pairs of a group and a file; a group may have several files.
        tokenizer: of the base.
        max_tokens: longer texts are cut behind so many.

    Raises:
        LoadError: a file cannot be read or has no row, or a row has none of these fields.
    """
    groups = list(dict.fromkeys(group for group, _ in named))
    texts = Texts(groups, [path for _, path in named])
    for file, (group, path) in enumerate(named):
        before = len(texts)
        for number, row in _rows(path):
            where = f"row {number} of {path}"
            try:
                ids, answer = _tokens(row, tokenizer, where)
            except LoadError:
                raise
            except Exception as error:  # a template raises whatever it likes
                raise LoadError(f"{where} cannot be put in tokens: {type(error).__name__}: {error}") from None
            if not ids:
                raise LoadError(f"{where} is empty")
            texts.cut += len(ids) > max_tokens
            texts.add(ids[:max_tokens], min(answer, max_tokens), groups.index(group), file, number)
        if len(texts) == before:
            raise LoadError(f"{path} has no text, so that the group {group!r} would be without its texts")
    return texts


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a file with their numbers, from 1, one at a time."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            is_tsv = path.name.removesuffix(".gz").endswith(".tsv")
            yield from _separated(path, file) if is_tsv else _objects(path, file)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise LoadError(f"the data {path} cannot be read: {error}") from None


def _separated(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(reader, [])
    for number, line in enumerate(filter(None, reader), start=1):
        if len(line) != len(header):
            raise LoadError(f"row {number} of {path} has {len(line)} fields, and the header has {len(header)}")
        yield number, dict(zip(header, line, strict=True))


def _objects(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(filter(str.strip, lines), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise LoadError(f"row {number} of {path} is no JSON ({error}); one object a line is read") from None
        if not isinstance(row, dict):
            raise LoadError(f"row {number} of {path} is no JSON object; one object a line is read")
        yield number, row


def _tokens(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[int], int]:
    """The token ids of a row, and how many of them come before its response."""
    if (messages := row.get("messages")) is not None:
        if not is_conversation(messages):
            raise LoadError(f"the `messages` of {where} are no list of objects with `role` and `content`")
        answers = 1 if messages[-1]["role"] == "assistant" else 0
        asked, answered = messages[: len(messages) - answers], messages[len(messages) - answers :]
        return _conversation(tokenizer, asked, answered, where)
    if (prompt := row.get("prompt")) is not None:
        response = row.get("response")
        if response is not None and not isinstance(response, str):
            raise LoadError(f"the `response` of {where} is no text")
        if not isinstance(prompt, str) and not is_conversation(prompt):
            raise LoadError(f"the `prompt` of {where} is neither a text nor a list of messages")
        if not isinstance(prompt, str) or tokenizer.chat_template:
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            answered = [{"role": "assistant", "content": response}] if response is not None else []
            return _conversation(tokenizer, asked, answered, where)
        ids: list[int] = tokenizer(prompt)["input_ids"]
        if response is None:
            return ids, 0
        whole: list[int] = tokenizer(f"{prompt} {response}")["input_ids"]
        return whole, common_prefix(ids, whole)
    text = row.get("text", row.get("sentence"))
    if not isinstance(text, str):
        raise LoadError(f"{where} has {', '.join(map(repr, row)) or 'no field'}, and none of {FIELDS}")
    return tokenizer(text)["input_ids"], 0


def is_conversation(messages: Any) -> bool:
    """Whether these are the messages of a chat template, one or more."""
    return isinstance(messages, list) and bool(messages) and all(isinstance(m, dict) and "role" in m for m in messages)


def _conversation(
    tokenizer: PreTrainedTokenizerBase, asked: list[Any], answered: list[Any], where: str
) -> tuple[list[int], int]:
    if not tokenizer.chat_template:
        raise LoadError(f"{where} has messages, and the base's tokenizer has no chat template")

    def written(messages: list[Any], is_open: bool) -> list[int]:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=is_open, return_dict=True)
        ids: list[int] = encoded["input_ids"]
        return ids

    if not answered:
        return written(asked, True), 0
    whole = written(asked + answered, False)
    return whole, common_prefix(written(asked, True), whole) if asked else 0
