"""All rows to one page: what stands on it, what is refused, and how it looks in a browser."""

import importlib
import itertools
import json
import re
import shutil

import pytest
import tables
from experiments import CannotShow, Experiment
from tables import main

from vision_bench.probe import TRAINING
from vision_bench.runs import Run

ARMS = ("poly", "sae", "ncl", "poly_decay", "poly_unit", "random_relu", "random_mask")
MEASURED = ("semantic_consistency", "chance_consistency", "sparsity", "live_dimensions")
BY = {experiment.recipe: experiment for experiment in tables.experiments()}
SEEDS = [0, 1]
QUALITY = [(quality, 0.1, {}) for quality in ("sae_fvu", "sae_l0", "sae_dead_share")]


def write(folder, recipe, config, rows, **facts):
    """A run of (metric, value, arm) for every seed; the second seed has 0.02 more."""
    run = Run(folder, recipe, {"seeds": SEEDS} | config, facts=facts)
    of = {"n": 360, "seconds": 1.0, "device": "cpu (1 threads)"}
    noise = [{"noise_seed": seed} for seed in SEEDS]
    run.replace(
        [
            run.row(m, v + 0.02 * s, seed=s, **of, **arm, **(noise[s] if arm.get("scale") else {}))
            for m, v, arm in rows
            for s in SEEDS
        ]
    )
    return folder


def decay(name):
    return {"features": name, "probe_weight_decay": 0.1 if name == "poly_decay" else 0.0}


def probed(metric="offline_probe_top1", **axes):
    """Rows of probes and of what the features are; NCL is 0.1 above poly, and each cell 0.01 below the one before."""
    start = {name: 0.6 + 0.1 * (name == "ncl") for name in ARMS}
    cells = list(itertools.product(*axes.values()))
    rows = [
        (
            metric,
            start[name] - 0.01 * i,
            decay(name) | dict(zip(axes, cell, strict=True)),
        )
        for name in ARMS
        for i, cell in enumerate(cells)
    ]
    trained = {name: values for name, values in axes.items() if name in ("noise_rate", "loss")}
    for name, cell, one in itertools.product(ARMS, itertools.product(*trained.values()), TRAINING):
        rows.append((one, 0.3, decay(name) | dict(zip(trained, cell, strict=True))))
    rows.append(("chance_top1", 0.1, {}))
    rows += [("chance_top1", 0.1, {"shift": shift}) for shift in axes.get("shift", ())]
    rows += [(measured, 0.2, {"features": name}) for measured in MEASURED for name in ARMS]
    return [*rows, *QUALITY]


def label_noise(folder, rates=(0.0, 0.5, 0.8), **config):
    known = {"data": "digits", "backbone": "small_conv", "noise_rates": list(rates), "decays": [0.1]} | config
    return write(folder, "label_noise_probing", known, probed(noise_rate=rates), num_classes=10)


def shifted(folder, **facts):
    """Of two shifts, and of two corruptions at all severities."""
    rows = probed(shift=["none", "rotated", "sketch"])
    for name, corruption, severity in itertools.product(ARMS, ("fog", "snow"), range(1, 6)):
        arm = decay(name) | {"shift": "c", "extra": False}
        rows.append(("offline_probe_top1", 0.5, arm | {"corruption": corruption, "severity": severity}))
    rows.append(("chance_top1", 0.1, {"shift": "c"}))
    shifts = {"rotated": "1", "sketch": "2", "c": "3"}
    known = {"data": "digits", "decays": [0.1], "class_map": None, "shifts": shifts}
    return write(folder, "ood_probing", known, rows, **facts)


def salient(folder, **config):
    rows = [("offline_probe_top1", 0.5, {"features": name}) for name in ARMS[:3]]
    rows += [(metric, 0.3, {"features": name}) for metric in (*MEASURED, *TRAINING) for name in ARMS[:3]]
    rows.append(("chance_top1", 0.1, {}))
    of_group = {"low": 0.1, "high": 0.4, "histogram": [0.0, 0.5, 0.5]}
    for name in ARMS[:3]:
        rows.append(("salient_difference", 0.1, {"features": name, "low": 0.05, "high": 0.2}))
        rows.append(("salient_difference_within_class", 0.05, {"features": name}))
        for group in ("right", "wrong"):
            rows.append(("salient_consistency", 0.3, {"features": name, "group": group} | of_group))
            rows.append(("salient_chance", 0.1, {"features": name, "group": group}))
    return write(folder, "salient_features", {"noise_rate": 0.8, "data": "digits"} | config, [*rows, *QUALITY])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    label_noise(folder / "label_noise")
    salient(folder / "deep" / "salient")
    write(folder / "pretraining", "pretrain", {}, [("sparsity", 0.5, {})])
    return folder


@pytest.fixture(scope="module")
def made(runs):
    output = runs.parent / "tables"
    main(["--runs", str(runs), "--output_dir", str(output)])
    return output


def test_ours_stands_beside_the_papers(made):
    page = (made / "index.html").read_text()
    text = (made / "results.md").read_text()
    # mean of 0.7 and 0.72, half-width 12.7 * 0.01
    assert "| ncl | 71.0 ± 12.7 |" in text
    assert '<td>ncl</td>\n<td style="text-align:right">71.0 ± 12.7</td>' in page
    assert "<td>ncl, the paper, CIFAR-100</td>" in page
    assert "+9.2 for NCL" in page
    assert "Linear probes on frozen features under label noise: digits, small_conv" in page
    assert "2 seeds, cpu (1 threads), torch" in page
    assert "left out: pretrain" in page
    for name in (
        "label_noise_probing/gains_beside_paper",
        "label_noise_probing/figure_1b",
        "salient_features/figure_4c",
    ):
        assert (made / f"{name}.png").stat().st_size > 5000
        assert (made / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert f"]({name}.png)" in text
    assert (made / "label_noise_probing" / "results.md").read_text().startswith("# Linear probes")


def test_what_has_no_rows_is_on_the_page_with_its_command(made):
    page = (made / "index.html").read_text()
    for recipe, experiment in BY.items():
        assert f'<section id="{recipe}">' in page
        assert f'href="#{recipe}"' in page
        assert (experiment.command in page) == (recipe not in ("label_noise_probing", "salient_features"))


def test_the_page_needs_nothing_else(made):
    page = (made / "index.html").read_text()
    sources = re.findall(r"(?:src|<link[^>]*href)=\"([^\"]{0,30})", page)
    assert len(sources) == 5
    assert all(source.startswith("data:") for source in sources)
    assert "<script" not in page
    assert all(re.findall(r'<img alt="([^"]+)"', page))


def test_names_in_rows_are_text_on_the_page(tmp_path):
    salient(tmp_path / "runs", data="<img src=x onerror=alert(1)>", image_size="`<b>`|*")
    main(["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out"), "--only", "figure_4c"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_only_what_is_asked_for(runs, tmp_path):
    main(["--runs", str(runs), "--output_dir", str(tmp_path), "--only", "figure_4c"])
    page = (tmp_path / "index.html").read_text()
    assert re.findall(r'<section id="(\w+)">', page) == ["salient_features"]
    assert not (tmp_path / "label_noise_probing").exists()
    # Fig. 1(b) has parts by two recipes, of which one was run
    main(["--runs", str(runs), "--output_dir", str(tmp_path), "--only", "figure_1b"])
    assert 'id="input_noise_probing"' in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("figure_6", r"figure_6 needs rows of robust_loss, .*`python recipes/robust_loss.py"),
        ("figure_5", r"figure_5 needs rows of superposition, .*`python recipes/superposition.py"),
        (
            "table_2",
            r"rows of sst2_monolora or dolly_monolora, .*sst2_monolora.py .* or `python recipes/dolly_monolora.py",
        ),
        ("figure_7", r"only has 'figure_7'; it takes figure_1a, figure_4ab, table_1"),
    ],
)
def test_a_figure_without_rows_is_an_error_if_asked_for(item, message, runs, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(["--runs", str(runs), "--output_dir", str(tmp_path / "out"), "--only", item])
    assert not (tmp_path / "out").exists()


def test_two_configurations_share_no_table(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    label_noise(tmp_path / "runs" / "more", sae_k=16, batch_size=64)
    arguments = ["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"2 configurations of label_noise_probing .*sae_k: None / 16.*--split"):
        main(arguments)
    assert not (tmp_path / "out").exists()
    main([*arguments, "--only", "figure_4c"])  # they are not on this page
    main([*arguments, "--split"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert '<section id="label_noise_probing-1">' in page
    assert '<section id="label_noise_probing-2">' in page
    assert "(2: more)</h2>" in page
    assert (tmp_path / "out" / "label_noise_probing-2" / "figure_1b.png").exists()


def test_rows_of_two_configurations_in_one_file(tmp_path):
    one, other = label_noise(tmp_path / "runs" / "a", sae_k=8), label_noise(tmp_path / "b", sae_k=16)
    with (one / "results.jsonl").open("a") as file:
        file.write((other / "results.jsonl").read_text())
    arguments = ["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"2 configurations .*/runs/a \(sae_k: 8 / 16\)"):
        main(arguments)
    main([*arguments, "--split"])
    assert (tmp_path / "out" / "label_noise_probing-2" / "results.md").exists()


def test_the_same_run_twice_is_not_counted_twice(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs" / "first")
    shutil.copytree(runs, tmp_path / "runs" / "copy")
    with pytest.raises(ValueError, match=r"copy/label_noise, .*first/label_noise \(the same settings\)"):
        main(["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")])


def test_a_stopped_run_is_not_shown_as_whole(runs, tmp_path):
    folder = label_noise(tmp_path / "runs" / "label_noise")
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    kept = [r for r in rows if not (r["config"].get("features") == "ncl" and r["seed"] == 1)]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    lacks = "lacks rows of the metric probe_training_top1 (features ncl, noise_rate 0.0, probe_weight_decay 0.0, "
    lacks += "seed 1 and 12 more)"
    main(["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")])
    assert re.search(f"Not whole: .*{re.escape(lacks)}", (tmp_path / "out" / "results.md").read_text())
    assert not (tmp_path / "out" / "label_noise_probing").exists()
    with pytest.raises(ValueError, match=re.escape(lacks)):
        main(["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out"), "--only", "table_1"])


@pytest.mark.parametrize(
    ("left_out", "lacks"),
    [
        ({"corruption": "snow", "severity": 5, "seed": 1}, "corruption snow, severity 5, .*, seed 1 and 6 more"),
        ({"corruption": "snow"}, "corruption snow, severity 1, .*, seed 0 and 69 more"),
    ],
)
def test_corruptions_that_were_not_reached_are_missed(left_out, lacks, tmp_path):
    folder = shifted(tmp_path / "runs", corruptions={"c": ["fog", "snow"]})
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    kept = [r for r in rows if any((r["config"] | {"seed": r["seed"]}).get(k) != v for k, v in left_out.items())]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    arguments = ["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out"), "--only", "figure_2c"]
    with pytest.raises(ValueError, match=rf"offline_probe_top1 \(features poly, shift c, {lacks}\)"):
        main(arguments)


def test_pictures_of_the_severities_of_an_older_run_go(tmp_path):
    shifted(tmp_path / "runs", corruptions={"c": ["fog", "snow"]})
    stale = [tmp_path / "out" / "ood_probing" / f"severities_old.{suffix}" for suffix in ("png", "pdf")]
    stale[0].parent.mkdir(parents=True)
    for path in stale:
        path.write_bytes(b"")
    main(["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out"), "--only", "figure_2c"])
    assert sorted(path.stem for path in stale[0].parent.glob("*.pdf")) == ["figure_2c", "severities_c"]
    assert not stale[0].exists()


def test_corruptions_that_the_configuration_does_not_name_are_not_averaged(tmp_path):
    shifted(tmp_path / "runs")
    arguments = ["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out"), "--only", "figure_2c"]
    with pytest.raises(ValueError, match="do not say which corruptions of c there were"):
        main(arguments)


def test_folders_that_cannot_be_read(runs, tmp_path):
    out = ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="which is no folder"):
        main(["--runs", str(tmp_path / "none"), *out])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there is no results.jsonl below .*empty; run a recipe"):
        main(["--runs", str(tmp_path / "empty"), *out])
    shutil.copytree(runs / "label_noise", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"bare/results.jsonl has no config.json beside it"):
        main(["--runs", str(tmp_path / "bare"), *out])
    with pytest.raises(ValueError, match=r"output_dir is /proc/self/x, which cannot be written to"):
        main(["--runs", str(runs), "--output_dir", "/proc/self/x"])
    with pytest.raises(ValueError, match=r"output_dir is .*runs0, which holds the run"):
        main(["--runs", str(runs), "--output_dir", str(runs)])
    broken = salient(tmp_path / "broken")
    (broken / "results.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"broken/results.jsonl, line 1: not JSON"):
        main(["--runs", str(broken), *out])
    label_noise(tmp_path / "other_version", no_such_setting=1)
    with pytest.raises(
        ValueError, match=r"have the settings no_such_setting, which recipes/label_noise_probing.py lacks"
    ):
        main(["--runs", str(tmp_path / "other_version"), *out, "--only", "table_1"])
    known = {"data": "my_images", "noise_rates": [0.0], "decays": [0.1]}
    write(tmp_path / "older", "label_noise_probing", known, probed(noise_rate=[0.0]))
    with pytest.raises(ValueError, match="rows of label_noise_probing do not say the num_classes"):
        main(["--runs", str(tmp_path / "older"), *out, "--only", "table_1"])
    main(["--runs", str(tmp_path / "older"), *out])
    assert (
        "Not shown: rows of label_noise_probing do not say the num_classes"
        in (tmp_path / "out" / "index.html").read_text()
    )
    label_noise(tmp_path / "own_data", data="my_images")  # whose classes stand in its configuration
    main(["--runs", str(tmp_path / "own_data"), *out, "--only", "table_1"])


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


def test_judges_by_an_earlier_name_are_not_left_out_without_a_word(tmp_path):
    arm = {"task": "refusal_embedded", "judge": "embedded", "step": None, "method": "base"}
    rows = [("accuracy", 0.9, {"method": "base", "task": None, "judge": None, "step": None}), ("unsafe", 0.1, arm)]
    config = {"methods": ["base"], "judges": ["embedded"], "demonstration": True}
    write(tmp_path / "runs", "sst2_monolora", config, rows)
    main(["--runs", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out")])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Not shown: rows of sst2_monolora are of the judge embedded" in page


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


@pytest.mark.parametrize(
    ("settings", "facts", "message"),
    [
        ({"rate": 0.1}, {}, "rows of lamps do not say the num_classes: they are of an older version"),
        ({"rate": 0.1, "speed": 3}, {"num_classes": 2}, "have the settings speed, which recipes/lamps.py lacks"),
    ],
)
def test_configurations_of_other_versions(settings, facts, message):
    lamps = Experiment(
        "lamps", (), "", "", {}, cells=list, report=str, draw=None,
        facts=("num_classes",), defaults={"rate": 0.5, "batch_size": 8},
    )  # fmt: skip
    with pytest.raises(CannotShow, match=message):
        lamps.configuration(settings, facts)
    known = {"rate": 0.1, "batch_size": 8, "num_classes": 2}
    assert lamps.configuration({"rate": 0.1}, {"num_classes": 2}) == known


def test_every_recipe_with_a_table_or_figure_is_known():
    folder = tables.Path(tables.__file__).parent
    recipes = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} - {"tables", "pretrain"}
    shared = {name for name in recipes if not hasattr(importlib.import_module(name), "main")}
    assert set(BY) == recipes - shared
    assert len(BY) == len(tables.RECIPES)


@pytest.mark.parametrize("width", [360, 1400])
def test_in_a_browser(made, width, tmp_path):
    """No error, no request but the file itself, every picture loaded, no part wider than the screen."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=quiet)
        page = browser.new_page(viewport={"width": width, "height": 800})
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        url = (made / "index.html").as_uri()
        page.goto(url)
        images = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        inside, outside = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        smallest = page.evaluate(
            "Math.min(...[...document.querySelectorAll('p, td, th, li, figcaption, code')]"
            ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
        )
        where = "document.getElementById('salient_features').getBoundingClientRect().top"
        before = page.evaluate(where)
        page.get_by_role("link", name=re.compile("Figure 4\\(c\\)")).click()
        after = page.evaluate(where)
        browser.close()
    assert said == []
    assert [one for one in asked if not one.startswith("data:")] == [url]
    assert len(images) == 4
    assert all(
        complete and natural > 500 and min(width - 60, 400) < shown <= width for complete, natural, shown in images
    )
    assert inside <= outside == width
    assert smallest >= 12
    assert abs(after) < 5 < 500 < before
