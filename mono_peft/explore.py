"""What do an adapter's units do? `python -m mono_peft.explore BASE ADAPTER --data [GROUP=]FILE ... --output_dir DIR`.

Runs texts through the base with its MonoLoRA adapter once, and writes `units.jsonl`, all that was found of each unit,
one a line, and `index.html`, a page to look at them, which needs nothing else:

    python -m mono_peft.explore BASE ADAPTER --data task=sst2.jsonl harmful=requests.jsonl --output_dir units

A file is jsonl or tsv, or one of these with .gz. A row has `prompt`, with `response` where there is one, `messages`,
`text` or `sentence`. Several groups of texts show what a unit prefers. Exit codes: 0, or 2 if nothing was written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from .effects import effects
from .inventory import collect, explorable
from .lens import Unembedding
from .loading import LoadError, adapter_config, adapter_tensors, base_model, command_parser, tokenizer_of, with_adapter
from .names import peft_type
from .provenance import PROVENANCE_FILE, read_provenance
from .state_dicts import DivergedError, check_finite
from .stream import residual_stream
from .texts import Batch, Texts, named_files, read_texts
from .unit_page import UnitPage
from .unit_records import UnitRecords, token_text
from .units import Unit

_SHOWN = 10  # most selective units that are printed


def main(arguments: list[str]) -> int:
    """Explore as the module's text says, print a summary, and return the exit code: 0 or 2.

    Raises:
        SystemExit: the arguments are not those of the command.
    """
    parser = command_parser("python -m mono_peft.explore", __doc__)
    parser.add_argument("--data", nargs="+", metavar="[GROUP=]FILE", required=True, help="texts, in groups")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of units.jsonl and index.html")
    parser.add_argument("--max_tokens", type=int, default=256, help="of a text; the rest is cut (default: 256)")
    parser.add_argument("--batch_size", type=int, default=16, help="texts at a time (default: 16)")
    parser.add_argument(
        "--ablate", type=int, default=0, metavar="N",
        help="measure what switching off each of the N most selective units does to the loss; a pass for each",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    for name, least in {"max_tokens": 1, "batch_size": 1, "ablate": 0}.items():
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if options.output_dir.exists() and not options.output_dir.is_dir():
        parser.error(f"--output_dir is a file: {options.output_dir}")
    try:
        _explore(options)
    except (DivergedError, LoadError) as error:
        print(error)
        return 2
    return 0


def _explore(options: argparse.Namespace) -> None:
    start = time.monotonic()
    if find_spec("jinja2") is None:
        raise LoadError('the page needs jinja2: pip install "mono-peft[explore]"')
    config = adapter_config(options.adapter)
    if config.peft_type != peft_type():
        raise LoadError(
            f"{options.adapter} is a {config.peft_type.value} adapter, which has no units that fire or not: only "
            "MONOLORA adapters are explored"
        )
    check_finite(adapter_tensors(options.adapter))
    try:
        has_provenance = (Path(options.adapter) / PROVENANCE_FILE).is_file()
        provenance = read_provenance(options.adapter) if has_provenance else {}
        named = named_files(options.data)
        tokenizer = tokenizer_of(options.base)
        texts = read_texts(named, tokenizer, options.max_tokens)
        base = base_model(options.base, options.dtype, options.device)
        _check_tokens(base, texts)
        model = with_adapter(base, options.adapter)
        layers = {name: layer for name, layer, _ in explorable(model)}
        units = {Unit(name, i) for name, layer, adapter in explorable(model) for i in range(layer.r[adapter])}
        if provenance and units != provenance.keys():
            raise LoadError(
                f"{PROVENANCE_FILE} beside the adapter has other units than the adapter: it was left there by another "
                "training. Remove it"
            )
        first = torch.tensor([texts.ids(0)[:8]], device=base.device)
        stream = residual_stream(model, layers, first)
        unembedding = Unembedding(base, stream) if stream.is_unembedded else None
        with unembedding.measuring(model) if unembedding else nullcontext():
            statistics = collect(model, texts, _with_progress(texts, options.batch_size))
    except ValueError as error:
        raise LoadError(str(error)) from None
    records = UnitRecords(model, statistics, texts, tokenizer, stream, unembedding)
    records.provenance = provenance
    if options.ablate:
        chosen = records.most_selective(options.ablate)
        measured = effects(model, texts, tqdm([None, *chosen], desc="switched off", unit="unit"))
        records.without_adapter = next(measured)
        records.effects = dict(zip(chosen, measured, strict=True))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    page = UnitPage(_facts(options, config, texts, records), texts, records.threshold)
    with _replaced(options.output_dir / "units.jsonl") as file:
        for record in tqdm(records, total=len(records), desc="written", unit="unit"):
            page.add(record)
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    with _replaced(options.output_dir / "index.html") as file:
        file.write(page.render(partial(token_text, tokenizer)))
    _print(records, options.output_dir, time.monotonic() - start)


def _check_tokens(base: Any, texts: Texts) -> None:
    vocabulary = len(base.get_input_embeddings().weight)
    if texts.largest_id >= vocabulary:
        raise LoadError(
            f"the base has {vocabulary} tokens, and its tokenizer gives the token {texts.largest_id}: they do not "
            "belong together"
        )
    positions = getattr(base.config, "max_position_embeddings", None)
    longest = max(len(texts.ids(number)) for number in range(len(texts)))
    if positions is not None and longest > positions:
        raise LoadError(f"the base takes {positions} tokens, and a text has {longest}: give --max_tokens {positions}")


def _with_progress(texts: Texts, batch_size: int) -> Iterator[Batch]:
    with tqdm(total=len(texts), desc="explored", unit="text") as bar:
        for batch in texts.batches(batch_size):
            yield batch
            bar.update(len(batch.texts))


def _facts(options: argparse.Namespace, config: Any, texts: Texts, records: UnitRecords) -> dict[str, Any]:
    """What stands in the head and the foot of the page."""
    adapter, base = (Path(n).resolve() if Path(n).is_dir() else Path(n) for n in (options.adapter, options.base))
    cut = f", {texts.cut:,} of them cut at {options.max_tokens} tokens" if texts.cut else ""
    top = f" of {config.k}" if config.k else ""
    changes = ", ".join(
        f"{group} {_signed(effect.mean)} [{_signed(effect.low)}, {_signed(effect.high)}]"
        for group, effect in records.without_adapter.items()
        if effect
    )
    return {
        "title": f"Units of {'/'.join(adapter.parts[-2:])}",
        "line": f"MonoLoRA, {config.activation}{top}, r {config.r}, on {base.name}; {len(records):,} units in "
        f"{len(records.statistics)} layers; {len(texts):,} texts of {texts.tokens:,} tokens{cut}.",
        "without": f"Without the whole adapter the loss changes, in nats a token: {changes}." if changes else "",
        "made": f"Made by python -m mono_peft.explore with torch {torch.__version__} on {time.strftime('%Y-%m-%d')}.",
        "threshold": records.threshold,
        "groups": len(texts.groups),
    }


def _signed(number: float) -> str:
    return f"{number:+.2g}".replace("-", "−")


@contextmanager
def _replaced(path: Path) -> Iterator[TextIO]:
    """Write a file beside `path` that takes its place at the end, so that a stop leaves the old one or the new."""
    partly = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partly.open("w", encoding="utf-8") as file:
            yield file
        partly.replace(path)
    finally:
        partly.unlink(missing_ok=True)


def _print(records: UnitRecords, folder: Path, seconds: float) -> None:
    dead = int((~records.fires).sum())
    print(f"{len(records)} units, {dead} dead on these texts; {seconds:.0f} s")
    if len(records.texts.groups) > 1:
        print(f"most selective (z beyond {records.threshold:.2f} is beyond chance):")
        for unit in records.most_selective(_SHOWN):
            preferred = records.preferences[unit.module]
            group = records.texts.groups[int(preferred.group[unit.index])]
            selectivity, z = float(preferred.selectivity[unit.index]), float(preferred.z[unit.index])
            print(f"  {unit.module} {unit.index}: {group}, selectivity {selectivity:.2f}, z {z:.1f}")
    print(folder / "units.jsonl")
    print(folder / "index.html")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
