"""MonoLoraConfig as a drop-in for LoraConfig, and what it says to bad input."""

import dataclasses
import math
import pickle

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig

import mono_peft.config
from mono_peft import MonoLoraConfig


def test_every_default_of_lora_is_accepted():
    default = LoraConfig()
    options = {f.name: getattr(default, f.name) for f in dataclasses.fields(LoraConfig) if f.init}
    options = {name: value for name, value in options.items() if name not in ("peft_type", "peft_version")}
    config = MonoLoraConfig(**options)
    assert (config.r, config.monolora_alpha, config.monolora_dropout) == (8, 8, 0.0)
    assert config.init_weights is True


def test_lora_spellings_are_stored_under_ours():
    config = MonoLoraConfig(r=4, lora_alpha=6, lora_dropout=0.25, init_lora_weights="gaussian", bias="lora_only")
    stored = config.to_dict()
    assert stored["monolora_alpha"] == 6
    assert stored["monolora_dropout"] == 0.25
    assert stored["init_weights"] == "gaussian"
    assert stored["bias"] == "monolora_only"
    assert not [name for name in stored if name.startswith(("lora_", "init_lora"))]


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("lora_alpha", "monolora_alpha", 8),
        ("lora_dropout", "monolora_dropout", 0.0),
        ("init_lora_weights", "init_weights", True),
    ],
)
def test_two_spellings_of_one_option_are_refused(alias, name, value):
    with pytest.raises(ValueError, match=f"`{alias}` and `{name}` are two names of one option"):
        MonoLoraConfig(**{alias: value, name: value})


LORA_ONLY = {
    "use_dora": True,
    "loftq_config": {"loftq_bits": 4},
    "eva_config": object(),
    "corda_config": object(),
    "lora_ga_config": object(),
    "kasa_config": object(),
    "use_qalora": True,
    "use_bdlora": object(),
    "velora_config": {"x": 1},
    "monteclora_config": object(),
    "arrow_config": object(),
    "lora_bias": True,
    "megatron_config": {"x": 1},
}


@pytest.mark.parametrize("option", LORA_ONLY)
def test_options_of_a_linear_update_are_refused_with_the_reason(option):
    with pytest.raises(ValueError, match=f"does not support `{option}=.*: .+ Remove it, or use LoraConfig"):
        MonoLoraConfig(**{option: LORA_ONLY[option]})


def test_ephemeral_offload_is_refused_and_its_default_is_not():
    from peft import LoraRuntimeConfig

    MonoLoraConfig(runtime_config=LoraRuntimeConfig())
    with pytest.raises(ValueError, match="runtime_config"):
        MonoLoraConfig(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "eva", "corda", "loftq", "orthogonal", "lora_ga", 0]
)
def test_linear_initialisations_are_refused(init):
    if init == 0:  # equal to False, but not a choice anybody means
        with pytest.raises(ValueError, match="`init_weights` must be True, False or 'gaussian', got 0"):
            MonoLoraConfig(init_lora_weights=init)
    else:
        with pytest.raises(ValueError, match=f"got '{init}'.*assumes a linear update"):
            MonoLoraConfig(init_lora_weights=init)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "`r` must be a positive integer, got 0"),
        ({"r": -1}, "`r` must be a positive integer, got -1"),
        ({"r": 2.0}, "`r` must be a positive integer, got 2.0"),
        ({"r": True}, "`r` must be a positive integer, got True"),
        ({"rank_pattern": {"q_proj": 0}}, r"`rank_pattern\['q_proj'\]` must be a positive integer"),
        ({"lora_alpha": 0}, "`monolora_alpha` must be a positive, finite number, got 0"),
        ({"lora_alpha": -4}, "`monolora_alpha` must be a positive, finite number"),
        ({"lora_alpha": math.inf}, "`monolora_alpha` must be a positive, finite number"),
        ({"lora_alpha": math.nan}, "`monolora_alpha` must be a positive, finite number"),
        ({"lora_alpha": "8"}, "`monolora_alpha` must be a positive, finite number, got '8'"),
        ({"alpha_pattern": {"v": -1}}, r"`alpha_pattern\['v'\]` must be a positive"),
        ({"lora_dropout": 1.0}, r"`monolora_dropout` must lie in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, r"`monolora_dropout` must lie in \[0, 1\)"),
        ({"activation": "gelu"}, "`activation` must be one of relu, relu2, .*identity, topk; got 'gelu'"),
        ({"bias": "some"}, "`bias` must be 'none', 'all' or 'monolora_only', got 'some'"),
        ({"task_type": "NONSENSE"}, "Invalid task type"),
        (
            {"target_modules": "q.*", "layers_to_transform": [0]},
            "`layers_to_transform` needs `target_modules` as a list",
        ),
        ({"target_modules": ["q"], "layers_pattern": "layers"}, "`layers_pattern` needs `layers_to_transform`"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        MonoLoraConfig(**options)


def test_an_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        MonoLoraConfig(rank=4)


@given(
    r=st.integers(1, 256),
    alpha=st.floats(0.01, 1000),
    dropout=st.floats(0, 0.99),
    activation=st.sampled_from(sorted(mono_peft.layer.ACTIVATIONS)),
    targets=st.lists(st.sampled_from(["q_proj", "k_proj", "v_proj"]), min_size=1, unique=True),
    rslora=st.booleans(),
)
def test_saved_configurations_load_equal(tmp_path_factory, r, alpha, dropout, activation, targets, rslora):
    folder = tmp_path_factory.mktemp("config")
    config = MonoLoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, activation=activation, target_modules=targets, use_rslora=rslora
    )
    config.save_pretrained(folder)
    for cls in (PeftConfig, MonoLoraConfig):
        loaded = cls.from_pretrained(folder)
        assert type(loaded) is MonoLoraConfig
        assert loaded == config


def test_options_of_other_shapes_load_equal(tmp_path):
    config = MonoLoraConfig(layer_replication=[(0, 4), (2, 5)], alora_invocation_tokens=(1, 2), task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    assert MonoLoraConfig.from_pretrained(tmp_path) == config
    assert config.layer_replication == [[0, 4], [2, 5]]


def test_numbers_of_numpy_and_empty_patterns():
    config = MonoLoraConfig(r=numpy.int64(4), lora_alpha=numpy.float32(6), rank_pattern=None, alpha_pattern=None)
    assert (config.r, config.monolora_alpha, config.rank_pattern, config.alpha_pattern) == (4, 6, {}, {})


def test_copies():
    config = MonoLoraConfig(r=4, lora_alpha=6)
    assert dataclasses.replace(config, r=2) == MonoLoraConfig(r=2, lora_alpha=6)
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_newer_format_is_refused(tmp_path):
    config = MonoLoraConfig()
    config.format_version = mono_peft.config.FORMAT_VERSION + 1
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"saved in format 3; this mono_peft reads up to 2. Upgrade mono-peft"):
        PeftConfig.from_pretrained(tmp_path)


def test_the_folder_of_another_method_is_refused(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a LORA adapter, not a MONOLORA one"):
        MonoLoraConfig.from_pretrained(tmp_path)
