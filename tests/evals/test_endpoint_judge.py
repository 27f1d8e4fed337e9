"""A judge behind a server: what counts as its verdict, and what becomes of refusals, waits and failures."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from evals.judge import check_judging
from evals.judge import judge as run_judging
from evals.judges import (
    EndpointChatJudge,
    NoAnswerError,
)
from evals.records import read_verdicts
from evals.registry import JudgeOptions, make_judge
from tests.evals.conftest import RUBRIC


def run_judge(folder, **options):
    """The verdicts of a folder after `judge`."""
    run_judging(folder, **options)
    return read_verdicts(folder / "verdicts.jsonl").rows


class TestEndpoint:
    @pytest.fixture
    def server(self):
        """An OpenAI-compatible server that judges by a word; `failures` are the statuses of its next answers.

        `refuse` is what it says about a request that it answers with 400, or None; `message`, `choice` and `headers`
        change its answers; `text` goes in their place, of which `missing` bytes do not come, and `delay` before them.
        """
        state = {"failures": [], "asked": [], "content": None, "message": {}, "choice": {}, "headers": {}}
        state |= {"refuse": lambda body: None, "choices": 1, "delay": 0, "text": None, "missing": 0}

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                state["asked"].append((self.path, body, self.headers["Authorization"]))
                refusal = state["refuse"](body)
                threading.Event().wait(state["delay"])
                if state["text"] is not None:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(state["text"]) + state["missing"]))
                    self.end_headers()
                    self.wfile.write(state["text"])
                    return
                status = state["failures"].pop() if state["failures"] else 400 if refusal else 200
                verdict = "unsafe" if "bomb" in body["messages"][0]["content"] else "safe"
                message = {"role": "assistant", "content": state["content"] or f"Reasons.\nVerdict: {verdict}"}
                choice = {"index": 0, "message": message | state["message"], "finish_reason": "stop"} | state["choice"]
                answer = {
                    "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                    "choices": [choice] * state["choices"],
                    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
                }  # fmt: skip
                text = json.dumps(answer if status == 200 else {"error": refusal or "no"}).encode()
                self.send_response(status)
                for name, value in state["headers"].items() if status != 200 else ():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None  # a client that does not wait for an answer
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        state["url"] = f"http://127.0.0.1:{server.server_port}/v1"
        yield state
        server.shutdown()

    @pytest.fixture
    def judge(self, server, monkeypatch):
        monkeypatch.setattr(EndpointChatJudge, "BACKOFF", 0.0)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        judge = EndpointChatJudge(server["url"], "big-model", RUBRIC)
        judge.load()
        return judge

    def test_it_asks_and_reads_strictly(self, judge, server):
        found = judge.judge([judge.encode("Q", "a bomb"), judge.encode("Q", "bread")])
        assert [judgement.outcome for judgement in found] == ["unsafe", "safe"]
        path, body, key = server["asked"][0]
        assert path == "/v1/chat/completions"
        assert (body["model"], body["temperature"]) == ("big-model", 0)
        assert key == "Bearer secret"

    def test_a_busy_server_is_asked_again_and_a_refusal_is_unparsed(self, judge, server):
        server["failures"] = [503, 429]
        assert judge.judge([judge.encode("Q", "A")])[0].outcome == "safe"
        assert len(server["asked"]) == 3
        server["failures"] = [400]
        refused = judge.judge([judge.encode("Q", "A")])[0]
        assert refused.outcome == "unparsed"
        assert refused.reply.startswith("HTTP 400")

    def test_a_server_that_refuses_everything_is_an_error(self, judge, server):
        server["failures"] = [422] * 4
        with pytest.raises(NoAnswerError, match="it refused every request of the first batch: HTTP 422") as error:
            judge.judge([judge.encode("Q", "A")] * 3)
        assert error.value.judgements == [None] * 3

    def test_a_first_batch_that_is_too_long_is_unparsed(self, judge, server):
        server["refuse"] = lambda body: "too long" if "word" in str(body) else None
        judgements = judge.judge([judge.encode("Q", "word " * 100)] * 2)
        assert [(j.outcome, j.reply[:8]) for j in judgements] == [("unparsed", "HTTP 400")] * 2
        assert judge.judge([judge.encode("Q", "bread")])[0].outcome == "safe"

    def test_the_answers_of_a_batch_outlive_a_failure_in_it(self, judge, server, monkeypatch):
        monkeypatch.setattr("evals.judges.endpoint.ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
        server["failures"] = [401, 200]
        with pytest.raises(NoAnswerError, match="401") as error:
            judge.judge([judge.encode("Q", "bomb"), judge.encode("Q", "A")])
        assert [j and j.outcome for j in error.value.judgements] == ["unsafe", None]

    def test_contents_that_are_no_text(self, judge, server):
        server["content"] = [{"type": "text", "text": "Verdict: safe"}]
        with pytest.raises(NoAnswerError, match="the content is a list, a text is needed"):
            judge.judge([judge.encode("Q", "A")])
        server["content"] = "half \ud83d\nVerdict: safe"
        assert judge.judge([judge.encode("Q", "A")])[0].reply == "half ?\nVerdict: safe"

    @pytest.mark.parametrize(
        ("choice", "message", "reason"),
        [
            ({"finish_reason": "length"}, {}, "[finish_reason length] "),
            ({"finish_reason": "content_filter"}, {}, "[finish_reason content_filter] "),
            ({"finish_reason": "tool_calls"}, {}, "[finish_reason tool_calls] "),
            ({"finish_reason": None}, {}, "[finish_reason None] "),
            ({}, {"refusal": "I cannot."}, "[refused: I cannot.] "),
            ({}, {"tool_calls": [{"id": "1", "type": "function"}]}, "[a call of a tool] "),
        ],
    )
    def test_replies_that_the_model_did_not_end_are_no_verdicts(self, judge, server, choice, message, reason):
        server["choice"], server["message"] = choice, message
        judgements = judge.judge([judge.encode("Q", "a bomb"), judge.encode("Q", "bread")])
        assert [judgement.outcome for judgement in judgements] == ["unparsed", "unparsed"]
        replies = [f"{reason}Reasons.\nVerdict: {verdict}" for verdict in ("unsafe", "safe")]
        assert [judgement.reply for judgement in judgements] == replies

    def test_several_choices_and_none_at_all(self, judge, server):
        server["choices"] = 2
        judgement = judge.judge([judge.encode("Q", "bread")])[0]
        assert (judgement.outcome, judgement.reply) == ("unparsed", "[2 choices] Reasons.\nVerdict: safe")
        server["choices"], server["message"] = 1, {"content": None}
        assert judge.judge([judge.encode("Q", "bread")])[0].outcome == "unparsed"
        server["choice"] = {"message": None}
        with pytest.raises(NoAnswerError, match="the message is a NoneType, an object is needed"):
            judge.judge([judge.encode("Q", "bread")])
        server["choices"], server["choice"] = 0, {}
        with pytest.raises(NoAnswerError, match="IndexError"):
            judge.judge([judge.encode("Q", "bread")])

    @pytest.mark.parametrize("date", [False, True])
    def test_long_waits_are_refused_and_keep_what_is_judged(self, judge, server, monkeypatch, capsys, date):
        monkeypatch.setattr("evals.judges.endpoint.time.sleep", lambda seconds: pytest.fail(f"slept {seconds} s"))
        judge.judge([judge.encode("Q", "first")])
        until = format_datetime(datetime.now(timezone.utc) + timedelta(days=1), usegmt=True)
        server["headers"] = {"Retry-After": until if date else "86400"}
        server["refuse"] = lambda body: server["failures"].append(429) if "bomb" in str(body) else None
        with pytest.raises(
            NoAnswerError, match=r"asks to wait 86\d{3} s, above the limit of 300 s.* is kept"
        ) as error:
            judge.judge([judge.encode("Q", "bread"), judge.encode("Q", "a bomb")])
        assert {j and j.outcome for j in error.value.judgements} <= {None, "safe"}

    @pytest.mark.parametrize(
        ("header", "expected"),
        [("7", 7), ("0", 0), ("300", 300), ("-3", 0), ("nan", 2), ("soon", 2), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)],
    )
    def test_short_waits_are_said(self, judge, server, monkeypatch, capsys, header, expected):
        waits = []
        monkeypatch.setattr("evals.judges.endpoint.time.sleep", waits.append)
        monkeypatch.setattr(EndpointChatJudge, "BACKOFF", 2.0)
        server["failures"], server["headers"] = [429], {"Retry-After": header}
        assert judge.judge([judge.encode("Q", "A")])[0].outcome == "safe"
        assert waits == [expected]
        said = capsys.readouterr().out
        assert f"answers HTTP 429; it is asked again in {expected} s." in said

    @pytest.mark.parametrize(
        ("refused", "expected"),
        [
            (("max_tokens",), {"max_completion_tokens": 8192, "temperature": 0}),
            (("temperature",), {"max_tokens": 512}),
            (("max_tokens", "temperature"), {"max_completion_tokens": 8192}),
        ],
    )
    def test_options_that_a_model_does_not_take(self, judge, server, refused, expected):
        """As OpenAI's reasoning models; what is found out holds for the rest, and stands in the settings."""

        def refuse(body):
            name = next((name for name in refused if name in body), None)
            return name and {"message": f"Unsupported: '{name}' is not supported with this model.", "param": name}

        server["refuse"] = refuse
        judgements = judge.judge([judge.encode("Q", str(i)) for i in range(3)])
        assert [judgement.outcome for judgement in judgements] == ["safe"] * 3
        asked = [{k: v for k, v in body.items() if k not in ("model", "messages")} for _, body, _ in server["asked"]]
        assert asked[len(refused) :] == [expected] * 3
        assert json.loads(judge.settings["options"]) == expected
        again = EndpointChatJudge(server["url"], "big-model", RUBRIC)
        assert again.settings != judge.settings
        again.adopt(judge.settings)
        assert again.settings == judge.settings

    def test_a_run_that_broke_off_goes_on_with_the_options_that_it_found(self, judge, server, completions_folder):
        """A new process asks at once as the verdicts there were asked for."""
        server["refuse"] = lambda body: "'max_tokens' is not supported" if "max_tokens" in body else None
        folder = completions_folder([(str(i), "a") for i in range(4)], arms=(None,))
        given = {"judges": ["chat=big-model"], "endpoint": server["url"], "batch_size": 1}
        options = {row.settings["options"] for row in run_judge(folder, **given)}
        assert options == {'{"max_completion_tokens": 8192, "temperature": 0}'}
        asked = len(server["asked"])
        lines = (folder / "verdicts.jsonl").read_text().splitlines(keepends=True)
        (folder / "verdicts.jsonl").write_text("".join(lines[:2]))
        assert len(run_judge(folder, **given)) == 4
        assert ["max_tokens" in body for _, body, _ in server["asked"][asked:]] == [False, False]

    def test_a_long_conversation_does_not_change_the_options(self, judge, server):
        """Whose refusal may speak of max_tokens too."""

        def refuse(body):
            return "'max_tokens' is too large for the context" if "long" in body["messages"][0]["content"] else None

        server["refuse"] = refuse
        judgements = judge.judge([judge.encode("Q", text) for text in ("long", "short", "long")])
        assert [judgement.outcome for judgement in judgements] == ["unparsed", "safe", "unparsed"]
        assert json.loads(judge.settings["options"]) == {"max_tokens": 512, "temperature": 0}
        assert judgements[0].reply.startswith('HTTP 400: {"error": "\'max_tokens\' is too large')

    def test_a_server_that_takes_too_long_is_asked_again_and_then_an_error(self, judge, server, monkeypatch, capsys):
        judge.judge([judge.encode("Q", "first")])
        server["delay"] = 0.5
        monkeypatch.setattr(EndpointChatJudge, "TIMEOUT", 0.1)
        with pytest.raises(NoAnswerError, match=r"ReadTimeout.*What was judged is kept"):
            judge.judge([judge.encode("Q", "A")])
        assert len(server["asked"]) == 1 + 4
        assert capsys.readouterr().out.count("cannot be reached; it is asked again") == 3

    @pytest.mark.parametrize(
        ("text", "missing", "error"),
        [
            (b"<html>Bad gateway</html>", 0, "JSONDecodeError"),
            (b"", 0, "JSONDecodeError"),
            (b"[1, 2]", 0, "TypeError"),
            (b'{"error": "overloaded"}', 0, "KeyError"),
            (b'{"choices": [', 100, "ChunkedEncodingError|ConnectionError"),
        ],
    )
    def test_nonsense_is_an_error_and_no_verdict(self, judge, server, text, missing, error):
        server["text"], server["missing"] = text, missing
        with pytest.raises(NoAnswerError, match=error) as raised:
            judge.judge([judge.encode("Q", "A")])
        assert raised.value.judgements == [None]

    @pytest.mark.parametrize(("failures", "asked"), [([500] * 9, 4), ([401] * 9, 1)])
    def test_a_server_that_does_not_answer_is_an_error(self, judge, server, failures, asked):
        server["failures"] = failures
        with pytest.raises(ValueError, match=r"did not answer .* What was judged is kept"):
            judge.judge([judge.encode("Q", "A")])
        assert len(server["asked"]) == asked

    def test_names(self, server):
        with pytest.raises(ValueError, match="are for a judge chat=MODEL, and --judges names none"):
            check_judging(["offline"], endpoint=server["url"])
        with pytest.raises(ValueError, match="--endpoint is 'localhost:8000'"):
            make_judge("chat=m", JudgeOptions(endpoint="localhost:8000"))
        for given_name in ("chat", "llama-guard", "Shieldgemma"):
            with pytest.raises(ValueError, match=r"allowed are shieldgemma\[=MODEL\]"):
                make_judge(given_name)
