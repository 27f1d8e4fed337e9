"""`python -m mono_peft.run`: any program with the tuner registered."""

import subprocess
import sys

import pytest
from peft import get_peft_model

from mono_peft import MonoLoraConfig
from mono_peft.run import main

SCRIPT = """
import sys
import peft, transformers
base, adapter = sys.argv[1:]
model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
print("loaded", model.peft_config["default"].peft_type.value, __name__)
"""


@pytest.fixture
def adapter(llama, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    get_peft_model(llama, MonoLoraConfig()).save_pretrained(tmp_path / "adapter")
    (tmp_path / "load.py").write_text(SCRIPT)
    return tmp_path


def run(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)


def test_a_script_that_does_not_import_us_loads_our_adapters(adapter):
    arguments = (adapter / "load.py", adapter / "base", adapter / "adapter")
    without = run(*arguments)
    assert without.returncode == 1
    assert "KeyError: 'MONOLORA'" in without.stderr
    result = run("-m", "mono_peft.run", *arguments)
    assert result.returncode == 0, result.stderr
    assert "loaded MONOLORA __main__" in result.stdout


@pytest.fixture
def restored(monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("restored")
class TestInProcess:
    def test_a_module(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["json.tool", "--help"])
        assert stop.value.code == 0
        assert "--sort-keys" in capsys.readouterr().out

    def test_an_installed_command(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["accelerate", "env", "--help"])
        assert stop.value.code == 0
        assert "config_file" in capsys.readouterr().out

    def test_exit_codes_and_arguments_pass_through(self, tmp_path):
        (tmp_path / "beside.py").write_text("CODE = 4")
        (tmp_path / "fails.py").write_text("import sys, beside; sys.exit(beside.CODE + len(sys.argv))")
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path / "fails.py"), "one", "two"])
        assert stop.value.code == 7

    def test_what_an_installed_command_returns_is_the_exit_code(self):
        with pytest.raises(SystemExit) as stop:
            main(["pytest", "/no/such/folder"])
        assert stop.value.code == 4

    def test_nonsense(self):
        with pytest.raises(SystemExit, match=r"'no\.such\.program' is no file, no installed command and no module"):
            main(["no.such.program"])
        with pytest.raises(SystemExit, match=r"python -m mono_peft\.run PROGRAM"):
            main([])
