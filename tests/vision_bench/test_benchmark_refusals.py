"""What `python -m vision_bench` refuses before any work."""

import json
import shutil

import pytest

from tests.vision_bench.conftest import CORRUPTIONS, QUICK, SMALL, no_pass, photographs
from vision_bench import models
from vision_bench.__main__ import main


def test_too_many_active_latents_are_refused_also_where_features_are_cached(
    benchmark_run, ncl_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "outputs", no_pass)
    command = [str(ncl_checkpoint), "--output_dir", str(tmp_path / "run"), *QUICK, *CORRUPTIONS, "--sae_k", "17"]
    with pytest.raises(SystemExit, match=r"Error: sae_k is 17; .* has 16 features"):
        main([*command, "--cache_dir", str(benchmark_run / "cache")])
    assert not (tmp_path / "run").exists()


def test_a_folder_of_probes_that_the_scale_decided_on_is_refused(benchmark_run, ncl_checkpoint, tmp_path):
    old = tmp_path / "run"
    shutil.copytree(benchmark_run, old)
    described = json.loads((old / "config.json").read_text())
    del described["config"]["probe_norm"]
    (old / "config.json").write_text(json.dumps(described))
    with pytest.raises(SystemExit, match=r"of another configuration \(probe_norm"):
        main([str(ncl_checkpoint), *SMALL, "--output_dir", str(old), *QUICK, *CORRUPTIONS, "--resume"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "models is empty; name at least one"),
        (["resnet19"], "has no model 'resnet19'; near it: resnet18"),
        (["resnet18"], "the weights of resnet18 cannot be had .* Offline: fetch them"),
        (["--resume", "resnet19"], "has no model 'resnet19'"),  # a switch takes no value
        (["small_conv"], "no pretrained weights of 'small_conv'.*--random_init small_conv"),
        ([*SMALL, "--corruptions", "gausian=1"], "unknown; there are .* Do you mean gaussian?"),
        ([*SMALL, "--corruptions", "folder=/nowhere"], "'/nowhere', which is neither digits"),
        (
            [*SMALL, "--corruptions", "few_shots=0.001"],
            "few_shots is 0.001 of 1437 images: .* would be left with none",
        ),
        ([*SMALL, "--features", "sift"], "'sift' is no kind of features; there are raw, unit, relu, sae, "),
        ([*SMALL, "--features", "raw", "ncl_random_basis"], "features has ncl_random_basis, which recipes have"),
        ([*SMALL, "--features", "pca_random_basis", "--sae_k", "129"], "sae_k is 129; small_conv has 128 features"),
        ([*SMALL, "--features", "csr", "--sae_k", "129"], "sae_k is 129; small_conv has 128 features"),
        ([*SMALL, "--layer", "output"], "layer is 'output'; small_conv has backbone"),
        ([*SMALL, "resnet19", "--dataset", "mnist1"], "has no model 'resnet19'"),  # models before images are read
        ([*SMALL, "--layer", "output", "--dataset", "mnist1"], "layer is 'output'; small_conv has backbone"),
        (
            [*SMALL, "--cache_dir", __file__],
            "cache_dir is .*test_benchmark_refusals.py, which is a file; name a folder",
        ),
        ([*SMALL, "--layer", "head"], "layer is 'head'; it must be one of backbone"),
        ([*SMALL, "--sae_k", "129"], "sae_k is 129; small_conv has 128 features"),
        ([*SMALL, "--limit", "3"], "limit is 3 of 1437 images: .* would be left with none"),
        ([*SMALL, "--seeds", "0", "0"], r"seeds is \[0, 0\]; each may stand there once"),
        ([*SMALL, "--seeds", "-1"], r"seeds is \[-1\]; it takes integers of at least 0"),
        ([*SMALL, "--probe_epochs", "0"], "probe_epochs is 0; it must be at least 1"),
        ([*SMALL, "--dataset", "mnist1"], "name is 'mnist1', which is neither digits"),
        (
            ["--random_init", "vit_tiny_patch16_224", "--image_size", "32"],
            "vit_tiny_patch16_224 gives no features of train images of 32 x 32 pixels.*224",
        ),
        (["--random_init", "odd_width_by_batch"], "odd_width_by_batch gives no features .* here"),
        (
            ["--random_init", "odd_width_by_image", "--corruptions", "inverted"],
            "different sizes: {'train': 30, 'clean'",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=f"Error: .*{message}"):
        main([*arguments, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_one_model_under_two_names_is_refused(ncl_checkpoint, tmp_path):
    names = [str(ncl_checkpoint), str(ncl_checkpoint / "model.safetensors")]
    with pytest.raises(SystemExit, match="one and the same model"):
        main([*names, "--output_dir", str(tmp_path / "run"), *QUICK])


def test_images_of_a_single_class_are_refused_before_any_work(tmp_path):
    photographs(tmp_path / "data" / "train", ["cat"])
    command = [*SMALL, "--dataset", str(tmp_path / "data")]
    with pytest.raises(SystemExit, match=r"data has images of one class, cat; a probe needs at least two"):
        main([*command, "--test_fraction", "0.5", "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_refused(tmp_path, benchmark_run):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "config.json").write_text(json.dumps({"recipe": "pretrain", "config": {}}))
    command = ["--random_init", "small_conv", *QUICK]
    with pytest.raises(SystemExit, match="holds results of the recipe 'pretrain'"):
        main([*command, "--output_dir", str(tmp_path / "recipe"), "--resume"])
    (tmp_path / "rows").mkdir()
    shutil.copy(benchmark_run / "results.jsonl", tmp_path / "rows")
    with pytest.raises(SystemExit, match=r"has a results.jsonl without the config.json it was made with"):
        main([*command, "--output_dir", str(tmp_path / "rows")])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="is a file; name a folder"):
        main([*command, "--output_dir", str(tmp_path / "file")])
