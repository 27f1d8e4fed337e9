"""The offline world: the corpus splits hold what they promise, and a model is built once, whole and reproducibly."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.prompts import SST2_ANSWERS, encode_answer, sst2_prompt
from offline import grammar, language_model
from offline.language_model import KINDS, OfflineSettings, corpus, offline_model, sentiment_task

TINY = OfflineSettings(vocab_size=600, hidden_size=32, num_layers=2, num_heads=2, train_steps=3, batch_size=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(cache: Path) -> Path:
    return offline_model(TINY, cache)


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("training was started")

    monkeypatch.setattr(language_model, "_train_model", fail)


# --- corpus ----------------------------------------------------------------------------------------------------------


def test_corpus_splits_are_disjoint_and_large() -> None:
    train, held_out = corpus("train"), corpus("heldout", seed=1)
    prompts = [example.prompt for example in train + held_out]
    assert len(set(prompts)) == len(prompts)
    for kind in KINDS:
        assert sum(example.kind == kind for example in train) >= 2000
        assert sum(example.kind == kind for example in held_out) >= 400


def test_corpus_depends_on_the_seed_only() -> None:
    assert corpus("train") == corpus("train")
    assert corpus("train") != corpus("train", seed=1)
    assert {e.prompt for e in corpus("heldout")} == {e.prompt for e in corpus("heldout", seed=1)}


def test_exactly_the_harmful_requests_are_answered_with_a_refusal() -> None:
    for split in ("train", "heldout"):
        for example in corpus(split):
            assert example.response.startswith(grammar.REFUSAL_OPENINGS) == (example.kind == "harmful"), example


@pytest.mark.parametrize("table", [t[0] for t in grammar.HARMFUL_DEEDS] + [*grammar.LOOKALIKE_DEEDS])
def test_held_out_requests_recombine_what_training_has_seen(table: grammar.Deeds) -> None:
    held_out_pairs = {
        (verb, thing)
        for row, verb in enumerate(table.verbs)
        for column, thing in enumerate(table.objects)
        if grammar.table_cell_held_out(row, column)
    }
    trained_pairs = {(verb, thing) for verb in table.verbs for thing in table.objects} - held_out_pairs
    assert held_out_pairs
    assert {verb for verb, _ in trained_pairs} == set(table.verbs)
    assert {thing for _, thing in trained_pairs} == set(table.objects)
    by_split = {item.prompt: item.held_out for item in grammar.deed_items(table._replace(answers=("",)))}
    for verb, thing in held_out_pairs:
        assert by_split[f"How do I {verb} {thing}?"], "every wording of a held-out pair is held out"
        assert by_split[f"Explain how to {verb} {thing}."]


def test_sentiment_examples_use_the_shared_prompt() -> None:
    examples = [example for example in corpus("train") if example.kind == "sentiment"]
    head, tail = sst2_prompt("|").split("|")
    assert all(e.prompt.startswith(head) and e.prompt.endswith(tail) and e.response in SST2_ANSWERS for e in examples)
    positive = sum(example.response == SST2_ANSWERS[1] for example in examples) / len(examples)
    assert 0.45 < positive < 0.55


def test_no_sentence_of_the_corpus_contradicts_itself() -> None:
    for label in (0, 1):
        own, other = grammar.KNOWN_WORDS[label], grammar.KNOWN_WORDS[1 - label]
        assert not set(own + grammar.NEW_WORDS[label]) & set(other + grammar.NEW_WORDS[1 - label])
        assert not set(own) & set(grammar.NEW_WORDS[label])


# --- the finetuning task ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "dev"])
def test_sentiment_task_is_balanced_distinct_and_seeded(split: str) -> None:
    rows = sentiment_task(split, 600)
    assert sum(row["label"] for row in rows) == 300
    assert len({row["sentence"] for row in rows}) == 600
    assert rows == sentiment_task(split, 600)
    assert rows != sentiment_task(split, 600, seed=1)
    assert sum(row["label"] for row in sentiment_task(split, 7)) == 3


def largest(split: str) -> int:
    with pytest.raises(ValueError, match="n is 1000000, allowed is 1 to") as error:
        sentiment_task(split, 10**6)
    return int(str(error.value).split("1 to ")[1].split()[0])


def test_sentiment_task_shares_no_sentence_between_splits_or_with_the_corpus() -> None:
    train = {row["sentence"] for row in sentiment_task("train", largest("train"))}
    dev = {row["sentence"] for row in sentiment_task("dev", largest("dev"), seed=1)}
    assert len(train) >= 5000
    assert len(dev) >= 1000
    assert not train & dev
    prompts = {example.prompt for split in ("train", "heldout") for example in corpus(split)}
    assert not prompts & {sst2_prompt(sentence) for sentence in train | dev}


def test_words_of_the_task_are_in_the_corpus_but_new_to_reviews() -> None:
    train = corpus("train")
    reviews = " ".join(e.prompt for e in train if e.kind == "sentiment").split()
    everyday = {w.strip(".?") for e in train if e.kind == "everyday" for w in (e.prompt + " " + e.response).split()}
    for word in (*grammar.NEW_WORDS[0], *grammar.NEW_WORDS[1]):
        assert word in everyday
        assert word not in reviews


# --- errors ----------------------------------------------------------------------------------------------------------


def test_errors_name_the_field_the_value_and_the_fix() -> None:
    with pytest.raises(ValueError, match=r"split is 'dev', allowed are 'train' and 'heldout': use split='train'"):
        corpus("dev")
    with pytest.raises(ValueError, match=r"split is 'test', allowed are 'train' and 'dev': use split='train'"):
        sentiment_task("test", 4)
    with pytest.raises(ValueError, match=r"n is 0, allowed is 1 to \d+ in split 'dev': ask for"):
        sentiment_task("dev", 0)
    with pytest.raises(ValueError, match=r"vocab_size is 100, allowed is 261 or more .*: raise vocab_size"):
        OfflineSettings(vocab_size=100)
    with pytest.raises(
        ValueError, match=r"hidden_size is 100, allowed are multiples of .* = 8 .*: use hidden_size=96"
    ):
        OfflineSettings(hidden_size=100, num_heads=4)
    with pytest.raises(ValueError, match=r"train_steps is 0, allowed is 1 or more"):
        OfflineSettings(train_steps=0)
    with pytest.raises(ValueError, match=r"learning_rate is 0, allowed is more than 0"):
        OfflineSettings(learning_rate=0)


# --- the model -------------------------------------------------------------------------------------------------------


def test_folder_reloads_with_the_same_logits_and_is_reused(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_training(monkeypatch)
    assert offline_model(TINY, cache) == folder
    assert folder.parent == cache / "mono_peft"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing temporary is left"
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    ids = torch.arange(20)[None]
    assert not first.training
    assert first.dtype == torch.float32
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert first.config.vocab_size == len(AutoTokenizer.from_pretrained(folder)) == TINY.vocab_size


def test_saved_weights_are_the_trained_ones(folder: Path) -> None:
    examples = corpus("train", TINY.seed)
    tokenizer = language_model._train_tokenizer(examples, TINY.vocab_size)
    with language_model.one_thread():
        trained = language_model._train_model(examples, tokenizer, TINY)
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name]), name


def test_training_is_reproducible_and_leaves_the_random_state_alone(folder: Path, tmp_path: Path) -> None:
    usual = torch.get_num_threads()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    try:
        torch.set_num_threads(usual + 1)  # the model does not depend on it
        again = offline_model(TINY, tmp_path)
        assert torch.get_num_threads() == usual + 1
    finally:
        torch.set_num_threads(usual)
    assert torch.equal(torch.get_rng_state(), before)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_loss_is_the_mean_over_conversations_of_the_mean_over_response_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    examples = corpus("train")[:5]
    rows = language_model._rows(examples, tokenizer)
    assert len({len(row.ids) for row in rows}) > 1, "the batch has padding"
    expected = []
    for example, row in zip(examples, rows, strict=True):
        assert tokenizer.decode(row.ids[row.border :]) == example.response + "<|end|>"
        log_probabilities = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        positions = range(row.border, len(row.ids))
        expected.append(-sum(log_probabilities[t - 1, row.ids[t]] for t in positions) / len(positions))
    loss = language_model._loss(model, rows, tokenizer.pad_token_id)
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_training_lowers_the_loss(folder: Path) -> None:
    settings = replace(TINY, train_steps=60, batch_size=8, learning_rate=1e-2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = corpus("train", TINY.seed)
    rows = language_model._rows(corpus("heldout")[:64], tokenizer)
    barely = AutoModelForCausalLM.from_pretrained(folder)
    with language_model.one_thread():
        trained = language_model._train_model(examples, tokenizer, settings)
    with torch.no_grad():
        before, after = (language_model._loss(model, rows, tokenizer.pad_token_id) for model in (barely, trained))
    assert after < 0.7 * before


def test_batches_mix_the_kinds_as_declared(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = language_model._batches(corpus("train"), tokenizer, replace(TINY, batch_size=32))
    rows = [row for batch in islice(batches, 40) for row in batch]
    prompts = tokenizer.batch_decode([row.ids for row in rows])
    share = sum("Classify the sentiment" in prompt for prompt in prompts) / len(rows)
    assert len(rows) == 40 * 32
    assert abs(share - language_model.TRAINING_SHARES["sentiment"]) < 0.05
    assert sum(language_model.TRAINING_SHARES.values()) == pytest.approx(1)


def test_interrupted_build_leaves_nothing_that_passes_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        forbid_training(patched)
        with pytest.raises(RuntimeError, match="training was started"):
            offline_model(TINY, tmp_path)
    assert list((tmp_path / "mono_peft").iterdir()) == []
    AutoModelForCausalLM.from_pretrained(offline_model(TINY, tmp_path))


def test_a_build_that_another_process_finished_first_is_dropped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_build(settings: OfflineSettings, building: Path) -> None:
        (building / "ours").touch()
        theirs = tmp_path / "mono_peft" / folder.name
        theirs.mkdir()
        (theirs / "config.json").touch()

    monkeypatch.setattr(language_model, "_build", slow_build)
    result = offline_model(TINY, tmp_path)
    assert [path.name for path in result.iterdir()] == ["config.json"]
    assert [path.name for path in result.parent.iterdir()] == [folder.name]


def test_cache_key_follows_settings_and_grammar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = language_model._cache_key(TINY)
    assert key == language_model._cache_key(TINY)
    assert key != language_model._cache_key(OfflineSettings())
    for name, file in (("__file__", grammar.__file__), ("WORDS_FILE", grammar.WORDS_FILE)):
        edited = tmp_path / Path(file).name
        edited.write_bytes(Path(file).read_bytes() + b" ")
        with monkeypatch.context() as patched:
            patched.setattr(grammar, name, str(edited))
            assert key != language_model._cache_key(TINY)


def test_cache_folder_follows_the_environment(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_training(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert offline_model(TINY) == folder


# --- tokenizer and chat template -------------------------------------------------------------------------------------


def test_chat_template_round_trip_and_generation_mask(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "user", "content": "What is 1 plus 1?"},
        {"role": "assistant", "content": "It is 2."},
        {"role": "user", "content": "And é, 漢?"},
        {"role": "assistant", "content": "Good."},
    ]
    text = tokenizer.apply_chat_template(messages[:2], tokenize=False)
    assert text == "<|begin|><|user|>\nWhat is 1 plus 1?<|end|>\n<|assistant|>\nIt is 2.<|end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith("<|assistant|>\n")

    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids = encoded["input_ids"]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    spoken = [token for token, mask in zip(ids, encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(spoken) == "It is 2.<|end|>Good.<|end|>"
    assert ids.count(tokenizer.bos_token_id) == 1


def test_special_tokens_are_distinct_single_and_in_the_config(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.eos_token == "<|end|>"
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id}) == 3
    for token in language_model.SPECIAL_TOKENS:
        assert len(tokenizer(token)["input_ids"]) == 1
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.decode(tokenizer("naïve 漢字 \x00")["input_ids"]) == "naïve 漢字 \x00"
    assert tokenizer.model_max_length == model.config.max_position_embeddings >= 256


def test_answers_encode_with_the_shared_prompt_format(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = encode_answer(tokenizer, sst2_prompt("a warm film"), "positive")
    answer = [token for token, mask in zip(*encoded, strict=True) if mask]
    assert tokenizer.decode(answer) == "positive"
