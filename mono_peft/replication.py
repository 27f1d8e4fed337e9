"""`layer_replication`: a model of some of its layers several times, which share the base's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.tuners_utils import replicate_layers
from torch import nn


class Replication:
    """Layers of a model put in the place of its layers, range after range, by PEFT's `replicate_layers`.

    Args:
        model: of one of the layouts that PEFT knows (Llama, Bert, Falcon).
        ranges: (first, last + 1) each.

    Raises:
        ValueError: PEFT does not find the model's layers, or it has fewer. The model is left as it was.
    """

    def __init__(self, model: nn.Module, ranges: Sequence[Sequence[int]]) -> None:
        children = [(parent, *named) for parent in model.modules() for named in parent.named_children()]
        lists = [(parent, name, child) for parent, name, child in children if isinstance(child, nn.ModuleList)]
        try:
            replicate_layers(model, [(first, end) for first, end in ranges])
        except IndexError:
            raise ValueError(f"`layer_replication={ranges}` names layers that this model does not have.") from None
        ((self._parent, self._name, self._layers),) = (
            (parent, name, child) for parent, name, child in lists if getattr(parent, name) is not child
        )
        self._config: Any = getattr(self._parent, "config", None)
        self._config_before: dict[str, Any] = {"num_hidden_layers": len(self._layers)}
        for option, value in vars(self._config).items() if self._config is not None else ():
            # What says something of each layer, such as `layer_types`, by which a pass chooses the attention mask.
            if "layer" in option and isinstance(value, (list, tuple)) and len(value) == len(self._layers):
                self._config_before[option] = value
        for option, value in self._config_before.items():
            if option != "num_hidden_layers":
                setattr(self._config, option, [value[i] for first, end in ranges for i in range(first, end)])

    def undo(self) -> None:
        """Give the model its own layers back."""
        setattr(self._parent, self._name, self._layers)
        for option, value in self._config_before.items():
            if hasattr(self._config, option):
                setattr(self._config, option, value)
