"""Arms of Table 2 that diverge are marked, and the others go on."""

import json
import math
import re
from dataclasses import replace

import comparison
import dolly_monolora
import evaluation
import pytest
import sst2_monolora
import torch
from transformers import AutoModelForCausalLM

from evals.records import read_completions
from tests.recipes.conftest import rows_of
from vision_bench.runs import Run, read_rows, recorded


class TestDivergence:
    DIVERGING = ("--learning_rate", "1e30", "--max_grad_norm", "0")

    def test_arms_that_diverge_are_marked_and_the_others_go_on(
        self, arguments, eval_data, beaverdam, tmp_path, capsys, monkeypatch, request
    ):
        """The rate of one arm alone is absurd, so that its weights overflow in real training."""
        original = comparison.finetuning

        def finetuning(compared, trained, rows):
            if (trained.method, trained.seed) != ("lora", 0):
                arms = {name: arm._replace(learning_rate=1e30) for name, arm in compared.arms.items()}
                training = replace(compared.training, max_grad_norm=0.0)
                compared = replace(compared, training=training, arms=arms)
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
        assert lora.count("(1 of 2 diverged)") == 4  # safety, KL, loss and accuracy
        assert "- monolora, seed 1: the training loss is not finite." in table
        assert "- lora, seed 1, step 2: " in table

        # Again: a diverged arm is done.
        capsys.readouterr()
        request.getfixturevalue("no_training")
        sst2_monolora.main(arguments)
        assert (tmp_path / "out" / "results.jsonl").read_text() == text
        assert (tmp_path / "out" / "results.md").read_text() == table
        assert "- lora, seed 1, step 2: " in capsys.readouterr().out

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
