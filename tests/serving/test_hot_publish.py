"""What is served follows the registry and the files, while requests go on with what they began with."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from xpert import plugins
from xpert.errors import BadInput, XpertError
from xpert.experts.mixture import Mixture, StateFile, assemble, load_mixture, open_expert, write_mixture
from xpert.experts.router_state import ROUTER_FILE, write_router_state
from xpert.experts.server.watching import Source, Watch
from xpert.protocols import Observations, RouteRequest
from xpert.records import Message
from xpert.registry.opening import open_registry
from xpert.storage import hash_file

PROMPT = [{"role": "user", "content": "Write the word in capitals.\n\nbaba"}]


@pytest.fixture
def registry(tmp_path: Path) -> Any:
    return open_registry(str(tmp_path / "registry"))


def published(registry: Any, make_expert: Callable[..., Path], skill: str, seed: int) -> str:
    version = registry.publish(make_expert(skill, seed=seed), f"me/{skill}")
    return str(version.ref)


def two(registry: Any, make_expert: Callable[..., Path]) -> list[str]:
    return [published(registry, make_expert, skill, seed) for seed, skill in enumerate(["casing", "reversal"], 1)]


def mixed(registry: Any, tmp_path: Path, *refs: str, router: str = "fixed") -> Path:
    experts = [open_expert(ref, registry) for ref in refs]
    path = tmp_path / "three.json"
    path.unlink(missing_ok=True)
    write_mixture(path, assemble(experts, router=router, name="three", registry=registry.location))
    return path


def answer(served: Any, model: str) -> str:
    body = {"model": model, "messages": PROMPT, "max_tokens": 12}
    reply = httpx.post(f"{served.url}/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def started(serve: Callable[..., Any], ref: Path | str, registry: Any, follow: str) -> tuple[Any, Watch]:
    source = Source(str(ref), open_registry, location=registry.location, follow=follow)
    served = serve(source.load())
    return served, Watch(source, served.generations, seconds=60)


def test_a_new_version_is_served_and_the_old_ones_adapters_leave(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any]
) -> None:
    published(registry, make_expert, "casing", 1)
    served, watch = started(serve, "me/casing", registry, "name")
    before = answer(served, "me/casing")
    assert watch.look() is False
    keys = set(served.runner.engine.experts)
    published(registry, make_expert, "casing", 2)
    assert watch.look() is True
    assert answer(served, "me/casing") != before
    assert served.generations.alive == 1
    assert len(set(served.runner.engine.experts) - keys) == 1
    assert len(served.runner.engine.experts) == len(keys)
    assert httpx.get(f"{served.url}/v1/models").json()["data"][1]["xpert"]["ref"] == "me/casing@2"


def test_a_running_request_ends_with_what_it_began_with(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any]
) -> None:
    published(registry, make_expert, "casing", 1)
    served, watch = started(serve, "me/casing", registry, "name")

    async def run() -> tuple[str, str, int]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            options: Any = {"model": "me/casing", "messages": PROMPT, "max_tokens": 400}
            whole = await client.chat.completions.create(**options)
            stream = await client.chat.completions.create(**options, stream=True)
            texts = []
            alive = 0
            async for chunk in stream:
                texts.append(chunk.choices[0].delta.content or "")
                if len(texts) == 2:
                    published(registry, make_expert, "casing", 2)
                    assert await asyncio.to_thread(watch.look)
                    alive = served.generations.alive
            return whole.choices[0].message.content or "", "".join(texts), alive

    whole, streamed, alive = asyncio.run(run())
    assert streamed == whole
    assert alive == 2
    deadline = time.monotonic() + 10
    while served.generations.alive > 1 and time.monotonic() < deadline:
        time.sleep(0.01)  # the server lets go a moment after the client has read the end
    assert served.generations.alive == 1


def test_versions_that_are_named_stay(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any]
) -> None:
    published(registry, make_expert, "casing", 1)
    served, watch = started(serve, "me/casing@1", registry, "name")
    published(registry, make_expert, "casing", 2)
    assert watch.look() is False
    assert served.generations.current.mixture.experts[0].ref == "me/casing@1"


@pytest.mark.parametrize(("follow", "refs"), [
    ("name", ["me/casing@1", "me/reversal@1"]),
    ("experts", ["me/casing@2", "me/reversal@1"]),
    ("all", ["me/casing@2", "me/reversal@1", "me/city@1"]),
    ("none", ["me/casing@1", "me/reversal@1"]),
])  # fmt: skip
def test_experts_of_a_mixture_are_followed_where_asked(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path, follow: str,
    refs: list[str],
) -> None:  # fmt: skip
    file = mixed(registry, tmp_path, *two(registry, make_expert))
    served, watch = started(serve, file, registry, follow)
    published(registry, make_expert, "casing", 7)
    published(registry, make_expert, "city", 8)
    assert watch.look() is (follow in ("experts", "all"))
    assert [expert.ref for expert in served.generations.current.mixture.experts] == refs
    if follow == "all":
        answer(served, "me/city")


def test_an_expert_that_was_removed_is_left_out(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    file = mixed(registry, tmp_path, *two(registry, make_expert))
    served, watch = started(serve, file, registry, "experts")
    registry.remove("me/reversal")
    with pytest.raises(XpertError):  # a mixture that names it cannot be loaded
        load_mixture(file, registry)
    assert watch.look() is True
    assert [expert.key for expert in served.generations.current.mixture.experts] == ["me/casing"]
    body = {"model": "me/reversal", "messages": PROMPT}
    assert httpx.post(f"{served.url}/v1/chat/completions", json=body).status_code == 404


def test_a_changed_file_is_served(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    first = published(registry, make_expert, "casing", 1)
    second = published(registry, make_expert, "reversal", 2)
    served, watch = started(serve, mixed(registry, tmp_path, first), registry, "name")
    assert watch.look() is False
    mixed(registry, tmp_path, first, second)
    assert watch.look() is True
    answer(served, "me/reversal")


def test_what_cannot_be_served_leaves_the_current_one(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    file = mixed(registry, tmp_path, published(registry, make_expert, "casing", 1))
    served, watch = started(serve, file, registry, "name")
    file.write_text("{")
    with pytest.raises(XpertError):
        watch.look()
    assert watch.look() is False  # not tried again until it changes
    answer(served, "three")
    current = served.generations.current.mixture
    other = dataclasses.replace(current.base, fingerprint="0" * 64)
    with pytest.raises(BadInput, match="of another base model"):
        served.generations.open(dataclasses.replace(current, base=other))


def test_a_mixture_that_only_looks_new_is_not_exchanged(served: Any, pair: Mixture) -> None:
    again = served.generations.open(pair)
    assert again.fingerprint == served.generations.current.fingerprint
    served.generations.drop(again)
    answer(served, "me/sums")


def observations(mixture: Mixture) -> Observations:
    """Each expert is right on the prompts that it has exemplars of, and the base on none."""
    experts = [expert.routable() for expert in mixture.experts]
    asked = [(expert.key, text) for expert in experts for text in expert.exemplars[:8]]
    requests = [RouteRequest(str(n), (Message("user", text),)) for n, (_, text) in enumerate(asked)]
    subjects = (*mixture.keys, "base")
    scores = np.array([[float(subject == key) for subject in subjects] for key, _ in asked])
    return Observations(tuple(requests), subjects, scores, 2 - scores, scores)


@pytest.mark.parametrize("router", ["mf", "cascade"])
def test_experts_that_a_router_has_not_learned_are_not_taken_up(
    router: str,
    registry: Any,
    make_expert: Callable[..., Path],
    serve: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mixture = load_mixture(mixed(registry, tmp_path, *two(registry, make_expert), router=router))
    plugin = plugins.load("router", router)
    state = plugin(plugin.Options()).learn([e.routable() for e in mixture.experts], observations(mixture))
    write_router_state(tmp_path / ROUTER_FILE, state)
    learned = StateFile(tmp_path / ROUTER_FILE, hash_file(tmp_path / ROUTER_FILE))
    write_mixture(tmp_path / "learned.json", dataclasses.replace(mixture, name="learned", router_state=learned))
    published(registry, make_expert, "arithmetic", 3)
    served, watch = started(serve, tmp_path / "learned.json", registry, "all")
    assert served.generations.current.mixture.keys == ("me/casing", "me/reversal")
    told = "expert me/arithmetic of the registry is not served: router"
    assert f"{told} {router} has not learned it; train the router again" in caplog.text
    published(registry, make_expert, "city", 4)
    published(registry, make_expert, "casing", 5)
    assert watch.look() is True  # what the router knows is still followed
    assert [expert.ref for expert in served.generations.current.mixture.experts] == ["me/casing@2", "me/reversal@1"]
    assert "expert me/city of the registry is not served" in caplog.text
    registry.remove("me/reversal")
    assert watch.look() is True
    assert served.generations.current.mixture.keys == ("me/casing",)
    answer(served, "learned")


def test_experts_that_a_router_could_never_choose_are_not_taken_up(
    registry: Any,
    make_expert: Callable[..., Path],
    serve: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = mixed(registry, tmp_path, *two(registry, make_expert), router="centroid")
    served, watch = started(serve, file, registry, "all")
    registry.publish(make_expert("arithmetic", seed=3, exemplars=()), "me/silent")
    published(registry, make_expert, "city", 4)
    assert watch.look() is True
    assert served.generations.current.mixture.keys == ("me/casing", "me/reversal", "me/city")
    assert "expert me/silent of the registry is not served: it has no exemplars" in caplog.text
