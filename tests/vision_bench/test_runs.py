"""The run folder: rows, resuming, refusing, atomic writing."""

import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import vision_bench.runs as runs
from vision_bench.runs import (
    DIVERGED,
    Cell,
    Run,
    defaults,
    differences,
    file_checksum,
    option,
    parse,
    read_rows,
    recorded,
    run_as_program,
    write_atomic,
)

KEYS = {"recipe", "metric", "value", "n", "seed", "config", "seconds", "device", "versions", "commit", "time"}


def add(run, value=0.5, seed=0, **arm):
    run.add("accuracy", value, n=10, seed=seed, seconds=1.23456, device="cpu (2 threads)", **arm)


def test_rows_have_the_agreed_format_and_come_back(tmp_path):
    run = Run(tmp_path / "new" / "folder", "recipe", {"rate": 0.1, "names": ("a", "b")})
    add(run, method="lora")
    (row,) = read_rows(tmp_path / "new" / "folder" / "results.jsonl")
    assert set(row) == KEYS
    assert row["config"] == {"rate": 0.1, "names": ["a", "b"], "method": "lora"}
    assert (row["recipe"], row["metric"], row["value"], row["n"], row["seed"]) == ("recipe", "accuracy", 0.5, 10, 0)
    assert row["versions"]["torch"]
    assert row["seconds"] == 1.235
    again = Run(tmp_path / "new" / "folder", "recipe", {"rate": 0.1, "names": ["a", "b"]})
    assert again.rows == run.rows


def test_find_selects_by_metric_arm_and_seed(tmp_path):
    run = Run(tmp_path, "recipe", {"targets": ["q"]})
    add(run, 0.1, seed=0, method="lora")
    add(run, 0.2, seed=1, method="lora")
    add(run, 0.3, seed=0, method="monolora")
    assert [r["value"] for r in run.find("accuracy", method="lora")] == [0.1, 0.2]
    assert [r["value"] for r in run.find("accuracy", seed=0, targets=["q"])] == [0.1, 0.3]
    assert run.find("sparsity") == []


def test_another_configuration_or_recipe_is_refused_and_nothing_is_lost(tmp_path):
    add(Run(tmp_path, "recipe", {"rate": 0.1, "old": 1}))
    before = (tmp_path / "results.jsonl").read_bytes()
    message = r"another configuration \(new: None there, 2 now; old: 1 there, None now; rate: 0.1 there, 0.2 now\)"
    with pytest.raises(ValueError, match=message):
        Run(tmp_path, "recipe", {"rate": 0.2, "new": 2})
    with pytest.raises(ValueError, match="results of the recipe 'recipe'"):
        Run(tmp_path, "other", {"rate": 0.1, "old": 1})
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_folder_from_before_an_option_goes_on_while_the_option_is_at_its_default(tmp_path):
    add(Run(tmp_path, "recipe", {"rate": 0.1}))
    now = {"rate": 0.1, "layers": ("a", "b")}
    with pytest.raises(ValueError, match=r"\(layers: None there, \['a', 'b'\] now\)"):
        Run(tmp_path, "recipe", now)
    with pytest.raises(ValueError, match=r"\(layers: \['c'\] there, \['a', 'b'\] now\)"):
        Run(tmp_path, "recipe", now, defaults={"layers": ["c"]})
    again = Run(tmp_path, "recipe", now, defaults={"layers": ["a", "b"], "rate": 0.3})
    assert len(again.find("accuracy", seed=0)) == 1
    add(again, seed=1)
    # From now on the folder has the option, so that another default later is another configuration.
    Run(tmp_path, "recipe", now)
    with pytest.raises(ValueError, match=r"\(layers: \['a', 'b'\] there, \['c'\] now\)"):
        Run(tmp_path, "recipe", {"rate": 0.1, "layers": ["c"]}, defaults={"layers": ["c"]})


def test_a_folder_whose_default_has_changed_and_one_with_an_unknown_setting_are_refused(tmp_path):
    add(Run(tmp_path, "recipe", {"rate": 0.1, "old": 1}))
    with pytest.raises(ValueError, match=r"\(rate: 0.1 there, 0.2 now\)"):
        Run(tmp_path, "recipe", {"rate": 0.2, "old": 1}, defaults={"rate": 0.2, "old": 1})
    with pytest.raises(ValueError, match=r"\(old: 1 there, None now\)"):
        Run(tmp_path, "recipe", {"rate": 0.1}, defaults={"rate": 0.1})


def test_facts_stand_in_rows_and_do_not_tell_configurations_apart(tmp_path):
    run = Run(tmp_path, "recipe", {"rate": 0.1}, facts={"num_classes": 10})
    add(run, method="lora")
    assert run.rows[0]["config"] == {"rate": 0.1, "num_classes": 10, "method": "lora"}
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored == {"recipe": "recipe", "config": {"rate": 0.1}, "facts": {"num_classes": 10}}
    other = Run(tmp_path, "recipe", {"rate": 0.1}, facts={"num_classes": 11})
    assert other.config == {"rate": 0.1, "num_classes": 11}
    # A folder from before the fact was recorded gets it when it goes on.
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "recipe", "config": {"rate": 0.1}}))
    Run(tmp_path, "recipe", {"rate": 0.1}, facts={"num_classes": 10}).bind()
    assert json.loads((tmp_path / "config.json").read_text()) == stored


def test_differences_have_one_wording():
    before, now = {"a": 1, "b": {"c": (1, 2), "d": {}}}, {"a": 2, "b": {"c": [1, 2], "d": {"e": 3}}}
    assert (
        differences(before, now)
        == "a: 1 there, 2 now; b: {'c': [1, 2], 'd': {}} there, {'c': [1, 2], 'd': {'e': 3}} now"
    )
    assert differences(before, now, nested=True) == "a: 1 there, 2 now; d: {} there, None now; e: None there, 3 now"
    assert differences(before, before | {"new": 1}, {"new": 1}) == differences(before, before) == ""


def test_cells_without_a_row_are_lacking_unless_their_arm_diverged(tmp_path):
    run = Run(tmp_path, "recipe", {"sizes": [1, 2]})
    cells = [Cell("accuracy", seed, {"method": m, "size": (1, 2)}) for seed in (0, 1, 2) for m in ("ce", "nce")]
    cells.append(Cell("crossing", None))
    assert run.lacking(cells) == run.lacking(cells * 2) == cells
    add(run, seed=0, method="ce", size=[1, 2])
    add(run, seed=None, method="ce", size=[1, 2])
    assert run.lacking(iter(cells)) == cells[1:]
    run.add_diverged("not finite", n=0, seed=0, seconds=0, device="cpu", method="nce")
    run.add_diverged("not finite", n=0, seed=1, seconds=0, device="cpu", method="nce", size=[2, 1])
    assert run.lacking(cells) == cells[2:]
    run.add_diverged("not finite", n=0, seed=1, seconds=0, device="cpu")
    assert run.lacking(cells) == cells[4:]


def test_a_cell_without_a_seed_has_its_row_if_each_seed_of_the_run_has_one(tmp_path):
    run = Run(tmp_path, "recipe", {"seeds": [0, 1]})
    cell = Cell("accuracy", None, {"method": "base"})
    add(run, seed=0, method="base")
    assert run.lacking([cell]) == [cell]
    add(run, seed=1, method="base")
    assert run.lacking([cell]) == []
    add(run, seed=None, method="shared")
    assert run.lacking([Cell("accuracy", None, {"method": "shared"})]) == []
    assert run.lacking([Cell("accuracy", 0, {"method": "shared"})]) != []


@dataclass
class Training:
    output_dir: str = option(help="Folder.", changes_results=False)
    rates: list[float] = option([0.1, 0.2], help="Learning rates.")
    decay: float | None = option(None, help="Weight decay.")
    models: list[str] = option([], help="Names.", positional=True)


@dataclass
class Other:
    wide: bool = option(False, help="Wide.")


def test_settings_come_from_the_command_line_over_a_file(tmp_path, capsys):
    first, second = parse([Training, Other], ["--output_dir", "x"])
    assert (first, second) == (Training("x", [0.1, 0.2], None, []), Other(False))
    first.rates.append(1)
    assert Training("x").rates == [0.1, 0.2]
    path = tmp_path / "settings.yaml"
    path.write_text("rates: [0.5]\ndecay: 1e-3\nwide: true\nmodels: [a]\n")
    arguments = ["--output_dir", "x", "--config", str(path)]
    assert parse([Training, Other], arguments) == (Training("x", [0.5], 1e-3, ["a"]), Other(True))
    assert parse([Training, Other], ["b", *arguments, "--decay", "2"])[0] == Training("x", [0.5], 2.0, ["b"])
    assert parse([Training, Other], [*arguments, "b", "c"])[0].models == ["b", "c"]
    assert parse([Training], arguments, shared=[Other]) == (Training("x", [0.5], 1e-3, ["a"]),)
    for options, program in (({}, "this recipe"), ({"prog": "python -m vision_bench"}, "python -m vision_bench")):
        with pytest.raises(SystemExit):
            parse([Training], arguments, **options)
        assert f"sets wide, which {program} does not have" in capsys.readouterr().err


def test_what_is_recorded_of_settings_and_what_they_are_by_default():
    assert recorded(Training("x", [1.0]), Other(True)) == {"rates": [1.0], "decay": None, "models": [], "wide": True}
    assert defaults(Training, Other) == {"rates": [0.1, 0.2], "decay": None, "models": [], "wide": False}


def test_a_program_ends_with_one_line_where_the_user_can_mend_it():
    def main(error):
        raise error

    for error, message in (
        (ValueError("rate is 2"), "Error: rate is 2"),
        (FloatingPointError("diverged"), "Error: diverged"),
        (KeyboardInterrupt(), "Stopped. The same command continues."),
    ):
        with pytest.raises(SystemExit, match=message):
            run_as_program(lambda error=error: main(error))
    with pytest.raises(ZeroDivisionError):
        run_as_program(lambda: main(ZeroDivisionError()))


def test_a_run_without_results_leaves_the_folder_free(tmp_path):
    Run(tmp_path / "x", "recipe", {"rate": 0.1})
    assert not (tmp_path / "x").exists()
    Run(tmp_path / "x", "recipe", {"rate": 0.2})


def test_other_things_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        Run(tmp_path / "file", "recipe", {})
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"has a results\.jsonl without the config\.json"):
        Run(tmp_path, "recipe", {})
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "recipe", "config": {}}))
    (tmp_path / "results.jsonl").write_text('{"metric": "a"}\n{"metr\n{"metric": "b"}\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        Run(tmp_path, "recipe", {})


def test_only_the_main_process_writes(tmp_path):
    run = Run(tmp_path / "x", "recipe", {}, is_main=False)
    add(run)
    run.write("results.md", "text")
    assert len(run.rows) == 1
    assert not (tmp_path / "x").exists()


def test_find_equals_a_pass_over_all_rows_before_and_after_rows_are_added_or_replaced(tmp_path):
    run = Run(tmp_path, "recipe", {"rate": 0.5, "sizes": [1, 2]})

    def slow(metric, **arm):
        return [
            row
            for row in run.rows
            if row["metric"] == metric
            and all((row["config"] | {"seed": row["seed"]}).get(k) == v for k, v in arm.items())
        ]

    queries = [
        {}, {"seed": 1}, {"seed": None}, {"step": None}, {"step": 2}, {"method": "b", "seed": 0}, {"sizes": [1, 2]},
        {"rate": 0.5, "level": 0}, {"level": 0.0}, {"options": {"a": [1]}}, {"absent": 1}, {"rate": 0.4},
    ]  # fmt: skip

    def check():
        for metric in ("accuracy", "loss"):
            for query in queries:
                assert run.find(metric, **query) == slow(metric, **query), (metric, query)

    for i in range(30):
        arm = {"method": "ab"[i % 2], "level": float(i % 3)} | ({"step": i % 4} if i % 5 else {})
        run.add("accuracy", i, n=1, seed=None if i % 7 == 0 else i % 3, seconds=0, device="cpu", **arm)
        if i % 10 == 0:
            run.add("loss", i, n=1, seed=i % 3, seconds=0, device="cpu", options={"a": [1]})
            check()
    check()
    assert run.find("accuracy", sizes=(1, 2)) == run.find("accuracy")
    run.replace(run.rows[::2])
    check()
    assert run.find("accuracy")
    assert Run(tmp_path, "recipe", {"rate": 0.5, "sizes": [1, 2]}).rows == run.rows


def test_many_rows_cost_one_write_of_their_own_size(tmp_path, monkeypatch):
    written, synced = [], []
    real_write, real_sync = runs.LineAppender.append, os.fsync
    monkeypatch.setattr(
        runs.LineAppender, "append", lambda self, rows: (written.append(len(rows)), real_write(self, rows))
    )
    run = Run(tmp_path, "recipe", {"rate": 0.1})
    run.add("m", 0, n=1, seed=None, seconds=0, device="cpu")
    written.clear()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), real_sync(descriptor)))
    path = tmp_path / "results.jsonl"
    inode = path.stat().st_ino
    for i in range(20):
        rows = [run.row("m", j, n=1, seed=j, seconds=0, device="cpu", cell=i) for j in range(50)]
        run.add_rows(rows)
    assert written == [50] * 20
    assert len(synced) == 20
    assert path.stat().st_ino == inode  # appended to, not written anew
    assert [len(run.find("m", cell=i)) for i in range(20)] == [50] * 20
    assert read_rows(path) == run.rows


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_row_holds_a_number_that_is_none(tmp_path, value):
    run = Run(tmp_path, "recipe", {})
    with pytest.raises(ValueError, match=r"accuracy is -?(nan|inf) for seed 3, .*'lora'.*add_diverged"):
        add(run, value, seed=3, method="lora")
    with pytest.raises(ValueError, match="JSON compliant"):
        add(run, 0.5, level=value)
    add(run, None, method="lora")
    assert [row["value"] for row in read_rows(tmp_path / "results.jsonl")] == [None]


def test_a_diverged_arm_is_marked(tmp_path):
    run = Run(tmp_path, "recipe", {"rate": 0.1})
    run.add_diverged("the weights are not finite", n=0, seed=2, seconds=1, device="cpu", method="lora")
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert run.find(DIVERGED, method="lora", seed=2) == [row]
    assert (row["value"], row["config"]["reason"]) == (1.0, "the weights are not finite")


def test_rows_of_before_with_nan_are_read_as_undefined(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"metric": "a", "value": NaN}\n')
    assert read_rows(tmp_path / "results.jsonl") == [{"metric": "a", "value": None}]


def test_a_row_that_a_kill_cut_is_left_out_and_written_again(tmp_path):
    run = Run(tmp_path, "recipe", {})
    add(run, 0.1, seed=0)
    add(run, 0.2, seed=1)
    del run
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    again = Run(tmp_path, "recipe", {})
    assert [row["value"] for row in again.rows] == [0.1]
    add(again, 0.3, seed=1)
    assert [row["value"] for row in read_rows(path)] == [0.1, 0.3]


def in_another_process(tmp_path, code):
    program = f"from vision_bench.runs import Run\nrun = Run({str(tmp_path)!r}, 'recipe', {{}})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(runs.__file__).parents[2]
    )


ADD = "run.add('accuracy', {}, n=1, seed=5, seconds=0, device='cpu')"


def test_a_second_process_is_refused_and_loses_no_row(tmp_path):
    run = Run(tmp_path, "recipe", {})
    run.bind()
    other = in_another_process(tmp_path, ADD.format(0.7))
    assert other.returncode == 1
    assert "Another process is working in" in other.stderr
    add(run, 0.1)
    assert [row["value"] for row in read_rows(tmp_path / "results.jsonl")] == [0.1]
    add(Run(tmp_path, "recipe", {}), 0.2)  # the same process may
    del run
    assert in_another_process(tmp_path, ADD.format(0.7)).returncode == 0


def test_rows_that_another_process_adds_before_the_folder_is_bound_are_kept(tmp_path):
    run = Run(tmp_path, "recipe", {})
    assert in_another_process(tmp_path, ADD.format(0.7)).returncode == 0
    add(run, 0.1)
    assert [row["value"] for row in run.rows] == [0.7, 0.1]
    assert read_rows(tmp_path / "results.jsonl") == run.rows
    late = Run(tmp_path / "new", "recipe", {})
    assert in_another_process(tmp_path / "new", ADD.format(0.7)).returncode == 0
    assert [row["value"] for row in late.rows] == []
    late.config = {"rate": 0.1}
    with pytest.raises(ValueError, match="results of another configuration"):
        late.bind()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error_of_the_system_and_keeps_the_rows_before(tmp_path, monkeypatch):
    run = Run(tmp_path, "recipe", {})
    add(run, 0.1)
    monkeypatch.setattr(run._appender, "_file", open("/dev/full", "ab"))  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        add(run, 0.2)
    assert [row["value"] for row in read_rows(tmp_path / "results.jsonl")] == [0.1]
    assert [row["value"] for row in run.rows] == [0.1]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc")
def test_a_folder_that_cannot_be_written_is_refused_when_it_is_bound(tmp_path):
    with pytest.raises(ValueError, match=r"--output_dir /proc/self/results cannot be written to \(.*choose another"):
        Run("/proc/self/results", "recipe", {}).bind()


def test_checksums_follow_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_checksum(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "large").write_bytes(bytes(2**22 + 1))
    before = file_checksum(tmp_path / "large")
    (tmp_path / "large").write_bytes(bytes(2**22) + b"1")
    assert file_checksum(tmp_path / "large") != before


def test_the_commit_is_that_of_the_repository_the_code_is_part_of(tmp_path, monkeypatch):
    """A copy in an environment inside somebody's repository is not of that repository's commit."""
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    package = tmp_path / ".venv" / "site-packages"
    package.mkdir(parents=True)
    shutil.copy(runs.run.__file__, package / "run.py")
    (tmp_path / "theirs.py").write_text("")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "theirs.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "theirs"], check=True)
    monkeypatch.setattr(runs.run, "__file__", str(package / "run.py"))
    commit = runs.commit.__wrapped__
    assert commit() is None
    subprocess.run([*git, "add", "-f", ".venv"], check=True)
    subprocess.run([*git, "commit", "-qm", "ours too"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert commit() == head
    (package / "run.py").write_text("# changed\n")
    assert commit() == head + "-dirty"


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "results.md"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_file_do_not_meet(tmp_path):
    texts = [letter * 20_000 for letter in "abcd"]
    with ThreadPoolExecutor(len(texts)) as threads:
        list(threads.map(lambda text: [write_atomic(tmp_path / "one", text) for _ in range(20)], texts))
    assert (tmp_path / "one").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
