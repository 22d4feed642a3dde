"""The aggregators behind the server: the same request is answered alike, and as in a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from xpert import plugins
from xpert.experts.aggregating import aggregate, model_encoding
from xpert.protocols import Question, Route, RouteRequest, Sampling
from xpert.records import Message

PROMPT = "Which is it?\nA. red\nB. green\nC. blue"


@pytest.fixture
def client(served: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture
def behind(served: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Puts an aggregator, and a router that names both experts, into what is served."""

    class Both:
        def route(self, requests: list[RouteRequest]) -> list[Route]:
            return [Route((("me/casing", 0.6), ("me/sums", 0.4)), (), "both") for _ in requests]

    def put(name: str, **params: Any) -> Any:
        plugin = plugins.load("aggregator", name)
        made = plugin(plugin.Options.from_mapping(params), seed=0)
        current = served.generations.current
        made.prepare([expert.routable() for expert in current.mixture.experts])
        changed = dataclasses.replace(current.routed, router=Both(), aggregator=made)
        monkeypatch.setattr(current, "routed", changed)
        return made

    return put


def ask(client: openai.OpenAI, **options: Any) -> tuple[str, dict[str, Any]]:
    model = client.models.list().data[0].id
    found: Any = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        extra_body={"xpert": {"explain": True}},
        **({"max_tokens": 6} | options),
    )
    return found.choices[0].message.content, found.model_extra["xpert"]["aggregated"]


@pytest.mark.parametrize("name", plugins.names("aggregator"))
def test_a_seed_decides_what_is_aggregated(client: openai.OpenAI, behind: Callable[..., Any], name: str) -> None:
    behind(name)
    first, again = (ask(client, temperature=1.0, seed=3) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("name", ["majority", "b4", "best-of"])
def test_the_server_says_what_a_batch_says(
    client: openai.OpenAI, served: Any, behind: Callable[..., Any], name: str
) -> None:
    aggregator = behind(name, **({"samples": 1} if name == "best-of" else {}))
    runner = served.generations.current.runner
    text, told = ask(client, temperature=0)
    question = Question(
        "q",
        (Message("user", PROMPT),),
        Route((("me/casing", 0.6), ("me/sums", 0.4)), (), "both"),
        Sampling(max_tokens=6),
    )
    encoding = model_encoding(runner.lm.tokenizer, runner.engine.context, runner.keys)
    verdict = aggregate(runner.engine, encoding, aggregator, [question])[0].verdict
    assert verdict is not None and text == verdict.text and told["reason"] == verdict.reason


def test_replies_are_cut_where_they_do_not_fit(
    client: openai.OpenAI, served: Any, behind: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    behind("expert")
    engine = served.generations.current.runner.engine
    monkeypatch.setattr(type(engine), "context", 350)
    _, told = ask(client, temperature=0, max_tokens=100)
    assert told["cut_to_characters"] is not None
