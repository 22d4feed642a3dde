"""What a request counts: against its key, in usage, in the logs; and where its tokens lie in the text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from xpert import plugins
from xpert.experts.mixture import Mixture
from xpert.experts.server.key_file import add_key
from xpert.protocols import Route, RouteRequest

ASK = {"messages": [{"role": "user", "content": "Add the two numbers.\n\n3 + 4"}]}


@pytest.fixture(scope="module")
def keyed(pair: Mixture, serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A server with keys that embeds by its base, and a way to make more of them."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"

    def add(name: str, **limits: Any) -> str:
        return str(add_key(file, name, **limits)[1])

    add("first")
    return serve(pair, api_keys=file, embedder="base"), add


def post(served: Any, path: str, body: dict[str, Any], key: str | None = None) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{served.url}{path}", json=body, headers=headers)


def test_embeddings_count_against_a_keys_limits(keyed: tuple[Any, Any]) -> None:
    served, add = keyed
    body = {"model": "base", "input": ["one two three", "four"]}
    key = add("eve", requests_per_minute=2, tokens_per_minute=1000)
    first = post(served, "/v1/embeddings", body, key)
    assert first.status_code == 200
    used = first.json()["usage"]["total_tokens"]
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert 1000 - used <= int(first.headers["x-ratelimit-remaining-tokens"]) < 1000 - used + 50
    assert post(served, "/v1/embeddings", body, key).status_code == 200
    assert post(served, "/v1/embeddings", body, key).status_code == 429


def test_an_embedder_is_a_model_that_a_key_may_be_for(keyed: tuple[Any, Any]) -> None:
    served, add = keyed
    body = {"model": "base", "input": "one"}
    assert post(served, "/v1/embeddings", body, add("only-base", models=("base",))).status_code == 200
    assert post(served, "/v1/embeddings", body, add("no-base", models=("pair",))).status_code == 403


def test_a_route_is_told_to_those_who_may_ask_for_the_model_and_counts_as_a_request(keyed: tuple[Any, Any]) -> None:
    served, add = keyed
    assert post(served, "/v1/route", ASK, add("sums", models=("me/sums",))).status_code == 403
    key = add("router", models=("pair",), requests_per_minute=2)
    assert post(served, "/v1/route", {**ASK, "model": "pair:k=2"}, key).status_code == 200
    assert post(served, "/v1/route", ASK, key).status_code == 200
    assert post(served, "/v1/route", ASK, key).status_code == 429


@pytest.fixture
def voting(served: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both experts answer every prompt, and the majority is the reply."""

    class Both:
        def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
            return [Route((("me/casing", 0.6), ("me/sums", 0.4)), (), "both") for _ in requests]

    plugin = plugins.load("aggregator", "majority")
    current = served.generations.current
    changed = dataclasses.replace(current.routed, router=Both(), aggregator=plugin(plugin.Options(), seed=0))
    monkeypatch.setattr(current, "routed", changed)
    return served


@pytest.mark.parametrize("stream", [False, True])
def test_aggregated_replies_count_all_that_they_took(voting: Any, stream: bool) -> None:
    def asked(n: int) -> int:
        body = {**ASK, "model": "pair", "n": n, "temperature": 1, "seed": 1, "max_tokens": 2, "stream": stream}
        if stream:
            lines = post(voting, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}}).text
            usage = [json.loads(line[6:])["usage"] for line in lines.splitlines() if line.startswith("data: {")][-1]
        else:
            usage = post(voting, "/v1/chat/completions", body).json()["usage"]
        return int(usage["prompt_tokens"])

    alone = int(
        post(voting, "/v1/chat/completions", {**ASK, "model": "base", "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    )
    before = tokens(voting)
    assert asked(1) == 2 * alone
    assert asked(3) == 6 * alone
    assert tokens(voting) - before == 8 * alone


def tokens(served: Any) -> float:
    """Prompt tokens by the metrics."""
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith('xpert_tokens_total{kind="prompt"}'))


def test_echoed_prompts_are_read_once_each_and_together(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = served.generations.engine
    read: list[int] = []
    plain = engine.prompt_logprobs

    def counted(requests: Sequence[Any], most: int) -> Any:
        read.append(len(requests))
        return plain(requests, most)

    monkeypatch.setattr(engine, "prompt_logprobs", counted)
    body = {"model": "me/sums", "prompt": ["ab", "cd e"], "echo": True, "logprobs": 1, "max_tokens": 1, "n": 2}
    reply = post(served, "/v1/completions", {**body, "temperature": 1, "seed": 3})
    choices = reply.json()["choices"]
    assert [choice["text"][:2] for choice in choices] == ["ab", "ab", "cd", "cd"]
    assert choices[0]["logprobs"]["token_logprobs"][:2] == choices[1]["logprobs"]["token_logprobs"][:2]
    assert read == [2]


def test_a_text_that_is_only_weighed_is_logged_as_whole(
    pair: Mixture, serve: Callable[..., Any], tmp_path: Path
) -> None:
    served = serve(pair, request_log=tmp_path / "log")
    body = {"model": "me/sums", "prompt": "ab cd", "echo": True, "logprobs": 1, "max_tokens": 0}
    assert post(served, "/v1/completions", body).status_code == 200
    served.app.state.service.operation.request_log.close()
    (file,) = (tmp_path / "log").glob("*.jsonl")
    assert json.loads(file.read_text())["finished"] == "length"


def test_tokens_say_where_they_begin_in_a_text_of_several_bytes_a_character(served: Any) -> None:
    body = {"model": "me/sums", "prompt": "hé ☃ 漢!", "echo": True, "logprobs": 0, "max_tokens": 0}
    (choice,) = post(served, "/v1/completions", body).json()["choices"]
    told = choice["logprobs"]
    whole = [
        (offset, token)
        for offset, token in zip(told["text_offset"], told["tokens"], strict=True)
        if not token.startswith("bytes:")
    ]
    assert len(whole) < len(told["tokens"])
    for offset, token in whole:
        assert choice["text"][offset : offset + len(token)] == token


def test_a_streams_tokens_say_where_they_begin_as_a_whole_answers_do(served: Any) -> None:
    body = {"model": "me/sums", "prompt": "ab", "logprobs": 0, "max_tokens": 40, "temperature": 1.5, "seed": 5}
    whole = post(served, "/v1/completions", body).json()["choices"][0]["logprobs"]
    lines = post(served, "/v1/completions", {**body, "stream": True}).text.splitlines()
    chunks = [json.loads(line[6:])["choices"][0]["logprobs"] for line in lines if line.startswith("data: {")]
    assert any(token.startswith("bytes:") for token in whole["tokens"])
    for part in ("tokens", "text_offset", "token_logprobs"):
        assert [item for chunk in chunks if chunk for item in chunk[part]] == pytest.approx(whole[part])


def test_all_that_answered_several_prompts_are_named(served: Any) -> None:
    prompts = ["Add the two numbers.\n\n3 + 4", "Write the word in capitals.\n\nbaba", "Add the two numbers.\n\n5 + 2"]
    reply = post(served, "/v1/completions", {"model": "pair", "prompt": prompts, "max_tokens": 1})
    assert reply.headers["x-xpert-experts"] == "me/sums=1; me/casing=1"


@pytest.mark.parametrize("stream", [False, True])
def test_several_sampled_replies_by_a_schema_are_each_json(served: Any, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2, 3]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = {**ASK, "model": "pair", "n": 3, "temperature": 1.5, "seed": 2, "max_tokens": 200, "response_format": form}
    reply = post(served, "/v1/chat/completions", {**body, "stream": stream})
    texts = ["", "", ""]
    if stream:
        for line in reply.text.splitlines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] += choice["delta"].get("content") or ""
    else:
        texts = [choice["message"]["content"] for choice in reply.json()["choices"]]
    assert all(json.loads(text)["n"] in (1, 2, 3) for text in texts)
