"""`python -m mono_peft.check`: adapters that are and are not what their file says, and servers that do and do not
apply them."""

import copy
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mono_peft import MonoLoraConfig
from mono_peft.check import PROMPTS as ALL_PROMPTS
from mono_peft.check import main

PROMPTS = ALL_PROMPTS[:3]


@pytest.fixture(autouse=True)
def fewer_prompts(monkeypatch):
    """Three prompts tell of these models what eight do."""
    monkeypatch.setattr("mono_peft.check.PROMPTS", PROMPTS)


def save_adapter(base, folder, config=MonoLoraConfig, seed=1, **options):
    """An adapter that changes the outputs (B is not zero), saved in `folder`."""
    torch.manual_seed(seed)
    random = {"init_weights" if config is MonoLoraConfig else "init_lora_weights": False}
    options = random | {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config(**options)).save_pretrained(folder)
    return folder


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.fixture
def adapter(small_model, tmp_path):
    return save_adapter(small_model, tmp_path / "adapter")


@pytest.fixture
def check(capsys, small_model):
    """Run the command, and return the exit code, the table as a dict and the last line."""

    def run(adapter, *options, base=small_model):
        code = main([str(base), str(adapter), *options])
        *table, last = capsys.readouterr().out.strip().splitlines()
        return SimpleNamespace(code=code, table={line[:20].strip(): line[21:] for line in table}, last=last)

    return run


def by_hand(base, adapter):
    """KL(adapter, base) a token and the largest difference of log-probabilities, prompt by prompt."""
    tokenizer, without = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(copy.deepcopy(without), adapter)
    divergences, largest = [], 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        p, q = model(ids).logits[0].double().softmax(-1), without(ids).logits[0].double().softmax(-1)
        divergences.append((p * (p / q).log()).sum(-1))
        largest = max(largest, (p.log() - q.log()).abs().max().item())
    return torch.cat(divergences).mean().item(), largest


@pytest.mark.parametrize("config", [MonoLoraConfig, LoraConfig])
def test_an_adapter_that_is_applied(check, small_model, tmp_path, config):
    adapter = save_adapter(small_model, tmp_path / "adapter", config, modules_to_save=["lm_head"])
    result = check(adapter)
    assert result.code == 0
    assert result.last == "all is right: the model holds the file's tensors, its outputs differ from the base's"
    assert result.table["tensors"] == "29 in the file, 29 of them equal in the model"
    assert result.table["B"] == "is zero in 0 of 14 modules"
    divergence, largest = by_hand(small_model, adapter)
    assert float(result.table["KL(adapter, base)"].split()[0]) == pytest.approx(divergence, rel=5e-3)
    assert float(result.table["log-probabilities"].split()[5]) == pytest.approx(largest, rel=5e-3)
    if config is MonoLoraConfig:
        assert result.table["adapter"] == f"MONOLORA of rank 4, saved for {small_model}"
        assert result.table["live units"].endswith("%, fire on the prompts")
    else:
        assert "live units" not in result.table


@pytest.mark.parametrize("config", [MonoLoraConfig, LoraConfig])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_embeddings_and_a_base_of_lower_precision(check, small_model, tmp_path, config):
    """The file holds the base's embedding too, in float32."""
    adapter = save_adapter(small_model, tmp_path / "adapter", config, target_modules=["embed_tokens", "q_proj"])
    result = check(adapter, "--dtype", "bfloat16")
    assert (result.code, result.table["tensors"]) == (0, "7 in the file, 7 of them equal in the model"), result.last


@pytest.mark.parametrize("config", [MonoLoraConfig, LoraConfig])
def test_an_activated_adapter_is_invoked(check, small_model, tmp_path, config):
    adapter = save_adapter(
        small_model, tmp_path / "adapter", config, task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]
    )
    assert check(adapter).code == 0
    served = check(adapter, "--endpoint", "http://localhost:1", "--served-name", "mine")
    assert served.last.endswith("is an activated adapter, and those are checked without a server only")


def test_dead_units_are_counted(check, adapter):
    def kill_half(tensors):
        for name, tensor in tensors.items():
            if "encoder" in name:
                tensor[:2] = 0
        return tensors

    rewrite(adapter, kill_half)
    live = float(check(adapter).table["live units"].split("%")[0])
    assert 25 <= live <= 50


class TestWrongAdapters:
    @pytest.mark.filterwarnings("ignore:Found missing adapter keys")
    def test_renamed_tensors_of_lora(self, check, small_model, tmp_path):
        """What `torch.compile` makes of the names: PEFT warns, and applies nothing."""
        adapter = save_adapter(small_model, tmp_path / "adapter", LoraConfig)
        rewrite(adapter, lambda tensors: {n.replace(".layers.", "._orig_mod.layers."): v for n, v in tensors.items()})
        result = check(adapter)
        assert result.code == 1
        assert "28 tensors of the file are not in the model: base_model.model.model._orig_mod.layers.0" in result.last
        assert "28 tensors of the adapter in the model are not in the file: base_model.model.model.lay" in result.last
        assert result.table["tensors"] == "28 in the file, 0 of them equal in the model"

    @pytest.mark.filterwarnings("ignore:Found missing adapter keys")
    def test_one_tensor_is_missing(self, check, small_model, tmp_path):
        adapter = save_adapter(small_model, tmp_path / "adapter", LoraConfig)
        rewrite(adapter, lambda tensors: dict(list(tensors.items())[1:]))
        result = check(adapter)
        assert (result.code, result.table["tensors"]) == (1, "27 in the file, 27 of them equal in the model")
        assert result.last.startswith("1 tensors of the adapter in the model are not in the file: base_model.model")

    def test_a_renamed_tensor_of_monolora(self, check, adapter):
        rewrite(adapter, lambda tensors: {n.replace("layers.0.mlp.up", "layers.0.up"): v for n, v in tensors.items()})
        result = check(adapter)
        assert result.code == 1
        assert "tensors" in result.last
        assert "layers.0.mlp.up_proj.monolora_" in result.last

    def test_a_loader_that_changes_values(self, check, adapter, monkeypatch):
        load = PeftModel.load_adapter

        def rounded(self, *args, **kwargs):
            result = load(self, *args, **kwargs)
            next(p for n, p in self.named_parameters() if "decoder" in n).data[0, 0] += 1e-3
            return result

        monkeypatch.setattr(PeftModel, "load_adapter", rounded)
        result = check(adapter)
        assert (result.code, result.table["tensors"]) == (1, "28 in the file, 27 of them equal in the model")
        assert result.last.startswith("1 tensors of the file have other values in the model: base_model.model.")

    @pytest.mark.parametrize("config", [MonoLoraConfig, LoraConfig])
    def test_an_adapter_that_is_not_trained(self, check, small_model, tmp_path, config):
        random = {"init_weights" if config is MonoLoraConfig else "init_lora_weights": True}
        result = check(save_adapter(small_model, tmp_path / "adapter", config, **random))
        assert result.code == 1
        assert result.table["B"] == "is zero in 14 of 14 modules"
        assert result.last == "B is zero in all modules, and the outputs are the base's: the adapter is not trained"

    def test_an_adapter_whose_units_are_all_dead(self, check, adapter):
        rewrite(adapter, lambda tensors: {n: v * 0 if "encoder" in n else v for n, v in tensors.items()})
        result = check(adapter)
        assert (result.code, result.table["live units"]) == (1, "0.0%, fire on the prompts")
        assert result.last == "the outputs equal the base's on all prompts: the adapter does nothing"

    def test_nan(self, check, adapter):
        rewrite(adapter, lambda tensors: {n: v / 0 if "0.mlp.up" in n else v for n, v in tensors.items()})
        result = check(adapter)
        assert result.code == 1
        assert "2 tensors of this adapter hold NaN or infinity" in result.last

    @pytest.mark.parametrize("config", [MonoLoraConfig, LoraConfig])
    @pytest.mark.filterwarnings("ignore:Some weights of", "ignore:Found missing adapter keys")
    def test_a_base_of_other_shapes(self, check, small_model, tmp_path, config):
        sizes = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2}
        other = tmp_path / "other"
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(other)
        AutoTokenizer.from_pretrained(small_model).save_pretrained(other)
        result = check(save_adapter(small_model, tmp_path / "adapter", config), base=other)
        assert result.code == 1
        assert "22 tensors of the file have other shapes than in the model, such as base_model.model." in result.last
        assert ".weight: (32, 4) in the file, (16, 4) in the model. The adapter is of another base" in result.last

    def test_a_base_with_other_modules(self, check, small_model, gpt2, tmp_path):
        gpt2.resize_token_embeddings(400)
        gpt2.save_pretrained(tmp_path / "other")
        AutoTokenizer.from_pretrained(small_model).save_pretrained(tmp_path / "other")
        adapter = save_adapter(small_model, tmp_path / "adapter", LoraConfig, target_modules=["q_proj"])
        result = check(adapter, base=tmp_path / "other")
        assert result.code == 1
        assert result.last.startswith(f"the adapter cannot be loaded on {tmp_path / 'other'}: ")
        assert "q_proj" in result.last


class TestFilesThatAreNoAdapter:
    def test_another_method(self, check, small_model, tmp_path):
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        get_peft_model(AutoModelForCausalLM.from_pretrained(small_model), config).save_pretrained(tmp_path / "adapter")
        result = check(tmp_path / "adapter")
        assert result.code == 1
        assert result.last.endswith("is a PREFIX_TUNING adapter: only LORA and MONOLORA are checked")

    def test_another_task(self, check, adapter):
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "SEQ_CLS"}))
        assert check(adapter).last.endswith("is for SEQ_CLS: only adapters of causal language models are checked")

    def test_a_newer_format(self, check, adapter):
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 9}))
        result = check(adapter)
        assert (result.code, result.table) == (1, {})
        assert "is not readable: This adapter was saved in format 9" in result.last

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_folder_without_its_files(self, check, adapter, name):
        (adapter / name).unlink()
        result = check(adapter)
        assert (result.code, result.last) == (
            1, f"the folder {adapter} is no adapter that can be checked: it has no {name}"
        )  # fmt: skip

    def test_a_file_that_is_cut_off(self, check, adapter):
        path = adapter / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        assert check(adapter).last.endswith("fetch it again")

    def test_no_folder(self, check):
        result = check("no/such-adapter")
        assert (result.code, result.table) == (1, {})
        assert result.last.startswith("no/such-adapter is no folder, and no adapter on the hub: ")

    def test_a_base_that_is_none(self, check, adapter, tmp_path):
        result = check(adapter, base=tmp_path)
        assert result.code == 1
        assert result.last.startswith(f"the base {tmp_path} has no tokenizer that can be read: ")

    def test_a_base_with_an_adapter_inside(self, check, small_model, adapter):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (small_model / name).write_bytes((adapter / name).read_bytes())
        result = check(adapter)
        assert result.code == 1
        assert "has an adapter_config.json, and transformers loads that adapter too" in result.last


class Server:
    """An OpenAI-compatible server of transformers' models that answers as vLLM does, or as `transformers serve`."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.models = {}  # by name
        self.parents = {}  # name -> name of the base
        self.lists = True  # whether it answers what models it has
        self.tells_log_probabilities = True
        self.answer = None  # status and body for every completion, in place of a model's

    def listed(self):
        return {"data": [{"id": name, "parent": self.parents.get(name)} for name in self.models]}

    def complete(self, body):
        if self.answer is not None:
            return self.answer
        if not self.tells_log_probabilities and "return_tokens_as_token_ids" in body:
            return 422, {"detail": "Unexpected fields in the request: {'return_tokens_as_token_ids'}"}
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        model = self.models[body["model"]]
        assert body["temperature"] == 0
        ids = self.tokenizer(body["prompt"], return_tensors="pt").input_ids
        told = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        length = ids.shape[1]
        for _ in range(body["max_tokens"]):
            with torch.no_grad():
                top = model(ids).logits[0, -1].float().log_softmax(-1).topk(body["logprobs"])
            names = [f"token_id:{token}" for token in top.indices.tolist()]
            told["tokens"].append(names[0])
            told["token_logprobs"].append(top.values[0].item())
            told["top_logprobs"].append(dict(zip(names, top.values.tolist(), strict=True)))
            ids = torch.cat([ids, top.indices[None, :1]], 1)
            if ids[0, -1] == self.tokenizer.eos_token_id:
                break
        text = self.tokenizer.decode(ids[0, length:], skip_special_tokens=True)
        choice = {"text": text, "logprobs": told if self.tells_log_probabilities else None}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": length}}

    @contextmanager
    def running(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(200 if server.lists else 500, server.listed() if self.path == "/v1/models" else {})

            def do_POST(self):
                assert self.path == "/v1/completions"
                self.reply(*server.complete(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

            def reply(self, status, answer):
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
            thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield f"http://127.0.0.1:{http.server_port}"
            finally:
                http.shutdown()
                thread.join()


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
