"""Who may import whom: recipes import everything, evals may import mono_peft, the two halves never each other.

`vision_bench.runs`, the folder of a run, is a leaf that all but mono_peft use. `offline` is built on `evals`, which
names it in one file, the registry of tasks, models and judges.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "mono_peft": set(),
    "vision_bench": set(),
    "vision_bench/runs": set(),
    "evals": {"mono_peft", "vision_bench.runs"},
    "offline": {"evals"},
}
OURS = {"mono_peft", "vision_bench", "vision_bench.runs", "evals", "offline", "recipes"}


def imported_packages(path):
    """Of the imports of a file the top-level package, and `vision_bench.runs`, which is a room of its own."""

    def room(module):
        return "vision_bench.runs" if module.startswith("vision_bench.runs") else module.split(".")[0]

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (room(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield room(node.module)


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_may(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        forbidden = (set(imported_packages(path)) & OURS) - ALLOWED[package] - {package.replace("/", ".")}
        if package == "vision_bench":
            forbidden -= {"vision_bench.runs"}
        if path == ROOT / "evals" / "registry.py":
            forbidden -= {"offline"}
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_importing_mono_peft_brings_in_no_optional_package():
    program = (
        "import sys, mono_peft; "
        "print([m for m in ('trl', 'datasets', 'lm_eval', 'vision_bench', 'evals') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
