"""What test_provenance_launch.py launches: trains an adapter with ProvenanceCallback, on this process's share of rows.

    provenance_worker.py FOLDER [--resume] [--one_pass_a_step]

Writes checkpoints of steps 3 and 6 and the adapter into FOLDER/adapter; --resume continues from step 3.
"""

import os
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from mono_peft import MonoLoraConfig
from mono_peft.provenance import ProvenanceCallback


def main(folder: Path, resume: bool, passes: int) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    config = MonoLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False)
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_steps=3, max_steps=6,
        learning_rate=1e-2, per_device_train_batch_size=4 // world, gradient_accumulation_steps=passes,
    )  # fmt: skip
    ids = torch.randint(0, 50, (24, 8), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(get_peft_model(base, config), arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer.add_callback(ProvenanceCallback(trainer, 4))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    if trainer.is_world_process_zero():  # where nobody waits for the others
        trainer.save_model(str(folder / "adapter"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--resume" in sys.argv, 1 if "--one_pass_a_step" in sys.argv else 2)
