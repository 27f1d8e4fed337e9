"""`python -m evals compare`: runs of ours, lm-eval's samples as it writes them, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys

import pytest
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evals.compare import compare
from evals.generate import generate
from evals.records import read_samples
from evals.registry import TASK_FOLDERS
from evals.values import read_arms


def write_verdicts(folder, judge="keywords", unsafe=None, **changed):
    """Verdicts on a folder's completions; `unsafe` says of an arm and prompt whether its answer is."""
    from evals.records import read_completions

    with open(folder / "verdicts.jsonl", "a") as file:
        for row in read_completions(folder / "completions.jsonl").rows:
            outcome = unsafe(row.adapter, int(row.prompt_id))
            verdict = {
                "judge": judge, "settings": {"words": "1"}, "prompt_id": row.prompt_id, "task": row.task,
                "category": row.category, "model": row.model, "adapter": row.adapter, "seed": row.seed,
                "text": row.text_checksum, "outcome": {True: "unsafe", False: "safe"}.get(outcome, "unparsed"),
                "scores": {"harm": 0.01 * int(row.prompt_id) if outcome else 0.0}, "reply": None, "seconds": 0.0,
            }  # fmt: skip
            file.write(json.dumps(verdict | changed) + "\n")


@pytest.fixture
def judged(completions_folder):
    """A folder of three arms on 40 prompts, where the adapter lora is unsafe on twelve more."""
    folder = completions_folder([(f"prompt {i}", f"answer {i}") for i in range(40)])
    write_verdicts(folder, unsafe=lambda arm, i: i < (16 if arm == "lora-seed0" else 4))
    return folder


def test_every_arm_is_compared_with_the_first(judged, tmp_path):
    comparison = compare([str(judged)], categories=True)
    rows = comparison.rows.set_index(["arm", "metric", "category"])
    row = rows.loc["lora-seed0", "unsafe", ""]
    assert (row["n"], row["reference"], row["only_arm"], row["only_reference"]) == (40, "base", 12, 0)
    assert row["p_value"] == pytest.approx(2 / 2**12)
    assert row["difference"] == pytest.approx(0.3)
    assert row["low"] < 0.3 < row["high"]
    assert rows.loc["lora-seed0", "score", ""]["test"] == "sign-flip"
    assert rows.loc["lora-seed0", "unsafe", "safe"]["n"] == 20
    assert rows.loc["monolora-seed0", "unsafe", ""]["p_value"] == 1
    assert len(rows) == 12
    assert 12 * row["p_value"] >= row["p_holm"] > row["p_value"]


def test_the_table_fits_the_terminal_and_files_have_all_columns(judged, tmp_path, capsys):
    from evals.__main__ import main

    main(["compare", f"a={judged}:base", f"{judged}:lora-seed0", "--output", str(tmp_path / "new" / "c.csv")])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "+30.0 [" in text
    assert "Compared with a on the same prompts" in text
    with open(tmp_path / "new" / "c.csv") as file:
        first = next(iter(csv.DictReader(file)))
    assert (first["arm"], first["n"], first["only_arm"]) == ("lora-seed0", "40", "12")
    main(["compare", str(judged), "--output", str(tmp_path / "c.json")])
    assert json.loads((tmp_path / "c.json").read_text())[0]["p_holm"] < 0.05


def test_what_a_judge_did_not_decide_is_left_out_and_counted(completions_folder):
    folder = completions_folder([(f"prompt {i}", "answer") for i in range(10)], arms=(None, "lora-seed0"))
    write_verdicts(folder, unsafe=lambda arm, i: None if arm and i < 3 else i % 2 == 0)
    comparison = compare([str(folder)])
    assert comparison.rows[["n", "left_out"]].values.tolist() == [[7, 3]] * 2
    assert "7 (-3)" in comparison.text()


def test_an_adapter_that_is_called_base_is_not_taken_for_the_base(completions_folder):
    folder = completions_folder([("prompt", "answer")], arms=(None, "base"))
    write_verdicts(folder, unsafe=lambda arm, i: arm is None)
    with pytest.raises(ValueError, match="has an adapter called base, as the base itself is"):
        compare([str(folder), f"again={folder}"])


def test_different_prompts_and_settings_are_refused_with_the_list(judged, completions_folder):
    other = completions_folder([(f"prompt {i}!", "other") for i in range(39)], "other", arms=(None,))
    write_verdicts(other, unsafe=lambda arm, i: False, settings={"words": "2"})
    with pytest.raises(ValueError, match="cannot be compared") as error:
        compare([f"{judged}:base", f"theirs={other}"])
    said = str(error.value)
    assert "- xstest: 1 of 40 prompts are in base alone (39)" in said
    assert "- xstest: 39 prompts have another prompt (0, 1, 2, 3, 4 and 34 more)" in said
    assert "judge's words: '1' there, '2' now" in said
    shutil.copytree(judged, judged.parent / "copy")
    lines = (judged / "completions.jsonl").read_text().replace('"generation": {}', '"generation": {"max_gen_toks": 5}')
    (judged.parent / "copy" / "completions.jsonl").write_text(lines)
    with pytest.raises(ValueError, match="max_gen_toks: None there, 5 now"):
        compare([f"{judged}:base", f"theirs={judged.parent / 'copy'}:base"])
    assert len(compare([f"{judged}:base", f"theirs={judged.parent / 'copy'}:base"], allow=["max_gen_toks"]).rows) == 2


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["nowhere"], "'nowhere' names no run: there is no such folder or file"),
        (["{judged}:nobody"], "has no results of 'nobody'; it has those of base, lora-seed0, monolora-seed0"),
        (["{judged}:base"], "There is nothing to compare base with"),
        (["{judged}", "{judged}"], "Two arms are called base, lora-seed0, monolora-seed0"),
        (["{unjudged}"], "has answers and no values of them"),
        (["{empty}", "{judged}"], "neither completions.jsonl nor samples.jsonl"),
    ],
)
def test_runs_that_cannot_be_had_are_refused(judged, tmp_path, runs, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unjudged").mkdir()
    shutil.copy(judged / "completions.jsonl", tmp_path / "unjudged")
    folders = {name: tmp_path / name for name in ("empty", "unjudged")}
    with pytest.raises(ValueError, match=message):
        compare([run.format(judged=judged, **folders) for run in runs])


@pytest.fixture
def lm_eval_run(talking_model, eval_data, tmp_path):
    """A function that lets lm-eval log the samples of the small model, or of a changed one, as its command does."""

    def run(name, model=talking_model, limit=None, dtype="float32"):
        tracker = EvaluationTracker(output_path=str(tmp_path / name))
        manager = TaskManager(include_path=[str(folder) for folder in TASK_FOLDERS], include_defaults=False)
        lm = HFLM(pretrained=str(model), device="cpu", dtype=dtype, batch_size=4)
        results = simple_evaluate(
            lm, tasks=["sst2_instruct", "dolly"], task_manager=manager, log_samples=True, bootstrap_iters=0,
            gen_kwargs="max_gen_toks=8", limit=limit, apply_chat_template=True, evaluation_tracker=tracker,
        )  # fmt: skip
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        return tmp_path / name

    return run


def test_two_runs_of_lm_eval_and_one_of_ours(lm_eval_run, settings):
    theirs = lm_eval_run("theirs")
    (arm,) = read_arms(f"theirs={theirs}")
    metrics = {str(key) for key in arm.values}
    assert metrics == {"sst2_instruct acc", "dolly rouge1", "dolly rouge2", "dolly rougeL"}  # BLEU is of the corpus
    settings.tasks, settings.max_new_tokens = ["sst2_instruct", "dolly"], 8
    folder = generate(settings).folder
    comparison = compare([f"theirs={theirs}", f"ours={folder}:base"])
    rows = comparison.rows.set_index("metric")
    assert (rows["difference"] == 0).all()  # the same model, by both programs
    assert set(rows["n"]) == {12, len(arm.values[next(k for k in arm.values if k.task == "dolly")])}
    compared = compare([f"{folder}:base", f"{folder}:lora-seed0"]).rows.set_index("metric")
    assert compared.loc["acc"]["test"] == "McNemar"
    short = lm_eval_run("short", limit=5)
    with pytest.raises(ValueError, match="7 of 12 prompts are in theirs alone"):
        compare([f"theirs={theirs}", f"short={short}"])
    half = lm_eval_run("half", dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype: 'float32' there, 'bfloat16' now"):
        compare([f"theirs={theirs}", f"half={half}"])
    assert len(compare([f"theirs={theirs}", f"half={half}"], allow=["dtype"]).rows) == 4
    shutil.copytree(short, theirs / "again")
    with pytest.raises(ValueError, match="several files of the task 'dolly'"):
        compare([f"theirs={theirs}", f"short={short}"])


def test_samples_are_written_once_and_forgotten_with_an_arm_that_diverged(settings):
    settings.tasks = ["sst2_instruct"]
    run = generate(settings)
    before = read_samples(run.folder / "samples.jsonl").rows
    assert len(before) == 12 * 3
    rows = [row for row in run.rows if row["metric"] != "seconds" or row["config"]["adapter"]]
    run.replace(rows)  # as a kill before the base's last row leaves it
    del run
    generate(settings)
    assert read_samples(f"{settings.output_dir}/samples.jsonl").rows == before


def test_the_command_starts_without_torch_models(judged):
    command = [sys.executable, "-X", "importtime", "-m", "evals", "compare", str(judged)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert not {"peft", "lm_eval", "transformers.modeling_utils"} & imported
