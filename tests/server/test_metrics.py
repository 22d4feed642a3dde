"""Metrics: what is counted, in which words, and that no client can make a series."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus
from starlette.requests import Request
from starlette.responses import Response

from xpert.experts.engines._bank_options import Counters
from xpert.experts.engines._vllm_store import AdapterUse
from xpert.experts.server.metrics import Moment, ServerMetrics, engine_figures
from xpert.experts.server.request_watch import Facts, RequestWatch, Seen

DOCS = Path(__file__).resolve().parents[2] / "docs" / "serving" / "operation.md"


def values(metrics: ServerMetrics) -> dict[str, float]:
    """`name{label=value,...}` -> value, as a scraper reads it."""
    found = {}
    for family in prometheus(metrics.render()[0].decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def seen(**facts: Any) -> Seen:
    it = Seen(0.0, "abc", "192.0.2.7", "POST", "/chat", "/chat", 200, 0.3)
    return replace(it, facts=Facts(**facts))


@pytest.fixture
def metrics() -> ServerMetrics:
    return ServerMetrics(["me/dates", "me/sums"], Moment)


def test_a_request_is_counted_with_what_is_known_of_it(metrics: ServerMetrics) -> None:
    both = ("me/dates", "me/sums")
    metrics.observe(
        seen(
            model_kind="mixture",
            experts=both,
            prompt_tokens=12,
            completion_tokens=5,
            queue_seconds=0.02,
            first_token_seconds=0.1,
            token_seconds=0.2,
        )
    )
    metrics.observe(seen(model_kind="mixture", fell_back=True, prompt_tokens=8, completion_tokens=1))
    metrics.observe(replace(seen(), route=None, status=404, ended="left"))
    got = values(metrics)
    assert got["xpert_requests_total{model_kind=mixture,route=/chat,status=200}"] == 2
    assert got["xpert_requests_total{model_kind=none,route=none,status=404}"] == 1
    assert got["xpert_request_seconds_count{route=/chat}"] == 2
    assert got["xpert_request_seconds_sum{route=/chat}"] == pytest.approx(0.6)
    assert got["xpert_request_seconds_bucket{le=0.25,route=/chat}"] == 0
    assert got["xpert_request_seconds_bucket{le=0.5,route=/chat}"] == 2
    assert (got["xpert_tokens_total{kind=prompt}"], got["xpert_tokens_total{kind=completion}"]) == (20, 6)
    assert got["xpert_expert_requests_total{expert=me/dates}"] == 1
    assert got["xpert_base_fallbacks_total"] == 1 and got["xpert_clients_left_total"] == 1
    assert got["xpert_queue_seconds_sum"] == 0.02 and got["xpert_queue_seconds_count"] == 1
    assert got["xpert_time_to_first_token_seconds_sum"] == 0.1
    assert got["xpert_time_per_output_token_seconds_sum"] == pytest.approx(0.2 / 4)
    assert got["xpert_time_per_output_token_seconds_count"] == 1


def test_experts_are_those_of_the_mixture(metrics: ServerMetrics) -> None:
    """At 0 before anybody asked; no others, whatever a request says; and they follow a new generation."""
    metrics.observe(seen(experts=("me/dates", "someone/else\n")))
    metrics.serve(["me/sums", "me/new"])
    metrics.observe(seen(experts=("me/dates", "me/new")))
    experts = {name: value for name, value in values(metrics).items() if name.startswith("xpert_expert_requests")}
    assert experts == {
        "xpert_expert_requests_total{expert=me/sums}": 0,
        "xpert_expert_requests_total{expert=me/new}": 1,
    }


def test_what_stands_is_read_when_somebody_looks() -> None:
    now = [Moment()]
    metrics = ServerMetrics([], lambda: now[0])
    assert values(metrics)["xpert_requests_running"] == 0 and values(metrics)["xpert_ready"] == 1
    now[0] = Moment(3, 4, 2, False, {"hits": 7, "prefix_hits": 5, "device_bytes": 1 << 30, "unheard_of": 1})
    got = values(metrics)
    assert (got["xpert_requests_running"], got["xpert_requests_waiting"], got["xpert_generations"]) == (3, 4, 2)
    assert got["xpert_ready"] == 0
    assert got["xpert_engine_adapter_hits_total"] == 7 and got["xpert_engine_prefix_hits_total"] == 5
    assert got["xpert_engine_adapter_device_bytes"] == 1 << 30
    assert not [name for name in got if "unheard" in name]


ENGINES: list[Any] = [
    SimpleNamespace(counters=vars(Counters(*range(1, 14))) | {"prefix_hits": 1, "prefix_tokens": 2, "prefix_bytes": 3}),
    SimpleNamespace(adapters=AdapterUse(1, 2, 3, 4, 5)),
]


@pytest.mark.parametrize("engine", ENGINES, ids=["in memory", "vllm"])
def test_every_figure_of_an_engine_has_its_metric(engine: Any) -> None:
    figures = engine_figures(engine)
    assert figures
    bare = values(ServerMetrics([], Moment))
    got = values(ServerMetrics([], lambda: Moment(engine=figures)))
    told = sorted(value for name, value in got.items() if name not in bare)
    assert told == sorted(figures.values())


def test_an_engine_that_tells_nothing() -> None:
    assert engine_figures(object()) == {} and engine_figures(SimpleNamespace(adapters=AdapterUse)) == {}


@pytest.mark.parametrize(
    ("accept", "begins", "parse"),
    [
        (None, "text/plain; version=0.0.4", prometheus),
        ("*/*", "text/plain; version=0.0.4", prometheus),
        ("application/openmetrics-text;version=1.0.0,text/plain;q=0.5", "application/openmetrics-text", openmetrics),
    ],
)
def test_the_form_is_as_asked(metrics: ServerMetrics, accept: str | None, begins: str, parse: Any) -> None:
    metrics.observe(seen(model_kind="base"))
    body, content_type = metrics.render(accept)
    assert content_type.startswith(begins)
    assert {"xpert_requests", "xpert_queue_seconds"} <= {family.name for family in parse(body.decode())}
    assert b"_created" not in body


def families() -> dict[str, Any]:
    """All that a server can show."""
    figures = {key: 1 for engine in ENGINES for key in engine_figures(engine)}
    metrics = ServerMetrics(["me/dates"], lambda: Moment(engine=figures))
    metrics.observe(seen())
    return {family.name: family for family in openmetrics(metrics.render("application/openmetrics-text")[0].decode())}


def test_names_follow_the_conventions() -> None:
    """https://prometheus.io/docs/practices/naming: a prefix, base units, and `_total` for what is counted."""
    for name, family in families().items():
        assert name.startswith("xpert_") and name == name.lower() and family.documentation.endswith("."), name
        assert not name.endswith(("_ms", "_milliseconds", "_total", "_count", "_kb", "_mib")), name
        if family.type == "histogram":
            assert name.endswith("_seconds")
        if family.type == "counter":
            assert all(sample.name == f"{name}_total" for sample in family.samples)


def test_every_metric_stands_in_the_docs() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name, family in families().items():
        shown = f"{name}_total" if family.type == "counter" else f"{name}_info" if family.type == "info" else name
        assert f"`{shown}`" in text, shown


def test_two_servers_do_not_mix(metrics: ServerMetrics) -> None:
    other = ServerMetrics(["me/dates"], Moment)
    other.observe(seen(prompt_tokens=5))
    assert values(metrics)["xpert_tokens_total{kind=prompt}"] == 0


def test_in_an_application(ask: Callable[..., Any], metrics: ServerMetrics) -> None:
    app = FastAPI()

    @app.get("/models/{name:path}")
    async def model(name: str) -> Response:
        return Response(name)

    @app.get("/metrics")
    async def show(request: Request) -> Response:
        body, content_type = metrics.render(request.headers.get("accept"))
        return Response(body, media_type=content_type)

    watched = RequestWatch(app, [metrics.observe])
    for path in ("/models/a", "/models/b/c", "/one", "/two", "/metrics"):
        last = ask(watched, path=path)
    assert dict(last.headers)["content-type"].startswith("text/plain; version=0.0.4; charset=utf-8")
    requests = {line for line in last.body.decode().splitlines() if line.startswith("xpert_requests_total")}
    assert requests == {
        'xpert_requests_total{model_kind="none",route="/models/{name:path}",status="200"} 2.0',
        'xpert_requests_total{model_kind="none",route="none",status="404"} 2.0',
    }
