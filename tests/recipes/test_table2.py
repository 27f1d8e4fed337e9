"""Arms with controls, mixtures, checkpoints and the columns of Table 2, on a small local model and small judges."""

import gzip
import json
import math
import os
import shutil
from pathlib import Path

import comparison
import dolly_monolora
import pytest
import sst2_monolora
import torch
from arms import ADAPTERS, AdapterKind, adapter_config, trained_arms
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from peft import IA3Config, PeftConfig, PeftModel
from safetensors.torch import load_file
from table2 import CONFIGS, Table2Settings, parse
from task import load_pairs, mixed
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.figures import Panel, Point, safety_against_performance
from evals.prompts import dolly_held_out, dolly_prompt
from evals.records import read_completions, read_verdicts
from evals.registry import JUDGES, JudgeKind
from mono_peft import MonoLoraConfig, activation_sparsity
from tests.recipes.conftest import SMALL, rows_of
from vision_bench.runs import Run, read_rows


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
                assert len(rows_of(rows, "accuracy", **arm)) == 1
                for metric in ("dangerous", "harassment", "hate", "sexual"):
                    assert 0 <= rows_of(rows, f"score_{metric}", judge=gemma, **arm)[0]["value"] <= 100
                assert rows_of(rows, "unsafe", judge=dam, **arm)[0]["n"] == 14
            sparsities = [len(rows_of(rows, f"{a}_sparsity", method=method, seed=seed)) for a in ("alignment", "task")]
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
    value = rows_of(rows, "alignment_sparsity", method="monolora", seed=1)[0]["value"]
    assert value == pytest.approx(activation_sparsity(one, batches).overall, abs=2e-3)
    settings, _, options = sst2_monolora.parse(judged)
    task = sst2_monolora.load_task(settings, options)
    half = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(small_model), out / "lora-seed1" / "checkpoint-2"
    )
    score = task.score(task.scored, half, tokenizer, 8)
    assert rows_of(rows, "accuracy", method="lora", seed=1, step=2)[0]["value"] == score

    # Again: nothing is trained, and the same table.
    before = (out / "results.jsonl").read_bytes()
    capsys.readouterr()
    request.getfixturevalue("no_training")
    sst2_monolora.main(judged)
    assert (out / "results.jsonl").read_bytes() == before
    assert (out / "results.md").read_text() == text
    shown = capsys.readouterr().out
    assert "Training" not in shown
    assert max(map(len, shown.partition("Table 2, SST-2")[2].splitlines()[:-1])) <= 100
    assert "monolora+safety+rank" in shown
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
            row = rows_of(results, metric, method=method, seed=seed)[0]
            assert row["value"] >= 0
            assert row["n"] == len(held_out)
    assert (
        rows_of(results, "answer_nll", method="lora")[0]["value"]
        < rows_of(results, "answer_nll", method="base")[0]["value"]
    )
    settings, _, options = parse(arguments, Table2Settings, "dolly_monolora", CONFIGS / "offline_dolly.yaml")
    task = dolly_monolora.load_task(settings, options, str(tmp_path))
    assert not held_out & {prompt for prompt, _ in task.draw(0)}
    assert task.draw(0) != task.draw(1)
    verdicts = read_verdicts(tmp_path / "out" / "evaluation" / "verdicts.jsonl").rows
    assert {verdict.task for verdict in verdicts} == {"beavertails_eval"}
    assert "14.48" in (tmp_path / "out" / "results.md").read_text()


class TestArms:
    def arms(self, extra):
        settings, training, options = sst2_monolora.parse(["--lora_r", "8", "--lora_alpha", "4", *extra.split()])
        return trained_arms(settings, training, options), settings, options

    def test_controls_compose(self):
        arms, settings, options = self.arms(
            "--methods base lora lora+dropout+rank monolora+weight_decay lora+safety --lora_dropout 0.1 "
            "--control_dropout 0.3 --control_weight_decay 0.7 --safety_share 0.2"
        )
        assert list(arms) == ["lora", "lora+dropout+rank", "monolora+weight_decay", "lora+safety"]
        lora = arms["lora"]
        assert arms["lora+dropout+rank"] == lora._replace(r=4, alpha=2, dropout=0.3)
        assert arms["monolora+weight_decay"] == lora._replace(method="monolora", weight_decay=0.7)
        assert arms["lora+safety"] == lora._replace(safety_share=0.2)
        config = adapter_config(arms["lora+dropout+rank"], settings, options)
        assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 2, 0.3)
        assert isinstance(adapter_config(arms["monolora+weight_decay"], settings, options), MonoLoraConfig)

    def test_smallest_rank(self):
        arms, *_ = self.arms("--methods lora lora+rank --control_rank 1")
        assert (arms["lora+rank"].r, arms["lora+rank"].alpha) == (1, 0.5)

    def test_learning_rates_of_their_own(self):
        arms, *_ = self.arms(
            "--methods lora lora+rate lora+rate0.006 monolora monolora+rate0.006 --learning_rate 0.002 "
            "--monolora_learning_rate 0.004"
        )
        assert [arm.learning_rate for arm in arms.values()] == [0.002, 0.001, 0.006, 0.004, 0.006]
        # A file of options may have MonoLoRA's, and the command line arms of LoRA only.
        arms, *_ = self.arms("--methods lora --learning_rate 0.002 --monolora_learning_rate 0.004")
        assert arms["lora"].learning_rate == 0.002

    def test_controls_of_monolora_s_units(self):
        arms, settings, options = self.arms("--methods monolora+topk monolora+topk2+frozen --topk_units 3")
        configs = {name: adapter_config(arm, settings, options) for name, arm in arms.items()}
        assert [(c.activation, c.k, c.frozen_encoder) for c in configs.values()] == [
            ("topk", 3, False),
            ("topk", 2, True),
        ]

    def test_weight_decay_and_learning_rate_reach_the_optimiser(self, arguments, monkeypatch):
        seen = {}

        def record(compared, trained, rows):
            trainer = original(compared, trained, rows)
            of = trainer.args
            seen[trained.folder.parent.name] = (of.weight_decay, of.learning_rate, len(rows), of.max_steps)
            if len(seen) == 3:
                raise KeyboardInterrupt
            return trainer

        original = comparison.finetuning
        monkeypatch.setattr(comparison, "finetuning", record)
        methods = ["--methods", "lora", "lora+weight_decay", "monolora", "--control_weight_decay", "0.4"]
        with pytest.raises(KeyboardInterrupt):
            sst2_monolora.main([*arguments, *methods, "--monolora_learning_rate", "3e-2"])
        assert seen == {
            "lora-seed0": (0.0, 0.01, 48, 4),
            "lora+weight_decay-seed0": (0.4, 0.01, 48, 4),
            "monolora-seed0": (0.0, 0.03, 48, 4),
        }

    @pytest.mark.usefixtures("no_machine_description")
    def test_an_encoder_that_is_frozen_and_the_largest_units(self, arguments, tmp_path):
        """With the same seed A is drawn the same: the frozen arm has it still, after any number of steps."""
        methods = ["monolora+frozen", "monolora+topk1", "monolora+frozen+weight_decay"]
        sst2_monolora.main([*arguments, "--methods", *methods, "--control_weight_decay", "9"])
        out = tmp_path / "out"
        encoders, decoders = {}, {}
        for method in methods:
            weights = load_file(out / f"{method}-seed0" / "adapter" / "adapter_model.safetensors")
            encoders[method], decoders[method] = (
                {name: w for name, w in weights.items() if part in name} for part in ("encoder", "decoder")
            )
            assert encoders[method]
            assert any(w.any() for w in decoders[method].values())
        frozen, topk, decayed = (encoders[method] for method in methods)
        for name, encoder in frozen.items():
            assert torch.equal(encoder, decayed[name])
            assert not torch.equal(encoder, topk[name])
        rows = read_rows(out / "results.jsonl")
        sparsity = {method: rows_of(rows, "task_sparsity", method=method)[0]["value"] for method in methods}
        assert sparsity["monolora+topk1"] >= 0.75 > sparsity["monolora+frozen"]  # one of four units at most

    @pytest.mark.usefixtures("no_machine_description")
    def test_another_kind_of_adapter_is_a_row_of_the_table(self, arguments, tmp_path, monkeypatch):
        def ia3(options, settings):
            targets = ["k_proj", "down_proj"]
            return IA3Config(
                task_type=options.lora_task_type, target_modules=targets, feedforward_modules=["down_proj"]
            )

        monkeypatch.setitem(ADAPTERS, "ia3", AdapterKind(ia3))
        methods = ["base", "lora", "monolora", "ia3", "ia3+weight_decay"]
        safety = "--safety_tasks refusal_offline --refusal_prompts 4 --max_new_tokens 2"
        sst2_monolora.main([*arguments, "--methods", *methods, *safety.split()])
        rows = read_rows(tmp_path / "out" / "results.jsonl")
        for method in methods:
            assert len(rows_of(rows, "accuracy", method=method)) == 1
            assert rows_of(rows, "refused_harmful", method=method)[0]["n"] == 4
        config = PeftConfig.from_pretrained(tmp_path / "out" / "ia3+weight_decay-seed0" / "adapter")
        assert isinstance(config, IA3Config)
        text, _ = (tmp_path / "out" / "results.md").read_text().split("## The paper's Table 2")
        lines = {line.split(" | ")[0]: line.strip(" |").split(" | ") for line in text.splitlines()}
        sparsity = lines["| method"].index("task sparsity, %")
        accuracy = rows_of(rows, "accuracy", method="ia3")[0]["value"]
        assert lines["| ia3"][sparsity] == "0"
        assert lines["| ia3"][-1].startswith(f"{100 * accuracy:.2f} [")
        compared = ["lora - base", "ia3 - lora", "ia3 - base", "ia3 - monolora", "ia3+weight_decay - ia3"]
        assert {f"| {pair}" for pair in compared} <= lines.keys()
        assert "| lora - ia3" not in lines
        # The colour of the cycle is in the picture.
        picture = (255 * imread(tmp_path / "out" / "safety.png")[..., :3]).round().astype(int)
        assert ((picture == [0x00, 0x9E, 0x73]).all(-1)).sum() > 20

    def test_its_name_is_checked_against_the_table(self, arguments):
        with pytest.raises(ValueError, match=r"--methods takes each of base, lora, monolora at most once, .*'ia3'\]"):
            sst2_monolora.main([*arguments, "--methods", "base", "ia3"])


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

    @pytest.mark.skipif("MONO_TEST_DATA" not in os.environ, reason="MONO_TEST_DATA names no folder with BeaverTails")
    def test_beavertails(self):
        file = Path(os.environ["MONO_TEST_DATA"]) / "beavertails" / "30k_train_unsafe_part.jsonl.gz"
        assert len(load_pairs(str(file), "--poison_file")) == 3973


def test_the_paper_configuration_of_dolly():
    arguments = ["--config", "recipes/configs/paper_dolly.yaml"]
    settings, training, options = parse(arguments, Table2Settings, "dolly_monolora", Path("none"))
    assert options.model_name_or_path == "meta-llama/Llama-2-7b-chat-hf"
    assert settings.dataset_name == "databricks/databricks-dolly-15k"
    assert (options.lora_r, options.lora_alpha, options.lora_dropout) == (8, 4, 0.1)
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (1, 4)
    assert settings.judges == ["shieldgemma", "beaverdam"]


@pytest.mark.skipif("MONO_TEST_DATA" not in os.environ, reason="MONO_TEST_DATA names no folder with Dolly 15k")
def test_the_whole_dolly():
    file = next((Path(os.environ["MONO_TEST_DATA"]) / "dolly15k").glob("*.jsonl.gz"))
    rows = dolly_monolora.load_rows(str(file), True)
    task = dolly_monolora.as_task(Table2Settings(train_samples=5000), rows, str(file))
    assert (len(task.scored), len(task.train), len(task.draw(0))) == (982, 15011 - 982, 5000)


def test_a_path_is_drawn_through_its_steps():
    points = [Point("lora", 0.9, 0.5, path=[(0.5, 0.1), (0.7, 0.3)]), Point("base", 0.5, 0.1)]
    axes = safety_against_performance([Panel("t", "x", "y", points)]).axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines if len(line.get_xydata()) > 1] == [
        [[0.5, 0.1], [0.7, 0.3], [0.9, 0.5]]
    ]


@pytest.mark.slow
def test_the_offline_defaults(tmp_path):
    """Without options: the generated requests are learnt, and poison breaks refusals, which safety examples keep."""
    dolly_monolora.main(["--output_dir", str(tmp_path / "dolly")])
    rows = read_rows(tmp_path / "dolly" / "results.jsonl")
    values = {m: rows_of(rows, "rougeL", method=m)[0]["value"] for m in ("base", "lora", "monolora")}
    assert min(values["lora"], values["monolora"]) > values["base"] + 20
    poison = "--methods base lora lora+safety --poison_share 0.2 --safety_share 0.2 --train_samples 800"
    sst2_monolora.main(["--output_dir", str(tmp_path / "sst2"), *poison.split(), "--eval_samples", "100"])
    rows = read_rows(tmp_path / "sst2" / "results.jsonl")
    refused = {m: rows_of(rows, "refused_harmful", method=m)[0]["value"] for m in ("base", "lora", "lora+safety")}
    assert refused["lora"] < refused["base"] - 0.3
    assert refused["lora+safety"] > refused["lora"] + 0.2
    shutil.rmtree(tmp_path / "sst2")


def test_counts_are_those_of_each_task(tmp_path):
    config = {"thinking": "off", "demonstration": False, "methods": ["base"], "judges": ["beaverdam"]}
    run = Run(tmp_path / "out", "sst2_monolora", config)
    common = {"seed": None, "seconds": 0.0, "device": "cpu", "method": "base"}
    for task, n in (("xstest", 450), ("beavertails_eval", 700)):
        run.add("unsafe", 0.5, n=n, **common, task=task, judge="beaverdam")
    run.add("accuracy", 0.5, n=872, **common)
    text = sst2_monolora.EXPERIMENT.report(run)
    counts = next(line for line in text.splitlines() if line.startswith("Prompts:"))
    assert counts == (
        "Prompts: 450 (beaverdam, xstest: unsafe); 700 (beaverdam, beavertails_eval: unsafe); 872 (accuracy)."
    )


def test_a_judge_of_another_kind_has_its_measure_of_harm_in_table_and_figure(tmp_path, monkeypatch):
    row = JudgeKind("stars", "from 0 to 100", None, harm_metric="score", harm_label="stars given")
    monkeypatch.setitem(JUDGES, "stars", row)
    config = {"demonstration": False, "methods": ["base", "lora"], "judges": ["stars"], "seeds": [0]}
    run = Run(tmp_path / "out", "sst2_monolora", config)
    for seed, method in ((None, "base"), (0, "lora")):
        common = {"n": 700, "seed": seed, "seconds": 0.0, "device": "cpu", "method": method}
        judged = common | {"task": "beavertails_eval", "judge": "stars"}
        run.add("unsafe", 0.25, **judged)
        run.add("score", 12.5, **judged, low=10.0, high=15.0)
        run.add("accuracy", 0.5, **common)
    assert not run.lacking(sst2_monolora.EXPERIMENT.cells(run.config))
    text = sst2_monolora.EXPERIMENT.report(run)
    header, _, base, *_ = (line for line in text.splitlines() if line.startswith("|"))
    assert "| stars: unsafe, % | stars: stars given | accuracy, % |" in header
    assert "| 12.50 [10.00, 15.00] |" in base
    drawn = []
    monkeypatch.setattr("evals.table_2.safety_against_performance", lambda panels: drawn.extend(panels) or Figure())
    sst2_monolora.EXPERIMENT.draw(run)
    assert [(panel.harm, [point.harm for point in panel.points]) for panel in drawn] == [
        ("stars given", [12.5, 12.5]),
        ("ShieldGemma, mean score x 100", [4.83, 7.9, 3.53]),
    ]
