"""What a run of Table 2 is made of, arms that diverge, rows of Dolly, and what is checked before training."""

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

import comparison
import dolly_monolora
import evaluation
import pytest
import sst2_monolora
import torch
from table2 import identity
from transformers import AutoModelForCausalLM

from evals.judge import judge
from evals.prompts import dolly_held_out, dolly_prompt
from evals.records import read_completions
from tests.recipes.conftest import rows_of
from vision_bench.runs import Run, read_rows, recorded


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

    def test_other_judges_of_the_evaluation_are_none_of_this_run(self, everything, tmp_path, make_shieldgemma):
        """As docs/table2.md says how to judge the same answers again."""
        rows = (tmp_path / "out" / "results.jsonl").read_bytes()
        judge(tmp_path / "out" / "evaluation", [f"shieldgemma={make_shieldgemma()}"])
        sst2_monolora.main(everything)
        assert (tmp_path / "out" / "results.jsonl").read_bytes() == rows

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

        monkeypatch.setattr(comparison, "add_score", killed)
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

    def test_an_option_that_came_later_is_at_its_default_in_older_folders(self, arguments, tmp_path, request):
        sst2_monolora.main([*arguments, "--methods", "base"])
        path, rows = tmp_path / "out" / "config.json", (tmp_path / "out" / "results.jsonl").read_bytes()
        described = json.loads(path.read_text())
        del described["config"]["max_new_tokens"]
        path.write_text(json.dumps(described))
        request.getfixturevalue("no_training")
        sst2_monolora.main([*arguments, "--methods", "base"])
        assert (tmp_path / "out" / "results.jsonl").read_bytes() == rows
        with pytest.raises(ValueError, match=r"another configuration \(max_new_tokens: None there, 3 now\)"):
            sst2_monolora.main([*arguments, "--methods", "base", "--max_new_tokens", "3"])

    def test_mixed_precision_of_the_launcher_counts(self, arguments, monkeypatch):
        configurations = []
        for precision in ("no", "bf16"):
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
            configurations.append(identity(*sst2_monolora.parse(arguments), [], {}, False))
        first, second = configurations
        assert {name for name in first if first[name] != second[name]} == {"mixed_precision"}


class TestDivergence:
    DIVERGING = ("--learning_rate", "1e30", "--max_grad_norm", "0")

    def test_arms_that_diverge_are_marked_and_the_others_go_on(
        self, arguments, eval_data, beaverdam, tmp_path, capsys, monkeypatch, request
    ):
        """The rate of one arm alone is absurd, so that its weights overflow in real training."""
        original = comparison.finetuning

        def finetuning(compared, trained, rows):
            if (trained.method, trained.seed) != ("lora", 0):
                training = replace(compared.training, learning_rate=1e30, max_grad_norm=0.0)
                compared = replace(compared, training=training)
            return original(compared, trained, rows)

        monkeypatch.setattr(comparison, "finetuning", finetuning)
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
        assert not rows_of(rows, "task_sparsity")
        assert len(rows_of(rows, "accuracy", method="lora", seed=0)) == 2
        assert len(rows_of(rows, "unsafe", method="lora", seed=0)) == 2
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
        original = evaluation.generate

        def generate(settings):
            run = original(replace(settings, adapters=[a for a in settings.adapters if "seed1" not in a.name]))
            arm = {"model": settings.model, "adapter": "monolora-seed1", "method": "monolora", "task": None}
            if not run.find("diverged"):
                arm["checksums"] = run.rows[0]["config"]["checksums"]
                run.add_diverged("a score is not finite", n=1, seed=1, seconds=0, device="cpu", **arm)
            return run

        monkeypatch.setattr(evaluation, "generate", generate)
        arguments = [*arguments, "--methods", "monolora", "--seeds", "0", "1", "--safety_tasks", "xstest"]
        sst2_monolora.main([*arguments, "--max_new_tokens", "2"])
        rows = read_rows(tmp_path / "out" / "results.jsonl")
        assert [row["metric"] for row in rows if row["seed"] == 1] == ["diverged"]
        assert len(rows_of(rows, "alignment_sparsity", method="monolora", seed=0)) == 1
        text = (tmp_path / "out" / "results.md").read_text()
        assert "- monolora, seed 1: a score is not finite." in text
        assert "| monolora | 2 |" in text
        before = (tmp_path / "out" / "results.jsonl").read_bytes()
        sst2_monolora.main([*arguments, "--max_new_tokens", "2"])
        assert (tmp_path / "out" / "results.jsonl").read_bytes() == before

    def test_nothing_is_judged_where_all_answers_diverge(self, arguments, eval_data, beaverdam, tmp_path, monkeypatch):
        def generate(settings):
            run = Run(settings.output_dir, "evals", recorded(settings))
            for adapter in settings.adapters:
                run.add_diverged("its logits", n=1, seed=0, seconds=0, device="cpu", adapter=adapter.name, task=None)
            return run

        monkeypatch.setattr(evaluation, "generate", generate)
        arguments = [*arguments, "--methods", "lora", "--judges", f"beaverdam={beaverdam}", "--max_new_tokens", "2"]
        sst2_monolora.main(arguments)
        text = (tmp_path / "out" / "results.md").read_text()
        assert "| lora | 1 | diverged |" in text
        assert "Thinking was off, in training, scores and answers of all arms.\n" in text

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

    @pytest.fixture
    def dolly_arguments(self, small_model, eval_data, tmp_path):
        options = "--methods base --max_new_tokens 2"
        return ["--model_name_or_path", str(small_model), "--output_dir", str(tmp_path / "out"), *options.split()]

    def many(self, path, is_long=lambda row: False):
        """90 rows, of which 9 are held out; a long one has some 6,000 tokens."""
        rows = [self.ROW | {"instruction": f"Say {i}"} for i in range(90)]
        rows = [row | {"response": "so " * 3000} if is_long(row) else row for row in rows]
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    @pytest.mark.usefixtures("no_training")
    def test_another_data_set_than_the_task_asks(self, dolly_arguments, tmp_path):
        self.many(tmp_path / "set" / "train.jsonl")
        with pytest.raises(ValueError, match=r"does not ask what is held out of --dataset_name .*/set: "):
            dolly_monolora.main([*dolly_arguments, "--dataset_name", str(tmp_path / "set")])

    def test_rows_beyond_the_context_are_counted(self, dolly_arguments, tmp_path, capsys):
        file = self.many(tmp_path / "x.jsonl", lambda row: row["instruction"] in ("Say 12", "Say 16"))
        dolly_monolora.main([*dolly_arguments, "--train_file", file])
        assert "2 of 9 held-out rows exceed the context of 2048 tokens" in capsys.readouterr().out
        rows = read_rows(tmp_path / "out" / "results.jsonl")
        assert {(row["metric"], row["n"]) for row in rows} >= {("answer_nll", 7), ("rougeL", 9)}

    @pytest.mark.usefixtures("no_training")
    def test_no_row_fits(self, dolly_arguments, tmp_path):
        file = self.many(tmp_path / "x.jsonl", lambda row: True)
        with pytest.raises(ValueError, match=r"None of the 9 held-out rows of --train_file .* context of 2048 tokens"):
            dolly_monolora.main([*dolly_arguments, "--train_file", file])
        file = self.many(tmp_path / "x.jsonl", lambda row: not dolly_held_out(row))
        with pytest.raises(ValueError, match="--max_length 1024 is too short for every training row"):
            dolly_monolora.main([*dolly_arguments, "--train_file", file])


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
        hold = "import sys, time, vision_bench.runs as runs\nrun = runs.Run(sys.argv[1], 'sst2_monolora', {})\n"
        hold += "with runs.locked(run.folder):\n    print('held', flush=True)\n    time.sleep(600)\n"
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
