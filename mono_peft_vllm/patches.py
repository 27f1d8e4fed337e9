"""Where vLLM is taught MonoLoRA; private places, which is why the tested versions are a range."""

from __future__ import annotations

import functools
import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm.config.lora import LoRAConfig
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from . import sigma

_HEADS = ("lm_head", "score", "classifier")  # modules whose adapters act on logits


def install() -> None:
    """Change this process's vLLM; once."""
    if hasattr(WorkerLoRAManager._load_adapter, "serves_monolora"):
        return
    _wrap_kernels()
    _read_adapters()
    _fill_slots()
    _give_prompts_their_adapter()
    _mark_compiled_graphs()


def _wrap_kernels() -> None:
    original = current_platform.get_punica_wrapper

    def get_punica_wrapper() -> str:
        wrapper = sigma.with_sigma(resolve_obj_by_qualname(original()))
        setattr(sigma, wrapper.__name__, wrapper)  # vLLM imports it by name
        return f"{sigma.__name__}.{wrapper.__name__}"

    current_platform.get_punica_wrapper = get_punica_wrapper


def _read_adapters() -> None:
    original = WorkerLoRAManager._load_adapter

    @functools.wraps(original)
    def _load_adapter(self: WorkerLoRAManager, lora_request: Any) -> Any:
        folder = Path(get_adapter_absolute_path(lora_request.lora_path))
        if not _is_monolora(folder):
            return original(self, lora_request)
        from .adapter import read_adapter  # needs PEFT

        return read_adapter(folder, lora_request.lora_int_id, self)

    _load_adapter.serves_monolora = True  # type: ignore[attr-defined]
    WorkerLoRAManager._load_adapter = _load_adapter


def _is_monolora(folder: Path) -> bool:
    config = folder / "adapter_config.json"
    options = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
    return isinstance(options, dict) and options.get("peft_type") == "MONOLORA"


def _fill_slots() -> None:
    original = LoRAModelManager.activate_adapter

    @functools.wraps(original)
    def activate_adapter(self: LoRAModelManager, lora_id: int) -> bool:
        activated = original(self, lora_id)
        adapter = self._registered_adapters[lora_id]
        activation = getattr(adapter, "monolora_activation", "identity")
        adapts_logits = any(name.endswith(_HEADS) for name in adapter.loras)
        slot = self.lora_index_to_id.index(lora_id)
        for wrapper in self.punica_wrapper_mapping.values():
            if isinstance(wrapper, sigma.SigmaMixin):
                wrapper.fill_slot(slot, activation, adapts_logits, getattr(adapter, "monolora_k", None))
            elif activation != "identity":
                raise ValueError(f"MonoLoRA adapters cannot be served with vLLM's {type(wrapper).__name__}.")
        return activated

    LoRAModelManager.activate_adapter = activate_adapter


def _give_prompts_their_adapter() -> None:
    """Compute the log-probabilities of a prompt with its own adapter of the output head.

    vLLM takes the prompt's tokens, which it passes to the head one request after another, for the batch's requests.
    """
    original = GPUModelRunner._get_prompt_logprobs_dict

    @functools.wraps(original)
    def _get_prompt_logprobs_dict(self: Any, hidden_states: Any, num_scheduled_tokens: Any) -> dict[str, Any]:
        if not self.lora_config or not self.num_prompt_logprobs:
            return original(self, hidden_states, num_scheduled_tokens)
        manager = self.lora_manager._adapter_manager
        asked = self.num_prompt_logprobs  # by request; vLLM removes those that are done
        answers: dict[str, Any] = {}
        try:
            for request, count in list(asked.items()):
                place = self.input_batch.req_id_to_index.get(request)
                adapter = 0 if place is None else int(self.input_batch.request_lora_mapping[place])
                slot = manager.lora_index_to_id.index(adapter) if adapter else -1
                self.num_prompt_logprobs = {request: count}
                with ExitStack() as stack:
                    for wrapper in manager.punica_wrapper_mapping.values():
                        if isinstance(wrapper, sigma.SigmaMixin):
                            stack.enter_context(wrapper.all_requests_of(slot))
                    answers |= original(self, hidden_states, num_scheduled_tokens)
                if not self.num_prompt_logprobs:
                    del asked[request]
        finally:
            self.num_prompt_logprobs = asked
        return answers

    GPUModelRunner._get_prompt_logprobs_dict = _get_prompt_logprobs_dict


def _mark_compiled_graphs() -> None:
    """Keep vLLM from loading a graph that it compiled and stored without sigma, or with another version of it."""
    original = LoRAConfig.compute_hash
    version = hashlib.sha256(Path(sigma.__file__).read_bytes()).hexdigest()[:16]

    @functools.wraps(original)
    def compute_hash(self: LoRAConfig) -> str:
        return f"{original(self)}-mono_peft-{version}"

    LoRAConfig.compute_hash = compute_hash
