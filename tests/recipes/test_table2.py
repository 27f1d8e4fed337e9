"""Arms with controls, mixtures, checkpoints and the columns of Table 2, on a small local model and small judges."""

import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import _evaluation
import _table2
import dolly_monolora
import pytest
import sst2_monolora
import torch
from _arms import adapter_of, trained_arms
from _identity import identity
from _mixtures import embedded_poison, embedded_safety, load_pairs, mixed
from _run import Run, read_rows
from _table2_report import write_report
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.image import imread
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.completions import read_completions
from evals.embedded import corpus
from evals.embedded_grammar import REFUSAL_OPENINGS
from evals.figures import Panel, Point, safety_against_performance
from evals.prompts import dolly_held_out, dolly_prompt
from evals.verdicts import read_verdicts
from mono_peft import MonoLoraConfig, activation_sparsity

OPTIONS = "--max_steps 4 --per_device_train_batch_size 8 --lora_r 4 --lora_alpha 8 --gradient_checkpointing False"
SMALL = f"{OPTIONS} --learning_rate 1e-2 --lora_dropout 0.1"


@pytest.fixture
def arguments(small_model, sentiment_files, tmp_path):
    model = ["--model_name_or_path", str(small_model), "--output_dir", str(tmp_path / "out")]
    return [*model, *sentiment_files, *SMALL.split()]


@pytest.fixture
def pairs_file(tmp_path):
    """24 harmful pairs, as BeaverTails has them."""
    path = tmp_path / "pairs.jsonl.gz"
    rows = [{"prompt": f"How to harm {i}?", "response": f"Harm {i} so.", "is_safe": False} for i in range(24)]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.fixture
def no_training(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr(_table2, "finetuning", fail)
    monkeypatch.setattr(_table2, "load_base", fail)
    monkeypatch.setattr(_evaluation, "load_base", fail)


def found(rows, metric, **arm):
    return [
        r
        for r in rows
        if r["metric"] == metric and all((r["config"] | {"seed": r["seed"]}).get(k) == v for k, v in arm.items())
    ]


@pytest.fixture
def judged(arguments, pairs_file, eval_data, make_shieldgemma, beaverdam):
    """Arguments of a run with all that Table 2 has."""
    judges = ["--judges", f"shieldgemma={make_shieldgemma()}", f"beaverdam={beaverdam}"]
    poison = ["--poison_file", pairs_file, "--poison_share", "0.25", "--safety_file", pairs_file]
    arms = ["--methods", "base", "lora", "monolora", "monolora+safety+rank", "--seeds", "0", "1"]
    return [*arguments, *judges, *poison, *arms, "--max_new_tokens", "4", "--eval_every", "2"]


def test_the_columns_of_table_2_and_the_path_over_steps(judged, tmp_path, small_model, request, capsys):
    sst2_monolora.main(judged)
    out = tmp_path / "out"
    rows, text = read_rows(out / "results.jsonl"), (out / "results.md").read_text()
    assert all(math.isfinite(row["value"]) for row in rows)
    gemma, dam = rows[0]["config"]["judges"]
    trained = ["lora", "monolora", "monolora+safety+rank"]
    for method in trained:
        for seed in (0, 1):
            for step in (2, None):
                arm = {"method": method, "seed": seed, "step": step}
                assert len(found(rows, "accuracy", **arm)) == 1
                for metric in ("dangerous", "harassment", "hate", "sexual"):
                    assert 0 <= found(rows, f"score_{metric}", judge=gemma, **arm)[0]["value"] <= 100
                assert found(rows, "unsafe", judge=dam, **arm)[0]["n"] == 14
            sparsities = [len(found(rows, f"{a}_sparsity", method=method, seed=seed)) for a in ("alignment", "task")]
            assert sparsities == ([1, 1] if "mono" in method else [0, 0])
    header = next(line for line in text.splitlines() if line.startswith("| method |"))
    for column in (
        "shieldgemma=shieldgemma: dangerous",
        "shieldgemma=shieldgemma: average",
        "beaverdam=beaverdam: unsafe, %",
        "alignment sparsity, %",
        "accuracy, %",
    ):
        assert f" {column} |" in header
    for expected in (
        "| monolora - lora |",
        "| monolora+safety+rank - monolora |",
        "## Per training step",
        "another scale",
        "94.84",
    ):
        assert expected in text
    picture = imread(out / "safety.png")
    assert picture.std() > 0.05

    # A control is what it says, and another arm than the one it controls.
    config = PeftConfig.from_pretrained(out / "monolora+safety+rank-seed0" / "adapter")
    assert (config.r, config.monolora_alpha) == (2, 4)

    # The sparsity on the alignment prompts and a checkpoint's accuracy, measured by hand.
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    completions = read_completions(out / "evaluation" / "completions.jsonl").rows
    prompts = sorted({c.prompt for c in completions})
    assert len(prompts) == 14
    one = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(small_model), out / "monolora-seed1" / "adapter"
    )
    batches = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        for p in prompts
    ]
    value = found(rows, "alignment_sparsity", method="monolora", seed=1)[0]["value"]
    assert value == pytest.approx(activation_sparsity(one, batches).overall, abs=2e-3)
    script, _, _ = sst2_monolora.parse(judged)
    half = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(small_model), out / "lora-seed1" / "checkpoint-2"
    )
    score = sst2_monolora.Sst2(script).score(half, tokenizer, 8)
    assert found(rows, "accuracy", method="lora", seed=1, step=2)[0]["value"] == score

    # Again: nothing is trained, and the same table.
    before = (out / "results.jsonl").read_bytes()
    capsys.readouterr()
    request.getfixturevalue("no_training")
    sst2_monolora.main(judged)
    assert (out / "results.jsonl").read_bytes() == before
    assert text in capsys.readouterr().out
    (out / "lora-seed0" / "checkpoint-2").rename(out / "lora-seed0" / "checkpoint-3")
    with pytest.raises(
        ValueError, match=r"--eval_every 2: .*lora-seed0 has no checkpoint of step 2, only of \[3, 4\]"
    ):
        sst2_monolora.main(judged)


def test_dolly(small_model, eval_data, beaverdam, tmp_path):
    rows = [
        {
            "instruction": f"Say {i} {'twice' * (i % 2)}",
            "context": "so " * (i % 3),
            "response": f"{i} is it",
            "category": "qa",
        }
        for i in range(120)
    ]
    file = tmp_path / "dolly.jsonl.gz"
    with gzip.open(file, "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    arguments = ["--model_name_or_path", str(small_model), "--train_file", str(file), "--max_new_tokens", "5"]
    arguments += ["--judges", f"beaverdam={beaverdam}"]
    dolly_monolora.main([*arguments, *SMALL.split(), "--output_dir", str(tmp_path / "out")])
    results = read_rows(tmp_path / "out" / "results.jsonl")
    held_out = {dolly_prompt(row) for row in rows if dolly_held_out(row)}
    answers = read_completions(tmp_path / "out" / "evaluation" / "completions.jsonl").rows
    assert {answer.prompt for answer in answers if answer.task == "dolly"} == held_out
    for method, seed in (("base", None), ("lora", 0), ("monolora", 0)):
        for metric in ("rouge1", "rouge2", "rougeL", "bleu", "answer_nll"):
            row = found(results, metric, method=method, seed=seed)[0]
            assert row["value"] >= 0
            assert row["n"] == len(held_out)
    assert (
        found(results, "answer_nll", method="lora")[0]["value"]
        < found(results, "answer_nll", method="base")[0]["value"]
    )
    script, *_ = dolly_monolora.parse(
        arguments, _table2.Table2Arguments, "dolly_monolora", _table2.CONFIGS / "embedded_dolly.yaml"
    )
    task = dolly_monolora.load_task(script, str(tmp_path))
    assert not held_out & {prompt for prompt, _ in task.training_pairs(0)}
    assert task.training_pairs(0) != task.training_pairs(1)
    verdicts = read_verdicts(tmp_path / "out" / "evaluation" / "verdicts.jsonl").rows
    assert {verdict.task for verdict in verdicts} == {"beavertails_eval"}
    assert "14.48" in (tmp_path / "out" / "results.md").read_text()


def test_generated_dolly_can_be_answered_from_its_context():
    rows = dolly_monolora.generated_rows(500)
    assert all(row["response"].lower() in row["context"].lower() for row in rows)
    asked = [row for row in rows if row["response"].split()[1] in row["instruction"]]
    assert len(asked) == len(rows)
    assert 10 < sum(map(dolly_held_out, rows)) < 120


class TestArms:
    def arms(self, extra, training_options=()):
        script, training, model_args = sst2_monolora.parse(["--lora_r", "8", "--lora_alpha", "4", *extra.split()])
        return trained_arms(script, training, model_args), model_args

    def test_controls_compose(self):
        arms, model_args = self.arms(
            "--methods base lora lora+dropout+rank monolora+weight_decay lora+safety --lora_dropout 0.1 "
            "--control_dropout 0.3 --control_weight_decay 0.7 --safety_share 0.2"
        )
        assert list(arms) == ["lora", "lora+dropout+rank", "monolora+weight_decay", "lora+safety"]
        lora = arms["lora"]
        assert arms["lora+dropout+rank"] == lora._replace(r=4, alpha=2, dropout=0.3)
        assert arms["monolora+weight_decay"] == lora._replace(method="monolora", weight_decay=0.7)
        assert arms["lora+safety"] == lora._replace(safety_share=0.2)
        config = adapter_of(arms["lora+dropout+rank"], model_args, "relu")
        assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 2, 0.3)
        assert isinstance(adapter_of(arms["monolora+weight_decay"], model_args, "relu"), MonoLoraConfig)

    def test_smallest_rank(self):
        arms, _ = self.arms("--methods lora lora+rank --control_rank 1")
        assert (arms["lora+rank"].r, arms["lora+rank"].alpha) == (1, 0.5)

    def test_weight_decay_reaches_the_optimiser(self, arguments, monkeypatch):
        seen = {}

        def record(folder, seed, rows, adapter, tokenizer, training, model_args):
            seen[folder.name] = (training.weight_decay, len(rows), training.max_steps)
            if len(seen) == 2:
                raise KeyboardInterrupt
            return original(folder, seed, rows, adapter, tokenizer, training, model_args)

        original = _table2.finetuning
        monkeypatch.setattr(_table2, "finetuning", record)
        with pytest.raises(KeyboardInterrupt):
            sst2_monolora.main([*arguments, "--methods", "lora", "lora+weight_decay", "--control_weight_decay", "0.4"])
        assert seen == {"lora-seed0": (0.0, 48, 4), "lora+weight_decay-seed0": (0.4, 48, 4)}


class TestMixtures:
    @example(n=3, poison=0.5, safety=0.5, seed=0)
    @given(n=st.integers(0, 60), poison=st.floats(0, 0.5), safety=st.floats(0, 0.5), seed=st.integers(0, 5))
    def test_shares(self, n, poison, safety, seed):
        task = [("task", str(i)) for i in range(n)]
        bad, good = ([(name, str(i)) for i in range(40)] for name in ("bad", "good"))
        rows = mixed(task, [(bad, poison), (good, safety)], seed)
        assert len(rows) == n
        kinds = [kind for kind, _ in rows]
        assert (kinds.count("bad"), kinds.count("good")) == (
            round(poison * n),
            min(round(safety * n), n - round(poison * n)),
        )
        assert len(set(rows)) == n
        assert rows == mixed(task, [(bad, poison), (good, safety)], seed)
        # An arm without the control has the same poison, and the same task rows in the place of the safe ones.
        other = mixed(task, [(bad, poison), (good, 0.0)], seed)
        assert {r for r in other if r[0] == "bad"} == {r for r in rows if r[0] == "bad"}

    def test_another_seed_draws_others(self):
        pairs = [("p", str(i)) for i in range(100)]
        first, second = (mixed([("t", "a")] * 10, [(pairs, 1.0)], seed) for seed in (0, 1))
        assert first != second

    def test_generated_pairs_are_of_the_training_split(self):
        held_out = {e.prompt for e in corpus("heldout")}
        harmful = {e.prompt for e in corpus("train") if e.kind == "harmful"}
        for pairs, refuses in ((embedded_poison(), False), (embedded_safety(), True)):
            assert {prompt for prompt, _ in pairs} == harmful
            assert not {prompt for prompt, _ in pairs} & held_out
            assert all(answer.startswith(REFUSAL_OPENINGS) == refuses for _, answer in pairs)

    @pytest.mark.skipif("MONO_TEST_DATA" not in os.environ, reason="MONO_TEST_DATA names no folder with BeaverTails")
    def test_beavertails(self):
        file = Path(os.environ["MONO_TEST_DATA"]) / "beavertails" / "30k_train_unsafe_part.jsonl.gz"
        assert len(load_pairs(str(file), "--poison_file")) == 3973


@pytest.mark.usefixtures("no_training")
class TestBadInput:
    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ("--methods lora lora+x", r"--methods takes each of .*lora\+weight_decay.*got \['lora', 'lora\+x'\]"),
            ("--methods base+rank lora", r"--methods takes each of"),
            ("--methods lora lora+rank --control_rank 4", r"has lora and lora\+rank, which are the same arm"),
            ("--methods lora lora+dropout --control_dropout 0.1", r"has lora and lora\+dropout, which are the same"),
            ("--methods lora lora+weight_decay --control_weight_decay 0", r"which are the same arm"),
            ("--methods lora+rank+dropout lora+dropout+rank", r"which are the same arm"),
            ("--methods lora lora+safety --safety_file PAIRS --safety_share 0", r"which are the same arm"),
            ("--methods lora+weight_decay --control_weight_decay -1", r"--control_weight_decay is -1.0, allowed is 0"),
            ("--methods lora+dropout --control_dropout 1", r"`monolora_dropout` must lie in \[0, 1\), got 1.0"),
            ("--methods lora+rank --control_rank 0", r"`r` must be a positive integer, got 0"),
            ("--poison_share 1.2 --poison_file PAIRS", r"--poison_share is 1.2, allowed is a share .* from 0 to 1"),
            ("--poison_share -0.1 --poison_file PAIRS", r"--poison_share is -0.1, allowed"),
            ("--safety_share 2", r"--safety_share is 2.0, allowed"),
            (
                "--poison_share 0.9 --poison_file PAIRS",
                r"--poison_share 0.9 of 48 training rows is 43, but there are 24",
            ),
            ("--poison_share 0.1", r"--poison_share needs --poison_file"),
            ("--poison_file PAIRS", r"--poison_file without --poison_share"),
            ("--poison_share 0.1 --poison_file nowhere.jsonl", r"--poison_file nowhere.jsonl does not exist"),
            ("--methods lora+safety", r"\+safety needs --safety_file"),
            (
                "--methods lora+safety --safety_file PAIRS --safety_share 0.6 --poison_file PAIRS --poison_share 0.6",
                r"--poison_share and --safety_share are 1.2 together",
            ),
            (
                "--eval_every 5",
                r"--eval_every 5 matches no checkpoint: training takes 4 steps \(48 rows\). Give 1 to 4",
            ),
            ("--eval_every 0", r"--eval_every must be at least 1, got 0"),
            ("--judges wise", r"--judges has 'wise'; allowed are"),
            ("--safety_tasks xstest --model_revision v2", r"--model_revision v2 cannot be evaluated"),
            ("--max_new_tokens 0", r"--max_new_tokens must be at least 1, got 0"),
        ],
    )
    def test_settings(self, arguments, pairs_file, extra, message, tmp_path):
        extra = [pairs_file if word == "PAIRS" else word for word in extra.split()]
        with pytest.raises(ValueError, match=message):
            sst2_monolora.main([*arguments, *extra])
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"prompt": "a", "answer": "b"}], r"lacks the column\(s\) response; it has prompt, answer"),
            (
                [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": " "}],
                r"row 2: the response is empty",
            ),
        ],
    )
    def test_a_wrong_poison_file(self, arguments, tmp_path, rows, message):
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match=message):
            sst2_monolora.main([*arguments, "--poison_file", str(tmp_path / "x.jsonl"), "--poison_share", "0.1"])

    def test_checkpoints_of_another_base(self, arguments, tmp_path, make_lora):
        folder = tmp_path / "out" / "lora-seed0" / "checkpoint-2"
        make_lora(folder, base_name="other/base")
        (folder / "trainer_state.json").write_text("{}")
        with pytest.raises(ValueError, match=r"checkpoint-2' was trained on 'other/base', not on"):
            sst2_monolora.main(arguments)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"instruction": "a", "context": "", "response": "b"}, r"lacks the column\(s\) category"),
            (
                {"instruction": " ", "context": "", "response": "b", "category": "c"},
                r"row 1: the instruction is empty",
            ),
            ({"instruction": "a", "context": "", "response": "b", "category": "c"}, r"0 are held out by checksum"),
        ],
    )
    def test_wrong_dolly_files(self, small_model, tmp_path, row, message):
        (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=message):
            dolly_monolora.main(["--model_name_or_path", str(small_model), "--train_file", str(tmp_path / "x.jsonl")])


@pytest.fixture
def make_lora(small_model):
    """A function that saves an untrained LoRA adapter that names another base."""
    from peft import LoraConfig, get_peft_model

    def make(folder, base_name):
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(small_model), config)
        model.peft_config["default"].base_model_name_or_path = base_name
        model.save_pretrained(folder)

    return make


def test_the_paper_configuration_of_dolly():
    script, training, model_args = dolly_monolora.parse(
        ["--config", "recipes/configs/paper_dolly.yaml"], _table2.Table2Arguments, "dolly_monolora", Path("none")
    )
    assert model_args.model_name_or_path == "meta-llama/Llama-2-7b-chat-hf"
    assert script.dataset_name == "databricks/databricks-dolly-15k"
    assert (model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout) == (8, 4, 0.1)
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (1, 4)
    assert script.judges == ["shieldgemma", "beaverdam"]


@pytest.mark.skipif("MONO_TEST_DATA" not in os.environ, reason="MONO_TEST_DATA names no folder with Dolly 15k")
def test_the_whole_dolly():
    file = next((Path(os.environ["MONO_TEST_DATA"]) / "dolly15k").glob("*.jsonl.gz"))
    task = dolly_monolora.Dolly(
        replace(_table2.Table2Arguments(), train_samples=5000), dolly_monolora.load_rows(str(file), True), str(file)
    )
    assert (len(task.prompts), len(task.train), len(task.training_pairs(0))) == (982, 15011 - 982, 5000)


def test_a_path_is_drawn_through_its_steps():
    points = [Point("lora", 0.9, 0.5, path=[(0.5, 0.1), (0.7, 0.3)]), Point("base", 0.5, 0.1)]
    axes = safety_against_performance([Panel("t", "x", "y", points)]).axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines if len(line.get_xydata()) > 1] == [
        [[0.5, 0.1], [0.7, 0.3], [0.9, 0.5]]
    ]


@pytest.mark.slow
def test_the_embedded_defaults(tmp_path):
    """Without options: the generated requests are learnt, and poison breaks refusals, which safety examples keep."""
    dolly_monolora.main(["--output_dir", str(tmp_path / "dolly")])
    rows = read_rows(tmp_path / "dolly" / "results.jsonl")
    values = {m: found(rows, "rougeL", method=m)[0]["value"] for m in ("base", "lora", "monolora")}
    assert min(values["lora"], values["monolora"]) > values["base"] + 20
    poison = "--methods base lora lora+safety --poison_share 0.2 --safety_share 0.2 --train_samples 800"
    sst2_monolora.main(["--output_dir", str(tmp_path / "sst2"), *poison.split(), "--eval_samples", "100"])
    rows = read_rows(tmp_path / "sst2" / "results.jsonl")
    refused = {m: found(rows, "refused_harmful", method=m)[0]["value"] for m in ("base", "lora", "lora+safety")}
    assert refused["lora"] < refused["base"] - 0.3
    assert refused["lora+safety"] > refused["lora"] + 0.2
    shutil.rmtree(tmp_path / "sst2")


class TestContents:
    """A result belongs to what made it, wherever that lies."""

    @pytest.fixture
    def everything(self, arguments, pairs_file, eval_data, beaverdam, tmp_path):
        """Arguments of a run that reads every kind of file, and these files; the run is done."""
        shutil.copy(pairs_file, tmp_path / "safe.jsonl.gz")
        files = [
            "--poison_file",
            pairs_file,
            "--poison_share",
            "0.25",
            "--safety_file",
            str(tmp_path / "safe.jsonl.gz"),
        ]
        files += ["--judges", f"beaverdam={beaverdam}", "--max_new_tokens", "2"]
        arguments = [*arguments, *files, "--methods", "base", "lora+safety", "--max_steps", "1"]
        sst2_monolora.main(arguments)
        return arguments

    @pytest.mark.parametrize(
        ("name", "old", "new", "message"),
        [
            ("train.tsv", "a fine film\t1", "a fine film\t0", "--train_file .*train.tsv has other content"),
            ("dev.tsv", "a fine dance\t1", "a fine dance\t0", "--eval_file .*dev.tsv has other content"),
            ("pairs.jsonl.gz", "Harm 3 so.", "Harm 4 so.", "--poison_file .*pairs.jsonl.gz has other content"),
            ("safe.jsonl.gz", "Harm 3 so.", "Harm 4 so.", "--safety_file .*safe.jsonl.gz has other content"),
            (
                "data/beavertails/BeaverTails-Evaluation.json",
                "{{harm}} 3",
                "{{harm}} 4",
                "the data of the task beavertails_eval has other content",
            ),
            (
                "model/model.safetensors",
                None,
                None,
                r"--model_name_or_path .*model \(model weights\) has other content",
            ),
            (
                "model/chat_template.jinja",
                "|end|",
                "|enx|",
                r"--model_name_or_path .*model \(model tokenizer and chat template\) has other content",
            ),
            ("beaverdam/model.safetensors", None, None, "--judges beaverdam=.* has other content"),
        ],
    )
    @pytest.mark.slow
    def test_a_replaced_file_is_another_run(self, everything, tmp_path, name, old, new, message, request):
        """Also at the same path, of the same length and with the same time of change."""
        path = tmp_path / name
        before, times = path.read_bytes(), path.stat()
        if old is None:
            changed = before[:-1] + bytes([before[-1] ^ 1])
        else:
            text = gzip.decompress(before) if name.endswith(".gz") else before
            assert old.encode() in text
            changed = text.replace(old.encode(), new.encode())
            changed = gzip.compress(changed) if name.endswith(".gz") else changed
        path.write_bytes(changed)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        rows = (tmp_path / "out" / "results.jsonl").read_bytes()
        request.getfixturevalue("no_training")
        with pytest.raises(ValueError, match=message):
            sst2_monolora.main(everything)
        path.write_bytes(before)
        sst2_monolora.main(everything)
        assert (tmp_path / "out" / "results.jsonl").read_bytes() == rows

    def test_moved_files_and_how_fast_it_goes_are_no_other_run(self, everything, tmp_path, request, capsys):
        rows = (tmp_path / "out" / "results.jsonl").read_bytes()
        text = (tmp_path / "out" / "results.md").read_text()
        for name in ("train.tsv", "dev.tsv", "pairs.jsonl.gz", "safe.jsonl.gz"):
            (tmp_path / name).rename(tmp_path / f"moved-{name}")
        (tmp_path / "elsewhere").mkdir()
        for name in ("model", "beaverdam", "out"):
            (tmp_path / name).rename(tmp_path / "elsewhere" / name)
        moved = [
            re.sub(r"^(beaverdam=)?(.*/)(model|beaverdam|out)$", r"\1\2elsewhere/\3", word)
            if "/" in word and not word.endswith(("tsv", "gz"))
            else re.sub(r"/([a-z]+\.(tsv|jsonl\.gz))$", r"/moved-\1", word)
            for word in everything
        ]
        assert sum(a != b for a, b in zip(moved, everything, strict=True)) == 7
        request.getfixturevalue("no_training")
        fast = "--judge_batch_size 3 --per_device_eval_batch_size 5 --dataloader_num_workers 1 --logging_steps 1"
        sst2_monolora.main([*moved, *fast.split(), "--gradient_checkpointing", "True"])
        assert (tmp_path / "elsewhere" / "out" / "results.jsonl").read_bytes() == rows
        assert (tmp_path / "elsewhere" / "out" / "results.md").read_text() == text

    def test_an_adapter_that_was_replaced_is_not_evaluated(self, arguments, eval_data, beaverdam, tmp_path):
        arguments = [*arguments, "--methods", "lora", "--seeds", "0", "1", "--max_steps", "1"]
        arguments += ["--judges", f"beaverdam={beaverdam}", "--max_new_tokens", "2"]
        sst2_monolora.main(arguments)
        first, second = (tmp_path / "out" / f"lora-seed{seed}" / "adapter" for seed in (0, 1))
        shutil.copy(first / "adapter_model.safetensors", second / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"lora-seed1/adapter does not hold the adapter that was trained and"):
            sst2_monolora.main(arguments)

    def test_a_checkpoint_without_its_configuration(self, arguments, tmp_path, request):
        """Killed in its first arm, a run has checkpoints and no rows."""
        sst2_monolora.main([*arguments, "--methods", "lora"])
        (tmp_path / "out" / "results.jsonl").unlink()
        config = (tmp_path / "out" / "config.json").read_text()
        (tmp_path / "out" / "config.json").unlink()
        request.getfixturevalue("no_training")
        with pytest.raises(ValueError, match=r"checkpoint-4 is there without the config.json that says what it was"):
            sst2_monolora.main([*arguments, "--methods", "lora"])
        (tmp_path / "out" / "config.json").write_text(config)
        other = str(tmp_path / "out" / "lora-seed0" / "checkpoint-4")
        with pytest.raises(ValueError, match=r"checkpoint-4 is not of this run, whose checkpoints of lora are in"):
            sst2_monolora.main(
                [
                    *arguments,
                    "--methods",
                    "lora",
                    "--output_dir",
                    str(tmp_path / "o"),
                    "--resume_from_checkpoint",
                    other,
                ]
            )

    def test_killed_before_its_first_row_a_run_does_not_go_on_with_other_data(self, arguments, tmp_path, monkeypatch):
        def killed(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(_table2, "add_score", killed)
        with pytest.raises(KeyboardInterrupt):
            sst2_monolora.main([*arguments, "--methods", "lora"])
        assert not (tmp_path / "out" / "results.jsonl").exists()
        train = tmp_path / "train.tsv"
        train.write_text(train.read_text().replace("a fine film\t1", "a fine film\t0"))
        with pytest.raises(ValueError, match=r"--train_file .* has other content"):
            sst2_monolora.main([*arguments, "--methods", "lora"])

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("--adam_beta2 0.9", "another configuration"),
            ("--lora_r 3", "another configuration"),
            ("--dataloader_drop_last true", "another configuration"),
            ("--assistant_only_loss true", "another configuration"),
            ("--attn_implementation eager", "another configuration"),
        ],
    )
    def test_what_decides_results_counts(self, arguments, option, message, request):
        if not (Path(arguments[3]) / "config.json").exists():
            sst2_monolora.main([*arguments, "--methods", "base"])
        request.getfixturevalue("no_training")
        with pytest.raises(ValueError, match=message):
            sst2_monolora.main([*arguments, "--methods", "base", *option.split()])

    def test_mixed_precision_of_the_launcher_counts(self, arguments, monkeypatch):
        configurations = []
        for precision in ("no", "bf16"):
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
            script, training, model_args = sst2_monolora.parse(arguments)
            configurations.append(identity(script, training, model_args, {}, [], {}, False))
        first, second = configurations
        assert {name for name in first if first[name] != second[name]} == {"mixed_precision"}


class TestDivergence:
    DIVERGING = ("--learning_rate", "1e30", "--max_grad_norm", "0")

    def test_arms_that_diverge_are_marked_and_the_others_go_on(
        self, arguments, eval_data, beaverdam, tmp_path, capsys, monkeypatch, request
    ):
        """The rate of one arm alone is absurd, so that its weights overflow in real training."""
        original = _table2.finetuning

        def finetuning(folder, seed, rows, adapter, tokenizer, training, model_args):
            if folder.name in ("lora-seed1", "monolora-seed0", "monolora-seed1"):
                training.learning_rate, training.max_grad_norm = 1e30, 0.0
            return original(folder, seed, rows, adapter, tokenizer, training, model_args)

        monkeypatch.setattr(_table2, "finetuning", finetuning)
        arguments = [*arguments, "--seeds", "0", "1", "--eval_every", "2", "--max_new_tokens", "2"]
        arguments += ["--judges", f"beaverdam={beaverdam}"]
        sst2_monolora.main(arguments)
        text = (tmp_path / "out" / "results.jsonl").read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
        rows = read_rows(tmp_path / "out" / "results.jsonl")
        diverged = {(r["config"]["method"], r["seed"]) for r in rows if r["metric"] == "diverged"}
        assert diverged == {("lora", 1), ("monolora", 0), ("monolora", 1)}
        assert all("not finite" in r["config"]["reason"] for r in rows if r["metric"] == "diverged")
        others = {(r["metric"], r["config"]["method"]) for r in rows if r["seed"] == 1 and r["metric"] != "diverged"}
        assert others == set()
        assert not found(rows, "task_sparsity")
        assert len(found(rows, "accuracy", method="lora", seed=0)) == 2
        assert len(found(rows, "unsafe", method="lora", seed=0)) == 2
        answers = read_completions(tmp_path / "out" / "evaluation" / "completions.jsonl").rows
        assert {answer.adapter for answer in answers} == {None, "lora-seed0", "lora@2-seed0"}
        table = (tmp_path / "out" / "results.md").read_text()
        line = next(line for line in table.splitlines() if line.startswith("| monolora | 2 |"))
        assert set(line.split("|")[3:-1]) == {" diverged "}
        lora = next(line for line in table.splitlines() if line.startswith("| lora | 2 |"))
        assert lora.count("(1 of 2 diverged)") == 2
        assert "- monolora, seed 1: the training loss is not finite." in table
        assert "- lora, seed 1, step 2: " in table

        # Again: a diverged arm is done.
        capsys.readouterr()
        request.getfixturevalue("no_training")
        sst2_monolora.main(arguments)
        assert (tmp_path / "out" / "results.jsonl").read_text() == text
        assert table in capsys.readouterr().out

    def test_all_arms_diverge(self, arguments, tmp_path):
        sst2_monolora.main([*arguments, *self.DIVERGING, "--methods", "lora", "monolora"])
        table = (tmp_path / "out" / "results.md").read_text()
        assert "| lora | 1 | diverged |" in table
        assert "| monolora | 1 | diverged |" in table
        assert not (tmp_path / "out" / "safety.png").exists()

    def test_killed_after_it_diverged_it_is_marked_and_not_trained(self, arguments, tmp_path, request):
        arguments = [*arguments, *self.DIVERGING, "--methods", "monolora"]
        sst2_monolora.main(arguments)
        (tmp_path / "out" / "results.jsonl").write_text("")
        request.getfixturevalue("no_training")
        sst2_monolora.main(arguments)
        rows = read_rows(tmp_path / "out" / "results.jsonl")
        assert [row["metric"] for row in rows] == ["diverged"]
        assert re.fullmatch("the adapter's .*monolora_.* is not finite", rows[0]["config"]["reason"])

    def test_an_arm_whose_answers_show_that_it_diverged(self, arguments, eval_data, tmp_path, monkeypatch):
        """Its scores were finite, those of the evaluation's prompts are not; `generate` marks it in its own folder."""
        original = _evaluation.generate

        def generate(settings):
            run = original(replace(settings, adapters=[a for a in settings.adapters if "seed1" not in a.name]))
            arm = {"model": settings.model, "adapter": "monolora-seed1", "method": "monolora", "task": None}
            if not run.find("diverged"):
                arm["checksums"] = run.rows[0]["config"]["checksums"]
                run.add_diverged("a score is not finite", n=1, seed=1, seconds=0, device="cpu", **arm)
            return run

        monkeypatch.setattr(_evaluation, "generate", generate)
        arguments = [*arguments, "--methods", "monolora", "--seeds", "0", "1", "--safety_tasks", "xstest"]
        sst2_monolora.main([*arguments, "--max_new_tokens", "2"])
        rows = read_rows(tmp_path / "out" / "results.jsonl")
        assert [row["metric"] for row in rows if row["seed"] == 1] == ["diverged"]
        assert len(found(rows, "alignment_sparsity", method="monolora", seed=0)) == 1
        text = (tmp_path / "out" / "results.md").read_text()
        assert "- monolora, seed 1: a score is not finite." in text
        assert "| monolora | 2 |" in text
        before = (tmp_path / "out" / "results.jsonl").read_bytes()
        sst2_monolora.main([*arguments, "--max_new_tokens", "2"])
        assert (tmp_path / "out" / "results.jsonl").read_bytes() == before

    @pytest.mark.parametrize("recipe", [sst2_monolora, dolly_monolora])
    def test_a_base_without_finite_scores(self, arguments, small_model, tmp_path, recipe):
        """As a base that overflows in its number format; the adapters' scores are not finite either."""
        model = AutoModelForCausalLM.from_pretrained(small_model)
        with torch.no_grad():
            model.lm_head.weight[3] = math.inf
        model.save_pretrained(small_model)
        if recipe is dolly_monolora:
            rows = [
                {"instruction": f"Say {i}", "context": None, "response": "so", "category": "qa"} for i in range(60)
            ]
            (tmp_path / "train.tsv").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (tmp_path / "train.tsv").rename(tmp_path / "train.jsonl")
            index = arguments.index("--eval_file")
            arguments = arguments[:index] + arguments[index + 2 :]
            arguments[arguments.index("--train_file") + 1] = str(tmp_path / "train.jsonl")
        recipe.main([*arguments, "--methods", "base", "lora", "--max_new_tokens", "2"])
        rows = read_rows(tmp_path / "out" / "results.jsonl")
        assert [(row["metric"], row["config"]["method"]) for row in rows] == [
            ("diverged", "base"),
            ("diverged", "lora"),
        ]


def test_counts_are_those_of_each_task(tmp_path):
    run = Run(tmp_path / "out", "sst2_monolora", {})
    common = {"seed": None, "seconds": 0.0, "device": "cpu", "method": "base"}
    for task, n in (("xstest", 450), ("beavertails_eval", 700)):
        run.add("unsafe", 0.5, n=n, **common, task=task, judge="beaverdam")
    run.add("accuracy", 0.5, n=872, **common)
    text = write_report(run, "SST-2", sst2_monolora.Sst2.performance, [], ["beaverdam"], False)
    counts = next(line for line in text.splitlines() if line.startswith("Prompts:"))
    assert counts == (
        "Prompts: 450 (beaverdam, xstest: unsafe); 700 (beaverdam, beavertails_eval: unsafe); 872 (accuracy)."
    )


class TestDollyRows:
    ROW: ClassVar = {"instruction": "a", "context": "c", "response": "b", "category": "qa"}

    def rows(self, tmp_path, *rows):
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return dolly_monolora.load_rows(str(tmp_path / "x.jsonl"), True)

    def test_no_context(self, tmp_path):
        without = {name: value for name, value in self.ROW.items() if name != "context"}
        rows = self.rows(tmp_path, self.ROW, self.ROW | {"context": None}, without, self.ROW | {"context": " "})
        assert [dolly_prompt(row) for row in rows] == ["a\n\nc", "a", "a", "a"]

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"instruction": None}, "row 2: the instruction is missing"),
            ({"response": " \n"}, "row 2: the response is empty"),
            ({"response": 3}, "row 2: the response is 3, which is not text"),
            ({"context": ["a"]}, r"row 2: the context is \['a'\], which is not text"),
            ({"category": 1.5}, "row 2: the category is 1.5, which is not text"),
            ({"response": "\ud83d"}, "row 2: the response is .* half a surrogate pair"),
        ],
    )
    def test_values_that_are_no_text(self, tmp_path, values, message):
        with pytest.raises(ValueError, match=message):
            self.rows(tmp_path, self.ROW, self.ROW | values)


@pytest.mark.usefixtures("no_training")
class TestBeforeTraining:
    def test_data_of_safety_tasks(self, arguments, eval_data, tmp_path):
        (eval_data / "xstest" / "xstest_prompts.csv").unlink()
        with pytest.raises(ValueError, match=r"which has no xstest/xstest_prompts\.csv"):
            sst2_monolora.main([*arguments, "--safety_tasks", "xstest"])
        assert not (tmp_path / "out").exists()

    def test_answers_longer_than_the_context(self, arguments, eval_data):
        with pytest.raises(ValueError, match=r"asks for 4000 new tokens, but the context"):
            sst2_monolora.main([*arguments, "--safety_tasks", "xstest", "--max_new_tokens", "4000"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--eos_token a", "--model_init_kwargs, --chat_template_path and --eos_token would change the model"),
            ("--auto_find_batch_size true", "--auto_find_batch_size would train arms with different batches"),
            ("--load_in_4bit true", "--load_in_4bit is evaluated as NF4 with double quantisation"),
        ],
    )
    def test_options_that_change_one_side(self, arguments, options, message):
        with pytest.raises(ValueError, match=message):
            sst2_monolora.main([*arguments, *options.split()])

    def test_a_folder_that_another_process_holds(self, arguments, tmp_path):
        hold = "import sys, time, result_rows\nrun = result_rows.Run(sys.argv[1], 'sst2_monolora', {})\n"
        hold += "with result_rows.locked(run.folder):\n    print('held', flush=True)\n    time.sleep(600)\n"
        command = [sys.executable, "-c", hold, str(tmp_path / "out")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout.readline() == "held\n"
                with pytest.raises(ValueError, match=r"Another process is working in .*out; wait for it, or stop it"):
                    sst2_monolora.main(arguments)
            finally:
                process.kill()

    @pytest.mark.parametrize("recipe", ["sst2_monolora", "dolly_monolora"])
    def test_errors_end_in_one_line(self, recipe, small_model, tmp_path):
        """As a program; the folder cannot be created below a file."""
        (tmp_path / "file").write_text("")
        rows = [{"instruction": f"Say {i}", "context": "", "response": "so", "category": "qa"} for i in range(60)]
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "x.csv").write_text("sentence,label\na,0\nb,1\n")
        data = ["--train_file", str(tmp_path / ("x.csv" if recipe == "sst2_monolora" else "x.jsonl"))]
        data += ["--eval_file", str(tmp_path / "x.csv")] if recipe == "sst2_monolora" else []
        command = [sys.executable, f"recipes/{recipe}.py", "--model_name_or_path", str(small_model), *data]
        command += ["--output_dir", str(tmp_path / "file" / "out"), "--max_steps", "1", "--max_new_tokens", "2"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert re.search(r"Error: .*file.out", result.stderr.splitlines()[-1])
