"""Who may import whom: recipes import everything, evals may import mono_peft, the two halves never each other.

`result_rows`, the row format, is a leaf that all but mono_peft use.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "mono_peft": set(),
    "vision_bench": {"result_rows"},
    "evals": {"mono_peft", "result_rows"},
    "result_rows.py": set(),
}
OURS = {"mono_peft", "vision_bench", "evals", "recipes", "result_rows"}


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_may(package):
    files = [ROOT / package] if package.endswith(".py") else list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        forbidden = (set(imported_packages(path)) & OURS) - ALLOWED[package] - {package}
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_importing_mono_peft_brings_in_no_optional_package():
    program = (
        "import sys, mono_peft; "
        "print([m for m in ('trl', 'datasets', 'lm_eval', 'vision_bench', 'evals') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
