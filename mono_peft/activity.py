"""Which latents fire and how often: sparsity and dead units of sigma(A x)."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import nn

from .experts import MonoLoraExpertsProjection, Routing
from .layer import MonoLoraLayer
from .logged import LoggedMeasures
from .padding import right_padded
from .state_dicts import DivergedError, check_finite

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class ActivationSparsity(NamedTuple):
    """How sparse the latents sigma(A x) of a model's active MonoLoRA adapters are.

    Under fused experts each expert has units of its own. They are measured on the tokens that were routed to the
    expert; those of an expert that no token reached do not count.
    """

    # share of exact zeros over all modules, tokens (pixels) and units, in [0, 1] ("sparsity" in Table 2)
    overall: float
    per_module: dict[str, float]  # the same by module name, with the adapter's name where several are active
    dead: float  # share of units that were zero on every token, in [0, 1]
    # by module name as above, the indices of these units; unit i of expert e is e r + i. Modules without are left out
    dead_units: dict[str, list[int]]


def activation_sparsity(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> ActivationSparsity:
    """Measure the zero ratio of sigma(A x) over the tokens of `batches` ("zero ratio", section 3.3 of the paper):

        sparsity = activation_sparsity(model, [tokenizer(texts, padding=True, return_tensors="pt")])
        print(sparsity.overall, sparsity.dead, sparsity.per_module, sparsity.dead_units)

    The model runs in eval mode without gradients; its mode, weights and hooks are as before afterwards.

    Args:
        model: a model with MonoLoRA adapters; the active ones are measured.
        batches: keyword arguments of the model's forward pass, each a mapping of tensors that are moved to the
            model's device. Where it has `attention_mask` of shape (batch, tokens), positions with 0 do not count.

    Raises:
        ValueError: no adapter is active, `batches` holds no token, a mask is not of that shape or does not fit a
            module's input, or an encoder-decoder model gets a mask with zeros, which is right for one half only.
        DivergedError: a weight of an active adapter, or a latent of a token that counts, is NaN or infinite. Such a
            latent would count as one that fires, or ReLU would hide it.
    """
    model = uncompiled(model)
    device = next(model.parameters()).device
    with _count_zeros(model) as counts:
        if not counts:
            raise ValueError(
                "the model has no active MonoLoRA adapter to measure; enable it, or load one with "
                "PeftModel.from_pretrained (LoRA has no activation, its sparsity is 0)."
            )
        check_finite(_active_weights(model))
        with in_eval_mode(model), torch.no_grad():
            for batch in batches:
                inputs = send_to_device(right_padded(batch), device)
                mask = _token_mask(model, inputs.get("attention_mask"))
                for count in counts.values():
                    count.mask = mask
                model(**inputs)
    if not any(count.tokens for count in counts.values()):
        raise ValueError(
            "`batches` holds no token that counts: it is empty, every attention mask is zero, or no row has the "
            "invocation tokens of an activated adapter."
        )
    reached = {name: count for name, count in counts.items() if count.tokens}
    of_units = {name: count.fired_of_each_unit() for name, count in reached.items()}
    fired = torch.cat(list(of_units.values()))
    dead = {name: count.numbers()[of_units[name] == 0].tolist() for name, count in reached.items()}
    return ActivationSparsity(
        overall=1 - int(fired.sum()) / sum(count.tokens * count.r for count in reached.values()),
        per_module={name: 1 - int(c.fired.sum()) / (c.tokens * c.r) for name, c in reached.items()},
        dead=int((fired == 0).sum()) / fired.numel(),
        dead_units={name: units for name, units in dead.items() if units},
    )


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` gave, whose modules call their hooks.

    Raises:
        ValueError: the model or a module of it was compiled in place, so that hooks would be skipped.
    """
    model = getattr(model, "_orig_mod", model)
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    if compiled:
        raise ValueError(
            f"{compiled[0] or 'the model'} was compiled in place (`compile()`), which skips the hooks that see its "
            "latents. Do this before, or compile by `torch.compile(model)`."
        )
    return model


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode inside; afterwards each of its modules is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _active_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part} of {adapter}": weight
        for name, module, adapter in active_adapters(model)
        for part, weight in module.weights(adapter)
    }


def active_adapters(model: nn.Module) -> Iterator[tuple[str, MonoLoraLayer, str]]:
    """Name of the layer, the layer, and the adapter's name, of all that contribute to the model's output."""
    for name, module in model.named_modules():
        if isinstance(module, MonoLoraLayer) and not module.disable_adapters:
            yield from ((name, module, a) for a in module.active_adapters if a in module.monolora_activation)


def _token_mask(model: nn.Module, mask: Any) -> torch.Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"`attention_mask` must have the shape (batch, tokens) to tell padding apart, got {shape}.")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        if not mask.bool().all():
            raise ValueError(
                "an encoder-decoder model has other tokens in each half, so `attention_mask` cannot mark the padding "
                "of both. Measure without padding: rows of one length, or one row per batch."
            )
        return None
    return mask


class _ZeroCount:
    """Forward hook of one activation module: counts, per unit, the tokens on which it is not exactly zero."""

    def __init__(self, name: str, r: int, units_dim: int, acting: Callable[..., torch.Tensor] | None = None) -> None:
        self.name = name
        self.acting = acting  # of an activated adapter: on which positions of the latents it acts
        self.r = r
        self.units_dim = units_dim
        self.mask: torch.Tensor | None = None
        self.tokens = 0
        self.fired = torch.zeros(r, dtype=torch.int64)

    def __call__(self, module: nn.Module, args: Any, latents: torch.Tensor) -> None:
        rows = latents.movedim(self.units_dim, -1).reshape(-1, latents.shape[self.units_dim])
        kept = self.kept_tokens(len(rows), rows.device)
        if self.acting is not None:
            acting = self.acting(latents).reshape(-1)
            kept = acting if kept is None else kept & acting
        rows = rows if kept is None else rows[kept]
        self.check_finite(rows)
        self.tokens += len(rows)
        self.fired += (rows != 0).sum(0).cpu()

    def kept_tokens(self, tokens: int, device: torch.device) -> torch.Tensor | None:
        """Bool of shape (tokens,), which of them count; None if all do."""
        if self.mask is None:
            return None
        if self.mask.numel() != tokens:
            raise ValueError(
                f"the attention mask has {self.mask.numel()} positions, but the input of {self.name} has "
                f"{tokens}: padding cannot be told apart there. Measure without padding: one row per batch, "
                "and no attention_mask."
            )
        return self.mask.reshape(-1).to(device).bool()

    def check_finite(self, latents: torch.Tensor) -> None:
        """Raise DivergedError unless the latents are numbers."""
        if not torch.isfinite(latents).all():
            raise DivergedError(
                f"The latents of {self.name} hold NaN or infinity, so that they have no sparsity: the model's inputs "
                "or its base weights do, or its dtype overflowed."
            )

    def fired_of_each_unit(self) -> torch.Tensor:
        """For each unit that saw a token, the tokens on which it fired."""
        return self.fired

    def numbers(self) -> torch.Tensor:
        """The indices of these units."""
        return torch.arange(self.r)


class _RoutedZeroCount(_ZeroCount):
    """The same under fused experts, for each expert; `note_routing` is a hook of the layer, called before this one."""

    routing: Routing

    def __init__(self, name: str, r: int, num_experts: int) -> None:
        super().__init__(name, r, -1)
        self.fired = torch.zeros(num_experts, r, dtype=torch.int64)
        self.tokens_of_experts = torch.zeros(num_experts, dtype=torch.int64)

    def note_routing(self, module: nn.Module, args: Any) -> None:
        _, self.routing = args

    def __call__(self, module: nn.Module, args: Any, latents: torch.Tensor) -> None:
        tokens, experts = self.routing.tokens, self.routing.experts
        kept = self.kept_tokens(self.routing.num_tokens, latents.device)
        if kept is not None:
            latents, experts = latents[kept[tokens]], experts[kept[tokens]]
        self.check_finite(latents)
        self.tokens += len(latents)
        experts = experts.cpu()
        self.tokens_of_experts += torch.bincount(experts, minlength=len(self.tokens_of_experts))
        self.fired.index_add_(0, experts, (latents != 0).long().cpu())

    def fired_of_each_unit(self) -> torch.Tensor:
        return self.fired[self.tokens_of_experts > 0].flatten()

    def numbers(self) -> torch.Tensor:
        numbers = torch.arange(self.fired.numel()).view(self.fired.shape)
        return numbers[self.tokens_of_experts > 0].flatten()


@contextmanager
def _count_zeros(model: nn.Module) -> Iterator[dict[str, _ZeroCount]]:
    counts: dict[str, _ZeroCount] = {}
    handles = []
    active = list(active_adapters(model))
    adapters = Counter(name for name, _, _ in active)
    for name, module, adapter in active:
        key = name if adapters[name] == 1 else f"{name} ({adapter})"
        if isinstance(module, MonoLoraExpertsProjection):
            routed = counts[key] = _RoutedZeroCount(key, module.r[adapter], module.num_experts)
            handles.append(module.register_forward_pre_hook(routed.note_routing))
        else:
            invocations = module.monolora_invocations.get(adapter)
            acting = None if invocations is None else partial(invocations.acting, adapter)
            counts[key] = _ZeroCount(key, module.r[adapter], module.units_dim, acting)
        handles.append(module.monolora_activation[adapter].register_forward_hook(counts[key]))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


class SparsityCallback(LoggedMeasures):
    """Adds `monolora_sparsity` and `monolora_dead` (see `ActivationSparsity`) to the lines that a Trainer logs.

    When the model is saved, it warns of modules whose units are all dead: such a module gets no gradient any more.
    Where weights or latents are NaN or infinite it warns, and the line gets neither number; training goes on.
    The measures stand beside the loss in `state.log_history` and in every logger of `report_to`:

        trainer.add_callback(SparsityCallback(trainer, batches))

    Args:
        trainer: the Trainer (or TRL trainer) that the callback is added to.
        batches: what to measure on, see `activation_sparsity`; kept, and run through the model at every line.
    """

    def __init__(self, trainer: Trainer, batches: Iterable[Mapping[str, Any]]) -> None:
        self.trainer = trainer
        self.batches = list(batches)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Callbacks are called in order: ahead of the loggers, what we add to the line reaches them.
        callbacks = self.trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    def _measured(self, state: TrainerState) -> ActivationSparsity | None:
        try:
            return activation_sparsity(self.trainer.model, self.batches)
        except DivergedError as error:
            warnings.warn(f"MonoLoRA has no sparsity at step {state.global_step}: {error}", stacklevel=3)
            return None

    def measures(self, state: TrainerState) -> dict[str, float]:
        sparsity = self._measured(state)
        return {} if sparsity is None else {"monolora_sparsity": sparsity.overall, "monolora_dead": sparsity.dead}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        sparsity = self._measured(state)
        if sparsity is None:
            return
        silent = [name for name, share in sparsity.per_module.items() if share == 1]
        if silent:
            warnings.warn(
                f"{len(silent)} of {len(sparsity.per_module)} MonoLoRA modules are dead: no unit fires on the batches "
                f"measured, so that they add nothing and get no gradient ({', '.join(silent[:3])}"
                f"{', ...' if len(silent) > 3 else ''}). Lower the learning rate, or start again from a checkpoint "
                "before that.",
                stacklevel=2,
            )
