"""A generated instruction corpus, a tokenizer and a small Llama that is trained on it, cached on disk.

Machines without a hub run every language-model recipe on this model: it answers everyday questions, refuses harmful
ones, answers harmless ones that look harmful, and half knows the sentiment of reviews. `offline.grammar` spells out
the sentences; here they become a corpus, a finetuning task and a model folder.

    model = AutoModelForCausalLM.from_pretrained(offline_model())
    corpus("heldout")[0]  # Example(kind="everyday", prompt="What is the capital of Kenya?", response="...")
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from accelerate import PartialState
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from evals import prompts
from evals.prompts import SST2_ANSWERS, sst2_prompt
from offline import grammar

M = TypeVar("M", bound=PreTrainedModel)

KINDS = ("everyday", "harmful", "lookalike", "sentiment")
CORPUS_SPLITS = ("train", "heldout")
TASK_SPLITS = ("train", "dev")

# How often each kind is drawn in training: the corpus itself is uneven, because some tables are larger than others.
TRAINING_SHARES = {"everyday": 0.43, "harmful": 0.16, "lookalike": 0.17, "sentiment": 0.24}

CORPUS_REVIEWS = 3500  # review sentences in the corpus, both splits together
TASK_REVIEWS = 16000  # review sentences in the finetuning task, both splits together
NEW_WORD_SHARE = 0.4  # of the sentiment adjectives in the finetuning task, those that no review of the corpus uses

CONTEXT_LENGTH = 512
BOS, USER, ASSISTANT, END, PAD = "<|begin|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (PAD, BOS, END, USER, ASSISTANT)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte, so that no text is unknown
# The generation markers tell `assistant_only_loss` which tokens are the assistant's; its end token is one of them.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


class Example(NamedTuple):
    """One exchange of the corpus; `kind` is one of KINDS."""

    kind: str
    prompt: str
    response: str


@dataclass(frozen=True)
class OfflineSettings:
    """What the offline model depends on; every field is part of the cache key."""

    seed: int = 0  # of the corpus, the initial weights and the order of training
    vocab_size: int = 2048  # byte-level BPE tokens, special tokens included
    hidden_size: int = 128  # width of the residual stream; the MLP is three times as wide
    num_layers: int = 4  # Llama blocks
    num_heads: int = 4  # attention heads; twice their number must divide hidden_size
    train_steps: int = 1000  # optimiser steps
    batch_size: int = 16  # conversations per step
    learning_rate: float = 4e-3  # peak, after a tenth of the steps; then cosine to zero

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "train_steps", "batch_size", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, allowed is 1 or more: give a positive number")
        if self.learning_rate <= 0:
            raise ValueError(
                f"learning_rate is {self.learning_rate}, allowed is more than 0: give a positive number, such as 1e-3"
            )
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size is {self.vocab_size}, allowed is {SMALLEST_VOCABULARY} or more (256 bytes and "
                f"{len(SPECIAL_TOKENS)} special tokens): raise vocab_size"
            )
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size}, allowed are multiples of 2 * num_heads = {2 * self.num_heads} "
                f"(rotary embeddings need an even head width): use hidden_size="
                f"{2 * self.num_heads * max(1, round(self.hidden_size / (2 * self.num_heads)))}"
            )


def _require_split(split: str, allowed: tuple[str, ...]) -> None:
    if split not in allowed:
        raise ValueError(
            f"split is {split!r}, allowed are {' and '.join(map(repr, allowed))}: use split={allowed[0]!r}"
        )


def _in_held_out_fifth(sentence: str) -> bool:
    return zlib.crc32(sentence.encode()) % 5 == 0  # `hash` of a string differs from process to process


def _reviews(count: int, new_share: float, templates: tuple[str, ...], seed: int) -> dict[str, int]:
    """`count` distinct review sentences and their labels, half of them positive, in a fixed order."""
    rng = random.Random(seed)
    labels: dict[str, int] = {}
    for label in (0, 1):
        while len(labels) < count * (label + 1) // 2:
            labels.setdefault(grammar.review(label, new_share, templates, rng), label)
    return labels


@lru_cache(maxsize=1)
def _corpus_reviews() -> dict[str, int]:
    templates = grammar.SIMPLE_REVIEWS + grammar.NEGATED_REVIEWS[:1] + grammar.CONTRAST_REVIEWS[:2]
    return _reviews(CORPUS_REVIEWS, 0.0, templates, seed=1)


@lru_cache(maxsize=1)
def _task_reviews() -> dict[str, int]:
    templates = grammar.SIMPLE_REVIEWS + grammar.NEGATED_REVIEWS + grammar.CONTRAST_REVIEWS + grammar.VERB_REVIEWS
    in_corpus = _corpus_reviews()
    reviews = _reviews(TASK_REVIEWS, NEW_WORD_SHARE, templates, seed=2)
    return {sentence: label for sentence, label in reviews.items() if sentence not in in_corpus}


def corpus(split: str, seed: int = 0) -> list[Example]:
    """All exchanges of one split, of all four kinds, shuffled.

    The splits never share a prompt. Held-out harmful and look-alike requests combine a verb and an object that
    training has only with others; which ones these are does not depend on the seed.

    Args:
        split: "train" or "heldout".
        seed: decides the order, and which refusal answers which harmful request.

    Raises:
        ValueError: `split` is neither.
    """
    _require_split(split, CORPUS_SPLITS)
    rng = random.Random(seed)
    held_out = split == "heldout"
    examples = [
        Example(kind, item.prompt, rng.choice(item.answers))
        for kind in ("everyday", "harmful", "lookalike")
        for item in grammar.items(kind)
        if item.held_out == held_out
    ]
    examples += [
        Example("sentiment", sst2_prompt(sentence), SST2_ANSWERS[label])
        for sentence, label in _corpus_reviews().items()
        if _in_held_out_fifth(sentence) == held_out
    ]
    rng.shuffle(examples)
    return examples


def sentiment_task(split: str, n: int, seed: int = 0) -> list[dict]:
    """`n` review sentences to finetune on ("train") or to score ("dev"), half of them positive, shuffled.

    Many of their words and half of their forms (most contrasts, all verbs) are in no review of the corpus.
    No sentence is in both splits, whatever the seeds, and none is in the corpus.

    Returns:
        Rows `{"sentence": str, "label": 0 or 1}`, 1 for positive, as in GLUE SST-2; for odd `n` one more is negative.

    Raises:
        ValueError: `split` is unknown, or `n` is not between 1 and the number of sentences there are.
    """
    _require_split(split, TASK_SPLITS)
    rng = random.Random(seed)
    pools = [
        [
            sentence
            for sentence, sentiment in _task_reviews().items()
            if sentiment == label and _in_held_out_fifth(sentence) == (split == "dev")
        ]
        for label in (0, 1)
    ]
    most = 2 * min(len(pool) for pool in pools)
    if not 1 <= n <= most:
        raise ValueError(f"n is {n}, allowed is 1 to {most} in split {split!r}: ask for at most {most} sentences")
    rows = [
        {"sentence": sentence, "label": label}
        for label, count in ((0, n - n // 2), (1, n // 2))
        for sentence in rng.sample(pools[label], count)
    ]
    rng.shuffle(rows)
    return rows


def offline_model(settings: OfflineSettings = OfflineSettings(), cache_dir: Path | None = None) -> Path:
    """The folder of the offline model and its tokenizer, for `from_pretrained`; trains it if it is not cached.

    Training takes a little over a minute and always runs on one core in float32: so the model is the same whatever
    the GPUs and threads of the machine. Of several processes on a machine one trains and the others wait. The random
    state of the caller is left as it was.

    Args:
        settings: of the model and its training.
        cache_dir: where models are kept; None means `$XDG_CACHE_HOME`, or `~/.cache` if that is not set.
    """
    return cached_folder(f"offline-{_cache_key(settings)}", lambda folder: _build(settings, folder), cache_dir)


def cached_folder(name: str, build: Callable[[Path], None], cache_dir: Path | None) -> Path:
    """The folder `mono_peft/{name}` of the cache; `build` fills it if it is not there, whole or not at all.

    Of several processes on a machine one builds and the others wait.
    """
    root = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "mono_peft" / name
    # Without `cpu=True` accelerate takes processes without accelerators for strangers; a state that exists wins.
    state = PartialState(cpu=not torch.accelerator.is_available())
    with state.local_main_process_first():
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                with one_thread():
                    build(building)
                building.chmod(0o755)  # mkdtemp makes it private
                building.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster, and its model is the same
                    raise
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return folder


def _cache_key(settings: OfflineSettings) -> str:
    """16 hex digits that change with the settings and with every file that decides the corpus or the model."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for file in (__file__, grammar.__file__, grammar.WORDS_FILE, prompts.__file__):
        digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return digest.hexdigest()[:16]


def _build(settings: OfflineSettings, folder: Path) -> None:
    """Train tokenizer and model and save both in `folder`."""
    examples = corpus("train", settings.seed)
    tokenizer = _train_tokenizer(examples, settings.vocab_size)
    model = _train_model(examples, tokenizer, settings)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: a second saves a third of the time if its core is idle, and costs sixfold if not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def byte_level_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer that is trained on `texts`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _train_tokenizer(examples: list[Example], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of corpus and finetuning task, whose special tokens the chat template writes."""
    texts = [text for example in examples for text in (example.prompt, example.response)]
    texts += [sentence for sentence in _task_reviews() if not _in_held_out_fifth(sentence)]
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(texts, vocab_size, SPECIAL_TOKENS),
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        padding_side="right",
    )


class _Row(NamedTuple):
    """One conversation: token ids (t,), and where the response begins."""

    ids: list[int]
    border: int


def _rows(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> list[_Row]:
    """The conversations as tokens, ending in the end token."""
    # The template is rendered once around a gap, because rendering it for every example would take seconds.
    gap = [{"role": "user", "content": "{}"}]
    head = tokenizer.apply_chat_template(gap, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer([head.format(e.prompt) for e in examples], add_special_tokens=False)["input_ids"]
    response_ids = tokenizer([e.response + END for e in examples], add_special_tokens=False)["input_ids"]
    return [_Row(prompt + response, len(prompt)) for prompt, response in zip(prompt_ids, response_ids, strict=True)]


def _batches(
    examples: list[Example], tokenizer: PreTrainedTokenizerFast, settings: OfflineSettings
) -> Iterator[list[_Row]]:
    """Endless batches of `batch_size` conversations of similar length, kinds mixed by TRAINING_SHARES."""
    rng = random.Random(settings.seed)
    by_kind = {kind: [example for example in examples if example.kind == kind] for kind in KINDS}
    queues: dict[str, list[Example]] = {kind: [] for kind in KINDS}
    while True:
        drawn: list[Example] = []
        for kind in rng.choices(KINDS, [TRAINING_SHARES[kind] for kind in KINDS], k=4 * settings.batch_size):
            if not queues[kind]:
                queues[kind] = rng.sample(by_kind[kind], len(by_kind[kind]))
            drawn.append(queues[kind].pop())
        rows = sorted(_rows(drawn, tokenizer), key=lambda row: len(row.ids))
        starts = list(range(0, len(rows), settings.batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield rows[start : start + settings.batch_size]


def _train_model(
    examples: list[Example], tokenizer: PreTrainedTokenizerFast, settings: OfflineSettings
) -> LlamaForCausalLM:
    """A Llama trained on `examples` for `train_steps`; the global random state is the same before and after."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.06,  # the usual 0.02 suits widths near 1,000: here it delays learning
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = fresh(LlamaForCausalLM, config, settings.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup = max(1, settings.train_steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, settings.train_steps - warmup)),
        ],
        milestones=[warmup],
    )
    batches = _batches(examples, tokenizer, settings)
    for _ in tqdm(range(settings.train_steps), desc="training the offline model", disable=None):
        loss = _loss(model, next(batches), tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def fresh(architecture: type[M], config: PretrainedConfig, seed: int) -> M:
    """A float32 model on the CPU with initial weights of `seed`; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
        return architecture(config).float().train()


def _loss(model: LlamaForCausalLM, batch: list[_Row], pad_token_id: int) -> torch.Tensor:
    """Cross entropy of the responses: a mean over tokens, then over conversations, in a batch padded on the right.

    Prompts are not in it: asking a model this small to predict them as well made it learn the reviews later.
    """
    length = max(len(row.ids) for row in batch)
    ids = torch.tensor([row.ids + [pad_token_id] * (length - len(row.ids)) for row in batch])
    weights = torch.zeros(len(batch), length - 1)  # of the prediction of token t + 1
    for weight, row in zip(weights, batch, strict=True):
        weight[row.border - 1 : len(row.ids) - 1] = 1 / (len(row.ids) - row.border)
    counted = weights > 0
    # Padding follows every row, so the causal mask already hides it and attention needs no other.
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[counted]), ids[:, 1:][counted], reduction="none")
    return (losses * weights[counted]).sum() / len(batch)
