"""`python -m mono_peft.serve`: the folder that it makes, what it refuses, and a server that answers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import constants
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mono_peft.run
import mono_peft.serve
from mono_peft import MonoLoraConfig
from mono_peft.serve import link_files, main

pytestmark = pytest.mark.skipif(
    Version("0.20") > Version(peft.__version__), reason="transformers' own integration asks for PEFT 0.20"
)
OPTIONS = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
MODULE = "base_model.model.model.layers.0.self_attn.q_proj.monolora_encoder.weight"


@pytest.fixture
def save_adapter(small_model, tmp_path):
    """A function that saves an adapter on the small model, with random weights that change its output."""

    def save(config=None, name="my-adapter"):
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(small_model), config or MonoLoraConfig(**OPTIONS))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What main() starts in place of the server: its arguments and folder, and the logits of what it would load."""
    seen = {}
    ids = torch.arange(4, 24)[None]

    def run(arguments):
        seen["arguments"], seen["folder"] = arguments, Path.cwd() / arguments[2]
        seen["logits"] = AutoModelForCausalLM.from_pretrained(arguments[2])(ids).logits

    monkeypatch.setattr(mono_peft.run, "main", run)
    monkeypatch.setattr(mono_peft.serve, "is_serve_available", lambda: True)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)  # read TMPDIR anew
    handler = signal.getsignal(signal.SIGTERM)
    yield seen
    signal.signal(signal.SIGTERM, handler)
    assert list((tmp_path / "temporary").iterdir()) == []


def reference(base, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    return model(torch.arange(4, 24)[None]).logits


@pytest.mark.parametrize(
    "config",
    [
        MonoLoraConfig(**OPTIONS),
        MonoLoraConfig(
            **OPTIONS | {"target_modules": ["embed_tokens", "lm_head", "down_proj"]}, activation="softplus"
        ),
        MonoLoraConfig(**OPTIONS, modules_to_save=["lm_head"], trainable_token_indices=[5, 6], use_rslora=True),
        LoraConfig(**OPTIONS),
    ],
    ids=["monolora", "embeddings", "modules_to_save", "lora"],
)
def test_the_server_gets_the_base_with_the_adapter(small_model, save_adapter, started, config):
    adapter, before = save_adapter(config), Path.cwd()
    main([str(small_model), str(adapter), "--port", "8123", "--device", "cpu", "--no-such-option"])
    assert started["arguments"][:2] == ["transformers", "serve"]
    assert started["arguments"][3:] == ["--port", "8123", "--device", "cpu", "--no-such-option"]
    assert torch.equal(started["logits"], reference(small_model, adapter))
    base = AutoModelForCausalLM.from_pretrained(small_model)(torch.arange(4, 24)[None]).logits
    assert (started["logits"] - base).abs().max() > 1e-2
    assert Path.cwd() == before


def test_the_user_is_told_address_and_name(small_model, save_adapter, started, capsys):
    adapter = save_adapter(name="my adapter@v2:a")
    main([str(small_model), str(adapter), "--host=0.0.0.0", "--port=8123"])
    assert started["folder"].name == "my-adapter-v2-a"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "http" in line]
    assert line.startswith("Model 'my-adapter-v2-a' at http://0.0.0.0:8123/v1")
    assert "chat/completions" in line
    (small_model / "chat_template.jinja").unlink()
    main([str(small_model), str(adapter)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "http" in line]
    assert "http://localhost:8000/v1" in line
    assert "no chat template" in line
    assert '{"model": "my-adapter-v2-a", "prompt": "Hello", "max_tokens": 32}' in line


@pytest.mark.parametrize("end", [RuntimeError("out of memory"), KeyboardInterrupt(), SystemExit(1)])
def test_the_folder_goes_however_the_server_ends(small_model, save_adapter, started, monkeypatch, end):
    def fail(arguments):
        assert Path(arguments[2], "model.safetensors").is_file()
        raise end

    monkeypatch.setattr(mono_peft.run, "main", fail)
    with pytest.raises(type(end)):  # and `started` looks for what is left
        main([str(small_model), str(save_adapter())])


def test_names_on_the_hub_come_from_the_cache(small_model, save_adapter, started):
    adapter = save_adapter()
    for name, folder in {"org--base": small_model, "org--tuned": adapter}.items():
        cached = Path(constants.HF_HUB_CACHE, f"models--{name}")
        (cached / "snapshots").mkdir(parents=True)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("a" * 40)
        (cached / "snapshots" / ("a" * 40)).symlink_to(folder)
    with pytest.warns(UserWarning, match=r"trained on .*/model', and is served on 'org/base'"):
        main(["org/base", "org/tuned"])
    assert started["folder"].name == "tuned"
    assert torch.equal(started["logits"], reference(small_model, adapter))


class TestFolder:
    def names(self, folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    def test_it_is_links_to_both(self, small_model, save_adapter, tmp_path):
        adapter = save_adapter()
        (small_model / "more").mkdir()
        (small_model / "more" / "code.py").write_text("")
        (adapter / "optimizer.pt").write_text("")
        link_files(small_model, adapter, tmp_path / "links")
        adapters = {"adapter_config.json", "adapter_model.safetensors"}
        assert self.names(tmp_path / "links") == self.names(small_model) | adapters
        for name in self.names(tmp_path / "links"):
            source = adapter if name in adapters else small_model
            assert (tmp_path / "links" / name).readlink() == source / name

    @pytest.mark.parametrize("hard_links", [True, False])
    def test_copies_where_there_are_no_links(self, small_model, save_adapter, tmp_path, monkeypatch, hard_links):
        def refuse(*_):
            raise OSError("not permitted")

        monkeypatch.setattr(Path, "symlink_to", refuse)
        if not hard_links:
            monkeypatch.setattr(os, "link", refuse)
        adapter = save_adapter()
        link_files(small_model, adapter, tmp_path / "copies")
        for name in self.names(tmp_path / "copies"):
            copy, source = tmp_path / "copies" / name, (adapter if name.startswith("adapter_") else small_model) / name
            assert not copy.is_symlink()
            assert copy.samefile(source) == hard_links
            assert copy.read_bytes() == source.read_bytes()

    def test_the_adapters_tokenizer_replaces_the_base_s_as_a_whole(self, small_model, save_adapter, tmp_path):
        adapter = save_adapter()
        tokenizer = AutoTokenizer.from_pretrained(small_model)
        tokenizer.chat_template = "{{ messages[0]['content'] }}!"
        tokenizer.save_pretrained(adapter)
        (small_model / "special_tokens_map.json").write_text('{"eos_token": "<|user|>"}')  # which would win
        link_files(small_model, adapter, tmp_path / "links")
        served = AutoTokenizer.from_pretrained(tmp_path / "links")
        assert served.apply_chat_template([{"role": "user", "content": "a film"}], tokenize=False) == "a film!"
        assert served.eos_token == "<|end|>"

    def test_a_chat_template_alone_goes_with_the_base_s_tokenizer(self, small_model, save_adapter, tmp_path):
        adapter = save_adapter()
        (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}?")
        link_files(small_model, adapter, tmp_path / "links")
        served = AutoTokenizer.from_pretrained(tmp_path / "links")
        assert served.apply_chat_template([{"role": "user", "content": "a film"}], tokenize=False) == "a film?"
        assert served.get_vocab() == AutoTokenizer.from_pretrained(small_model).get_vocab()

    def test_a_tokenizer_with_other_tokens_is_refused(self, small_model, save_adapter, tmp_path):
        adapter = save_adapter()
        tokenizer = AutoTokenizer.from_pretrained(small_model)
        tokenizer.add_tokens(["<|new|>"])
        tokenizer.save_pretrained(adapter)
        with pytest.raises(ValueError, match="other tokens than that of the base"):
            link_files(small_model, adapter, tmp_path / "links")


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def pickle_the_weights(base, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def change_weights(change):
    return lambda base, adapter: change_tensors(adapter / "adapter_model.safetensors", change)


def further_layer(tensors):
    tensors.update({name.replace("layers.0", "layers.2"): tensor.clone() for name, tensor in tensors.items()})


REFUSALS = {
    "the adapter folder .* has no adapter_config.json": lambda base, adapter: (
        adapter / "adapter_config.json"
    ).unlink(),
    "has no adapter_model.safetensors. Weights in other formats .* unpickling runs code": pickle_the_weights,
    "PEFT cannot read .*adapter_config.json: KeyError": lambda base, adapter: change_json(
        adapter / "adapter_config.json", peft_type="FROM_THE_FUTURE"
    ),
    "saved in format 99; this mono_peft reads": lambda base, adapter: change_json(
        adapter / "adapter_config.json", format_version=99
    ),
    "is an activated adapter .* would never act": lambda base, adapter: change_json(
        adapter / "adapter_config.json", alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"
    ),
    "adapter_model.safetensors cannot be read": lambda base, adapter: (
        adapter / "adapter_model.safetensors"
    ).write_bytes((adapter / "adapter_model.safetensors").read_bytes()[:-8]),
    "1 tensors of this adapter hold NaN": change_weights(lambda tensors: tensors[MODULE].fill_(float("nan"))),
    "holds an adapter_config.json of its own": lambda base, adapter: (base / "adapter_config.json").write_text("{}"),
    "has no config.json": lambda base, adapter: (base / "config.json").unlink(),
    "has neither model.safetensors nor model.safetensors.index.json": lambda base, adapter: (
        base / "model.safetensors"
    ).rename(base / "pytorch_model.bin"),
    "Neither base nor adapter has a tokenizer": lambda base, adapter: [path.unlink() for path in base.glob("tok*")],
    "names OfTheFuture, which is no model of transformers": lambda base, adapter: change_json(
        base / "config.json", architectures=["OfTheFuture"]
    ),
    r"4 tensors belong to nothing in the base \(model.layers.2.self_attn.q_proj": change_weights(further_layer),
    r"1 tensors are missing in the adapter's file \(model.layers.0.self_attn.q_proj": change_weights(
        lambda tensors: tensors.pop(MODULE)
    ),
    r"have another shape \(.*monolora_encoder.* \[4, 32\], not \[8, 32\]": lambda base, adapter: change_json(
        adapter / "adapter_config.json", r=8
    ),
    "does not fit the base: Target modules .* not found": lambda base, adapter: change_json(
        adapter / "adapter_config.json", target_modules=["in_proj"]
    ),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_cannot_be_served_right_is_refused(small_model, save_adapter, started, message):
    adapter = save_adapter()
    REFUSALS[message](small_model, adapter)
    with pytest.raises(SystemExit, match=f"(?i)mono_peft.serve: .*{message}"):
        main([str(small_model), str(adapter)])
    assert started == {}


def test_an_adapter_that_transformers_loads_in_part_is_refused(small_model, save_adapter, started):
    adapter = save_adapter(LoraConfig(**OPTIONS, use_dora=True))
    assert reference(small_model, adapter).isfinite().all()  # PEFT loads it
    with pytest.raises(SystemExit, match=r"4 tensors are missing .*lora_magnitude_vector.*such as DoRA"):
        main([str(small_model), str(adapter)])
    assert started == {}


def test_names_that_lead_nowhere(small_model, save_adapter, started, monkeypatch):
    with pytest.raises(SystemExit, match=r"'no/such-model' is no folder and cannot be had from the hub \("):
        main(["no/such-model", str(save_adapter())])
    with pytest.raises(SystemExit, match=r"'/no/such folder' is no folder and cannot be had from the hub \("):
        main([str(small_model), "/no/such folder"])
    for arguments in ([], ["--help"], [str(small_model)], [str(small_model), "--port"]):
        with pytest.raises(SystemExit, match=r"python -m mono_peft\.serve BASE ADAPTER"):
            main(arguments)
    monkeypatch.setattr(mono_peft.serve, "is_serve_available", lambda: False)
    with pytest.raises(SystemExit, match=r'pip install "mono-peft\[serve\]"'):
        main([str(small_model), str(save_adapter())])
    assert started == {}


def ask(address, endpoint, **body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/v1/{endpoint}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]


def test_a_server_answers_as_peft_does(small_model, save_adapter, tmp_path):
    pytest.importorskip("uvicorn")
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    words = tokenizer.convert_tokens_to_ids(["a", "Ġfilms", "Sentiment", ":", "Ġpositive", "Ġnegative", "Ġsentence"])
    # Words only: bytes of a random model would all be shown as the same question mark.
    change_json(small_model / "generation_config.json", suppress_tokens=[i for i in range(400) if i not in words])
    adapter = save_adapter(MonoLoraConfig(**OPTIONS | {"target_modules": "all-linear"}))
    base = AutoModelForCausalLM.from_pretrained(small_model)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_model), adapter).eval()
    chat = [{"role": "user", "content": "a film"}]
    prompts = {
        "completions": tokenizer("a film", return_tensors="pt"),
        "chat": tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True),
    }
    expected = {}
    for endpoint, inputs in prompts.items():
        texts = [
            tokenizer.decode(
                m.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
            )
            for m in (model, base)
        ]
        assert texts[0] != texts[1]
        expected[endpoint] = texts[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, temporary = f"http://127.0.0.1:{port}", tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "mono_peft.serve", small_model, adapter, "--host", "127.0.0.1"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*map(str, command), "--port", str(port), "--device", "cpu"],
            env=os.environ | {"TMPDIR": str(temporary)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=60).close()
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        options = {"model": "my-adapter", "max_tokens": 12, "temperature": 0}
        assert ask(address, "completions", prompt="a film", **options)["text"] == expected["completions"]
        answer = ask(address, "chat/completions", messages=chat, **options)
        assert answer["message"]["content"] == expected["chat"]
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(address, "completions", prompt="a film", **options | {"model": "another"})
        assert len(list(temporary.glob("mono-peft-serve-*/my-adapter/adapter_model.safetensors"))) == 1
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == -signal.SIGTERM
    finally:
        server.kill()
        server.wait()
    assert list(temporary.glob("mono-peft-serve-*")) == []
    assert f"Model 'my-adapter' at {address}/v1" in (tmp_path / "log").read_text()
