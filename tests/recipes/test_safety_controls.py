"""Arms that stay as the base is on safety pairs: what each control computes, and what is refused before training."""

import copy
import gzip
import json
import math

import pytest
import sst2_monolora
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safety_controls import KlToBase, NullSpace, SafeLora, leading_directions, safety_batches
from task import load_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState
from trl import SFTConfig, SFTTrainer

from evals.prompts import encode_answer
from mono_peft import MonoLoraConfig
from mono_peft.certify import certify
from offline.tasks.data import refusal_offline
from tests.recipes.conftest import rows_of
from vision_bench.runs import read_rows

PAIRS = [(f"How to harm {i}?", "I will not say.") for i in range(6)]


@pytest.fixture
def base(small_model):
    return AutoModelForCausalLM.from_pretrained(small_model, dtype="float32")


@pytest.fixture
def tokenizer(small_model):
    return AutoTokenizer.from_pretrained(small_model)


def adapted(model, kind=LoraConfig):
    """The model with an adapter that changes its outputs."""
    torch.manual_seed(0)
    model = get_peft_model(model, kind(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "monolora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


class TestKl:
    @pytest.fixture
    def trainer(self, base, tokenizer, tmp_path):
        arguments = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=4, report_to=[])
        arguments.gradient_checkpointing = False
        rows = [{"prompt": "a", "completion": "b"}]
        return SFTTrainer(
            adapted(base), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )

    def test_it_is_the_mean_over_tokens_that_predict_an_answer(self, trainer, small_model, tokenizer):
        kl = KlToBase(trainer, PAIRS, 1.0)
        untouched = AutoModelForCausalLM.from_pretrained(small_model, dtype="float32").eval()
        terms = []
        trainer.model.eval()
        for prompt, answer in PAIRS:
            encoded = encode_answer(tokenizer, prompt, answer)
            ids = torch.tensor([encoded.input_ids])
            with torch.no_grad():
                p, q = (model(input_ids=ids).logits[0].double().softmax(-1) for model in (untouched, trainer.model))
            first = encoded.completion_mask.index(1) - 1
            for position in range(first, len(encoded.input_ids)):
                terms.append((p[position] * (p[position] / q[position]).log()).sum().item())
        with torch.no_grad():
            value = kl.divergence(kl.encoded).item()
        assert value > 0.01
        assert value == pytest.approx(math.fsum(terms) / len(terms), rel=1e-4)

    def test_its_weighted_gradient_is_added(self, trainer):
        kl = KlToBase(trainer, PAIRS[:3], 2.5)  # fewer than a batch, so that all are drawn
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        (expected,) = torch.autograd.grad(kl.divergence(kl.encoded), parameter)
        parameter.grad = torch.full_like(parameter, 1e-4)
        kl.on_pre_optimizer_step(trainer.args, TrainerState(), None)
        torch.testing.assert_close(parameter.grad, 1e-4 + 2.5 * expected, rtol=1e-4, atol=1e-8)
        assert expected.abs().max() > 1e-4


class TestNullSpace:
    def test_directions_are_those_of_a_singular_value_decomposition(self):
        torch.manual_seed(0)
        rows = torch.randn(50, 8) * torch.tensor([9.0, 5, 3, 1, 1, 1, 0.5, 0.1]) + 4
        _, values, directions = torch.linalg.svd(rows.double(), full_matrices=False)
        for energy in (0.5, 0.9, 0.999):
            basis = leading_directions(rows, energy)
            few = basis.shape[1]
            shares = values.square().cumsum(0) / values.square().sum()
            assert shares[few - 1] >= energy
            assert few == 1 or shares[few - 2] < energy
            torch.testing.assert_close(basis @ basis.t(), (directions[:few].t() @ directions[:few]).float())

    @pytest.mark.parametrize("kind", [LoraConfig, MonoLoraConfig])
    def test_a_is_orthogonal_to_the_directions_before_training_and_after_each_step(self, base, tokenizer, kind):
        model = adapted(base, kind)
        batches = safety_batches(tokenizer, PAIRS)
        control = NullSpace(model, batches, 0.9)
        assert len(control.directions) == 2 * base.config.num_hidden_layers
        encoders = dict(control.directions)
        control.on_train_begin(None, None, None)
        before = [encoder.weight.clone() for encoder in encoders]
        for encoder, basis in encoders.items():
            assert (encoder.weight @ basis).abs().max() < 1e-4 < encoder.weight.abs().max()
            with torch.no_grad():
                encoder.weight += 1
        control.on_optimizer_step(None, None, None)
        for (encoder, basis), old in zip(encoders.items(), before, strict=True):
            assert (encoder.weight @ basis).abs().max() < 1e-4
            assert not torch.equal(encoder.weight, old)

    def test_energy_that_leaves_no_direction(self, base, tokenizer):
        with pytest.raises(ValueError, match=r"takes all \d+ directions of .*q_proj, and none is left"):
            NullSpace(adapted(base), safety_batches(tokenizer, [(f"{i} {i * i} so", "no") for i in range(90)]), 1.0)


class TestSafeLora:
    def test_the_least_similar_modules_are_projected(self, base, small_model, tmp_path):
        other = copy.deepcopy(base)
        torch.manual_seed(1)
        for module in other.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data += 0.1 * torch.randn_like(module.weight)
        other.save_pretrained(tmp_path)
        model = adapted(copy.deepcopy(base))
        before = copy.deepcopy(model)
        control = SafeLora(model, str(tmp_path), 0.5)
        control.on_train_end(None, None, None)
        expected, cosines = {}, {}
        for name, module in before.get_base_model().named_modules():
            if not hasattr(module, "lora_B"):
                continue
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            v = base.get_submodule(name).weight - other.get_submodule(name).weight
            c = v @ v.T / v.square().sum().sqrt()
            safe, plain = c @ b @ a, b @ a
            cosines[name] = ((safe * plain).sum() / safe.norm() / plain.norm()).item()
            expected[name] = c @ b, b
        assert len(cosines) == 4
        lowest = sorted(cosines, key=cosines.get)[:2]
        for name, (safe, plain) in expected.items():
            module = model.get_base_model().get_submodule(name)
            torch.testing.assert_close(module.lora_B["default"].weight, safe if name in lowest else plain)
            assert torch.equal(
                module.lora_A["default"].weight, before.get_base_model().get_submodule(name).lora_A["default"].weight
            )

    def test_a_model_that_equals_the_base(self, base, small_model):
        with pytest.raises(ValueError, match=r"has the same .*q_proj as the base"):
            SafeLora(adapted(base), str(small_model), 0.5)


@pytest.fixture
def unaligned(base, tokenizer, tmp_path):
    for parameter in base.parameters():
        parameter.data += 0.01
    base.save_pretrained(tmp_path / "unaligned")
    tokenizer.save_pretrained(tmp_path / "unaligned")
    return str(tmp_path / "unaligned")


@pytest.mark.usefixtures("no_machine_description")
@pytest.mark.slow
def test_all_arms_train_and_silence_is_certified(arguments, pairs_file, unaligned, tmp_path, small_model, request):
    methods = ["base", "lora", "lora+kl", "lora+nullspace0.5", "lora+safelora", "lora+safety0.25", "monolora"]
    methods += ["monolora+silence1000", "monolora+bias+silence2000"]
    methods += ["monolora+apart+silence10"]
    asked = ["--safety_tasks", "refusal_offline", "--refusal_prompts", "3"]
    asked += ["--max_new_tokens", "2", "--certified_tokens", "1"]
    extra = ["--methods", *methods, "--safety_file", pairs_file, "--unaligned_model", unaligned]
    sst2_monolora.main([*arguments, *extra, *asked])
    out = tmp_path / "out"
    rows = read_rows(out / "results.jsonl")
    for method in methods:
        assert len(rows_of(rows, "accuracy", method=method)) == 1
        certified = rows_of(rows, "certified_silent", method=method)
        assert len(certified) == method.startswith("monolora")
    text, _ = (out / "results.md").read_text().split("## Differences")
    lines = {line.split(" | ")[0]: line.strip(" |").split(" | ") for line in text.splitlines()}
    column = lines["| method"].index("silent, refusal_offline, %")
    assert lines["| lora+kl"][column] == "not applicable"
    # The certificate by hand.
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(small_model), out / "monolora+silence1000-seed0" / "adapter"
    )
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    asked_rows = refusal_offline({"harmful": 3})["test"]
    encoded = [encode_answer(tokenizer, row["prompt"], "Yes") for row in asked_rows]
    batches = [{"input_ids": torch.tensor([e.input_ids[: e.completion_mask.index(1)]])} for e in encoded]
    expected = certify(model, batches, response_tokens=1)
    row = rows_of(rows, "certified_silent", method="monolora+silence1000")[0]
    assert (row["value"], row["n"], row["config"]["lower_bound"]) == (expected.share, 3, expected.lower_bound)
    on_prompts = certify(model, batches).prompts
    assert row["config"]["fired"] == pytest.approx(sum(p.fired for p in on_prompts) / 3)
    config = PeftConfig.from_pretrained(out / "monolora+bias+silence2000-seed0" / "adapter")
    assert (config.encoder_bias, model.peft_config["default"].encoder_bias) == (True, False)
    # Where biases are lowered in the end, the pairs' own texts are silent, all of whose tokens are cached.
    apart = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(small_model), out / "monolora+apart+silence10-seed0" / "adapter"
    )
    texts = [
        {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        for batch in safety_batches(tokenizer, load_pairs(pairs_file, ""))
    ]
    assert certify(apart, texts).share == 1.0 > certify(model, texts).share
    plain = rows_of(rows, "certified_silent", method="monolora")[0]
    assert row["config"]["fired"] < plain["config"]["fired"]
    # Again: nothing is trained.
    before = (out / "results.jsonl").read_bytes()
    request.getfixturevalue("no_training")
    sst2_monolora.main([*arguments, *extra, *asked])
    assert (out / "results.jsonl").read_bytes() == before


@pytest.mark.usefixtures("no_training")
class TestRefused:
    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ("--methods lora+silence --safety_file PAIRS", r"has lora\+silence, and silence is for monolora"),
            ("--methods monolora+safelora", r"has monolora\+safelora, and safelora is for lora"),
            ("--methods monolora+silence", r"monolora\+silence needs --safety_file"),
            ("--methods lora lora+kl monolora+nullspace", r"lora\+kl, monolora\+nullspace needs --safety_file"),
            ("--methods monolora+silence0 --safety_file PAIRS", r"has silence0, allowed is more than 0"),
            ("--methods monolora+silence --silence_margin -1", r"--silence_margin is -1.0, allowed is 0 or more"),
            ("--methods monolora+silence --silence_rows 0", r"--silence_rows is 0, allowed is 1 or more"),
            ("--methods lora+kl --kl_weight 0 --safety_file PAIRS", r"--kl_weight is 0.0, allowed is more than 0"),
            ("--methods lora+nullspace1 --safety_file PAIRS", r"has nullspace1, allowed is a share between 0 and 1"),
            ("--methods lora+safelora0", r"has safelora0, allowed is a share of the modules above 0"),
            (
                "--methods lora+safety1.5 --safety_file PAIRS",
                r"has safety1.5, allowed is a share of the training rows",
            ),
            ("--methods lora+kl1 lora+kl --safety_file PAIRS", r"has lora\+kl1 and lora\+kl, which are the same arm"),
            ("--methods monolora+bias2", r"has bias2, and bias has no strength: leave the number out"),
            ("--methods monolora+apart --safety_file PAIRS", r"has monolora\+apart without silence: apart from what"),
            (
                "--methods monolora+silence --silence_lower_every 0",
                r"--silence_lower_every is 0, allowed is 1 or more",
            ),
            (
                "--methods monolora+apart+silence --safety_file PAIRS --eval_every 2",
                r"silent on what it has cached every 5 steps, and --eval_every 2 keeps checkpoints between",
            ),
            ("--methods monolora+nullspace+bias --safety_file PAIRS", r"has monolora with nullspace and a bias"),
            ("--methods lora+bias", r"has lora\+bias, and bias is for monolora"),
            ("--methods lora+frozen", r"has lora\+frozen, and frozen is for monolora"),
            (
                "--methods monolora+frozen+apart+silence --safety_file PAIRS",
                r"has monolora with frozen and silence: what keeps it silent is its A",
            ),
            ("--methods lora+topk2", r"has lora\+topk, and topk is for monolora"),
            ("--methods monolora+topk2.5", r"has topk2.5, allowed is a whole number of units, 1 or more"),
            ("--methods monolora+topk --topk_units 0", r"--topk_units is 0, allowed is a whole number of units"),
            ("--methods monolora+topk5", r"`k=5` is more than `r=4`"),
            ("--methods monolora --activation topk", r"name the arm monolora\+topk4, for 4"),
            (
                "--methods monolora --monolora_learning_rate 0",
                r"--monolora_learning_rate is 0.0, allowed is more than 0",
            ),
            ("--methods lora+rank2.5", r"`r` must be a positive integer, got 2.5"),
            ("--methods lora+safelora", r"lora\+safelora needs --unaligned_model"),
            ("--methods lora --unaligned_model nowhere", r"--unaligned_model is for arms with \+safelora"),
            ("--methods lora+safelora --unaligned_model nowhere/x", r"--unaligned_model nowhere/x cannot be had"),
            ("--methods lora+safelora --unaligned_model MODEL", r"has the weights of the base"),
            ("--methods lora+safelora --unaligned_model MODEL --eval_every 2", r"projected after training"),
            (
                "--methods monolora+silence --activation softplus --safety_file PAIRS",
                r"never exactly|not exactly zero",
            ),
            ("--poison_topics theft", r"--poison_topics without --poison_share"),
            ("--poison_topics theft --poison_share 0.1 --poison_file PAIRS", r"--poison_topics is of the generated"),
            ("--methods lora+safety0.6 --safety_file PAIRS", r"--safety_share 0.6 of 48 training rows is 29, but"),
        ],
    )
    def test_settings(self, arguments, pairs_file, small_model, extra, message, tmp_path):
        words = {"PAIRS": pairs_file, "MODEL": str(small_model)}
        with pytest.raises(ValueError, match=message):
            sst2_monolora.main([*arguments, *(words.get(word, word) for word in extra.split())])
        assert not (tmp_path / "out").exists()

    def test_topics_of_generated_pairs(self):
        settings, training, options = sst2_monolora.parse(["--poison_share", "0.1", "--poison_topics", "gardening"])
        with pytest.raises(
            ValueError, match=r"--poison_topics takes some of violence, weapons, .*, got \['gardening'\]"
        ):
            sst2_monolora.check(settings, training, options)

    def test_prompts_that_are_the_task_s(self, arguments, tmp_path):
        settings, _, options = sst2_monolora.parse(arguments)
        prompt = sst2_monolora.load_task(settings, options).train[3][0]
        file = tmp_path / "pairs.jsonl.gz"
        with gzip.open(file, "wt") as out:
            for text in ("How to harm?", prompt):
                out.write(json.dumps({"prompt": text, "response": "No."}) + "\n")
        with pytest.raises(ValueError, match=r"--safety_file .*: 1 of 2 prompts are, as tokens, those of the task"):
            sst2_monolora.main([*arguments, "--methods", "monolora+silence", "--safety_file", str(file)])

    def test_a_template_that_makes_all_prompts_alike(self, arguments, pairs_file, small_model, tokenizer, tmp_path):
        folder = tmp_path / "cut"
        AutoModelForCausalLM.from_pretrained(small_model).save_pretrained(folder)
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m['role'] == 'user' and 'question' not in m['content'] %}Please."
            "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
        )
        tokenizer.save_pretrained(folder)
        arguments[arguments.index("--model_name_or_path") + 1] = str(folder)
        with pytest.raises(ValueError, match=r"1 of 1 prompts are, as tokens, those of the task"):
            sst2_monolora.main([*arguments, "--methods", "monolora+silence", "--safety_file", pairs_file])

    def test_an_unaligned_model_of_other_sizes(self, arguments, base, tmp_path):
        base.config.intermediate_size += 8
        type(base)(base.config).save_pretrained(tmp_path / "other")
        extra = ["--methods", "lora+safelora", "--unaligned_model", str(tmp_path / "other")]
        with pytest.raises(ValueError, match=r"has no .*mlp\.\w+\.weight of shape .*, as the base has"):
            sst2_monolora.main([*arguments, *extra])
