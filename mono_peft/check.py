"""Is an adapter what its file says, and is it applied? `python -m mono_peft.check BASE ADAPTER`.

Loads a LoRA or MonoLoRA adapter on its base as every program does, compares each tensor of its file with what the
model then holds, and measures how far the outputs are from the base's. With a server,

    python -m mono_peft.check BASE ADAPTER --endpoint http://localhost:8000 --served-name NAME

also says whether the served model equals ours or the base. The last line says what is wrong, or that all is right;
the exit code is 1 or 0. BASE and ADAPTER are folders or names on the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch.nn.functional import kl_div
from transformers import PreTrainedTokenizerBase

from .activity import activation_sparsity
from .endpoint import NEW_TOKENS, Completion, EndpointError, Served, ask
from .loading import (
    LoadError,
    adapter_config,
    adapter_tensors,
    base_model,
    command_parser,
    tokenizer_of,
    with_adapter,
)
from .names import peft_type
from .served import LogProbabilities, compare_log_probabilities, compare_texts
from .state_dicts import DivergedError, check_finite
from .targets import listed

PROMPTS = (
    "The weather in the mountains changes quickly, so hikers should",
    "My favourite recipe begins with two onions and",
    "In the year 1969, the first people walked on the moon and",
    "To install the program, open a terminal and type",
    "Question: What is the capital of France?\nAnswer:",
    "The film was long, and yet the audience",
    "def add(a, b):\n    return",
    "She opened the letter, read it twice, and then",
)

_DECODER = re.compile(r"\.(monolora_decoder\.weight|lora_B\.weight|lora_embedding_B)$")  # B, in the file's names


class CheckError(ValueError):
    """An adapter and its base do not fit one another, or compute no numbers."""


class _Outputs(NamedTuple):
    """What a model computes for the prompts."""

    log_probabilities: LogProbabilities  # after each prompt and what a server generated behind it
    texts: list[str]  # that it generates itself; empty where they are not compared


def main(arguments: list[str]) -> int:
    """Check as the module's text says, print a table and a last line, and return the exit code: 0 or 1.

    Raises:
        SystemExit: the arguments are not those of the command.
    """
    parser = command_parser("python -m mono_peft.check", __doc__)
    parser.add_argument("--endpoint", metavar="URL", help="of a server such as vLLM's or `transformers serve`")
    parser.add_argument("--served-name", metavar="NAME", help="the adapter's name in the server's /v1/models")
    options = parser.parse_args(arguments)
    if (options.endpoint is None) != (options.served_name is None):
        parser.error("--endpoint and --served-name go together: a server has several models")
    try:
        problems = _check(options)
    except (CheckError, DivergedError, EndpointError, LoadError) as error:
        problems = [str(error)]
    if problems:
        print("; ".join(problems))
        return 1
    equals = f", and served model {options.served_name} equals ours" if options.endpoint else ""
    print(f"all is right: the model holds the file's tensors, its outputs differ from the base's{equals}")
    return 0


def _check(options: argparse.Namespace) -> list[str]:
    """Print the table, and return what is wrong."""
    config = adapter_config(options.adapter)
    tensors = adapter_tensors(options.adapter)
    _row("adapter", f"{config.peft_type.value} of rank {config.r}, saved for {config.base_model_name_or_path}")
    check_finite(tensors)
    tokenizer = tokenizer_of(options.base)
    # An activated adapter acts from its invocation tokens on.
    invocation = getattr(config, "alora_invocation_tokens", None) or []
    if invocation and options.endpoint:
        raise CheckError(f"{options.adapter} is an activated adapter, and those are checked without a server only")
    prompts = [tokenizer(prompt).input_ids + invocation for prompt in PROMPTS]
    lengths = [len(ids) for ids in prompts]
    served = ask(options.endpoint, options.served_name, PROMPTS, lengths) if options.endpoint else None

    model = base_model(options.base, options.dtype, options.device)
    base = _outputs(model, tokenizer, prompts, served)
    base_of_server = _log_probabilities(model, prompts, served.base_completions) if served and served.base_name else []
    # Other shapes are for the table; without the option they would be an error.
    model = with_adapter(model, options.adapter, ignore_mismatched_sizes=True)
    problems = _compare_tensors(tensors, model)
    ours = _outputs(model, tokenizer, prompts, served)
    problems += _compare_outputs(ours, base, lengths, tensors)
    if config.peft_type == peft_type():
        batches = [{"input_ids": torch.tensor([ids])} for ids in prompts]
        _row("live units", f"{1 - activation_sparsity(model, batches).dead:.1%}, fire on the prompts")
    if served is not None:
        if served.has_log_probabilities:
            line, problem = compare_log_probabilities(
                served, lengths, ours.log_probabilities, base.log_probabilities, base_of_server
            )
        else:
            line, problem = compare_texts(served, ours.texts, base.texts)
        _row(f"served {served.name}", line)
        if problem:
            problems.append(problem)
    return problems


def _row(name: str, value: str) -> None:
    print(f"{name:<20} {value}", flush=True)


def _compare_tensors(tensors: Mapping[str, torch.Tensor], model: PeftModel) -> list[str]:
    """Compare the file's tensors with those in the model, in both directions; they may be rounded to its dtype.

    Raises:
        CheckError: some have other shapes, so that the model holds random numbers there.
    """
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
    everything = model.state_dict() | adapter  # a file may hold parameters of the base too, such as embeddings
    found = {name: (saved, everything[name]) for name, saved in tensors.items() if name in everything}
    shapes = [name for name, (saved, held) in found.items() if saved.shape != held.shape]
    different = [
        name
        for name, (saved, held) in found.items()
        if saved.shape == held.shape and not torch.equal(saved.to(held.dtype), held.cpu())
    ]
    lost, foreign = tensors.keys() - found.keys(), adapter.keys() - tensors.keys()
    equal = len(found) - len(shapes) - len(different)
    _row("tensors", f"{len(tensors)} in the file, {equal} of them equal in the model")
    if shapes:
        saved, held = found[shapes[0]]
        raise CheckError(
            f"{len(shapes)} tensors of the file have other shapes than in the model, such as {shapes[0]}: "
            f"{tuple(saved.shape)} in the file, {tuple(held.shape)} in the model. The adapter is of another base"
        )
    problems = {
        "of the file are not in the model": lost,
        "of the adapter in the model are not in the file": foreign,
        "of the file have other values in the model": different,
    }
    return [f"{len(names)} tensors {problem}: {listed(names, 3)}" for problem, names in problems.items() if names]


def _outputs(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], served: Served | None
) -> _Outputs:
    log_probabilities = _log_probabilities(model, prompts, served.completions if served else None)
    as_texts = served is not None and not served.has_log_probabilities
    return _Outputs(log_probabilities, [_greedy_text(model, tokenizer, ids) for ids in prompts if as_texts])


@torch.no_grad()
def _log_probabilities(
    model: Any, prompts: list[list[int]], completions: list[Completion] | None
) -> list[torch.Tensor]:
    """After each token of a prompt and its completion: (tokens, vocabulary), nats, float32 on the CPU."""
    sequences = prompts
    if completions is not None:
        sequences = [ids + (completion.tokens or []) for ids, completion in zip(prompts, completions, strict=True)]
    outputs = (model(input_ids=torch.tensor([ids], device=model.device)).logits[0] for ids in sequences)
    return [logits.float().log_softmax(-1).cpu() for logits in outputs]


def _greedy_text(model: Any, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    inputs = torch.tensor([ids], device=model.device)
    generated = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=NEW_TOKENS
    )
    return str(tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True))


def _compare_outputs(
    ours: _Outputs, base: _Outputs, lengths: list[int], tensors: Mapping[str, torch.Tensor]
) -> list[str]:
    pairs = zip(ours.log_probabilities, base.log_probabilities, lengths, strict=True)
    with_adapter, without = (torch.cat(rows) for rows in zip(*((a[:n], b[:n]) for a, b, n in pairs), strict=True))
    divergences = kl_div(without, with_adapter, reduction="none", log_target=True).sum(-1)
    if not torch.isfinite(divergences).all():
        raise CheckError(
            "the outputs are NaN or infinite: the base's dtype overflows (--dtype float32), or its files do"
        )
    _row("KL(adapter, base)", f"{divergences.mean():.3g} nats a token, {divergences.max():.3g} at most")
    largest = (with_adapter - without).abs().max()
    _row("log-probabilities", f"differ from the base's by {largest:.3g} nats at most ({len(divergences)} tokens)")
    decoders = [tensor for name, tensor in tensors.items() if _DECODER.search(name)]
    zero = sum(not tensor.any() for tensor in decoders)
    _row("B", f"is zero in {zero} of {len(decoders)} modules")
    if largest > 0:
        return []
    if decoders and zero == len(decoders):
        return ["B is zero in all modules, and the outputs are the base's: the adapter is not trained"]
    return ["the outputs equal the base's on all prompts: the adapter does nothing"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
