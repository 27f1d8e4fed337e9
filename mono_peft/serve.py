"""Serve a model with an adapter to OpenAI's clients: `python -m mono_peft.serve BASE ADAPTER [OPTIONS ...]`.

This is `transformers serve` with the tuner registered, for machines without vLLM:

    python -m mono_peft.serve meta-llama/Llama-3.2-1B-Instruct my-adapter --port 8001 --device cuda

BASE and ADAPTER (MonoLoRA or LoRA) are folders or names on the Hugging Face hub. OPTIONS are those of
`transformers serve` (`transformers serve --help` lists them); paths among them must be absolute. Clients call the
model by the name of the adapter's folder. The tokenizer and chat template are the adapter's where it has its own.

`transformers serve` loads an adapter only from a folder that holds its base model too. Such a folder, of links to the
files of both, is made before the server starts and removed when it ends. `transformers serve` only warns of tensors
that do not fit and goes on with random or no weights in their place: whatever does not fit exactly is refused here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from peft import PeftConfig
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, is_serve_available

import mono_peft.run  # registers the tuner

from .loading import adapter_tensors
from .state_dicts import check_finite
from .targets import listed

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tekken.json", "*.model", "*.tiktoken", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip


def local_folder(name: str, patterns: Iterable[str]) -> Path:
    """The folder `name`, or that of the hub's model `name` in the cache, to which files of `patterns` are fetched.

    Raises:
        ValueError: it is neither a folder nor to be had from the hub or its cache.
    """
    if Path(name).is_dir():
        return Path(name).resolve()
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} is no folder and cannot be had from the hub ({str(error).strip().splitlines()[0]}). A name on "
            "the hub needs network access or files in the cache, and for a gated one `hf auth login`."
        ) from None


def check_base(base: Path) -> None:
    """Check that a base model's folder has what `transformers serve` needs, and no adapter.

    Raises:
        ValueError: it lacks config.json or safetensors, or has an adapter of its own.
    """
    if (base / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"The base folder {base} holds an {ADAPTER_CONFIG} of its own, so that it is not clear which adapter is "
            "meant. Give the base model without an adapter."
        )
    if not (base / CONFIG_NAME).is_file():
        raise ValueError(f"The base folder {base} has no {CONFIG_NAME}, so it is no model of transformers.")
    if not any((base / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        raise ValueError(
            f"The base folder {base} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; weights in other "
            "formats are not read. Convert them once: load with transformers and `save_pretrained`."
        )


def check_adapter(adapter: Path, base_name: str) -> None:
    """Check the files of an adapter by themselves; warn where it was trained on a base of another name.

    Raises:
        ValueError: it lacks its configuration or safetensors, or one of them cannot be read or holds NaN, or it is an
            activated adapter.
    """
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise ValueError(f"The adapter folder {adapter} has no {ADAPTER_CONFIG}, so it holds no adapter of PEFT.")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise ValueError(
            f"The adapter folder {adapter} has no {ADAPTER_WEIGHTS}. Weights in other formats (adapter_model.bin) are "
            "not read, because unpickling runs code: load the adapter where you trust it and `save_pretrained`."
        )
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"PEFT cannot read {adapter / ADAPTER_CONFIG}: {error!r}.") from None
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"{adapter} is an activated adapter (`alora_invocation_tokens`), and `transformers serve` does not look "
            "for its tokens, so that it would never act. Generate with PeftModel."
        )
    check_finite(adapter_tensors(str(adapter)))
    trained_on = config.base_model_name_or_path
    # The folder of a base may have moved since, or be a copy of a model on the hub; its own name stays.
    if trained_on and Path(trained_on).name != Path(base_name).name:
        warnings.warn(
            f"The adapter {adapter} says that it was trained on {trained_on!r}, and is served on {base_name!r}. "
            "Unless the two are the same weights, its answers are not those of the model that was trained.",
            stacklevel=2,
        )


def link_files(base: Path, adapter: Path, folder: Path) -> None:
    """Make `folder` of links to all files of the base, the adapter's two files, and the adapter's tokenizer if any.

    Raises:
        ValueError: the adapter's tokenizer has other tokens than the base's.
    """
    folder.mkdir()
    own = {path for pattern in TOKENIZER_FILES for path in adapter.glob(pattern)}
    templates = {path for path in own if path.suffix == ".jinja"}
    replaced = set()  # the base's tokenizer, as a whole: remains of it would mix with the adapter's
    if own > templates:
        if AutoTokenizer.from_pretrained(adapter).get_vocab() != AutoTokenizer.from_pretrained(base).get_vocab():
            raise ValueError(
                f"The tokenizer in the adapter folder {adapter} has other tokens than that of the base {base}: they "
                "would be embedded as others. Remove its files if the adapter was trained with the base's tokenizer."
            )
        replaced = {path for pattern in TOKENIZER_FILES for path in base.glob(pattern)}
    for source in (adapter / ADAPTER_CONFIG, adapter / ADAPTER_WEIGHTS, *own):
        target = folder / source.relative_to(adapter)
        target.parent.mkdir(exist_ok=True)
        _link(source, target)
    for source in base.rglob("*"):
        target = folder / source.relative_to(base)
        if source.is_file() and source not in replaced and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(source, target)


def _link(source: Path, target: Path) -> None:
    """Link `target` to `source`, or copy it where the system or the file system has no links."""
    try:
        target.symlink_to(source)
    except OSError:
        try:
            os.link(source.resolve(), target)
        except OSError:
            shutil.copyfile(source, target)


def check_fit(folder: Path, trust_remote_code: bool = False) -> Any:
    """Load the adapter as `transformers serve` will, into a model without memory; every tensor must have its place.

    Args:
        folder: as `link_files` makes it.
        trust_remote_code: run code that the base brings along.

    Returns:
        The tokenizer, or the processor of a model that also takes images.

    Raises:
        ValueError: there is no tokenizer, transformers has no such model, or the adapter does not fit it exactly.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"Neither base nor adapter has a tokenizer that can be read: {error}") from None
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    architecture = (config.architectures or ["no architecture"])[0]
    if not hasattr(transformers, architecture):
        raise ValueError(
            f"The base's {CONFIG_NAME} names {architecture}, which is no model of transformers "
            f"{transformers.__version__}; `transformers serve` has no others."
        )
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    try:
        report = model.load_adapter(str(folder), ignore_mismatched_sizes=True)  # into the report, for our message
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"The adapter does not fit the base: {error}") from None
    problems = {
        "belong to nothing in the base": report.unexpected_keys,
        "are missing in the adapter's file": report.missing_keys,
        "have another shape": [
            f"{name} {list(saved)}, not {list(own)}" for name, saved, own in report.mismatched_keys
        ],
    }
    found = [f"{len(names)} tensors {problem} ({listed(names, 3)})" for problem, names in problems.items() if names]
    if found:
        raise ValueError(
            f"The adapter does not fit the base: {'; '.join(found)}. Give the base that it was trained on, and check "
            "that the file is complete. What PEFT loads and transformers does not (such as DoRA) cannot be served."
        )
    return processor


def announcement(name: str, options: argparse.Namespace, chat: bool) -> str:
    """One line that tells a user how to reach the server: address, name of the model, and an example."""
    address = f"http://{options.host}:{options.port}/v1"
    endpoint = "chat/completions" if chat else "completions"
    prompt = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Hello"}
    body = json.dumps({"model": name, **prompt, "max_tokens": 32})
    return (
        f"Model {name!r} at {address} as soon as the server runs"
        f"{'' if chat else ' (no chat template: /v1/completions only)'}; "
        f"example: curl {address}/{endpoint} -H 'Content-Type: application/json' -d '{body}'"
    )


def main(arguments: list[str]) -> None:
    """Serve the first of `arguments` with the adapter that the second names, until the process is told to stop.

    Raises:
        SystemExit: something is missing or does not fit, and the message says what; else when the server ends.
    """
    if len(arguments) < 2 or any(name.startswith("-") for name in arguments[:2]):
        raise SystemExit(__doc__)
    base_name, adapter_name, *options = arguments
    if not is_serve_available():
        raise SystemExit('mono_peft.serve needs further packages: pip install "mono-peft[serve]"')
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # all options go on to `transformers serve`
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", default=8000, type=int)
    parser.add_argument("--trust-remote-code", action="store_true")
    known, _ = parser.parse_known_args(options)
    before = Path.cwd()
    with TemporaryDirectory(prefix="mono-peft-serve-") as temporary:
        _remove_at_sigterm(temporary)
        try:
            base = local_folder(base_name, ("*.safetensors", "*.json", "*.py", *TOKENIZER_FILES))
            adapter = local_folder(adapter_name, (ADAPTER_CONFIG, ADAPTER_WEIGHTS, *TOKENIZER_FILES))
            check_base(base)
            check_adapter(adapter, base_name)
            # A colon or @ in the name would mean a file or a revision to `transformers serve`.
            name = re.sub(r"[^\w.-]", "-", (adapter if Path(adapter_name).is_dir() else Path(adapter_name)).name)
            folder = Path(temporary) / name
            link_files(base, adapter, folder)
            processor = check_fit(folder, known.trust_remote_code)
        except ValueError as error:
            raise SystemExit(f"mono_peft.serve: {error}") from None
        print(announcement(name, known, chat=getattr(processor, "chat_template", None) is not None), flush=True)
        try:
            os.chdir(temporary)  # the path of the folder is the name that clients must use: here it is a plain one
            mono_peft.run.main(["transformers", "serve", name, *options])
        finally:
            os.chdir(before)


def _remove_at_sigterm(folder: str) -> None:
    """Remove `folder` when the process is told to end, which then ends at once, as without this."""

    def end(number: int, frame: object) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    signal.signal(signal.SIGTERM, end)


if __name__ == "__main__":
    main(sys.argv[1:])
