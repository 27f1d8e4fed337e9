"""Measures beside the loss in the lines that a Trainer logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class LoggedMeasures(TrainerCallback):
    """Adds `measures` to each line with a loss; a callback ahead of the loggers reaches these, too."""

    def measures(self, state: TrainerState) -> dict[str, float]:
        """Numbers by the names under which they are logged; none leaves the line as it is."""
        raise NotImplementedError

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return  # a line of an evaluation, or the closing summary
        measured = self.measures(state)
        logs.update(measured)
        state.log_history[-1].update(measured)
