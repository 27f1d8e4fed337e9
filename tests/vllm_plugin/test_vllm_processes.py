"""vLLM with several processes: the OpenAI-compatible server with adapters loaded at run time, and two ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests.vllm_plugin.conftest import ADAPTERS, assert_equal, engine, generate, prompts, request


def post(url, body):
    data = json.dumps(body).encode()
    question = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(question, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "base")]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enable-lora", "--max-loras", "2", "--max-cpu-loras", "4", "--max-lora-rank", "8", "--enforce-eager"]
    command += ["--max-model-len", "256", "--max-num-seqs", "8", "--lora-modules"]
    command += [f"{name}={folder / name}" for name in ("lora", "relu")]
    environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(log.read_text())
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def complete(server, name, prompt, length=8):
    body = {"model": name, "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True}
    status, answer = post(f"{server}/v1/completions", body | {"return_token_ids": True})
    assert status == 200, answer
    return json.loads(answer)["choices"][0]["token_ids"]


@pytest.mark.timeout(600)
def test_the_server(server, folder, reference):
    (prompt,) = prompts(1)
    for name in ("base", "lora", "relu"):
        assert complete(server, name, prompt) == reference.answer(name, prompt, 8)[0], name
    for name in ("sigmoid", "embedding"):
        status, answer = post(f"{server}/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder / name)})
        assert status == 200, answer
        assert complete(server, name, prompt) == reference.answer(name, prompt, 8)[0], name
    with urllib.request.urlopen(f"{server}/v1/models", timeout=60) as answer:
        served = {model["id"] for model in json.load(answer)["data"]}
    assert served == {"base", "lora", "relu", "sigmoid", "embedding"}
    status, answer = post(f"{server}/v1/unload_lora_adapter", {"lora_name": "sigmoid"})
    assert status == 200, answer
    assert complete(server, "relu", prompt) == reference.answer("relu", prompt, 8)[0]


@pytest.mark.parametrize(
    ("adapter", "served", "code", "said"),
    [
        ("lora", "lora", 0, "served model lora equals ours"),
        ("relu", "relu", 0, "served model relu equals ours"),
        ("relu", "base", 1, "served model base equals the base: the adapter is not applied"),
        ("relu", "lora", 1, "served model lora equals neither"),
    ],
)
def test_the_check_of_what_is_served(server, folder, capsys, adapter, served, code, said):
    from mono_peft.check import main

    found = main([str(folder / "base"), str(folder / adapter), "--endpoint", server, "--served-name", served])
    assert said in capsys.readouterr().out.splitlines()[-1]
    assert found == code


def test_what_a_client_is_told_of_an_adapter_that_is_refused(server, folder, tmp_path):
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in (folder / "relu").iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    options = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(options | {"format_version": 9}))
    status, answer = post(f"{server}/v1/load_lora_adapter", {"lora_name": "new", "lora_path": str(changed)})
    assert status >= 400
    assert "Upgrade mono-peft" in answer


@pytest.mark.timeout(600)
def test_two_ranks(folder, reference):
    names = ["base", *ADAPTERS]
    batch = [(name, prompt) for prompt in prompts(1) for name in names]
    ranks = {"tensor_parallel_size": 2, "max_loras": len(ADAPTERS)}
    with engine(folder, **ranks, fully_sharded_loras=True) as llm:
        assert_equal(generate(llm, folder, batch, 8), batch, reference, 8)


@pytest.mark.timeout(600)
def test_two_ranks_need_fully_sharded_adapters(folder, reference):
    """Without, o_proj and down_proj have a part of A x on each rank; LoRA, whose sum may come later, is served."""
    with engine(folder, tensor_parallel_size=2) as llm:
        for name in ("relu", "softplus"):
            with pytest.raises(RuntimeError, match="--fully-sharded-loras"):  # the worker's ValueError
                llm.llm_engine.add_lora(request(folder, name))
        batch = [(name, prompt) for prompt in prompts(1) for name in ("base", "lora", "identity")]
        assert_equal(generate(llm, folder, batch, 8), batch, reference, 8)
