"""A stand-in for vLLM's server, strict about the documented fields, answering with plain peft on the tiny model.

It shares no code with the engine under test: adapters are read by peft from the folders it is told, tokens come from a
plain loop over the whole sequence.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from xpert.experts.engines.torch_lora import TorchEngine
from xpert.experts.engines.vllm_engine import VllmEngine, VllmOptions
from xpert.language_model import LanguageModel, load_model
from xpert.protocols import EngineRequest, Sampling, WeightedExperts

SHAPES: dict[str, dict[str, Any]] = {
    "a": {"r": 4},
    "b": {"r": 8, "use_rslora": True, "lora_alpha": 4},
    "c": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "d": {"r": 4, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
}
MAX_LOGPROBS = 20


def whole(low: int, high: float = float("inf")) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def number(low: float, high: float, *, above: bool = False) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, float) and low <= value <= high and not (above and value == low)


def listed(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


def text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def yes(value: Any) -> bool:
    return value is True


# The fields of vLLM's CompletionRequest (0.33) that the engine may send, with what SamplingParams takes for each.
COMPLETION: dict[str, Callable[[Any], bool]] = {
    "model": text,
    "prompt": listed(whole(0)),
    "max_tokens": whole(1),
    "temperature": lambda value: value == 0.0 or number(0.01, 2.0)(value),
    "top_p": number(0.0, 1.0, above=True),
    "top_k": whole(0),
    "min_p": number(0.0, 1.0),
    "repetition_penalty": number(0.0, 1e9, above=True),
    "seed": whole(-(2**63), 2**63 - 1),
    "stop": listed(text),
    "stop_token_ids": listed(whole(0)),
    "logprobs": whole(0, MAX_LOGPROBS),
    "logprob_token_ids": listed(whole(0)),
    "structured_outputs": lambda value: (
        [{"json": text, "regex": text, "choice": listed(text)}[name](given) for name, given in value.items()] == [True]
    ),
    "stream": yes,
    "return_token_ids": yes,
    "return_tokens_as_token_ids": yes,
}
NEEDED = {"model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop"}


class StandIn:
    """The server's state, and what tests ask of it.

    `fail(request)`: status and body instead of an answer, or None. `pause`: seconds before each token. `cut_after`:
    closes the connection after so many tokens. `endless`: never stops by itself.
    """

    def __init__(self, folder: Path, stop_ids: frozenset[int], context: int = 512) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.base = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.folder, self.context, self.stop_ids = folder, context, stop_ids
        self.model: Any = None
        self.loaded: dict[str, str] = {}
        self.max_lora_rank = 64
        self.runtime_loading = True
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.aborted: list[list[int]] = []
        self.fail: Callable[[str, dict[str, Any]], tuple[int, Any] | None] = lambda path, body: None
        self.fail_inside: Any = None
        self.without_ids = False
        self.pause = 0.0
        self.cut_after: int | None = None
        self.endless = False
        self.turn = threading.Lock()
        self.url = ""

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for found, body in self.requests if found == path]

    def load(self, name: str, folder: str) -> tuple[int, Any]:
        from peft import PeftModel

        if name in self.loaded:
            return refusal(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        if config["r"] > self.max_lora_rank:
            text = f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_lora_rank}."
            return refusal(500, text, "InternalServerError")
        # What older vLLMs ignore must not be there.
        assert not {"rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save"} & set(config)
        with self.turn:
            if self.model is None:
                self.model = PeftModel.from_pretrained(self.base, folder, adapter_name=name).eval()
            else:
                self.model.load_adapter(folder, adapter_name=name)
            self.loaded[name] = folder
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> tuple[int, Any]:
        if name not in self.loaded:
            return refusal(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        with self.turn:
            del self.loaded[name]
            if len(self.loaded):
                self.model.delete_adapter(name)
            else:
                self.base, self.model = self.model.unload(), None
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def forget_all(self) -> None:
        """As a restart does."""
        for name in list(self.loaded):
            self.unload(name)

    def logits(self, model: str, ids: Sequence[int]) -> Any:
        """[tokens, vocabulary]"""
        import torch

        with self.turn, torch.inference_mode():
            given = torch.tensor([list(ids)])
            if model == "tiny":
                if self.model is None:
                    return self.base(input_ids=given).logits[0]
                with self.model.disable_adapter():
                    return self.model(input_ids=given).logits[0]
            self.model.set_adapter(model)
            return self.model(input_ids=given).logits[0]

    def tokens(self, body: dict[str, Any]) -> Iterator[tuple[int, float, dict[int, float], str | None]]:
        """(token, its log-probability, the likeliest, why it ended)"""
        import torch

        ids = list(body["prompt"])
        random = torch.Generator().manual_seed(body.get("seed", 0) % 2**31)
        ends = {*body["stop_token_ids"], self.tokenizer.eos_token_id}
        for made in range(1, 10**9 if self.endless else body["max_tokens"] + 1):
            logits = self.logits(body["model"], ids)[-1].double()
            told = logits.log_softmax(-1)
            if body["temperature"]:
                token = int(torch.multinomial((logits / body["temperature"]).softmax(-1), 1, generator=random))
            else:
                token = int(logits.argmax())
            ids.append(token)
            # As vLLM does, an unfinished character is not looked at yet.
            text = self.tokenizer.decode(ids[len(body["prompt"]) :], skip_special_tokens=True).rstrip("\ufffd")
            reason = "length" if made == body["max_tokens"] else None
            if token in ends or any(stop in text for stop in body["stop"]):
                reason = "stop"
            if self.endless:
                ids, reason = ids[:64], None
            best = told.topk(body.get("logprobs") or 1)
            alternatives = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            yield token, float(told[token]), {token: float(told[token]), **alternatives}, reason
            if reason:
                return


def refusal(status: int, message: str, kind: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: StandIn

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        it = self.stand_in
        if self.path != "/v1/models":
            return self.reply(404, {"detail": "Not Found"})
        cards = [{"id": "tiny", "object": "model", "root": str(it.folder), "parent": None, "max_model_len": it.context}]
        cards += [{"id": n, "object": "model", "root": f, "parent": "tiny"} for n, f in it.loaded.items()]
        return self.reply(200, {"object": "list", "data": cards})

    def do_POST(self) -> None:
        it = self.stand_in
        assert self.headers["Content-Type"] == "application/json"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        it.requests.append((self.path, body))
        it.headers.append(dict(self.headers))
        failed = it.fail(self.path, body)
        if failed is not None:
            return self.reply(*failed)
        if self.path == "/v1/load_lora_adapter" and it.runtime_loading:
            assert set(body) == {"lora_name", "lora_path"}
            return self.reply(*it.load(body["lora_name"], body["lora_path"]))
        if self.path == "/v1/unload_lora_adapter" and it.runtime_loading:
            assert set(body) == {"lora_name"}
            return self.reply(*it.unload(body["lora_name"]))
        if self.path == "/v1/completions":
            return self.complete(body)
        return self.reply(404, {"detail": "Not Found"})

    def complete(self, body: dict[str, Any]) -> None:
        it = self.stand_in
        wrong = [
            f"{name}={body[name]!r}" for name in body if name not in COMPLETION or not COMPLETION[name](body[name])
        ]
        wrong += [f"{name} is missing" for name in NEEDED - set(body)]
        if "logprob_token_ids" in body and "logprobs" not in body:
            wrong.append("when using `logprob_token_ids`, `logprobs` must be set.")
        if len(body["prompt"]) + body["max_tokens"] > it.context:
            wrong.append("the maximum context length is passed")
        if wrong:
            return self.reply(*refusal(400, "; ".join(wrong), "BadRequestError"))
        if body["model"] != "tiny" and body["model"] not in it.loaded:
            return self.reply(*refusal(404, f"The model `{body['model']}` does not exist.", "NotFoundError"))
        return self.stream(body) if body.get("stream") else self.score(body)

    def score(self, body: dict[str, Any]) -> None:
        assert body["max_tokens"] == 1 and body["return_tokens_as_token_ids"]
        told = self.stand_in.logits(body["model"], body["prompt"])[-1].double().log_softmax(-1)
        tokens = [int(told.argmax()), *body["logprob_token_ids"]]
        logprobs = {
            "text_offset": [0],
            "tokens": [f"token_id:{tokens[0]}"],
            "token_logprobs": [float(told[tokens[0]])],
            "top_logprobs": [{f"token_id:{token}": float(told[token]) for token in tokens}],
        }
        choice = {"index": 0, "text": "?", "finish_reason": "length", "logprobs": logprobs}
        self.reply(200, {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]})

    def stream(self, body: dict[str, Any]) -> None:
        it = self.stand_in
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for made, (token, logprob, likeliest, reason) in enumerate(it.tokens(body), 1):
                self.wait()
                if it.fail_inside is not None and made > 1:
                    self.event(it.fail_inside)
                    break
                choice: dict[str, Any] = {"index": 0, "text": "?", "logprobs": None, "finish_reason": reason}
                if body.get("return_token_ids") and not it.without_ids:
                    choice["token_ids"] = [token]
                if "logprobs" in body:
                    assert body["return_tokens_as_token_ids"]
                    choice["logprobs"] = {
                        "text_offset": [0],
                        "tokens": [f"token_id:{token}"],
                        "token_logprobs": [logprob],
                        "top_logprobs": [{f"token_id:{other}": value for other, value in likeliest.items()}],
                    }
                self.event({"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]})
                if it.cut_after == made:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
            self.part("data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            it.aborted.append(body["prompt"])

    def wait(self) -> None:
        """Between tokens a server looks whether its client is still there."""
        if self.stand_in.pause:
            time.sleep(self.stand_in.pause)
        ready, _, _ = select.select([self.connection], [], [], 0)
        if ready and self.connection.recv(1, socket.MSG_PEEK) == b"":
            raise ConnectionResetError

    def event(self, value: Any) -> None:
        self.part(f"data: {json.dumps(value)}\n\n")

    def part(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def reply(self, status: int, value: Any) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@pytest.fixture(scope="session")
def lm(tiny_base: Path) -> LanguageModel:
    return load_model(str(tiny_base), device="cpu")


@pytest.fixture(scope="session")
def folders(make_adapter: Callable[..., Path]) -> dict[str, Path]:
    """Experts of unequal ranks, scalings and target modules."""
    return {key: make_adapter(seed=ord(key), **settings) for key, settings in SHAPES.items()}


@pytest.fixture
def stand_in(tiny_base: Path, lm: LanguageModel) -> Iterator[StandIn]:
    it = StandIn(tiny_base, lm.stop_ids)
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"stand_in": it}))
    it.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield it
    it.endless = False
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def make_engine(
    stand_in: StandIn, lm: LanguageModel, folders: dict[str, Path], tmp_path: Path
) -> Callable[..., VllmEngine]:
    """The engine under test at the stand-in, with all experts: `make_engine(max_batch=4, **options)`."""

    def make(*, max_batch: int = 4, lm: LanguageModel = lm, **options: Any) -> VllmEngine:
        settings = {"base_url": stand_in.url, "max_lora_rank": 64, "adapter_folder": str(tmp_path / "made")} | options
        engine = VllmEngine(lm, max_batch=max_batch, options=VllmOptions(**settings))
        for key, folder in folders.items():
            engine.add_expert(key, folder)
        return engine

    return make


@pytest.fixture
def engine(make_engine: Callable[..., VllmEngine]) -> VllmEngine:
    return make_engine()


@pytest.fixture
def torch_engine(lm: LanguageModel, folders: dict[str, Path]) -> TorchEngine:
    engine = TorchEngine(lm, max_batch=4)
    for key, folder in folders.items():
        engine.add_expert(key, folder)
    return engine


@pytest.fixture
def ask(lm: LanguageModel) -> Callable[..., EngineRequest]:
    def make(id: str, prompt: str, experts: WeightedExperts = (), **sampling: Any) -> EngineRequest:
        ids = tuple(lm.tokenizer(prompt)["input_ids"])
        return EngineRequest(id, ids, experts, Sampling(**{"max_tokens": 12} | sampling))

    return make


@pytest.fixture
def replies() -> Callable[..., dict[str, tuple[str, str | None, int]]]:
    """(text, how it ended, tokens made) by request id."""

    def run(engine: Any, requests: Sequence[EngineRequest]) -> dict[str, tuple[str, str | None, int]]:
        found: dict[str, tuple[str, str | None, int]] = {request.id: ("", None, 0) for request in requests}
        for piece in engine.generate(requests):
            text, finished, made = found[piece.request_id]
            assert finished is None
            found[piece.request_id] = (text + piece.text, piece.finished, piece.completion_tokens or made)
        return found

    return run
