"""certify and `python -m mono_peft.certify`: which prompts are silent, where the others fire, and what is refused."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import beta
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from mono_peft import DivergedError, MonoLoraConfig
from mono_peft.certify import CertificateError, Firing, binomial_lower_bound, certify, main
from mono_peft.silenceable import NeverSilentError

LAST = "base_model.model.model.layers.1.mlp.down_proj"


def constrain(model, ids, module=None, unit=None, row=None):
    """Solve for A, of all modules, such that A x = -1 for all x of the base on `ids`, but for one unit on one row.

    Args:
        ids: prompts of token ids, at most as many tokens as the model has dimensions.
        module, unit, row: where A x is 1; None for nowhere.
    """
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "monolora_encoder")}
    inputs, handles = {name: [] for name in layers}, []
    for name, layer in layers.items():

        def keep(layer, args, name=name):
            inputs[name].append(args[0][0])

        handles.append(layer.register_forward_pre_hook(keep))
    with torch.no_grad(), model.disable_adapter():
        for prompt in ids:
            model(prompt[None])
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        x = torch.cat(inputs[name])
        targets = -torch.ones(len(x), layer.r["default"], dtype=x.dtype)
        if name == module:
            targets[row, unit] = 1
        solution = torch.linalg.lstsq(x.double(), targets.double(), driver="gelsd").solution
        layer.monolora_encoder["default"].weight.data = solution.T.to(x.dtype).contiguous()
    return model


@pytest.fixture
def model(llama, random_adapter):
    return random_adapter(llama, target_modules="all-linear")


def test_an_adapter_that_is_trained_freely(model, input_ids):
    certificate = certify(model, [{"input_ids": input_ids}])
    assert (certificate.silent, certificate.share, certificate.compared, certificate.lower_bound) == (0, 0, 0, 0)
    for prompt, ids in zip(certificate.prompts, input_ids, strict=True):
        assert (prompt.silent, prompt.tokens, prompt.response_tokens) == (False, 9, 0)
        assert prompt.fired > 0.8
        assert prompt.first.module == "base_model.model.model.layers.0.self_attn.q_proj"
        assert prompt.first.token_id == ids[prompt.first.token]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silent_prompts_are_the_base(model, input_ids, dtype):
    model = constrain(model.to(dtype), input_ids)
    certificate = certify(model, [{"input_ids": input_ids[:2]}, {"input_ids": input_ids[2:]}], compared_prompts=2)
    assert (certificate.share, certificate.compared) == (1, 2)
    assert certificate.lower_bound == pytest.approx(0.05 ** (1 / 3))
    with torch.no_grad():
        for ids in input_ids:
            logits = model(ids[None]).logits
            with model.disable_adapter():
                assert torch.equal(model(ids[None]).logits, logits)
        other = torch.randint(3, 100, (1, 9), generator=torch.Generator().manual_seed(5))
        with model.disable_adapter():
            without = model(other).logits
        assert not torch.equal(model(other).logits, without)


@pytest.mark.parametrize(
    ("module", "token"), [(LAST, 5), (LAST, 0), ("base_model.model.model.layers.0.mlp.up_proj", 8)]
)
def test_where_a_prompt_fires(model, input_ids, module, token):
    constrain(model, input_ids, module, unit=2, row=9 + token)
    certificate = certify(model, [{"input_ids": input_ids}])
    assert [prompt.silent for prompt in certificate.prompts] == [True, False, True]
    firing = certificate.prompts[1]
    assert firing.first == Firing(module, 2, token, int(input_ids[1, token]))
    if module == LAST:
        assert firing.fired == pytest.approx(1 / (14 * 9))
    assert certificate.lower_bound == pytest.approx(beta.ppf(0.05, 2, 2))


def test_padding_on_either_side_does_not_count(model, input_ids):
    constrain(model, input_ids, LAST, unit=1, row=9 + 4)
    plain = certify(model, [{"input_ids": input_ids}])
    for padding in ((3, 0), (0, 3)):
        pad = torch.nn.functional.pad
        batch = {"input_ids": pad(input_ids, padding), "attention_mask": pad(torch.ones_like(input_ids), padding)}
        assert certify(model, [batch]) == plain


class TestResponses:
    @pytest.fixture
    def sequences(self, model, input_ids):
        with model.disable_adapter():
            return model.generate(input_ids=input_ids[:2, :6], do_sample=False, min_new_tokens=4, max_new_tokens=4)

    def test_that_are_silent(self, model, sequences):
        constrain(model, sequences)
        certificate = certify(model, [{"input_ids": sequences[:, :6]}], response_tokens=4)
        assert (certificate.share, certificate.compared) == (1, 2)
        assert [(prompt.tokens, prompt.response_tokens) for prompt in certificate.prompts] == [(10, 4)] * 2

    def test_that_fire(self, model, sequences):
        constrain(model, sequences, LAST, unit=3, row=10 + 8)
        batches = [{"input_ids": sequences[:, :6]}]
        certificate = certify(model, batches, response_tokens=4)
        assert [prompt.silent for prompt in certificate.prompts] == [True, False]
        assert certificate.prompts[1].first == Firing(LAST, 3, 8, int(sequences[1, 8]))
        assert certify(model, batches).share == 1  # the prompts alone

    def test_that_fire_with_the_cache_only(self, model, sequences, monkeypatch):
        """As by other rounding: a unit fires when the token is computed alone."""
        constrain(model, sequences)
        activation = model.get_submodule(LAST).monolora_activation["default"]
        forward = type(activation).forward
        lift = lambda self, x: forward(self, x + 2 if self is activation and x.shape[:2] == (1, 1) else x)  # noqa: E731
        monkeypatch.setattr(type(activation), "forward", lift)
        certificate = certify(model, [{"input_ids": sequences[:, :6]}], response_tokens=4)
        assert certificate.share == 0
        assert certificate.prompts[0].first == Firing(LAST, 0, 6, int(sequences[0, 6]))


def test_fused_experts(random_adapter, input_ids):
    config = MixtralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    base = MixtralForCausalLM(config)
    model = random_adapter(base, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    certificate = certify(model, [{"input_ids": input_ids}])
    assert certificate.share == 0
    assert certificate.prompts[0].first.module.startswith("base_model.model.model.layers.0.mlp.experts")
    assert 0.5 < certificate.prompts[0].fired <= 1
    for name, parameter in model.named_parameters():
        if "monolora_encoder" in name:
            torch.nn.init.zeros_(parameter)
    certificate = certify(model, [{"input_ids": input_ids}], response_tokens=2)
    assert (certificate.share, certificate.compared) == (1, 3)


def test_an_activated_adapter_is_silent_without_its_invocation_and_fires_from_it_on(llama, random_adapter):
    model = random_adapter(llama, target_modules="all-linear", alora_invocation_tokens=[5, 6])
    ids = torch.tensor([[10, 11, 12, 13, 14], [10, 11, 5, 6, 14]])
    certificate = certify(model, [{"input_ids": ids}], response_tokens=2)
    assert [prompt.silent for prompt in certificate.prompts] == [True, False]
    assert certificate.compared == 1
    assert certificate.prompts[1].first.token in (2, 3)


def test_the_model_is_as_before(model, input_ids):
    model.train()
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    certify(model, [{"input_ids": input_ids}], response_tokens=1)
    assert all(module.training for module in model.modules())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("successes", "trials"), [(1, 1), (0, 5), (3, 7), (97, 100), (9, 9), (1, 2000), (1990, 2000)])
def test_the_bound_is_clopper_and_pearsons(successes, trials):
    expected = beta.ppf(0.05, successes, trials - successes + 1) if successes else 0
    assert binomial_lower_bound(successes, trials) == pytest.approx(expected, rel=1e-6)


class TestRefusals:
    def test_lora(self, llama, input_ids):
        with pytest.raises(NeverSilentError, match=r"LoRA adds s B A x, which is zero on a subspace only"):
            certify(get_peft_model(llama, LoraConfig(target_modules="all-linear")), [{"input_ids": input_ids}])

    @pytest.mark.parametrize("activation", ["sigmoid", "softplus", "identity"])
    def test_a_sigma_that_is_never_exactly_zero(self, llama, input_ids, random_adapter, activation):
        model = random_adapter(llama, activation=activation, target_modules=["q_proj"])
        with pytest.raises(NeverSilentError, match=r"not exactly zero where A x <= 0"):
            certify(model, [{"input_ids": input_ids}])

    def test_more_than_an_adapter(self, llama, input_ids, random_adapter):
        model = random_adapter(llama, target_modules=["q_proj"], modules_to_save=["lm_head"])
        with pytest.raises(CertificateError, match=r"trained with modules_to_save=\['lm_head'\].* is not the base"):
            certify(model, [{"input_ids": input_ids}])

    def test_outputs_that_are_not_the_bases(self, model, input_ids):
        """As by kernels that add in another order at each call."""
        constrain(model, input_ids)
        noise = lambda module, args, logits: logits + 1e-6 * torch.rand(1)  # noqa: E731
        model.get_submodule("base_model.model.lm_head").register_forward_hook(noise)
        batches = [{"input_ids": input_ids}]
        with pytest.raises(CertificateError, match=r"prompt 0 is silent, but its logits differ .*use_deterministic"):
            certify(model, batches)
        assert certify(model, batches, compared_prompts=0).share == 1

    def test_weights_that_are_no_numbers(self, model, input_ids):
        torch.nn.init.constant_(model.get_submodule(LAST).monolora_decoder["default"].weight, float("nan"))
        with pytest.raises(DivergedError, match=r"down_proj.monolora_decoder"):
            certify(model, [{"input_ids": input_ids}])

    @pytest.mark.parametrize("sigma", [{}, {"activation": "topk", "k": 2}])
    def test_convolutions(self, llama, input_ids, random_adapter, sigma):
        llama.model.patches = torch.nn.Conv2d(3, 4, 2)
        with pytest.raises(ValueError, match=r"patches is a convolution, whose positions are no tokens"):
            certify(random_adapter(llama, target_modules=["q_proj", "patches"], **sigma), [{"input_ids": input_ids}])

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ([], r"`batches` has no prompt"),
            ([{"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.zeros(1, 2)}], r"prompt 0 has no token"),
            ([{"input_ids": torch.tensor([[100]])}], r"batch 0 has the token 100, and the model has 100 tokens"),
            ([{"input_ids": torch.ones(1, 2).long(), "silent_mask": torch.ones(1, 2)}], r"speaks of all tokens"),
            ([{"input_ids": torch.ones(1, 2).long(), "pixel_values": torch.ones(1)}], r"batch 0 has pixel_values"),
        ],
    )
    def test_batches_that_do_not_fit(self, model, batches, message):
        with pytest.raises(ValueError, match=message):
            certify(model, batches)

    def test_layers_compiled_in_place(self, model, input_ids):
        """Compiled code does not call the hooks that see what fires."""
        model.base_model.model.model.layers[1].compile()
        with pytest.raises(ValueError, match=r"layers\.1 was compiled in place"):
            certify(model, [{"input_ids": input_ids}])

    @pytest.mark.parametrize("option", ["response_tokens", "compared_prompts"])
    def test_negative_numbers(self, model, input_ids, option):
        with pytest.raises(ValueError, match=rf"`{option}` must not be negative, got -1"):
            certify(model, [{"input_ids": input_ids}], **{option: -1})


class TestCommand:
    PROMPTS = ("a sentence", "films", [{"role": "user", "content": "positive"}])

    @pytest.fixture
    def prompts(self, tmp_path):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in self.PROMPTS) + "\n")
        return path

    @pytest.fixture
    def save_adapter(self, small_model, tmp_path):
        """Save an adapter that is silent on the prompts, but on a row of their tokens in the last MLP."""

        def save(row=None, **options):
            model = AutoModelForCausalLM.from_pretrained(small_model)
            tokenizer = AutoTokenizer.from_pretrained(small_model)
            options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
            model = get_peft_model(model, MonoLoraConfig(init_weights=False, **options)).eval()
            ids = [tokenizer(prompt, return_tensors="pt").input_ids[0] for prompt in self.PROMPTS[:2]]
            messages = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            ids.append(tokenizer.apply_chat_template(self.PROMPTS[2], **messages).input_ids[0])
            assert sum(map(len, ids)) <= 32
            constrain(model, ids, LAST if row is not None else None, unit=3, row=row)
            model.save_pretrained(tmp_path / "adapter")
            return tmp_path / "adapter"

        return save

    @pytest.fixture
    def run(self, small_model, prompts, capsys):
        def run(adapter, *options, base=small_model, prompts=prompts):
            code = main([str(base), str(adapter), "--prompts", str(prompts), *map(str, options)])
            return code, capsys.readouterr().out.strip().splitlines()

        return run

    def test_all_are_silent(self, run, save_adapter):
        code, lines = run(save_adapter())
        assert code == 0
        assert lines == [
            "3 of 3 prompts are silent: there the adapted model is the base.",
            "Outputs were compared with the base's on 3 of these and are equal, bit for bit.",
            "Of unseen prompts of the same kind at least 36.8% are silent (95% confidence, exact binomial), if these "
            "were drawn at random and not trained on.",
        ]

    def test_some_are_not(self, run, save_adapter, small_model, tmp_path):
        adapter, output = save_adapter(row=1), tmp_path / "certificate.jsonl"
        code, lines = run(adapter, "--output", output)
        assert code == 1
        token = AutoTokenizer.from_pretrained(small_model)(self.PROMPTS[0]).input_ids[1]
        assert lines[0].startswith("prompt 0 is not silent: ")
        assert f"first unit 3 of {LAST} on token 1, " in lines[0]
        assert lines[1].startswith("2 of 3 prompts are silent")
        assert lines[-1] == "too few prompts are silent: 66.7%, and --min_silent asks for 100.0%"
        written = [json.loads(line) for line in output.read_text().splitlines()]
        assert [(row["prompt"], row["silent"]) for row in written] == [(0, False), (1, True), (2, True)]
        assert written[0]["first"] == {"module": LAST, "unit": 3, "token": 1, "token_id": token}
        assert written[1]["first"] is None
        assert run(adapter, "--min_silent", 0.6)[0] == 0

    def test_responses(self, run, save_adapter, tmp_path):
        output = tmp_path / "certificate.jsonl"
        run(save_adapter(), "--response_tokens", 3, "--output", output)
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert [1 <= row["response_tokens"] <= 3 for row in rows] == [True] * 3

    def test_lora_is_not_applicable(self, run, small_model, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(small_model)
        get_peft_model(model, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "lora")
        code, lines = run(tmp_path / "lora")
        assert code == 2
        assert lines[-1].startswith("not applicable: ")
        assert "is a LORA adapter. It adds s B A x, which is zero on a subspace only" in lines[-1]

    def test_a_sigmoid_is_not_applicable(self, run, save_adapter):
        code, lines = run(save_adapter(activation="sigmoid"))
        assert code == 2
        assert lines[-1].startswith("not applicable: the sigma of")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", r" has no prompt"),
            ('{"text": "a"}', 'line 1 of {} is no JSON object with a "prompt"'),
            ("a", 'line 1 of {} is no JSON object with a "prompt"'),
            ('{"prompt": [{"role": "user"}]}', "the prompt of line 1 of {} cannot be put in tokens"),
            ('{"prompt": 3}', "the prompt of line 1 of {} is neither a text nor a list of messages"),
        ],
    )
    def test_files_that_are_no_prompts(self, run, save_adapter, tmp_path, text, message):
        path = tmp_path / "others.jsonl"
        path.write_text(text)
        code, lines = run(save_adapter(), prompts=path)
        assert code == 2
        assert message.format(path) in lines[-1]

    def test_what_cannot_be_read(self, run, save_adapter, tmp_path):
        code, lines = run(tmp_path)
        assert code == 2
        assert "it has no adapter_config.json" in lines[-1]
        code, lines = run(save_adapter(), prompts=tmp_path / "none.jsonl")
        assert code == 2
        assert "none.jsonl cannot be read" in lines[-1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--min_silent", "95"], "--min_silent is a share, from 0 to 1"),
            (["--response_tokens", "-1"], "--response_tokens must not be negative"),
            (["--output", "none/a.jsonl"], "in one that does not exist: none"),
        ],
    )
    def test_options_out_of_range(self, run, tmp_path, capsys, options, message):
        with pytest.raises(SystemExit) as raised:
            run(tmp_path, *options)
        assert raised.value.code == 2
        assert message in capsys.readouterr().err
