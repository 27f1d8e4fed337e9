"""Answers and rows belong to the contents that made them, whatever the folders are called."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evals.contents import model_checksums
from evals.generate import generate
from evals.models import Adapter
from evals.records import read_completions
from vision_bench.runs import read_rows


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def nudge(path):
    """Change one number of a safetensors file."""
    tensors = load_file(path)
    name = min(tensors)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def train_again(model, adapter, data):
    nudge(adapter / "adapter_model.safetensors")


def scale(model, adapter, data):
    edit(adapter / "adapter_config.json", lora_alpha=16)


def own_template(model, adapter, data):
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def merge(model, adapter, data):
    nudge(model / "model.safetensors")


def configure(model, adapter, data):
    edit(model / "config.json", rms_norm_eps=0.1)


def end_elsewhere(model, adapter, data):
    edit(model / "generation_config.json", eos_token_id=[1, 7])


def write_otherwise(model, adapter, data):
    (model / "chat_template.jinja").write_text((model / "chat_template.jinja").read_text() + " ")


def tokenize_otherwise(model, adapter, data):
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true'))
    assert (model / "tokenizer.json").read_text() != text


def shard(model, adapter, data):
    """The same weights in several files, of which one is changed; only the first call shards."""
    base = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    base.save_pretrained(model, max_shard_size="30KB")


def label_otherwise(model, adapter, data):
    path = data / "sst2" / "dev.tsv"
    path.write_text(path.read_text().replace("no 3\t0", "no 3\t1"))


def answer_otherwise(model, adapter, data):
    path = data / "dolly15k" / "rows.jsonl"
    path.write_text(path.read_text().replace('"response": "', '"response": "not '))


def ask_otherwise(model, adapter, data):
    (data / "xstest" / "xstest_prompts.csv").write_text("id,prompt,label\n7,changed,safe\n9,kill,unsafe\n")


CHANGES = (
    (train_again, "adapter weights"),
    (scale, "adapter config"),
    (own_template, "adapter tokenizer and chat template"),
    (merge, "model weights"),
    (shard, "model weights"),
    (configure, "model config"),
    (end_elsewhere, "model generation config"),
    (write_otherwise, "model tokenizer and chat template"),
    (tokenize_otherwise, "model tokenizer and chat template"),
    (label_otherwise, "data or settings of the task 'sst2_instruct'"),
    (answer_otherwise, "data or settings of the task 'dolly'"),
    (ask_otherwise, "data or settings of the task 'xstest'"),
)


def test_other_contents_under_the_same_names_are_refused(settings, eval_data, tmp_path, request):
    """Whether the folder has results, or only the answers of a run that was killed before them."""
    generate(settings)
    request.getfixturevalue("no_loading")
    folders = [Path(settings.model), Path(settings.adapters[0].source), eval_data]
    output = Path(settings.output_dir)
    answers, results = (output / "completions.jsonl").read_bytes(), (output / "results.jsonl").read_bytes()
    for change, part in CHANGES:
        for folder in folders:
            shutil.copytree(folder, tmp_path / "kept" / folder.name)
        change(*folders)
        for is_killed in (False, True):
            if is_killed and part.endswith("'sst2_instruct'"):  # it has no answers
                continue
            (output / "results.jsonl").write_bytes(b"" if is_killed else results)
            with pytest.raises(
                ValueError, match=rf"made: ([^.]*, )?{part} changed since\. Choose another --output_dir"
            ):
                generate(settings)
            assert (output / "completions.jsonl").read_bytes() == answers
        for folder in folders:
            shutil.rmtree(folder)
            (tmp_path / "kept" / folder.name).rename(folder)
    (output / "results.jsonl").write_bytes(results)
    generate(settings)


def test_a_changed_shard_is_refused(settings):
    settings = replace(settings, tasks=["xstest"], adapters=[])
    shard(Path(settings.model), None, None)
    generate(settings)
    shards = sorted(Path(settings.model).glob("model-*.safetensors"))
    assert len(shards) > 1
    nudge(shards[-1])
    with pytest.raises(ValueError, match="model weights changed since"):
        generate(settings)


def test_a_changed_base_is_refused_for_an_adapter_too(settings):
    generate(replace(settings, tasks=["xstest"], adapters=settings.adapters[:1]))
    nudge(Path(settings.model) / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds answers or results of '.*talker' that .* model weights changed"):
        generate(replace(settings, tasks=["xstest"], adapters=settings.adapters[1:], base=False))


def test_the_same_contents_go_on(settings, tmp_path, request):
    """Whatever the spelling of the path, the time of writing, or where a link leads."""
    Path(settings.model).rename(tmp_path / "real")
    os.symlink(tmp_path / "real", settings.model)
    settings = replace(settings, tasks=["xstest", "sst2_instruct"])
    generate(settings)
    rows = read_rows(Path(settings.output_dir) / "results.jsonl")
    shutil.copytree(tmp_path / "real", tmp_path / "copy")
    os.remove(settings.model)
    os.symlink(tmp_path / "copy", settings.model)
    adapters = [Adapter(f"{a.name}={tmp_path}/./{Path(a.source).name}/") for a in settings.adapters]
    request.getfixturevalue("no_loading")
    generate(replace(settings, adapters=adapters, output_dir=f"{tmp_path}/../{tmp_path.name}/out"))
    assert read_rows(Path(settings.output_dir) / "results.jsonl") == rows
    nudge(tmp_path / "copy" / "model.safetensors")
    with pytest.raises(ValueError, match="model weights changed since"):
        generate(settings)


def test_a_changed_adapter_has_its_place_under_another_name(settings):
    settings = replace(settings, tasks=["xstest"], base=False)
    generate(replace(settings, adapters=settings.adapters[:1]))
    adapter = Path(settings.adapters[0].source)
    train_again(None, adapter, None)
    generate(replace(settings, adapters=[Adapter(f"again-seed0={adapter}")]))
    answers = read_completions(f"{settings.output_dir}/completions.jsonl").rows
    assert {row.adapter for row in answers} == {"lora-seed0", "again-seed0"}
    weights = {row.adapter: row.generation["checksums"]["adapter weights"] for row in answers}
    assert weights["lora-seed0"] != weights["again-seed0"]
    rows = read_rows(Path(settings.output_dir) / "results.jsonl")
    assert {row["config"]["checksums"]["adapter weights"] for row in rows} == set(weights.values())


@pytest.mark.usefixtures("no_loading")
def test_an_adapter_under_two_names_is_refused(settings, tmp_path):
    shutil.copytree(settings.adapters[0].source, tmp_path / "copy")
    adapters = [settings.adapters[0], Adapter(f"lora-seed1={tmp_path / 'copy'}")]
    with pytest.raises(ValueError, match=r"has 'lora-seed0' and 'lora-seed1', which are the same adapter, byte for"):
        generate(replace(settings, adapters=adapters))


def test_an_adapter_under_another_name_than_before_is_refused(settings):
    settings = replace(settings, tasks=["xstest"], adapters=settings.adapters[:1], base=False)
    generate(settings)
    message = r"has the adapter 'lora-seed7' under the name 'lora-seed0' already, .* Write lora-seed0=FOLDER"
    with pytest.raises(ValueError, match=message):
        generate(replace(settings, adapters=[Adapter(f"lora-seed7={settings.adapters[0].source}")]))


@pytest.mark.parametrize("change", ["{}/", "{}/../talker", "{}-link", "moved/talker"])
def test_a_model_under_another_name_than_before_is_the_same(settings, change, tmp_path, request, capsys):
    settings = replace(settings, tasks=["xstest"], base=False)
    generate(replace(settings, adapters=settings.adapters[:1], base=True))
    if change.startswith("moved"):
        (tmp_path / "moved").mkdir()
        os.rename(settings.model, tmp_path / change)
        change = str(tmp_path / change)
    else:
        os.symlink(settings.model, f"{settings.model}-link")
    other = replace(settings, model=change.format(settings.model))
    if "link" in change:  # PEFT's name of the base
        path = Path(settings.adapters[1].source) / "adapter_config.json"
        path.write_text(path.read_text().replace('talker"', 'talker-link"'))
        other = replace(other, adapters=other.adapters[1:])
    run = generate(other)
    assert f"as '{settings.model}', which it stays in the table" in capsys.readouterr().out
    assert {row["config"]["model"] for row in run.rows} == {settings.model}
    answers = read_completions(run.folder / "completions.jsonl").rows
    assert [(row.model, row.adapter) for row in answers] == [
        (settings.model, name) for name in (None, None, "lora-seed0", "lora-seed0", "monolora-seed1", "monolora-seed1")
    ]
    request.getfixturevalue("no_loading")
    assert len(generate(other).rows) == len(run.rows)


def test_a_folder_of_an_earlier_version_is_refused(settings):
    settings = replace(settings, tasks=["xstest"], adapters=[])
    generate(settings)
    for name, inner in (("results.jsonl", "config"), ("completions.jsonl", "generation")):
        path = Path(settings.output_dir) / name
        whole, rows = path.read_bytes(), read_rows(path)
        for row in rows:
            del row[inner]["checksums"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match=r"do not say which weights and data made them \(an earlier version"):
            generate(settings)
        path.write_bytes(whole)
    generate(settings)


@pytest.mark.usefixtures("no_loading")
def test_a_model_folder_that_would_load_an_adapter_is_refused(settings):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(Path(settings.adapters[0].source) / name, settings.model)
    with pytest.raises(ValueError, match=r"holds an adapter_config.json too, and transformers would"):
        generate(settings)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts copies of a folder into the hub's cache as commits of a repository, and says where.

    Each commit differs in a number of its weights; the branch leads to the first.
    """
    cache = tmp_path / "hub"
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache))

    def add(folder, name, commits):
        repository = cache / f"models--org--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commits[0])
        for commit in commits:
            shutil.copytree(folder, repository / "snapshots" / commit)
        nudge(next((repository / "snapshots" / commits[-1]).glob("*.safetensors")))
        return repository

    return add


def test_a_model_of_the_hub_is_its_commit(settings, hub):
    commits = "a" * 40, "b" * 40
    repository = hub(settings.model, "talker", commits)
    settings = replace(settings, model="org/talker", tasks=["xstest"])
    generate(settings)
    rows = read_rows(Path(settings.output_dir) / "results.jsonl")
    assert {row["config"]["checksums"]["model commit"] for row in rows} == {commits[0]}
    generate(settings)
    (repository / "refs" / "main").write_text(commits[1])
    with pytest.raises(ValueError, match="model commit changed since"):
        generate(settings)


def test_an_adapter_of_the_hub(settings, hub):
    source = Path(settings.adapters[0].source)
    shutil.copy(Path(settings.model) / "tokenizer.json", source)
    shutil.copy(Path(settings.model) / "tokenizer_config.json", source)
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    commits = "a" * 40, "b" * 40
    repository = hub(source, "adapter", commits)
    settings = replace(settings, tasks=["xstest"], adapters=[Adapter("lora-seed0=org/adapter")])
    generate(settings)
    answers = read_completions(f"{settings.output_dir}/completions.jsonl").rows
    assert {(row.adapter, row.generation["tokenizer"]) for row in answers} == {
        (None, "model"), ("lora-seed0", "adapter"),
    }  # fmt: skip
    (repository / "refs" / "main").write_text(commits[1])
    with pytest.raises(ValueError, match="adapter weights changed since"):
        generate(settings)


def test_checksums_are_of_every_byte(talking_model):
    before = model_checksums(str(talking_model), None)
    tensors = load_file(talking_model / "model.safetensors")
    last = max(tensors)
    tensors[last].view(-1)[-1] = torch.nextafter(tensors[last].view(-1)[-1], torch.tensor(9.0))
    save_file(tensors, talking_model / "model.safetensors", metadata={"format": "pt"})
    after = model_checksums(str(talking_model), None)
    assert {part for part in before if before[part] != after[part]} == {"model weights"}
