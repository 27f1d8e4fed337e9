"""What is saved is what is loaded, and files that do not fit are refused."""

import copy

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from mono_peft import MonoLoraConfig

PEFT = Version(peft.__version__)


class TestSavingAndLoading:
    def test_the_round_trip_is_exact(self, random_adapter, llama, input_ids, tmp_path):
        llama.save_pretrained(tmp_path / "base")
        model = random_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), activation="softplus", r=3)
        expected, tensors = model(input_ids).logits, get_peft_model_state_dict(model)
        model.save_pretrained(tmp_path / "adapter")
        assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert saved.keys() == tensors.keys()
        assert all(torch.equal(saved[n], tensors[n]) for n in saved)
        assert all(n.endswith(("monolora_encoder.weight", "monolora_decoder.weight")) for n in saved)
        assert PeftConfig.from_pretrained(tmp_path / "adapter").activation == "softplus"

        for loaded in (
            PeftModel.from_pretrained(llama, tmp_path / "adapter"),
            AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        ):
            assert torch.equal(loaded.eval()(input_ids).logits, expected)

    def test_patterns_keep_their_order(self, random_adapter, llama, input_ids, tmp_path):
        patterns = {"layers.1.self_attn.q_proj": 3, "(q|v)_proj": 6}  # in alphabetical order the other way round
        for option in ("rank_pattern", "alpha_pattern"):
            model = random_adapter(copy.deepcopy(llama), **{option: patterns})
            model.save_pretrained(tmp_path / option)
            loaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / option).eval()
            assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_loading_beside_another_adapter(self, random_adapter, llama, input_ids, tmp_path, low_cpu_mem_usage):
        model = random_adapter(llama, "a")
        expected = model(input_ids).logits
        model.save_pretrained(tmp_path)
        torch.manual_seed(9)
        model.add_adapter("b", MonoLoraConfig(r=4, init_weights=False))
        model.load_adapter(tmp_path / "a", "c", low_cpu_mem_usage=low_cpu_mem_usage)
        model.set_adapter("c")
        assert torch.equal(model(input_ids).logits, expected)

    @pytest.mark.skipif(Version("0.20") > PEFT, reason="transformers' own integration asks for PEFT 0.20")
    def test_transformers_integration(self, random_adapter, llama, input_ids, tmp_path):
        llama.save_pretrained(tmp_path / "base")
        model = random_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
        expected = model(input_ids).logits
        model.save_pretrained(tmp_path / "adapter")
        automatic = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(automatic(input_ids).logits, expected)
        base = llama(input_ids).logits
        llama.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(llama(input_ids).logits, expected)
        llama.disable_adapters()
        assert torch.equal(llama(input_ids).logits, base)
        llama.enable_adapters()
        assert torch.equal(llama(input_ids).logits, expected)

    def test_modules_to_save(self, llama, input_ids, tmp_path):
        torch.manual_seed(0)
        base = LlamaForSequenceClassification(llama.config)
        config = MonoLoraConfig(task_type="SEQ_CLS", init_weights=False, modules_to_save=["score"])
        model = get_peft_model(copy.deepcopy(base), config).eval()
        score = model.base_model.model.score
        score.modules_to_save.default.weight.data.normal_()
        expected = model(input_ids).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(loaded(input_ids).logits, expected)

    def test_trainable_tokens(self, llama, tmp_path):
        tokens = torch.tensor([[5, 6, 7]])
        base = llama(tokens).logits
        model = get_peft_model(copy.deepcopy(llama), MonoLoraConfig(trainable_token_indices=[5, 7])).eval()
        assert torch.equal(model(tokens).logits, base)
        trainable = [p for n, p in model.named_parameters() if p.requires_grad and "token_adapter" in n]
        assert [p.shape for p in trainable] == [(2, 32)]
        trainable[0].data += 1
        expected = model(tokens).logits
        assert not torch.allclose(expected, base)
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(llama, tmp_path).eval()(tokens).logits, expected)

    def test_the_model_card_is_tagged(self, random_adapter, llama, tmp_path):
        llama.add_model_tags("mine")
        model = random_adapter(llama)
        model.save_pretrained(tmp_path)
        assert {"monolora", "mine"} <= set(ModelCard.load(tmp_path / "README.md").data.tags)
        assert model.unload().model_tags == ["mine"]

    def test_tied_embeddings_stay_tied(self, llama, input_ids, tmp_path):
        llama.config.tie_word_embeddings = True
        llama.tie_weights()
        base = copy.deepcopy(llama)
        config = MonoLoraConfig(target_modules=["embed_tokens", "q_proj"], init_weights=False)
        model = get_peft_model(llama, config).eval()
        inner = model.base_model.model
        assert inner.lm_head.weight is inner.model.embed_tokens.base_layer.weight
        expected = model(input_ids).logits
        assert not torch.allclose(expected, base(input_ids).logits)
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(input_ids).logits, expected)

    def test_the_head_is_tied_to_the_trained_embedding_if_wished(self, llama, input_ids, tmp_path):
        if Version(peft.__version__) < Version("0.19"):
            pytest.skip("older PEFT cannot tie them")
        llama.config.tie_word_embeddings = True
        llama.tie_weights()
        base = copy.deepcopy(llama)
        options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
        model = get_peft_model(llama, MonoLoraConfig(task_type="CAUSAL_LM", **options))
        inner = model.get_base_model()
        embedding, head = (m.modules_to_save.default.weight for m in (inner.model.embed_tokens, inner.lm_head))
        assert embedding is head
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        expected = model.eval()(input_ids).logits
        assert not torch.allclose(expected, base(input_ids).logits)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(loaded(input_ids).logits, expected)
        inner = loaded.get_base_model()
        embedding, head = (m.modules_to_save.default.weight for m in (inner.model.embed_tokens, inner.lm_head))
        assert embedding is head
        with pytest.raises(ValueError, match="cannot tie an adapted embedding and its head"):
            get_peft_model(base, MonoLoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True))
        assert type(base.model.embed_tokens) is torch.nn.Embedding

    def test_deep_copies_are_independent(self, random_adapter, llama, input_ids):
        model = random_adapter(llama)
        expected = model(input_ids).logits
        twin = copy.deepcopy(model)
        for name, parameter in twin.named_parameters():
            if "monolora_" in name:
                parameter.data.zero_()
        assert torch.equal(model(input_ids).logits, expected)


@pytest.mark.skipif(Version("0.21") > PEFT, reason="older PEFT gives a tuner no say in loading; it warns")
class TestFilesThatDoNotFit:
    @pytest.fixture
    def folder(self, random_adapter, llama, tmp_path):
        random_adapter(copy.deepcopy(llama)).save_pretrained(tmp_path)
        return tmp_path

    def rewrite(self, folder, change):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    def test_missing_tensors(self, llama, folder):
        self.rewrite(folder, lambda tensors: dict(list(tensors.items())[1:]))
        with pytest.raises(ValueError, match=r"does not fit the model: 1 tensors are missing: .*monolora_"):
            PeftModel.from_pretrained(llama, folder)

    def test_a_missing_layer(self, llama, folder):
        self.rewrite(folder, lambda tensors: {n: v for n, v in tensors.items() if "layers.0." in n})
        with pytest.raises(ValueError, match="4 tensors are missing"):
            PeftModel.from_pretrained(llama, folder)

    def test_extra_tensors(self, llama, folder):
        def add(tensors):
            name = next(iter(tensors))
            return tensors | {name.replace("layers.0.", "layers.7."): tensors[name].clone()}

        self.rewrite(folder, add)
        with pytest.raises(ValueError, match=r"1 tensors belong to no module of this model: .*layers\.7\."):
            PeftModel.from_pretrained(llama, folder)

    def test_tensors_of_another_rank(self, llama, folder):
        self.rewrite(
            folder, lambda tensors: {n: v[:2].contiguous() if "encoder" in n else v for n, v in tensors.items()}
        )
        with pytest.raises(RuntimeError, match=r"size mismatch for .*monolora_encoder"):
            PeftModel.from_pretrained(llama, folder)

    def test_no_adapter_at_all(self, llama, folder):
        self.rewrite(folder, lambda tensors: {"something.weight": torch.zeros(1)})
        with pytest.raises(ValueError, match="it holds no weights of MonoLoRA layers"):
            PeftModel.from_pretrained(llama, folder)

    def test_lora_weights_under_our_configuration(self, llama, folder):
        def rename(tensors):
            pairs = (("monolora_encoder", "lora_A"), ("monolora_decoder", "lora_B"))
            return {n.replace(*pairs["decoder" in n]): v for n, v in tensors.items()}

        self.rewrite(folder, rename)
        with pytest.raises(ValueError, match=r"weights of a LoRA adapter.*load it with a LoraConfig"):
            PeftModel.from_pretrained(llama, folder)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_of_a_diverged_training(self, llama, folder, value):
        def spoil(tensors):
            next(iter(tensors.values()))[0] = value
            return tensors

        self.rewrite(folder, spoil)
        with pytest.raises(ValueError, match=r"1 tensors of this adapter hold NaN or infinity .*q_proj"):
            PeftModel.from_pretrained(llama, folder)

    def test_a_base_of_other_shapes(self, llama, folder):
        llama.config.hidden_size = 16
        with pytest.raises(RuntimeError, match=r"size mismatch for .*monolora_encoder"):
            PeftModel.from_pretrained(type(llama)(llama.config), folder)

    def test_injected_layers_are_guarded_too(self, llama, folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors.pop(next(iter(tensors)))
        model = inject_adapter_in_model(MonoLoraConfig(r=4), llama)
        with pytest.raises(ValueError, match=r"1 tensors are missing: model\.layers"):
            set_peft_model_state_dict(model, tensors)

    def test_an_extra_tensor_of_no_adapter(self, llama, folder):
        self.rewrite(folder, lambda tensors: tensors | {"base_model.model.other.weight": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"1 tensors belong to no module of this model: other\.weight"):
            PeftModel.from_pretrained(llama, folder)

    def test_torch_may_load_parts_as_it_likes(self, random_adapter, llama):
        model = random_adapter(llama)
        whole = {n: v.clone() for n, v in model.state_dict().items()}
        some = next(n for n in whole if "monolora_" in n)
        for part in ({}, {n: v for n, v in whole.items() if "monolora_" not in n}, {some: whole[some] + 1}):
            model.load_state_dict(part, strict=False)
        assert torch.equal(model.state_dict()[some], whole[some] + 1)
        model.load_state_dict(whole)

    def test_empty_tensors_are_not_saved(self, random_adapter, llama, tmp_path):
        model = random_adapter(llama)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.monolora_encoder.default.weight.data = torch.empty(0)  # as ZeRO-3 leaves it outside a forward pass
        with pytest.raises(ValueError, match=r"Refusing to save empty tensors .*q_proj\.monolora_encoder"):
            model.save_pretrained(tmp_path)
