"""Traces: their shape, their attributes, where they go on from, and that they cost nothing switched off."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import http_attributes as http_conventions
from opentelemetry.trace import SpanKind, StatusCode

from xpert.errors import BadInput, Unavailable
from xpert.experts.server.tracing import (
    NoTracing,
    OpenTelemetry,
    Tracing,
    http_attributes,
    open_tracing,
    reply_attributes,
    request_attributes,
    route_attributes,
)
from xpert.protocols import Route, Sampling

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ROUTE = Route((("me/dates", 0.75), ("me/sums", 0.25)), (), "nearest centroid")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Iterator[OpenTelemetry]:
    found = OpenTelemetry(exporter)
    yield found
    found.close()


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def one_request(tracing: Tracing, headers: list[tuple[bytes, bytes]]) -> None:
    asked = request_attributes("chat", "pair", Sampling(max_tokens=64, temperature=0.5, top_k=5, seed=3))
    with tracing.request("POST /v1/chat/completions", headers, asked) as request:
        with request.child("route") as route:
            route.set(route_attributes(ROUTE))
        queue = request.child("queue", {"xpert.waiting": 3})
        queue.end()
        with request.child("generate") as generate:
            came = reply_attributes("id", "pair", finished=["stop"], prompt_tokens=12, completion_tokens=3)
            generate.set(came)
            request.set(came)


def test_the_spans_of_a_request(tracing: OpenTelemetry, exporter: InMemorySpanExporter) -> None:
    headers = [(b"host", b"x"), (b"traceparent", f"00-{TRACE}-{PARENT}-01".encode()), (b"tracestate", b"a=1")]
    one_request(tracing, headers)
    spans = by_name(exporter)
    request = spans["POST /v1/chat/completions"]
    assert [span.name for span in exporter.get_finished_spans()] == ["route", "queue", "generate", request.name]
    assert request.kind is SpanKind.SERVER
    assert request.parent is not None and request.context is not None
    assert f"{request.context.trace_id:032x}" == TRACE and f"{request.parent.span_id:016x}" == PARENT
    assert request.context.trace_state.get("a") == "1"
    for name in ("route", "queue", "generate"):
        assert spans[name].parent == request.context and spans[name].kind is SpanKind.INTERNAL
    assert request.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "xpert",
        "gen_ai.request.model": "pair",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 5,
        "gen_ai.request.seed": 3,
        "gen_ai.response.id": "id",
        "gen_ai.response.model": "pair",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 3,
    }
    assert spans["route"].attributes == {
        "xpert.experts": ("me/dates", "me/sums"),
        "xpert.weights": "0.75,0.25",
        "xpert.reason": "nearest centroid",
    }
    assert spans["queue"].attributes == {"xpert.waiting": 3}
    assert all(span.status.status_code is StatusCode.UNSET for span in spans.values())


def test_names_of_attributes_are_those_of_the_conventions() -> None:
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    ours = request_attributes("chat", "m", Sampling(seed=1, top_k=1))
    ours |= reply_attributes("id", "m", finished=[], prompt_tokens=0, completion_tokens=0)
    assert set(ours) <= known
    http = {value for value in vars(http_conventions).values() if isinstance(value, str)}
    assert set(http_attributes("GET", "/")) <= http
    operations = {value.value for value in gen_ai_attributes.GenAiOperationNameValues}
    assert {"chat", "text_completion", "embeddings"} <= operations


@pytest.mark.parametrize("header", [b"", b"00-xyz-1-01", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01", b"\xff\xfe"])
def test_a_traceparent_that_is_none_begins_a_new_trace(
    header: bytes, tracing: OpenTelemetry, exporter: InMemorySpanExporter
) -> None:
    one_request(tracing, [(b"traceparent", header)])
    assert by_name(exporter)["POST /v1/chat/completions"].parent is None


def test_an_unsampled_parent_is_obeyed(tracing: OpenTelemetry, exporter: InMemorySpanExporter) -> None:
    one_request(tracing, [(b"Traceparent", f"00-{TRACE}-{PARENT}-00".encode())])
    assert exporter.get_finished_spans() == ()


def test_an_error_is_told_by_its_kind_and_never_by_its_words(
    tracing: OpenTelemetry, exporter: InMemorySpanExporter
) -> None:
    for name, error in (("defect", ValueError("a prompt")), ("mistake", BadInput("a prompt"))):
        with pytest.raises(type(error)), tracing.request(name):
            raise error
    spans = by_name(exporter)
    assert spans["defect"].attributes == {"error.type": "ValueError"}
    assert spans["defect"].status.status_code is StatusCode.ERROR
    assert spans["mistake"].attributes == {"error.type": "BadInput"}
    assert spans["mistake"].status.status_code is StatusCode.UNSET
    assert not [s for s in spans.values() if "a prompt" in s.to_json()]


def test_a_span_ends_once_on_whatever_thread(tracing: OpenTelemetry, exporter: InMemorySpanExporter) -> None:
    request = tracing.request("r")
    thread = threading.Thread(target=lambda: request.child("c").end())
    thread.start()
    thread.join()
    request.end()
    request.end(ValueError())
    request.set({"late": 1})
    spans = by_name(exporter)
    assert len(exporter.get_finished_spans()) == 2 and spans["r"].attributes == {}
    assert spans["c"].parent == spans["r"].context


def test_a_span_of_the_past_lies_where_it_was(tracing: OpenTelemetry, exporter: InMemorySpanExporter) -> None:
    before = time.time_ns()
    with tracing.request("r") as request:
        now = time.monotonic()
        request.past("queue", now - 2.0, now - 0.5)
        request.past("nothing", now, now - 1.0)
    queue = by_name(exporter)["queue"]
    assert queue.start_time is not None and queue.end_time is not None
    assert queue.end_time - queue.start_time == pytest.approx(1.5e9, abs=1e6)
    assert queue.start_time == pytest.approx(before - 2e9, abs=1e9)
    assert queue.parent == by_name(exporter)["r"].context
    assert by_name(exporter)["nothing"].end_time == by_name(exporter)["nothing"].start_time


def test_the_process_keeps_its_own_tracing(tracing: OpenTelemetry) -> None:
    with tracing.request("r"):
        assert trace.get_tracer_provider() is not tracing.provider
        assert not trace.get_current_span().get_span_context().is_valid


@pytest.mark.parametrize(("variable", "value", "name"), [(None, "", "xpert"), ("OTEL_SERVICE_NAME", "mine", "mine")])
def test_the_service_is_named(
    variable: str | None, value: str, name: str, monkeypatch: pytest.MonkeyPatch, exporter: InMemorySpanExporter
) -> None:
    if variable:
        monkeypatch.setenv(variable, value)
    tracing = OpenTelemetry(exporter)
    attributes = tracing.provider.resource.attributes
    assert attributes["service.name"] == name and attributes["service.version"]


def test_switched_off_nothing_happens() -> None:
    tracing = open_tracing(False)
    assert isinstance(tracing, NoTracing)
    one_request(tracing, [(b"traceparent", f"00-{TRACE}-{PARENT}-01".encode())])
    with pytest.raises(ValueError), tracing.request("r") as span:
        span.past("queue", 0.0, 1.0)
        span.end()
        raise ValueError
    tracing.close()


def test_switched_on_spans_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, to where OpenTelemetry's variables say."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        tracing = open_tracing(True)
        one_request(tracing, [])
        tracing.close()
    finally:
        collector.shutdown()
        collector.server_close()
        thread.join()
    assert [path for path, _ in got] == ["/v1/traces"]
    assert b"gen_ai.request.model" in got[0][1] and b"nearest centroid" in got[0][1]


@pytest.mark.parametrize("missing", ["opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry"])
def test_a_missing_package_is_named_when_traces_are_asked_for(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == missing or name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(Unavailable, match=r"(?i)pip install 'xpert-toolkit\[otel\]'"):
        open_tracing(True)
