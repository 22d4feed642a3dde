"""What is served follows the registry and the files, while requests go on with what they began with."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from xpert import plugins
from xpert.errors import BadInput, Unavailable, XpertError
from xpert.experts.mixture import GateChoice, Mixture, StateFile, assemble, open_expert
from xpert.experts.mixture_file import load_mixture, write_mixture
from xpert.experts.router_state import ROUTER_FILE, write_router_state
from xpert.experts.server.model_names import Way
from xpert.experts.server.watching import Source, Watch
from xpert.protocols import Observations, RouteRequest
from xpert.records import Message
from xpert.registry.card import BaseModel
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
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    published(registry, make_expert, "casing", 1)
    served, watch = started(serve, "me/casing", registry, "name")
    going = threading.Event()  # cleared, it holds the engine, so that the request runs for as long as it is to
    going.set()
    session = served.app.state.service.speaker.loop._session
    step = session.step
    monkeypatch.setattr(session, "step", lambda: step() if going.wait(30) else [])

    async def run() -> tuple[str, str, int]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            options: Any = {"model": "me/casing", "messages": PROMPT, "max_tokens": 400}
            whole = await client.chat.completions.create(**options)
            published(registry, make_expert, "casing", 2)  # seen by the next look, which is taken within the stream
            stream = await client.chat.completions.create(**options, stream=True)
            texts = []
            alive = 0
            async for chunk in stream:
                texts.append(chunk.choices[0].delta.content or "")
                if len(texts) == 2:
                    going.clear()
                    assert await asyncio.to_thread(watch.look)
                    alive = served.generations.alive
                    going.set()
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
    published(registry, make_expert, "reversal", 2)
    mixed(registry, tmp_path, "me/casing", "me/reversal")
    assert watch.look() is True
    answer(served, "me/reversal")
    current = served.generations.current.mixture
    other = dataclasses.replace(current.base, fingerprint="0" * 64)
    with pytest.raises(BadInput, match="of another base model"):
        served.generations.open(dataclasses.replace(current, base=other))


def test_a_mixture_that_only_looks_new_is_not_exchanged(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    file = mixed(registry, tmp_path, published(registry, make_expert, "casing", 1))
    served, watch = started(serve, file, registry, "all")
    current = served.generations.current
    file.touch()
    assert watch.look() is False
    assert served.generations.current is current


def test_a_tag_that_is_moved_is_followed(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any]
) -> None:
    for seed in (1, 2):
        published(registry, make_expert, "casing", seed)
    registry.tag("me/casing@1", "stable")
    served, watch = started(serve, "me/casing@stable", registry, "name")
    assert watch.look() is False
    registry.tag("me/casing@2", "stable")
    assert watch.look() is True
    assert served.generations.current.mixture.experts[0].ref == "me/casing@2"


def test_what_was_published_while_the_model_was_loaded_is_served(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any]
) -> None:
    published(registry, make_expert, "casing", 1)
    source = Source("me/casing", open_registry, location=registry.location)
    served = serve(source.load())
    published(registry, make_expert, "casing", 2)
    assert Watch(source, served.generations, seconds=60).look() is True
    assert served.generations.current.mixture.experts[0].ref == "me/casing@2"


def test_a_version_with_the_same_weights_and_other_exemplars_is_new(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    folder = make_expert("casing", seed=1)
    registry.publish(folder, "me/casing")
    served, watch = started(serve, "me/casing", registry, "name")
    (folder / "exemplars.jsonl").write_text(json.dumps({"prompt": "Shout!", "skill": "casing", "kind": "shot"}) + "\n")
    registry.publish(folder, "me/casing")
    assert watch.look() is True
    assert served.generations.current.mixture.experts[0].routable().exemplars == ("Shout!",)


def test_a_changed_scale_is_served(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    folder = make_expert("casing", seed=1)
    registry.publish(folder, "me/casing")
    served, watch = started(serve, "me/casing", registry, "name")
    before = answer(served, "me/casing")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 50 * settings["lora_alpha"]}))
    registry.publish(folder, "me/casing")
    assert watch.look() is True
    assert answer(served, "me/casing") != before


def test_a_mixture_that_was_renamed_has_its_new_name(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    file = mixed(registry, tmp_path, published(registry, make_expert, "casing", 1))
    served, watch = started(serve, file, registry, "name")
    file.write_text(json.dumps({**json.loads(file.read_text()), "name": "four"}))
    assert watch.look() is True
    answer(served, "four")


def test_a_registry_that_was_out_of_reach_is_tried_again(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any]
) -> None:
    published(registry, make_expert, "casing", 1)
    away = [False]

    class Store:
        """A registry whose names can be read when its contents cannot."""

        location = registry.location

        def resolve(self, ref: str) -> Any:
            return registry.resolve(ref)

        def pull(self, ref: str) -> Path:
            if away[0]:
                raise Unavailable("out of reach")
            return Path(registry.pull(ref))

    source = Source("me/casing", lambda _: Store(), location=registry.location)
    served = serve(source.load())
    watch = Watch(source, served.generations, seconds=60)
    assert watch.look() is False
    published(registry, make_expert, "casing", 2)
    away[0] = True
    for _ in range(2):
        with pytest.raises(Unavailable):
            watch.look()
        answer(served, "me/casing")
    away[0] = False
    assert watch.look() is True


def test_a_registry_is_opened_once_however_often_it_is_looked_at(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    file = mixed(registry, tmp_path, *two(registry, make_expert))
    opened: list[str | None] = []

    def open_store(location: str | None) -> Any:
        opened.append(location)
        return open_registry(location)

    source = Source(str(file), open_store, location=registry.location, follow="all")
    watch = Watch(source, serve(source.load()).generations, seconds=60)
    for _ in range(3):
        watch.look()
    assert opened == [registry.location]


def test_what_keeps_failing_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    looks = [0]

    class Away:
        follow = "name"

        def state(self, mixture: Mixture) -> int:
            looks[0] += 1
            if looks[0] < 5:
                raise Unavailable("out of reach")
            return 1

        def load(self) -> Mixture:
            raise BadInput("broken")

    generations: Any = SimpleNamespace(current=SimpleNamespace(mixture=None))
    watch = Watch(Away(), generations, seconds=0.001)  # type: ignore[arg-type]  # the part of a source that is needed
    watch.start()
    deadline = time.monotonic() + 10
    while looks[0] < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    watch.close()
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.rpartition(": ")[2] for text in told] == ["out of reach", "broken"]


def test_a_newer_version_of_another_base_holds_up_nothing(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path, base_model: BaseModel
) -> None:
    file = mixed(registry, tmp_path, *two(registry, make_expert))
    served, watch = started(serve, file, registry, "experts")
    other = dataclasses.replace(base_model, fingerprint="0" * 64)
    registry.publish(make_expert("casing", seed=5, base=other), "me/casing")
    published(registry, make_expert, "reversal", 6)
    assert watch.look() is True
    assert [one.ref for one in served.generations.current.mixture.experts] == ["me/casing@1", "me/reversal@2"]


def test_the_newest_version_stays_when_the_one_that_was_mixed_is_removed(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    file = mixed(registry, tmp_path, *two(registry, make_expert))
    served, watch = started(serve, file, registry, "experts")
    published(registry, make_expert, "casing", 3)
    registry.remove("me/casing@1")
    published(registry, make_expert, "reversal", 4)
    assert watch.look() is True
    refs = {one.key: one.ref for one in served.generations.current.mixture.experts}
    assert refs == {"me/casing": "me/casing@2", "me/reversal": "me/reversal@2"}


def test_an_expert_that_comes_back_is_served_again(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    file = mixed(registry, tmp_path, *two(registry, make_expert))
    served, watch = started(serve, file, registry, "experts")
    registry.remove("me/reversal")
    assert watch.look() is True
    watch.look()
    published(registry, make_expert, "reversal", 9)
    assert watch.look() is True
    answer(served, "me/reversal")


# ── generations ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_opening_that_fails_leaves_the_engine_as_it_was(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    file = mixed(registry, tmp_path, *two(registry, make_expert))
    served = started(serve, file, registry, "name")[0]
    engine, generations = served.runner.engine, served.generations
    before = (set(engine.experts), set(engine.gates))
    gated = dataclasses.replace(
        assemble([open_expert(published(registry, make_expert, "casing", 7), registry)], router="fixed"),
        gate=GateChoice("arrow"),
    )

    def fails(*_: Any, **__: Any) -> Any:
        raise BadInput("the router cannot be prepared")

    monkeypatch.setattr("xpert.experts.server.generations.ready", fails)
    with generations.hold():
        with pytest.raises(BadInput, match="cannot be prepared"):
            generations.open(gated)
        assert (set(engine.experts), set(engine.gates)) == before


def test_what_an_old_generation_leaves_while_another_fails_to_open_goes_too(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    published(registry, make_expert, "casing", 1)
    served, watch = started(serve, "me/casing", registry, "name")
    engine, generations = served.runner.engine, served.generations
    first = generations.current.mixture
    holding = generations.hold()
    holding.__enter__()
    published(registry, make_expert, "casing", 2)
    assert watch.look() is True

    def fails(*_: Any, **__: Any) -> Any:
        holding.__exit__(None, None, None)  # the last request of the first generation ends just now
        raise BadInput("the router cannot be prepared")

    monkeypatch.setattr("xpert.experts.server.generations.ready", fails)
    with pytest.raises(BadInput):
        generations.open(first)
    served_keys = set(generations.current.runner.keys.values())
    assert {key for key in engine.experts if "@" in key} == served_keys


def test_a_way_in_the_making_holds_up_no_other(
    registry: Any, make_expert: Callable[..., Path], serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    published(registry, make_expert, "casing", 1)
    generation = started(serve, "me/casing", registry, "name")[0].generations.current
    kept = generation.by(Way(router="random"))
    entered, let_go, made = threading.Event(), threading.Event(), []

    def slowly(mixture: Mixture, **_: Any) -> Any:
        made.append(mixture.router_params)
        entered.set()
        assert let_go.wait(20)
        return SimpleNamespace(mixture=mixture)

    monkeypatch.setattr("xpert.experts.server.generations.ready", slowly)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(generation.by, Way(router="random", k=1)) for _ in range(2)]
        assert entered.wait(20)
        assert generation.by(Way(router="random")) is kept
        let_go.set()
        assert waiting[0].result() is waiting[1].result()
    assert len(made) == 1


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
