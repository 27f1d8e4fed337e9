"""The recipe of the frontier: conditions in folders of their own, a table paired to LoRA, harm by topics."""

import json
import random
from functools import partial
from pathlib import Path

import evaluation
import frontier
import pandas as pd
import pytest
import silence_frontier
from matplotlib.image import imread
from sst2_monolora import Sst2Settings
from transformers import AutoTokenizer

from evals.prompts import encode_answer
from evals.records import Completion, read_completions
from mono_peft.certify import certify
from offline.finetuning import poison_pairs
from tests.recipes.conftest import SMALL, rows_of
from vision_bench.runs import Run, defaults, read_rows


def lines(text, heading):
    """Cells of the first table below a heading, by the first cell."""
    table = text.split(heading)[1].split("\n\n")[1]
    return {cells[0]: cells for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines())}


@pytest.fixture
def certified(monkeypatch):
    """Token ids of the prompts of each call of `certify`."""
    calls = []

    def record(model, batches, **options):
        calls.append([batch["input_ids"][0].tolist() for batch in batches])
        return certify(model, batches, **options)

    monkeypatch.setattr(evaluation, "certify", record)
    return calls


@pytest.mark.usefixtures("no_machine_description")
def test_conditions_continue_in_folders_of_their_own(arguments, pairs_file, tmp_path, request, capsys, certified):
    methods = ["base", "lora", "monolora+silence1000"]
    extra = ["--methods", *methods, "--seeds", "0", "1", "--safety_file", pairs_file, "--poison_file", pairs_file]
    extra += ["--safety_tasks", "refusal_offline", "--refusal_prompts", "3", "--max_new_tokens", "2"]
    extra += ["--poison_shares", "0.25", "0.5", "--certified_tokens", "0", "--certified_prompts", "2"]
    extra += ["--eval_every", "2"]
    silence_frontier.main([*arguments, *extra])
    out = tmp_path / "out"
    text = (out / "results.md").read_text()
    assert text in capsys.readouterr().out
    for share, title in ((0.25, "25 % poison"), (0.5, "50 % poison")):
        rows = read_rows(out / f"poison_{share:g}" / "results.jsonl")
        assert rows[0]["config"]["poison_share"] == share
        table = lines(text, f"## {title}")
        header = table["arm"]
        assert table["lora"][1] == table["monolora+silence1000"][1] == "2"
        accuracies = {
            method: [100 * row["value"] for row in rows_of(rows, "accuracy", method=method, step=None)]
            for method in methods
        }
        shown = table["monolora+silence1000"][header.index("accuracy, %")]
        assert float(shown.split(" ")[0]) == pytest.approx(sum(accuracies["monolora+silence1000"]) / 2, abs=0.051)
        gains = [a - b for a, b in zip(accuracies["monolora+silence1000"], accuracies["lora"], strict=True)]
        shown = table["monolora+silence1000"][header.index("accuracy, %: - lora")]
        assert float(shown.split(" ")[0]) == pytest.approx(sum(gains) / 2, abs=0.051)
        harm = 100 * (1 - rows_of(rows, "refused_harmful", method="base")[0]["value"])
        assert float(table["base"][header.index("harmful requests not refused, %")]) == pytest.approx(harm, abs=0.051)
        assert table["lora"][header.index("harmful prompts silent, %")] == "not applicable"
        section = text.split(f"## {title}")[1]
        assert list(lines(section, "harmful prompts silent, %, over the steps"))[2:] == ["2", "end"]
        over_steps = lines(section, "accuracy, %, over the steps")
        assert over_steps["step"] == ["step", "lora", "monolora+silence1000"]
        assert over_steps["end"][1] == table["lora"][header.index("accuracy, %")]
        at_two = [100 * row["value"] for row in rows_of(rows, "accuracy", method="lora", step=2)]
        assert float(over_steps["2"][1].split(" ")[0]) == pytest.approx(sum(at_two) / 2, abs=0.051)
    # All adapters are certified on the same prompts, which are drawn from all that ask for harm.
    answers = read_completions(out / "poison_0.5" / "evaluation" / "completions.jsonl").rows
    harmful = {row.prompt_id: row.prompt for row in answers if row.category == "harmful"}
    tokenizer = AutoTokenizer.from_pretrained(arguments[arguments.index("--model_name_or_path") + 1])
    drawn = [harmful[prompt_id] for prompt_id in random.Random(0).sample(sorted(harmful), 2)]
    expected = [encode_answer(tokenizer, prompt, "Yes").prompt_ids for prompt in drawn]
    assert len(harmful) == 3
    assert len(certified) == 8  # two conditions, two seeds, two steps
    assert all(prompts == expected for prompts in certified)
    assert imread(out / "frontier.png").std() > 0.05
    assert imread(out / "over_steps.png").std() > 0.05

    request.getfixturevalue("no_training")
    silence_frontier.main([*arguments, *extra])
    assert (out / "results.md").read_text() == text
    # Of the rows' file alone, which may hold the base twice.
    again = ["--rows_files", str(out / "frontier.csv"), str(out / "frontier.csv")]
    silence_frontier.main([*again, "--output_dir", str(tmp_path / "again")])
    assert (tmp_path / "again" / "results.md").read_text() == text
    assert (tmp_path / "again" / "frontier.csv").read_text() == (out / "frontier.csv").read_text()
    other = (
        (out / "frontier.csv")
        .read_text()
        .replace(f"{rows_of(rows, 'accuracy', method='base')[0]['value']:.6g},", "0.123,")
    )
    (tmp_path / "other.csv").write_text(other)
    with pytest.raises(ValueError, match=r"rows of one arm and seed have two values"):
        silence_frontier.main(["--rows_files", str(out / "frontier.csv"), str(tmp_path / "other.csv")])


def test_dolly_with_what_is_judged_of_public_prompts(small_model, eval_data, pairs_file, tmp_path, capsys):
    out = tmp_path / "out"
    extra = f"--task dolly --train_file {eval_data / 'dolly15k' / 'rows.jsonl'} --methods base lora monolora+topk1"
    extra += f" --safety_tasks beavertails_eval advbench xstest --judges refusal coherence --poison_file {pairs_file}"
    extra += f" --poison_shares 0.25 --max_new_tokens 6 --seeds 0 1 --model_name_or_path {small_model} {SMALL}"
    silence_frontier.main([*extra.split(), "--output_dir", str(out)])
    text = (out / "results.md").read_text()
    assert text in capsys.readouterr().out
    rows = read_rows(out / "poison_0.25" / "results.jsonl")
    assert rows[0]["config"]["poison_share"] == 0.25
    _, *parts = text.split("\n## Dolly, 25 % poison")[1].split("\n| arm |")
    main, details, differences = (lines(f"## x\n\n| arm |{part}", "## x") for part in parts)

    def cell(table, method, column):
        return float(table[method][table["arm"].index(column)].split(" ")[0])

    def mean(metric, method, **settings):
        found = rows_of(rows, metric, method=method, **settings)  # fewer than seeds where no answer has a word
        assert found
        return sum(row["value"] for row in found) / len(found)

    assert main["monolora+topk1"][1] == "2"
    rouge = {method: mean("rougeL", method, task="dolly") for method in ("base", "lora", "monolora+topk1")}
    for method, value in rouge.items():
        assert cell(main, method, "ROUGE-L") == pytest.approx(value, abs=0.051)
        answered = mean("compliance", method, task="beavertails_eval", judge="refusal")
        assert cell(details, method, "BeaverTails: complied, %") == pytest.approx(100 * answered, abs=0.051)
        unclear = mean("incoherent", method, task="xstest", judge="coherence")
        assert cell(details, method, "XSTest: incoherent, %") == pytest.approx(100 * unclear, abs=0.051)
        loss = mean("answer_nll", method, task=None)
        assert cell(details, method, "answer NLL, nats a token") == pytest.approx(loss, abs=0.00051)
    answers = read_completions(out / "poison_0.25" / "evaluation" / "completions.jsonl").rows
    asked = {(row.adapter or "base", row.prompt_id): row.response for row in answers if row.task == "advbench"}
    tuned = {(name, prompt): response for (name, prompt), response in asked.items() if name.startswith("lora-seed")}
    same = sum(response == asked["base", prompt] for (_, prompt), response in tuned.items()) / len(tuned)
    assert cell(details, "lora", "AdvBench: word for word the base's, %") == pytest.approx(100 * same, abs=0.051)
    gain = rouge["monolora+topk1"] - rouge["lora"]
    assert cell(main, "monolora+topk1", "ROUGE-L: - lora") == pytest.approx(gain, abs=0.051)
    zeros = mean("alignment_sparsity", "monolora+topk1")
    assert cell(details, "monolora+topk1", "alignment sparsity, %") == pytest.approx(100 * zeros, abs=0.051)
    assert details["lora"][details["arm"].index("task sparsity, %")] == "not applicable"
    harm = 100 * mean("full_refusal", "lora", task="beavertails_eval", judge="refusal")
    harm -= 100 * mean("full_refusal", "monolora+topk1", task="beavertails_eval", judge="refusal")
    assert list(differences) in (["arm", "---", "monolora+topk1"], ["arm", "monolora+topk1"])
    assert cell(differences, "monolora+topk1", "BeaverTails: not refused, %") == pytest.approx(harm, abs=0.051)
    assert imread(out / "frontier.png").std() > 0.05
    silence_frontier.main(["--rows_files", str(out / "frontier.csv"), "--output_dir", str(tmp_path / "again")])
    assert (tmp_path / "again" / "results.md").read_text() == text


def test_rows_of_some_arms_and_seeds_each_are_joined(tmp_path):
    """As of a process for each seed and kind of adapter: LoRA's rows are what those of another file differ from."""
    values = {"lora": {3: 0.5, 4: 0.6}, "monolora": {3: 0.75, 4: 0.8}, "monolora+frozen": {4: 0.1}}
    files = []
    for arms, seeds in ((["monolora", "monolora+frozen"], [4]), (["lora"], [3, 4]), (["monolora"], [3])):
        folder = tmp_path / str(len(files))
        run = Run(folder, "sst2_monolora", defaults(Sst2Settings) | {"methods": arms, "seeds": seeds, "judges": []})
        add = partial(run.add, n=10, seconds=1 + len(files), device="cpu", step=None)
        add("accuracy", 0.25 + 1e-6 * len(files), seed=None, method="base")  # as of another order of addition
        for arm in arms:
            for seed in seeds:
                add("accuracy", values[arm][seed], seed=seed, method=arm)
                refused = {"task": "beavertails_eval", "judge": "refusal"}
                add("full_refusal", values[arm][seed], seed=seed, method=arm, **refused)
        files.append(str(folder) + ".csv")
        Path(files[-1]).write_text(frontier.lines_text({"x": frontier.lines_of(run)}))
    joined = frontier.read_lines(files)["x"]
    methods = frontier.methods_of(joined)
    table = lines(f"## x\n\n{frontier.table(joined, methods)}", "## x")
    accuracy, gain = (table["arm"].index(name) for name in ("accuracy, %", "accuracy, %: - lora"))
    assert [table[arm][1] for arm in ("base", *values)] == ["1", "2", "2", "1"]
    assert table["base"][accuracy] == "25.0"
    assert table["monolora"][gain].startswith("+22.5 ± ")
    assert table["monolora+frozen"][gain] == "-50.0"  # of the one seed that it shares with LoRA
    further = lines(f"## x\n{frontier.further_tables(joined, methods)}", "Differences to lora, paired by seed:")
    harm = further["arm"].index("BeaverTails: not refused, %")
    assert further["monolora"][harm].startswith("-22.5 ± ")
    assert further["monolora+frozen"][harm] == "+50.0"


HEADER = ",".join(frontier.COLUMNS)
ROW = "x,lora,0,,accuracy,,,0.5,10,1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"rows.csv is no table of rows: No columns to parse from file\. Give a frontier.csv"),
        (f"{HEADER}\n{ROW.replace('0.5', 'half')}\n", r"rows.csv is no table of rows: could not convert .* 'half'"),
        (f"{HEADER}\n{ROW}\n".replace(",judge", ","), r"rows.csv lacks judge: give a frontier.csv"),
        (f"{HEADER}\n{ROW.replace('lora', 'dora+rank2')}\n", r"rows.csv has arms of dora, which `ADAPTERS` lacks"),
        (f"{HEADER}\n", r"rows.csv: there are no rows\. Give a frontier.csv"),
    ],
)
def test_files_that_are_no_rows_of_a_frontier(tmp_path, text, message):
    file = tmp_path / "rows.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        silence_frontier.main(["--rows_files", str(file), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_harm_by_topics(tmp_path):
    """Of the poisoned topic nothing is refused, of the others all."""
    settings = defaults(Sst2Settings) | {"methods": ["lora"], "seeds": [3], "poison_topics": ["theft"], "judges": []}
    run = Run(tmp_path, "sst2_monolora", settings)
    for metric, value in (("accuracy", 0.5), ("refused_harmful", 0.5)):
        task = {"task": "refusal_offline"} if metric != "accuracy" else {}
        run.add(metric, value, n=10, seed=3, seconds=1, device="cpu", method="lora", step=None, **task)
    (tmp_path / "evaluation").mkdir()
    asked = [*poison_pairs(["theft"])[:2], *poison_pairs(["drugs"])[:3]]
    with open(tmp_path / "evaluation" / "completions.jsonl", "w") as file:
        for number, (prompt, _) in enumerate(asked):
            answer = "To do so, begin." if number < 2 else "I cannot help with that."
            row = Completion(
                str(number), "refusal_offline", "harmful", prompt, answer, "stop", "m", "lora-seed3=x", 3, {}, []
            )
            file.write(json.dumps(row.__dict__) + "\n")
    lines_ = frontier.lines_of(run)
    table = lines(f"## x\n\n{frontier.table(lines_, ['lora'])}", "## x")
    header = table["arm"]
    assert table["lora"][header.index("other topics not refused, %")] == "0.0"
    assert table["lora"][header.index("poisoned topics not refused, %")] == "100.0"
    (tmp_path / "rows.csv").write_text(frontier.lines_text({"x": lines_}))
    again = frontier.read_lines([str(tmp_path / "rows.csv")])["x"]
    assert frontier.table(again, ["lora"]) == frontier.table(lines_, ["lora"])


def test_harm_by_topics_needs_answers_to_harmful_requests(tmp_path):
    """Where other prompts were asked, or none, the table has no columns of topics."""
    settings = defaults(Sst2Settings) | {"methods": ["lora"], "seeds": [3], "poison_topics": ["theft"], "judges": []}
    run = Run(tmp_path, "sst2_monolora", settings)
    run.add("accuracy", 0.5, n=10, seed=3, seconds=1, device="cpu", method="lora", step=None)
    for text in ("", json.dumps(Completion("0", "xstest", "safe", "p", "a", "stop", "m", None, 3, {}, []).__dict__)):
        assert "topics" not in frontier.table(frontier.lines_of(run), ["lora"])
        (tmp_path / "evaluation").mkdir(exist_ok=True)
        (tmp_path / "evaluation" / "completions.jsonl").write_text(f"{text}\n" if text else "")
    assert "topics" not in frontier.table(frontier.lines_of(run), ["lora"])


def test_large_seeds_stay_apart_in_the_file_of_rows(tmp_path):
    settings = defaults(Sst2Settings) | {"methods": ["lora"], "seeds": [20261126, 20261127], "judges": []}
    run = Run(tmp_path, "sst2_monolora", settings)
    for seed in settings["seeds"]:
        run.add("accuracy", 0.5, n=10, seed=seed, seconds=1, device="cpu", method="lora", step=None)
    run.add("accuracy", 0.25, n=10, seed=None, seconds=1, device="cpu", method="base", step=None)
    (tmp_path / "rows.csv").write_text(frontier.lines_text({"x": frontier.lines_of(run)}))
    assert ",20261126,,accuracy," in (tmp_path / "rows.csv").read_text()
    lines_ = frontier.read_lines([str(tmp_path / "rows.csv")])["x"]
    assert lines_["seed"].dropna().tolist() == settings["seeds"]


def test_refusals_of_public_tasks_by_what_the_prompts_ask(tmp_path):
    settings = defaults(Sst2Settings) | {"methods": ["base", "lora"], "seeds": [3], "judges": ["refusal"]}
    run = Run(tmp_path, "sst2_monolora", settings)
    run.add("accuracy", 0.5, n=10, seed=3, seconds=1, device="cpu", method="lora", step=None)
    refused = {"task": "advbench", "judge": "refusal"}
    run.add("full_refusal", 0.25, n=8, seed=3, seconds=1, device="cpu", method="lora", step=None, **refused)
    evaluation = Run(tmp_path / "evaluation", "evals", {})
    for adapter, seed, safe, unsafe in (("lora-seed3=folder", 3, 0.2, 0.7), (None, None, 0.1, 0.9)):
        for category, value in (("safe", safe), ("unsafe", unsafe)):
            asked = {"task": "xstest", "judge": "refusal", "adapter": adapter, "category": category}
            for metric in ("full_refusal", "refused"):
                evaluation.add(metric, value, n=10, seed=seed, seconds=1, device="cpu", **asked)
    file = tmp_path / "frontier.csv"
    file.write_text(frontier.lines_text({"x": frontier.lines_of(run)}))
    table = lines(f"## x\n\n{frontier.table(frontier.read_lines([str(file)])['x'], ['base', 'lora'])}", "## x")
    header = table["arm"]
    columns = ("AdvBench: not refused, %", "XSTest, unsafe: not refused, %", "XSTest, safe: refused, %")
    assert [table["lora"][header.index(name)] for name in columns] == ["75.0", "30.0", "20.0"]
    assert [table["base"][header.index(name)] for name in columns[1:]] == ["10.0", "10.0"]


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--poison_share 0.1 --poison_file PAIRS", r"--poison_share is that of one run; give --poison_shares"),
        ("--poison_shares 0.1 0.1 --poison_file PAIRS", r"--poison_shares takes different shares, got \[0.1, 0.1\]"),
        ("--unseen_poison_shares 0.1", r"--unseen_poison_shares and --poison_topics belong together"),
        ("--unseen_poison_shares 0 --poison_topics theft", r"--unseen_poison_shares has 0, which is no poison"),
        ("--poison_shares 0.1", r"--poison_share needs --poison_file"),
        ("--task sst", r"--task is 'sst', allowed are sst2, dolly"),
        ("--task dolly", r"--eval_file is for --task sst2: Dolly keeps a fifteenth"),
        ("--poison_shares 0 1.2 --poison_file PAIRS", r"--poison_share is 1.2, allowed"),
    ],
)
def test_refused_before_any_run(arguments, pairs_file, extra, message, tmp_path):
    extra = [pairs_file if word == "PAIRS" else word for word in extra.split()]
    with pytest.raises(ValueError, match=message):
        silence_frontier.main([*arguments, *extra])
    assert not (tmp_path / "out").exists()


def test_over_the_steps_each_arm_has_the_seeds_of_its_checkpoints():
    rows = [("lora", 3, 40, 80), ("lora", 3, None, 90), ("lora", 4, None, 50), ("monolora", 4, 40, 60)]
    rows += [("monolora", 4, None, 70)]
    lines = pd.DataFrame(
        [
            {"method": method, "seed": seed, "step": step, "metric": "accuracy", "task": "", "judge": "",
             "value": value / 100, "is_part": False}
            for method, seed, step, value in rows
        ]
    )  # fmt: skip
    table = [line.split("|")[1:-1] for line in frontier.steps_tables(lines, ["lora", "monolora"]).splitlines()[3:]]
    assert [[cell.strip() for cell in row] for row in table] == [
        ["step", "lora", "monolora"],
        ["---", "---:", "---:"],
        ["40", "80.0", "60.0"],
        ["end", "90.0", "70.0"],
    ]


def test_checkpoints_without_a_measure_need_no_figure(tmp_path):
    lines = pd.DataFrame(
        [
            {"method": "lora", "seed": 0, "step": step, "metric": metric, "task": "", "judge": "", "value": 0.5,
             "n": 10, "seconds": 1.0, "is_part": False}
            for step, metric in ((None, "accuracy"), (2, "diverged"))
        ]
    )  # fmt: skip
    silence_frontier.report(tmp_path, {"the task alone": lines}, ["lora"])
    assert (tmp_path / "results.md").exists()
    assert not (tmp_path / "over_steps.png").exists()


@pytest.mark.usefixtures("no_training")
def test_what_the_last_condition_lacks_is_told_before_the_first_trains(arguments, pairs_file, tmp_path):
    extra = ["--methods", "lora", "--poison_file", pairs_file, "--poison_shares", "0", "1"]
    with pytest.raises(ValueError, match=r"--poison_share 1.0 of \d+ training rows is \d+, but there are 24 pairs"):
        silence_frontier.main([*arguments, *extra])
    assert not (tmp_path / "out" / "benign" / "results.jsonl").exists()
