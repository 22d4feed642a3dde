"""Experts for the tiny base: random adapters with cards and exemplars of one skill each."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from xpert.experts.mixture import Mixture, assemble, open_expert
from xpert.experts.server.app import create_app
from xpert.experts.server.generations import Generations
from xpert.experts.server.options import ServeOptions
from xpert.experts.serving import MixtureRunner
from xpert.protocols import Sampling
from xpert.records import Message, Row
from xpert.registry.card import BaseModel, ExpertCard


@pytest.fixture
def exemplars_of(rows: list[Row]) -> Callable[[str], list[str]]:
    """The prompts of one of the five skills."""
    return lambda skill: [row.prompt for row in rows if row.skill == skill]


@pytest.fixture(scope="session")
def base_model(tiny_base: Path) -> BaseModel:
    from xpert.language_model import model_fingerprint

    return BaseModel(str(tiny_base), model_fingerprint(str(tiny_base)), "llama")


@pytest.fixture
def make_expert(
    make_adapter: Callable[..., Path], base_model: BaseModel, exemplars_of: Callable[[str], list[str]]
) -> Callable[..., Path]:
    """An expert folder: `make_expert("casing", seed=1)`."""

    def make(skill: str, *, seed: int, base: BaseModel = base_model, exemplars: Sequence[str] | None = None) -> Path:
        folder = make_adapter(seed=seed)
        prompts = exemplars_of(skill) if exemplars is None else list(exemplars)
        lines = [
            {"prompt": prompt, "skill": skill, "kind": "shot" if index < 8 else "row"}
            for index, prompt in enumerate(prompts)
        ]
        (folder / "exemplars.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        ExpertCard(base=base, adapter={"method": "lora", "rank": 4}, name=skill, skills=(skill,)).write(folder)
        return folder

    return make


@pytest.fixture
def mixture_file(make_expert: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a mixture of experts for casing, arithmetic and reversal."""
    from xpert.experts.mixture import assemble, open_expert
    from xpert.experts.mixture_file import write_mixture

    def make(router: str = "centroid", name: str = "three", **params: Any) -> Path:
        experts = [open_expert(make_expert(s, seed=i)) for i, s in enumerate(("casing", "arithmetic", "reversal"), 1)]
        path = tmp_path / f"{name}.json"
        write_mixture(path, assemble(experts, router=router, router_params=params, name=name))
        return path

    return make


class Served:
    """A server on a port of its own, the generations it serves, and a runner that answers without it."""

    def __init__(self, mixture: Mixture, **options: Any) -> None:
        self.options = ServeOptions(**{"max_batch": 4, "max_queue": 16, **options})
        self.runner = MixtureRunner.open(mixture, max_batch=self.options.max_batch)
        self.generations = Generations(mixture, self.runner.lm, self.runner.engine)
        self.app = create_app(self.generations, self.options)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="warning", ws="none"))
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[self.listener]))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()

    def active(self) -> int:
        return int(httpx.get(f"{self.url}/healthz").json()["active"])

    def greedy(self, model: str, content: str, max_tokens: int) -> str:
        """What the runner answers without the server."""
        experts = self.runner.experts_of_model(model)
        row = Row("x", (Message("user", content),), "")
        if experts is None:
            return self.runner.answer([row], Sampling(max_tokens=max_tokens))[0].output
        request = self.runner.engine_request("x", row.messages, experts, Sampling(max_tokens=max_tokens))
        return "".join(piece.text for piece in self.runner.engine.generate([request]))


@pytest.fixture(scope="module")
def pair(tiny_base: Path, make_adapter: Callable[..., Path]) -> Mixture:
    """Two experts, casing and sums, behind router centroid."""
    from xpert.language_model import model_fingerprint

    base = BaseModel(str(tiny_base), model_fingerprint(str(tiny_base)), "llama")
    experts = []
    texts = {"casing": "Write the word in capitals.\n\n{} (case {} tite)", "sums": "Add the two numbers.\n\n{} + {}"}
    for seed, (skill, text) in enumerate(texts.items(), 1):
        folder = make_adapter(seed=seed)
        lines = [{"prompt": text.format(7 * i + 3, i), "skill": skill, "kind": "shot"} for i in range(12)]
        (folder / "exemplars.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        ExpertCard(base=base, adapter={}, name=f"me/{skill}", skills=(skill,)).write(folder)
        experts.append(open_expert(folder))
    return assemble(experts, router="centroid", router_params={"reject": 0.0}, name="pair")


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., Served]]:
    """Starts servers, which end with the module."""
    started: list[Served] = []

    def start(mixture: Mixture, **options: Any) -> Served:
        started.append(Served(mixture, **options))
        return started[-1]

    yield start
    for served in started:
        served.close()


@pytest.fixture(scope="module")
def served(pair: Mixture, serve: Callable[..., Served]) -> Served:
    return serve(pair)
