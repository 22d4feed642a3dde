"""Traces of requests by OpenTelemetry, an extra: a span per request, and within it `route`, `queue` and `generate`.

A request's trace goes on where its `traceparent` header says (W3C Trace Context). Where traces go is OpenTelemetry's
own business: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and its other variables. Attributes
are those of its conventions for HTTP servers and for generative models (gen_ai.*), and ours (xpert.*); never a prompt
or a reply. Switched off, every call is a method that does nothing.

    with tracing.request("POST /v1/chat/completions", headers) as span:
        with span.child("route") as route:
            route.set({"xpert.reason": "..."})

A span whose end is elsewhere, such as that of a streamed reply, is ended by `end()` in place of the `with`. Spans may
be begun and ended on different threads, since a child is made from its parent and not from what runs at the moment.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import xpert
from xpert.errors import Unavailable
from xpert.protocols import Route, Sampling

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import Tracer

__all__ = [
    "Attribute",
    "NoTracing",
    "Span",
    "Tracing",
    "http_attributes",
    "open_tracing",
    "reply_attributes",
    "request_attributes",
    "route_attributes",
]

Attribute = str | int | float | bool | Sequence[str]

SHUTDOWN_SECONDS = 5.0
"""How long the end of a server waits for the last spans to be sent."""


class Span(Protocol):
    """A stretch of a request's time. Ends once; what is set after its end is lost."""

    def set(self, attributes: Mapping[str, Attribute]) -> None: ...

    def child(self, name: str, attributes: Mapping[str, Attribute] | None = None) -> Span: ...

    def past(self, name: str, begun: float, ended: float) -> None:
        """A child that is over already; times as of `time.monotonic`."""

    def end(self, error: BaseException | None = None) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Tracing(Protocol):
    """Where requests' spans come from. `headers` are (name, value) pairs as ASGI has them."""

    def request(
        self,
        name: str,
        headers: Sequence[tuple[bytes, bytes]] = (),
        attributes: Mapping[str, Attribute] | None = None,
    ) -> Span: ...

    def close(self) -> None: ...


def open_tracing(on: bool) -> Tracing:
    """Raises Unavailable where traces are asked for and OpenTelemetry is not installed."""
    if not on:
        return NoTracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        tracing = OpenTelemetry()
        tracing.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ImportError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise Unavailable(f"traces need {error.name}", hint="pip install 'xpert-toolkit[otel]'") from None
    return tracing


class _NoSpan:
    def set(self, attributes: Mapping[str, Attribute]) -> None:
        pass

    def child(self, name: str, attributes: Mapping[str, Attribute] | None = None) -> Span:
        return self

    def past(self, name: str, begun: float, ended: float) -> None:
        pass

    def end(self, error: BaseException | None = None) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


_NO_SPAN = _NoSpan()


class NoTracing:
    """Traces nothing."""

    def request(
        self,
        name: str,
        headers: Sequence[tuple[bytes, bytes]] = (),
        attributes: Mapping[str, Attribute] | None = None,
    ) -> Span:
        return _NO_SPAN

    def close(self) -> None:
        pass


class OpenTelemetry:
    """Spans of a provider of its own: another user of OpenTelemetry in the process keeps the global one."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor

        self.provider: TracerProvider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        if exporter is not None:  # at once and in order, for tests; `open_tracing` sends in batches
            self.provider.add_span_processor(SimpleSpanProcessor(exporter))
        self._tracer: Tracer = self.provider.get_tracer("xpert", xpert.__version__)

    def request(
        self,
        name: str,
        headers: Sequence[tuple[bytes, bytes]] = (),
        attributes: Mapping[str, Attribute] | None = None,
    ) -> Span:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {
            key.decode("latin-1").lower(): value.decode("latin-1")
            for key, value in headers
            if key.lower() in (b"traceparent", b"tracestate")
        }
        parent = TraceContextTextMapPropagator().extract(carrier, Context())
        begun = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes)
        return _TracedSpan(self._tracer, begun)

    def close(self) -> None:
        """Sends what is left; waits no longer than SHUTDOWN_SECONDS, though a collector that is down takes longer."""
        closing = threading.Thread(target=self.provider.shutdown, name="xpert-traces-end", daemon=True)
        closing.start()
        closing.join(SHUTDOWN_SECONDS)


class _TracedSpan:
    def __init__(self, tracer: Tracer, span: OtelSpan) -> None:
        self._tracer = tracer
        self._span = span
        self._ended = False

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        if not self._ended:  # OpenTelemetry would log a warning
            self._span.set_attributes(attributes)

    def child(self, name: str, attributes: Mapping[str, Attribute] | None = None) -> Span:
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        parent = set_span_in_context(self._span, Context())
        return _TracedSpan(self._tracer, self._tracer.start_span(name, parent, attributes=attributes))

    def past(self, name: str, begun: float, ended: float) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        epoch = time.time_ns() - time.monotonic_ns()
        parent = set_span_in_context(self._span, Context())
        child = self._tracer.start_span(name, parent, start_time=epoch + int(begun * 1e9))
        child.end(epoch + int(max(begun, ended) * 1e9))

    def end(self, error: BaseException | None = None) -> None:
        """An error is told by its kind alone: its words may hold what the user wrote. What the client did wrong is, by
        the conventions, no error of the server."""
        from opentelemetry.trace import StatusCode

        if self._ended:
            return
        self._ended = True
        if error is not None:
            self._span.set_attribute("error.type", type(error).__qualname__)
            if getattr(error, "http_status", 500) >= 500:
                self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)


# ── attributes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def http_attributes(method: str, route: str) -> dict[str, Attribute]:
    """Of the request's span: `route` is the path's pattern."""
    return {"http.request.method": method, "http.route": route}


def request_attributes(operation: str, model: str, sampling: Sampling) -> dict[str, Attribute]:
    """Of the request's span: what was asked for. `operation` is a word of the conventions: chat, text_completion."""
    found: dict[str, Attribute] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "xpert",
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
    }
    if sampling.top_k:
        found["gen_ai.request.top_k"] = sampling.top_k
    if sampling.seed is not None:
        found["gen_ai.request.seed"] = sampling.seed
    return found


def route_attributes(route: Route) -> dict[str, Attribute]:
    """Of the `route` span: who answers, heaviest first, and why."""
    return {
        "xpert.experts": [key for key, _ in route.experts],
        "xpert.weights": ",".join(f"{weight:.4g}" for _, weight in route.experts),
        "xpert.reason": route.reason,
    }


def reply_attributes(
    id: str, model: str, *, finished: Sequence[str], prompt_tokens: int, completion_tokens: int
) -> dict[str, Attribute]:
    """Of the request's span and of `generate`: what came of it; `finished` has one word per choice."""
    return {
        "gen_ai.response.id": id,
        "gen_ai.response.model": model,
        "gen_ai.response.finish_reasons": list(finished),
        "gen_ai.usage.input_tokens": prompt_tokens,
        "gen_ai.usage.output_tokens": completion_tokens,
    }


def _resource() -> Resource:
    """As OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say; without them the service is `xpert`."""
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource

    told = Resource.create()
    own: dict[str, str] = {SERVICE_VERSION: xpert.__version__}
    if str(told.attributes[SERVICE_NAME]).startswith("unknown_service"):
        return told.merge(Resource({**own, SERVICE_NAME: "xpert"}))
    return Resource(own).merge(told)
