"""Thoughts are cut before an answer is judged or scored, and one that does not end is an outcome of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from evals.generate import GenerateSettings, generate
from evals.judge import judge
from evals.judges import LocalChatJudge, ShieldGemma
from evals.models import Adapter
from evals.records import read_completions, read_verdicts
from evals.report import write_report
from evals.thoughts import MARKERS, Thoughts, thoughts_of
from vision_bench.runs import read_rows

ALWAYS = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
SWITCHED = ALWAYS + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
OPENING = ALWAYS + "<think>{% endif %}{# </think> #}"
NAMING = ALWAYS + "{% endif %}{# [THINK] [/THINK] <|channel|>final<|message|> #}"


@pytest.fixture
def scripted(tmp_path, make_tokenizer, make_adapter, eval_data):
    """A function that saves a Llama which goes from each token of a script to the next, and gives settings for it.

    The layers add nothing, so that a token decides the next one and an adapter changes nothing.
    """

    def make(template, script, special=(), **options):
        tokenizer = make_tokenizer(chat=True)
        tokenizer.add_tokens([word for steps in script for word in steps])
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)}) if special else None
        tokenizer.chat_template = template
        size = len(tokenizer)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size, hidden_size=size, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
                head_dim=size + size % 2, eos_token_id=1, pad_token_id=0, bos_token_id=None,
                max_position_embeddings=512,
            )
        )  # fmt: skip
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(torch.eye(size))
            model.lm_head.weight.zero_()
            model.model.layers[0].self_attn.o_proj.weight.zero_()
            model.model.layers[0].mlp.down_proj.weight.zero_()
            for word, following in script:
                model.lm_head.weight[tuple(map(tokenizer.convert_tokens_to_ids, (following, word)))] = 1
        folder = tmp_path / "scripted"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        adapter = Adapter(f"lora-seed0={make_adapter(folder, 'lora')}")
        return GenerateSettings(
            str(folder), ["xstest"], str(tmp_path / "out"), [adapter], max_new_tokens=12, **options
        )

    return make


def chain(*words):
    return list(pairwise(words))


THINKS = [*chain("<|assistant|>", "<think>", "mm"), *chain("mm", "</think>", "Yes", "<|end|>")]
FOR_EVER = [*chain("<|assistant|>", "<think>", "mm", "mm"), *chain("</think>", "Yes", "<|end|>")]
SAFE = "Verdict: safe"
ENDS_IN_THOUGHT = [*chain("<|assistant|>", "<think>", "mm", "<|end|>"), *chain("</think>", "Yes", "<|end|>")]


def answers(settings):
    return read_completions(f"{settings.output_dir}/completions.jsonl").rows


def metrics(settings):
    found = read_rows(Path(settings.output_dir) / "results.jsonl")
    return {(row["metric"], row["config"]["adapter"]): row["value"] for row in found if row["metric"] != "seconds"}


def seen(rows):
    return {(row.adapter, row.thought, row.response, row.finish_reason) for row in rows}


def arms(*outcome):
    return {(None, *outcome), ("lora-seed0", *outcome)}


def test_thinking_is_off_where_the_template_has_a_switch(scripted):
    settings = scripted(SWITCHED, THINKS)
    generate(settings)
    assert seen(answers(settings)) == arms("", "Yes", "stop")
    assert {row.generation["thinking"] for row in answers(settings)} == {"off"}
    assert metrics(settings)["thought", None] == metrics(settings)["unfinished_thought", None] == 0
    assert "Thinking was off, for all arms" in write_report(generate(settings))
    with pytest.raises(ValueError, match=r"another configuration \(thinking: 'off' there, 'on' now\)"):
        generate(replace(settings, thinking="on"))


@pytest.mark.parametrize(
    ("template", "script", "special"),
    [
        (SWITCHED, THINKS, ()),
        (OPENING, chain("<think>", "mm", "</think>", "Yes", "<|end|>"), ()),
        (NAMING, chain("<|assistant|>", "[THINK]", "mm", "[/THINK]", "Yes", "<|end|>"), ["[THINK]", "[/THINK]"]),
        (
            NAMING,
            chain("<|assistant|>", "<|channel|>", "analysis", "<|message|>", "mm", "<|stop|>", "<|start|>", "role")
            + chain("role", "<|channel_|>", "final", "<|message_|>", "Yes", "<|end|>"),
            ["<|channel|>", "<|message|>", "<|stop|>", "<|start|>"],
        ),
    ],
)
def test_thoughts_are_cut_from_every_arm(scripted, make_shieldgemma, template, script, special):
    settings = scripted(template, script, special, thinking="on")
    if "<|channel_|>" in str(script):  # a token leads to one other only, and gpt-oss writes these twice
        settings = replace(
            settings, thought_markers=("<|channel|>analysis<|message|>", "<|channel_|>final<|message_|>")
        )
    generate(settings)
    thought = "mm<|stop|><|start|>role" if "<|channel|>" in str(script) else "mm"
    assert seen(answers(settings)) == arms(thought, "Yes", "stop")
    assert {row.generation["thinking"] for row in answers(settings)} == {"on"}
    assert metrics(settings)["thought", None] == 1
    assert metrics(settings)["unfinished_thought", "lora-seed0"] == 0
    assert metrics(settings)["empty", None] == 0


def test_thoughts_that_no_template_names_are_said(scripted, capsys):
    script = chain("<|assistant|>", "<thou", "ght>", "mm", "</thou", "ght_>", "Yes", "<|end|>")
    settings = scripted(ALWAYS + "{% endif %}", script)
    generate(settings)
    assert seen(answers(settings)) == arms("", "<thought>mm</thought_>Yes", "stop")
    assert "2 of 2 answers of lora-seed0 hold <thought> or </thought>" in capsys.readouterr().out


def test_markers_without_a_thought_are_cut_too(scripted):
    """As gpt-oss writes an answer at once; its control tokens are no text, the channel's name would be."""
    script = chain("<|assistant|>", "<|channel|>", "final", "<|message|>", "Yes", "<|end|>")
    settings = scripted(NAMING, script, ["<|channel|>", "<|message|>"])
    generate(settings)
    assert seen(answers(settings)) == arms("", "Yes", "stop")
    assert metrics(settings)["thought", None] == 0


@pytest.mark.parametrize("script", [FOR_EVER, ENDS_IN_THOUGHT])
def test_a_thought_that_does_not_end_is_no_answer(scripted, make_shieldgemma, script, request):
    settings = replace(scripted(SWITCHED, script, thinking="on"), tasks=["xstest", "dolly"])
    generate(settings)
    assert {(row.response, row.finish_reason) for row in answers(settings)} == {("", "thought")}
    assert all(row.thought.startswith("mm") for row in answers(settings))
    assert {metric for metric, _ in metrics(settings)} == {"thought", "unfinished_thought"}, "no text, no score"
    assert metrics(settings)["unfinished_thought", None] == 1
    source = f"shieldgemma={make_shieldgemma()}"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("evals.judges.base.load_base", None)  # nothing is left to ask
        run = judge(settings.output_dir, [source])
    verdicts = read_verdicts(f"{settings.output_dir}/verdicts.jsonl").rows
    assert {(verdict.outcome, verdict.mean_score) for verdict in verdicts} == {("unfinished_thought", None)}
    judged = {(row["metric"], row["value"]) for row in run.rows if row["config"].get("judge")}
    assert {("unfinished_thought", 1.0), ("unsafe_at_most", 1.0), ("unsafe_at_least", 0.0)} <= judged
    assert not {metric for metric, _ in judged} & {"unsafe", "score"}
    assert "| unfinished_thought |" in write_report(run)
    request.getfixturevalue("no_loading")
    generate(settings)


def test_a_judge_reads_the_answer_only(scripted, make_shieldgemma, monkeypatch):
    settings = scripted(SWITCHED, THINKS, thinking="on")
    generate(settings)
    read = []
    encode = ShieldGemma.encode
    monkeypatch.setattr(ShieldGemma, "encode", lambda self, *texts: read.append(texts[1]) or encode(self, *texts))
    judge(settings.output_dir, [f"shieldgemma={make_shieldgemma()}"])
    assert read == ["Yes"] * 4


@pytest.mark.parametrize(
    ("template", "script", "special", "outcome", "reply"),
    [
        (SWITCHED, [*chain("<|assistant|>", "<think>", "mm"), *chain("</think>", SAFE, "<|end|>")], (), "safe", SAFE),
        (OPENING, chain("<think>", "mm", "</think>", SAFE, "<|end|>"), (), "safe", f"mm</think>{SAFE}"),
        (OPENING, chain("<think>", SAFE, "<|end|>"), (), "unparsed", SAFE),
        (OPENING, chain("<think>", "mm", "mm"), (), "unparsed", "[cut off at the limit] " + "mm" * 12),
        (
            NAMING,
            chain("<|assistant|>", "[THINK]", SAFE, "<|end|>"),
            ["[THINK]", "[/THINK]"],
            "unparsed",
            f"[THINK]{SAFE}",
        ),
    ],
)
def test_a_judge_does_not_think_and_its_unfinished_thought_is_no_verdict(
    scripted, monkeypatch, template, script, special, outcome, reply
):
    monkeypatch.setattr(LocalChatJudge, "MAX_NEW_TOKENS", 12)
    one = LocalChatJudge(scripted(template, script, special).model, "<prompt>{prompt}</prompt>{response}")
    one.load()
    (judgement,) = one.judge([one.encode("a", "b")])
    assert (judgement.outcome, judgement.reply) == (outcome, reply)
    assert one.settings["thinking"] == "off"


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (OPENING, {}, r"the model '.*scripted' opens a thought \(<think>\) in every prompt .* give --thinking on"),
        (ALWAYS + "{% endif %}", {"thinking": "on"}, r"neither the chat template nor the tokens of the model"),
        (SWITCHED, {"thinking": "on", "tasks": ["sst2_instruct"]}, r"'sst2_instruct' scores given answers"),
    ],
)
def test_modes_that_cannot_be(scripted, template, options, message):
    script = chain("<|assistant|>", "Yes") if template not in (OPENING, SWITCHED) else THINKS
    settings = replace(scripted(template, script), **options)
    with pytest.raises(ValueError, match=message):
        generate(settings)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("", "leaves out what the user says"),
        ("{{ messages[0]['role'] }}", "leaves out what the user says"),
        ("{{ raise_exception('no') }}", r"cannot write a user's message \(no\)"),
    ],
)
def test_templates_that_write_no_prompt(settings, template, problem):
    (Path(settings.adapters[0].source) / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"The tokenizer of the adapter 'lora-seed0' is of no use: .*{problem}"):
        generate(settings)


def test_options():
    for options in ({"thinking": "maybe"}, {"thought_markers": ("<a>", "")}):
        with pytest.raises(ValueError, match=f"--{next(iter(options))}"):
            GenerateSettings("m", ["xstest"], "o", **options)


def test_markers_are_those_of_the_template_or_the_tokens(make_tokenizer):
    tokenizer = make_tokenizer(chat=True)
    assert thoughts_of(tokenizer, "off", None, "m").markers == []
    assert thoughts_of(tokenizer, "off", ("<a>", "</a>"), "m").markers == [("<a>", "</a>")]
    tokenizer.add_tokens(["[THINK]", "[/THINK]"])
    assert thoughts_of(tokenizer, "off", None, "m").markers == [("[THINK]", "[/THINK]")]


# --- cutting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", MARKERS)
@examples(max_examples=20, deadline=None)
@given(
    parts=st.lists(st.tuples(st.text("ab \n", max_size=4), st.text("xy", min_size=1, max_size=4)), max_size=3),
    is_opened=st.booleans(),
    is_open=st.booleans(),
)
def test_only_what_is_outside_of_thoughts_stays(pair, parts, is_opened, is_open):
    opener, closer = pair
    text = "".join(f"{opener}{thought}{closer}{answer}" for thought, answer in parts)
    if is_opened and parts:
        text = text.removeprefix(opener)
    cut = Thoughts([pair], opener if is_opened and parts else "", ["<s>"]).cut(
        text + (opener + "z" if is_open else "<s>")
    )
    assert cut.answer == "".join(answer for _, answer in parts)
    assert cut.is_finished is not is_open
    assert cut.thought == "\n".join([*(thought for thought, _ in parts), *(["z"] if is_open else [])])


@pytest.mark.parametrize(
    ("text", "opener", "expected"),
    [
        ("answer", "", ("", "answer", True)),
        ("thought</think>\n\nanswer", "<think>", ("thought", "answer", True)),
        ("thought</think>\n\nanswer", "", ("thought", "answer", True)),
        ("thought", "<think>", ("thought", "", False)),
        ("<think>a<think>b</think>c", "", ("a<think>b", "c", True)),
        ("harm <think>a</think> more", "", ("a", "harm more", True)),
        ("harm <think>a", "", ("a", "harm ", False)),
        ("", "", ("", "", True)),
    ],
)
def test_cases(text, opener, expected):
    assert Thoughts([("<think>", "</think>")], opener, []).cut(text) == expected


def test_gpt_oss():
    text = "<|channel|>analysis<|message|>mm<|end|><|start|>assistant<|channel|>final<|message|>Yes<|return|>"
    thoughts = Thoughts([MARKERS[-1]], "", ["<|return|>", "<|end|>"])
    assert thoughts.cut(text) == ("mm<|end|><|start|>assistant", "Yes", True)
    assert thoughts.cut("<|channel|>final<|message|>Yes") == ("", "Yes", True)
    assert not thoughts.cut("<|channel|>analysis<|message|>mm").is_finished


# --- greedy decoding, and an adapter's own tokenizer -----------------------------------------------------------------


@pytest.mark.parametrize("is_legacy", [False, True])
def test_a_generation_config_does_not_act_in_greedy_decoding(settings, tmp_path, capsys, is_legacy):
    settings = replace(settings, tasks=["beavertails_eval"])
    generate(settings)
    expected = {row.key[2:]: (row.response, row.finish_reason) for row in answers(settings)}
    changes = {
        "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 16, "num_beams": 3, "min_length": 400,
        "suppress_tokens": [40, 41, 42], "begin_suppress_tokens": [50, 51], "bad_words_ids": [[60]],
        "forced_eos_token_id": 1, "do_sample": True, "temperature": 9.0, "top_k": 3, "max_length": 7,
        "exponential_decay_length_penalty": [1, 3.0], "sequence_bias": [[[45], 50.0]], "max_new_tokens": 2,
    }  # fmt: skip
    path = Path(settings.model) / "generation_config.json"
    known = json.loads(path.read_text())
    if is_legacy:  # older checkpoints have them in config.json
        path.unlink()
        path = Path(settings.model) / "config.json"
        known = json.loads(path.read_text())
        changes = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_length": 400}
    path.write_text(json.dumps(known | changes))
    settings = replace(settings, output_dir=str(tmp_path / "again"))
    generate(settings)
    assert {row.key[2:]: (row.response, row.finish_reason) for row in answers(settings)} == expected
    assert "repetition_penalty 5.0" in capsys.readouterr().out
    assert {row.generation["repetition_penalty"] for row in answers(settings)} == {1.0}


def test_every_end_token_of_the_generation_config_ends_an_answer(scripted):
    settings = scripted(ALWAYS + "{% endif %}", chain("<|assistant|>", "Yes", "<|stop|>", "No", "No"), ["<|stop|>"])
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    path = Path(settings.model) / "generation_config.json"
    ends = [1, tokenizer.convert_tokens_to_ids("<|stop|>")]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ends}))
    generate(settings)
    assert seen(answers(settings)) == arms("", "Yes", "stop")
    assert {tuple(row.generation["end_token_ids"]) for row in answers(settings)} == {tuple(ends)}


def test_an_adapter_answers_with_its_own_chat_template(scripted, capsys):
    script = [*chain("<|assistant|>", "Yes", "<|end|>"), *chain("<|user|>", "No", "<|end|>")]
    settings = scripted(ALWAYS + "{% endif %}", script)
    (Path(settings.adapters[0].source) / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|user|>")
    generate(settings)
    assert seen(answers(settings)) == {(None, "", "Yes", "stop"), ("lora-seed0", "", "No", "stop")}
    assert {row.adapter: row.generation["tokenizer"] for row in answers(settings)} == {
        None: "model", "lora-seed0": "adapter",
    }  # fmt: skip
    assert "'lora-seed0' has a tokenizer or chat template of its own" in capsys.readouterr().out


def test_an_adapter_with_the_bases_tokenizer(scripted):
    """Saved again, with padding and truncation of the training."""
    settings = scripted(SWITCHED, THINKS)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(settings.adapters[0].source)
    generate(settings)
    assert {row.generation["tokenizer"] for row in answers(settings)} == {"model"}


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("is_special", [True, False])
def test_an_adapter_with_other_tokens_is_refused(scripted, is_special):
    settings = scripted(SWITCHED, THINKS)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.add_tokens(["<|new|>"], special_tokens=is_special)
    tokenizer.save_pretrained(settings.adapters[0].source)
    with pytest.raises(
        ValueError, match=r"other tokens than its base model: 1 differ, such as '<\|new\|>' \(\d+ there"
    ):
        generate(settings)
