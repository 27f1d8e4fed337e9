"""The part of the page that each experiment has: its tables, pictures and claims."""

import itertools
import json
import re

import pytest
import tables
from tables import main
from written_runs import ARMS, MEASURED, QUALITY, decay, probed, salient, shifted, write

from vision_bench.probe import TRAINING


def test_pictures_of_the_severities_of_an_older_run_go(tmp_path):
    shifted(tmp_path / "runs", corruptions={"c": ["fog", "snow"]})
    stale = [tmp_path / "out" / "ood_probing" / f"severities_old.{suffix}" for suffix in ("png", "pdf")]
    stale[0].parent.mkdir(parents=True)
    for path in stale:
        path.write_bytes(b"")
    main(["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out"), "--only", "figure_2c"])
    assert sorted(path.stem for path in stale[0].parent.glob("*.pdf")) == ["figure_2c", "severities_c"]
    assert not stale[0].exists()


def test_the_other_probing_recipes(tmp_path):
    runs = tmp_path / "runs"
    rows = probed(noise=["gaussian"], scale=[0.5, 1.0])
    rows += [("offline_probe_top1", 0.9, decay(name) | {"noise": "none", "scale": 0.0}) for name in ARMS]
    config = {"data": "digits", "decays": [0.1]}
    write(runs / "2ab", "input_noise_probing", config | {"noises": ["gaussian"], "scales": [0.0, 0.5, 1.0]}, rows)
    shifted(runs / "2c", corruptions={"c": ["fog", "snow"]})
    rows = probed(loss=["ce", "sce", "ce_scaled"], noise_rate=[0.0, 0.8])
    write(runs / "6", "robust_loss", config | {"noise_rates": [0.0, 0.8]}, rows, num_classes=10)
    main(["--runs", str(runs), "--output_dir", str(tmp_path / "out"), "--only", "figure_2ab", "figure_2c", "figure_6"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<img ") == 6
    assert "<figcaption>Accuracy by severity of the corruptions of c: ours</figcaption>" in page
    assert "c: error in %" in page
    assert "Synthetic shifts, made from the test images: rotated." in page
    assert "Points that the loss adds" in page


def test_finetuning(tmp_path):
    config = {"data": "digits", "methods": ["ce", "nce"], "finetuning_epochs": 2}
    for name, recipe, conditions, own in (
        ("3ab", "few_shot_finetuning", [(0.1, 0.0), (1.0, 0.0)], {"fractions": [0.1, 1.0]}),
        ("3c", "noisy_finetuning", [(0.5, 0.0), (0.5, 0.8)], {"noise_rates": [0.0, 0.8], "fraction": 0.5}),
    ):
        rows = []
        for method, (fraction, rate) in itertools.product(config["methods"], conditions):
            arm = {"method": method, "fraction": fraction, "noise_rate": rate}
            value = 0.7 if method == "nce" else 0.6
            for metric in ("train_top1", "validation_top1"):
                rows.append((f"finetuned_{metric}", value, arm | {"epoch": 2}))
                rows += [(metric, value, arm | {"epoch": epoch}) for epoch in (1, 2)]
            rows += [(metric, 0.2, arm) for metric in MEASURED]
        write(tmp_path / "runs" / name, recipe, config | own, rows)
    main(
        ["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out"), "--only", "figure_3ab", "figure_3c"]
    )
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<img ") == 4
    assert ">+10.0 ± 0.0</td>" in page
    assert ">+3.9 at most</td>" in page


@pytest.mark.slow
def test_rows_that_the_recipes_of_the_theory_made(tmp_path):
    import separability
    import superposition

    small = ["--sizes", "12x3", "--samples", "400", "--sample_sizes", "200", "400", "--sparsities", "0.5", "0.8"]
    small += ["--sparsity", "0.8", "--noise_rate", "0.6", "--input_noises", "0.2", "--steps", "150", "--epochs", "2"]
    small += ["--seeds", "0", "1", "2", "--neighbour_seeds", "2"]
    runs = tmp_path / "runs"
    superposition.main(["--output_dir", str(runs / "toy"), *small])
    separability.main(["--output_dir", str(runs / "theorems"), "--draws", "100000", "--sparsities", "0.55"])
    only = ["--only", "figure_5", "theorems"]
    main(["--runs", str(runs), "--output_dir", str(tmp_path / "out"), *only])
    for recipe, folder in (("superposition", "toy"), ("separability", "theorems")):
        assert (tmp_path / "out" / recipe / "results.md").read_text() == (runs / folder / "results.md").read_text()
    assert (tmp_path / "out" / "index.html").read_text().count("<img ") == 4
    lines = (runs / "toy" / "results.jsonl").read_text().splitlines(keepends=True)
    (runs / "toy" / "results.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"toy lacks rows of the metric accuracy \(size 12x3, .*: the same command"):
        main(["--runs", str(runs), "--output_dir", str(tmp_path / "out"), *only])


def test_image_grids_are_taken_from_the_run(tmp_path):
    arm = [{"features": name} for name in ARMS[:3]]
    metrics = (
        "offline_probe_top1",
        "top_purity",
        "chance_top_purity",
        "shown_dimensions",
        "accuracy_purity_correlation",
    )
    rows = [(metric, 0.5, one) for metric in (*metrics, *MEASURED, *TRAINING) for one in arm]
    rows.append(("chance_top1", 0.1, {}))
    shown = {"class_name": "cat", "class_accuracy": 0.5, "consistency": 0.1, "dimension": 3}
    rows += [
        ("class_dimension_purity", 0.5, one | shown | {"rank": rank}) for one in arm for rank in ("worst", "best")
    ]
    run = write(tmp_path / "runs", "top_activated_samples", {"noise_rate": 0.9}, [*rows, *QUALITY])
    arguments = ["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out"), "--only", "figure_4ab"]
    main(arguments)
    assert "<img" not in (tmp_path / "out" / "index.html").read_text()  # rows alone have no images
    from PIL import Image

    for suffix in ("png", "pdf"):
        Image.new("RGB", (40, 40)).save(run / f"figure_4ab.{suffix}")
    main(arguments)
    assert (tmp_path / "out" / "index.html").read_text().count("<img ") == 1
    copied = tmp_path / "out" / "top_activated_samples" / "figure_4ab.pdf"
    assert copied.read_bytes() == (run / "figure_4ab.pdf").read_bytes()
    for suffix in ("png", "pdf"):
        (run / f"figure_4ab.{suffix}").unlink()
    main(arguments)  # the pictures in the output folder are of an older run
    assert "<img" not in (tmp_path / "out" / "index.html").read_text()
    assert not copied.exists()


def test_table_2(tmp_path):
    arm = {"task": None, "judge": None, "step": None}
    rows = [("accuracy", 0.9, {"method": "base"} | arm), ("accuracy", 0.91, {"method": "lora"} | arm)]
    rows += [("accuracy", 0.95, {"method": "monolora"} | arm), ("task_sparsity", 0.4, {"method": "monolora"} | arm)]
    config = {"methods": ["base", "lora", "monolora"], "judges": [], "demonstration": True}
    write(tmp_path / "runs", "sst2_monolora", config, rows)
    main(["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out"), "--only", "table_2_sst2"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "MonoLoRA - LoRA, paired by seed: +4.00 ± 0.00 points of accuracy" in page
    assert ">94.84</td>" in page


def test_the_page_says_which_seeds_diverged(tmp_path):
    folder = salient(tmp_path / "runs")
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["seed"] != 1 or row["metric"] == "chance_top1"]
    mark = rows[0] | {"metric": "diverged", "value": 1.0, "seed": 1, "config": {"reason": "weights are not <b>finite"}}
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*kept, mark]))
    main(["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out"), "--only", "figure_4c"])
    text = (tmp_path / "out" / "results.md").read_text()
    assert "**Diverged:** seeds 1 (weights are not <b>finite). They have no part in the tables" in text
    assert "not &lt;b&gt;finite" in (tmp_path / "out" / "index.html").read_text()


NEW_RECIPE = """
from experiments import Experiment
from matplotlib.figure import Figure
from vision_bench import figures
from vision_bench.runs import Cell, markdown_table

def cells(config):
    return [Cell("brightness", seed, {"lamp": lamp}) for lamp in config["lamps"] for seed in config["seeds"]]

def report(run):
    rows = [[row["config"]["lamp"], str(row["seed"]), f"{row['value']:g}"] for row in run.find("brightness")]
    return "# Brightness\\n\\n" + markdown_table(["lamp", "seed", "brightness"], rows)

def draw(run):
    figure = Figure()
    figure.subplots().plot([row["value"] for row in run.find("brightness")])
    figures.save(run.folder / "figure_7", figure)

EXPERIMENT = Experiment(
    recipe="new_recipe", items=("figure_7",), title="Figure 7: lamps", claim="The paper: *red* is brighter.",
    pictures={"figure_7": "Figure 7: ours"}, cells=cells, report=report, draw=draw,
)
"""


def test_a_new_experiment_is_a_file_and_a_row(tmp_path, monkeypatch):
    (tmp_path / "new_recipe.py").write_text(NEW_RECIPE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tables, "RECIPES", [*tables.RECIPES, "new_recipe"])
    rows = [("brightness", 0.25, {"lamp": "red"}), ("brightness", 0.5, {"lamp": "<b>blue</b>"})]
    runs = write(tmp_path / "runs", "new_recipe", {"lamps": ["red", "<b>blue</b>"]}, rows)
    main(["--runs", str(runs), "--output_dir", str(tmp_path / "out"), "--only", "figure_7"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert re.findall(r'<section id="(\w+)">', page) == ["new_recipe"]
    assert "<h2>Figure 7: lamps</h2>" in page
    assert "<em>red</em> is brighter" in page
    assert '<td>red</td>\n<td style="text-align:right">1</td>\n<td style="text-align:right">0.27</td>' in page
    assert "<td>&lt;b&gt;blue&lt;/b&gt;</td>" in page
    assert len(re.findall(r'<img alt="Figure 7: ours" src="data:image/png;base64,', page)) == 1
    assert (tmp_path / "out" / "new_recipe" / "figure_7.pdf").read_bytes().startswith(b"%PDF")
    whole = (runs / "results.jsonl").read_text().splitlines(keepends=True)
    (runs / "results.jsonl").write_text("".join(whole[:-1]))
    with pytest.raises(ValueError, match=r"lacks rows of the metric brightness \(lamp <b>blue</b>, seed 1\)"):
        main(["--runs", str(runs), "--output_dir", str(tmp_path / "out"), "--only", "figure_7"])
