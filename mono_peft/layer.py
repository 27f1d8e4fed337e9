"""MonoLoRA's arithmetic: h = W x + s B sigma(A dropout(x)), eq. 5 of the paper, for each kind of base layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn
from transformers.activations import ACT2FN

from . import direct, fused, sparse
from .invocation import Invocations
from .topk import TopK

# sigma by name, all but "topk", which has a parameter. All but `identity` are non-negative; `identity` is the linear
# control, equal to LoRA.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu2": lambda: ACT2FN["relu2"],
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
}

MERGE_ERROR = (
    "MonoLoRA cannot merge: its update s B sigma(A x) is not linear in x, so no weight matrix equals it. Keep the "
    "adapter beside the base model (`save_pretrained`, `PeftModel.from_pretrained`), or call `unload()` to get the "
    "base model back. If you need one mergeable matrix, train PEFT's LoraConfig. TRL's trainers merge where "
    "`use_vllm=True`, to send vLLM the weights: train with `use_vllm=False` there."
)

NO_BIAS_OF_AN_EMBEDDING = (
    "{} cannot have `encoder_bias=True`: A of an embedding has r numbers of its own for each token, to which a bias "
    "would add nothing that they cannot learn. Leave it out with `exclude_modules`, or adapt without `encoder_bias`."
)

REPLICATED = "whose threads share what one pass knows. Start a process for each GPU: accelerate launch, torchrun."


class MonoLoraLayer(nn.Module, BaseTunerLayer):
    """A base layer and its adapters: their weights, scales and activations, keyed by the adapter's name.

    Subclasses say what A and B are for their kind of base layer. The base layer is called, and its weight never read,
    so that it may be quantised.
    """

    adapter_layer_names = ("monolora_encoder", "monolora_decoder")
    # Every other dict keyed by adapter; PEFT deletes and moves adapters by this list.
    other_param_names = (
        "r",
        "initial_scaling",
        "scaling",
        "monolora_dropout",
        "monolora_activation",
        "monolora_invocations",
        "frozen_encoder",
    )
    weight_is_read: bool | None = None  # while bypass.py watches a pass: whether somebody has read `weight`
    # While provenance.py watches a training: gets the latents and the gradient by them in each backward pass, and
    # where these are of active units alone, (tokens, k), also which units they are of.
    observer: Callable[..., None] | None = None
    # PEFT's, declared because mypy does not follow PEFT.
    active_adapters: list[str]
    get_base_layer: Callable[[], Any]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]
    _cast_input_dtype: Callable[[torch.Tensor, torch.dtype], torch.Tensor]

    def __init__(self, base_layer: nn.Module, adapter_name: str, **adapter_options: Any) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.in_features, self.out_features = self.base_sizes()
        self.r: dict[str, int] = {}
        self.initial_scaling: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.monolora_dropout = nn.ModuleDict()
        self.monolora_activation = nn.ModuleDict()
        self.monolora_invocations: dict[str, Invocations] = {}  # of the activated adapters
        self.frozen_encoder: dict[str, bool] = {}
        self.monolora_encoder = nn.ModuleDict()
        self.monolora_decoder = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []  # stays empty; PEFT reads it
        self.cast_input_dtype_enabled = True  # switched by peft.helpers.disable_input_dtype_casting
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **adapter_options)

    def base_sizes(self) -> tuple[int, int]:
        """in_features and out_features of the base layer."""
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise TypeError(f"MonoLoRA cannot read the sizes of a {type(self.base_layer).__name__}.")
        return in_features, out_features

    @property
    def units_dim(self) -> int:
        """Dimension of the latents that counts the r units, negative."""
        return -1

    def new_encoder(self, r: int, bias: bool) -> nn.Module:
        """A, with the bias b or without, which maps the layer's input to r latents at each position."""
        raise NotImplementedError

    def new_decoder(self, r: int) -> nn.Module:
        """B, which maps r latents to the layer's output at each position."""
        raise NotImplementedError

    def update_layer(
        self,
        adapter_name: str,
        *,
        r: int,
        scaling: float,
        dropout: float,
        activation: str,
        k: int | None,
        encoder_bias: bool,
        frozen_encoder: bool,
        init_weights: bool | str,
        inference_mode: bool,
        invocations: Invocations | None = None,
    ) -> None:
        """Add the adapter `adapter_name`.

        Args:
            r: rank, a positive integer.
            scaling: the scale s, positive.
            dropout: probability in [0, 1) of zeroing an element of x before A.
            activation: a key of `ACTIVATIONS`, or "topk".
            k: of "topk", how many latents of a position stay at most; 1 to r.
            encoder_bias: whether sigma acts on A x + b, b of r numbers, in place of A x.
            frozen_encoder: A and b never train.
            init_weights: see `MonoLoraConfig`.
            inference_mode: leave the adapter frozen.
            invocations: of the model, where the adapter acts from its invocation tokens on only.
        """
        self.r[adapter_name] = r
        self.initial_scaling[adapter_name] = self.scaling[adapter_name] = scaling
        self.monolora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        sigma = ACTIVATIONS[activation]() if k is None else TopK(k, self.units_dim)
        self.monolora_activation[adapter_name] = sigma
        if invocations is not None:
            self.monolora_invocations[adapter_name] = invocations
        self.frozen_encoder[adapter_name] = frozen_encoder
        self.monolora_encoder[adapter_name] = self.new_encoder(r, encoder_bias)
        self.monolora_decoder[adapter_name] = self.new_decoder(r)
        self.reset_parameters(adapter_name, init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def reset_parameters(self, adapter_name: str, init_weights: bool | str) -> None:
        """Initialise B as LoRA does and A at random: relu'(0) = 0, so an encoder of zeros could not learn.

        b starts at zero where it trains, and where it does not, at random as A.
        """
        encoder: Any = self.monolora_encoder[adapter_name]
        decoder: Any = self.monolora_decoder[adapter_name]
        if init_weights == "gaussian":
            nn.init.normal_(encoder.weight, std=1 / self.r[adapter_name])
        else:
            encoder.reset_parameters()  # Kaiming uniform as in LoRA; N(0, 1) in an embedding
        if getattr(encoder, "bias", None) is not None:
            if self.frozen_encoder[adapter_name]:
                bound = encoder.weight[0].numel() ** -0.5
                nn.init.uniform_(encoder.bias, -bound, bound)
            elif init_weights is not False:
                nn.init.zeros_(encoder.bias)
        if init_weights is False:
            decoder.reset_parameters()
        else:
            nn.init.zeros_(decoder.weight)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, which require gradients unless `inference_mode`; others do not."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze_encoders()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Let adapters require gradients, or not; encoders that are frozen by configuration never do."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_encoders()

    def _freeze_encoders(self) -> None:
        for adapter_name, frozen in self.frozen_encoder.items():
            if frozen and adapter_name in self.monolora_encoder:
                self.monolora_encoder[adapter_name].requires_grad_(False)

    def train_biases_with_encoders(self) -> None:
        """Let the bias of each encoder require gradients if its A does."""
        encoders: Any = self.monolora_encoder.values()
        for encoder in encoders:
            if getattr(encoder, "bias", None) is not None:
                encoder.bias.requires_grad_(encoder.weight.requires_grad)

    def weights(self, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """What an adapter has in this layer, by the names of its parts: A, its bias where there is one, and B."""
        for part in self.adapter_layer_names:
            for name, parameter in getattr(self, part)[adapter_name].named_parameters():
                yield f"{part}.{name}", parameter

    def latents(self, adapter_name: str, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """sigma(A dropout(x)) of one adapter: r numbers for each position of x, zeros where it does not act.

        `rows` tells which rows of the model's input x is of; None: of all.
        """
        encoder: Any = self.monolora_encoder[adapter_name]
        dropout = self.monolora_dropout[adapter_name]
        x = self._cast_input_dtype(x, encoder.weight.dtype)
        x = x if type(dropout) is nn.Identity else dropout(x)  # without dropout one call less for each token
        return self._where_it_acts(adapter_name, self.monolora_activation[adapter_name](encoder(x)), rows)

    def _where_it_acts(self, adapter_name: str, latents: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        invocations = self.monolora_invocations.get(adapter_name)
        if invocations is not None and getattr(self, "_is_replica", False):
            raise RuntimeError(f"Activated MonoLoRA adapters do not work in nn.DataParallel, {REPLICATED}")
        return latents if invocations is None else invocations.masked(adapter_name, latents, rows)

    def update(self, adapter_name: str, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """s B sigma(A dropout(x)) of one adapter, of the shape of the base layer's output for x.

        The scale multiplies the latents, r numbers a position in place of out_features.
        """
        latents = self.latents(adapter_name, x, rows)
        if self.observer is not None and torch.is_grad_enabled():
            latents = latents if latents.requires_grad else latents.requires_grad_()  # of a frozen A
            latents.register_hook(partial(self.observer, latents.detach()))
        return self.monolora_decoder[adapter_name](latents * self.scaling[adapter_name])

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The base's output plus the updates of the active adapters, in the base output's dtype.

        Args:
            x: what the base layer takes: (..., in_features) of any float dtype; (batch, in_channels, *lengths) under a
                convolution, also without batch; integer ids (...) under an embedding.
            adapter_names: for each row of x (its first dimension) the one adapter that applies to it, or
                "__base__" for none. Inference only.
        """
        with_gradient = torch.is_grad_enabled()
        if adapter_names is None and not (args or kwargs or self.disable_adapters):
            # In training also without: reentrant checkpointing computes a pass twice, and both have to drop the same.
            fuse = with_gradient or self.training
            faster = self.fused_forward(x) if fuse else direct.linear_forward(self, x)
            if faster is not None:
                return faster
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if adapter_names is not None:
            return self._add_updates_per_row(result, x, adapter_names)
        encoders = self.monolora_encoder
        for adapter_name in self.active_adapters:
            if adapter_name not in encoders:
                continue
            if with_gradient:
                result = result + self.update(adapter_name, x).to(result.dtype)
            else:  # one operation less; its gradient would be one of out_features numbers a position more
                unscaled = self.monolora_decoder[adapter_name](self.latents(adapter_name, x))
                result = torch.add(result, unscaled.to(result.dtype), alpha=self.scaling[adapter_name])
        return result

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor | None:
        """Compute what `forward` returns by one autograd function that trains faster; None if none is possible."""
        return None

    def _add_updates_per_row(self, result: torch.Tensor, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        for adapter_name in sorted(set(adapter_names) & self.monolora_encoder.keys()):
            rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter_name], device=x.device)
            result = result.index_add(0, rows, self.update(adapter_name, x[rows], rows).to(result.dtype))
        return result

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's weight, for code that looks at its dtype and device. What computes with it bypasses us."""
        if self.weight_is_read is not None:
            self.weight_is_read = True
        weight: torch.Tensor = super().weight
        return weight

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale s of `adapter`, where this layer has it, to `scale` times its configured value."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales s of the active adapters by `scale`."""
        for adapter_name in self.active_adapters:
            if adapter_name in self.scaling:
                self.scaling[adapter_name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales s of the active adapters by `scale`; None gives them their configured values back."""
        for adapter_name in self.active_adapters:
            if adapter_name in self.scaling:
                initial = self.initial_scaling[adapter_name]
                self.scaling[adapter_name] = initial if scale is None else self.scaling[adapter_name] / scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible, see `MERGE_ERROR`.

        Raises:
            NotImplementedError: always, before anything changes.
        """
        raise NotImplementedError(MERGE_ERROR)

    def unmerge(self) -> None:
        """Nothing is ever merged; warns, because PEFT calls this on paths that must not fail."""
        warnings.warn("MonoLoRA adapters are never merged, so there is nothing to unmerge.", stacklevel=2)

    def __repr__(self) -> str:
        return "monolora." + super().__repr__()


class MonoLoraLinear(MonoLoraLayer):
    """MonoLoRA on a layer that maps (..., in_features) to (..., out_features): A is (r, in), B (out, r)."""

    def new_encoder(self, r: int, bias: bool) -> nn.Module:
        return nn.Linear(self.in_features, r, bias=bias)

    def new_decoder(self, r: int) -> nn.Module:
        return nn.Linear(r, self.out_features, bias=False)

    def update(self, adapter_name: str, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        encoder: Any = self.monolora_encoder[adapter_name]
        decoder, activation = self.monolora_decoder[adapter_name], self.monolora_activation[adapter_name]
        if type(activation) is TopK and adapter_name not in self.monolora_invocations:
            seen = self._cast_input_dtype(x, encoder.weight.dtype)
            if sparse.is_faster(seen, encoder, activation, decoder):
                seen = self.monolora_dropout[adapter_name](seen)
                result = sparse.topk_update(seen, encoder, activation, decoder, self.scaling[adapter_name])
                if result.grad_fn is not None:
                    result.grad_fn.observer = self.observer  # type: ignore[attr-defined]
                return result
        return super().update(adapter_name, x, rows)

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor | None:
        active = [name for name in self.active_adapters if name in self.monolora_encoder]
        if len(active) != 1 or active[0] in self.monolora_invocations:
            return None
        (name,) = active
        dropout, encoder = self.monolora_dropout[name], self.monolora_encoder[name]
        activation, decoder = self.monolora_activation[name], self.monolora_decoder[name]
        if not fused.is_safe(x, self.base_layer, dropout, encoder, activation, decoder):
            return None
        result = fused.relu_update(x, self.base_layer, dropout, encoder, decoder, self.scaling[name])
        if result.grad_fn is not None:
            result.grad_fn.observer = self.observer  # type: ignore[attr-defined]
        return result


class MonoLoraConvolution(MonoLoraLayer):
    """MonoLoRA on a convolution of 1, 2 or 3 dimensions: A is a convolution to r channels with the base's kernel,
    stride, padding and dilation, (r, in, *kernel), B one with a kernel of 1, (out, r, 1, ...). Both see all channels,
    also where the base has groups."""

    @property
    def units_dim(self) -> int:
        return -1 - len(self.get_base_layer().kernel_size)

    def new_encoder(self, r: int, bias: bool) -> nn.Module:
        base = self.get_base_layer()
        return convolution_kind(base)(
            self.in_features, r, base.kernel_size, base.stride, base.padding, dilation=base.dilation, bias=bias
        )

    def new_decoder(self, r: int) -> nn.Module:
        return convolution_kind(self.get_base_layer())(r, self.out_features, 1, bias=False)


def convolution_kind(module: nn.Module) -> Any:
    """Which of torch's classes of convolutions `module` is of; None if it is none."""
    return next((kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind)), None)


class MonoLoraEmbedding(MonoLoraLayer):
    """MonoLoRA on `nn.Embedding`: A is a table (tokens, r), B (dim, r). Dropout does not apply to token ids.

    Where the base scales its output (`embed_scale` of Gemma and others), the update is scaled alike, as LoRA's is.
    """

    def new_encoder(self, r: int, bias: bool) -> nn.Module:
        if bias:
            raise ValueError(NO_BIAS_OF_AN_EMBEDDING.format(f"An embedding of {self.in_features} tokens"))
        base = self.get_base_layer()
        return nn.Embedding(
            self.in_features, r, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq, sparse=base.sparse
        )

    def new_decoder(self, r: int) -> nn.Module:
        return nn.Linear(r, self.out_features, bias=False)

    def latents(self, adapter_name: str, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        latents = self.monolora_activation[adapter_name](self.monolora_encoder[adapter_name](x))
        latents = self._where_it_acts(adapter_name, latents, rows)
        return latents * getattr(self.get_base_layer(), "embed_scale", 1)
