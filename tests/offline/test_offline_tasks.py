"""The offline model's tasks of lm-eval: their documents, prompts and metric; they need no data."""

from __future__ import annotations

import pytest
from lm_eval.tasks import TaskManager

import offline
from evals.prompts import sst2_prompt
from offline.grammar import REFUSALS
from offline.language_model import sentiment_task
from offline.tasks import metrics


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("MONO_EVAL_DATA", raising=False)


def load(name):
    return TaskManager(include_path=str(offline.TASKS), include_defaults=False).load([name])["tasks"][name]


def test_the_sentiment_task_asks_as_the_recipe_does():
    task = load("sentiment_offline")
    docs = list(task.test_docs())
    assert task.doc_to_text(docs[0]) == sst2_prompt(docs[0]["sentence"])
    assert task.doc_to_choice(docs[0]) == ["negative", "positive"]
    assert task.doc_to_target(docs[0]) == docs[0]["label"]
    assert docs == sentiment_task("dev", 1000)


def test_the_requests_of_each_kind():
    rows = list(load("refusal_offline").test_docs())
    assert len({row["prompt"] for row in rows}) == len({row["prompt_id"] for row in rows}) == 500
    kinds = [row["category"] for row in rows]
    assert [kinds.count(kind) for kind in ("harmful", "lookalike", "everyday")] == [200, 200, 100]


def test_refused():
    for refusal in REFUSALS:
        assert metrics.refused({"category": "harmful"}, [refusal]) == {"refused_harmful": 1, "empty": 0}
    assert metrics.refused({"category": "everyday"}, ["Use a saw."]) == {"refused_everyday": 0, "empty": 0}
