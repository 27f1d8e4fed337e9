"""`python -m mono_peft.check --endpoint`: servers that do and do not apply an adapter."""

import copy
from http.server import ThreadingHTTPServer

import pytest
import torch
from openai_server import Server
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.mono_peft.conftest import rewrite, save_adapter


@pytest.fixture
def server(small_model, adapter, tmp_path):
    """A server of the base, the adapter ("mine") and another one of the same shape."""
    server = Server(AutoTokenizer.from_pretrained(small_model))
    server.models["base"] = AutoModelForCausalLM.from_pretrained(small_model)
    for name, folder in (("mine", adapter), ("other", save_adapter(small_model, tmp_path / "other", seed=2))):
        server.models[name] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_model), folder)
        server.parents[name] = "base"
    return server


@pytest.fixture
def check_served(server, check, adapter):
    def run(name="mine"):
        with server.running() as url:
            return check(adapter, "--endpoint", url, "--served-name", name)

    return run


EQUALS = "all is right: the model holds the file's tensors, its outputs differ from the base's, and served model mine"


class TestServed:
    def test_the_adapter(self, check_served):
        result = check_served()
        assert (result.code, result.last) == (0, f"{EQUALS} equals ours")
        line = result.table["served mine"]
        assert "; base there from the base " in line
        ours, base = (float(line.split(" from ")[i].split()[-2 if i == 0 else -1]) for i in (0, 1))
        assert ours < 1e-5 < 1e-2 < base

    def test_a_base_that_the_server_does_not_name(self, server, check_served):
        server.parents.clear()
        result = check_served()
        assert (result.code, result.last) == (0, f"{EQUALS} equals ours")
        assert "base there" not in result.table["served mine"]

    def test_the_base(self, server, check_served):
        server.models["mine"] = server.models["base"]
        result = check_served()
        assert result.code == 1
        assert result.last == "served model mine equals the base: the adapter is not applied"

    def test_another_adapter(self, check_served):
        result = check_served("other")
        assert result.code == 1
        assert result.last.startswith("served model other equals neither the adapter nor the base (nearer to ")

    @pytest.mark.parametrize("change", ["half the scale", "a module is dropped"])
    def test_a_part_of_the_adapter(self, server, check_served, change):
        layers = [m for m in server.models["mine"].modules() if hasattr(m, "monolora_encoder")]
        for layer in layers if change == "half the scale" else layers[:3]:
            layer.set_scale("default", 0.5 if change == "half the scale" else 0)
        result = check_served()
        assert result.code == 1
        assert result.last.startswith("served model mine equals neither the adapter nor the base (nearer to ours: ")

    @pytest.mark.parametrize("served", ["mine", "base"])
    @pytest.mark.parametrize("known", [True, False])
    def test_lower_precision_does_not_matter(self, server, check_served, served, known):
        server.models["mine"] = copy.deepcopy(server.models[served]).bfloat16()
        server.models["base"].bfloat16()
        if not known:
            server.parents.clear()
        assert check_served().code == (served != "mine")

    @pytest.mark.parametrize("served", ["mine", "base"])
    def test_an_adapter_within_rounding_is_not_told_apart(self, server, adapter, small_model, check_served, served):
        rewrite(adapter, lambda tensors: {n: v * 1e-3 if "decoder" in n else v for n, v in tensors.items()})
        weak = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_model), adapter)
        server.models["mine"] = (weak if served == "mine" else copy.deepcopy(server.models["base"])).bfloat16()
        server.models["base"].bfloat16()
        result = check_served()
        assert result.code == 1
        assert result.last.startswith("adapter and base are too alike on the prompts to tell which is served: ")

    def test_another_base(self, server, check_served):
        for name in ("base", "mine"):
            for p in server.models[name].parameters():
                p.data += 0.1 * torch.randn_like(p, generator=torch.Generator().manual_seed(0))
        result = check_served()
        assert result.code == 1
        assert result.last.startswith("base, the server's base model, is ")
        assert result.last.endswith(" nats from BASE: it is another model, or of a much lower precision")


class TestServedTexts:
    @pytest.fixture(autouse=True)
    def texts_only(self, server):
        server.tells_log_probabilities = False

    def test_the_adapter(self, check_served):
        result = check_served()
        assert (result.code, result.last) == (0, f"{EQUALS} equals ours")
        assert result.table["served mine"].startswith("3 of 3 equal ours, ")
        assert result.table["served mine"].endswith(" (the server tells no log-probabilities: greedy texts)")

    def test_a_server_that_fails_to_list_its_models(self, server, check_served):
        server.lists = False
        assert check_served().code == 0
        assert check_served("relu").last.endswith("; it lists no models, and not relu")

    def test_the_base(self, check_served):
        result = check_served("base")
        assert (result.code, result.last) == (1, "served model base equals the base: the adapter is not applied")

    def test_another_adapter(self, check_served):
        result = check_served("other")
        assert result.code == 1
        assert "served model other equals neither the adapter nor the base (of 3 greedy texts " in result.last

    def test_texts_that_do_not_tell(self, adapter, check_served):
        rewrite(adapter, lambda tensors: {n: v * 1e-6 if "decoder" in n else v for n, v in tensors.items()})
        result = check_served("base")
        assert result.code == 1
        assert result.last.startswith("adapter and base write the same greedy texts: they are too alike to tell")


class TestServersThatDoNotAnswer:
    @pytest.fixture
    def server(self):
        """A server that is not asked for what a model computes."""
        server = Server(tokenizer=None)
        server.models = {"base": None, "mine": None}
        return server

    def test_no_server(self, check, adapter):
        with ThreadingHTTPServer(("127.0.0.1", 0), None) as http:
            url = f"http://127.0.0.1:{http.server_port}"
        result = check(adapter, "--endpoint", url, "--served-name", "mine")
        assert (result.code, result.last) == (
            1, f"{url}/v1/models is not reached: [Errno 111] Connection refused"
        )  # fmt: skip

    def test_no_url(self, check, adapter):
        result = check(adapter, "--endpoint", "localhost:8000", "--served-name", "mine")
        assert (result.code, result.last) == (1, "--endpoint localhost:8000 is no URL such as http://localhost:8000")

    def test_a_name_that_is_not_served(self, check_served):
        result = check_served("relu")
        assert result.code == 1
        assert "answers 404 Not Found" in result.last
        assert result.last.endswith("The model `relu` does not exist.; it lists base, mine, and not relu")

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ((500, {"error": {"message": "CUDA out of memory"}}), "answers 500 Internal Server Error to http"),
            ((500, {"error": {"message": "CUDA out of memory"}}), "/v1/completions: CUDA out of memory"),
            ((503, "<html>proxy</html>"), "answers 503 Service Unavailable to http"),
            ((200, "<html>hello</html>"), "/v1/completions answers no JSON: <html>hello</html>"),
            ((200, {"object": "nothing"}), "/v1/completions answers no completion: {'object': 'nothing'}"),
            ((200, [1]), "/v1/completions answers no completion: [1]"),
            ((200, {"choices": [{"text": "", "logprobs": {"tokens": ["token_id:x"]}}]}), "answers no completion"),
            (
                (200, {"choices": [{"text": ""}], "usage": {"prompt_tokens": 999}}),
                "as 999 tokens, the tokenizer of BASE as",
            ),
        ],
    )
    def test_errors_and_garbage(self, server, check_served, answer, message):
        server.answer = answer
        result = check_served()
        assert result.code == 1
        assert message in result.last
        assert "tensors" not in result.table, "nothing is loaded before the server has answered"

    @pytest.mark.parametrize(
        ("told", "message"),
        [
            ({"token_id:7": float("nan")}, "the server tells log-probabilities that are NaN or infinite"),
            (
                {"token_id:4000": -1.0},
                "the server tells of token 4000, and BASE has 400 tokens: the server has another",
            ),
        ],
    )
    def test_nonsense(self, server, check_served, told, message):
        logprobs = {"tokens": ["token_id:7"], "token_logprobs": [-1.0], "top_logprobs": [told]}
        server.answer = (200, {"choices": [{"text": "a", "logprobs": logprobs}]})
        result = check_served()
        assert result.code == 1
        assert message in result.last

    def test_nothing_generated(self, server, check_served):
        empty = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        server.answer = (200, {"choices": [{"text": "", "logprobs": empty}]})
        assert check_served().last == "the server generated no tokens after any prompt"

    def test_both_options_or_none(self, check, adapter, capsys):
        with pytest.raises(SystemExit) as stop:
            check(adapter, "--endpoint", "http://localhost:8000")
        assert stop.value.code == 2
        assert "--endpoint and --served-name go together" in capsys.readouterr().err
