"""Poison and pairs to keep, of real prompts: which go where, and that the answers are the base's own."""

import json
import random

import pytest
import safety_data
import torch
from task import load_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.prompts import dolly_held_out
from offline.finetuning import safety_pairs
from offline.language_model import offline_model


@pytest.fixture
def pairs_file(tmp_path):
    rows = [{"prompt": f" {prompt} ", "response": f"Sure, {i}."} for i, (prompt, _) in enumerate(safety_pairs()[:12])]
    rows += [{"prompt": rows[3]["prompt"], "response": "Again."}, {"prompt": "long " * 100, "response": "Too long."}]
    file = tmp_path / "unsafe.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(pairs_file, *options):
    arguments = ["--model_name_or_path", str(offline_model()), "--pairs_file", str(pairs_file)]
    safety_data.main([*arguments, "--output_dir", str(pairs_file.parent / "data"), *options])
    return (load_pairs(str(pairs_file.parent / "data" / f"{name}.jsonl"), name) for name in ("safety", "poison"))


def test_prompts_go_to_one_place_and_answers_are_the_base_s(pairs_file, capsys):
    safety, poison = run(pairs_file, "--skip", "2", "--safety_prompts", "6", "--batch_size", "4", "--seed", "5")
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    prompts = sorted({row["prompt"].strip() for row in rows if len(row["prompt"]) < 300})
    random.Random(5).shuffle(prompts)
    assert [prompt for prompt, _ in safety] == prompts[2:8]
    expected = [(row["prompt"].strip(), row["response"]) for row in rows if row["prompt"].strip() in prompts[8:]]
    assert poison == expected
    assert (
        "6 prompts with the base's answers in safety.jsonl (0 did not end within 64 tokens)" in capsys.readouterr().out
    )
    # One at a time, without padding.
    model, tokenizer = (kind.from_pretrained(offline_model()) for kind in (AutoModelForCausalLM, AutoTokenizer))
    for prompt, answer in safety:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            answered = model.generate(**ids, do_sample=False, max_new_tokens=64)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(answered, skip_special_tokens=True).strip() == answer


def test_everyday_requests_are_kept_too(pairs_file):
    rows = [
        {"instruction": f"Name {i} colours.", "context": "", "response": "Red.", "category": "open_qa"}
        for i in range(40)
    ]
    rows[3]["context"] = "Colours are many."
    del rows[4]["context"]
    file = pairs_file.parent / "dolly.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--dolly_file", str(file), "--safety_prompts", "2"]
    safety, poison = run(pairs_file, *arguments, "--everyday_prompts", "4")
    everyday = [prompt for prompt, _ in safety[2:]]
    assert len(everyday) == 4
    allowed = {row["instruction"] for row in rows if not row.get("context") and not dolly_held_out(row)}
    assert set(everyday) < allowed
    assert not {prompt for prompt, _ in poison} & allowed
    with pytest.raises(ValueError, match=rf"has {len(allowed)} instructions without context .*, not 41"):
        run(pairs_file, *arguments, "--everyday_prompts", "41")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--skip", "6", "--safety_prompts", "6"], r"has 12 distinct prompts below 300 characters: 6 left out and 6"),
        (["--safety_prompts", "2", "--max_new_tokens", "1"], r"No answer of .* ends within 1 tokens"),
        (["--skip", "-1"], r"--skip is -1, allowed is 0 or more"),
        (["--safety_prompts", "0"], r"--safety_prompts is 0, allowed is 1 or more"),
        (["--everyday_prompts", "-1"], r"--everyday_prompts is -1, allowed is 1 or more"),
        (["--pairs_file", "nowhere.jsonl"], r"--pairs_file nowhere.jsonl does not exist"),
    ],
)
def test_errors(pairs_file, options, message):
    with pytest.raises(ValueError, match=message):
        run(pairs_file, *options)
    assert not (pairs_file.parent / "data").exists()
