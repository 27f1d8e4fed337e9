"""What README and the pages of docs show: code runs, commands have their options, links lead on.

Blocks that need a hub, a GPU, a server or data of somebody's are compiled, what they import is imported, and the
options of their commands are looked up in the help of the program.
"""

import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# Programs that are not ours: their options are theirs.
OTHERS = {"pip", "vllm", "hf", "curl", "make", "lm_eval", "git"}
ENVIRONMENT = re.compile(r"[A-Z_]+=\S*")


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    """The fenced blocks of a page in a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def without_fences(page):
    return re.sub(r"^```.*?^```\n", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


# Links


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_fences(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_index_lists_every_page():
    index = text_of(ROOT / "docs" / "README.md")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index
    measurements = text_of(ROOT / "docs" / "measurements.md")
    for page in (ROOT / "docs" / "measurements").glob("*.md"):
        assert f"](measurements/{page.name})" in measurements


def test_readme_is_short_and_its_figure_small():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150
    (figure,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text_of(ROOT / "README.md"))
    assert (ROOT / figure).stat().st_size < 100_000


def test_one_version_stands_everywhere():
    (version,) = re.findall(r'^version = "(.+)"', text_of(ROOT / "pyproject.toml"), re.MULTILINE)
    assert re.search(rf"^version: {re.escape(version)}$", text_of(ROOT / "CITATION.cff"), re.MULTILINE)
    assert re.search(r"^## (\d\S+)", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)[1] == version  # below "Unreleased"


# Commands


def commands(page):
    """The commands of a page, of its blocks and of its text: each as written, and its words from the program on."""
    code = [line for block in blocks(page, "(?:bash)?") for line in block.replace("\\\n", " ").splitlines()]
    code += re.findall(r"^    ((?:.*\\\n)*.*)$", without_fences(page), re.MULTILINE)
    code += re.findall(r"`([^`]+)`", without_fences(page))
    for line in code:
        line = line.replace("\\\n", " ").strip()
        if not re.match(rf"({ENVIRONMENT.pattern} +)*(python|accelerate) ", line):
            continue
        words = shlex.split(line, comments=True)
        while ENVIRONMENT.fullmatch(words[0]):
            words.pop(0)
        if words[0] == "accelerate":
            words = words[2:]
            while words and words[0].startswith("-") and words[0] != "-m":  # options of `accelerate launch`
                words = words[2:] if not words[1].endswith(".py") and words[1] != "-m" else words[1:]
            words = ["python", *words]
        if len(words) > 1:
            yield line, words[1:]


@cache
def options(program):
    """The options in the help of a module (`-m NAME COMMAND`) or a file."""
    name, *command = program
    out = io.StringIO()
    before = sys.argv, sys.path[:]
    sys.argv = [name, *command, "--help"]
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            if name.endswith(".py"):
                sys.path.insert(0, str((ROOT / name).parent))
                runpy.run_path(str(ROOT / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
    finally:
        sys.argv, sys.path[:] = before
    assert out.getvalue().startswith("usage: "), f"{name} has no help."
    return {"--config"} | set(re.findall(r"--[A-Za-z][\w-]*", out.getvalue()))  # TRL's parsers do not name it


def program_of(words):
    """The program of a command in `options`' form, and its arguments; None if it is not ours."""
    if words[0] == "-m":
        name, rest = words[1], words[2:]
        if name.partition(".")[0] not in ("mono_peft", "evals", "vision_bench"):
            return None, []
        if name in ("mono_peft.run", "mono_peft.serve"):  # options are those of the program that is started
            return None, []
        return ((name, rest[0]) if name == "evals" and rest and not rest[0].isupper() else (name,)), rest
    if not words[0].endswith(".py") or words[0].startswith("tests/"):
        return None, []
    return (words[0],), words[1:]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_have_the_options_that_they_are_shown_with(page, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    for line, words in commands(page):
        program, arguments = program_of(words)
        if program is None:
            continue
        assert importlib.util.find_spec(program[0]) if not program[0].endswith(".py") else (ROOT / program[0]).exists()
        shown = {word.partition("=")[0] for word in arguments if re.match(r"--\w", word)}
        assert not shown or shown <= options(program), f"{line}: {sorted(shown - options(program))}"


def test_bash_blocks_start_programs_that_are_known():
    targets = re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE)
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in filter(None, block.replace("\\\n", " ").splitlines()):
                words = [word for word in shlex.split(line, comments=True) if not ENVIRONMENT.fullmatch(word)]
                if not words:
                    continue
                assert words[0].removeprefix(".venv/bin/") in OTHERS | {"python", "accelerate"}, line
                assert words[0] != "make" or words[1] in targets


def test_a_renamed_option_is_seen(tmp_path):
    page = tmp_path / "page.md"
    command = "OMP_NUM_THREADS=1 accelerate launch --num_processes 2 recipes/pretrain.py --sed 1 \\\n    --data x"
    page.write_text(f"```bash\n{command}\n```\n")
    ((_, words),) = commands(page)  # fenced; indented blocks and code within a sentence:
    assert len(list(commands(ROOT / "docs" / "table2.md"))) >= 4
    assert len(list(commands(ROOT / "docs" / "measurements" / "topk_dead_units.md"))) == 1
    assert words == ["recipes/pretrain.py", "--sed", "1", "--data", "x"]
    program, _ = program_of(words)
    assert "--data" in options(program)
    assert "--sed" not in options(program)


# Python


PYTHON = [(page, number, code) for page in PAGES for number, code in enumerate(blocks(page, "python"))]


@pytest.mark.parametrize(
    ("page", "code"),
    [pytest.param(page, code, id=f"{page.relative_to(ROOT)}-{number}") for page, number, code in PYTHON],
)
def test_python_blocks_compile_and_import_what_there_is(page, code):
    compile(code, str(page), "exec")
    for line in re.findall(r"^(?:from|import) .*$", code, re.MULTILINE):
        exec(line, {})


@pytest.fixture
def on_a_small_model(small_model, tmp_path, monkeypatch):
    """A function that runs a block with a small local model and local rows in place of those of the hub."""
    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_list([{"prompt": "a sentence", "completion": " about films"}] * 4)

    def run(code, names):
        code = code.replace('"Qwen/Qwen3-0.6B"', repr(str(small_model))).replace('"BASE"', repr(str(small_model)))
        code = code.replace('load_dataset("trl-lib/Capybara", split="train")', "rows")
        code = re.sub(
            r"SFTConfig\((\"[^\"]+\")", r'SFTConfig(\1, max_steps=1, use_cpu=True, bf16=False, report_to="none"', code
        )
        exec(compile(code, "docs", "exec"), names)
        return names

    return lambda code, **names: run(code, {"rows": rows} | names)


def tokens(*rows):
    return [{"input_ids": torch.tensor(rows), "attention_mask": torch.ones(len(rows), len(rows[0]), dtype=torch.long)}]


def test_readme_runs_from_training_to_a_certificate(on_a_small_model, capsys):
    train, load, silence = blocks(ROOT / "README.md", "python")
    names = on_a_small_model(train)
    assert Path("my-adapter/adapter_model.safetensors").exists()
    assert on_a_small_model(load)["model"].peft_config["default"].r == 8
    with_bias = train.split("trainer.train()")[0].replace("r=8,", "r=8, encoder_bias=True,")
    trainer = on_a_small_model(with_bias)["trainer"]
    parts = {"batches": tokens([5, 6, 7]), "task_batches": tokens([10, 11]), "held_out_batches": tokens([8, 9])}
    on_a_small_model(silence, trainer=trainer, **parts)
    assert 0 <= float(capsys.readouterr().out.split()[-1]) <= 1
    assert names["trainer"].state.global_step == 1


def test_silence_in_its_whole_form_runs(on_a_small_model, capsys):
    (code,) = blocks(ROOT / "docs" / "silence.md", "python")
    parts = {"silent_texts": [["a film"], ["films"]], "task_texts": [["a sentence about"]]}
    on_a_small_model(code, **parts, held_out_batches=tokens([8, 9]))
    assert 0 <= float(capsys.readouterr().out.split()[-1]) <= 1


def test_units_are_switched_off_and_rows_are_named(on_a_small_model):
    (train, load, _), (switch, provenance) = (blocks(ROOT / page, "python") for page in ("README.md", "docs/units.md"))
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    trainer = on_a_small_model(train)["trainer"]
    on_a_small_model(switch, model=on_a_small_model(load)["model"], batch=batch)
    assert Path("my-pruned-adapter/adapter_model.safetensors").exists()
    on_a_small_model(provenance.replace("runs/out", "runs/capybara"), trainer=trainer)


@pytest.mark.slow
def test_pages_of_vision_bench_run_on_digits(tmp_path, monkeypatch):
    """In their order, in one namespace; those that read files of somebody's are not run."""
    import timm

    from vision_bench.data import load_images, stratified_fraction

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    digits, test = load_images("digits", "train"), load_images("digits", "test")
    names = {"torch": torch, "cifar": digits, "train": digits, "test": test, "features": torch.rand(50, 8)}
    names |= {"labels": torch.arange(50) % 10, "stratified_fraction": stratified_fraction, "timm": timm}
    ran = 0
    for code in blocks(ROOT / "docs" / "vision_bench.md", "python"):
        if '"/data' not in code and "my_photos" not in code:
            exec(compile(code, "docs/vision_bench.md", "exec"), names)
            ran += 1
    assert ran >= 9
