"""The examples of docs/vision_bench.md run."""

import re
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import to_pil_image

from vision_bench import models, timm_models
from vision_bench.data import load_images

DOCS = Path(__file__).parents[2] / "docs" / "vision_bench.md"


def example(title):
    section = DOCS.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)


def test_ten_lines_measure_features_of_ones_own_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        digits = load_images("digits", split)
        for index in range(48):
            name = ("even", "odd")[int(digits.labels[index]) % 2]
            path = tmp_path / "my_photos" / split / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(digits.images[index]).save(path)
    torch.manual_seed(0)
    model = models.ContrastiveModel(models.ModelConfig("test_resnet", projector_hidden=8, projector_out=4))
    timm_models.save("my_backbone", model, digits, {})
    program = example("Your own images")
    lines = [line for line in program.splitlines() if line.strip() and "import" not in line]
    assert len(lines) <= 10
    exec(compile(program, str(DOCS), "exec"), names := {})
    assert names["x"].shape == (48, 96)
    accuracy, consistency, chance, sparsity = map(float, capsys.readouterr().out.split())
    assert 0 <= accuracy <= 1
    assert 0.5 <= consistency <= 1
    assert 0.5 <= chance <= 1
    assert 0 <= sparsity < 1


def test_a_checkpoint_becomes_a_model_of_timm(tmp_path, monkeypatch):
    import timm

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = models.ContrastiveModel(models.ModelConfig("small_conv", projector_hidden=8, projector_out=4)).eval()
    models.save("runs/digits_ncl/model.safetensors", model, {})
    names = {"timm": timm, "train": load_images("digits", "train")}
    exec(compile(example("Checkpoints for timm"), str(DOCS), "exec"), names)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(names["backbone"].eval()(x), model(x).backbone)
