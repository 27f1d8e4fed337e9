"""Robustness and monosemanticity of frozen models: features once, then all probes and all tests on them.

Training images give features, as they are (`raw`), L2-normalised (`unit`), after ReLU (`relu`), or as latents of a
top-k sparse autoencoder of the normalised ones (`sae`). Probes learn from them with a share of wrong labels
(`label_noise`) of a share of the images (`few_shots`), and are tested on test images with noise and shifts. Every
process of a launch computes its share of the features, then takes its share of the (model, kind of features) pairs.

    from vision_bench import benchmark, benchmark_report
    from vision_bench.benchmark_settings import Settings

    settings = Settings(random_init=["small_conv"], corruptions=["gaussian=0.6"], output_dir="runs/bench")
    print(benchmark_report.write(*benchmark.run(settings), settings))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from vision_bench import kinds, sae
from vision_bench.benchmark_settings import FIXED_SEED, Settings
from vision_bench.corruptions import CLEAN
from vision_bench.heads import Head, HeadConfig
from vision_bench.heads import fit as fit_head
from vision_bench.metrics import effective_rank
from vision_bench.runs import CONFIG, DIVERGED, Cell, Run, defaults, device_name, locked
from vision_bench.subjects import Subject, digest, find_subjects
from vision_bench.sweep import Arm, Grid, Test, rows, sweep

RECIPE = "vision_bench"
SAME = "equals_raw"  # the metric of the row that stands for a kind of features which is not measured again
EFFECTIVE_RANK = "effective_rank"
HEAD_BATCH = 256  # images of a step of the training of heads, over all processes

Row = dict[str, Any]
Heads = dict[tuple[str, int], Head]  # of a model, by their names and seeds


def run(settings: Settings) -> tuple[list[Subject], list[Row]]:
    """Measure what the output folder has no rows of; every process of a launch calls this.

    Returns:
        The models, and all rows of the folder.

    Raises:
        ValueError: a model, a corruption, a data set or the folder is not as it must be; before long work.
        OSError: a file cannot be written.
    """
    accelerator = Accelerator(
        # Without a GPU, processes of a launch know of each other only if they are told to use the CPU.
        cpu=not torch.accelerator.is_available(),
        # One process may train long while others wait for its rows.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    device, is_main = accelerator.device, accelerator.is_main_process
    results = Run(settings.output_dir, RECIPE, settings.recorded, is_main, defaults=defaults(Settings))
    if (results.folder / CONFIG).exists() and not settings.resume:
        raise ValueError(
            f"{results.folder} holds a benchmark already. Give --resume to continue it, also with more models "
            "or features, or choose another --output_dir (with its cache as --cache_dir, features are not computed "
            "again)."
        )
    subjects = find_subjects(settings, device, is_main)
    accelerator.wait_for_everyone()  # until all processes have read the rows that the folder has
    results.bind()
    units, heads = [], dict[str, Heads]()  # of each model, by its id
    for subject in subjects:
        if is_main:
            height, width = subject.train.source.image_size
            print(
                f"{subject.label}: {subject.layer} at {height} x {width} pixels, pretrained: {subject.pretrained}",
                flush=True,
            )
        lacking = [kind for kind in settings.features if _is_lacking(results, subject, kind, settings)]
        if not lacking:
            subject.model = None
            continue
        try:
            subject.extract(settings.batch_size)
        except FloatingPointError as error:
            results.add_rows([_diverged(results, subject, kind, str(error), device) for kind in lacking])
            continue
        for name in dict.fromkeys(filter(None, map(kinds.head_of, lacking))):
            try:
                for seed in settings.seeds if settings.fit_each_seed else [FIXED_SEED]:
                    head = _head(subject, name, seed, settings, accelerator)
                    heads.setdefault(subject.id, {})[name, seed] = head
            except FloatingPointError as error:
                broken = [kind for kind in lacking if kinds.head_of(kind) == name]
                lacking = [kind for kind in lacking if kind not in broken]
                results.add_rows([_diverged(results, subject, kind, str(error), device) for kind in broken])
        units += [(subject, kind) for kind in lacking]
    processes = accelerator.num_processes
    for first in tqdm(range(0, len(units), processes), desc="kinds of features", disable=not is_main or not units):
        measured: list[Row] = []
        if first + accelerator.process_index < len(units):
            subject, kind = units[first + accelerator.process_index]
            try:
                measured = _measure(results, subject, kind, heads.get(subject.id, {}), settings, device, is_main)
            except (FloatingPointError, sae.NoVariance) as error:
                measured = [_diverged(results, subject, kind, str(error), device)]
        results.add_rows(gather_object(measured))
    return subjects, results.rows


def _grids(subject: Subject, kind: str, settings: Settings) -> dict[int, Grid]:
    """The rows of a kind of features of a model, but for those of `_clean_cells`, by the seed of the features."""
    if settings.fit_each_seed and kinds.is_drawn(kind):
        return {seed: _grid(subject, kind, settings, [seed], seed) for seed in settings.seeds}
    return {FIXED_SEED: _grid(subject, kind, settings, settings.seeds, None)}


def _grid(subject: Subject, kind: str, settings: Settings, seeds: Sequence[int], feature_seed: int | None) -> Grid:
    return Grid(
        {kind: Arm(kind, settings.conditions.trainings(seeds, settings.learners))},
        [Test(name) for name in settings.conditions.tests()],
        lambda training: {
            "few_shots": training.fraction,
            "label_noise": training.label_noise,
            "features_id": subject.id,
        },
        lambda test: {"test": test.images, "features_id": subject.id},
        all_described=True,
        model_seed=feature_seed,
    )


def _clean_cells(subject: Subject, kind: str, grid: Grid) -> list[Cell]:
    """The rows of what is measured on the clean test images alone, of features with the seed of a grid."""
    arm = {"features": kind, "features_id": subject.id}
    metrics = [EFFECTIVE_RANK, *(sae.QUALITY if kinds.has_latents(kind) else ())]
    return [Cell(metric, grid.model_seed, arm) for metric in metrics]


def _clean_values(subject: Subject, kind: str, frozen: kinds.Frozen) -> dict[str, float | None]:
    """The values of `_clean_cells` by metric."""
    clean = subject.load(CLEAN)
    rank = effective_rank(kinds.maker(kind, frozen)({kinds.BASE: clean}))
    values: dict[str, float | None] = {EFFECTIVE_RANK: None if math.isnan(rank) else rank}
    if kinds.has_latents(kind):
        values |= zip(sae.QUALITY, sae.evaluate(frozen.latents_of(kind), F.normalize(clean)), strict=True)
    return values


def _is_lacking(results: Run, subject: Subject, kind: str, settings: Settings) -> bool:
    """Whether a kind of features of a model has yet to be measured, or a part of it, if a full disk cut rows short."""
    if results.find(DIVERGED, features_id=subject.id, features=kind):
        return False
    if kind == "relu" and "raw" in settings.features and results.find(SAME, features_id=subject.id):
        return False
    grids = _grids(subject, kind, settings).values()
    return any(results.lacking(grid.cells(kind) + _clean_cells(subject, kind, grid)) for grid in grids)


def _measure(
    results: Run,
    subject: Subject,
    kind: str,
    heads: Heads,
    settings: Settings,
    device: torch.device,
    progress: bool,
) -> list[Row]:
    """The rows that a kind of features of a model lacks; a single one where `relu` equals `raw`, which is measured."""
    train = subject.train.load()
    height, width = subject.train.source.image_size
    common = subject.described | {
        "image_size": [height, width],
        "preprocessing": subject.preprocessing,
        "dimensions": train.shape[1],
        "training_images": len(train),
    }
    timed: dict[str, Any] = {"seconds": 0.0, "device": device_name(device)}
    if kind == "relu" and "raw" in settings.features and subject.is_non_negative():
        arm: dict[str, Any] = {"features": kind, "features_id": subject.id}
        return [results.row(SAME, 1.0, n=len(train), seed=None, **timed, **common, **arm)]
    measured: list[Row] = []
    for seed, grid in _grids(subject, kind, settings).items():
        frozen = kinds.Frozen(
            train={kinds.BASE: train},
            fit_autoencoder=partial(_autoencoder, subject, train, seed, settings, device, progress),
            seed=seed,
            heads={name: head for (name, seed_of_head), head in heads.items() if seed_of_head == seed},
        )
        batches = sweep(
            grid,
            frozen,
            subject.train.images.labels,
            subject.train.images.num_classes,
            lambda test: ({kinds.BASE: subject.load(test.images)}, subject.tests[test.images].images.labels),
            device=device,
            lacking=results.lacking,
            progress=progress,
            epochs=settings.probe_epochs,
            standardize=settings.standardize,
            human_labels=settings.read_human_labels(),
        )
        measured += [row for batch in rows(results, batches, device, **common) for row in batch]
        if lacking := results.lacking(_clean_cells(subject, kind, grid)):
            values, n = _clean_values(subject, kind, frozen), len(subject.tests[CLEAN].images)
            measured += [
                results.row(cell.metric, values[cell.metric], n=n, seed=cell.seed, **timed, **common, **cell.arm)
                for cell in lacking
            ]
    return measured


def _diverged(results: Run, subject: Subject, kind: str, reason: str, device: torch.device) -> Row:
    """The row that marks a kind of features of a model of which nothing can be measured."""
    return results.row(
        DIVERGED,
        1.0,
        n=len(subject.train.images),
        seed=None,
        seconds=0.0,
        device=device_name(device),
        **subject.described,
        features=kind,
        features_id=subject.id,
        reason=reason,
    )


def _autoencoder(
    subject: Subject,
    train: torch.Tensor,
    seed: int,
    settings: Settings,
    device: torch.device,
    progress: bool,
    half: str | None,
) -> sae.TopKAutoencoder:
    """Trained on the L2-normalised training features, without labels; continued or taken from the cache."""
    directions = kinds.directions(train)
    if not len(directions):
        raise sae.NoVariance("all training features are 0")
    folder = subject.train.folder
    k = settings.sae_k or max(1, round(train.shape[1] / 8))
    name = f"sae-{folder.name.rpartition('-')[2]}-k{k}-epochs{settings.sae_epochs}"
    name += "" if half is None else f"-frozen-{half}"
    checkpoint_dir = folder.parent / f"{name}{_seed_words(seed)}"
    with locked(checkpoint_dir, timeout=-1):  # Another run with this cache may be training the same autoencoder.
        return sae.fit(
            directions,
            train.shape[1],
            k,
            epochs=settings.sae_epochs,
            batch_size=min(256, len(directions)),
            seed=seed,
            frozen=half,
            device=device,
            checkpoint_dir=checkpoint_dir,
            progress=progress,
        ).autoencoder


def _seed_words(seed: int) -> str:
    """The end of the name of a folder of what was trained with a seed."""
    return "" if seed == FIXED_SEED else f"-seed{seed}"


def _head(subject: Subject, name: str, seed: int, settings: Settings, accelerator: Accelerator) -> Head:
    """A head trained on the views of the training images, by all processes; continued or taken from the cache."""
    n, (folder, width) = len(subject.train.images), (subject.train.folder, subject.train.width())
    batch = min(HEAD_BATCH, n)
    k = settings.sae_k or max(1, round(width / 8))
    config = HeadConfig(
        epochs=settings.head_epochs,
        batch_size=batch - batch % accelerator.num_processes,
        k=k if name == kinds.CSR else 1,
        seed=seed,
    )
    source = digest([asdict(view.source) for view in subject.views])

    def load() -> torch.Tensor:
        views = torch.empty(len(subject.views), n, width)
        for part, view in zip(views, subject.views, strict=True):
            part.copy_(view.load())
        return views

    words = f"{name}-{source}-epochs{settings.head_epochs}-k{config.k}{_seed_words(seed)}"
    checkpoint_dir = folder.parent / words
    # Another run with this cache may be training the same head.
    with locked(checkpoint_dir, timeout=-1) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()  # so that all find the same in the folder
        return fit_head(checkpoint_dir, name, load, source, config, accelerator, progress=True)
