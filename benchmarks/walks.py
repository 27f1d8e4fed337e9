"""How many of our files a reader enters on three walks through the house, counted by a trace of tiny runs.

    python benchmarks/walks.py                  # about a minute
    python benchmarks/walks.py table_1

The walks: an image to a cell of Table 1, a sentence of SST-2 to its accuracy, and the command on one model. A file is
entered when one of its functions is called; what is called while modules are imported does not count.
"""

from __future__ import annotations

import inspect
import runpy
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("mono_peft", "vision_bench", "evals", "offline", "recipes")
PRETRAINING = "--pretraining_epochs 1 --warmup_epochs 0 --projector_hidden 32 --projector_out 32 --seeds 0"
WALKS = {  # a file of recipes or a package, and the options of a tiny run
    "table_1": (
        "recipes/label_noise_probing.py",
        f"{PRETRAINING} --noise_rates 0 0.6 --sae_k 4 --sae_epochs 1 --probe_epochs 1 --decays 0.1",
    ),
    "sst2": (
        "recipes/sst2_monolora.py",
        "--max_steps 2 --per_device_train_batch_size 8 --methods monolora --lora_r 4 --gradient_checkpointing False",
    ),
    "command": (
        "vision_bench",
        "--random_init small_conv --limit 300 --features raw sae --corruptions label_noise=0.6 gaussian=0.3 --seeds 0 "
        "--probe_epochs 1 --sae_epochs 1",
    ),
}


@contextmanager
def entered() -> Iterator[dict[str, str]]:
    """Our files whose functions are called meanwhile, each with the function that was first."""
    files: dict[str, str] = {}
    importing = threading.local()

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(f"{ROOT}/"):
            return
        if not code.co_flags & inspect.CO_OPTIMIZED:  # the body of a module or a class
            if code.co_name == "<module>":
                change = {"call": 1, "return": -1}.get(event, 0)
                importing.depth = getattr(importing, "depth", 0) + change
        elif event == "call" and not getattr(importing, "depth", 0):
            path = Path(code.co_filename).relative_to(ROOT)
            if path.parts[0] in PACKAGES:
                files.setdefault(str(path), code.co_name)

    sys.setprofile(trace)
    threading.setprofile(trace)
    try:
        yield files
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def sentences(folder: Path) -> list[str]:
    """The options of the offline model and of files of sentences; with a model of one's own nothing is judged."""
    from offline.language_model import offline_model

    file = folder / "sentences.tsv"
    file.write_text("sentence\tlabel\n" + "a fine film\t1\na dull film\t0\n" * 16, encoding="utf-8")
    return ["--model_name_or_path", str(offline_model()), "--train_file", str(file), "--eval_file", str(file)]


def program(target: str) -> Callable[[], Any]:
    """What runs a file or a package as a program; everything that it imports is imported already."""
    if target.endswith(".py"):
        sys.path.insert(0, str(ROOT / "recipes"))
        return runpy.run_path(str(ROOT / target))["main"]
    return runpy.run_module(f"{target}.__main__")["main"]


def main() -> None:
    """Walk and print."""
    sys.path.insert(0, str(ROOT))
    for name in sys.argv[1:] or list(WALKS):
        target, arguments = WALKS[name]
        main_function = program(target)
        with tempfile.TemporaryDirectory() as folder:
            further = sentences(Path(folder)) if name == "sst2" else []
            sys.argv = [target, "--output_dir", f"{folder}/run", *arguments.split(), *further]
            with entered() as files:
                main_function()
        print(f"\n{name}: {len(files)} files\n")
        for path, function in files.items():
            print(f"  {path}: {function}")


if __name__ == "__main__":
    main()
