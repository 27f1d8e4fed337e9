"""KL and loss on neutral texts against a token-by-token computation, and what the command writes and refuses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.forgetting import ForgettingError, check_base_beneath, forgetting, losses, neutral_texts, read_neutral_texts
from evals.forgetting_rows import measure_forgetting
from evals.models import Adapter
from evals.report import write_report
from evals.settings import ForgettingSettings


@pytest.fixture
def texts_file(tmp_path):
    rows = [
        {"text": f"The {word} is old, and {i} of them were sold."} for i, word in enumerate(("mill", "ox", "boat"))
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "texts.jsonl"


def by_hand(model, ids, counted):
    """Sums of KL(base || adapter), loss, base's loss, and tokens of one text, one position after the other."""
    sums = [0.0, 0.0, 0.0, 0]
    with torch.no_grad():
        adapted = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
        with model.disable_adapter():
            base = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
    for place in range(len(ids) - 1):
        if counted[place + 1]:
            p, q = base[place], adapted[place]
            sums[0] += float(sum(float(a) * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
            sums[1] -= math.log(q[ids[place + 1]])
            sums[2] -= math.log(p[ids[place + 1]])
            sums[3] += 1
    return sums


@pytest.mark.parametrize("method", ["lora", "monolora"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_kl_and_loss_are_those_of_every_token(talking_model, make_adapter, texts_file, method, batch_size):
    adapter = make_adapter(talking_model, method, method)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(talking_model), adapter).train()
    texts = neutral_texts(AutoTokenizer.from_pretrained(talking_model), read_neutral_texts(texts_file))
    found = forgetting(model, texts, batch_size=batch_size)
    assert model.training
    model.eval()
    expected = np.array([by_hand(model, row.input_ids, row.completion_mask) for row in texts.rows])
    tokens = expected[:, 3].sum()
    assert found.tokens == tokens
    assert found.kl.value == pytest.approx(expected[:, 0].sum() / tokens, rel=1e-4)
    assert found.loss.value == pytest.approx(expected[:, 1].sum() / tokens, rel=1e-4)
    assert found.base_loss.value == pytest.approx(expected[:, 2].sum() / tokens, rel=1e-4)
    assert found.loss_difference.value == pytest.approx(found.loss.value - found.base_loss.value, abs=1e-6)
    assert found.kl.low < found.kl.value < found.kl.high
    per_text = expected[:, 0] / expected[:, 3]
    assert per_text.min() - 1e-4 <= found.kl.low
    assert found.kl.high <= per_text.max() + 1e-4  # texts are drawn whole


def test_an_adapter_that_does_nothing_forgets_nothing(talking_model, make_adapter, texts_file):
    adapter = make_adapter(talking_model, "lora")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(talking_model), adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    found = forgetting(
        model, neutral_texts(AutoTokenizer.from_pretrained(talking_model), read_neutral_texts(texts_file))
    )
    assert (found.kl.value, found.loss_difference.value) == (0, 0)


def test_of_conversations_the_responses_count(talking_model, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Who?", "response": "The miller."}\n' * 2)
    tokenizer = AutoTokenizer.from_pretrained(talking_model)
    texts = neutral_texts(tokenizer, read_neutral_texts(tmp_path / "pairs.jsonl"))
    row = texts.rows[0]
    counted = [token for token, counts in zip(row.input_ids, row.completion_mask, strict=True) if counts]
    assert tokenizer.decode(counted) == "The miller."


def test_shipped_texts_are_many_and_long_enough(talking_model):
    texts = neutral_texts(AutoTokenizer.from_pretrained(talking_model), read_neutral_texts(), context=512)
    assert len(texts.rows) == 48
    assert all(sum(row.completion_mask) >= 40 for row in texts.rows)
    assert len({tuple(row.input_ids) for row in texts.rows}) == 48


def test_long_texts_are_cut_at_the_context(talking_model, texts_file):
    texts = neutral_texts(AutoTokenizer.from_pretrained(talking_model), read_neutral_texts(texts_file), context=8)
    assert texts.cut == 3
    assert {len(row.input_ids) for row in texts.rows} == {8}


def test_biases_that_stay_in_the_base_are_refused(talking_model, tmp_path, texts_file):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(talking_model)
    config.attention_bias = True
    base = LlamaForCausalLM(config)
    texts = neutral_texts(AutoTokenizer.from_pretrained(talking_model), read_neutral_texts(texts_file))
    before = losses(base, texts)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"))
    check_base_beneath(model, texts, before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("v_proj.bias"):
                parameter += 1
    with pytest.raises(ForgettingError, match="biases or embeddings"):
        check_base_beneath(model, texts, before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ('{"words": "a"}\n', "lacks the column.s. text; it has words"),
        ('{"text": "a b c"}\n{"text": " "}\n', "row 2"),
        ('{"text": "a b c"}\n', "has one text"),
        ('{"prompt": "a"}\n', "lacks the column.s. response"),
    ],
)
def test_texts_that_cannot_be_measured_are_refused_before_a_model_is_read(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        measure_forgetting(ForgettingSettings("nowhere", str(tmp_path / "out"), texts=str(tmp_path / "bad.jsonl")))


def test_rows_are_measured_once_and_stand_in_the_table(
    talking_model, make_adapter, texts_file, tmp_path, monkeypatch, eval_data
):
    adapters = [Adapter(f"{m}-seed0={make_adapter(talking_model, m, m)}") for m in ("lora", "monolora")]
    settings = ForgettingSettings(str(talking_model), str(tmp_path / "out"), adapters[:1], str(texts_file))
    run = measure_forgetting(settings)
    assert [row["metric"] for row in run.rows] == [
        "neutral_loss", "neutral_kl", "neutral_loss", "neutral_loss_difference",
    ]  # fmt: skip
    assert run.find("neutral_kl")[0]["n"] == 3
    settings.adapters = adapters
    run = measure_forgetting(settings)
    assert len(run.rows) == 7
    text = write_report(run)
    assert "| neutral_text | neutral_kl |" in text
    assert "lora - base" in text
    monkeypatch.setattr("evals.forgetting_rows.load_base", None)
    assert len(measure_forgetting(settings).rows) == 7
    texts_file.write_text(texts_file.read_text().replace("mill", "hill"))
    with pytest.raises(ValueError, match="data or settings of the task 'neutral_text'"):
        measure_forgetting(settings)


def test_a_folder_of_answers_takes_the_rows_under_its_settings(settings, texts_file, capsys):
    from evals.__main__ import main
    from evals.generate import generate

    settings.tasks, settings.adapters, settings.limit = ["sst2_instruct"], settings.adapters[:1], 3
    generate(settings)
    command = [
        "forgetting",
        "--model",
        settings.model,
        "--output_dir",
        settings.output_dir,
        "--texts",
        str(texts_file),
    ]
    command += ["--adapters", settings.adapters[0].text]
    main(command)
    assert "neutral_kl" in capsys.readouterr().out
    generate(settings)  # still the same run
    with pytest.raises(SystemExit, match="was made with --dtype auto, not bfloat16"):
        main([*command, "--dtype", "bfloat16"])
