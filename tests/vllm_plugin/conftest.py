"""Tests with vLLM itself, in an environment of its own (`make test-vllm`): a small Llama, its adapters, an engine.

What vLLM serves is compared with transformers and PEFT in float32, on the CPU.
"""

import gc
import os
from contextlib import contextmanager

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: it starts in seconds
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mono_peft import MonoLoraConfig

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": LoraConfig(r=8, lora_alpha=16, target_modules=ALL),
    "relu": MonoLoraConfig(r=8, lora_alpha=16, target_modules=ALL),
    "identity": MonoLoraConfig(r=8, lora_alpha=16, target_modules=ALL, activation="identity"),
    "sigmoid": MonoLoraConfig(
        r=4,
        monolora_alpha=4,
        target_modules=["q_proj", "v_proj", "down_proj"],
        activation="sigmoid",
        use_rslora=True,
        rank_pattern={"v_proj": 6, "layers.1.self_attn.q_proj": 3},
        alpha_pattern={"down_proj": 2},
    ),
    "softplus": MonoLoraConfig(
        r=5, monolora_alpha=2, target_modules=["gate_proj", "up_proj", "o_proj"], activation="softplus"
    ),
    "relu2": MonoLoraConfig(
        r=8, monolora_alpha=4, target_modules=ALL, activation="relu2", layers_to_transform=[1], use_rslora=True
    ),
    "relu6": MonoLoraConfig(r=8, monolora_alpha=8, target_modules="all-linear", activation="relu6"),
    "lora_embedding": LoraConfig(r=8, lora_alpha=4, target_modules=["embed_tokens", "q_proj"]),
    "embedding": MonoLoraConfig(
        r=6, monolora_alpha=4, target_modules=["embed_tokens", "q_proj"], activation="softplus"
    ),
    "topk": MonoLoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=ALL,
        activation="topk",
        k=3,
        rank_pattern={"v_proj": 4, "layers.1.*q_proj": 3},
    ),
    "head": MonoLoraConfig(r=8, monolora_alpha=4, target_modules=["lm_head", "q_proj"]),
}
# Greedy answers of a model with random weights soon repeat a token, unless its weights are this large.
SPREAD = 0.12


def save_adapter(base, config, folder, seed=0):
    """An adapter whose weights are all random, so that every module changes the answers."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.25 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """`base`, a Llama with 2 layers, with a tokenizer of bytes, and an adapter of each of `ADAPTERS` beside it."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=512,
        initializer_range=SPREAD,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2} | {letter: i + 3 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder / "base")
    for seed, (name, adapter) in enumerate(ADAPTERS.items()):
        save_adapter(folder / "base", adapter, folder / name, seed)
    return folder


class Reference:
    """What transformers and PEFT say: greedy tokens and log-probabilities of an adapter, or of the base."""

    def __init__(self, folder):
        self.folder = folder
        self.models = {}

    def model(self, name):
        if name not in self.models:
            model = AutoModelForCausalLM.from_pretrained(self.folder / "base", dtype=torch.float32)
            if name != "base":
                model = PeftModel.from_pretrained(model, self.folder / name)
            self.models[name] = model.eval()
        return self.models[name]

    @torch.no_grad()
    def answer(self, name, prompt, length):
        """The tokens of the greedy answer and the log-probability of each."""
        tokens = list(prompt)
        for _ in range(length):
            tokens.append(int(self.model(name)(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(prompt) :], self.log_probabilities(name, tokens)[len(prompt) - 1 :]

    @torch.no_grad()
    def log_probabilities(self, name, tokens):
        """Of each token but the first, given those before it."""
        logs = self.model(name)(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return logs[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1).tolist()


@pytest.fixture(scope="session")
def reference(folder):
    return Reference(folder)


@contextmanager
def engine(folder, **options):
    """vLLM on the base of `folder`, in this process; gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {
        "enable_lora": True,
        "max_loras": 8,
        "max_cpu_loras": 16,
        "max_lora_rank": 8,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 32,
        "enable_prefix_caching": False,
    }
    llm = LLM(str(folder / "base"), **settings | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def request(folder, name, number=None):
    """The request for an adapter; None for the base."""
    from vllm.lora.request import LoRARequest

    numbers = {adapter: i for i, adapter in enumerate(ADAPTERS, 1)}
    return None if name == "base" else LoRARequest(name, number or numbers[name], str(folder / name))


def prompts(count, seed=0, lengths=(7, 13, 40)):
    """Random tokens, without those that have a meaning."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(lengths), (count,), generator=generator)
    return [torch.randint(3, 300, (lengths[i],), generator=generator).tolist() for i in picked]


def generate(llm, folder, batch, length, prompt_logs=False, requests=None):
    """Greedy answers to pairs of an adapter and a prompt, all in one batch: tokens, and log-probabilities of each."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=length, logprobs=0, prompt_logprobs=0 if prompt_logs else None, ignore_eos=True
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for _, prompt in batch],
        sampling,
        lora_request=requests or [request(folder, name) for name, _ in batch],
        use_tqdm=False,
    )
    return [
        (
            list(output.outputs[0].token_ids),
            [next(iter(logs.values())).logprob for logs in output.outputs[0].logprobs],
            [next(iter(logs.values())).logprob for logs in (output.prompt_logprobs or [])[1:]],
        )
        for output in outputs
    ]


def assert_equal(answers, batch, reference, length):
    """Tokens as transformers and PEFT give them, and log-probabilities within 1e-4."""
    for (name, prompt), (tokens, logs, prompt_logs) in zip(batch, answers, strict=True):
        expected, expected_logs = reference.answer(name, prompt, length)
        assert tokens == expected, name
        assert logs == pytest.approx(expected_logs, abs=1e-4), name
        if prompt_logs:
            assert prompt_logs == pytest.approx(reference.log_probabilities(name, prompt), abs=1e-4), name
