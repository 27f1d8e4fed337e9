"""What test_experts_launch.py launches: trains an adapter on fused experts by transformers' Trainer for 6 steps.

    accelerate launch --config_file FILE experts_worker.py FOLDER BATCH_OF_A_PROCESS [--resume]

Writes FOLDER/adapter, and FOLDER/checkpoint-3 after step 3; with --resume, starts from there and writes
FOLDER/resumed.
"""

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from mono_peft import MonoLoraConfig


def main(folder: Path, batch: int, resume: bool) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch, max_steps=6, learning_rate=5e-3, save_steps=3, use_cpu=True,
        lr_scheduler_type="constant", report_to=[], max_grad_norm=0,
    )  # fmt: skip
    base = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=8))
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(base, MonoLoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets))
    ids = torch.randint(0, 50, (48, 8), generator=torch.Generator().manual_seed(1))
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    trainer.save_model(str(folder / ("resumed" if resume else "adapter")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "--resume" in sys.argv)
