"""What a trainer of the language recipes says while it trains: plain lines, in place of bars and dictionaries."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evals.progress import Progress


class TrainingProgress(TrainerCallback):
    """Says the steps done, the last logged loss, and how long the rest takes; the main process does."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Begin to count, behind the steps of a checkpoint that training continues from."""
        self._progress = Progress(
            f"Training {self._name}",
            state.max_steps,
            "steps",
            done=state.global_step,
            shown=state.is_world_process_zero,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Count a step; said with it is the loss that was logged last."""
        if self._progress is not None:
            losses = (line["loss"] for line in reversed(state.log_history) if "loss" in line)
            self._progress.update(detail=f"loss {loss:.3g}" if (loss := next(losses, None)) is not None else "")
