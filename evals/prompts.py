"""The prompt formats that recipes and evaluation tasks share, and their encoding."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SST2_PROMPT = "Classify the sentiment of the sentence as positive or negative.\nSentence: {sentence}\nSentiment:"
SST2_ANSWERS = ("negative", "positive")  # indexed by the label of GLUE SST-2
THINKING = ("off", "on")  # whether a model is asked to think before it answers
_SWITCHES = ("enable_thinking", "thinking", "reasoning")  # the variables by which chat templates turn thoughts on


class EncodedAnswer(NamedTuple):
    """Token ids of a prompt with one answer, and which of them are the answer's (1) or the prompt's (0)."""

    input_ids: list[int]
    completion_mask: list[int]

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the answer, which a model is given to write one."""
        return self.input_ids[: self.completion_mask.index(1)]


def sst2_prompt(sentence: str) -> str:
    """The instruction that asks for the sentiment of `sentence`; the wording is ours, the paper's text gives none."""
    return SST2_PROMPT.format(sentence=sentence.strip())


def dolly_prompt(row: Mapping[str, str | None]) -> str:
    """The request of a row of Dolly 15k, its context below it; the wording is ours, the paper's text gives none.

    Args:
        row: with `instruction`; a `context` that is missing or None is an empty one.
    """
    instruction, context = (row["instruction"] or "").strip(), (row.get("context") or "").strip()
    return f"{instruction}\n\n{context}" if context else instruction


def dolly_held_out(row: Mapping[str, str | None]) -> bool:
    """Whether a row of Dolly 15k is kept for evaluation: a fifteenth, whatever the order of the file.

    Rows with the same instruction fall on the same side, so that none is trained on with one answer and scored with
    another.
    """
    return zlib.crc32((row["instruction"] or "").strip().encode()) % 15 == 0


def template_options(tokenizer: PreTrainedTokenizerBase, thinking: str = "off") -> dict[str, bool]:
    """What the chat template is given so that the model thinks or does not; empty where it has no such switch.

    A variable is a switch if the generation prompt differs between its two values, whatever its default is.

    Args:
        thinking: one of THINKING.

    Raises:
        ValueError: the template cannot write a user's message, or leaves it out.
    """
    switch = _switch(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template is not None else None
    return {} if switch is None else {switch: thinking == "on"}


@lru_cache(maxsize=32)
def _switch(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """The template's variable that turns thoughts on; the text is an argument so that a changed one is asked again."""
    from jinja2 import TemplateError

    def rendered(**options: bool) -> str:
        question = [{"role": "user", "content": "question"}]
        return str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True, **options))

    try:
        is_written = "question" in rendered()
    except TemplateError as error:
        raise ValueError(f"the chat template cannot write a user's message ({error}); correct it") from None
    if not is_written:
        raise ValueError("the chat template leaves out what the user says; correct it")
    for name in _SWITCHES:
        try:
            if rendered(**{name: True}) != rendered(**{name: False}):
                return name
        except TemplateError:  # it takes other values than these
            continue
    return None


def training_row(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> dict[str, Any]:
    """One row of TRL's prompt/completion format: messages where the tokenizer has a chat template, else plain text.

    A template that can ask for thoughts is told not to, as in the evaluation: the answers to train on have none.
    """
    if tokenizer.chat_template is None:
        return {"prompt": prompt, "completion": f" {answer}"}
    row: dict[str, Any] = {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
    }
    options = template_options(tokenizer)
    return row | ({"chat_template_kwargs": options} if options else {})


class WrittenAnswer(NamedTuple):
    """How a chat template writes a prompt with an answer."""

    generation_prompt: str  # what a model is given to answer, without an answer
    opening: str  # what stands before the answer in the whole conversation; as a rule `generation_prompt` and a space
    answer: str  # as it is written, without the outer white space that the template takes away


def written_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, thinking: str = "off"
) -> WrittenAnswer:
    """Where a chat template writes an answer, which may also stand in the prompt or in what the template adds.

    The place is that of a word that stands nowhere else, written in the answer's stead.

    Raises:
        ValueError: the template leaves the answer out or writes it in another way than other answers.
    """
    options = template_options(tokenizer, thinking)
    user = {"role": "user", "content": prompt}

    def whole(content: str) -> str:
        messages = [user, {"role": "assistant", "content": content}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    generation_prompt = str(
        tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True, **options)
    )
    marker = "placeholder"
    while marker in generation_prompt:
        marker += "x"
    opening, is_written, ending = whole(marker).partition(marker)
    text = whole(answer)
    # A template that writes the answer a second time writes the placeholder a second time too.
    candidates = [answer, answer.rstrip(), answer.lstrip(), answer.strip()]
    if marker not in ending:
        candidates = [text[len(opening) : len(text) - len(ending)]]
    written = next((c for c in candidates if text.startswith(opening + c)), "")
    if not is_written or written.strip() != answer.strip():
        raise ValueError(
            f"the chat template does not write the answer {answer!r} as it writes others ({text!r}): it leaves it "
            "out, or acts on what it holds. Take the row out, or give a tokenizer with another chat template"
        )
    return WrittenAnswer(generation_prompt, opening, written)


def answer_opening(tokenizer: PreTrainedTokenizerBase, thinking: str = "off") -> tuple[str, str]:
    """The end of the generation prompt that a whole conversation does not have, and what it has in its place.

    For most templates both are ""; some write a space before an answer.
    """
    if tokenizer.chat_template is None:
        return "", ""
    written = written_answer(tokenizer, "question", "answer", thinking)
    shared = _shared_length(written.generation_prompt, written.opening)
    return written.generation_prompt[shared:], written.opening[shared:]


def encode_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> EncodedAnswer:
    """Encode `prompt` followed by `answer`, in the same format as `training_row`, without an end-of-turn token.

    The answer begins at the first token that differs from the encoding of what stands before it alone, so a tokenizer
    that merges over the border is handled.

    Raises:
        ValueError: the answer is empty, or the chat template does not write it.
    """
    if not answer.strip():
        raise ValueError(f"an answer must hold text, got {answer!r}")
    if tokenizer.chat_template is None:
        before, text, special = prompt, f"{prompt} {answer}", True
    else:
        written = written_answer(tokenizer, prompt, answer)
        before, text = written.opening, written.opening + written.answer
        special = False  # the template writes them
    before_ids = tokenizer(before, add_special_tokens=special)["input_ids"]
    input_ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    if special and input_ids[-1] == tokenizer.eos_token_id:
        input_ids = input_ids[:-1]
    border = _shared_length(before_ids, input_ids)
    return EncodedAnswer(input_ids, [0] * border + [1] * (len(input_ids) - border))


def _shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The number of tokens or characters with which both begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
