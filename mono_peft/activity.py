"""Which latents fire and how often: sparsity and dead units of sigma(A x)."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
    active = list(active_adapters(model))
    if not active:
        raise ValueError(
            "the model has no active MonoLoRA adapter to measure; enable it, or load one with "
            "PeftModel.from_pretrained (LoRA has no activation, its sparsity is 0)."
        )
    check_finite(
        {f"{name}.{part} of {adapter}": w for name, layer, adapter in active for part, w in layer.weights(adapter)}
    )
    adapters = Counter(name for name, _, _ in active)
    named = [
        (name if adapters[name] == 1 else f"{name} ({adapter})", layer, adapter) for name, layer, adapter in active
    ]
    counts = {name: _ZeroCount(name, layer, adapter) for name, layer, adapter in named}
    mask: torch.Tensor | None = None

    def count(name: str, latents: torch.Tensor, routing: Routing | None, acting: torch.Tensor | None) -> None:
        counts[name].add(latents, routing, acting, mask)

    with latents_watched(named, count), in_eval_mode(model), torch.no_grad():
        for batch in batches:
            inputs = send_to_device(right_padded(batch), device)
            mask = _token_mask(model, inputs.get("attention_mask"))
            model(**inputs)
    if not any(count.tokens for count in counts.values()):
        raise ValueError(
            "`batches` holds no token that counts: it is empty, every attention mask is zero, or no row has the "
            "invocation tokens of an activated adapter."
        )
    reached = {name: count for name, count in counts.items() if count.tokens}
    of_units = {name: count.fired_of_each_unit() for name, count in reached.items()}
    fired = torch.cat(list(of_units.values()))
    dead = {name: count.dead_units() for name, count in reached.items()}
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


def active_adapters(model: nn.Module) -> Iterator[tuple[str, MonoLoraLayer, str]]:
    """Name of the layer, the layer, and the adapter's name, of all that contribute to the model's output."""
    for name, module in model.named_modules():
        if isinstance(module, MonoLoraLayer) and not module.disable_adapters:
            yield from ((name, module, a) for a in module.active_adapters if a in module.monolora_activation)


@contextmanager
def latents_watched(
    layers: Iterable[tuple[str, MonoLoraLayer, str]],
    note: Callable[[str, torch.Tensor, Routing | None, torch.Tensor | None], None],
) -> Iterator[None]:
    """Call `note(name, latents, routing, acting)` for each call of a layer inside.

    The latents are as sigma gives them, but zero where an activated adapter does not act: (..., r), under a
    convolution with the units in the dimension `units_dim`, under fused experts (S, r) of the rows that `routing`
    tells of, which is None elsewhere. `acting` is where an activated adapter acts, bool (batch, tokens); None for
    others.

    Args:
        layers: names to call them by, layers, and names of adapters.
    """
    routings: dict[nn.Module, Routing] = {}  # of the present call, of fused experts

    def keep_routing(layer: nn.Module, args: Any) -> None:
        _, routings[layer] = args

    def pass_on(
        name: str, layer: MonoLoraLayer, adapter: str, module: nn.Module, args: Any, latents: torch.Tensor
    ) -> None:
        invocations = layer.monolora_invocations.get(adapter)
        acting = None if invocations is None else invocations.acting(adapter, latents)
        latents = latents if acting is None else latents.masked_fill(~acting.unsqueeze(-1), 0)
        note(name, latents, routings.get(layer), acting)

    with ExitStack() as hooks:
        for name, layer, adapter in layers:
            if isinstance(layer, MonoLoraExpertsProjection):
                hooks.enter_context(layer.register_forward_pre_hook(keep_routing))
            activation = layer.monolora_activation[adapter]
            hooks.enter_context(activation.register_forward_hook(partial(pass_on, name, layer, adapter)))
        yield


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
    """Counts, for each unit of a layer, the tokens on which it is not exactly zero.

    The rows of its tables are the experts of fused ones, whose units are each expert's own; other layers have one row.
    """

    def __init__(self, name: str, layer: MonoLoraLayer, adapter: str) -> None:
        self.name, self.r, self.units_dim = name, layer.r[adapter], layer.units_dim
        experts = layer.num_experts if isinstance(layer, MonoLoraExpertsProjection) else 1
        self.tokens_seen = torch.zeros(experts, dtype=torch.int64)
        self.fired = torch.zeros(experts, self.r, dtype=torch.int64)

    @property
    def tokens(self) -> int:
        """How many were counted; one that goes to several experts counts for each."""
        return int(self.tokens_seen.sum())

    def add(
        self,
        latents: torch.Tensor,
        routing: Routing | None,
        acting: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> None:
        """Count the latents of a pass.

        Args:
            latents, routing, acting: as `latents_watched` tells them.
            mask: (batch, tokens), 0 for a token that does not count; None: all do.
        """
        rows = latents.movedim(self.units_dim, -1).reshape(-1, self.r)
        experts = None if routing is None else routing.experts
        if mask is not None:
            kept = self._kept_tokens(mask, len(rows) if routing is None else routing.num_tokens).to(rows.device)
            kept = kept if routing is None else kept[routing.tokens]
            rows, experts = rows[kept], None if experts is None else experts[kept]
            acting = None if acting is None else acting.reshape(-1)[kept]
        rows = rows if acting is None else rows[acting.reshape(-1)]
        if not torch.isfinite(rows).all():
            raise DivergedError(
                f"The latents of {self.name} hold NaN or infinity, so that they have no sparsity: the model's inputs "
                "or its base weights do, or its dtype overflowed."
            )
        if experts is None:
            self.tokens_seen += len(rows)
            self.fired += (rows != 0).sum(0).cpu()
        else:
            self.tokens_seen += torch.bincount(experts.cpu(), minlength=len(self.tokens_seen))
            self.fired.index_add_(0, experts.cpu(), (rows != 0).long().cpu())

    def _kept_tokens(self, mask: torch.Tensor, tokens: int) -> torch.Tensor:
        """Bool of shape (tokens,), which of them count."""
        if mask.numel() != tokens:
            raise ValueError(
                f"the attention mask has {mask.numel()} positions, but the input of {self.name} has "
                f"{tokens}: padding cannot be told apart there. Measure without padding: one row per batch, "
                "and no attention_mask."
            )
        return mask.reshape(-1).bool()

    def fired_of_each_unit(self) -> torch.Tensor:
        """For each unit that saw a token, the tokens on which it fired."""
        return self.fired[self.tokens_seen > 0].flatten()

    def dead_units(self) -> list[int]:
        """The indices of those of these units that never fired."""
        dead = (self.fired == 0) & (self.tokens_seen > 0)[:, None]
        indices: list[int] = dead.flatten().nonzero().flatten().tolist()
        return indices


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
