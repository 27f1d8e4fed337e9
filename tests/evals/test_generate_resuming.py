"""Generation that was interrupted, repeated or extended ends as if done at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from evals.generate import generate
from evals.models import Adapter
from evals.records import read_completions
from tests.evals.conftest import NEW_TOKENS, completions, rows
from vision_bench.runs import LineAppender, read_rows


def test_what_is_there_is_not_done_again(settings, request):
    generate(replace(settings, tasks=["xstest"], adapters=settings.adapters[:1]))
    generate(settings)
    first = completions(settings), rows(settings)
    assert len(first[0]) == 3 * 22
    request.getfixturevalue("no_loading")
    other = Adapter(f"other/lora-seed0={settings.adapters[0].source}")
    with pytest.raises(ValueError, match=r"as that of 'lora-seed0' does; tell them apart with NAME=FOLDER"):
        generate(replace(settings, adapters=[other]))
    generate(settings)
    assert (completions(settings), rows(settings)) == first


def test_a_run_that_broke_off_ends_as_if_it_had_not(settings, tmp_path, monkeypatch, capsys):
    generate(replace(settings, output_dir=str(tmp_path / "whole")))
    append, calls = LineAppender.append, []

    def break_off(self, new):
        append(self, new)
        calls.append(self.path.name)
        if calls.count("completions.jsonl") == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LineAppender, "append", break_off)
        with pytest.raises(KeyboardInterrupt):
            generate(settings)
    path = tmp_path / "out" / "completions.jsonl"
    before = path.read_bytes()
    assert before.count(b"\n") == 4 + 4 + 4 + 2 + 2 + 4
    path.write_bytes(before[:-5])  # and the last line was cut
    generate(settings)
    assert "the last line, 20, is cut after" in capsys.readouterr().out
    assert path.read_bytes().startswith(before[: before[:-1].rindex(b"\n") + 1])

    def by_key(folder):
        return {row.key: row for row in read_completions(tmp_path / folder / "completions.jsonl").rows}

    def values(folder):
        found = read_rows(tmp_path / folder / "results.jsonl")
        return {
            (r["metric"], r["config"]["task"], r["config"]["adapter"]): r["value"]
            for r in found
            if r["metric"] != "seconds"
        }

    assert by_key("out") == by_key("whole")
    assert values("out") == values("whole")


def test_a_run_killed_between_two_rows_of_a_task_writes_the_others(settings):
    settings = replace(settings, tasks=["dolly"], adapters=[])
    generate(settings)
    path = f"{settings.output_dir}/results.jsonl"
    whole = rows(settings)
    with open(path, "w") as file:
        file.write(json.dumps(whole[0]) + "\n")
    generate(settings)
    assert [(r["metric"], r["value"]) for r in rows(settings)][:-1] == [(r["metric"], r["value"]) for r in whole][:-1]


@pytest.mark.slow
def test_kill_9_and_resume(settings, tmp_path):
    """The program is killed again and again, and at the end every prompt was answered once and as if never killed."""
    whole = replace(settings, output_dir=str(tmp_path / "whole"), tasks=["beavertails_eval", "dolly"])
    generate(whole)
    program = (
        "import time, vision_bench.runs as c\n"
        "real = c.LineAppender.append\n"
        "def slowly(self, rows):\n    real(self, rows)\n    print('batch', flush=True)\n    time.sleep(0.3)\n"
        "c.LineAppender.append = slowly\n"
        "from evals.__main__ import main\nmain()\n"
    )
    adapters = [adapter.text for adapter in settings.adapters]
    options = ["--model", settings.model, "--tasks", *whole.tasks, "--output_dir", settings.output_dir]
    options += ["--adapters", *adapters, "--max_new_tokens", str(NEW_TOKENS), "--batch_size", "4"]
    for batches in (2, 5, 1000):
        process = subprocess.Popen(
            [sys.executable, "-c", program, "generate", *options], stdout=subprocess.PIPE, text=True
        )
        for _, line in zip(range(batches), iter(process.stdout.readline, ""), strict=False):
            last = line
        if batches < 1000:
            process.send_signal(signal.SIGKILL)
        process.stdout.close()
        code = process.wait(300)
        assert code == (-signal.SIGKILL if batches < 1000 else 0), last
    assert {row.key: row for row in completions(settings)} == {row.key: row for row in completions(whole)}
