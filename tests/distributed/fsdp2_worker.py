"""What test_fsdp2.py launches: trains an adapter for 6 steps, on the whole batch or on this rank's share of it.

    torchrun --nproc_per_node 2 fsdp2_worker.py FOLDER [--resume] [--experts | --silence]

Writes FOLDER/adapter, and FOLDER/checkpoint after step 3; --resume starts from there. With --experts the model is a
mixture of experts, and the adapter is on these too. With --silence the adapter has a bias and is kept silent on texts.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mono_peft import MonoLoraConfig, Silence

STEPS, SAVED_AT = 6, 3


def main(folder: Path, resume: bool, experts: bool, silent: bool, topk: bool) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4}
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None
    base = (
        MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=4, num_local_experts=4))
        if experts
        else LlamaForCausalLM(LlamaConfig(**sizes))
    )
    sigma = {"r": 32, "activation": "topk", "k": 2} if topk else {"r": 4}  # one process computes active units alone
    config = MonoLoraConfig(
        target_modules="all-linear", target_parameters=targets, task_type="CAUSAL_LM", encoder_bias=silent, **sigma
    )
    model = get_peft_model(base, config)
    if world > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world,))
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        weights = [p for n, p in model.named_parameters() if "monolora_" in n]
        assert len(weights) == 2 * (6 if experts else 7) * (2 + silent)
        assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in weights)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    silent_ids = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(2))
    silence = Silence(model, [{"input_ids": silent_ids}], rows_per_step=10) if silent else None
    batches = torch.randint(0, 50, (STEPS, 4, 8), generator=torch.Generator().manual_seed(1))
    first = 0
    if resume:
        first = SAVED_AT
        states = get_state_dict(model, optimizer)
        dcp.load({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder / "checkpoint")
        set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    for step in range(first, STEPS):
        ids = batches[step].chunk(world)[rank]
        model(input_ids=ids, labels=ids).loss.backward()
        if silence is not None:
            silence.add_gradients(step)
        optimizer.step()
        optimizer.zero_grad()
        if world > 1 and not resume and step + 1 == SAVED_AT:
            states = get_state_dict(model, optimizer)
            dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder / "checkpoint")

    if silence is not None:
        folder.mkdir(parents=True, exist_ok=True)
        measures = {"loss": silence.loss, "fired": silence.fired, "by_module": silence.fired_by_module()}
        (folder / f"measures-{rank}.json").write_text(json.dumps(measures))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / ("resumed" if resume else "adapter"), state_dict=whole)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(f"--{option}" in sys.argv for option in ("resume", "experts", "silence", "topk")))
