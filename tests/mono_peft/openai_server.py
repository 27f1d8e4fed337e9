"""A server for the tests of `mono_peft.check`."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


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
