"""Train an adapter that adds nothing on named texts: a hinge on A x beside any trainer's loss."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast, gather_object
from peft.utils.integrations import gather_params_ctx
from torch import nn
from torch.utils.hooks import RemovableHandle

from .activity import uncompiled
from .hinge import Hinge, hinges_of, latents_in_parts
from .logged import LoggedMeasures
from .overlap import check_training_prompts
from .row_storage import RowStorage
from .sharded import cut_like, whole
from .silenceable import (
    check_biases,
    check_ranges,
    check_trainer,
    check_untrained,
    check_what_trains,
    trainable_layers,
)
from .silent_inputs import Group, base_inputs, digest_of, draw_tokens
from .silent_start import lower_bias, separating_direction, start_apart
from .targets import listed

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_CHANGED = 0.05  # relative difference of the base's inputs from which on it counts as another base


class Silence(LoggedMeasures):
    """Keep the adapter of a model silent on texts: train A so that every A x <= 0 there, and sigma(A x) = 0 exactly.

    Where no unit of any module fires, the adapted model is the base, to the last bit. While that is so, every module
    sees the base's inputs x, which training does not change. They are computed once, here, and a hinge keeps them on
    the silent side of each unit:

        loss + weight * sum over modules of mean over rows x and units u of relu(a_u x + margin)

    With `encoder_bias`, A x + b takes the place of A x everywhere here, and b is trained as A is.
    Its gradient, which needs A and the rows only, is added to that of A and b before each step of the optimizer:

        silence = Silence(trainer.model, [tokenizer(texts, padding=True, return_tensors="pt")])
        silence.attach(trainer)

    works with transformers' Trainer and TRL's (SFT, DPO, Reward, GRPO), one process, DDP or DeepSpeed, whatever
    accumulates the gradients. Beside the loss are logged, of the rows of the last step, `silence_loss`, the hinge
    without its weight, and `silence_fired`, the share of pairs of a module and a row on which a unit fires. In a loop
    of your own call `add_gradients(step)` before each `optimizer.step()`, on gradients that are not scaled; there,
    with several processes, all need the same batches. After training a warning tells what share of the cached rows
    still fires (`fired_by_module`), if any does.

    The hinge is what is trained; what holds afterwards, `mono_peft.certify` tells. Some rows may still fire, and then
    later modules see other inputs than those that were constrained. Trainer clips the task's gradient before the
    hinge's is added, which is never longer than weight / r times the rows' mean length for a unit's row of A, and
    than weight / r for its b. DeepSpeed clips their sum.

    Args:
        model: with active, trainable MonoLoRA adapters on linear layers whose sigma is relu, relu2 or relu6; for a
            trainer, its `trainer.model`.
        batches: keyword arguments of the model's forward pass: `input_ids` of shape (batch, tokens), and what else it
            takes. Only batches from which rows are drawn are run, in eval mode. Positions with a 0 in `attention_mask`
            do not count, nor do those with a 0 in the further key `silent_mask`, both (batch, tokens). Use
            `silent_mask` for tokens on which the adapter must act, such as a system prompt that the task shares. Then
            the guarantee is lost for what follows them: an adapter that fires on a token changes that token's keys and
            values, so that every later token that attends to it has other inputs than the base's, on which alone the
            hinge acts. A certificate always speaks of all tokens.
        weight: of the hinge, positive.
        margin: how far A x is kept below zero, in units of A x, not negative. It absorbs what rounding, dropout, and
            the difference between cached and true inputs do.
        rows_per_step: rows that a module's hinge is computed on at each step; the same tokens in all modules.
        rows_per_module: budget of the cache: so many distinct tokens are drawn at random, without repetition, from all
            that count, and the inputs of each module on them are kept. In a causal model tokens with the same text up
            to them have the same inputs: they are one token here, which is drawn the more surely, and weighs the more
            in the hinge, the more texts begin so. Modules with one input (q, k and v) share it. `batches` may be a
            generator of any length: it is gone through once, and at most twice as many batches are held as rows are
            kept. `cached_bytes` says what the cache takes, `silent_tokens` of how many distinct tokens it is drawn:
            all are cached where that is at most `rows_per_module`, beyond which it is an estimate.
        memory_budget: bytes of the cache, and beside it of the task's rows in `start_apart`, that are kept on the
            modules' device. The rows of the modules that do not fit any more are memory-mapped from a temporary file
            (`mapped_bytes`), in the folder that the environment variable TMPDIR names; it vanishes with this object,
            or the process. Each process has its own.
        lower_every: steps after which a trainer calls `lower_biases`, and once more when training ends. With 1 the
            adapter is silent on every cached row at every step, and the task learns around it: that is cheaper for
            the task than lowering once, after training. It takes a product of A and all cached rows each time. None:
            never. Needs `encoder_bias`; in a loop of your own call `lower_biases` after the optimizer's step. Save and
            evaluate at multiples of it: between them a checkpoint is of an adapter whose units may fire, and one that
            `load_best_model_at_end` takes is lowered after it was evaluated.
        seed: of the draw of the cache, and with the step's number of the rows of a step, so that a resumed run
            equals an uninterrupted one. 0 to 2^31 - 1.

    Raises:
        NeverSilentError: no adapter is active, or sigma is never exactly zero.
        ValueError: an option is out of range, `batches` has no token that counts or tokens that the model does not
            have, an adapter is frozen or not on a linear layer, something before it is trained too, or the base
            computes NaN. In `on_train_begin`: the trainer trains another model or adapter, the base was changed, or it
            works in a way in which the gradient could not be added (FSDP, float16's scaled gradients, optimizers that
            step in the backward pass), the processes have other batches than one another, or all training prompts are
            among the silent texts (some are told).
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        *,
        weight: float = 10.0,
        margin: float = 0.1,
        rows_per_step: int = 256,
        rows_per_module: int = 4096,
        memory_budget: int = 2**32,
        lower_every: int | None = None,
        seed: int = 0,
    ) -> None:
        check_ranges(weight, margin, rows_per_step, rows_per_module, memory_budget, lower_every, seed)
        self.model = uncompiled(model)
        self.weight, self.margin, self.rows_per_step, self.seed = weight, margin, rows_per_step, seed
        self.lower_every = lower_every
        self._layers = trainable_layers(self.model)
        check_what_trains(self.model, self._layers)
        if lower_every is not None:
            check_biases(self._layers, "lower_every")
        if isinstance(batches, Mapping):
            raise ValueError("`batches` must be a list of batches, got one batch: put it in a list.")
        tokens, self.silent_tokens = draw_tokens(self.model, batches, rows_per_module, seed)
        self._tokens = tokens
        self._digest = digest_of(tokens, (weight, margin, rows_per_step, lower_every, seed))
        self._memory_budget, self._rows_per_module = memory_budget, rows_per_module
        self._groups: list[Group] = []
        self._hooks: list[RemovableHandle] = []
        self._hinges_in_backward: dict[nn.Linear, Hinge] = {}  # of the present step
        self._added: set[nn.Parameter] = set()
        if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            self._compute_inputs()
        # Else ZeRO-3 has cut the weights up, and only DeepSpeed's engine, in training, can put a layer together.
        self._measured: list[Hinge] = []  # of the present step
        self._loss: torch.Tensor | None = None
        self._fired: torch.Tensor | None = None

    def _compute_inputs(self) -> None:
        self._groups = base_inputs(self.model, self._layers, self._tokens, RowStorage(self._memory_budget))
        drawn = sum(len(batch.positions) for batch in self._tokens)
        # By the number of a module's rows, how many tokens of the texts those up to each are.
        self._ends = {
            length: torch.cat([batch.counts.repeat(length // drawn) for batch in self._tokens]).cumsum(0)
            for length in dict.fromkeys(len(group.rows) for group in self._groups)  # a pass may call one several times
        }
        numbers = drawn, self.silent_tokens, self.cached_bytes / 2**20, self.mapped_bytes / 2**20
        logger.info("cached %d of %d distinct tokens, %.1f MiB, %.1f of them on disk", *numbers)

    @property
    def cached_bytes(self) -> int:
        """Size of the cached inputs of all modules."""
        return sum(group.rows.nbytes for group in self._groups)

    @property
    def mapped_bytes(self) -> int:
        """The part of `cached_bytes` that is in a temporary file."""
        return sum(group.rows.nbytes for group in self._groups if group.mapped)

    @property
    def loss(self) -> float:
        """The hinge of the last step without its weight, summed over modules; NaN before the first step."""
        return float("nan") if self._loss is None else self._loss.item()

    @property
    def fired(self) -> float:
        """Share, of the pairs of a module and a row of the last step, on which a unit fires; NaN before the first."""
        return float("nan") if self._fired is None else self._fired.item()

    def attach(self, trainer: Trainer) -> None:
        """Add this to the trainer's callbacks, ahead of its loggers, so that what it adds to a line reaches them."""
        if self in trainer.callback_handler.callbacks:
            raise ValueError("this Silence is attached already; twice it would add its gradient twice.")
        trainer.callback_handler.callbacks.insert(0, self)

    @torch.no_grad()
    def start_apart(self, task_batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Turn the units, before training, so that they fire on the task and on none of the cached rows.

        From a random start the hinge drives most units below zero on everything, where they get no gradient any more.
        Here a direction that tells the module's inputs on the task from those on the silent texts is added to each
        unit of A, and b is set so that the highest cached row lies on the margin. B is zero, so that the model is the
        base as before.

        Args:
            task_batches: as the silent ones, of the texts that are trained on. A few hundred texts do; at most
                `rows_per_module` distinct tokens are drawn of them, as of the silent texts.

        Returns:
            By the module's name, the share of the task's distinct inputs that the direction lifts above all silent
            ones, in [0, 1]. Where it is small, as in the first layer if texts have most of their tokens in common, the
            module can do little for the task; adapt others.

        Raises:
            ValueError: an adapter has no `encoder_bias` or is trained already, `task_batches` has no token that
                counts, or the weights are cut up (ZeRO-3, FSDP).
        """
        check_biases(self._layers, "start_apart")
        check_untrained(self._layers)
        tokens, _ = draw_tokens(self.model, task_batches, self._rows_per_module, self.seed)
        storage = RowStorage(self._memory_budget - self.cached_bytes + self.mapped_bytes)
        task_groups = base_inputs(self.model, self._layers, tokens, storage)
        separated = {}
        for group, task_group in zip(self._groups, task_groups, strict=True):
            silent, task = group.as_computed(), task_group.as_computed()
            direction = separating_direction(silent, task, self.seed)
            for name, encoder in group.encoders.items():
                start_apart(encoder, direction, silent, task, self.margin)
                separated[name] = direction.separated
        return separated

    @torch.no_grad()
    def lower_biases(self) -> dict[str, float]:
        """Lower b of the units that fire on a cached row or come closer than the margin, so that none does.

        Then the hinge of the cached rows is zero, they are the inputs that the modules really see, and a text all of
        whose tokens are cached is silent (but for what is rounded otherwise than the margin allows). It costs the task
        what these units did for it: measure its score again. Call it after training, before the adapter is saved.

        Returns:
            By the module's name, how far the bias of a unit was lowered at most, in units of A x.

        Raises:
            ValueError: an adapter has no `encoder_bias`, or the weights are cut up (ZeRO-3, FSDP).
        """
        check_biases(self._layers, "lower_biases")
        return {name: by_unit.max().item() for name, by_unit in self._lower_biases().items()}

    @torch.no_grad()
    def _lower_biases(self) -> dict[str, torch.Tensor]:
        """How far each unit's bias was lowered, by the module's name, on its device: nothing waits for the numbers."""
        return {
            name: lower_bias(encoder, group.rows, self.margin)
            for group in self._groups
            for name, encoder in group.encoders.items()
        }

    @torch.no_grad()
    def add_gradients(self, step: int) -> None:
        """Add the gradient of the weighted hinge to `.grad` of each A and b.

        Args:
            step: number of the step, from which with the seed its rows follow.
        """
        self._draw_rows(step)
        for rows, encoders, _ in self._groups:
            self._measured += (hinges := self._hinges_of(rows, list(encoders.values())))
            for encoder, hinge in zip(encoders.values(), hinges, strict=True):
                for parameter, gradient in zip(encoder.parameters(), hinge.gradients, strict=True):
                    own = cut_like(gradient.to(parameter.dtype), parameter)
                    parameter.grad = own if parameter.grad is None else parameter.grad.add_(own)
        self._end_step()

    def _draw_rows(self, step: int) -> None:
        """Draw the rows of the step, each as often as its token is in the texts; the measures of the step begin."""
        rng = random.Random(1_000_003 * self.seed + step)
        drawn = {}
        for length, ends in self._ends.items():
            total = int(ends[-1])
            few = torch.tensor(rng.sample(range(total), min(self.rows_per_step, total)))
            drawn[length] = torch.searchsorted(ends, few, right=True)
        places = dict.fromkeys((len(group.rows), group.rows.device) for group in self._groups)
        self._drawn = {(length, device): drawn[length].to(device) for length, device in places}
        self._measured = []

    def _hinges_of(self, rows: torch.Tensor, encoders: list[nn.Linear]) -> list[Hinge]:
        """The hinges of modules with the same rows, on those of the step."""
        x = rows.index_select(0, self._drawn[len(rows), rows.device])
        return hinges_of(x, encoders, self.weight, self.margin)

    def _end_step(self) -> None:
        """Note the measures of the step's rows over all modules."""
        home = self._measured[0].mean.device
        self._loss = torch.stack([hinge.mean.to(home) for hinge in self._measured]).sum()
        self._fired = torch.stack([hinge.fired.to(home) for hinge in self._measured]).mean()

    @torch.no_grad()
    def fired_by_module(self) -> dict[str, float]:
        """By the module's name, the share of all its cached rows on which a unit fires or is NaN, in [0, 1]."""
        shares = {}
        for rows, encoders, _ in self._groups:
            for name, encoder in encoders.items():
                dtype = torch.promote_types(encoder.weight.dtype, torch.float32)
                with gather_params_ctx(list(encoder.parameters())):  # which ZeRO-3 has cut up
                    matrix, bias = (None if p is None else whole(p).to(dtype) for p in (encoder.weight, encoder.bias))
                    fired = [(~(latents <= 0)).any(1).sum() for latents in latents_in_parts(rows, matrix, bias)]
                    shares[name] = int(torch.stack(fired).sum()) / len(rows)
        return shares

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        check_trainer(args)
        trained = {id(parameter) for parameter in model.parameters()} if model is not None else set()
        if not all(id(encoder.weight) in trained for _, _, encoder in self._layers):
            raise ValueError(
                "the trainer trains another model than the one that Silence was built for: build it with "
                "`trainer.model`, after the trainer, which may have added the adapter or copied the model."
            )
        if [encoder for _, _, encoder in trainable_layers(self.model)] != [encoder for _, _, encoder in self._layers]:
            raise ValueError(
                "the adapters that are trained are not those that were when Silence was built: make them active "
                "first, and build Silence last, right before training."
            )
        check_training_prompts(
            (tokens.batch for tokens in self._tokens), getattr(kwargs.get("train_dataloader"), "dataset", None)
        )
        processes = AcceleratorState().num_processes
        if processes > 1 and len(set(gather_object([self._digest]))) > 1:
            raise ValueError(
                "the processes have other batches, or options of Silence, than one another: every process needs the "
                "same, or their adapters would differ."
            )
        if self._groups:
            self._check_base()
        else:
            self._compute_inputs()
        self._groups = [group if group.mapped else group.on_device() for group in self._groups]
        if processes > 1:
            for group in self._groups:
                for part in group.rows.split(1024):
                    part.copy_(broadcast(part.to(group.device)))
        if AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
            if self.lower_every is not None:
                raise ValueError(
                    "DeepSpeed's optimizer keeps copies of the weights, which undo what `lower_every` does to b at "
                    "the next step: train with DDP, or leave it out and call `lower_biases` after training."
                )
            self._add_in_backward()
            if getattr(getattr(kwargs.get("optimizer"), "optimizer", None), "clip_grad", 0):
                warnings.warn(
                    "DeepSpeed clips the task's gradient and the hinge's together, where other training clips the "
                    "task's alone: while the hinge's is long, the task learns less from a step. Set `max_grad_norm` "
                    "to 0 for the adapter of one process that does not clip.",
                    stacklevel=2,
                )

    def _add_in_backward(self) -> None:
        """Add the hinge's gradient to the task's in the backward pass, for engines that take gradients away there."""
        self._remove_hooks()
        for rows, encoders, _ in self._groups:
            for encoder in encoders.values():
                for number, parameter in enumerate(encoder.parameters()):
                    hook = partial(self._with_hinge, rows, encoder, number, parameter)
                    self._hooks.append(parameter.register_hook(hook))

    @torch.no_grad()
    def _with_hinge(
        self, rows: torch.Tensor, encoder: nn.Linear, number: int, parameter: nn.Parameter, gradient: torch.Tensor
    ) -> torch.Tensor:
        """The task's gradient of A (number 0) or b (1), plus the hinge's once in the last backward pass of a step."""
        if parameter in self._added or not GradientState().sync_gradients:
            return gradient
        self._added.add(parameter)
        if encoder not in self._hinges_in_backward:  # A is whole here, under ZeRO-3 too
            (self._hinges_in_backward[encoder],) = self._hinges_of(rows, [encoder])
        return gradient + self._hinges_in_backward[encoder].gradients[number].to(gradient.dtype)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _check_base(self) -> None:
        """Raise unless the base still computes what is cached."""
        fresh = base_inputs(self.model, self._layers, self._tokens[:1], RowStorage(float("inf")))
        for now, cached in zip(fresh, self._groups, strict=True):
            before = cached.rows[: len(now.rows)].to(now.rows.device).float()
            change = (now.rows.float() - before).norm() / before.norm()
            if not change <= _CHANGED:
                raise ValueError(
                    f"the base model was changed after Silence was built: inputs of its modules differ by "
                    f"{change:.0%} from the cached ones. Build Silence last, right before training."
                )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._hooks:
            self._added.clear()
            self._hinges_in_backward.clear()
            self._draw_rows(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._hooks:
            self.add_gradients(state.global_step)
            return
        missed = [name for name, _, encoder in self._layers if encoder not in self._hinges_in_backward]
        if missed:
            warnings.warn(
                f"{listed(missed, 3)} got no gradient from the task, so that none of the hinge's could be added.",
                stacklevel=2,
            )
        self._measured = list(self._hinges_in_backward.values())
        if self._measured:
            self._end_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.lower_every is None:
            return
        is_last = state.global_step >= state.max_steps  # the last checkpoint, saved after this, is the trained adapter
        if is_last or state.global_step % self.lower_every == 0:
            self._lower_biases()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove_hooks()
        if self.lower_every is not None:
            self._lower_biases()
        shares = self.fired_by_module()
        if any(shares.values()):
            most = max(shares, key=lambda name: shares[name])
            warnings.warn(
                f"the adapter is not silent on all that it should be: units fire on "
                f"{sum(shares.values()) / len(shares):.2%} of the pairs of a module and a cached row, most in {most} "
                f"({shares[most]:.2%} of its rows). Texts that the task shares tokens with cannot be silent on them; "
                "else train longer, with a larger weight, or fewer modules, or, with `encoder_bias`, call "
                "`start_apart` before training, and give `lower_every`. `mono_peft.certify` says which are.",
                stacklevel=2,
            )

    def measures(self, state: TrainerState) -> dict[str, float]:
        return {} if self._loss is None else {"silence_loss": self.loss, "silence_fired": self.fired}
