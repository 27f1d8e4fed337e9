"""`python -m evals`: its help, its options and its YAML file."""

from __future__ import annotations

import subprocess
import sys

import pytest

from evals import generate as module
from evals.generate import GenerateSettings
from evals.models import Adapter


def test_help_is_quick_and_errors_are_one_line(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "evals"]
    shown = subprocess.run([*command, "generate", "--help"], capture_output=True, text=True, check=True)
    assert "--adapters" in shown.stdout
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert not {"lm_eval", "peft", "transformers.modeling_utils", "matplotlib"} & imported
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert not {"torch", "transformers", "pandas", "numpy"} & imported


def test_the_command_passes_everything_on(settings, monkeypatch, capsys):
    from evals.__main__ import main

    seen = []
    monkeypatch.setattr(module, "generate", lambda s: seen.append(s) or type("Run", (), {"folder": "out"}))
    options = "--model m --tasks a b --output_dir o --adapters n=x y --no_base --limit 3 --max_new_tokens 4"
    options += " --batch_size 5 --dtype float32 --load_in_4bit --thinking on --thought_markers <a> </a>"
    main(["generate", *options.split()])
    adapters = [Adapter("n=x"), Adapter("y")]
    modes = ("float32", True, "on", ["<a>", "</a>"])
    assert seen == [GenerateSettings("m", ["a", "b"], "o", adapters, False, 3, 4, 5, *modes)]
    main(["generate", "--model", "m", "--tasks", "a", "--output_dir", "o", "--adapters"])  # a shell's empty list
    assert seen[1] == GenerateSettings("m", ["a"], "o")
    with pytest.raises(SystemExit, match=r"Error: --limit is 0, allowed is 1 or more"):
        main(["generate", "--model", "m", "--tasks", "a", "--output_dir", "o", "--limit", "0"])


def test_one_yaml_file_serves_all_commands_and_the_command_line_goes_before_it(monkeypatch, tmp_path, capsys):
    from evals.__main__ import main

    (tmp_path / "safety.yaml").write_text(
        "model: m\ntasks: [a]\noutput_dir: o\nadapters: [n=x]\nlimit: 3\njudges: [offline]\n"
        "task_data: {dolly_rows: 2}\n"
    )
    seen = []
    monkeypatch.setattr(module, "generate", lambda s: seen.append(s) or type("Run", (), {"folder": "out"}))
    main(["generate", "--config", str(tmp_path / "safety.yaml"), "--limit", "4"])
    assert seen == [GenerateSettings("m", ["a"], "o", [Adapter("n=x")], limit=4, task_data={"dolly_rows": 2})]
    monkeypatch.setattr("evals.judge.judge", lambda folder, **options: pytest.exit(f"{folder} {options['judges']}", 0))
    with pytest.raises(pytest.exit.Exception, match=r"o \['offline'\]"):
        main(["judge", "--config", str(tmp_path / "safety.yaml")])
    with pytest.raises(SystemExit):
        main(["generate", "--model", "m", "--tasks", "a", "--output_dir", "o", "--adapters", "a="])
    assert "--adapters has 'a='; write FOLDER or NAME=FOLDER." in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(talking_model, eval_data, request):
    request.getfixturevalue("no_loading")
    from evals.__main__ import main

    command = ["generate", "--model", str(talking_model), "--tasks", "xstest", "--max_new_tokens", "2"]
    with pytest.raises(SystemExit, match=r"Error: .*/proc/nowhere"):
        main([*command, "--output_dir", "/proc/nowhere"])
