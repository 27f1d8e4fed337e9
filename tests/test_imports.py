"""The house: who may import whom, no circle of imports, how long a file is, how it is named, and what the wheel has.

Recipes import everything, evals may import mono_peft, the two halves never each other. `vision_bench.runs`, the folder
of a run, is a leaf that all but mono_peft use. `offline` is built on `evals`, which names it in its tables of tasks,
models and judges only.
"""

import ast
import graphlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "mono_peft": set(),
    "mono_peft_vllm": {"mono_peft"},
    "vision_bench": set(),
    "vision_bench/runs": set(),
    "evals": {"mono_peft", "vision_bench.runs", "offline"},
    "offline": {"evals"},
}
OURS = {"mono_peft", "mono_peft_vllm", "vision_bench", "vision_bench.runs", "evals", "offline", "recipes"}
PRODUCT = ("mono_peft", "mono_peft_vllm", "vision_bench", "evals", "offline", "recipes")


def name_of(path, root):
    """The name by which a file is imported; recipes import each other without the name of their folder."""
    parts = path.relative_to(root).with_suffix("").parts
    parts = parts[1:] if parts[0] == "recipes" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def nodes(tree):
    """All nodes but those below `if TYPE_CHECKING:`, which no program runs."""
    yield tree
    if isinstance(tree, ast.If) and isinstance(tree.test, ast.Name) and tree.test.id == "TYPE_CHECKING":
        children = tree.orelse
    else:
        children = ast.iter_child_nodes(tree)
    for child in children:
        yield from nodes(child)


def imports(path, root=ROOT):
    """What a file imports, anywhere in it: pairs of a module, and the name taken from it or None."""
    package = name_of(path, root).split(".")
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + (path.name == "__init__.py")] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def circle(root=ROOT, packages=PRODUCT):
    """The modules of a circle of imports, or None."""
    files = {name_of(path, root): path for package in packages for path in (root / package).rglob("*.py")}
    graph = {
        module: {target if (target := f"{source}.{name}") in files else source for source, name in imports(path, root)}
        for module, path in files.items()
    }
    try:
        graphlib.TopologicalSorter({module: graph[module] & files.keys() - {module} for module in graph}).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_may(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        rooms = {
            "vision_bench.runs" if f"{module}.{name}.".startswith("vision_bench.runs.") else module.split(".")[0]
            for module, name in imports(path)
        }
        forbidden = (rooms & OURS) - ALLOWED[package] - {package.replace("/", ".")}
        if package == "vision_bench":
            forbidden -= {"vision_bench.runs"}
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_no_module_imports_itself_through_others():
    assert circle() is None


def test_circles_are_seen(tmp_path):
    """Also those through a function, a relative import or the package itself; not those for the type checker alone."""
    house = tmp_path / "house"
    house.mkdir()
    for name, text in {
        "__init__": "from house.door import Door",
        "door": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.key import Key\n",
        "key": "from . import door",
    }.items():
        (house / f"{name}.py").write_text(text)
    assert circle(tmp_path, ["house"]) is None
    (house / "door.py").write_text("def lock():\n    from .key import Key\n")
    assert sorted(set(circle(tmp_path, ["house"]))) == ["house.door", "house.key"]
    (house / "door.py").write_text("import house")
    assert sorted(set(circle(tmp_path, ["house"]))) == ["house", "house.door"]


def test_files_are_short():
    """A file that needs more than 450 lines has two subjects."""
    lengths = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n")
        for package in PRODUCT
        for path in (ROOT / package).rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_what_recipes_share_has_a_name():
    assert [path.name for path in (ROOT / "recipes").glob("_*")] in ([], ["__pycache__"])


def test_no_two_files_of_tests_have_one_name():
    """Their folders are no packages, so that pytest would refuse the second."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(set(names)) == sorted(names)


def test_importing_mono_peft_brings_in_no_optional_package():
    program = (
        "import sys, mono_peft; "
        "print([m for m in ('trl', 'datasets', 'lm_eval', 'vision_bench', 'evals') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_from_the_checkout_ours_is_run_beside_another_evals(tmp_path):
    """`evals` is no part of the wheel, so that an installed package of this name may be another."""
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "__init__.py").write_text("raise AssertionError('the other evals')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "evals", "--help"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "judge" in result.stdout


@pytest.mark.slow
def test_the_wheel_has_what_others_import_and_no_more(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    if not (ROOT / ".git").exists():
        pytest.skip("what belongs to the packages is known from git")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "mono_peft", "mono_peft_vllm", "vision_bench"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert packed == set(tracked)
    assert {"mono_peft/py.typed", "vision_bench/py.typed", "vision_bench/runs/run.py"} <= packed
