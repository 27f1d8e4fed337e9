"""What test_silence_launch.py launches: trains an adapter with Silence for 6 steps, on this process's share of 8 rows.

    silence_worker.py FOLDER [--other_texts]

Writes FOLDER/adapter and FOLDER/log.json. --other_texts gives each process silent texts of its own. With several
processes a part of the cache is on disk.
"""

import json
import os
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from mono_peft import MonoLoraConfig, Silence


def main(folder: Path, other_texts: bool) -> None:
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    model = get_peft_model(base, MonoLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=6,
        learning_rate=1e-2, per_device_train_batch_size=8 // world, logging_steps=1,
    )  # fmt: skip
    ids = torch.randint(0, 50, (48, 8), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)
    silent = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(2 + other_texts * rank))
    budget = 2**20 if world == 1 else 10_000
    silence = Silence(trainer.model, [{"input_ids": silent}], rows_per_step=10, memory_budget=budget)
    assert (silence.mapped_bytes > 0) == (world > 1)
    silence.attach(trainer)
    trainer.train()
    if trainer.is_world_process_zero():
        model.save_pretrained(folder / "adapter")
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--other_texts" in sys.argv)
