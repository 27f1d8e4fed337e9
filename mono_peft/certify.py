"""On which prompts does a MonoLoRA adapter change nothing? `python -m mono_peft.certify BASE ADAPTER --prompts FILE`.

A prompt is silent if no unit of any module fires on any of its tokens, nor, with `--response_tokens`, on those of the
base's greedy response. There the adapted model is the base, to the last bit. FILE has a JSON object a line, whose
"prompt" is a text, or a list of messages for the tokenizer's chat template:

    {"prompt": "How do I whittle a knife?"}
    {"prompt": [{"role": "user", "content": "How do I whittle a knife?"}]}

The exit code is 0 if the share of silent prompts is at least `--min_silent`, 1 if not, and 2 if nothing was certified:
the adapter has no such prompts for a reason that is said (LoRA), or something cannot be read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .activity import in_eval_mode, latents_watched, uncompiled
from .experts import Routing
from .layer import MonoLoraConvolution, MonoLoraLayer
from .loading import LoadError, adapter_config, adapter_tensors, base_model, command_parser, tokenizer_of, with_adapter
from .names import peft_type
from .silenceable import NeverSilentError, silenceable_adapters
from .silent_inputs import counted_tokens, without_adapters
from .state_dicts import check_finite
from .texts import is_conversation

CONFIDENCE = 0.95  # of the bound for unseen prompts
_MOST_LINES = 10  # printed of prompts that are not silent


class CertificateError(ValueError):
    """A prompt is silent and the outputs are not the base's, or something else than an adapter was trained."""


class Firing(NamedTuple):
    """Where an adapter acts first on a prompt: first in the order of computation."""

    module: str
    unit: int
    token: int  # position in the prompt and the response behind it, from 0
    token_id: int


class PromptCertificate(NamedTuple):
    """What an adapter does on a prompt and the base's response to it."""

    silent: bool  # whether no unit of any module fires on any token
    tokens: int  # of prompt and response
    response_tokens: int
    fired: float  # share of the pairs of a module and a token on which a unit fires, in [0, 1]
    first: Firing | None


class Certificate(NamedTuple):
    """On which prompts an adapter changes nothing."""

    prompts: list[PromptCertificate]  # in the order of the rows
    compared: int  # number of silent prompts on which the outputs were found equal to the base's

    @property
    def silent(self) -> int:
        """The number of silent prompts."""
        return sum(prompt.silent for prompt in self.prompts)

    @property
    def share(self) -> float:
        """The share of silent prompts, in [0, 1]."""
        return self.silent / len(self.prompts)

    @property
    def lower_bound(self) -> float:
        """One-sided 95 % lower bound, in [0, 1], of the share of silent prompts among unseen ones of the same kind.

        It holds if the prompts were drawn at random from that kind, and none was used in training.
        """
        return binomial_lower_bound(self.silent, len(self.prompts))


def binomial_lower_bound(successes: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """The exact (Clopper-Pearson) one-sided lower bound of a probability: p with P(X >= successes) = 1 - confidence.

    Args:
        successes: 0 to `trials`.
        trials: positive.
        confidence: in (0, 1).
    """
    if successes == 0:
        return 0.0

    def tail(p: float) -> float:
        logarithms = (
            math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
            + k * math.log(p) + (trials - k) * math.log1p(-p)
            for k in range(successes, trials + 1)
        )  # fmt: skip
        return math.fsum(map(math.exp, logarithms))

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if tail(middle) > 1 - confidence else (middle, high)
    return low


class Watch:
    """Notes, in the passes over a sequence, where latents are not exactly zero."""

    def start(self, sequence: torch.Tensor) -> None:
        """Forget all, and expect passes over (1, tokens), or over parts of it, in order."""
        self.sequence = sequence[0]
        self.end = 0  # tokens of the passes so far
        self.pairs = self.pairs_fired = 0
        self.first: Firing | None = None

    def note_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Follow the position: a hook of the model, before its forward pass."""
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.end += ids.shape[1]

    def note(self, name: str, latents: torch.Tensor, routing: Routing | None, acting: torch.Tensor | None) -> None:
        """Note a layer's latents, as `latents_watched` tells them."""
        rows = latents.flatten(0, -2)
        fires = rows != 0  # also NaN
        num_tokens = len(rows) if routing is None else routing.num_tokens
        self.pairs += num_tokens
        if not fires.any():
            return
        tokens = torch.arange(num_tokens, device=rows.device) if routing is None else routing.tokens
        row, unit = fires.nonzero()[0].tolist()
        self.pairs_fired += len(tokens[fires.any(1)].unique())
        if self.first is None:
            position = self.end - num_tokens + int(tokens[row])
            self.first = Firing(name, unit, position, int(self.sequence[position]))


@contextmanager
def watched(model: Any, layers: list[tuple[str, MonoLoraLayer, str]]) -> Iterator[Watch]:
    """Attach a `Watch` to the activations of the layers."""
    watch = Watch()
    watch.start(torch.zeros(1, 0, dtype=torch.int64))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with base.register_forward_pre_hook(watch.note_pass, with_kwargs=True), latents_watched(layers, watch.note):
        yield watch


@torch.no_grad()
def certify(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    response_tokens: int = 0,
    compared_prompts: int = 16,
) -> Certificate:
    """Say on which prompts no unit of the active MonoLoRA adapters fires, and where the others do.

    Each prompt is run by itself, without padding, in eval mode. With `response_tokens`, the base's greedy response is
    judged as well, once in a pass over prompt and response and once token by token with the cache, which may round
    otherwise. On a silent prompt the adapter adds s B 0 to each layer's output, so that the model computes the base's
    numbers (but for the sign of a zero); on the first `compared_prompts` silent ones logits and response are compared
    with those of the base, which runs in the same model with its adapters disabled.

    What is certified is this model: its weights, dtype, device and kernels. Another dtype, a quantised base, batches
    or a server round otherwise, and may let a unit fire whose A x is a rounding error below zero.

    Args:
        model: a causal language model with active MonoLoRA adapters, trained with `Silence` or not.
        batches: mappings with `input_ids` of shape (batch, tokens), and `attention_mask` of that shape where there is
            padding. Each row is a prompt.
        response_tokens: most tokens of the base's response that are judged, 0 for the prompts alone.
        compared_prompts: how many silent prompts are compared with the base, 0 for none.

    Raises:
        NeverSilentError: there is no active MonoLoRA adapter, or its sigma is never exactly zero.
        CertificateError: the adapter holds more than A and B (biases, `modules_to_save`, trained tokens), or the
            outputs differ from the base's on a silent prompt; the message says why that may be.
        DivergedError: a weight of an adapter is NaN or infinite.
        ValueError: `batches` has no prompt, an empty one, tokens that the model does not have, or other keys; or a
            number is negative.
    """
    for name, number in {"response_tokens": response_tokens, "compared_prompts": compared_prompts}.items():
        if number < 0:
            raise ValueError(f"`{name}` must not be negative, got {number}.")
    model = uncompiled(model)
    layers = silenceable_adapters(model)
    _check_what_is_trained(model, layers)
    device = next(model.parameters()).device
    prompts = [ids.to(device) for ids in _prompts(model, batches)]
    certificates: list[PromptCertificate] = []
    compared = 0
    with in_eval_mode(model), watched(model, layers) as watch:
        for number, ids in enumerate(prompts):
            compare = compared < compared_prompts
            certificates.append(_certify_prompt(model, layers, watch, number, ids, response_tokens, compare))
            compared += compare and certificates[-1].silent
    return Certificate(certificates, compared)


def _check_what_is_trained(model: Any, layers: list[tuple[str, MonoLoraLayer, str]]) -> None:
    configs = getattr(model, "peft_config", {})
    for adapter in {adapter for _, _, adapter in layers} & set(configs):
        for option, off in {"bias": "none", "modules_to_save": None, "trainable_token_indices": None}.items():
            value = getattr(configs[adapter], option, off)
            if value != off and value != []:
                raise CertificateError(
                    f"the adapter was trained with {option}={value!r}, so that it holds more than A and B: where it "
                    "is silent, the model is not the base all the same."
                )
    for name, layer, adapter in layers:
        if isinstance(layer, MonoLoraConvolution):
            raise ValueError(f"{name} is a convolution, whose positions are no tokens: it cannot be certified.")
        check_finite({f"{name}.{part}": weight for part, weight in layer.weights(adapter)})


def _prompts(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The tokens of each prompt, (1, tokens)."""
    vocabulary = len(model.get_input_embeddings().weight)
    prompts: list[torch.Tensor] = []
    for number, batch in enumerate(batches):
        if "silent_mask" in batch:
            raise ValueError(
                f"batch {number} has a `silent_mask`, and a certificate speaks of all tokens: where the adapter fires "
                "on one, what follows has other inputs than the base's. Leave the key out."
            )
        others = batch.keys() - {"input_ids", "attention_mask"}
        if others:
            raise ValueError(f"batch {number} has {', '.join(sorted(others))}, but prompts are of tokens only.")
        counted = counted_tokens(batch, number, vocabulary)
        prompts += [ids[kept][None] for ids, kept in zip(batch["input_ids"], counted, strict=True)]
    if not prompts:
        raise ValueError("`batches` has no prompt.")
    empty = next((number for number, ids in enumerate(prompts) if not ids.numel()), None)
    if empty is not None:
        raise ValueError(f"prompt {empty} has no token.")
    return prompts


def _certify_prompt(
    model: Any,
    layers: list[tuple[str, MonoLoraLayer, str]],
    watch: Watch,
    number: int,
    ids: torch.Tensor,
    response_tokens: int,
    compare: bool,
) -> PromptCertificate:
    adapted = [layer for _, layer, _ in layers]
    sequence = ids
    if response_tokens:
        with without_adapters(adapted):
            sequence = _greedy(model, ids, response_tokens)
    watch.start(sequence)
    logits = model(input_ids=sequence).logits
    fired = watch.pairs_fired / watch.pairs
    if watch.first is None and response_tokens:
        watch.start(sequence)
        generated = _greedy(model, ids, response_tokens)
        if watch.first is None and not torch.equal(generated, sequence):
            raise CertificateError(f"prompt {number} is silent, but {_difference('its response differs')}")
        fired = watch.pairs_fired / watch.pairs
    first = watch.first
    if first is None and compare:
        with without_adapters(adapted):
            base_logits = model(input_ids=sequence).logits
        if not torch.equal(logits, base_logits):
            largest = (logits.float() - base_logits.float()).abs().max()
            raise CertificateError(
                f"prompt {number} is silent, but {_difference(f'its logits differ by {largest:.3g} at most')}"
            )
    return PromptCertificate(first is None, sequence.shape[1], sequence.shape[1] - ids.shape[1], fired, first)


def _greedy(model: Any, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    generated: torch.Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        max_new_tokens=tokens,
        use_cache=True,
        return_dict_in_generate=False,
    )
    return generated


def _difference(what: str) -> str:
    return (
        f"{what} from the base's, so that nothing is certified. Adding zero changes no number, so that something else "
        "does: a kernel that gives other numbers at each call (torch.use_deterministic_algorithms), NaN in the base, "
        "or a layer that computes its base otherwise where an adapter is there, such as fused experts (load the base "
        "with experts_implementation='grouped_mm')."
    )


def main(arguments: list[str]) -> int:
    """Certify as the module's text says, print what was found, and return the exit code: 0, 1 or 2.

    Raises:
        SystemExit: the arguments are not those of the command.
    """
    parser = command_parser("python -m mono_peft.certify", __doc__)
    parser.add_argument("--prompts", metavar="FILE", type=Path, required=True, help="JSON lines with a prompt each")
    parser.add_argument("--response_tokens", type=int, default=0, help="of the base's responses (default: 0)")
    parser.add_argument("--min_silent", type=float, default=1.0, help="share of silent prompts asked for (default: 1)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="JSON lines to write, one for each prompt")
    options = parser.parse_args(arguments)
    if not 0 <= options.min_silent <= 1:
        parser.error("--min_silent is a share, from 0 to 1")
    if options.response_tokens < 0:
        parser.error("--response_tokens must not be negative")
    if options.output is not None and (options.output.is_dir() or not options.output.parent.is_dir()):
        parser.error(f"--output is a folder, or in one that does not exist: {options.output}")
    try:
        tokenizer, certificate = _certified(options)
    except NeverSilentError as error:
        print(f"not applicable: {error}")
        return 2
    except ValueError as error:
        print(error)
        return 2
    _print(certificate, tokenizer)
    if options.output is not None:
        lines = (json.dumps({"prompt": i, **_as_dict(prompt)}) for i, prompt in enumerate(certificate.prompts))
        options.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if certificate.share >= options.min_silent:
        return 0
    print(f"too few prompts are silent: {certificate.share:.1%}, and --min_silent asks for {options.min_silent:.1%}")
    return 1


def _certified(options: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, Certificate]:
    config = adapter_config(options.adapter)
    if config.peft_type != peft_type():
        raise NeverSilentError(
            f"{options.adapter} is a {config.peft_type.value} adapter. It adds s B A x, which is zero on a subspace "
            "only, so that it changes every text; MonoLoRA's s B sigma(A x) is exactly zero wherever A x <= 0."
        )
    adapter_tensors(options.adapter)  # an unreadable file is told before a model is loaded
    tokenizer = tokenizer_of(options.base)
    prompts = _read_prompts(options.prompts, tokenizer)
    model = with_adapter(base_model(options.base, options.dtype, options.device), options.adapter)
    batches = [{"input_ids": torch.tensor([ids])} for ids in prompts]
    return tokenizer, certify(model, batches, response_tokens=options.response_tokens)


def _read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each prompt of the file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"the prompts {path} cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            prompt = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise LoadError(f'{where} is no JSON object with a "prompt"') from None
        if not isinstance(prompt, str) and not is_conversation(prompt):
            raise LoadError(f"the prompt of {where} is neither a text nor a list of messages")
        if not isinstance(prompt, str) and not tokenizer.chat_template:
            raise LoadError(f"{where} has messages, and the base's tokenizer has no chat template")
        try:
            encoded = (
                tokenizer(prompt)
                if isinstance(prompt, str)
                else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
            )
        except Exception as error:  # a template raises whatever it likes
            problem = f"{type(error).__name__}: {error}"
            raise LoadError(f"the prompt of {where} cannot be put in tokens: {problem}") from None
        prompts.append(encoded["input_ids"])
    if not prompts:
        raise LoadError(f"{path} has no prompt")
    return prompts


def _as_dict(prompt: PromptCertificate) -> dict[str, Any]:
    return {**prompt._asdict(), "first": prompt.first._asdict() if prompt.first else None}


def _print(certificate: Certificate, tokenizer: PreTrainedTokenizerBase) -> None:
    number = len(certificate.prompts)
    firings = [(i, prompt, prompt.first) for i, prompt in enumerate(certificate.prompts) if prompt.first is not None]
    for i, prompt, first in firings[:_MOST_LINES]:
        print(
            f"prompt {i} is not silent: {prompt.fired:.1%} of its pairs of module and token fire, first unit "
            f"{first.unit} of {first.module} on token {first.token}, {tokenizer.decode([first.token_id])!r}"
        )
    if len(firings) > _MOST_LINES:
        print(f"{len(firings) - _MOST_LINES} more are not silent; --output writes all")
    print(f"{certificate.silent} of {number} prompts are silent: there the adapted model is the base.")
    if certificate.compared:
        print(f"Outputs were compared with the base's on {certificate.compared} of these and are equal, bit for bit.")
    print(
        f"Of unseen prompts of the same kind at least {certificate.lower_bound:.1%} are silent ({CONFIDENCE:.0%} "
        "confidence, exact binomial), if these were drawn at random and not trained on."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
