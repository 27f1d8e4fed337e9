"""Shared by all tests: no hub, no GPU, a temporary cache, and models small enough to build in milliseconds."""

import gc
import importlib.util
import json
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vision_bench.runs import read_rows

# `make test-vllm` has an environment for these.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["vllm_plugin"]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ ' ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_configure(config):
    """Hide the machine's GPUs, but from `pytest -m gpu`: references of the other tests are computed on the CPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish(session):
    """Leave what is imported out of all collections of garbage: accelerate asks for one after each training."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    gc.unfreeze()


def rows_of(rows, metric, **arm):
    """The rows of a metric (None: of all) whose seed and configuration have these values."""
    return [
        row
        for row in rows
        if metric in (None, row["metric"])
        and all((row["seed"] if name == "seed" else row["config"].get(name)) == v for name, v in arm.items())
    ]


def rows(folder, metric=None, **arm):
    """The rows of a run's folder, of a metric (None: of all) and with these values in seed and configuration."""

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    lines = (folder / "results.jsonl").read_text(encoding="utf-8").split("\n")
    return rows_of([json.loads(line, parse_constant=refuse) for line in lines if line], metric, **arm)


def value(folder, metric, **arm):
    """The value of the one row that `rows` finds."""
    (row,) = rows(folder, metric, **arm)
    return row["value"]


def results(folder):
    """Every row of a run's folder but for when and where it was measured, to be compared."""
    left_out = ("seconds", "time", "device", "commit")
    rows = read_rows(folder / "results.jsonl")
    return sorted(json.dumps({k: v for k, v in row.items() if k not in left_out}, sort_keys=True) for row in rows)


@pytest.fixture
def llama():
    """A Llama with 2 layers and 32 dimensions; the same weights in every test."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


@pytest.fixture
def gpt2():
    """A GPT-2, whose layers are transformers' Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def input_ids():
    return torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def make_tokenizer():
    """A function that builds a byte-level tokenizer of 400 tokens, with or without a chat template."""

    def make(chat=False):
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(["Sentiment: positive", "Sentiment: negative", "a sentence about films"] * 3, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")
        tokenizer.chat_template = CHAT_TEMPLATE if chat else None
        return tokenizer

    return make


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium on this machine")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=quiet)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """A function that opens files in the browser, which must say nothing and ask for nothing but these files."""
    said, asked, files = [], [], []

    def open_(path, width=1400):
        page = chromium.new_page(viewport={"width": width, "height": 800})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        files.append(path.as_uri())
        page.goto(files[-1])
        return page

    yield open_
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == set(files)


@pytest.fixture
def small_model(tmp_path, make_tokenizer):
    """The folder of a Llama with two layers and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    make_tokenizer(chat=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sentiment_files(tmp_path):
    """Two tsv files of sentences with a sentiment, as --train_file and --eval_file."""
    good, bad = ("fine", "great", "warm", "bright"), ("dull", "weak", "cold", "grim")
    paths = []
    for name, nouns in (("train", ("film", "book", "play", "song", "tale", "show")), ("dev", ("dance", "work"))):
        rows = [
            f"a {word} {noun}\t{label}" for noun in nouns for label, words in ((0, bad), (1, good)) for word in words
        ]
        paths.append(tmp_path / f"{name}.tsv")
        paths[-1].write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    return ["--train_file", str(paths[0]), "--eval_file", str(paths[1])]
