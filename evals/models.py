"""A base model and its adapters: checked before any weights are loaded, then several adapters on one loaded base."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import file_exists, hf_hub_download, snapshot_download, try_to_load_from_cache
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

import mono_peft  # noqa: F401 - registers MonoLoRA with PEFT
from evals.settings import Adapter
from mono_peft.serve import TOKENIZER_FILES

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def method_and_seed(adapter: str | None) -> tuple[str, int | None]:
    """Method and training seed that an adapter's name tells, as recipes write it: `x/lora-seed0/adapter`.

    Without a name it is ("base", None); a name that tells no seed is a method of its own.
    """
    if adapter is None:
        return "base", None
    match = re.search(r"([^/\\=]*?)[-_.]?seed[-_]?(\d+)(?!.*seed[-_]?\d)", adapter)
    return (match[1] or adapter, int(match[2])) if match else (adapter, None)


def load_tokenizer_and_config(
    name: str, revision: str | None = None
) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Tokenizer and configuration of a model; no weights are loaded, so a model that cannot be had fails at once.

    Raises:
        ValueError: `name` is neither a folder with a model's files nor to be had from the hub, or a file of weights
            in the folder is cut off.
    """
    for path in sorted(Path(str(name)).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"The weights {path} cannot be read ({error}): fetch the file again.") from None
    try:
        return (
            AutoTokenizer.from_pretrained(name, revision=revision),
            AutoConfig.from_pretrained(name, revision=revision),
        )
    except (OSError, ValueError) as error:
        advice = (
            "The folder lacks a model's or tokenizer's files."
            if Path(str(name)).is_dir()
            else (
                "It is no local folder; a model on the hub needs network access, and a gated one its licence accepted "
                "and `hf auth login`."
            )
        )
        raise ValueError(f"Cannot load the model {name!r} ({str(error).strip().splitlines()[0]}) {advice}") from None


def check_base(name: str) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """`load_tokenizer_and_config`, and the weights are files that need no unpickling.

    Raises:
        ValueError: as there, or there are no safetensors.
    """
    tokenizer, config = load_tokenizer_and_config(name)
    folder = Path(name)
    if (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"The model folder {name} holds an {CONFIG_FILE} too, and transformers would load that adapter with the "
            "model without a word: move the adapter into a folder of its own."
        )
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ValueError(f"The model folder {name} holds no .safetensors; weights in other formats are not read.")
    if not folder.is_dir() and not _hub_has_safetensors(name):
        raise ValueError(
            f"The model {name} on the hub has no .safetensors; weights in other formats are not read. Convert them "
            "once (load with transformers, `save_pretrained`) and name that folder."
        )
    return tokenizer, config


def _hub_has_safetensors(name: str) -> bool:
    """Whether the cache or the hub has a model's safetensors; only names are asked for."""
    files = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return True
    try:
        return any(file_exists(name, file) for file in files)
    except OSError:  # no network
        return False


def hub_commit(name: str, revision: str | None = None) -> str | None:
    """The commit of a model of the hub that is in the cache, None for a folder.

    Raises:
        ValueError: the cache does not say which it is.
    """
    if Path(name).is_dir():
        return None
    commit = extract_commit_hash(cached_file(name, "config.json", revision=revision), None)
    if commit is None:
        raise ValueError(f"The cache does not say of which commit of {name} its files are; download it anew.")
    return str(commit)


def check_adapter(adapter: Adapter, model: str, config: PretrainedConfig) -> Path:
    """Check an adapter's files against its base: registered method, same base model, weights that fit it exactly.

    Only headers are read and the base stands without weights on the meta device.

    Returns:
        The folder with the adapter's files, in the cache if it is one of the hub.

    Raises:
        ValueError: one of these does not hold; says which adapter and what to do.
    """
    where = f"The adapter {adapter.text!r}"
    weights = _adapter_file(adapter, WEIGHTS_FILE)
    _adapter_file(adapter, CONFIG_FILE)
    try:
        peft_config = PeftConfig.from_pretrained(adapter.source)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} has a {CONFIG_FILE} that PEFT cannot read ({error!r}).") from None
    trained_on = peft_config.base_model_name_or_path
    # A folder may have moved since the training, or be a copy of a model on the hub: its own name stays.
    if trained_on and Path(trained_on).name != Path(model).name:
        raise ValueError(
            f"{where} was trained on {trained_on!r}, not on {model!r}: use --model {trained_on}. If the two are the "
            f"same model, correct `base_model_name_or_path` in its {CONFIG_FILE}."
        )
    try:
        with safe_open(weights, framework="pt") as file:
            saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{where}: its {WEIGHTS_FILE} cannot be read ({error}).") from None
    try:
        with torch.device("meta"):
            model_without_weights = get_peft_model(
                AutoModelForCausalLM.from_config(config), copy.deepcopy(peft_config)
            )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} does not fit {model!r}: {error}") from None
    expected = {
        key: tuple(tensor.shape)
        for key, tensor in get_peft_model_state_dict(model_without_weights, save_embedding_layers=False).items()
    }
    # PEFT may save embeddings of the base with an adapter, and loads them.
    own = model_without_weights.state_dict()
    expected |= {key: tuple(own[key].shape) for key in saved if key in own}
    for key in sorted(expected.keys() | saved.keys()):
        if expected.get(key) != saved.get(key):
            raise ValueError(
                f"{where} does not fit {model!r}: {key} has the shape {saved.get(key, 'absent')} in its file, the "
                f"model needs {expected.get(key, 'none of that name')}. Give the model that it was trained on."
            )
    folder = Path(weights).parent
    if not Path(adapter.source).is_dir():
        snapshot_download(adapter.source, revision=folder.name, allow_patterns=list(TOKENIZER_FILES))
    return folder


def adapter_tokenizer(adapter: Adapter, folder: Path, base: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template that an adapter was saved with, `base` itself where they are none or the same.

    Args:
        folder: with the adapter's files.
        base: the tokenizer of the adapter's base model.

    Raises:
        ValueError: it cannot be read, or its tokens are not those of the base: they would be embedded as others.
    """
    where = f"The adapter {adapter.text!r}"
    template = folder / "chat_template.jinja"
    if any(path != template for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{where} has a tokenizer that cannot be read ({str(error).strip().splitlines()[0]}): restore its "
                "files, or remove them to use the base model's."
            ) from None
    elif template.is_file():
        tokenizer = copy.deepcopy(base)
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    else:
        return base
    own, ids = tokenizer.get_vocab(), base.get_vocab()
    if own != ids:
        other = sorted((token for token in own.keys() | ids.keys() if own.get(token) != ids.get(token)), key=str)
        shown = ", ".join(f"{token!r} ({own.get(token)} there, {ids.get(token)} in the base)" for token in other[:3])
        raise ValueError(
            f"{where} has a tokenizer with other tokens than its base model: {len(other)} differ, such as {shown}. "
            "Merge it into a model with that tokenizer and give that as --model; or remove the tokenizer's files from "
            "the adapter's folder, if it was trained with the base model's."
        )
    return base if _behaviour(tokenizer) == _behaviour(base) else tokenizer


def _behaviour(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    """Settings that decide how a tokenizer writes a conversation, without those that the caller sets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {}
    pipeline = {name: part for name, part in parts.items() if name not in ("padding", "truncation")}
    return pipeline, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token


def _adapter_file(adapter: Adapter, name: str) -> str:
    """The path of one of an adapter's files, fetched from the hub where it is no local folder."""
    folder = Path(adapter.source)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise ValueError(
                f"The adapter folder {adapter.source} has no {name}; weights in other formats are not read."
            )
        return str(folder / name)
    try:
        return str(hf_hub_download(adapter.source, name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Cannot load {name} of the adapter {adapter.source!r} ({str(error).strip().splitlines()[0]}). It is no "
            "local folder; one on the hub needs network access, and a gated one `hf auth login`."
        ) from None


def load_base(name: str, dtype: str, load_in_4bit: bool, revision: str | None = None) -> PreTrainedModel:
    """The base model in eval mode on the GPUs, or on the CPU where there are none; weights from safetensors only.

    Of its generation config only the control tokens stay: a repetition penalty, suppressed tokens or beams that a
    checkpoint asks for would act in greedy decoding too.

    Args:
        name: folder or name on the hub.
        revision: commit of a model on the hub.
        dtype: one of `evals.settings.DTYPES`; "auto" is that of the checkpoint.
        load_in_4bit: NF4 with double quantisation through bitsandbytes, computing in `dtype` ("auto": bfloat16).
    """
    quantization = None
    if load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        )
    model = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=dtype,
        quantization_config=quantization,
        device_map="auto" if torch.cuda.is_available() else {"": "cpu"},
        use_safetensors=True,
    )
    control = ("bos_token_id", "eos_token_id", "pad_token_id")
    own = model.generation_config
    left_out = {
        setting: value
        for setting, value in own.to_diff_dict().items()
        if setting not in (*control, "use_cache", "transformers_version") and value and not setting.startswith("_")
    }
    if left_out:
        settings = ", ".join(f"{setting} {value}" for setting, value in left_out.items())
        print(f"The generation config of {name} is not applied ({settings}): answers are decoded as the tasks say.")
    model.generation_config = GenerationConfig(**{token: getattr(own, token) for token in control})
    return model.eval()


@contextmanager
def attached(base: PreTrainedModel, adapter: Adapter) -> Iterator[PeftModel]:
    """`base` with the adapter, in eval mode; afterwards `base` is bit for bit what it was, for the next adapter."""
    # PEFT writes the biases and embeddings of an adapter's file into the base, and `unload` leaves trained copies of
    # whole modules in their place.
    with safe_open(_adapter_file(adapter, WEIGHTS_FILE), framework="pt") as file:
        saved = {key.removeprefix("base_model.model.").replace(".base_layer.", ".") for key in file.keys()}  # noqa: SIM118 - no mapping
    overwritten = {
        name: parameter.detach().clone()
        for name, parameter in base.named_parameters(remove_duplicate=False)  # tied ones may be saved by either name
        if name in saved or name.endswith("bias")
    }
    model = PeftModel.from_pretrained(base, adapter.source, use_safetensors=True).eval()
    originals = {
        name: module.original_module
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    try:
        yield model
    finally:
        if hasattr(model.base_model, "unload"):  # methods that only add to the prompt leave the base alone
            model.unload()
        for name, module in originals.items():
            base.set_submodule(name, module)
        with torch.no_grad():
            for name, value in overwritten.items():
                base.get_parameter(name).copy_(value)
