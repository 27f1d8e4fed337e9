"""lm-eval's model, with several adapters on one base, every answer on the disk at once, and without thoughts.

lm-eval's own cache of answers keeps texts alone, under the request and without what answered it: how an answer ended,
its thought, and whether model and task are still the same would be lost. So `completions.jsonl` is the cache.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import configure_pad_token, normalize_gen_kwargs, postprocess_generated_text
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from evals.contents import checksum
from evals.models import method_and_seed
from evals.progress import Progress
from evals.prompts import answer_opening, template_options
from evals.records import COMPLETIONS, Completion, CompletionKey
from evals.registry import TASK_FOLDERS
from evals.settings import Adapter, GenerateSettings
from evals.thoughts import MARKERS, Thoughts
from vision_bench.runs import LineAppender

# Of every answer, unless the task's own options say otherwise; a model's generation config has no say.
PURE_DECODING = {"num_beams": 1, "repetition_penalty": 1.0}


class DivergedError(ArithmeticError):
    """A model's logits or log-likelihoods are not finite: none of its answers is one."""


class _FiniteLogits(LogitsProcessor):
    """Raises DivergedError where a logit is NaN or plus infinity; greedy decoding would take a token all the same."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if bool((scores.isnan() | (scores == math.inf)).any()):
            raise DivergedError("its logits are not finite while it answers")
        return scores


class Arm(NamedTuple):
    """An answering model: the base or an adapter on it, with the tokenizer and chat template that belong to it."""

    adapter: Adapter | None
    tokenizer: PreTrainedTokenizerBase
    thoughts: Thoughts
    checksums: dict[str, str]  # of model and adapter, see `evals.contents`
    has_own_tokenizer: bool  # other than the base model's

    @property
    def name(self) -> str | None:
        """The adapter's name, None for the base model."""
        return self.adapter.name if self.adapter else None


class CompletionsLM(HFLM):
    """lm-eval's model, which takes answers from the completions file where they are there and adds those it makes.

    Args:
        base: the loaded base model.
        first: what answers until `answer_with` names another.
        settings: how it answers; `model` is the base model's name in the rows.
        file: what new answers are appended to.
        done: what the file holds.
        tasks: checksums of the tasks by name.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        first: Arm,
        settings: GenerateSettings,
        *,
        file: LineAppender,
        done: dict[CompletionKey, Completion],
        tasks: dict[str, str],
    ) -> None:
        # Log-likelihoods that are rounded to half precision would be equal for many an answer.
        options = {"batch_size": settings.batch_size, "softmax_dtype": "float32"}
        super().__init__(pretrained=base, tokenizer=first.tokenizer, **options)
        self._settings, self._file, self._done, self._tasks = settings, file, done, tasks
        eos = base.generation_config.eos_token_id
        self._model_end_ids = set(eos if isinstance(eos, list) else [eos])
        self._new_tokens: list[list[int]] = []
        self._unfinished: set[tuple[str, str]] = set()
        self.answer_with(base, first)

    def answer_with(self, model: torch.nn.Module, arm: Arm) -> None:
        """Answer with `model`, which is the arm's, from here on."""
        self._model, self._arm = model, arm
        self.tokenizer = configure_pad_token(arm.tokenizer, model_config=self.config)
        # A chat template writes the control tokens itself, as in training; lm-eval would add a beginning to its own.
        self.add_bos_token = False if arm.tokenizer.chat_template is not None else None
        self.chat_template_args = template_options(arm.tokenizer, self._settings.thinking)
        self._end_ids = (self._model_end_ids | {arm.tokenizer.eos_token_id}) - {None}

    def answers_of(self, task: str) -> list[Completion]:
        """The arm's answers to a task, all of which are there when it has been evaluated."""
        return [
            row
            for row in self._done.values()
            if (row.task, row.model, row.adapter) == (task, self._settings.model, self._arm.name)
        ]

    def forget(self, arm: Arm) -> None:
        """Take the arm's answers out of the file: an arm that diverged has none that could be judged."""
        diverged = (self._settings.model, arm.name)
        self._done = {key: row for key, row in self._done.items() if (row.model, row.adapter) != diverged}
        self._file.replace(asdict(row) for row in self._done.values())

    def is_unfinished(self, task: str, doc: dict[str, Any]) -> bool:
        """Whether an answer of the arm to the task's document ends within its thought, so that there is no answer."""
        return (task, checksum(doc)) in self._unfinished

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score answers as lm-eval does; in our tasks an answer follows the prompt as the chat template writes it.

        lm-eval sets answers right behind the generation prompt. Some templates write a space before an answer, and
        so they are trained: without it another token is scored.

        Raises:
            DivergedError: a value is not finite.
        """
        removed, added = answer_opening(self._arm.tokenizer, self._settings.thinking)
        if removed or added:
            requests = [
                replace(r, arguments=(r.args[0].removesuffix(removed) + added, r.args[1]))
                if is_ours(r.task_name)
                else r
                for r in requests
            ]
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, *args: Any, **options: Any) -> list[tuple[float, bool]]:
        values: list[tuple[float, bool]] = super()._loglikelihood_tokens(*args, **options)
        if not all(math.isfinite(value) for value, _ in values):
            raise DivergedError("its log-likelihoods are not finite")
        return values

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer in batches of similar length, the longest first; each is on the disk before the next begins.

        Raises:
            DivergedError: a logit is NaN or plus infinity.
        """
        rows = self._rows(requests)
        missing = []
        for request, row in zip(requests, rows, strict=True):
            before = self._done.get(row.key)
            if before is None:
                missing.append((request, row))
            else:
                _check_same(before, row)
        cut = sum("prompt_tokens_cut" in row.generation for _, row in missing)
        if cut:
            print(
                f"{cut} of {len(missing)} prompts do not fit the context of {self.max_length} tokens with the answer: "
                "they lose their beginning (`prompt_tokens_cut` in their rows)."
            )
        name = f"Generating ({self._arm.name or 'base'})"
        done_before = len(rows) - len(missing)
        progress = Progress(name, len(rows), "answers", done=done_before, shown=not disable_tqdm)
        for batch in self._batches(missing):
            done = list(self._answers(batch))
            self._file.append(asdict(row) for row in done)
            self._done |= {row.key: row for row in done}
            progress.update(len(done))
        answers = [self._done[row.key] for row in rows]
        for opener, closer in set(MARKERS) - set(self._arm.thoughts.markers):
            count = sum(row.response.lstrip().startswith(opener) or closer in row.response for row in answers)
            if count:
                print(
                    f"{count} of {len(answers)} answers of {self._arm.name or 'the base'} hold {opener} or {closer}, "
                    "which neither chat template nor tokens name, so that they count as text. If they are thoughts, "
                    f"give --thought_markers '{opener}' '{closer}'."
                )
        self._unfinished |= {
            (row.task, checksum(request.doc))
            for request, row in zip(requests, answers, strict=True)
            if row.finish_reason == "thought"
        }
        return [row.response for row in answers]

    def _rows(self, requests: list[Instance]) -> list[Completion]:
        """Return the row of each request, without its answer."""
        seen: Counter[tuple[str, str]] = Counter()
        rows = []
        for request in requests:
            doc, task = request.doc, str(request.task_name)
            prompt_id = str(doc.get("prompt_id", request.doc_id))
            seen[task, prompt_id] += 1  # tasks that ask several times have the same request several times
            if seen[task, prompt_id] > 1:
                prompt_id += f"#{seen[task, prompt_id]}"
            prompt, category, response = (doc.get(name) for name in ("prompt", "category", "response"))
            # Tasks of lm-eval whose documents have no user's text get the request as it is sent.
            is_written = isinstance(prompt, str) and is_ours(task)
            rows.append(
                Completion(
                    prompt_id=prompt_id,
                    task=task,
                    category=category if isinstance(category, str) else None,
                    prompt=prompt if is_written else str(request.args[0]),
                    response="",
                    finish_reason="stop",
                    model=self._settings.model,
                    adapter=self._arm.name,
                    seed=method_and_seed(self._arm.name)[1],
                    generation=self._generation(request),
                    references=[response] if isinstance(response, str) else [],
                )
            )
        return rows

    def _generation(self, request: Instance) -> dict[str, Any]:
        """The settings that decide the answer, and how much of the prompt does not fit."""
        options = dict(request.args[1])
        room = self.max_length - most_new_tokens(options)
        cut = len(self.tok_encode(request.args[0])) - room
        return {
            **PURE_DECODING,
            **json.loads(json.dumps(options)),
            "end_token_ids": sorted(self._end_ids),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "load_in_4bit": self._settings.load_in_4bit,
            "chat_template": self.tokenizer.chat_template is not None,
            "tokenizer": "adapter" if self._arm.has_own_tokenizer else "model",
            "thinking": self._settings.thinking,
            "checksums": self._arm.checksums | {"task": self._tasks[str(request.task_name)]},
            **({"prompt_tokens_cut": cut} if cut > 0 else {}),
        }

    def _batches(self, missing: list[tuple[Instance, Completion]]) -> Iterator[list[tuple[Instance, Completion]]]:
        """Requests with the same settings, in the order in which HFLM sorts a batch."""

        def order(item: tuple[Instance, Completion]) -> tuple[str, int, str]:
            request = item[0]
            return json.dumps(request.args[1]), -len(self.tok_encode(request.args[0])), request.args[0]

        for _, group in groupby(sorted(missing, key=order), key=lambda item: json.dumps(item[0].args[1])):
            same = list(group)
            for start in range(0, len(same), int(self.batch_size)):
                yield same[start : start + int(self.batch_size)]

    def _answers(self, batch: list[tuple[Instance, Completion]]) -> Iterator[Completion]:
        """Each row of a batch with its answer."""
        super().generate_until([request for request, _ in batch], disable_tqdm=True)
        for (request, row), tokens in zip(batch, self._new_tokens, strict=True):
            end = next((place for place, token in enumerate(tokens) if token in self._end_ids), None)
            thoughts = self._arm.thoughts
            text = thoughts.text(self.tokenizer, tokens[:end])
            thought, text, is_finished = thoughts.cut(text) if thoughts.are_in(text) else ("", text, True)
            answer = postprocess_generated_text(text, normalize_gen_kwargs(request.args[1])["until"], None)
            is_full = end is None and answer == text and len(tokens) >= most_new_tokens(request.args[1])
            yield replace(
                row,
                response=answer if is_finished else "",
                finish_reason="thought" if not is_finished else "length" if is_full else "stop",
                thought=thought,
            )

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        if self._settings.thinking == "on":  # what ends an answer may stand in its thought; `_answers` cuts the answer
            stop = []
        output = super()._model_generate(
            context,
            max_length,
            stop,
            eos_token_id=sorted(self._end_ids) or None,
            logits_processor=LogitsProcessorList([_FiniteLogits()]),
            **options,
        )
        self._new_tokens = output[:, context.shape[1] :].tolist()
        return output


def most_new_tokens(options: dict[str, Any]) -> int:
    """The limit that lm-eval reads from a task's generation options, under any of the names it takes."""
    return int(normalize_gen_kwargs(options)["max_gen_toks"])


def is_ours(task: str | None) -> bool:
    """Whether the task is one of `evals/tasks` or of another folder in the registry."""
    return any((folder / f"{task}.yaml").is_file() for folder in TASK_FOLDERS)


def _check_same(before: Completion, now: Completion) -> None:
    """A row of the file answers the same prompt under the same settings, or the file is another run's."""
    for name in ("prompt", "references", "generation"):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            raise ValueError(
                f"The {COMPLETIONS} of the output folder has an answer to prompt {now.prompt_id!r} of {now.task!r} "
                f"with another {name} ({old!r} there, {new!r} now). Choose another --output_dir, or repeat the old "
                "settings and data."
            )
