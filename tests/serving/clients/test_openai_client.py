"""The `openai` package against a running server: sync, async, streams, helpers, errors, retries and timeouts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from xpert.experts.mixture import Mixture
from xpert.experts.server.key_file import add_key

CASING: list[Any] = [{"role": "user", "content": "Write the word in capitals.\n\nbaba (case 3 tite)"}]
SUM: list[Any] = [{"role": "user", "content": "Add the two numbers.\n\n3 + 4 (case 9 lodi)"}]
LONG: dict[str, Any] = {
    "model": "me/casing",
    "messages": [{"role": "user", "content": "go on"}],
    "max_tokens": 400,
}
"""A reply that only `max_tokens` ends."""


@pytest.fixture(scope="module")
def embedding(pair: Mixture, serve: Callable[..., Any]) -> Any:
    return serve(pair, embedder="base", max_body=4096)


@pytest.fixture
def client(embedding: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{embedding.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_async_clients_share_the_server(embedding: Any) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{embedding.url}/v1", api_key="none", max_retries=0) as client:
            asked = [
                client.chat.completions.create(model=model, messages=messages, max_tokens=8)
                for model, messages in (("pair", CASING), ("pair", SUM), ("base", SUM), ("me/sums", CASING))
            ]
            return [reply.choices[0].message.content or "" for reply in await asyncio.gather(*asked)]

    wanted = [("pair", CASING), ("pair", SUM), ("base", SUM), ("me/sums", CASING)]
    assert asyncio.run(run()) == [embedding.greedy(model, asked[0]["content"], 8) for model, asked in wanted]


def test_async_streams(embedding: Any) -> None:
    async def run() -> tuple[str, str | None]:
        text, finished = "", None
        async with openai.AsyncOpenAI(base_url=f"{embedding.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(model="pair", messages=CASING, max_tokens=12, stream=True)
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                finished = chunk.choices[0].finish_reason or finished
        return text, finished

    text, finished = asyncio.run(run())
    assert text == embedding.greedy("pair", CASING[0]["content"], 12)
    assert finished in ("stop", "length")


def test_the_stream_helper_puts_the_reply_together(client: openai.OpenAI) -> None:
    """The helper takes a reply that `max_tokens` cut for an error, so this one ends by itself."""
    options: Any = {
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "extra_body": {"structured_outputs": {"choice": ["yes", "no"]}},
    }
    with client.chat.completions.stream(model="pair", messages=CASING, **options) as stream:
        kinds = {event.type for event in stream}
        whole = stream.get_final_completion()
    assert {"chunk", "content.delta", "logprobs.content.delta", "content.done"} <= kinds
    assert whole.choices[0].message.content in ("yes", "no")
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage and whole.usage.completion_tokens > 0


def test_headers_are_at_hand(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="pair", messages=SUM, max_tokens=2, extra_headers={"x-request-id": "mine-7"}
    )
    assert raw.headers["x-xpert-experts"] == "me/sums=1"
    assert raw.request_id == raw.headers["x-request-id"] == "mine-7"
    assert raw.parse().choices[0].message.role == "assistant"
    with client.chat.completions.with_streaming_response.create(
        model="me/casing", messages=SUM, max_tokens=2, stream=True
    ) as streamed:
        assert streamed.headers["x-xpert-experts"] == "me/casing=1"
        assert list(streamed.iter_lines())[-2:] == ["data: [DONE]", ""]


def test_extra_body_carries_what_is_ours(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="pair", messages=SUM, max_tokens=2, extra_body={"top_k": 1, "xpert": {"explain": True}}
    )
    explained: Any = reply.model_extra
    assert explained["xpert"]["answered_by"] == [{"expert": "me/sums", "weight": 1.0}]


class Verdict(pydantic.BaseModel):
    colour: Literal["red", "blue"]
    sure: bool


def test_a_reply_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(model="pair", messages=SUM, max_tokens=60, response_format=Verdict)
    assert isinstance(reply.choices[0].message.parsed, Verdict)
    with client.chat.completions.stream(model="pair", messages=SUM, max_tokens=60, response_format=Verdict) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == reply.choices[0].message.parsed


def test_a_reply_cut_short_is_the_clients_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="pair", messages=SUM, max_tokens=2, response_format=Verdict)


@pytest.mark.parametrize("encoding", [openai.omit, "float", "base64"])
def test_embeddings_have_length_1(client: openai.OpenAI, encoding: Any) -> None:
    """Left to itself the client asks for base64 and decodes it."""
    reply = client.embeddings.create(model="base", input=["one word", "another"], encoding_format=encoding)
    assert [item.index for item in reply.data] == [0, 1]
    if encoding == "base64":
        assert all(isinstance(item.embedding, str) for item in reply.data)
    else:
        assert [math.hypot(*item.embedding) for item in reply.data] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 0


def test_completions_and_their_logprobs(client: openai.OpenAI) -> None:
    options: Any = {"model": "me/casing", "prompt": "Write the word", "max_tokens": 6, "logprobs": 2}
    whole = client.completions.create(**options)
    told: Any = whole.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 6
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    streamed = [number for chunk in chunks for number in (chunk.choices[0].logprobs or told).token_logprobs]
    assert streamed[:6] == told.token_logprobs
    echoed: Any = client.completions.create(**{**options, "max_tokens": 0, "echo": True}).choices[0]
    assert echoed.text == "Write the word"
    assert echoed.logprobs.token_logprobs[0] is None and all(p <= 0 for p in echoed.logprobs.token_logprobs[1:])


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_status_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean 'me/sums'") as missing:
        client.chat.completions.create(model="me/sum", messages=SUM)
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        client.chat.completions.create(model="pair", messages=SUM, temperature=9)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.APIStatusError, match="larger than 4,096 bytes") as large:
        client.chat.completions.create(model="pair", messages=[{"role": "user", "content": "x" * 5000}])
    assert (large.value.status_code, large.value.code) == (413, "request_too_large")


def test_keys_and_their_limits(pair: Mixture, serve: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    ada = add_key(file, "ada", requests_per_minute=1)[1]
    bert = add_key(file, "bert", models=("me/sums",))[1]
    url = f"{serve(pair, api_keys=file).url}/v1"

    def asking(key: str, model: str = "pair") -> None:
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
            client.chat.completions.create(model=model, messages=SUM, max_tokens=1)

    with pytest.raises(openai.AuthenticationError) as denied:
        asking("xp-wrong")
    assert denied.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        asking(bert)
    asking(bert, "me/sums")
    asking(ada)
    with pytest.raises(openai.RateLimitError) as limited:
        asking(ada)
    assert limited.value.code == "rate_limit_exceeded"
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60


def test_a_busy_server_is_asked_again(pair: Mixture, serve: Callable[..., Any]) -> None:
    """A full queue answers 429 with the time to come again, and the client's own retries get through."""
    served = serve(pair, max_batch=1, max_queue=0)
    codes: list[int] = []

    def note(response: httpx.Response) -> None:
        codes.append(response.status_code)
        stream.close()  # the place is free for the second attempt

    http = httpx.Client(event_hooks={"response": [note]})
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as first,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=8, http_client=http) as second,
    ):
        stream = first.chat.completions.create(**LONG, stream=True)
        next(iter(stream))  # it runs, and nothing else may
        reply = second.chat.completions.create(model="pair", messages=SUM, max_tokens=1)
    assert codes[0] == 429 and codes[-1] == 200
    assert reply.usage and reply.usage.completion_tokens == 1


def test_a_client_that_times_out_frees_its_place(client: openai.OpenAI, embedding: Any) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).chat.completions.create(**LONG)
    while embedding.active():
        pass
    assert client.chat.completions.create(model="pair", messages=SUM, max_tokens=1).choices


def test_a_stream_past_its_deadline_raises(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="deadline passed") as late:
        list(client.chat.completions.create(**LONG, stream=True, extra_headers={"x-xpert-timeout": "0.2"}))
    assert late.value.code == "deadline_exceeded"


def test_nobody_there_is_a_connection_error() -> None:
    client = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.APIConnectionError):
        client.models.list()
