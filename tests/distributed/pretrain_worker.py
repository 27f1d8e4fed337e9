"""What test_pretrain_launch.py launches: pretraining and extraction of features, in one process or several.

torchrun --nproc_per_node 2 pretrain_worker.py FOLDER [STEP_TO_STOP_AT]
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from vision_bench import features, models, pretrain, storage
from vision_bench.data import load_images


def main(folder: Path, stop: int | None) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    features.SHARD_ROWS = 64
    train, test = load_images("digits", "train").subset(torch.arange(256)), load_images("digits", "test")
    step = pretrain._Run._step

    def stopping(run, *batch):
        if run.step_number == stop:
            sys.exit(0)
        step(run, *batch)

    pretrain._Run._step = stopping
    model_config = models.ModelConfig(backbone="small_conv", projector_hidden=32, projector_out=16)
    config = pretrain.PretrainConfig(epochs=4, batch_size=64, warmup_epochs=1)
    settings = {"monitor_epochs": 2, "checkpoint_minutes": 0 if stop else 10}
    model, _ = pretrain.pretrain(folder / "model", model_config, config, train, test, accelerator, **settings)
    features.extract(folder / "features", model, test, "test", models.LAYERS)
    mine = {"fingerprint": torch.tensor([int(models.fingerprint(model)[-8:], 16)])}
    storage.save(folder / f"rank{accelerator.process_index}.safetensors", "rank", mine, {})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
