"""What the trainings of images share: batches, the loop, and a state on disk that continues it to the same bits.

Every random number of a step comes from the seed and the step's number, so nothing about the past decides a step but
the tensors that the state holds (with the same number of processes, on the CPU or with deterministic GPU kernels).
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.layers import convert_sync_batchnorm
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from vision_bench import storage
from vision_bench.corruptions import seed_of
from vision_bench.data import ImageSet
from vision_bench.runs import locked

STATE = "training.safetensors"
MODEL = "model.safetensors"
LOG = "log.jsonl"
STATE_KIND = "training state"
PRECISIONS = ("no", "bf16")
ORDER, STEP = 0, 1  # streams of random numbers under one seed


class Config(Protocol):
    """The fields of a training's configuration that the loop reads."""

    @property
    def epochs(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Execution:
    """How a training runs; nothing of it changes the result."""

    checkpoint_minutes: float = 10.0  # so often the training state is saved
    compile_model: bool = False  # with torch.compile; for GPUs, on the CPU it seldom pays
    workers: int = 0  # processes that decode streamed images ahead of time; those of a tensor need none
    name: str = "training"  # before the names of what trackers get, and at the progress bar
    progress: bool = False  # show a progress bar in the main process


class Launch(NamedTuple):
    """Where a training runs: its folder, the processes, and how they execute it."""

    folder: Path
    accelerator: Accelerator
    execution: Execution

    @classmethod
    def of(cls, name: str, folder: str | Path, accelerator: Accelerator | None, options: dict[str, Any]) -> Launch:
        """The launch with `options` of `Execution`; by default of one process, and with the name given."""
        return cls(Path(folder), accelerator or Accelerator(), Execution(**{"name": name} | options))

    def held(self) -> AbstractContextManager[None]:
        """Hold the folder for the processes of this launch. Raises ValueError if others are training in it."""
        return locked(self.folder) if self.accelerator.is_main_process else nullcontext()


def check(config: Config, images: int, accelerator: Accelerator) -> None:
    """Raise ValueError unless `images` and the processes can share the batches, in a precision that is supported."""
    if images < config.batch_size:
        raise ValueError(f"batch_size is {config.batch_size} for {images} images; it must not exceed them.")
    if config.batch_size % accelerator.num_processes:
        raise ValueError(f"batch_size is {config.batch_size}; {accelerator.num_processes} processes cannot share it.")
    if accelerator.mixed_precision not in PRECISIONS:
        raise ValueError(f"precision is {accelerator.mixed_precision!r}; it must be one of {', '.join(PRECISIONS)}.")


def described(images: ImageSet) -> dict[str, Any]:
    """Describe training images for a checkpoint, beside their fingerprint: how they were normalised, and their height
    and width in pixels.
    """
    return {"mean": list(images.mean), "std": list(images.std), "image_size": list(images.images.shape[2:])}


def check_validation(train: ImageSet, validation: ImageSet) -> None:
    """Raise ValueError unless both sets have the same classes and are normalised in the same way."""
    if train.class_names != validation.class_names:
        raise ValueError(
            f"validation has {validation.num_classes} classes and train {train.num_classes}, or the same in another "
            "order; both must have the same class_names."
        )
    values, expected = described(validation), described(train)
    if changed := [f"{k} {values[k]} instead of {expected[k]}" for k in expected if values[k] != expected[k]]:
        raise ValueError(f"validation has another normalisation or size than train: {', '.join(changed)}.")


def share_batch_norm(model: nn.Module, accelerator: Accelerator) -> None:
    """Let the processes share the statistics of batch normalisation, so that they train as one with the whole batch.

    PyTorch can do so on CUDA only. Elsewhere a warning says that the number of processes decides the result.
    """
    if accelerator.num_processes == 1:
        return
    if accelerator.device.type == "cuda":
        convert_sync_batchnorm(model)
    elif any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        warnings.warn(
            f"on {accelerator.device.type} each of the {accelerator.num_processes} processes normalises by the "
            "statistics of its own part of the batch: another number of processes gives another model.",
            stacklevel=2,
        )


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The whole entries of a folder's log, none if it has no log."""
    path = folder / LOG
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill can cut the last one


class Training:
    """One training: the tensors that change, and the loop over the steps that change them.

    A subclass defines `step`, `measure` and `save_model`, in `remedy` what to do against divergence, in `online_top1`
    what the log calls the accuracy on the batches, and, if its state has more than the module, the optimiser and
    `sums`, `more_state` and `set_more_state`. The folder's state, if there is one, is loaded here.

    Args:
        identity: everything that decides the result, JSON-serialisable; a folder of another training is refused.
        data: at least a batch of images; what an epoch leaves over of the last batch waits for another one.
        module: with all weights and buffers of the state, on the accelerator's device.
        schedule: of timm, updated by the step's number.
        monitor_epochs: so often `measure` is asked; at the last epoch it always is.
    """

    remedy: str
    online_top1: str

    def __init__(
        self,
        launch: Launch,
        identity: Mapping[str, Any],
        config: Config,
        data: ImageSet,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Scheduler,
        monitor_epochs: int,
    ) -> None:
        self.folder, accelerator, execution = launch
        self.accelerator, self.execution = accelerator, execution
        self.identity, self.monitor_epochs = identity, monitor_epochs
        self.epochs, self.batch_size, self.seed = config.epochs, config.batch_size, config.seed
        self.data, self.raw, self.optimizer, self.schedule = data, module, optimizer, schedule
        self.steps_per_epoch = len(data) // config.batch_size
        self.total = config.epochs * self.steps_per_epoch
        # Over the steps of an epoch: the losses and the right answers of all samples, and their number.
        self.sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
        self.step_number = self.saved_step = 0
        self.log: list[dict[str, Any]] = []
        if (self.folder / STATE).exists():
            self._load_state()
        elif accelerator.is_main_process:  # a training that was stopped before its first state may have left one
            (self.folder / LOG).unlink(missing_ok=True)
        # The optimiser is not prepared: without gradient accumulation or scaling accelerate adds nothing to it.
        prepared = accelerator.prepare_model(module)
        self.module = torch.compile(prepared) if execution.compile_model else prepared
        device = accelerator.device
        self.images = data.images.to(device) if isinstance(data.images, torch.Tensor) else data.images
        self.labels = data.labels.to(device)

    def step(self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> None:
        """Train by `learn` on uint8 images and their labels, which are this process's share of a batch."""
        raise NotImplementedError

    def measure(self, epoch: int) -> dict[str, Any]:
        """Measure the model after an epoch, for the log; only the main process calls this."""
        raise NotImplementedError

    def save_model(self) -> None:
        """Write the folder's `MODEL`; called in the main process when the training has ended."""
        raise NotImplementedError

    def more_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Further tensors and JSON-serialisable values of the state."""
        return {}, {}

    def set_more_state(self, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
        """Take over what `more_state` gave."""

    def learn(self, objective: torch.Tensor, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Lower the objective by a step of the optimiser; the log gets the loss and the share of right labels."""
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(objective)
        self.optimizer.step()
        right = (logits.argmax(dim=1) == labels).sum()
        self.sums += torch.stack([loss.detach() * len(labels), right, torch.full_like(right, len(labels))])

    def run(self) -> None:
        """Take the steps that are left, save the model, and remove the state.

        Raises:
            FloatingPointError: at the end of an epoch, in every process: the loss, a weight, or what is measured is
                NaN or infinite. The state before it stays.
        """
        saved = time.monotonic()
        started, images = time.monotonic(), 0
        name, interval = self.execution.name, 60 * self.execution.checkpoint_minutes
        quiet = not self.execution.progress or not self.accelerator.is_main_process
        with tqdm(total=self.total, initial=self.step_number, desc=name, unit="step", disable=quiet) as bar:
            for batch, pixels in self._batches():
                self._step(batch, pixels)
                images += self.batch_size
                bar.update()
                if self.step_number % self.steps_per_epoch == 0:
                    entry = self._end_epoch(started, images)
                    self._write_log(entry)
                    bar.set_postfix({k: f"{v:.3g}" for k, v in entry.items() if k in ("loss", "images_per_second")})
                    started, images = time.monotonic(), 0
                if time.monotonic() - saved >= interval and self.step_number < self.total:
                    self._save_state()
                    saved = time.monotonic()
        if self.accelerator.is_main_process:
            self.save_model()
            (self.folder / STATE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(indices, uint8 images) of this process for every step that is left."""
        share = self.batch_size // self.accelerator.num_processes
        first = self.accelerator.process_index * share
        start_epoch, start = divmod(self.step_number, self.steps_per_epoch)
        for epoch in range(start_epoch, self.epochs):
            order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(len(self.labels))
            order = order[: self.steps_per_epoch * self.batch_size].reshape(-1, self.batch_size)
            batches = torch.from_numpy(order[start if epoch == start_epoch else 0 :, first : first + share].copy())
            if isinstance(self.images, torch.Tensor):
                batches = batches.to(self.images.device)
                yield from ((batch, self.images[batch]) for batch in batches)
            else:
                streamed: Any = self.images
                options = {"num_workers": self.execution.workers, "pin_memory": self.accelerator.device.type == "cuda"}
                loader = DataLoader(streamed, batch_size=None, sampler=list(batches), **options)
                yield from zip(batches, loader, strict=True)

    def _step(self, batch: torch.Tensor, images: torch.Tensor) -> None:
        device = self.accelerator.device
        seed = seed_of(self.seed, STEP, self.step_number, self.accelerator.process_index)
        torch.manual_seed(seed)  # dropout and stochastic depth, where a backbone has them
        generator = torch.Generator(device).manual_seed(seed)
        self.schedule.step_update(self.step_number)
        self.raw.train()
        self.step(images.to(device, non_blocking=True), self.labels[batch.to(device)], generator)
        self.step_number += 1

    def _end_epoch(self, started: float, images: int) -> dict[str, Any]:
        sums = self.accelerator.reduce(self.sums, "sum").tolist()  # reading them waits for the device
        ended = time.monotonic()
        self.sums.zero_()
        epoch = self.step_number // self.steps_per_epoch
        entry = {"epoch": epoch, "step": self.step_number, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        problem = None
        if not all(map(math.isfinite, sums)):
            problem = f"the loss is {sums[0]}"
        elif name := storage.non_finite(self.raw.state_dict()):
            problem = f"{name} is NaN or infinite"
        else:
            loss, right, samples = sums
            entry |= {"loss": loss / samples, self.online_top1: right / samples}
            monitored = epoch % self.monitor_epochs == 0 or epoch == self.epochs
            try:
                entry |= self.measure(epoch) if monitored and self.accelerator.is_main_process else {}
            except FloatingPointError as error:
                problem = str(error)
        for reason in gather_object([problem]):
            if reason is not None:
                kept = f", which keeps the state of step {self.saved_step}," if self.saved_step else ""
                raise FloatingPointError(
                    f"The training diverged in epoch {epoch}: {reason}. {self.remedy}; delete {self.folder}{kept} to "
                    "start anew."
                )
        # The time that `measure` takes is not counted in the speed.
        return entry | {"images_per_second": images / (ended - started)}

    def _write_log(self, entry: dict[str, Any]) -> None:
        self.log.append(entry)
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        numbers = {
            f"{self.execution.name}/{k}": v for k, v in entry.items() if k != "step" and isinstance(v, (int, float))
        }
        self.accelerator.log(numbers, step=entry["step"])

    def _save_state(self) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors = storage.prefixed("trainee.", self.raw.state_dict()) | {"sums": self.sums}
        if storage.non_finite(tensors):  # the end of the epoch reports it, and the state before it stays
            return
        self.saved_step = self.step_number
        more, more_header = self.more_state()
        tensors |= storage.optimizer_state(self.optimizer) | storage.prefixed("more.", more)
        header = {"what": self.identity, "step": self.step_number, "more": more_header}
        storage.save(self.folder / STATE, STATE_KIND, tensors, header)

    def _load_state(self) -> None:
        tensors, header = storage.load(self.folder / STATE, STATE_KIND)
        storage.refuse_another(self.folder / STATE, header["what"], self.identity)
        self.raw.load_state_dict(storage.without_prefix("trainee.", tensors))
        storage.load_optimizer_state(self.optimizer, tensors)
        self.set_more_state(storage.without_prefix("more.", tensors), header.get("more", {}))
        self.step_number = self.saved_step = header["step"]
        if self.accelerator.is_main_process:
            self.sums.copy_(tensors["sums"])
            # Epochs that ended after the state was saved are trained again.
            self.log = [entry for entry in read_log(self.folder) if entry["step"] <= self.step_number]
            text = "".join(json.dumps(entry) + "\n" for entry in self.log)
            (self.folder / LOG).write_text(text, encoding="utf-8")
