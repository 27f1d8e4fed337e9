"""vLLM serves MonoLoRA adapters beside LoRA's: a plugin that vLLM finds in its environment and loads by itself.

Nothing is to be called: where `mono-peft` is installed beside vLLM, `--lora-modules`, `/v1/load_lora_adapter` and
`LoRARequest` take MonoLoRA adapters. The package stands apart from `mono_peft`, whose import brings PEFT, because vLLM
loads it in each of its processes, with or without a MonoLoRA adapter.
"""

from __future__ import annotations

import logging

from packaging.version import InvalidVersion, Version

TESTED_VLLM = ("0.32", "0.33")  # from, below


def register() -> None:
    """Teach this process's vLLM MonoLoRA; a second call changes nothing.

    With a vLLM outside the tested range it warns and changes nothing, so that vLLM refuses MonoLoRA adapters, whose
    weights and options it does not know.
    """
    import vllm

    if not _is_tested(vllm.__version__):
        logging.getLogger("vllm.mono_peft").warning(
            "mono_peft serves MonoLoRA adapters with vllm >= %s, < %s, and found %s: they will be refused. Install "
            'a tested version, or a mono-peft that knows this one: pip install --upgrade "mono-peft".',
            *TESTED_VLLM,
            vllm.__version__,
        )
        return
    from .patches import install

    install()


def _is_tested(version: str) -> bool:
    lowest, below = TESTED_VLLM
    try:
        return Version(lowest) <= Version(Version(version).base_version) < Version(below)
    except InvalidVersion:  # "dev", of a build from source without its history
        return False
