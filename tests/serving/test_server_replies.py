"""Several replies, log-probabilities, plain texts, the ways of a model's name, and replies in stages."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, ClassVar

import httpx
import openai
import pytest

from xpert.config import Config
from xpert.errors import XpertError
from xpert.experts.calibration import Calibration
from xpert.experts.mixture import Mixture
from xpert.experts.routing import MixtureRouter
from xpert.experts.server.model_names import Way, by_way, parse_model
from xpert.protocols import Answer, Ask, Escalation, Question, Route, RouteRequest, Verdict, Weigh, Weighed
from xpert.records import Message

CASING = [{"role": "user", "content": "Write the word in capitals.\n\nbaba (case 3 tite)"}]


@pytest.fixture
def client(served: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "pair", "messages": CASING, "max_tokens": 8, **options})


# ── several replies ──────────────────────────────────────────────────────────────────────────────────────────────


def test_greedy_replies_are_computed_once_and_given_n_times(client: openai.OpenAI) -> None:
    one, three = ask(client), ask(client, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert {choice.message.content for choice in three.choices} == {one.choices[0].message.content}
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 3 * one.usage.completion_tokens


def test_sampled_replies_differ_and_the_first_is_that_of_n_1(client: openai.OpenAI) -> None:
    sampled = {"temperature": 1.0, "seed": 7}
    three = [choice.message.content for choice in ask(client, n=3, **sampled).choices]
    assert len(set(three)) == 3
    assert three[0] == ask(client, **sampled).choices[0].message.content
    assert three == [choice.message.content for choice in ask(client, n=3, **sampled).choices]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 7}])
def test_streamed_choices_are_those_of_whole_answers(client: openai.OpenAI, options: dict[str, Any]) -> None:
    whole = ask(client, n=3, **options)
    texts, ends, usage = ["", "", ""], [], None
    for chunk in ask(client, n=3, stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert sorted(ends) == [0, 1, 2]
    assert usage == whole.usage


# ── log-probabilities ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_told_per_token(client: openai.OpenAI, stream: bool) -> None:
    options = {"logprobs": True, "top_logprobs": 3}
    if stream:
        told = [
            entry
            for chunk in ask(client, stream=True, **options)
            for choice in chunk.choices
            if choice.logprobs
            for entry in choice.logprobs.content
        ]
    else:
        told = ask(client, **options).choices[0].logprobs.content
    text = ask(client).choices[0].message.content
    assert b"".join(bytes(entry.bytes) for entry in told).decode("utf-8", "replace").rstrip("\ufffd") == text
    for entry in told:
        assert len(entry.top_logprobs) == 3
        # Greedy: the chosen token is the likeliest.
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert entry.logprob <= 0


# ── plain texts ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_text_and_its_tokens_are_gone_on_with_alike(client: openai.OpenAI, served: Any) -> None:
    text = "Write the word"
    ids = served.runner.lm.tokenizer(text).input_ids
    options: dict[str, Any] = {"model": "me/casing", "max_tokens": 6}
    by_text = client.completions.create(prompt=text, **options)
    by_ids = client.completions.create(prompt=ids, **options)
    both = client.completions.create(prompt=[text, text], **options)
    assert by_text.choices[0].text == by_ids.choices[0].text == both.choices[1].text
    assert by_text.usage.prompt_tokens == len(ids) and both.usage.prompt_tokens == 2 * len(ids)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert by_text.choices[0].finish_reason == "length"


def test_a_text_is_answered_without_a_chat_form(client: openai.OpenAI, served: Any) -> None:
    import torch

    lm = served.runner.lm
    ids = lm.tokenizer("3 + 4 =").input_ids
    with torch.inference_mode():
        expected = lm.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
    reply = client.completions.create(model="base", prompt="3 + 4 =", max_tokens=6)
    assert reply.choices[0].text == lm.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before_the_reply(client: openai.OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {"model": "base", "prompt": "3 + 4", "max_tokens": 4}
    plain = client.completions.create(**options).choices[0].text
    found = client.completions.create(**options, echo=True, stream=stream)
    text = "".join(chunk.choices[0].text for chunk in found) if stream else found.choices[0].text
    assert text == f"3 + 4{plain}"


def test_a_streamed_text_is_the_whole_one(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "pair", "prompt": ["3 + 4", "Write"], "max_tokens": 5, "n": 2}
    whole = client.completions.create(**options)
    texts = [""] * 4
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        last = chunk
    assert texts == [choice.text for choice in whole.choices]
    assert last.usage == whole.usage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [99_999]}, "is not in the vocabulary"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({"max_tokens": 0}, "max_tokens=0 needs echo=true"),
        ({"best_of": 3}, "best_of=3 is not supported"),
        ({"suffix": "end"}, "'suffix' is not supported"),
        ({"logprobs": 21}, "less than or equal to 20"),
        ({"logprobs": 1, "echo": True, "stream": True}, "cannot be streamed"),
        ({"prompt": ["a"] * 65}, "65 replies are asked for at once"),
    ],
)
def test_mistakes_about_texts(served: Any, change: dict[str, Any], message: str) -> None:
    body = {"model": "base", "prompt": "3 + 4", "max_tokens": 4, **change}
    reply = httpx.post(f"{served.url}/v1/completions", content=json.dumps(body).encode())
    assert reply.status_code == 400, reply.text
    assert message in reply.json()["error"]["message"]


# ── what `model` means ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_way_of_a_model_is_read(pair: Mixture) -> None:
    assert parse_model("pair", pair).experts is None
    assert parse_model("base", pair).experts == ()
    assert parse_model("me/sums", pair).experts == (("me/sums", 1.0),)
    asked = parse_model("pair:router=random,k=2", pair)
    assert asked.experts is None and asked.way == Way(router="random", k=2)


def test_a_way_keeps_the_mixtures_own_parameters(pair: Mixture) -> None:
    changed = by_way(pair, Way(k=2))
    assert changed.router_params == {"reject": 0.0, "top": 2}
    assert by_way(pair, Way(router="random", k=2)).router_params == {"top": 2}
    assert by_way(pair, Way()) is pair


def test_a_threshold_takes_the_place_of_a_calibrated_bound(pair: Mixture) -> None:
    strict = dataclasses.replace(pair, calibration=Calibration((0.0, 1.0), (0.2, 0.8), reject_below=2.0))
    request = RouteRequest("one", (Message("user", "Write the word in capitals.\n\nbaba"),))
    by_bound, by_threshold = (
        MixtureRouter(by_way(strict, way)).route([request])[0] for way in (Way(k=2), Way(threshold=0.0))
    )
    assert not by_bound.experts and by_bound.chance is not None
    assert by_threshold.experts and by_threshold.chance == by_bound.chance
    assert by_way(strict, Way(router="skills")).calibration is None


def test_a_way_to_a_cascade_needs_no_training_with_a_threshold(pair: Mixture) -> None:
    params = {"weak": "me/casing", "strong": "me/sums", "threshold": 0.2}
    own = dataclasses.replace(pair, router="cascade", router_params=params)
    assert by_way(own, Way(threshold=0.4)).router_params == {**params, "threshold": 0.4}
    assert by_way(own, Way(aggregator="none")).router == "cascade"
    assert by_way(pair, Way(router="cascade", threshold=0.4)).router_params == {"threshold": 0.4}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("pair:router=cascade", "router cascade was not trained for this mixture"),
        ("pear", "unknown model 'pear'. Did you mean 'pair'?"),
        ("pair:router", "'router' is not NAME=VALUE"),
        ("pair:router=", "'router=' is not NAME=VALUE"),
        ("pair:router=centroyd", "unknown router 'centroyd'. Did you mean 'centroid'?"),
        ("pair:router=oracle", "router oracle is for evaluations"),
        ("pair:router=fixed,k=2", "router fixed has no number of experts"),
        ("pair:router=random,threshold=0.2", "router random has no threshold"),
        ("pair:k=0", "k is 0; the least is 1"),
        ("pair:k=1,k=2", "model names k twice"),
        ("pair:embedder=st:/etc", "unknown parameter 'embedder'"),
        ("pair:aggregator=majority", "router centroid names one expert. Add k=3"),
        ("pair:aggregator=majorty", "unknown aggregator 'majorty'. Did you mean 'majority'?"),
    ],
)
def test_mistakes_in_a_models_name(pair: Mixture, model: str, message: str) -> None:
    with pytest.raises(XpertError) as caught:
        by_way(pair, parse_model(model, pair).way)
    assert message in str(caught.value)


def test_a_server_may_take_no_ways(pair: Mixture) -> None:
    with pytest.raises(XpertError, match="takes pair as it is"):
        parse_model("pair:k=2", pair, overrides=False)


def test_another_router_answers_and_says_so(client: openai.OpenAI, served: Any) -> None:
    reply = ask(client, model="pair:router=random,k=2", extra_body={"xpert": {"explain": True}})
    told = reply.model_extra["xpert"]
    assert told["reason"].startswith("random: drew")
    assert [entry["weight"] for entry in told["answered_by"]] == [0.5, 0.5]
    plain = ask(client, model="me/casing", extra_body={"xpert": {"explain": True}})
    assert plain.model_extra["xpert"]["reason"] == "the request asked for me/casing"


@pytest.mark.parametrize("stream", [False, True])
def test_the_reason_is_told_on_request_alone(client: openai.OpenAI, stream: bool) -> None:
    def told(**options: Any) -> list[Any]:
        found = ask(client, stream=stream, **options)
        return [part.model_extra["xpert"] for part in (found if stream else [found]) if "xpert" in part.model_extra]

    assert told() == []
    (found,) = told(extra_body={"xpert": {"explain": True}})
    assert found["answered_by"] == [{"expert": "me/casing", "weight": 1.0}]
    assert {candidate["expert"] for candidate in found["candidates"]} == {"me/casing", "me/sums"}


def test_an_aggregator_does_not_go_with_a_second_stage(client: openai.OpenAI, staged: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="a second stage and an aggregator exclude each other"):
        ask(client, model="pair:router=cascade,threshold=0.5,aggregator=majority")
    staged(_Second(), _Joined())
    with pytest.raises(openai.BadRequestError, match="a second stage and an aggregator exclude each other"):
        ask(client)


# ── stages ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _Second:
    """A router whose every route has a second stage."""

    below = 0.0

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        second = Escalation((("me/sums", 1.0),), self.below)
        return [Route((("me/casing", 1.0),), (), "cascade", second) for _ in requests]


class _Joined:
    """Asks both experts and joins what they say; weighs their answers too."""

    Options: ClassVar[type[Config]] = Config

    def answer(self, question: Question) -> Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Verdict]:
        keys = ("me/casing", "me/sums")
        replies = yield [Ask(question.messages, ((key, 1.0),), question.sampling) for key in keys]
        texts = [reply.text for reply in replies if isinstance(reply, Answer)]
        weighed = yield [Weigh(question.messages, (), tuple(texts))]
        assert isinstance(weighed[0], Weighed)
        logprobs = [sum(tokens) for tokens in weighed[0].logprobs]
        return Verdict(" | ".join(texts), ((keys[0], 1.0),), "joined", log={"logprobs": logprobs})


@pytest.fixture
def staged(pair: Mixture, serve: Callable[..., Any], served: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts another router and aggregator into what `served` serves."""

    def put(router: Any = None, aggregator: Any = None) -> None:
        current = served.generations.current
        changed = dataclasses.replace(current.routed, router=router or current.routed.router, aggregator=aggregator)
        monkeypatch.setattr(current, "routed", changed)

    return put


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("below", "expert"), [(0.0, "me/casing"), (1.1, "me/sums")])
def test_a_second_stage_answers_where_confidence_is_low(
    client: openai.OpenAI, staged: Any, below: float, expert: str, stream: bool
) -> None:
    alone = ask(client, model=expert)
    router = _Second()
    router.below = below
    staged(router)
    found = ask(client, stream=stream, extra_body={"xpert": {"explain": True}})
    parts = list(found) if stream else [found]
    if stream:
        text = "".join(choice.delta.content or "" for part in parts for choice in part.choices)
    else:
        text = found.choices[0].message.content
        tokens = (2 if expert == "me/sums" else 1) * alone.usage.completion_tokens
        assert found.usage.completion_tokens <= tokens  # of both stages
    assert text == alone.choices[0].message.content
    told = parts[0].model_extra["xpert"]
    assert told["answered_by"][0]["expert"] == expert
    assert 0 < told["confidence"] < 1
    assert told["stage"] == (2 if expert == "me/sums" else 1)


@pytest.mark.parametrize("stream", [False, True])
def test_an_aggregators_steps_run_in_the_servers_batch(client: openai.OpenAI, staged: Any, stream: bool) -> None:
    each = [ask(client, model=key).choices[0].message.content for key in ("me/casing", "me/sums")]
    staged(aggregator=_Joined())
    found = ask(client, stream=stream, extra_body={"xpert": {"explain": True}})
    parts = list(found) if stream else [found]
    text = (
        "".join(choice.delta.content or "" for part in parts for choice in part.choices)
        if stream
        else found.choices[0].message.content
    )
    assert text == " | ".join(each)
    told = parts[0].model_extra["xpert"]
    assert told["aggregated"]["reason"] == "joined"
    assert len(told["aggregated"]["logprobs"]) == 2 and all(value < 0 for value in told["aggregated"]["logprobs"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": True}, "has no log-probabilities"),
        ({"response_format": {"type": "json_object"}}, "a constrained reply cannot be made of several"),
    ],
)
def test_what_an_aggregated_reply_cannot_have(
    client: openai.OpenAI, staged: Any, change: dict[str, Any], message: str
) -> None:
    staged(aggregator=_Joined())
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, **change)


def test_a_whole_number_may_be_written_as_a_float(served: Any) -> None:
    def answered(**change: Any) -> httpx.Response:
        body = {"model": "base", "prompt": [3, 4], "max_tokens": 2, **change}
        return httpx.post(f"{served.url}/v1/completions", json=body)

    plain = answered(seed=1, logprobs=1).json()
    assert answered(prompt=[3.0, 4.0], max_tokens=2.0, seed=1.0, logprobs=1.0).json()["choices"] == plain["choices"]
    assert answered(max_tokens=2.5).status_code == 400
    assert "less than or equal to 20" in answered(logprobs=21.0).json()["error"]["message"]
