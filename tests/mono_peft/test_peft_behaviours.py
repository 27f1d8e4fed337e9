"""What PEFT asks of every tuner, for a table of base models and configurations: rows times behaviours."""

import copy
import json
import pickle

import pytest
import torch
from packaging.version import Version
from peft import (
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from rows_of_bases import (
    IDS,
    PEFT,
    ROWS,
    adapted,
    base_of,
    config_of,
    every_plain_row,
    every_row,
    inputs,
    output,
    weights,
)
from safetensors.torch import load_file
from small_bases import MLP, llama
from torch import nn

from mono_peft import MonoLoraConfig
from mono_peft.layer import MonoLoraLayer


@every_row
def test_it_starts_at_the_base_model(name):
    torch.testing.assert_close(output(adapted(name, init_weights=True), name), output(base_of(name), name))


@every_row
def test_training_moves_the_adapter_and_nothing_else(name):
    model = adapted(name).train()
    before = weights(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        output(model, name).square().mean().backward()
        optimizer.step()
    trained = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    parts = (model.prefix, ".modules_to_save.", "trainable_tokens_delta")
    assert trained == {n for n in before if any(part in n for part in parts)}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


@every_row
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_it_is_the_same(name, tmp_path, low_cpu_mem_usage):
    model = adapted(name)
    expected = output(model, name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(output(loaded, name), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert all(p.device.type == "cpu" for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(base_of(name), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@every_row
def test_the_state_dict_has_the_adapter_without_its_name(name, tmp_path):
    model = adapted(name)
    if Version("0.21") <= PEFT:  # older PEFT mixes such adapters up in every method but LoRA
        model.add_adapter("efaul", config_of(name))  # a part of "default"
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    also_saved = (model.prefix, ".head.", "lm_head", "classifier", "token_adapter")
    assert all(any(part in n for part in also_saved) for n in tensors)
    assert not [n for n in tensors if ".default" in n or "efaul" in n]
    model.save_pretrained(tmp_path, selected_adapters=["default"], save_embedding_layers=False)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == tensors.keys()
    assert not (tmp_path / "efaul").exists()
    fresh = adapted(name)
    for tensor in tensors.values():
        tensor += 1
    result = set_peft_model_state_dict(fresh, dict(tensors))  # older PEFT adds to it
    assert not result.unexpected_keys
    loaded = get_peft_model_state_dict(fresh, save_embedding_layers=False)
    assert all(torch.equal(loaded[n], tensors[n]) for n in tensors)


@every_row
def test_configurations_survive_json_copies_and_pickle(name, tmp_path):
    config = config_of(name)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "MONOLORA"
    for found in (
        PeftConfig.from_pretrained(tmp_path),
        MonoLoraConfig.from_pretrained(tmp_path),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert type(found) is MonoLoraConfig
        assert found.to_dict() == config.to_dict()
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored | {"from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert MonoLoraConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@every_row
def test_disabled_it_is_the_base_and_enabled_itself_again(name):
    model, base = adapted(name), base_of(name)
    expected = output(model, name)
    assert not torch.allclose(output(base, name), expected)
    with model.disable_adapter():
        torch.testing.assert_close(output(model, name), output(base, name))
    assert torch.equal(output(model, name), expected)


@every_row
def test_several_adapters_are_kept_apart(name):
    model = adapted(name)
    first = output(model, name)
    torch.manual_seed(2)
    model.add_adapter("second", config_of(name, r=2))
    assert torch.equal(output(model, name), first)
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".second." in n} == set()
    model.set_adapter("second")
    assert model.active_adapter == "second"
    assert not torch.allclose(output(model, name), first)
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".default." in n} == set()
    assert [n for n, p in model.named_parameters() if p.requires_grad and ".second." in n]
    model.set_adapter("default")
    assert torch.equal(output(model, name), first)


@every_row
@pytest.mark.parametrize("active", [True, False])
def test_deleting(name, active):
    model = adapted(name)
    expected = output(model, name)
    model.add_adapter("gone", config_of(name))
    if active:
        model.set_adapter("gone")
    model.delete_adapter("gone")
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert not [n for n, _ in model.named_modules() if ".gone" in n]
    assert torch.equal(output(model, name), expected)
    with pytest.raises(ValueError, match="Adapter unknown does not exist"):
        model.delete_adapter("unknown")


@every_row
def test_the_last_adapter_can_go_too(name):
    if Version("0.19") > PEFT:
        pytest.skip("PEFT 0.18 keeps the name of a deleted adapter active")
    model = adapted(name)
    model.delete_adapter("default")
    assert model.active_adapters == []
    output(model.base_model, name)


@every_row
def test_unloading_gives_the_base_back(name):
    base = base_of(name)
    names, expected = list(base.state_dict()), output(base, name)
    unloaded = get_peft_model(base, config_of(name)).eval().unload()
    assert list(unloaded.state_dict()) == names
    assert not [m for m in unloaded.modules() if isinstance(m, MonoLoraLayer)]
    assert Version("0.19") > PEFT or not hasattr(unloaded, "peft_config")
    if "modules_to_save" not in ROWS[name].options and ROWS[name].options.get("task_type") != "SEQ_CLS":
        torch.testing.assert_close(output(unloaded, name), expected)


@every_row
def test_merging_is_refused_and_changes_nothing(name):
    model = adapted(name)
    expected = output(model, name)
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(NotImplementedError, match="merge"):
            merge()
        assert torch.equal(output(model, name), expected)
    for layer in model.modules():
        if isinstance(layer, MonoLoraLayer):
            with pytest.raises(NotImplementedError, match="merge"):
                layer.merge()
            assert not layer.merged


@every_row
def test_deep_copies_and_pickles_are_whole(name):
    model = adapted(name)
    expected = output(model, name)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, name), expected)
        next(p for n, p in twin.named_parameters() if "monolora_" in n).data.zero_()
        assert torch.equal(output(model, name), expected)


@every_row
def test_status(name):
    model = adapted(name)
    model.add_adapter("second", config_of(name))
    layers = [n for n, m in model.base_model.model.named_modules() if isinstance(m, MonoLoraLayer)]
    status = {layer.name: layer for layer in get_layer_status(model) if layer.module_type.startswith("monolora.")}
    assert status.keys() == {f"model.{n}" for n in layers}
    for layer in status.values():
        assert layer.enabled
        assert layer.active_adapters == ["default"]
        assert layer.available_adapters == ["default", "second"]
        assert layer.merged_adapters == []
        assert layer.requires_grad == {"default": True, "second": False}
        assert layer.devices == {"default": ["cpu"], "second": ["cpu"]}
    whole = get_model_status(model)
    assert whole.peft_types == {"default": "MONOLORA", "second": "MONOLORA"}
    assert whole.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert whole.enabled is True


@every_plain_row
def test_an_adapter_for_each_row_of_a_batch(name):
    model = adapted(name)
    torch.manual_seed(2)
    model.add_adapter("second", config_of(name, r=2))
    model.eval()
    wanted = ["second", "__base__", "default", "second"]
    found = output(model, name, adapter_names=wanted)
    expected = {"__base__": output(base_of(name), name)}
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        expected[adapter] = output(model, name)
    assert not torch.allclose(expected["default"], expected["second"])
    for i, adapter in enumerate(wanted):
        torch.testing.assert_close(found[i], expected[adapter][i], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
        output(model, name, adapter_names=wanted[:2])
    with pytest.raises(ValueError, match="non-existing adapter"):
        output(model, name, adapter_names=["third"] * 4)
    with pytest.raises(ValueError, match="training mode"):
        output(model.train(), name, adapter_names=wanted)


def test_saved_modules_per_row():
    model = adapted("mlp")
    torch.manual_seed(2)
    model.add_adapter("second", config_of("mlp"))
    model.base_model.model.head.modules_to_save["second"].weight.data += 1
    model.eval()
    found = output(model, "mlp", adapter_names=["second", "default", "__base__", "second"])
    model.set_adapter("second")
    torch.testing.assert_close(found[[0, 3]], output(model, "mlp")[[0, 3]])
    torch.testing.assert_close(found[2], output(base_of("mlp"), "mlp")[2])


@pytest.mark.parametrize(
    "name",
    [
        "llama all-linear, dropout",
        "llama, bias of the encoder",
        "llama, topk",
        "gpt2",
        "mlp",
        "convnet",
        "signals",
        "tokens",
        "mixtral experts",
        "mixtral experts, bias of the encoder",
    ],
)
def test_compiled_without_graph_breaks_it_is_equal(name):
    model = adapted(name)
    expected = output(model, name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(output(compiled, name), expected)
    expected.square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    output(compiled, name).square().mean().backward()
    for n, p in model.named_parameters():
        if n in gradients:
            torch.testing.assert_close(p.grad, gradients[n])
    torch._dynamo.reset()


@every_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_bases_and_autocast(name, dtype):
    expected = output(adapted(name), name)
    torch.manual_seed(0)
    base = base_of(name).to(dtype)
    torch.manual_seed(1)
    model = get_peft_model(base, config_of(name)).eval()
    assert {p.dtype for n, p in model.named_parameters() if "monolora_" in n} == {torch.float32}
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(name).items()}
    result = model(**batch)
    result = result if isinstance(result, torch.Tensor) else result.logits
    assert result.dtype == dtype
    close = {"rtol": 0.1, "atol": 0.1 * expected.abs().max().item()}
    torch.testing.assert_close(result.float(), expected, **close)
    model = adapted(name)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(output(model, name).float(), expected, **close)


@pytest.mark.parametrize(
    "name", [n for n in ("llama", "llama all-linear, dropout", "gpt2", "t5", "mixtral experts") if n in ROWS]
)
def test_generating_with_the_cache_equals_without(name):
    model = adapted(name)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache, without = (model.generate(input_ids=IDS, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(with_cache, without)
    assert not torch.equal(with_cache, base_of(name).generate(input_ids=IDS, **options))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_drops_the_same(use_reentrant):
    """Reentrant checkpointing computes a pass without and again with gradients."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(
            llama(), MonoLoraConfig(lora_dropout=0.3, init_weights=False, target_modules="all-linear")
        ).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(1)
        model(input_ids=IDS).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], gradient, msg=n)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    "name", [n for n in ("llama all-linear, dropout", "gpt2", "bert", "t5", "mixtral experts") if n in ROWS]
)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(name, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(name, lora_dropout=0).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        output(model, name).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], gradient, msg=n)
        assert gradient.abs().max() > 0


def test_only_one_of_several_adapters_may_train_biases():
    if Version("0.21") > PEFT:
        pytest.skip("older PEFT does not save the biases, so that they are refused altogether")
    model = get_peft_model(MLP(), config_of("mlp", bias="all"))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("second", config_of("mlp", bias="all"))
