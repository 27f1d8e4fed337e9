"""Plain lines that say how far work is."""

import pytest

from evals import progress
from evals.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_lines_of_an_hour_become_rarer(clock, capsys):
    shown = Progress("Judging", 3600, "answers")
    for second in range(1, 3601):
        clock.now = float(second)
        shown.update(detail="loss 0.5")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Judging: 10 of 3600 answers, loss 0.5, about 60 min left"
    assert lines[1].startswith("Judging: 21 of 3600 answers")
    assert 30 < len(lines) < 50


def test_what_was_there_before_says_nothing_of_the_rest(clock, capsys):
    shown = Progress("Generating", 100, "answers", done=80)
    clock.now = 20.0
    shown.update(10)
    assert capsys.readouterr().out == "Generating: 90 of 100 answers, about 20 s left\n"


def test_short_work_other_processes_and_the_end_are_silent(clock, capsys):
    short, other, none = Progress("a", 10, "x"), Progress("b", 10, "x", shown=False), Progress("c", 10, "x", done=5)
    clock.now = 9.0
    short.update()
    clock.now = 30.0
    other.update()
    none.update(0)
    short.update(9)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text
