"""MonoLoRA in PEFT's tables."""

import copy
import importlib
import json
import pickle
import subprocess
import sys

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import mono_peft
from mono_peft import names, register


def test_the_member_behaves_like_a_native_one():
    member = PeftType("MONOLORA")
    assert member is PeftType.MONOLORA is PeftType["MONOLORA"] is names.peft_type()
    assert member in list(PeftType)
    assert member == "MONOLORA"
    assert isinstance(member, PeftType)
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "MONOLORA"}
    assert len(PeftType) == len(set(PeftType))
    with pytest.raises(ValueError, match="MONOLORB"):
        PeftType("MONOLORB")


def test_the_tables_hold_our_classes():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MONOLORA] is mono_peft.MonoLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MONOLORA] is mono_peft.MonoLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.MONOLORA] == "monolora_"


def test_registering_again_changes_nothing():
    before = list(PeftType)
    register.register_monolora(mono_peft.MonoLoraConfig, mono_peft.MonoLoraModel)
    importlib.reload(register)
    register.register_monolora(mono_peft.MonoLoraConfig, mono_peft.MonoLoraModel)
    assert list(PeftType) == before


def test_reloading_the_package_and_importing_it_anew():
    program = """
import importlib, sys
import mono_peft
from peft import PeftType
members = len(PeftType)
for name in ("names", "config", "layer", "model", "register"):
    importlib.reload(sys.modules[f"mono_peft.{name}"])
importlib.reload(mono_peft)
for name in [n for n in sys.modules if n.split(".")[0] == "mono_peft"]:
    del sys.modules[name]
import mono_peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MONOLORA] is mono_peft.MonoLoraConfig
assert len(PeftType) == members
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_another_package_under_the_name_is_refused():
    class MonoLoraConfig:
        pass

    with pytest.raises(
        ImportError, match=r"PEFT already has the method MONOLORA, as mono_peft\.config\.MonoLoraConfig"
    ):
        register.register_monolora(MonoLoraConfig, mono_peft.MonoLoraModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MONOLORA] is mono_peft.MonoLoraConfig


@pytest.mark.parametrize("version", ["0.17.1", "0.22.0", "1.0.0", "0.22.0.dev0"])
def test_an_untested_peft_is_refused(version, monkeypatch):
    monkeypatch.setattr(peft, "__version__", version)
    monkeypatch.setattr(names, "NAME", "ANOTHER")  # as if the member were not there yet
    message = rf"tested with peft >= 0\.18, < 0\.22, and found peft {version}.*pip install \"peft>=0\.18,<0\.22\""
    with pytest.raises(ImportError, match=message):
        names.peft_type()
    assert "ANOTHER" not in PeftType.__members__


def test_importing_with_an_untested_peft_fails():
    program = "import peft; peft.__version__ = '0.22.0'; import mono_peft"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert "ImportError: mono_peft was tested with peft >= 0.18" in result.stderr
