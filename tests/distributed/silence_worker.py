"""What test_silence_launch.py launches: trains an adapter with Silence for 6 steps, on this process's share of 8 rows.

    silence_worker.py BASE FOLDER [--other_texts] [--accumulate] [--bias] [--lower] [--clip]

Writes FOLDER/adapter and FOLDER/log.json. --other_texts gives each process silent texts of its own. With several
processes a part of the cache is on disk. --accumulate takes the rows of a step in two passes, with activation
checkpointing; --bias gives the encoders a bias, which --lower lowers after the fourth step; --clip clips gradients.
"""

import json
import os
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from mono_peft import MonoLoraConfig, Silence


def main(base_folder: Path, folder: Path, *options: str) -> None:
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    passes = 1 + ("--accumulate" in options)
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=6,
        learning_rate=1e-2, per_device_train_batch_size=8 // world // passes, gradient_accumulation_steps=passes,
        gradient_checkpointing=passes > 1, logging_steps=1, max_grad_norm=float("--clip" in options),
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(base_folder)  # ZeRO-3 cuts it up here
    torch.manual_seed(0)
    adapter = MonoLoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", encoder_bias="--bias" in options, init_weights=False
    )
    model = get_peft_model(base, adapter)
    ids = torch.randint(0, 50, (48, 8), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)
    seed = 2 + rank * ("--other_texts" in options)
    silent = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(seed))
    budget = 2**20 if world == 1 else 10_000
    lower_every = 4 if "--lower" in options else None
    batches = [{"input_ids": silent}]
    silence = Silence(trainer.model, batches, rows_per_step=10, memory_budget=budget, lower_every=lower_every)
    silence.attach(trainer)
    trainer.train()
    assert (silence.mapped_bytes > 0) == (world > 1)
    trainer.save_model(folder / "adapter")
    if trainer.is_world_process_zero():
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
        (folder / "engine.json").write_text(json.dumps(str(trainer.accelerator.state)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
