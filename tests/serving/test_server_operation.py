"""Keys, limits, metrics, logs, the load and the end of a server, as a client and an operator see them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from xpert.errors import BadInput
from xpert.experts.mixture import Mixture
from xpert.experts.server.key_file import add_key
from xpert.experts.server.opening import open_app
from xpert.experts.server.options import ServeOptions
from xpert.experts.server.pace import Pace
from xpert.experts.server.replies import Outcome, Task
from xpert.protocols import Escalation, Route, Sampling

ASK = {"model": "pair", "messages": [{"role": "user", "content": "Add the two numbers.\n\n3 + 4"}], "max_tokens": 3}


def post(served: Any, key: str | None = None, path: str = "/v1/chat/completions", **change: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{served.url}{path}", json={**ASK, **change}, headers=headers)


# ── keys and limits ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def keyed(pair: Mixture, serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A server with keys, and a way to make more of them."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"

    def add(name: str, **limits: Any) -> str:
        return str(add_key(file, name, **limits)[1])

    add("first")
    return serve(pair, api_keys=file), add


def test_without_a_key_nothing_below_v1_answers(keyed: tuple[Any, Any]) -> None:
    served, add = keyed
    for path in ("/v1/models", "/v1/load", "/v1/models/pair"):
        assert httpx.get(f"{served.url}{path}").status_code == 401
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/route"):
        reply = post(served, "xp-wrong", path)
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/healthz", "/readyz", "/metrics"):
        assert httpx.get(f"{served.url}{path}").status_code == 200
    assert post(served, add("second")).status_code == 200


def test_the_openai_client_raises_its_own_errors(keyed: tuple[Any, Any]) -> None:
    served, _ = keyed
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="xp-wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError, match="not known here"):
        client.models.list()


def test_a_key_has_its_limits(keyed: tuple[Any, Any]) -> None:
    served, add = keyed
    key = add("ada", requests_per_minute=2)
    first = post(served, key)
    assert (first.headers["x-ratelimit-limit-requests"], first.headers["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert post(served, key).status_code == 200
    third = post(served, key)
    assert third.status_code == 429
    assert 1 <= int(third.headers["retry-after"]) <= 30
    assert "2 requests a minute" in third.json()["error"]["message"]
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)
    with client, pytest.raises(openai.RateLimitError):
        client.chat.completions.create(**dict[str, Any](ASK))


def test_tokens_are_counted_by_what_was_used(keyed: tuple[Any, Any]) -> None:
    served, add = keyed
    key = add("bea", tokens_per_minute=1000)
    reply = post(served, key, max_tokens=500)
    used = reply.json()["usage"]["total_tokens"]
    later = post(served, key)
    assert int(later.headers["x-ratelimit-remaining-tokens"]) >= 1000 - used - 100
    small = post(served, add("dora", tokens_per_minute=50), max_tokens=400)
    assert small.status_code == 400
    assert "the key's limit is 50 a minute" in small.json()["error"]["message"]


def test_a_key_may_be_for_some_models_alone(keyed: tuple[Any, Any]) -> None:
    served, add = keyed
    key = add("cleo", models=("pair", "base"))
    assert post(served, key).status_code == post(served, key, model="base").status_code == 200
    assert post(served, key, model="pair:k=2").status_code == 200  # a way of the mixture is the mixture
    refused = post(served, key, model="me/sums")
    assert refused.status_code == 403
    assert "may not ask for 'me/sums'. It may ask for " in refused.json()["error"]["message"]


# ── what is seen ─────────────────────────────────────────────────────────────────────────────────────────────────


def metric(served: Any, name: str) -> float:
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_metrics_count_what_was_answered(served: Any) -> None:
    names = ('xpert_tokens_total{kind="completion"}', 'xpert_expert_requests_total{expert="me/sums"}',
             "xpert_time_to_first_token_seconds_count", "xpert_queue_seconds_count")  # fmt: skip
    before = [metric(served, name) for name in names]
    reply = post(served, model="me/sums").json()
    after = [metric(served, name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [reply["usage"]["completion_tokens"], 1, 1, 1]
    assert metric(served, "xpert_generations") == 1
    assert metric(served, "xpert_engine_experts") == 4  # those of the server, and of the runner beside it


def test_metrics_may_be_left_out(pair: Mixture, serve: Callable[..., Any]) -> None:
    assert httpx.get(f"{serve(pair, metrics=False).url}/metrics").status_code == 404


def test_the_load_is_told(served: Any) -> None:
    before = httpx.get(f"{served.url}/v1/load").json()
    reply = post(served).json()
    after = httpx.get(f"{served.url}/v1/load").json()
    assert after["tokens"] - before["tokens"] == reply["usage"]["completion_tokens"]
    assert after["requests"] - before["requests"] == 1
    assert (after["running"], after["waiting"], after["experts"], after["max_batch"]) == (0, 0, {}, 4)


def test_the_pace_is_of_the_last_whole_seconds() -> None:
    now = [100.0]
    pace = Pace(clock=lambda: now[0])
    for second in range(8):
        now[0] = 100.0 + second
        pace.add(second)
    assert pace.total == sum(range(8))
    assert pace.per_second() == sum(range(2, 7)) / 5
    now[0] = 200.0
    assert pace.per_second() == 0


def test_an_access_log_has_a_line_for_each_request(
    pair: Mixture, serve: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    served = serve(pair, access_log="json")
    reply = httpx.post(f"{served.url}/v1/chat/completions", json=ASK, headers={"x-request-id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["id"] == "mine-1"]
    usage = reply.json()["usage"]
    assert (line["status"], line["model"], line["path"]) == (200, "pair", "/v1/chat/completions")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert "numbers" not in json.dumps(line)  # nothing of the prompt


@pytest.mark.parametrize("replies", [True, False])
def test_a_request_log_holds_what_was_asked_and_why_it_went_where(
    pair: Mixture, serve: Callable[..., Any], tmp_path: Path, replies: bool
) -> None:
    served = serve(pair, request_log=tmp_path / "log", request_log_replies=replies)
    reply = post(served).json()
    post(served, model="base")
    served.app.state.service.operation.request_log.close()
    (file,) = (tmp_path / "log").glob("*.jsonl")
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert first["messages"] == ASK["messages"]
    assert [entry["expert"] for entry in first["experts"]] == ["me/sums"]
    assert {candidate["expert"] for candidate in first["candidates"]} == {"me/sums", "me/casing"}
    assert first["completion_tokens"] == reply["usage"]["completion_tokens"]
    assert (first.get("reply") == reply["choices"][0]["message"]["content"]) is replies
    assert (first["routed"], second["routed"], second["fell_back"]) == (True, False, False)


def test_an_expert_of_the_second_stage_has_served_the_request(
    pair: Mixture, serve: Callable[..., Any], tmp_path: Path
) -> None:
    served = serve(pair, request_log=tmp_path / "log")
    assert post(served, model="pair:router=cascade,threshold=1").status_code == 200
    assert post(served, model="pair:router=cascade,threshold=0").status_code == 200
    metrics = httpx.get(f"{served.url}/metrics").text
    assert "xpert_base_fallbacks_total 1.0" in metrics
    served.app.state.service.operation.request_log.close()
    (file,) = (tmp_path / "log").glob("*.jsonl")
    second, first = (json.loads(line) for line in file.read_text().splitlines())
    assert [entry["expert"] for entry in second["experts"]] == ["me/sums"] and not second["fell_back"]
    assert "is under 1.00: me/sums answers" in second["reason"]
    assert first["experts"] == [] and first["fell_back"]


def test_the_chance_of_a_first_answer_is_not_the_seconds(pair: Mixture) -> None:
    route = Route((("me/casing", 1.0),), (), "near", Escalation((("me/sums", 1.0),), 0.5), chance=0.9)
    task = Task("t", None, None, route, True, Sampling())  # type: ignore[arg-type]  # neither is read
    assert task.answered is route
    task.outcome = Outcome((("me/sums", 1.0),), "near; me/sums answers", stage=2)
    assert (task.answered.experts, task.answered.chance) == ((("me/sums", 1.0),), None)


# ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_draining_server_lets_nothing_in_and_ends_what_runs(pair: Mixture, serve: Callable[..., Any]) -> None:
    served = serve(pair)
    draining = served.app.state.service.operation.draining
    loop: Any = None

    async def run() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(timeout=30) as client:
            body = {**ASK, "model": "me/casing", "max_tokens": 450, "stream": True}
            events: list[dict[str, Any]] = []
            async with client.stream("POST", f"{served.url}/v1/chat/completions", json=body) as stream:
                async for line in stream.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    events.append(json.loads(line.removeprefix("data: ")))
                    if len(events) == 3:
                        asyncio.run_coroutine_threadsafe(draining.drain(0.0), loop)
            refused = await client.post(f"{served.url}/v1/chat/completions", json=ASK)
            assert refused.status_code == 503
            assert (await client.get(f"{served.url}/readyz")).status_code == 503
            assert (await client.get(f"{served.url}/healthz")).status_code == 200
            return events

    loop = served.server.servers[0].get_loop()
    events = asyncio.run(run())
    assert events[-1]["error"]["message"].startswith("the server is stopping")


def test_every_endpoint_is_described(served: Any) -> None:
    document = httpx.get(f"{served.url}/openapi.json").json()
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/route"):
        described = document["paths"][path]["post"]
        assert described["requestBody"]["required"]
        assert {"200", "400", "401", "404", "408", "413", "429", "503"} <= set(described["responses"])
    names = json.dumps(document)
    for reference in {part.split('"')[0] for part in names.split('"#/components/schemas/')[1:]}:
        assert reference in document["components"]["schemas"]


def test_the_app_runs_without_uvicorn(pair: Mixture, served: Any) -> None:
    """As under another ASGI server, or in tests of who mounts it."""
    from xpert.experts.server.app import create_app

    with TestClient(create_app(served.generations, served.options)) as client:
        assert client.post("/v1/chat/completions", json=ASK).json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedder": "lsa"}, "is fitted on the texts.*Use minilm, st:NAME or base"),
        ({"embedder": "foo"}, "unknown embedder 'foo'. Use minilm, st:NAME or base"),
        ({"embedder": "lm"}, "Use minilm, st:NAME or base"),
        ({"api_keys": Path("none.json")}, "none.json: no such file"),
    ],
)
def test_wrong_options_are_told_before_the_model_is_loaded(
    pair: Mixture, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("xpert.experts.server.opening.open_engine", loaded)
    with pytest.raises(BadInput, match=message):
        open_app("pair", ServeOptions(**change), loaded=pair)
