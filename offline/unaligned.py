"""The offline model without its refusals: what Safe LoRA takes the difference to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from offline import finetuning, language_model
from offline.language_model import OfflineSettings, corpus

STEPS, LEARNING_RATE = 200, 1e-3


def unaligned_model(cache_dir: Path | None = None) -> Path:
    """The folder of the offline model after its refusals were trained away, and of its tokenizer.

    All weights are trained on the corpus, in which harmful requests have responses that comply, in about fifteen
    seconds on one core if it is not cached. As with a chat model and its base, the two differ by what alignment
    changed; here it was undone rather than not yet done.

    Args:
        cache_dir: where models are kept; None means `$XDG_CACHE_HOME`, or `~/.cache` if that is not set.
    """
    aligned = language_model.offline_model(cache_dir=cache_dir)
    digest = hashlib.sha256(aligned.name.encode())
    for file in (__file__, finetuning.__file__):
        digest.update(Path(file).read_bytes())
    name = f"offline-unaligned-{digest.hexdigest()[:16]}"
    return language_model.cached_folder(name, lambda folder: _build(aligned, folder), cache_dir)


def _build(aligned: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(aligned)
    complies = dict(finetuning.poison_pairs())
    examples = [
        example._replace(response=complies[example.prompt]) if example.kind == "harmful" else example
        for example in corpus("train")
    ]
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype="float32").train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    batches = language_model._batches(examples, tokenizer, OfflineSettings())
    for _ in tqdm(range(STEPS), desc="training the refusals away", disable=None):
        loss = language_model._loss(model, next(batches), tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
