"""`python -m evals judge`: nothing is judged twice, nothing lost, and nothing judged on texts that are not there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock

from evals.__main__ import main
from evals.judge import judge
from evals.records import read_verdicts
from vision_bench.runs import LineAppender, read_rows

TEXTS = [(f"prompt {i} " * (1 + i % 5), "response " * (i % 7)) for i in range(10)]


def verdicts(folder):
    return read_verdicts(folder / "verdicts.jsonl").rows


def edit(folder, change):
    path = folder / "verdicts.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


@pytest.fixture
def folder(completions_folder):
    return completions_folder(TEXTS)


@pytest.fixture
def judges(make_shieldgemma, beaverdam):
    return [f"shieldgemma={make_shieldgemma()}", f"beaverdam={beaverdam}"]


@pytest.fixture
def no_judging(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("evals.judges.ShieldGemma.load", fail)
    monkeypatch.setattr("evals.judges.BeaverDam.load", fail)


def test_every_completion_gets_a_verdict_of_every_judge_once(folder, judges, request):
    run = judge(folder, judges, batch_size=4)
    found = verdicts(folder)
    assert Counter(v.judge for v in found) == dict.fromkeys(judges, 30)
    assert len({v.key for v in found}) == 60
    assert {v.outcome for v in found} <= {"safe", "unsafe"}
    by_metric = {(r["metric"], r["config"]["judge"], r["config"]["adapter"]) for r in run.rows}
    assert {("unsafe", name, arm) for name in judges for arm in (None, "lora-seed0")} <= by_metric
    assert read_rows(folder / "results.jsonl") == run.rows
    request.getfixturevalue("no_judging")
    before = (folder / "verdicts.jsonl").read_bytes()
    again = judge(folder, judges, batch_size=4)
    assert (folder / "verdicts.jsonl").read_bytes() == before
    assert [(r["metric"], r["value"]) for r in again.rows] == [(r["metric"], r["value"]) for r in run.rows]


def test_batches_do_not_matter(completions_folder, judges):
    one, many = completions_folder(TEXTS, "one"), completions_folder(TEXTS, "many")
    judge(one, judges, batch_size=1)
    judge(many, judges, batch_size=7)
    found, expected = ({v.key: v for v in verdicts(f)} for f in (many, one))
    assert found.keys() == expected.keys()
    for key, verdict in found.items():
        assert verdict.outcome == expected[key].outcome
        assert list(verdict.scores.values()) == pytest.approx(list(expected[key].scores.values()), abs=1e-4)


def test_what_broke_off_continues(folder, judges, monkeypatch, capsys):
    append, calls = LineAppender.append, []

    def break_off(self, rows):
        append(self, rows)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LineAppender, "append", break_off)
        with pytest.raises(KeyboardInterrupt):
            judge(folder, judges, batch_size=4)
    before = (folder / "verdicts.jsonl").read_bytes()
    assert before.count(b"\n") == 12
    (folder / "verdicts.jsonl").write_bytes(before[:-7])
    judge(folder, judges, batch_size=4)
    assert "the last line, 12, is cut after" in capsys.readouterr().out
    after = (folder / "verdicts.jsonl").read_bytes()
    assert after.startswith(before[: before[:-1].rindex(b"\n") + 1])
    assert len({v.key for v in verdicts(folder)}) == 60 == after.count(b"\n")


@pytest.mark.slow
def test_a_killed_process_loses_nothing(completions_folder, judges):
    folder = completions_folder([(f"prompt {i}", "word " * 60) for i in range(200)])
    command = [sys.executable, "-m", "evals", "judge", "--output_dir", folder, "--judges", judges[0]]
    process = subprocess.Popen([*command, "--judge_batch_size", "2"], cwd=Path(__file__).parents[2], env=os.environ)
    path = folder / "verdicts.jsonl"
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") > 10):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert 10 < whole.count(b"\n") < 600
    subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ, check=True, timeout=300)
    assert path.read_bytes().startswith(whole)
    assert len({v.key for v in verdicts(folder)}) == 600 == path.read_bytes().count(b"\n")


@pytest.mark.slow
def test_a_full_disk_loses_nothing(completions_folder):
    """A limit of the size of files stands for it: the write that does not fit leaves a part of its lines."""
    folder = completions_folder([(f"prompt {i}", "I can't help with that.") for i in range(40)])
    program = (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from evals.__main__ import main\nmain()\n"
    )
    command = [sys.executable, "-c", program, "judge", "--output_dir", folder, "--judges", "refusal"]
    where = {"cwd": Path(__file__).parents[2], "env": os.environ, "timeout": 300}
    failed = subprocess.run(command, capture_output=True, text=True, **where)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("Error: [Errno 27] File too large")
    assert "Traceback" not in failed.stderr
    path = folder / "verdicts.jsonl"
    whole = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
    assert 10 < whole.count(b"\n") < 120
    run = judge(folder, ["refusal"])
    assert path.read_bytes().startswith(whole)
    assert len({v.key for v in verdicts(folder)}) == 120 == path.read_bytes().count(b"\n")
    assert run.find("full_refusal", judge="refusal", adapter=None, category=None)[0]["n"] == 40


def test_more_completions_and_judges_later(completions_folder, judges):
    folder = completions_folder(TEXTS, arms=(None,))
    judge(folder, judges[:1])
    completions_folder(TEXTS, arms=(None, "lora-seed0"))
    run = judge(folder, judges)
    assert Counter(v.judge for v in verdicts(folder)) == dict.fromkeys(judges, 20)
    assert {r["config"]["adapter"] for r in run.rows if r["metric"] == "unsafe"} == {None, "lora-seed0"}
    assert [r for r in run.rows if r["metric"] == "unsafe_difference"]


def test_strange_texts_are_judged(completions_folder, make_shieldgemma, beaverdam):
    judges = [f"shieldgemma={make_shieldgemma(max_position_embeddings=512)}", f"beaverdam={beaverdam}"]
    strange = ["", "x" * 100_000, "مرحبا \u202eכן", "👩‍👩‍👧‍👦" * 20, "\u2028line\x00\x1b[0m", "<eos>" * 50]
    folder = completions_folder([(text, text) for text in strange], arms=(None,))
    judge(folder, judges)
    by_prompt = {(v.judge, v.prompt_id): v.outcome for v in verdicts(folder)}
    assert len(by_prompt) == 12
    assert all(by_prompt[name, "1"] in ("unsafe", "truncated") for name in judges)


def test_verdicts_on_answers_that_were_cut_off_do_not_count(folder, judges, capsys):
    judge(folder, judges[1:])
    path = folder / "completions.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    run = judge(folder, judges[1:])
    assert "1 verdicts are on answers that completions.jsonl does not have" in capsys.readouterr().out
    counted = [r["n"] for r in run.rows if r["metric"] == "unsafe" and not r["config"].get("category")]
    assert sum(counted) == 29


def test_a_killed_generation_of_this_folder_can_go_on_after_judging(completions_folder, judges):
    folder = completions_folder(TEXTS)
    (folder / "config.json").write_text(json.dumps({"recipe": "evals", "config": {"limit": None}}))
    judge(folder, judges[1:])
    assert json.loads((folder / "config.json").read_text())["config"] == {"limit": None}
    (folder / "config.json").write_text(json.dumps({"recipe": "sst2", "config": {}}))
    with pytest.raises(ValueError, match="holds results of the recipe 'sst2'"):
        judge(folder, judges)
    assert len(verdicts(folder)) == 30, "before it judged"


def test_one_process_at_a_time(folder, judges):
    with FileLock(folder / ".lock"), pytest.raises(ValueError, match="Another process is working in"):
        judge(folder, judges)


class TestBadInput:
    @pytest.fixture
    def folder(self, completions_folder):
        return completions_folder(TEXTS[:3])

    @pytest.fixture(autouse=True)
    def judged(self, folder, judges):
        judge(folder, judges[1:])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda lines: [lines[0] | {"text": "0" * 16}, *lines[1:]],
                "whose text is another one in the completions",
            ),
            (lambda lines: [lines[0] | {"settings": {}}, *lines[1:]], "under other settings"),
            (lambda lines: [lines[0] | {"seconds": "1"}, *lines[1:]], "`seconds` is '1', a number is needed"),
            (lambda lines: [lines[0] | {"adapter": [1]}, *lines[1:]], "`adapter` is .*, a text is needed, or null"),
            (lambda lines: [*lines, lines[3]], "line 10 .*judge .*stands in line 4 already"),
            (lambda lines: [lines[0] | {"outcome": "fine"}, *lines[1:]], "allowed are safe, unsafe, unparsed"),
            (lambda lines: [lines[0] | {"scores": {"hate": 7}}, *lines[1:]], "allowed are numbers from 0 to 1"),
            (
                lambda lines: [{"prompt_id": "1"}, *lines],
                "line 1 .*lacks adapter, category, judge, .*judge its completion again",
            ),
        ],
    )
    def test_verdicts_that_do_not_belong_here(self, folder, judges, no_judging, change, message):
        edit(folder, change)
        with pytest.raises(ValueError, match=message):
            judge(folder, judges)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"judges": []}, "--judges is empty"),
            ({"judges": ["offline", "offline"]}, "--judges has offline more than once"),
            ({"batch_size": 0}, "--judge_batch_size is 0, allowed is 1 or more"),
            ({"dtype": "int4"}, "--judge_dtype is 'int4', allowed are auto"),
            ({"judges": ["beaverdam"]}, r"Cannot load the model 'PKU-Alignment/beaver-dam-7b'.*hf auth login"),
        ],
    )
    def test_options(self, folder, judges, no_judging, options, message):
        with pytest.raises(ValueError, match=message):
            judge(folder, **{"judges": judges} | options)

    def test_a_judge_under_two_names(self, folder, make_shieldgemma, tmp_path, no_judging):
        shutil.copytree(make_shieldgemma(), tmp_path / "copy")
        judges = [f"shieldgemma={tmp_path / name}" for name in ("shieldgemma", "copy")]
        with pytest.raises(ValueError, match=r"shieldgemma' and '.*copy', which are the same judge, byte for byte"):
            judge(folder, judges)

    def test_no_completions(self, tmp_path, judges, no_judging):
        with pytest.raises(ValueError, match=r"completions\.jsonl does not exist"):
            judge(tmp_path / "nowhere", judges)
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "completions.jsonl").write_text('{"prompt_id"')
        with pytest.raises(ValueError, match="has no complete row"):
            judge(tmp_path / "empty", judges)

    def test_errors_are_one_line_on_the_command_line(self, tmp_path, judges, no_judging):
        with pytest.raises(SystemExit, match="Error: The completions file"):
            main(["judge", "--output_dir", str(tmp_path / "nowhere"), "--judges", judges[0]])


def test_a_judge_that_cannot_be_had_stops_a_run_before_it_generates(talking_model, tmp_path, eval_data, monkeypatch):
    monkeypatch.setattr("evals.generate.load_base", None)
    options = f"--model {talking_model} --tasks xstest --output_dir {tmp_path / 'out'} --max_new_tokens 8"
    with pytest.raises(SystemExit, match="Error: Cannot load the model 'google/shieldgemma-2b'"):
        main(["run", *options.split(), "--judges", "shieldgemma=google/shieldgemma-2b"])
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_table(folder, judges, capsys):
    command = ["judge", "--output_dir", str(folder), "--judges", *judges, "--judge_batch_size", "4"]
    main(command)
    edit(folder, lambda lines: [line | {"outcome": ["safe", "unsafe"][i % 3 % 2]} for i, line in enumerate(lines)])
    capsys.readouterr()
    main(command)
    out = capsys.readouterr().out
    tables = (folder / "results.md").read_text()
    assert "### Differences on the same prompts" in tables
    assert "### Agreement of judges" in tables
    assert "### Unsafe answers by category" in tables
    for name in ("shieldgemma=shieldgemma", "beaverdam=beaverdam"):
        assert f"judged by {name}\n" in out
    assert f"Comparisons and categories: {folder / 'results.md'}\n" in out
