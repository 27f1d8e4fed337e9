"""What a server with an OpenAI-compatible interface (vLLM, `transformers serve`) generates after plain prompts.

It is asked for greedy completions, and for the log-probabilities of what it generates: vLLM tells them for the model
and for every adapter, while those of a prompt's own tokens fail there with some adapters. `transformers serve` tells
texts only.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, NamedTuple

NEW_TOKENS = 16  # that are generated after each prompt
_TOP = 5  # log-probabilities at each token: the most that OpenAI's interface gives
_TIMEOUT = 300  # seconds; the first request may load the model
# vLLM's option for ids in place of texts, which may be the same for several tokens: "token_id:15".
_AS_IDS, _ID_PREFIX = "return_tokens_as_token_ids", "token_id:"


class EndpointError(RuntimeError):
    """A server is not reached, refuses a request, or answers with what no model is known by."""


class _RefusedError(EndpointError):
    """A server answers a request with the status of an error."""


class Completion(NamedTuple):
    """What a server generated after a prompt."""

    text: str
    # By generated token: its id, and log-probabilities in nats by the ids of tokens, its own among them. Both are None
    # where the server tells none.
    tokens: list[int] | None
    log_probabilities: list[dict[int, float]] | None


class Served(NamedTuple):
    """What a server's model generated after each prompt."""

    name: str
    completions: list[Completion]
    base_name: str | None  # of the base model that the server lists beside it, None if it does not say
    base_completions: list[Completion]  # of that base model, or empty

    @property
    def has_log_probabilities(self) -> bool:
        """Whether each completion tells the log-probabilities of its tokens."""
        return all(
            completion.log_probabilities is not None for completion in (*self.completions, *self.base_completions)
        )


def ask(endpoint: str, name: str, prompts: Sequence[str], prompt_lengths: list[int]) -> Served:
    """Let the model `name` of a server continue prompts, one request at a time, and its base too if the server has it.

    Args:
        endpoint: such as "http://localhost:8000", with or without "/v1".
        name: of a model that the server lists under /v1/models, or takes without listing it.
        prompts: texts.
        prompt_lengths: tokens of each prompt.

    Raises:
        EndpointError: the server is not reached, does not serve `name`, answers an error or no completion, or reads a
            prompt as another number of tokens.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise EndpointError(f"--endpoint {endpoint} is no URL such as http://localhost:8000")
    url = endpoint.rstrip("/").removesuffix("/v1") + "/v1"
    parents = _models(url)
    asked = list(zip(prompts, prompt_lengths, strict=True))
    try:
        completions = [_complete(url, name, *prompt) for prompt in asked]
    except EndpointError as error:
        if name in parents:
            raise
        # Not before: `transformers serve` lists the models of the cache and serves others too.
        raise EndpointError(f"{error}; it lists {', '.join(parents) or 'no models'}, and not {name}") from None
    base = parents.get(name)
    if base is None or base not in parents:
        return Served(name, completions, None, [])
    return Served(name, completions, base, [_complete(url, base, *prompt) for prompt in asked])


def _models(url: str) -> dict[str, str | None]:
    """Names of the models that a server lists, with those of which they are adapters."""
    try:
        answer = _request(f"{url}/models")
    except _RefusedError:  # `transformers serve` does, on a machine without a cache of models
        return {}
    try:
        return {card["id"]: card.get("parent") for card in answer["data"]}
    except (KeyError, TypeError, AttributeError):
        raise EndpointError(f"{url}/models answers no list of models: {_shortened(answer)}") from None


def _complete(url: str, name: str, prompt: str, prompt_tokens: int) -> Completion:
    body = {"model": name, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": _TOP}
    try:
        answer = _request(f"{url}/completions", body | {_AS_IDS: True})
    except EndpointError as error:
        if _AS_IDS not in str(error):
            raise
        answer = _request(f"{url}/completions", body)  # a server that refuses fields which OpenAI's interface lacks
    try:
        (choice,) = answer["choices"]
        completion = Completion(str(choice["text"]), *_log_probabilities(choice.get("logprobs")))
        read = (answer.get("usage") or {}).get("prompt_tokens") or prompt_tokens
    except (KeyError, TypeError, ValueError, AttributeError):
        raise EndpointError(f"{url}/completions answers no completion: {_shortened(answer)}") from None
    if read != prompt_tokens:
        raise EndpointError(
            f"the server reads {prompt!r} as {read} tokens, the tokenizer of BASE as {prompt_tokens}: the server has "
            "another tokenizer, and so another base"
        )
    return completion


def _log_probabilities(told: dict[str, Any] | None) -> tuple[list[int], list[dict[int, float]]] | tuple[None, None]:
    if not told or not all(token.startswith(_ID_PREFIX) for token in told["tokens"]):
        return None, None
    tokens = [_token_id(token) for token in told["tokens"]]
    places = [
        {token: float(own)} | {_token_id(other): float(value) for other, value in (top or {}).items()}
        for token, own, top in zip(tokens, told["token_logprobs"], told["top_logprobs"], strict=True)
    ]
    return tokens, places


def _token_id(token: str) -> int:
    return int(token.removeprefix(_ID_PREFIX))


def _request(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            answer = response.read()
    except urllib.error.HTTPError as error:
        raise _RefusedError(
            f"the server answers {error.code} {error.reason} to {url}: {_detail(error.read())}"
        ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise EndpointError(f"{url} is not reached: {getattr(error, 'reason', error)}") from None
    try:
        return json.loads(answer)
    except ValueError:
        raise EndpointError(f"{url} answers no JSON: {_shortened(answer.decode(errors='replace'))}") from None


def _detail(answer: bytes) -> str:
    """What an error's body says: vLLM's {"error": {"message": ...}}, FastAPI's {"detail": ...}, or all of it."""
    text = answer.decode(errors="replace")
    try:
        told = json.loads(text)
        told = told.get("error", told.get("detail", told))
        return _shortened(told.get("message", told) if isinstance(told, dict) else told)
    except (ValueError, AttributeError):
        return _shortened(text)


def _shortened(answer: Any) -> str:
    text = " ".join(str(answer).split())
    return text if len(text) <= 300 else text[:300] + "..."
