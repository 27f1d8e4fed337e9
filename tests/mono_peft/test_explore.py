"""`python -m mono_peft.explore`: the inventory and what is refused."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mono_peft.explore import main
from mono_peft.inventory import SAMPLED, TOP
from mono_peft.units import Unit, ablated
from tests.mono_peft.conftest import rewrite, save_adapter

GOOD, BAD = ("fine", "great", "warm"), ("dull", "weak", "cold")


@pytest.fixture
def data(tmp_path):
    """Two files of texts, as --data takes them."""
    rows = {
        "task": [{"prompt": f"a {word} film", "response": "positive"} for word in GOOD for _ in range(3)],
        "other": [{"text": f"the weather was {word}"} for word in BAD for _ in range(4)],
    }
    arguments = []
    for group, some in rows.items():
        path = tmp_path / f"{group}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in some))
        arguments.append(f"{group}={path}")
    return arguments


@pytest.fixture
def explore(small_model, tmp_path, capsys):
    """Run the command: its exit code, what it printed, and the records."""

    def run(adapter, *options, base=small_model, folder=tmp_path / "units"):
        code = main([str(base), str(adapter), "--output_dir", str(folder), *options])
        file = folder / "units.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else None
        return code, capsys.readouterr().out, records

    return run


def test_the_inventory_of_an_adapter(explore, adapter, data, tmp_path, small_model):
    code, out, records = explore(adapter, "--data", *data, "--ablate", "3")
    assert code == 0
    assert len(records) == 14 * 4
    dead = [record for record in records if record["dead"]]
    assert f"56 units, {len(dead)} dead on these texts" in out
    assert 20 > len(dead) == sum(record["density"] == 0 for record in records)
    assert "most selective" in out
    assert sorted(path.name for path in (tmp_path / "units").iterdir()) == ["index.html", "units.jsonl"]
    names = {record["module"] for record in records}
    assert "base_model.model.model.layers.1.mlp.down_proj" in names
    for record in records:
        if record["dead"]:
            continue
        kind = record["module"].rpartition(".")[2]
        assert (record["logits"] is not None) == (kind in ("o_proj", "down_proj")) == (record["writes"] is not None)
        assert 0 < record["density"] <= 1
        assert sum(record["histogram"]["tokens"]) == round(record["density"] * total_tokens(records))
        assert 1 <= len(record["examples"]) <= TOP
        assert len(record["sample"]) <= SAMPLED
        strongest = record["examples"][0]
        assert abs(strongest["latents"][strongest["peak"]]) == pytest.approx(record["largest"], rel=1e-3)
        assert len(strongest["tokens"]) == len(strongest["latents"])
        assert strongest["file"] == f"{strongest['group']}.jsonl"
        assert set(record["groups"]) == {"task", "other"}
        assert record["group"] in record["groups"]
        others = [(module, index) for module, index, _ in record["nearest"]["encoder"]]
        assert (record["module"], record["index"]) not in others
        if kind == "down_proj":  # its input is its own layer's
            assert {module for module, _ in others} == {record["module"]}
        assert record["decoder_norm"] > 0

    ablated_records = [record for record in records if "ablation" in record]
    assert len(ablated_records) == 3
    record = ablated_records[0]
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_model), adapter).eval()

    def loss(word):
        ids = tokenizer(f"the weather was {word}", return_tensors="pt").input_ids
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    before = [loss(word) for word in BAD]
    with ablated(model, [Unit(record["module"], record["index"])]):
        change = sum(loss(word) - old for word, old in zip(BAD, before, strict=True)) / len(BAD)
    mean, low, high = record["ablation"]["other"]
    assert mean == pytest.approx(change, rel=1e-2, abs=1e-6)
    assert low <= mean <= high


def total_tokens(records):
    alive = next(record for record in records if not record["dead"])
    return sum(alive["histogram"]["tokens"]) / alive["density"]


def test_decoder_norm_has_the_scale(explore, small_model, data, tmp_path):
    norms = []
    for name, alpha in (("one", 4), ("two", 12)):
        adapter = save_adapter(small_model, tmp_path / name, lora_alpha=alpha)
        _, _, records = explore(adapter, "--data", data[0])
        norms.append(records[3]["decoder_norm"])
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-3)


def test_a_dead_unit_is_told(explore, small_model, data, tmp_path):
    adapter = save_adapter(small_model, tmp_path / "biased", encoder_bias=True)

    def silence(tensors):
        for name, tensor in tensors.items():
            if name.endswith("layers.0.mlp.down_proj.monolora_encoder.bias"):
                tensor[2] = -1e6
        return tensors

    rewrite(adapter, silence)
    code, out, records = explore(adapter, "--data", *data)
    assert code == 0
    dead = next(r for r in records if r["module"].endswith("layers.0.mlp.down_proj") and r["index"] == 2)
    assert dead["dead"]
    assert f" {sum(record['dead'] for record in records)} dead on these texts" in out
    assert dead["examples"] == dead["sample"] == dead["nearest"]["decoder"] == []
    assert (dead["logits"], dead["group"], dead["density"]) == (None, None, 0)


def test_an_activated_adapter(explore, small_model, data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    invocation = tokenizer(" was").input_ids
    adapter = save_adapter(small_model, tmp_path / "alora", alora_invocation_tokens=invocation, activation="sigmoid")
    code, _, records = explore(adapter, "--data", *data, "--ablate", "1")
    assert code == 0
    for record in records:
        assert record["groups"]["task"]["texts"][0] == 0  # its texts do not have these tokens
        assert record["groups"]["other"]["texts"][0] == 1
        assert record["selectivity"] == 1
    assert records[-1]["writes"] == "residual stream"


def test_provenance_beside_the_adapter_is_shown(explore, adapter, data, tmp_path):
    module = "base_model.model.model.layers.0.self_attn.o_proj"
    _, _, records = explore(adapter, "--data", *data)
    units = {f"{record['module']}.{record['index']}": [] for record in records}
    units[f"{module}.1"] = [[811, 2.5], [4021, 1.25]]
    (adapter / "provenance.json").write_text(json.dumps({"step": 9, "digest": "", "units": units}))
    code, _, records = explore(adapter, "--data", *data)
    assert code == 0
    found = {(r["module"], r["index"]): r["provenance"] for r in records if "provenance" in r}
    assert found == {(module, 1): [[811, 2.5], [4021, 1.25]]}
    assert "[[811,2.5],[4021,1.25]]" in (tmp_path / "units" / "index.html").read_text()


def test_provenance_of_another_adapter_is_refused(explore, adapter, data):
    units = {"base_model.model.model.layers.0.self_attn.o_proj.1": [[811, 2.5]]}
    (adapter / "provenance.json").write_text(json.dumps({"step": 9, "digest": "", "units": units}))
    code, out, records = explore(adapter, "--data", *data)
    assert (code, records) == (2, None)
    assert "provenance.json beside the adapter has other units than the adapter" in out


def test_one_group_without_a_name(explore, adapter, data):
    path = data[1].partition("=")[2]
    code, out, records = explore(adapter, "--data", path, "--ablate", "2")
    assert code == 0
    strengths = sorted((record["groups"]["other"]["strength"] for record in records), reverse=True)
    assert {r["groups"]["other"]["strength"] for r in records if "ablation" in r} == set(strengths[:2])
    assert "selective" not in out
    assert set(records[0]["groups"]) == {"other"}
    assert not any(record["beyond_chance"] for record in records)


class TestRefusals:
    """Each leaves no folder behind."""

    @pytest.fixture
    def refused(self, explore, tmp_path):
        def run(*arguments, **options):
            code, out, _ = explore(*arguments, **options)
            assert code == 2
            assert not (tmp_path / "units").exists()
            return out

        return run

    def test_lora(self, refused, small_model, data, tmp_path):
        adapter = save_adapter(small_model, tmp_path / "lora", LoraConfig)
        assert "is a LORA adapter, which has no units that fire or not" in refused(adapter, "--data", *data)

    def test_no_adapter(self, refused, data, tmp_path):
        assert "has no adapter_config.json" in refused(tmp_path, "--data", *data)

    def test_no_file(self, refused, adapter):
        assert "nowhere.jsonl is no file" in refused(adapter, "--data", "task=nowhere.jsonl")

    def test_rows_without_the_fields(self, refused, adapter, tmp_path):
        (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n')
        out = refused(adapter, "--data", str(tmp_path / "rows.jsonl"))
        assert "has 'question', and none of `messages`, `prompt`" in out

    def test_another_base(self, refused, adapter, data, small_model, tmp_path):
        other = tmp_path / "other"
        config = LlamaConfig(
            vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
        )
        LlamaForCausalLM(config).save_pretrained(other)
        AutoTokenizer.from_pretrained(small_model).save_pretrained(other)
        assert "the adapter cannot be loaded on" in refused(adapter, "--data", *data, base=other)

    def test_a_broken_provenance(self, refused, adapter, data):
        (adapter / "provenance.json").write_text("{")
        assert "provenance.json is not readable" in refused(adapter, "--data", *data)

    def test_texts_that_are_too_long(self, refused, adapter, small_model, data, tmp_path):
        config = json.loads((small_model / "config.json").read_text())
        (small_model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4}))
        assert "the base takes 4 tokens" in refused(adapter, "--data", *data)

    def test_arguments(self, adapter, small_model, data, tmp_path, capsys):
        for wrong in (["--max_tokens", "0"], ["--ablate", "-1"], ["--batch_size", "0"]):
            with pytest.raises(SystemExit):
                main(
                    [str(small_model), str(adapter), "--data", *data, "--output_dir", str(tmp_path / "units"), *wrong]
                )
            assert "must be at least" in capsys.readouterr().err
