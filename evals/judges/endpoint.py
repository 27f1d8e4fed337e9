"""A judge behind an OpenAI-compatible chat endpoint: what it is asked, how long that takes, what answers say."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from evals.judges.base import Judgement, NoAnswerError
from evals.judges.chat import RubricJudge, no_verdict, rubric_checksum

REFUSED = "refused"  # a request; unparsed in the end


class EndpointChatJudge(RubricJudge):
    """A model behind an OpenAI-compatible chat endpoint; the key is read from OPENAI_API_KEY.

    A conversation that the endpoint refuses (as too long, for instance) is unparsed, with the refusal as reply. So is
    every reply that the model did not end by itself. A model that takes no `max_tokens` is given
    `max_completion_tokens`, which has to hold its reasoning too, and one that takes no temperature of 0 is given none.

    Args:
        endpoint: its base URL, such as http://localhost:8000/v1.
        model: the name there.
        rubric: the question, with {prompt} and {response}.
    """

    MAX_COMPLETION_TOKENS = 8192
    ATTEMPTS = 4
    BACKOFF = 1.0  # seconds before the second attempt, twice as many before each further one
    TIMEOUT = 600.0  # seconds that an answer may take
    LONGEST_WAIT = 300.0  # seconds that a server may ask to wait
    _BUSY = (429, 500, 502, 503, 504)

    def __init__(self, endpoint: str, model: str, rubric: str) -> None:
        super().__init__(rubric)
        if not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"--endpoint is {endpoint!r}; give the base URL, such as http://localhost:8000/v1.")
        self.endpoint, self.name = endpoint.rstrip("/"), model
        self._shared = {"model": model, "endpoint": self.endpoint, "rubric": rubric_checksum(rubric)}
        self._set_options({"max_tokens": self.MAX_NEW_TOKENS, "temperature": 0})
        self.has_answered = False

    def _set_options(self, options: dict[str, int]) -> None:
        self.options = options
        self.settings = self._shared | {"options": json.dumps(options)}

    def adopt(self, settings: dict[str, str]) -> None:
        """Take the options of earlier verdicts, which are those that the model takes."""
        if not self.has_answered and settings.keys() == self.settings.keys():
            self._set_options(json.loads(settings["options"]))
            self.has_answered = True

    def load(self) -> None:
        # Not huggingface_hub's client, which refuses local servers too under HF_HUB_OFFLINE.
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=64))

    def encode(self, prompt: str, response: str) -> str:
        return self.question(prompt, response)

    def judge(self, batch: Sequence[str]) -> list[Judgement]:
        answers: list[Judgement | str] = []
        while not self.has_answered and len(answers) < len(batch):  # one by one, until the options are known
            answers.append(self._judge(batch[len(answers)]))
            if isinstance(answers[-1], str):
                break
        if self.has_answered and len(answers) < len(batch):
            with ThreadPoolExecutor(len(batch)) as pool:
                answers += pool.map(self._judge, batch[len(answers) :])
        judgements = [answer if isinstance(answer, Judgement) else None for answer in answers]
        judgements += [None] * (len(batch) - len(answers))
        problem = next((answer for answer in answers if isinstance(answer, str)), None)
        refusals = [judgement for judgement in judgements if judgement is not None and judgement.outcome == REFUSED]
        if not self.has_answered and refusals and problem is None:
            self._judge(self.encode("", ""))  # the longest come first; a short one shows if it refuses all
        if not self.has_answered and refusals:
            problem = problem or f"it refused every request of the first batch: {refusals[0].reply}"
            judgements = [None] * len(batch)
        judgements = [j and replace(j, outcome=j.outcome.replace(REFUSED, "unparsed")) for j in judgements]
        if problem is not None:
            raise NoAnswerError(
                f"The endpoint {self.endpoint} did not answer as a chat endpoint does ({problem}). What was judged is "
                f"kept: see to the server, to OPENAI_API_KEY and to the model's name {self.name!r}, and give the same "
                "command again.",
                judgements,
            )
        return [judgement for judgement in judgements if judgement is not None]

    def _judge(self, question: str) -> Judgement | str:
        """The judgement, or what was wrong with the answer."""
        try:
            answer = self._answer(question)
            if answer.status_code in (400, 413, 422):
                return Judgement(REFUSED, {}, f"HTTP {answer.status_code}: {answer.text[:1000]}")
            answer.raise_for_status()
            judgement = self._read(answer.json()["choices"])
        except (requests.RequestException, TimeoutError, KeyError, IndexError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        self.has_answered = True
        return judgement

    def _answer(self, question: str) -> requests.Response:
        """The server's answer; as long as it has given none, options that it refuses are changed.

        Only what it answers then is kept, as the refusal of a long conversation may speak of `max_tokens` too.
        """
        first = answer = self._post(question, self.options)
        options = self.options
        while not self.has_answered and answer.status_code in (400, 422):
            if "max_tokens" in options and "max_tokens" in answer.text:
                options = {"max_completion_tokens": self.MAX_COMPLETION_TOKENS} | options
                del options["max_tokens"]
            elif "temperature" in options and "temperature" in answer.text:
                options = {name: value for name, value in options.items() if name != "temperature"}
            else:
                return first
            answer = self._post(question, options)
        if answer.ok:
            self._set_options(options)
        return answer if answer.ok else first

    def _post(self, question: str, options: dict[str, int]) -> requests.Response:
        """Ask, again after a while if the server is busy or gone; says so.

        Raises:
            TimeoutError: the server asks for a longer wait than LONGEST_WAIT.
            requests.RequestException: it cannot be reached.
        """
        asked = {"model": self.name, "messages": [{"role": "user", "content": question}], **options}
        wait = self.BACKOFF
        for attempt in range(1, self.ATTEMPTS + 1):
            try:
                answer = self.session.post(f"{self.endpoint}/chat/completions", json=asked, timeout=self.TIMEOUT)
            except (requests.ConnectionError, requests.Timeout):
                if attempt == self.ATTEMPTS:
                    raise
                problem, asked_wait = "cannot be reached", None
            else:
                if answer.status_code not in self._BUSY:
                    return answer
                problem = f"answers HTTP {answer.status_code}"
                asked_wait = _retry_after(answer.headers.get("Retry-After"))
            if asked_wait is not None and asked_wait > self.LONGEST_WAIT:
                raise TimeoutError(
                    f"HTTP {answer.status_code}, and it asks to wait {asked_wait:.0f} s, above the limit of "
                    f"{self.LONGEST_WAIT:.0f} s"
                )
            if attempt < self.ATTEMPTS:
                seconds = wait if asked_wait is None else asked_wait
                print(f"The endpoint {self.endpoint} {problem}; it is asked again in {seconds:.0f} s.")
                time.sleep(seconds)
                wait *= 2
        return answer

    def _read(self, choices: list[dict[str, Any]]) -> Judgement:
        """The judgement of a reply; one that the model did not end, or that is none, is unparsed."""
        message, reason = choices[0]["message"], choices[0].get("finish_reason")
        if not isinstance(message, dict):
            raise TypeError(f"the message is a {type(message).__name__}, an object is needed")
        reply = message.get("content") or ""
        if not isinstance(reply, str):
            raise TypeError(f"the content is a {type(reply).__name__}, a text is needed")
        if len(choices) > 1:
            return no_verdict(f"{len(choices)} choices", reply)
        if reason != "stop":
            return no_verdict(f"finish_reason {reason}", reply)
        if message.get("refusal"):
            return no_verdict(f"refused: {message['refusal']}", reply)
        if message.get("tool_calls") or message.get("function_call"):
            return no_verdict("a call of a tool", reply)
        return self.read_reply(reply, clipped=False)


def _retry_after(header: str | None) -> float | None:
    """The seconds that a Retry-After header asks for, as a number or as a date; None if it says neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return None
        now = datetime.now(timezone.utc)
        seconds = (date.replace(tzinfo=date.tzinfo or timezone.utc) - now).total_seconds()
    return None if math.isnan(seconds) else max(seconds, 0.0)
