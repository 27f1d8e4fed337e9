"""Tokens with the same text up to them are cached once, where that is known to make their inputs the same."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_bases import bert, gpt2, gpt_oss, llama, mixtral
from transformers import BertConfig, BertLMHeadModel, MistralConfig, MistralForCausalLM, T5Config, T5EncoderModel

from mono_peft import Silence
from mono_peft.prefixes import is_causal
from mono_peft.silent_inputs import draw_tokens

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MODEL = llama()


def mistral():
    """Tokens see the three before them only."""
    return MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=3))


def bert_decoder():
    return BertLMHeadModel(BertConfig(**SMALL, is_decoder=True))


def t5_encoder():
    return T5EncoderModel(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def two_sided_llama():
    model = llama()
    model.config.is_causal = False
    return model


def rotary_llama(kind, **parameters):
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0} | parameters
    return llama(max_position_embeddings=8, rope_parameters=parameters)


def rows_of_layers(model, ids):
    """The input of each linear layer of the body, (batch, tokens, in)."""
    found, handles = [], []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layer" in name:
            handles.append(module.register_forward_pre_hook(lambda m, args: found.append(args[0])))
    with torch.no_grad():
        model.eval()(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "base",
    [
        llama,
        gpt2,
        mistral,
        bert_decoder,
        bert,
        t5_encoder,
        two_sided_llama,
        partial(rotary_llama, "yarn"),
        partial(rotary_llama, "dynamic"),
        partial(
            rotary_llama,
            "longrope",
            short_factor=[1.0] * 4,
            long_factor=[2.0, 3.0, 4.0, 5.0],
            original_max_position_embeddings=8,
        ),
    ],
)
def test_a_model_is_causal_where_later_tokens_change_nothing(base):
    torch.manual_seed(0)
    model = base()
    ids = torch.randint(3, 50, (2, 16))
    ids[1, :5] = ids[0, :5]
    together = rows_of_layers(model, ids)
    alone = rows_of_layers(model, ids[:1, :5])
    same = all(
        torch.allclose(rows[0, :5], rows[1, :5], atol=1e-5) and torch.allclose(rows[0, :5], other[0], atol=1e-5)
        for rows, other in zip(together, alone, strict=True)
    )
    assert is_causal(model) == same


@pytest.mark.parametrize("base", [mixtral, gpt_oss])
def test_mixtures_of_experts_are_causal(base):
    assert is_causal(base())


def padded(texts, side, silent=True):
    """A batch of texts, as lists of tokens, with masks by whether each token counts."""
    length = max(len(text) for text, _ in texts)
    ids, attended, counts = torch.zeros(3, len(texts), length, dtype=torch.int64)
    for row, (text, counted) in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(length - len(text), length)
        ids[row, where] = torch.tensor(text)
        attended[row, where] = 1
        counts[row, where] = torch.tensor(counted)
    return {"input_ids": ids, "attention_mask": attended} | ({"silent_mask": counts} if silent else {})


def prefixes(tokens):
    """Of all drawn tokens, as tuples."""
    found = []
    for batch, positions, _ in tokens:
        for position in positions.tolist():
            row, place = divmod(position, batch["input_ids"].shape[1])
            kept = batch["attention_mask"][row, : place + 1].bool()
            found.append(tuple(batch["input_ids"][row, : place + 1][kept].tolist()))
    return found


texts_with_marks = st.lists(
    st.lists(st.tuples(st.integers(3, 5), st.booleans()), min_size=1, max_size=6).map(
        lambda pairs: tuple(zip(*pairs, strict=True))
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), texts=texts_with_marks, side=st.sampled_from(["left", "right"]))
def test_the_draw_is_one_of_distinct_prefixes(data, texts, side):
    expected = {text[: i + 1] for text, counts in texts for i, count in enumerate(counts) if count}
    if not expected:
        texts.append(((3,), (True,)))
        expected = {(3,)}
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=len(texts), max_size=len(texts)))
    budget, seed = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 2**31 - 1))
    batches, start = [], 0
    for size in sizes:
        if texts[start:][:size]:
            batches.append(padded(texts[start:][:size], side))
        start += size
    tokens, total = draw_tokens(MODEL, batches, budget, seed)
    found = prefixes(tokens)
    assert len(found) == len(set(found)) == min(budget, len(expected))
    assert set(found) <= expected
    if len(expected) <= budget:
        assert total == len(expected)
    else:
        assert total > budget
    # Where all are drawn, the order of the texts, their batches and their padding do not matter, nor how often each is
    # there; and how many distinct ones there are never depends on these.
    shuffled = data.draw(st.permutations(texts)) + texts[:3]
    again, same_total = draw_tokens(MODEL, (padded([text], "right") for text in shuffled), budget, seed)
    assert same_total == total
    if len(expected) <= budget:
        assert set(prefixes(again)) == expected


@pytest.fixture
def model(random_adapter):
    torch.manual_seed(0)
    return random_adapter(llama(), target_modules="all-linear")


SHARED = list(range(10, 35))
ENDS = torch.randint(3, 50, (20, 6), generator=torch.Generator().manual_seed(0)).tolist()


def all_count(texts):
    return [(text, [True] * len(text)) for text in texts]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_shared_beginning_takes_its_room_once(model, side):
    whole = [
        padded(all_count([SHARED + end for end in ENDS[i : i + 5]] + [SHARED]), side, False) for i in (0, 5, 10, 15)
    ]
    apart = [padded(all_count([SHARED]), side, False)]
    apart += [padded([(SHARED + end, 25 * [False] + 6 * [True])], side) for end in ENDS]
    distinct = 25 + len({tuple(end[: i + 1]) for end in ENDS for i in range(6)})
    silence = Silence(model, whole, rows_per_module=distinct)
    assert silence.silent_tokens == distinct < 25 + 20 * 6
    other = Silence(model, apart, rows_per_module=1000)
    assert silence.cached_bytes == other.cached_bytes == distinct * 2 * (3 * 16 + 32) * 4
    assert silence.fired_by_module() == pytest.approx(other.fired_by_module())


@pytest.mark.parametrize("seed", range(5))
def test_what_all_texts_begin_with_is_drawn_where_not_all_tokens_are(model, seed):
    """No text is silent without it, and each of its tokens is one of very many distinct ones."""
    ends = torch.randint(3, 50, (300, 20), generator=torch.Generator().manual_seed(seed)).tolist()
    batches = [padded(all_count([SHARED + end for end in ends[i : i + 10]]), "right") for i in range(0, 300, 10)]
    tokens, total = draw_tokens(model, batches, 600, seed)
    drawn = prefixes(tokens)
    assert len(drawn) == len(set(drawn)) == 600 < total / 9
    assert {tuple(SHARED[: i + 1]) for i in range(25)} <= set(drawn)
    lengths = [len(prefix) for prefix in drawn if len(prefix) > 27]  # of one text each: as often early as late in it
    assert 0.4 < sum(length > 36 for length in lengths) / len(lengths) < 0.62


def test_a_text_weighs_as_often_as_it_is_there(model):
    texts = [[3, 4, 5], [3, 4, 6], [3, 4, 5], [7, 8, 9]]
    weighed = Silence(model, [padded(all_count([text]), "right", False) for text in texts], rows_per_step=100)
    assert weighed.silent_tokens == 7
    # With a key more, which the model knows and does not need, all twelve tokens are kept.
    ids = torch.tensor(texts)
    whole = Silence(model, [{"input_ids": ids, "position_ids": torch.arange(3).expand(4, 3)}], rows_per_step=100)
    assert whole.silent_tokens == 12
    for silence in (weighed, whole):
        silence.add_gradients(0)
    assert weighed.loss == pytest.approx(whole.loss, rel=1e-5)
    assert weighed.fired == pytest.approx(whole.fired, rel=1e-5)


def test_the_number_of_more_tokens_than_are_drawn_is_estimated(model):
    ids = torch.randint(3, 50, (400, 30), generator=torch.Generator().manual_seed(0))
    distinct = len({tuple(row[: i + 1]) for row in ids.tolist() for i in range(30)})
    for seed in range(5):
        tokens, total = draw_tokens(model, [{"input_ids": part} for part in ids.split(16)], 1000, seed)
        assert sum(len(batch.positions) for batch in tokens) == 1000
        assert abs(total / distinct - 1) < 4 / 4096**0.5


def test_the_draw_follows_from_the_seed(model):
    ids = torch.randint(3, 50, (40, 30), generator=torch.Generator().manual_seed(0))

    def drawn(seed):
        return [batch.positions.tolist() for batch in draw_tokens(model, [{"input_ids": ids}], 100, seed)[0]]

    assert drawn(0) == drawn(0) != drawn(1)


def test_a_gap_inside_of_a_text_is_a_part_of_it(model):
    ids = torch.tensor([[3, 4, 5], [3, 9, 5], [3, 5, 0]])
    gaps = {"input_ids": ids, "attention_mask": torch.tensor([[1, 0, 1], [1, 0, 1], [1, 1, 0]])}
    tokens, total = draw_tokens(model, [gaps], 10, 0)
    assert total == 3  # 3; 3, a gap, 5; 3, 5
    assert [batch.positions.tolist() for batch in tokens] == [[0, 2, 7]]


@pytest.mark.parametrize("key", ["position_ids", "token_type_ids", "labels"])
def test_batches_with_other_keys_have_all_their_tokens_drawn(model, key):
    ids = torch.tensor([[3, 4], [3, 4]])
    assert draw_tokens(model, [{"input_ids": ids, key: torch.zeros_like(ids)}], 10, 0)[1] == 4
    tokens, total = draw_tokens(model, [{"input_ids": ids}, {"input_ids": ids, key: torch.zeros_like(ids)}], 10, 0)
    assert total == 6
    assert [len(batch.positions) for batch in tokens] == [2, 4]


def test_encoders_have_all_their_tokens_drawn(random_adapter):
    model = random_adapter(bert(), task_type="SEQ_CLS", target_modules=["query"])
    ids = torch.tensor([[3, 4, 5], [3, 4, 6]])
    silence = Silence(model, [{"input_ids": ids}, {"input_ids": ids}])
    assert silence.silent_tokens == 12
    assert silence.cached_bytes == 2 * 12 * 16 * 4
    tokens, total = draw_tokens(model, [{"input_ids": ids}, {"input_ids": ids}], 5, 0)
    assert (total, sum(len(batch.positions) for batch in tokens)) == (12, 5)
