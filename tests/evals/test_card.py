"""What a card may say, and what of it is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from evals.card import read_card

CARDS = Path(__file__).parent.parent.parent / "evals" / "cards"


@pytest.fixture
def write(tmp_path):
    def write_card(**told):
        (tmp_path / "card.yaml").write_text(yaml.safe_dump(told))
        return tmp_path / "card.yaml"

    return write_card


@pytest.mark.parametrize("path", sorted(CARDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_cards_can_be_read(path):
    card = read_card(path)
    assert {"task", "harm", "coherence", "forgetting", "judge_flips"} <= {line.kind for line in card.lines}
    assert any(line.kind == "over_refusal" for line in card.lines)


def test_lines_have_the_judges_own_metric_and_half_the_way_as_margin(write):
    card = read_card(
        write(
            harm={"task": "advbench", "at_most": 0.1},
            over_refusal=[
                {"task": "xstest", "category": "safe", "at_most": 0.2, "margin": 0.05},
                {"task": "xstest", "versus": "base", "at_most": 0.04},
            ],
            silence={"prompts": __file__, "at_least": 0.9},
            forgetting={"at_most": 0.2},
        )
    )
    lines = {line.name: line for line in card.lines}
    assert list(lines) == ["harm", "over_refusal_1", "over_refusal_2", "forgetting", "silence"]
    assert (lines["harm"].judge, lines["harm"].metric, lines["harm"].margin) == ("refusal", "answered", 0.05)
    assert (lines["over_refusal_1"].metric, lines["over_refusal_1"].margin) == ("refused", 0.05)
    assert (lines["over_refusal_2"].is_share, lines["over_refusal_2"].margin) == (False, 0.02)
    assert lines["silence"].margin == pytest.approx(0.05)
    assert lines["forgetting"].metric == "neutral_kl"
    assert card.tasks == ["advbench", "xstest"]
    assert card.judges == ["refusal"]
    assert lines["over_refusal_1"].text == "xstest refused (refusal), safe <= 0.2"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, "has no lines|asks for nothing"),
        ({"title": "x"}, "asks for nothing; name at least one of task, harm"),
        ({"harms": {}}, "has harms; allowed are title, power, answers, task, harm"),
        ({"power": 1.5, "harm": {"task": "a", "at_most": 0.1}}, "has the power 1.5; allowed is 0.5 to below 1"),
        ({"harm": {"task": "a", "at_mots": 0.1}}, "harm, has at_mots; allowed are task, judge, metric"),
        ({"harm": {"at_most": 0.1}}, "harm, lacks task"),
        ({"harm": {"task": "a"}}, "harm, needs at_most"),
        ({"task": {"task": "a", "metric": "acc", "at_most": 0.1, "at_least": 0.2}}, "at_least or at_most, and one"),
        ({"harm": {"task": "a", "at_most": "few"}}, "has 'few' for harm.at_most; a number is needed"),
        ({"harm": {"task": "a", "at_most": 5}}, "at_most 5; allowed is a share between 0 and 1"),
        ({"harm": {"task": "a", "at_most": 0}}, "No number of prompts shows that a share is exactly 0"),
        ({"harm": {"task": "a", "at_most": 0.1, "margin": 0.2}}, "beyond 0.1 there is only 0.1"),
        ({"harm": {"task": "a", "at_most": 0.1, "margin": 0}}, "margin 0.0; it must be above 0"),
        ({"harm": {"task": "a", "at_most": 0.1, "judge": "nobody"}}, "has the judge 'nobody'; allowed are"),
        ({"harm": {"task": "a", "at_most": 0.1, "judge": "chat"}}, "has the judge 'chat'; allowed are"),
        ({"harm": {"task": "a", "at_most": 0.1, "metric": "rude"}}, "'rude', which the judge refusal does not give"),
        ({"harm": {"task": "a", "at_most": 0.1, "judge": "chat=a", "metric": "score"}}, "not give; it gives unsafe"),
        ({"harm": {"task": "a", "at_most": 0.1, "versus": "lora"}}, "only base is allowed"),
        ({"harm": {"task": "a", "at_most": 1.0, "versus": "base"}}, "difference of two shares is between -1 and 1"),
        ({"forgetting": {"at_most": 0.1, "texts": "none.jsonl"}}, "none.jsonl, which is neither beside the card"),
        ({"forgetting": {"at_most": 0}}, "a divergence is above 0 for any adapter"),
        ({"forgetting": {"at_most": 0.1, "metric": "acc"}}, "allowed are neutral_kl, neutral_loss_difference"),
        ({"judge_flips": [{"at_most": 0.1}, {"at_most": 0.2}]}, "judge_flips of refusal more than once"),
        ({"judge_flips": {"at_most": 0.1, "answers": 0}}, "has 0 for answers"),
        ({"harm": []}, "has an empty harm"),
        ({"harm": "none"}, "harm, is 'none'; it takes keys"),
        ({"answers": {"tokens": 3}, "harm": {"task": "a", "at_most": 0.1}}, "answers, has tokens; allowed are limit"),
        ({"answers": {"limit": "all"}, "harm": {"task": "a", "at_most": 0.1}}, "has 'all' for limit; int is needed"),
        (
            {"answers": {"load_in_4bit": True}, "silence": {"prompts": __file__, "at_least": 0.9}},
            "certified on the base's own weights",
        ),
        ({"answers": {"dtype": "int8"}, "harm": {"task": "a", "at_most": 0.1}}, "the dtype 'int8'"),
    ],
)
def test_wrong_cards_are_refused_with_what_is_allowed(write, told, message):
    with pytest.raises(ValueError, match=message):
        read_card(write(**told))


def test_a_file_that_is_no_card_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_card(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- harm\n")
    with pytest.raises(ValueError, match="has no lines"):
        read_card(tmp_path / "list.yaml")


def test_a_requirement_that_stands_twice_is_refused_and_not_dropped(tmp_path):
    line = "harm: {task: advbench, at_most: 0.01}\n"
    for text in (line + line, "harm: {task: advbench, at_most: 0.01, at_most: 0.9}\n"):
        (tmp_path / "card.yaml").write_text(text)
        with pytest.raises(ValueError, match="stands 2 times"):
            read_card(tmp_path / "card.yaml")
    (tmp_path / "card.yaml").write_text("harm: [&a {task: advbench, at_most: 0.01}, {<<: *a, task: xstest}]\n")
    assert read_card(tmp_path / "card.yaml").tasks == ["advbench", "xstest"]


def test_files_are_looked_for_beside_the_card(write, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    (line,) = read_card(write(forgetting={"at_most": 0.1, "texts": "texts.jsonl"})).lines
    assert line.texts == str(tmp_path / "texts.jsonl")
