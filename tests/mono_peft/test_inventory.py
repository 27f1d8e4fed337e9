"""What is counted of units in one pass, compared with loops over texts, tokens and units."""

import math
from itertools import combinations
from statistics import NormalDist

import pytest
import torch
from scipy.stats import hypergeom
from transformers import MixtralConfig, MixtralForCausalLM

from mono_peft import DivergedError
from mono_peft.inventory import (
    BEFORE,
    BEHIND,
    BINS,
    SAMPLED,
    TOP,
    Examples,
    Histogram,
    ModuleStatistics,
    bytes_per_unit,
    collect,
)
from mono_peft.selectivity import beyond_chance, preference, rates_of_texts, rates_of_tokens
from mono_peft.texts import Texts

R = 4


def some_texts(groups=("task", "other"), number=23, longest=60, seed=0):
    """Texts of 1 to `longest` random tokens, in groups of different size."""
    generator = torch.Generator().manual_seed(seed)
    texts = Texts(groups, [])
    for i in range(number):
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        ids = torch.randint(3, 100, (length,), generator=generator).tolist()
        texts.add(ids, 0, group=0 if i % 3 == 0 else len(groups) - 1, file=0, row=i + 1)
    return texts


def latents_of(model, texts):
    """The latents of each module on each text by itself: by module a list of (tokens, r)."""
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "monolora_encoder")}
    seen = {name: [] for name in layers}
    handles = [
        layer.monolora_activation["default"].register_forward_hook(
            lambda module, args, output, name=name: seen[name].append(output[0])
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for number in range(len(texts)):
            model(input_ids=torch.tensor([texts.ids(number)]))
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture(params=["relu", "identity", "topk"])
def model(request, llama, random_adapter):
    options = {"k": 2} if request.param == "topk" else {}
    return random_adapter(llama, r=R, target_modules="all-linear", activation=request.param, **options)


def test_all_counts_are_those_of_loops(model):
    texts = some_texts()
    statistics = collect(model, texts, texts.batches(5))
    reference = latents_of(model, texts)
    assert list(statistics) == list(reference)
    groups, sizes = texts.group_of.tolist(), texts.group_of.bincount()
    for name, part in statistics.items():
        of_tokens, of_texts, preferred = (f(part, sizes) for f in (rates_of_tokens, rates_of_texts, preference))
        for unit in range(R):
            latents = [values[:, unit] for values in reference[name]]
            strengths = torch.cat(latents).abs()
            assert part.tokens_fired[unit] == (strengths > 0).sum()
            assert part.largest[unit] == pytest.approx(float(strengths.max()), rel=1e-4)
            for group in range(2):
                own = [values for values, of in zip(latents, groups, strict=True) if of == group]
                shares = torch.tensor([float((values != 0).double().mean()) for values in own], dtype=torch.float64)
                strength = torch.tensor([float(values.abs().mean()) for values in own], dtype=torch.float64)
                assert of_texts.rate[group, unit] == pytest.approx(float((shares > 0).double().mean()))
                assert of_tokens.rate[group, unit] == pytest.approx(float(shares.mean()))
                assert preferred.strength[group, unit] == pytest.approx(float(strength.mean()), rel=1e-4)
                if 0 < shares.mean() < 1:
                    half = 1.959964 * float(shares.std()) / math.sqrt(len(own))
                    assert of_tokens.low[group, unit] == pytest.approx(max(0, float(shares.mean()) - half), abs=1e-6)
                    assert of_tokens.high[group, unit] == pytest.approx(min(1, float(shares.mean()) + half), abs=1e-6)
            width = 2.0 ** int(part.histogram.exponents[unit]) / BINS
            assert BINS * width / 2 <= part.largest[unit] <= BINS * width
            expected = torch.bincount((strengths[strengths > 0] / width).long().clamp(max=BINS - 1), minlength=BINS)
            assert (part.histogram.counts[unit] - expected).abs().sum() <= 2  # one at a border, by rounding


def test_examples_are_the_strongest_texts_with_the_latents_around(model):
    texts = some_texts(number=40)
    statistics = collect(model, texts, texts.batches(7))
    reference = latents_of(model, texts)
    for name, part in statistics.items():
        for unit in range(R):
            latents = [values[:, unit] for values in reference[name]]
            largest = sorted((float(values.abs().max()) for values in latents), reverse=True)
            fired = [number for number, values in enumerate(latents) if (values != 0).any()]
            scores = part.top.scores[:, unit]
            wanted = [score for score in largest[:TOP] if score > 0]
            assert scores[: len(wanted)].tolist() == pytest.approx(wanted, rel=1e-3)
            assert (part.sampled.scores[:, unit] > 0).sum() == min(SAMPLED, len(fired))
            for kept in (part.top, part.sampled):
                shown = [k for k in range(len(kept.scores)) if kept.scores[k, unit] > 0]
                numbers = [int(kept.texts[k, unit]) for k in shown]
                assert len(set(numbers)) == len(numbers)
                assert set(numbers) <= set(fired)
                for k, number in zip(shown, numbers, strict=True):
                    position = int(kept.positions[k, unit])
                    strengths = latents[number].abs()
                    assert strengths[position] == pytest.approx(float(strengths.max()), rel=1e-3)
                    first, end = max(0, position - BEFORE), min(len(strengths), position + BEHIND + 1)
                    window = kept.latents[k, unit, first - position + BEFORE : end - position + BEFORE]
                    assert torch.allclose(window, latents[number][first:end], rtol=1e-3, atol=1e-4)


def test_batches_change_nothing(llama, random_adapter):
    model = random_adapter(llama, r=R, target_modules=["q_proj", "down_proj"])
    texts = some_texts(number=30)
    one, many = (collect(model, texts, texts.batches(size)) for size in (1, 30))
    for name, part in one.items():
        assert torch.equal(part.tokens_fired, many[name].tokens_fired)
        assert torch.equal(part.texts_fired, many[name].texts_fired)
        assert torch.allclose(part.strength, many[name].strength, rtol=1e-4)
        assert torch.equal(part.sampled.texts, many[name].sampled.texts)
        assert torch.allclose(part.top.scores, many[name].top.scores, rtol=1e-4)


def test_what_is_kept_does_not_grow_with_the_texts(llama, random_adapter):
    model = random_adapter(llama, r=R, target_modules=["q_proj"])

    def size(number):
        texts = some_texts(number=number, longest=12)
        (part, *_) = collect(model, texts, texts.batches(8)).values()
        tensors = [v for p in (part, part.histogram, part.top, part.sampled) for v in vars(p).values()]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    assert size(5) == size(60) == R * bytes_per_unit(groups=2)


def test_a_histogram_that_grows_merges_its_bins():
    histogram, seen = Histogram(2, torch.device("cpu")), []
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1, 0.1, 1e4):
        values = torch.rand(50, generator=generator) * scale + 1e-9
        units = torch.arange(50) % 2
        histogram.update(values, units, torch.stack([values[0::2].max(), values[1::2].max()]))
        seen.append(values)
    for unit in range(2):
        values = torch.cat([v[unit::2] for v in seen])
        width = 2.0 ** int(histogram.exponents[unit]) / BINS
        assert histogram.counts[unit].tolist() == torch.bincount((values / width).long(), minlength=BINS).tolist()


def test_examples_of_equal_score_stay():
    """The first of several texts with the same latents is kept, so that a batch more costs nothing."""
    examples = Examples(1, 1, torch.device("cpu"))
    for number in range(3):
        examples.update(
            torch.ones(1, 1), torch.tensor([number]), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 5, 1)
        )
    assert examples.texts.tolist() == [[0]]
    assert examples.latents[0, 0].sum() == 1 + 4 + BEFORE + BEHIND - 4  # places outside the text hold its last token


def test_an_activated_adapter_fires_from_its_invocation_on(llama, random_adapter):
    model = random_adapter(llama, r=R, target_modules=["q_proj"], alora_invocation_tokens=[7, 8], activation="sigmoid")
    texts = Texts(["all"], [])
    texts.add([5, 6, 7, 8, 9, 10], 0, 0, 0, 1)
    texts.add([5, 6, 5, 6], 0, 0, 0, 2)
    for part in collect(model, texts, texts.batches(2)).values():
        assert part.tokens_fired.tolist() == [4] * R  # sigmoid is never zero
        assert part.texts_fired.tolist() == [[1] * R]


class TestPreference:
    def statistics(self, values, groups):
        """As if a unit had these mean strengths on texts."""
        (part,) = collect_of(values, groups)
        return part

    def test_its_group_and_selectivity(self):
        values, groups = [0.0, 0.5, 2.0, 0.0, 3.0, 1.0, 0.25], [0, 0, 1, 0, 1, 1, 0]
        part = self.statistics(values, groups)
        found = preference(part, torch.tensor([4, 3]))
        assert found.group.tolist() == [1]
        outside = 0.75 / 4
        assert float(found.selectivity) == pytest.approx((2 - outside) / (2 + outside))

    @pytest.mark.parametrize("m", [4, 7, 10])
    def test_its_z_has_the_tail_of_all_permutations(self, m):
        values = [0.1, 0.2, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.1, 1.6, 2.0, 2.5, 4.0, 0.15]
        groups = [0] * 14
        for i in [12, 11, 8, 5, 3, 1, 0, 9, 6, 4] if m == 10 else [12, 10, 9, 7, 5, 3, 1][:m]:
            groups[i] = 1
        found = preference(self.statistics(values, groups), torch.tensor([14 - m, m]))
        observed = sum(value for value, group in zip(values, groups, strict=True) if group)
        sums = [sum(values[i] for i in chosen) for chosen in combinations(range(14), m)]
        tail = sum(total >= observed - 1e-9 for total in sums) / len(sums)
        assert found.group.tolist() == [1]
        assert NormalDist().cdf(-float(found.z)) == pytest.approx(tail, rel=0.35)

    @pytest.mark.parametrize("fired", [2, 3, 4, 5])
    def test_a_unit_that_fires_in_few_texts_of_a_small_group(self, fired):
        """The exact tail is hypergeometric, and ours not much below; a normal one is, 4e-10 for two texts."""
        values, groups = [2.0] * fired + [0.0] * (1000 - fired), [1] * 50 + [0] * 950
        found = preference(self.statistics(values, groups), torch.tensor([950, 50]))
        tail = hypergeom.sf(fired - 1, 1000, fired, 50)
        assert 0.5 * tail < NormalDist().cdf(-float(found.z)) < 100 * tail

    def test_preferences_of_units_without_any_are_rarely_beyond_chance(self):
        """Firings at random in groups of 5, 15 and 80 %: of 2,000 units 5 % of such runs may have one beyond."""
        generator = torch.Generator().manual_seed(0)
        sizes = torch.tensor([30, 90, 480])
        groups = torch.repeat_interleave(torch.arange(3), sizes)
        rates = torch.logspace(-3, -0.1, 2000)
        strengths = torch.randn(600, 2000, generator=generator).exp() ** 2
        values = strengths * (torch.rand(600, 2000, generator=generator) < rates)
        part = ModuleStatistics(2000, 3, torch.device("cpu"))
        part.update(
            values[:, None], torch.ones(600, 1, dtype=torch.bool), torch.nn.functional.one_hot(groups, 3).double(),
            torch.arange(600), torch.full((600,), 0.5),
        )  # fmt: skip
        assert (preference(part, sizes).z > beyond_chance(6000)).sum() <= 2

    def test_one_text_is_no_preference_beyond_chance(self):
        values, groups = [5.0] + [0.0] * 199, [0] * 100 + [1] * 100
        found = preference(self.statistics(values, groups), torch.tensor([100, 100]))
        assert float(found.selectivity) == 1
        assert float(found.z) == pytest.approx(1, abs=0.01)
        assert beyond_chance(64) > 3

    def test_one_group_has_none(self):
        found = preference(self.statistics([1.0, 2.0], [0, 0]), torch.tensor([2]))
        assert float(found.selectivity) == float(found.z) == 0

    def test_a_unit_that_never_fires_has_none(self):
        found = preference(self.statistics([0.0] * 6, [0, 0, 0, 1, 1, 1]), torch.tensor([3, 3]))
        assert float(found.selectivity) == float(found.z) == 0
        rates = rates_of_tokens(self.statistics([0.0] * 6, [0, 0, 0, 1, 1, 1]), torch.tensor([3, 3]))
        assert rates.low.tolist() == [[0], [0]]
        assert float(rates.high[0]) == pytest.approx(0.5615, abs=1e-3)  # Wilson's, 0 of 3


def collect_of(values, groups):
    part = ModuleStatistics(1, max(groups) + 1, torch.device("cpu"))
    part.update(
        torch.tensor(values)[:, None, None],
        torch.ones(len(values), 1, dtype=torch.bool),
        torch.nn.functional.one_hot(torch.tensor(groups), max(groups) + 1).double(),
        torch.arange(len(values)),
        torch.full((len(values),), 0.5),
    )
    return [part]


def test_one_text_has_no_interval():
    rates = rates_of_tokens(collect_of([1.0, 0.0, 0.0], [0, 1, 1])[0], torch.tensor([1, 2]))
    assert [float(rates.low[0]), float(rates.high[0])] == [0, 1]


def test_rates_of_texts_have_wilsons_interval():
    values, groups = [1.0] * 3 + [0.0] * 7, [0] * 10
    rates = rates_of_texts(collect_of(values, groups)[0], torch.tensor([10]))
    assert [float(rates.rate), float(rates.chance)] == [0.3, 0.3]
    assert [float(rates.low), float(rates.high)] == pytest.approx([0.1078, 0.6032], abs=1e-3)


class TestRefusals:
    def test_no_adapter(self, llama):
        texts = some_texts(number=2)
        with pytest.raises(ValueError, match="no active MonoLoRA adapter"):
            collect(llama, texts, texts.batches(2))

    def test_several_adapters(self, llama, random_adapter):
        model = random_adapter(llama, target_modules=["q_proj"])
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter(["default", "second"])
        texts = some_texts(number=2)
        with pytest.raises(ValueError, match="several adapters are active"):
            collect(model, texts, texts.batches(2))

    def test_fused_experts(self, random_adapter):
        config = MixtralConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=2,
        )  # fmt: skip
        experts = ["mlp.experts.down_proj"]
        model = random_adapter(MixtralForCausalLM(config), target_modules=[], target_parameters=experts)
        texts = some_texts(number=2)
        with pytest.raises(ValueError, match="fused experts"):
            collect(model, texts, texts.batches(2))

    def test_a_layer_at_two_places(self, llama, random_adapter):
        llama.model.layers[1] = llama.model.layers[0]
        texts = some_texts(number=2)
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is called several times in a pass"):
            collect(random_adapter(llama, target_modules=["q_proj"]), texts, texts.batches(2))

    def test_nan(self, llama, random_adapter):
        model = random_adapter(llama, target_modules=["q_proj"])
        with torch.no_grad():
            llama.model.layers[1].input_layernorm.weight.fill_(torch.nan)
        texts = some_texts(number=2)
        with pytest.raises(DivergedError, match=r"layers\.1\.self_attn\.q_proj hold NaN"):
            collect(model, texts, texts.batches(2))
