"""Activated adapters: the base before their invocation tokens, the adapter from them on."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, set_seed

from mono_peft import MonoLoraConfig, MonoLoraLayer, activation_sparsity

INVOCATION, OTHER = [7, 8], [9]
# Padded on the left as generate wants it; the tokens occur twice, once, also at the end, and never.
IDS = torch.tensor(
    [
        [3, 7, 8, 4, 5, 7, 8, 6, 10, 11],
        [0, 0, 5, 7, 8, 12, 13, 14, 15, 16],
        [7, 8, 9, 6, 5, 4, 3, 3, 7, 8],
        [3, 4, 8, 7, 5, 4, 3, 7, 9, 8],
    ]
)
MASK = (IDS != 0).long()
STARTS = [5, 3, 8, 10]


@pytest.fixture
def llama():
    set_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def options(tokens=INVOCATION, **more):
    alora = {} if tokens is None else {"alora_invocation_tokens": tokens}
    return {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]} | alora | more


def adapted(base, tokens=INVOCATION, name="default", **more):
    torch.manual_seed(1)
    config = MonoLoraConfig(init_weights=False, **options(tokens, **more))
    return get_peft_model(copy.deepcopy(base), config, adapter_name=name).eval()


def with_adapters(base):
    """Two activated adapters, of one token more and less, and a plain one."""
    model = adapted(base, name="first")
    model.add_adapter("second", MonoLoraConfig(init_weights=False, **options(OTHER)))
    model.add_adapter("plain", MonoLoraConfig(init_weights=False, **options(None)))
    return model.eval()


def slow_logits(base, plain, ids, start):
    """Of one row without padding: the base's cache of what is before, and the plain adapter on what follows."""
    cache = DynamicCache(config=base.config)
    before = base(ids[None, :start], past_key_values=cache, use_cache=True).logits[0] if start else None
    if start == len(ids):
        return before
    after = plain(ids[None, start:], past_key_values=cache if start else None, use_cache=True).logits[0]
    return after if before is None else torch.cat([before, after])


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "softplus"])
@torch.no_grad()
def test_it_is_the_plain_adapter_on_the_cache_of_the_base(llama, activation):
    model = adapted(llama, activation=activation)
    plain = adapted(llama, None, activation=activation)
    result = model(IDS, attention_mask=MASK).logits
    base = llama(IDS, attention_mask=MASK).logits
    for i, start in enumerate(STARTS):
        row, real = IDS[i], MASK[i].bool()
        skipped = int((~real).sum())
        expected = slow_logits(llama, plain, row[real], start - skipped)
        torch.testing.assert_close(result[i][real], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(result[i, :start], base[i, :start])  # bit for bit
        if start < len(row):
            assert not torch.allclose(result[i, start], base[i, start], atol=1e-3)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_the_identity_equals_activated_lora(llama, checkpointing):
    torch.manual_seed(1)
    lora = get_peft_model(copy.deepcopy(llama), LoraConfig(init_lora_weights=False, **options()))
    mono = adapted(llama, activation="identity")
    weights = lora.state_dict()
    mono.load_state_dict(
        {n.replace("lora_A", "monolora_encoder").replace("lora_B", "monolora_decoder"): w for n, w in weights.items()}
    )
    if checkpointing is not None:  # of ours only: PEFT's hooks do not reach the second computation
        mono.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        mono.enable_input_require_grads()
    labels = IDS.masked_fill(MASK == 0, -100)
    outputs = []
    for model in (lora, mono):
        model.train()
        for order in ([3, 2, 1, 0], [0, 1, 2, 3]):  # two steps with the invocations at other places
            loss = model(IDS[order], attention_mask=MASK[order], labels=labels[order]).loss
            loss.backward()
        outputs.append((loss, [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(outputs[1][0], outputs[0][0])
    assert len(outputs[0][1]) == 2 * 2 * 3
    for theirs, ours in zip(outputs[0][1], outputs[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_checkpointing_refuses_what_it_cannot_tell(llama):
    model = adapted(llama)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    first = model(IDS, labels=IDS).loss
    second = model(IDS.flip(0), labels=IDS.flip(0)).loss
    with pytest.raises(RuntimeError, match="there were several since the last backward pass"):
        (first + second).backward()
    model(IDS, labels=IDS).loss.backward()


WAYS = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "chunks": {"prefill_chunk_size": 3},
    "looked up": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_generating_equals_passes_without_a_cache(llama, way):
    model = adapted(llama)
    for rows in [[0], [1], [2], [3]] if way == "looked up" else [[0, 1, 2, 3]]:
        ids, mask = IDS[rows], MASK[rows]
        result = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **WAYS[way])
        lengths = [IDS.shape[1] - STARTS[i] for i in rows]
        for step in range(8):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            offsets = [length + step if length else 0 for length in lengths]
            logits = model(ids, attention_mask=mask, position_ids=positions, alora_offsets=offsets).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        assert torch.equal(result, ids)
        base = llama.generate(input_ids=IDS[rows], attention_mask=MASK[rows], max_new_tokens=8, do_sample=False)
        differing = (base != result).any(1)
        assert all(length == 0 for length, differs in zip(lengths, differing, strict=True) if not differs)


@torch.no_grad()
def test_generating_from_the_cache_of_the_base(llama):
    model = adapted(llama)
    ids = IDS[:1]
    cache = DynamicCache(config=llama.config)
    llama(ids[:, :5], past_key_values=cache, use_cache=True)
    settings = {"max_new_tokens": 6, "do_sample": False}
    result = model.generate(input_ids=ids, attention_mask=MASK[:1], past_key_values=cache, **settings)
    assert torch.equal(result, model.generate(input_ids=ids, attention_mask=MASK[:1], **settings))


@torch.no_grad()
def test_beams_are_searched_as_in_each_row_alone(llama):
    model = adapted(llama)
    settings = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    together = model.generate(input_ids=IDS, attention_mask=MASK, **settings).view(4, 2, -1)
    for i in range(4):
        real = MASK[i].bool()
        alone = model.generate(input_ids=IDS[i : i + 1, real], **settings)
        assert torch.equal(together[i, :, (~real).sum() :], alone)
    plain = adapted(llama, None).generate(input_ids=IDS, attention_mask=MASK, **settings).view(4, 2, -1)
    assert not torch.equal(together[1], plain[1])


@torch.no_grad()
def test_an_adapter_for_each_row(llama):
    model = with_adapters(llama)
    names = ["first", "plain", "second", "__base__"]
    settings = {"max_new_tokens": 4, "do_sample": False}
    result = model(IDS, attention_mask=MASK, adapter_names=names).logits
    generated = model.generate(input_ids=IDS, attention_mask=MASK, adapter_names=names, **settings)
    searched = model.generate(input_ids=IDS, attention_mask=MASK, adapter_names=names, num_beams=2, **settings)
    for i, name in enumerate(names):
        if name == "__base__":
            alone, other = llama, llama
        else:
            model.set_adapter(name)
            alone, other = model, llama
        torch.testing.assert_close(result[i], alone(IDS, attention_mask=MASK).logits[i], rtol=1e-4, atol=1e-5)
        assert torch.equal(generated[i], alone.generate(input_ids=IDS, attention_mask=MASK, **settings)[i])
        beams = alone.generate(input_ids=IDS, attention_mask=MASK, num_beams=2, **settings)
        assert torch.equal(searched[i], beams[i])
        assert (name == "__base__") == torch.allclose(result[i], other(IDS, attention_mask=MASK).logits[i], atol=1e-4)


@torch.no_grad()
def test_adapters_of_other_tokens_in_one_model(llama):
    model = with_adapters(llama)
    base = llama(IDS).logits
    model.set_adapter("second")
    second = model(IDS).logits
    assert torch.equal(second[2, :2], base[2, :2])
    assert not torch.allclose(second[2, 2], base[2, 2], atol=1e-3)
    assert torch.equal(second[0], base[0])
    model.set_adapter("first")
    model.base_model.set_adapter("second")  # PeftModel still thinks that the first one is active
    assert torch.equal(model(IDS).logits, second)
    model.base_model.set_adapter(["first", "second"])
    both = model(IDS).logits
    model.set_adapter("first")
    first = model(IDS).logits
    torch.testing.assert_close(both[2, :8], second[2, :8])
    torch.testing.assert_close(both[:2], first[:2])
    assert not torch.allclose(both[2, 8:], second[2, 8:], atol=1e-3)
    model.delete_adapter("first")
    model.set_adapter("second")
    assert torch.equal(model(IDS).logits, second)
    assert all(m.monolora_invocations.keys() == {"second"} for m in model.modules() if isinstance(m, MonoLoraLayer))


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(llama, tmp_path):
    model = adapted(llama)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    assert loaded.peft_config["default"].alora_invocation_tokens == INVOCATION
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    copied = copy.deepcopy(model)
    model(IDS.flip(0))
    assert torch.equal(copied(IDS).logits, model(IDS).logits)
    with model.disable_adapter():
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, llama(IDS).logits)


@torch.no_grad()
def test_embeddings_and_the_head(llama):
    model = adapted(llama, target_modules=["embed_tokens", "lm_head"])
    base, result = llama(IDS).logits, model(IDS).logits
    for i, start in enumerate(STARTS):
        assert torch.equal(result[i, :start], base[i, :start])
        assert (result[i, start:] != base[i, start:]).any(-1).all()
    torch.testing.assert_close(model(IDS, logits_to_keep=3).logits, result[:, -3:])


def test_sparsity_is_that_of_the_tokens_it_acts_on(llama):
    model = adapted(llama)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    fired = []
    layer.monolora_activation.default.register_forward_hook(lambda module, args, latents: fired.append(latents != 0))
    measured = activation_sparsity(model, [{"input_ids": IDS, "attention_mask": MASK}])
    padding = (MASK == 0).sum(1).tolist()  # in front, and moved behind the texts before they are run
    rows = zip(fired[0], STARTS, padding, strict=True)
    acting = torch.cat([row[start - before : len(row) - before] for row, start, before in rows])
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    assert measured.per_module[name] == pytest.approx(1 - acting.float().mean().item())
    with pytest.raises(ValueError, match="no row has the invocation tokens of an activated adapter"):
        activation_sparsity(model, [{"input_ids": IDS[3:]}])


@torch.no_grad()
def test_what_it_cannot_see_is_refused(llama):
    model = adapted(llama)
    with pytest.raises(RuntimeError, match="only PeftModelForCausalLM shows it"):
        model.get_base_model()(IDS)
    embeddings = llama.get_input_embeddings()(IDS)
    with pytest.raises(ValueError, match="looks for its invocation tokens in `input_ids`"):
        model(inputs_embeds=embeddings)  # PEFT warns that it takes the base
    embedded = model(inputs_embeds=embeddings, alora_offsets=[5, 7, 2, 0]).logits
    assert torch.equal(embedded, model(IDS).logits)
    with pytest.raises(ValueError, match="`alora_offsets` are of 2 rows, and the pass has 4"):
        model(IDS, alora_offsets=[5, 7])
    with pytest.raises(ValueError, match="`alora_offsets` is for activated adapters"):
        adapted(llama, None)(IDS, alora_offsets=[5, 7, 2, 0])
    with pytest.warns(UserWarning, match=r"No row holds the invocation tokens \[7, 8\] of adapter 'default'"):
        model(IDS[3:])
    packed = torch.arange(10).expand(4, 10) % 6
    with pytest.raises(ValueError, match=r"several texts .* Switch packing and `padding_free` off"):
        model(IDS, position_ids=packed)


@torch.no_grad()
def test_a_loop_of_passes_with_a_cache(llama):
    model = adapted(llama)
    cache = model(IDS[:1, :9], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"This pass continues a cache, and .* Pass `alora_offsets`"):
        model(IDS[:1, 9:], past_key_values=cache)
    cache = model(IDS[:1, :9], use_cache=True).past_key_values
    last = model(IDS[:1, 9:], past_key_values=cache, alora_offsets=[1]).logits[0, -1]
    torch.testing.assert_close(last, model(IDS[:1]).logits[0, -1], rtol=1e-4, atol=1e-5)


class Experts(nn.Module):
    """Each token goes to one of two layers, so that they see no rows of tokens."""

    def __init__(self, config):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        half = len(rows) // 2
        return torch.cat([self.experts[0](rows[:half]), self.experts[1](rows[half:])]).view_as(x)


def test_layers_that_do_not_see_rows_of_tokens_are_refused(llama):
    llama.model.layers[0].mlp = Experts(llama.config)
    model = adapted(llama, target_modules=["experts.0", "experts.1"])
    with pytest.raises(ValueError, match=r"latents of shape \(20, 4\) in a pass of 4 rows of 10 tokens"):
        model(IDS)
    llama.model.layers[0].mlp = nn.Sequential(nn.Conv1d(10, 10, 1))
    with pytest.raises(TypeError, match=r"cannot adapt '.*mlp\.0', a convolution"):
        adapted(llama, target_modules=["mlp.0"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"alora_invocation_tokens": []}, r"must be a list of token ids, got \[\]"),
        ({"alora_invocation_tokens": "<s>"}, "must be a list of token ids, got '<s>'"),
        ({"alora_invocation_tokens": [1, -2]}, "must be a list of token ids"),
        ({"task_type": None}, "needs `task_type='CAUSAL_LM'`, got None"),
        ({"bias": "all"}, "trained biases would act before the tokens too"),
        ({"target_parameters": ["experts.down_proj"]}, "fused experts get the tokens of all rows"),
    ],
)
def test_options_that_contradict_it(more, message):
    with pytest.raises(ValueError, match=message):
        MonoLoraConfig(**options(**more))


def test_models_without_a_key_value_cache_are_refused():
    """Mamba hands its state on under another name, so that the adapter would lose its place after the first token."""
    config = MambaConfig(vocab_size=40, hidden_size=32, state_size=4, num_hidden_layers=1)
    with pytest.raises(TypeError, match="finds its place by `past_key_values`"):
        get_peft_model(MambaForCausalLM(config), MonoLoraConfig(**options(target_modules=["in_proj"])))
