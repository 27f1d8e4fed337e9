"""What exploring an adapter's units costs: passes with and without counting, the whole command, memory, files.

    OMP_NUM_THREADS=1 python benchmarks/explore_units.py              # about two minutes of processor time
    OMP_NUM_THREADS=1 python benchmarks/explore_units.py --texts 200

Adapters with random weights on all linear layers of the offline model, on its own texts in three groups. Times are of
the processor. An adapter with random weights has no dead units to speak of, so that these are the largest files.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from measuring import machine, options_of, print_table, seconds
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from mono_peft import MonoLoraConfig
from mono_peft.explore import main as explore
from mono_peft.inventory import collect
from mono_peft.loading import base_model, tokenizer_of, with_adapter
from mono_peft.texts import Texts, named_files, read_texts
from offline.language_model import corpus, offline_model

GROUPS = ("sentiment", "harmful", "everyday")
ADAPTERS: dict[str, dict[str, Any]] = {
    "relu, r 8": {"r": 8},
    "topk of 16, r 1024": {"r": 1024, "activation": "topk", "k": 16},
}


def write_texts(folder: Path, count: int) -> list[str]:
    """Files of `count` texts in three groups, as `--data` takes them."""
    data = []
    for i, group in enumerate(GROUPS):
        rows = [example for example in corpus("train") if example.kind == group]
        rows = rows[: (count + i) // len(GROUPS)]
        path = folder / f"{group}.jsonl"
        path.write_text("".join(json.dumps({"prompt": e.prompt, "response": e.response}) + "\n" for e in rows))
        data.append(f"{group}={path}")
    return data


def passes(base: str, adapter: Path, texts: Texts) -> tuple[float, float, float]:
    """Seconds of a pass of the base, of the same with its adapter, and of one in which units are counted."""
    model = with_adapter(base_model(base, "float32", "cpu"), str(adapter))

    @torch.no_grad()
    def run() -> None:
        for batch in texts.batches(16):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    with model.disable_adapter():
        of_base = seconds(run, time.process_time)
    counted = seconds(lambda: collect(model, texts, texts.batches(16)), time.process_time)
    return of_base, seconds(run, time.process_time), counted


def table_rows(count: int) -> Iterator[list[str]]:
    """Lines of the table, from the number of texts."""
    base = str(offline_model())
    for name, settings in ADAPTERS.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_pretrained(base)
            config = MonoLoraConfig(target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM", **settings)
            get_peft_model(model, config).save_pretrained(folder / "adapter")
            data = write_texts(folder, count)
            texts = read_texts(named_files(data), tokenizer_of(base), 256)
            durations = passes(base, folder / "adapter", texts)
            start = time.process_time()
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                code = explore([base, str(folder / "adapter"), "--data", *data, "--output_dir", str(folder / "units")])
            assert code == 0
            command = time.process_time() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
            sizes = [(folder / "units" / file).stat().st_size / 1e6 for file in ("index.html", "units.jsonl")]
            cells = [f"{number:.1f}" for number in (*durations, command, peak, *sizes)]
            yield [f"{name}, {len(texts)} texts of {texts.tokens} tokens", *cells]


def main() -> None:
    """Measure each adapter and print the table."""
    parser = options_of(__doc__)
    parser.add_argument("--texts", type=int, default=1000, help="of three groups together (default: 1000)")
    options = parser.parse_args()
    print(machine("peft", "transformers"))
    times = ["base, s", "with adapter, s", "counted, s", "command, s"]
    print_table(["adapter", *times, "peak memory, GB", "page, MB", "file, MB"], table_rows(options.texts))


if __name__ == "__main__":
    main()
