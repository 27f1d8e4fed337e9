"""What a model thinks before it answers: found by the markers of its chat template, and cut from the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from evals.prompts import template_options

# What opens and what ends a thought, in the families of chat templates there are.
MARKERS = (
    ("<think>", "</think>"),  # DeepSeek, Qwen, GLM, Nemotron and most others
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("[THINK]", "[/THINK]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel>", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
)


class Cut(NamedTuple):
    """An answer without its thoughts."""

    thought: str  # all thoughts of the answer, "" for none
    answer: str
    is_finished: bool  # False: the answer ends within a thought, and `answer` has what stood before it


class Thoughts(NamedTuple):
    """How the thoughts of one tokenizer's model are told from its answers."""

    markers: Sequence[tuple[str, str]]
    opener: str  # that the generation prompt leaves open, so that an answer begins within the thought; "" for none
    control_tokens: Sequence[str]  # what the tokenizer leaves out of texts

    def are_in(self, text: str) -> bool:
        """Whether an answer that was decoded with its control tokens has thoughts or what ends them."""
        return bool(self.opener) or any(marker in text for pair in self.markers for marker in pair)

    def cut(self, text: str) -> Cut:
        """Take the thoughts out of an answer that was decoded with its control tokens.

        What ends a thought that was not opened ends one that the answer began with.
        """
        text = self.opener + text
        thoughts = []
        for opener, closer in self.markers:
            while closer in text:
                before, _, after = text.partition(closer)
                answer, _, thought = before.partition(opener) if opener in before else ("", "", before)
                thoughts.append(thought)
                text = answer + after.lstrip()
        left_open = next((opener for opener, _ in self.markers if opener in text), None)
        if left_open is not None:
            text, _, thought = text.partition(left_open)
            thoughts.append(thought)
        for token in self.control_tokens:
            text = text.replace(token, "")
        return Cut("\n".join(thoughts), text, left_open is None)

    def text(self, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
        """Decode an answer's tokens, with control tokens if it has thoughts, whose markers may be such tokens."""
        whole = str(tokenizer.decode(tokens, skip_special_tokens=False))
        return whole if self.are_in(whole) else str(tokenizer.decode(tokens, skip_special_tokens=True))


def thoughts_of(
    tokenizer: PreTrainedTokenizerBase, thinking: str, markers: tuple[str, str] | None, where: str
) -> Thoughts:
    """The markers that the tokenizer's chat template or its own tokens name, or `markers` in their place.

    Args:
        thinking: "off" or "on", what the model is asked for.
        markers: what opens and what ends a thought.
        where: whose tokenizer it is, for errors.

    Raises:
        ValueError: the template cannot do what `thinking` says, or cannot write a prompt.
    """
    template = str(tokenizer.chat_template or "")
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values()}
    own = [pair for pair in MARKERS if pair[1] in template or pair[1] in tokens]
    try:
        thoughts = thoughts_with(tokenizer, thinking, [markers] if markers is not None else own)
    except ValueError as error:
        raise ValueError(f"The tokenizer of {where} is of no use: {error}.") from None
    opener = thoughts.opener
    if thinking == "off" and opener:
        raise ValueError(
            f"The chat template of {where} opens a thought ({opener}) in every prompt and has no switch against it: "
            "it cannot be finetuned on answers without thoughts; to evaluate it, give --thinking on."
        )
    if thinking == "on" and not thoughts.markers:
        raise ValueError(
            f"--thinking is 'on', but neither the chat template nor the tokens of {where} say what opens and ends a "
            "thought: leave it out, or give --thought_markers OPENER CLOSER."
        )
    return thoughts


def thoughts_with(tokenizer: PreTrainedTokenizerBase, thinking: str, markers: Sequence[tuple[str, str]]) -> Thoughts:
    """The thoughts that these markers open and end, of a model that is asked to think or not to."""
    opener = _opened(tokenizer, thinking, markers) if tokenizer.chat_template is not None else ""
    return Thoughts(markers, opener, sorted(tokenizer.all_special_tokens, key=len, reverse=True))


def _opened(tokenizer: PreTrainedTokenizerBase, thinking: str, markers: Sequence[tuple[str, str]]) -> str:
    """What opens the thought that the generation prompt leaves open, or ""."""
    prompt = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "question"}],
            tokenize=False,
            add_generation_prompt=True,
            **template_options(tokenizer, thinking),
        )
    )
    ending = prompt[prompt.rindex("question") :] if "question" in prompt else prompt
    return next((opener for opener, closer in markers if ending.rfind(opener) > ending.rfind(closer)), "")
