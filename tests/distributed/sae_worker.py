"""What test_sae_launch.py launches: trains a sparse autoencoder, in one process or several, with checkpoints.

torchrun --nproc_per_node 2 sae_worker.py FOLDER EPOCHS
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from vision_bench import sae, storage


def main(folder: Path, epochs: int) -> None:
    accelerator = Accelerator(cpu=True)
    x = torch.randn(400, 12, generator=torch.Generator().manual_seed(0)) ** 3 + 0.5
    settings = {"batch_size": 40, "log_every": 4, "checkpoint_every": 7}
    result = sae.fit(x, 128, 2, epochs=epochs, accelerator=accelerator, checkpoint_dir=folder / "training", **settings)
    if accelerator.is_main_process:
        header = {"log": result.log, "processes": accelerator.num_processes}
        storage.save(folder / "sae.safetensors", "autoencoder", result.autoencoder.state_dict(), header)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
