"""How far long work is, in plain lines, which a terminal and a log file show alike."""

from __future__ import annotations

import time


class Progress:
    """Says now and then how much of a piece of work is done, and how long the rest will take.

        progress = Progress("Judging (offline)", 600, "answers")
        for batch in batches:
            ...
            progress.update(len(batch))

    The first line comes after ten seconds, the next ones after ten seconds and a tenth of the time so far: what takes
    seconds says nothing, and what takes a day says it in about a hundred lines.

    Args:
        title: of the work.
        total: how much there is to do.
        unit: what is counted, in the plural.
        done: how much was done before.
        shown: whether this process says anything.
    """

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0, shown: bool = True) -> None:
        self._title, self._total, self._unit, self._shown = title, total, unit, shown
        self._before = self._done = done
        self._start = self._said = time.monotonic()

    def update(self, count: int = 1, detail: str = "") -> None:
        """Count work as done; `detail` is said with it."""
        self._done += count
        now = time.monotonic()
        is_early = now - self._said < 10 + (self._said - self._start) / 10
        if not self._shown or is_early or not self._before < self._done < self._total:
            return
        self._said = now
        left = (now - self._start) / (self._done - self._before) * (self._total - self._done)
        middle = f", {detail}" if detail else ""
        print(
            f"{self._title}: {self._done} of {self._total} {self._unit}{middle}, about {duration(left)} left",
            flush=True,
        )


def duration(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours, else hours: "40 s", "15 min", "3 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
