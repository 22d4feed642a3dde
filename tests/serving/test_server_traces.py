"""The traces of a served mixture, and the id of a request that fails by a defect."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from xpert.experts.mixture import Mixture
from xpert.experts.server.errors import add_error_handlers
from xpert.experts.server.request_watch import RequestWatch, Seen
from xpert.experts.server.tracing import OpenTelemetry

TRACE = "0af7651916cd43dd8448eb211c80319c"
ASK = {"model": "pair", "messages": [{"role": "user", "content": "Add the two numbers.\n\n3 + 4"}], "max_tokens": 3}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_trace(stream: bool, pair: Mixture, serve: Callable[..., Any]) -> None:
    served, exporter = serve(pair), InMemorySpanExporter()
    served.app.state.service.operation.tracing = OpenTelemetry(exporter)
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    url = f"{served.url}/v1/chat/completions"
    reply = httpx.post(url, json={**ASK, "stream": stream, "temperature": 0.5, "seed": 7}, headers=headers)
    assert reply.status_code == 200
    end = time.monotonic() + 10
    while (
        len(exporter.get_finished_spans()) < 4 and time.monotonic() < end
    ):  # the client has its reply a little earlier
        time.sleep(0.01)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"POST /v1/chat/completions", "route", "queue", "generate"}
    request = spans.pop("POST /v1/chat/completions")
    assert f"{request.context.trace_id:032x}" == TRACE
    assert all(span.parent == request.context for span in spans.values())
    about: dict[str, Any] = dict(request.attributes or {})
    assert about["http.route"] == "/v1/chat/completions" and about["gen_ai.operation.name"] == "chat"
    assert (about["gen_ai.request.max_tokens"], about["gen_ai.request.seed"]) == (3, 7)
    assert about["gen_ai.usage.output_tokens"] == 3 and about["gen_ai.usage.input_tokens"] > 3
    assert (spans["route"].attributes or {})["xpert.experts"] == ("me/sums",)
    assert (spans["queue"].end_time or 0) <= (spans["generate"].end_time or 0)
    assert "two numbers" not in "".join(span.to_json() for span in exporter.get_finished_spans())


def test_a_defect_is_answered_and_logged_with_the_request_s_id(caplog: pytest.LogCaptureFixture) -> None:
    from starlette.testclient import TestClient

    seen: list[Seen] = []
    app = FastAPI()
    app.add_middleware(RequestWatch, hear=[seen.append])
    add_error_handlers(app)

    @app.get("/defect")
    async def defect() -> None:
        raise RuntimeError("a secret")

    with caplog.at_level(logging.ERROR, "xpert.server"):
        reply = TestClient(app, raise_server_exceptions=False).get("/defect", headers={"x-request-id": "mine-1"})
    assert reply.status_code == 500 and "secret" not in reply.text
    assert reply.headers["x-request-id"] == "mine-1" == seen[0].id
    assert "request mine-1" in caplog.text
