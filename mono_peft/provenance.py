"""Which training rows made which unit: the rows on whose tokens a unit's latents mattered most to the loss."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import gather
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from .activity import active_adapters, uncompiled
from .experts import MonoLoraExpertsProjection
from .targets import listed
from .units import Unit

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

PROVENANCE_FILE = "provenance.json"
_COMPILED = "compiled code skips what watches the latents: train without it"
_LOADED_AT_ONCE = 64  # rows of the dataset, when the table of all rows is made


def read_provenance(folder: str | os.PathLike[str]) -> dict[Unit, list[tuple[int, float]]]:
    """What `ProvenanceCallback` saved beside an adapter: for each unit its rows and their scores, largest first.

    Raises:
        ValueError: the folder has no such file, or it cannot be read.
    """
    units = _content(Path(folder) / PROVENANCE_FILE)["units"]
    parts = {name: name.rpartition(".") for name in units}
    return {
        Unit(module, int(index)): [(int(row), float(score)) for row, score in units[name]]
        for name, (module, _, index) in parts.items()
    }


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"there is no {path}: it is written by ProvenanceCallback in training.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not readable: {error}") from None
    if not isinstance(content, dict) or not {"step", "digest", "units"} <= content.keys():
        raise ValueError(f"{path} was not written by ProvenanceCallback.")
    return content


class ProvenanceCallback(TrainerCallback):
    """Keeps, for each unit, the training rows that it owes most to:

        trainer.add_callback(ProvenanceCallback(trainer))

    The score of a row and a unit is the sum over the row's tokens of |latent x gradient of the loss by the latent|, as
    it was when the row was trained on; of several visits the largest counts. The gradient is that of the step's loss:
    under gradient accumulation and DDP a share of its mean. A unit starts with a gradient of zero, because B does.

    Rows are known by what the model sees of them: their tokens after the trainer's collator are compared with those of
    each row of `trainer.train_dataset`, which is run through the collator once, before training. So nothing has to be
    added to the dataset. Rows with the same tokens are one, that with the smallest index.

    `provenance.json` is written beside each saved adapter (checkpoints, `trainer.save_model`), and at the end of the
    training to `output_dir`; `read_provenance` reads it. A resumed run continues that of its checkpoint exactly.

    Args:
        trainer: transformers' Trainer or TRL's SFTTrainer, whose model has one active MonoLoRA adapter; the one that
            the callback is added to.
        top: rows kept of each unit, positive.

    Raises:
        ValueError: `top` is not positive. When training begins: it is not of one process or DDP, its gradients are
            scaled (fp16), the model is compiled, rows are packed or streamed or are no rows of the dataset, adapters
            are on fused experts, or a resumed run has no provenance of its checkpoint. Nothing has been trained then.
    """

    def __init__(self, trainer: Trainer, top: int = 16) -> None:
        if not isinstance(top, int) or isinstance(top, bool) or top < 1:
            raise ValueError(f"`top` must be a positive integer, got {top!r}.")
        self.trainer, self.top = trainer, top
        self._handles: list[Any] = []
        self._finished: dict[str, Any] | None = None  # the content of the file after training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _check_trainer(args)
        model: Any = self.trainer.model
        if uncompiled(model) is not model:
            raise ValueError(f"ProvenanceCallback does not work with torch.compile: {_COMPILED}.")
        self._layers = _observable_layers(model)
        self._table = _RowTable(kwargs["train_dataloader"], next(model.parameters()).device)
        self._tops = _RunningTops(sum(layer.r[name] for _, layer, name in self._layers), self.top, self._table.device)
        if state.global_step:
            self._continue_from(args, state.global_step)
        self._stop()
        self._step = state.global_step
        self._rows: torch.Tensor | None = None  # (batch,) int64, indices of the rows of the present pass
        self._is_observed = False
        self._finished = None
        self._handles.append(model.register_forward_pre_hook(self._begin_pass, with_kwargs=True))
        start = 0
        for _, layer, name in self._layers:
            layer.observer = partial(self._observe, slice(start, start + layer.r[name]), layer.units_dim)
            start += layer.r[name]
        if "save_model" not in vars(self.trainer):
            self.trainer.save_model = self._saving(self.trainer.save_model)

    def _saving(self, save_model: Any) -> Any:
        """`trainer.save_model`, and what it writes the provenance beside: callbacks hear of checkpoints only."""

        @functools.wraps(save_model)
        def save(output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
            save_model(output_dir, *args, **kwargs)
            self._write(Path(output_dir or str(self.trainer.args.output_dir)))

        return save

    def _begin_pass(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if not torch.is_grad_enabled() or not model.training:
            return
        if self._is_observed:
            self._end_pass()
        elif self._rows is not None:
            raise RuntimeError(
                "ProvenanceCallback saw two forward passes with gradients and no backward pass between them, so that "
                "it cannot tell which rows a gradient is of. Train with SFTTrainer or Trainer, one pass at a time."
            )
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._rows = self._table.rows_of(ids, kwargs.get("attention_mask"))
        self._sums = torch.zeros(len(self._rows), self._tops.units, device=self._table.device)

    def _observe(
        self,
        units: slice,
        units_dim: int,
        latents: torch.Tensor,
        gradient: torch.Tensor,
        active: torch.Tensor | None = None,
    ) -> None:
        """Add a layer's part of a backward pass; `observer` of the layer."""
        if self._rows is None:  # a pass in eval mode
            return
        rows = len(self._rows)
        products = (latents * gradient).movedim(units_dim, -1)
        if products.numel() % (rows * products.shape[-1]):
            raise ValueError(
                f"an adapted layer has latents of the shape {tuple(latents.shape)} in a pass of {rows} rows, so that "
                "it is not known which row they are of. Leave it out with `exclude_modules`."
            )
        by_row = products.reshape(rows, -1, products.shape[-1])
        if active is None:
            sums = torch.linalg.vector_norm(by_row, 1, dim=1, dtype=torch.float32)
        else:
            sums = torch.zeros(rows, units.stop - units.start, device=products.device)
            sums.scatter_add_(1, active.reshape(rows, -1), by_row.abs().flatten(1).float())
        self._sums[:, units] += sums.to(self._sums.device)
        self._is_observed = True

    def _end_pass(self) -> None:
        if self._rows is not None and self._is_observed:
            # The gradient of DDP is the mean of those of the processes.
            self._tops.add(self._rows, self._sums.div_(PartialState().num_processes).t())
        self._rows, self._is_observed = None, False

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_pass()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_pass()
        self._step = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step = state.global_step
        self._finished = self._content()  # now, while every process is here
        self._stop()
        self._write(Path(str(args.output_dir)))

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for _, layer, _ in self._layers:
            layer.observer = None

    def _names(self) -> list[str]:
        return [f"{name}.{i}" for name, layer, adapter in self._layers for i in range(layer.r[adapter])]

    def _content(self) -> dict[str, Any]:
        """What the file says; every process calls it."""
        self._table.check()
        units = dict(zip(self._names(), self._tops.gathered(), strict=True))
        return {"step": self._step, "top": self.top, "rows": len(self._table), "digest": self._table.digest} | {
            "units": units
        }

    def _write(self, folder: Path) -> None:
        content = self._finished or self._content()
        if not self.trainer.is_world_process_zero():
            return
        folder.mkdir(parents=True, exist_ok=True)
        partly = folder / f".{PROVENANCE_FILE}.{os.getpid()}"
        partly.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
        partly.replace(folder / PROVENANCE_FILE)

    def _continue_from(self, args: TrainingArguments, step: int) -> None:
        wish = args.resume_from_checkpoint
        folder = Path(wish) if isinstance(wish, str) else Path(str(args.output_dir)) / f"checkpoint-{step}"
        content = _content(folder / PROVENANCE_FILE)
        expected = {"step": step, "digest": self._table.digest, "top": self.top}
        differing = [f"{name} {content.get(name)!r}, now {value!r}" for name, value in expected.items()
                     if content.get(name) != value]  # fmt: skip
        if differing or [*content["units"]] != self._names():
            raise ValueError(
                f"{folder / PROVENANCE_FILE} is of another run than the one that is resumed "
                f"({'; '.join(differing) or 'other units'}). Resume from a checkpoint of this run in its output_dir, "
                "with the same training rows, or start anew."
            )
        if PartialState().is_main_process:  # the others' rows are in it, too
            self._tops.load([*content["units"].values()])


class _RowTable:
    """The rows of a dataset by what the model sees of them: a 64-bit sum of random multiples of their tokens."""

    def __init__(self, dataloader: Any, device: torch.device) -> None:
        dataset: Any = getattr(dataloader, "dataset", None)
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                "ProvenanceCallback names rows by their index, and a streamed dataset has none: give the trainer a "
                "dataset with a length."
            )
        self.device = device
        self._multipliers = torch.empty(0, dtype=torch.int64)
        loader = DataLoader(dataset, _LOADED_AT_ONCE, collate_fn=dataloader.collate_fn, generator=torch.Generator())
        keys = []
        with torch.random.fork_rng(devices=[]):  # whatever the collator draws, training draws as without us
            for batch in loader:
                if "input_ids" not in batch:
                    raise ValueError("ProvenanceCallback knows rows by `input_ids`, and the collator makes none.")
                keys.append(self._keys(batch["input_ids"], batch.get("attention_mask")).cpu())
        keys_of_rows = torch.cat(keys)
        if len(keys_of_rows) != len(dataset):
            raise ValueError(
                f"the collator makes {len(keys_of_rows)} rows of the {len(dataset)} of the dataset, so that it is not "
                "known which is which: train without packing, with SFTTrainer or Trainer."
            )
        self.digest = hashlib.sha256(keys_of_rows.numpy().tobytes()).hexdigest()[:16]
        self._keys_in_order, order = torch.sort(keys_of_rows.to(device), stable=True)
        self._indices = order
        self._unknown = torch.zeros((), dtype=torch.bool, device=device)
        self._is_checked = False

    def __len__(self) -> int:
        return len(self._indices)

    def _keys(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(batch,) int64 of ids (batch, tokens); products and sums wrap around."""
        if ids.shape[1] > len(self._multipliers):
            generator = torch.Generator().manual_seed(0)
            lowest = torch.iinfo(torch.int64).min
            multipliers = torch.empty(2 * ids.shape[1], dtype=torch.int64).random_(lowest, None, generator=generator)
            self._multipliers = multipliers.to(ids.device)
        self._multipliers = self._multipliers.to(ids.device)
        present = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
        places = (present.cumsum(1) - 1).clamp_(min=0)  # the same wherever the padding is
        return ((ids + 1) * present * self._multipliers[places]).sum(1)

    def rows_of(self, ids: Any, mask: Any) -> torch.Tensor:
        """Indices (batch,) int64 of the rows with these tokens (batch, tokens); see `check`."""
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            raise ValueError("ProvenanceCallback knows rows by `input_ids` of the shape (batch, tokens): none here.")
        keys = self._keys(ids, mask).to(self.device)
        places = torch.searchsorted(self._keys_in_order, keys).clamp_(max=len(self) - 1)
        self._unknown |= (self._keys_in_order[places] != keys).any()
        if not self._is_checked:  # once, as it waits for a GPU
            self._is_checked = True
            self.check()
        return self._indices[places]

    def check(self) -> None:
        """Raise ValueError if a row was not of the dataset."""
        if self._unknown:
            raise ValueError(
                "the model was trained on rows that are none of `trainer.train_dataset` after its collator: rows that "
                "are generated, paired, masked at random or packed have no index. Train with SFTTrainer or Trainer "
                "with a collator that always makes the same of a row, and an attention mask."
            )


class _RunningTops:
    """For each unit the rows with the largest scores so far, in descending order; a score of zero is none."""

    def __init__(self, units: int, top: int, device: torch.device) -> None:
        self.units = units
        self.scores = torch.zeros(units, top, device=device)
        self.rows = torch.full((units, top), -1, device=device)

    def add(self, rows: torch.Tensor, scores: torch.Tensor) -> None:
        """Add a batch: its rows (batch,) and their scores (units, batch)."""
        scores = scores.nan_to_num(0, 0, 0)  # of a diverged training
        distinct, places = rows.unique(return_inverse=True)
        if len(distinct) < len(rows):
            largest = scores.new_zeros(len(scores), len(distinct))
            rows, scores = distinct, largest.scatter_reduce_(1, places.expand_as(scores), scores, "amax")
        improved = (scores.amax(1) > self.scores[:, -1]).nonzero().squeeze(1)
        if not len(improved):
            return
        scores, kept, kept_rows = scores[improved], self.scores[improved], self.rows[improved]
        again = kept_rows[:, :, None] == rows  # visits of rows that are among the top already: (units, top, batch)
        kept = torch.maximum(kept, (scores[:, None] * again).amax(2))
        scores = scores.masked_fill(again.any(1), 0)
        largest, places = torch.cat([kept, scores], 1).topk(kept.shape[1])
        self.scores[improved] = largest
        self.rows[improved] = torch.cat([kept_rows, rows.expand_as(scores)], 1).gather(1, places)

    def gathered(self) -> list[list[tuple[int, float]]]:
        """The rows and scores of each unit over all processes; every process calls it."""
        processes, (units, top) = PartialState().num_processes, self.scores.shape
        rows, scores = (
            gather(tensor).view(processes, units, top).transpose(0, 1).flatten(1).tolist()
            for tensor in (self.rows, self.scores)
        )
        tops = []
        for pairs in (zip(*unit, strict=True) for unit in zip(rows, scores, strict=True)):
            largest: dict[int, float] = {}
            for row, score in sorted(pairs, key=lambda pair: (-pair[1], pair[0])):
                if score > 0:
                    largest.setdefault(row, score)
            tops.append([*largest.items()][:top])
        return tops

    def load(self, tops: list[list[tuple[int, float]]]) -> None:
        """Continue from what `gathered` gave."""
        for unit, pairs in enumerate(tops):
            for place, (row, score) in enumerate(pairs):
                self.rows[unit, place], self.scores[unit, place] = row, score


def _observable_layers(model: nn.Module) -> list[Any]:
    layers = list(active_adapters(model))
    names = {adapter for _, _, adapter in layers}
    if len(names) != 1:
        raise ValueError(
            f"the adapters {listed(names)} are active: train one at a time with ProvenanceCallback."
            if names
            else "the model has no active MonoLoRA adapter, whose units could have a provenance."
        )
    experts = [name for name, layer, _ in layers if isinstance(layer, MonoLoraExpertsProjection)]
    if experts:
        raise ValueError(
            f"ProvenanceCallback does not know which row a token is of inside fused experts ({listed(experts, 3)}), "
            "which get the tokens of all rows in one list. Adapt `target_modules` only."
        )
    return layers


def _check_trainer(args: TrainingArguments) -> None:
    """Raise where the rows of a pass or the scale of its gradients are not known."""
    kind = AcceleratorState().distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(
            f"ProvenanceCallback works in one process and with DDP, and this is {kind.value}, which scales, splits or "
            "shards what the backward pass computes in ways of its own. Train with DDP."
        )
    reasons = {
        "fp16": "it scales gradients by a factor that changes, so that scores of different steps would not compare: "
        "train with bf16=True",
        "torch_compile": _COMPILED,
        "packing": "a packed row is made of several: train with packing=False",
        "padding_free": "it makes one row of a batch: train with padding_free=False",
    }
    for option, reason in reasons.items():
        if getattr(args, option, False):
            raise ValueError(f"ProvenanceCallback does not work with {option}: {reason}.")
    if args.n_gpu > 1:
        raise ValueError("ProvenanceCallback does not work in nn.DataParallel: start a process for each GPU.")
