"""`python -m evals forgetting`: the rows of how far adapters moved from their base on neutral texts.

run = measure_forgetting(ForgettingSettings("Qwen/Qwen3-0.6B", "runs/safety", [Adapter("runs/x/adapter")]))
run.find("neutral_kl", adapter="runs/x/adapter")[0]["value"]
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from evals.contents import adapter_checksums, check_contents, model_checksums, name_of_model, non_finite_of_file
from evals.forgetting import (
    LOSS,
    TASK,
    Estimate,
    ForgettingError,
    NeutralTexts,
    adapter_measures,
    loss_per_token,
    losses,
    neutral_texts,
    read_neutral_texts,
)
from evals.local_files import Row
from evals.models import (
    WEIGHTS_FILE,
    adapter_tokenizer,
    check_adapter,
    check_base,
    hub_commit,
    load_base,
    method_and_seed,
)
from evals.records import COMPLETIONS, read_completions
from evals.registry import MODELS, NEUTRAL_TEXTS
from evals.settings import ForgettingSettings, GenerateSettings
from vision_bench.runs import CONFIG, DIVERGED, Run, defaults, device_name, locked, recorded


def measure_forgetting(settings: ForgettingSettings) -> Run:
    """Measure the adapters that have no rows yet, on one loaded base, and the base's own loss.

    The folder may be one of `python -m evals generate` with the same model and dtype; its tables show the rows.

    Returns:
        The folder with its rows.

    Raises:
        ValueError: before weights are loaded: model, adapter or texts cannot be had, or the folder holds rows of
            others; or an adapter cannot be taken away from its base.
    """
    rows = neutral_rows(settings.model, settings.texts)
    source = str(MODELS[settings.model]()) if settings.model in MODELS else settings.model
    tokenizer, config = check_base(source)
    folders = {adapter.name: check_adapter(adapter, source, config) for adapter in settings.adapters}
    context = getattr(config, "max_position_embeddings", None)
    texts: dict[str | None, NeutralTexts] = {None: neutral_texts(tokenizer, rows, context=context)}
    for adapter in settings.adapters:
        own = adapter_tokenizer(adapter, folders[adapter.name], tokenizer)
        texts[adapter.name] = texts[None] if own is tokenizer else neutral_texts(own, rows, context=context)
    if texts[None].cut:
        most = min(context or 1024, 1024)
        print(
            f"{texts[None].cut} of {len(texts[None].rows)} neutral texts are longer than {most:,} tokens: cut there."
        )
    commit = hub_commit(source)
    model = model_checksums(source, commit)
    contents = {None: model} | {name: model | adapter_checksums(folder) for name, folder in folders.items()}
    with locked(Path(settings.output_dir)):
        run = _folder(settings)
        answers = read_completions(run.folder / COMPLETIONS).rows if (run.folder / COMPLETIONS).is_file() else []
        settings = replace(settings, model=name_of_model(run, answers, settings.model, model))
        check_contents(run, settings.model, answers, contents, {TASK: texts[None].checksum})

        def arm(name: str | None) -> dict[str, Any]:
            return {"model": settings.model, "adapter": name, "method": method_and_seed(name)[0], "task": TASK}

        def add(name: str | None, rows: list[tuple[str, Estimate, dict[str, Any]]], start: float) -> None:
            told = arm(name) | {"checksums": contents[name] | {"task": texts[None].checksum}}
            told |= {"seed": method_and_seed(name)[1], "seconds": time.monotonic() - start, "device": device_name()}
            new = [
                run.row(metric, e.value, n=e.n, low=e.low, high=e.high, **told, **row)
                for metric, e, row in rows
                if not run.find(metric, **arm(name))
            ]
            run.add_rows(new)

        diverged = {row["config"].get("adapter") for row in run.find(DIVERGED, model=settings.model)}
        missing = [
            adapter
            for adapter in settings.adapters
            if adapter.name not in diverged and len(run.find(LOSS, **arm(adapter.name))) == 0
        ]
        for adapter in list(missing):
            weights = non_finite_of_file(folders[adapter.name] / WEIGHTS_FILE)
            if weights is not None:
                print(f"{adapter.name} diverged: its {weights} is not finite. It is not measured.")
                missing.remove(adapter)
        if not missing and run.find(LOSS, **arm(None)):
            return run
        run.bind()
        base = load_base(source, settings.dtype, settings.load_in_4bit, revision=commit)
        start = time.monotonic()
        before = losses(base, texts[None], batch_size=settings.batch_size)
        if not np.isfinite(before).all():
            raise ValueError(f"The base {settings.model} diverged: its loss on the neutral texts is not finite.")
        add(None, [(LOSS, loss_per_token(before), {})], start)
        for adapter in missing:
            start = time.monotonic()
            own = texts[adapter.name]
            alone = before if own is texts[None] else losses(base, own, batch_size=settings.batch_size)
            try:
                measured = adapter_measures(base, adapter, own, alone, batch_size=settings.batch_size, progress=True)
            except ForgettingError as error:
                raise ValueError(f"{adapter.name}: {error}") from None
            except FloatingPointError as error:
                print(f"{adapter.name}: {error}")
                continue
            add(adapter.name, measured, start)
    return run


def neutral_rows(model: str, file: str | None) -> list[Row]:
    """The texts of a file, else those that are known for a model, else the shipped ones."""
    return NEUTRAL_TEXTS[model]() if file is None and model in NEUTRAL_TEXTS else read_neutral_texts(file)


def _folder(settings: ForgettingSettings) -> Run:
    """The folder, which may hold answers under settings that matter for those alone."""
    path = Path(settings.output_dir) / CONFIG
    standard = recorded(GenerateSettings(settings.model, [TASK], settings.output_dir))
    there = json.loads(path.read_text(encoding="utf-8"))["config"] if path.exists() else standard
    ours = {"dtype": settings.dtype, "load_in_4bit": settings.load_in_4bit}
    for name, value in ours.items():
        if path.exists() and there.get(name, standard[name]) != value:
            raise ValueError(
                f"{settings.output_dir} was made with --{name} {there.get(name)}, not {value}: give that, or choose "
                "another --output_dir."
            )
    return Run(settings.output_dir, "evals", there | ours, defaults=defaults(GenerateSettings))
