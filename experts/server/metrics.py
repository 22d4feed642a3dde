"""What a server has done and does, for Prometheus: `GET /metrics`.

Every metric belongs to one server and its own registry, so that two in one process do not mix. Labels are bounded:
routes are patterns, and experts only those of the mixture; no client can make a new series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, Info
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import xpert
from xpert.experts.server.request_watch import Seen

__all__ = ["Moment", "ServerMetrics", "engine_figures"]

_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_QUEUE_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 600)

# What an engine counts -> the metric, and what it says.
_ENGINE_COUNTERS = {
    "hits": ("xpert_engine_adapter_hits", "Adapters that were on the device when they were asked for."),
    "misses": ("xpert_engine_adapter_misses", "Adapters that were not on the device when they were asked for."),
    "loads": ("xpert_engine_adapter_loads", "Adapters read from disk."),
    "uploads": ("xpert_engine_adapter_uploads", "Adapters copied to the device."),
    "evictions": ("xpert_engine_adapter_evictions", "Adapters that left the device."),
    "host_evictions": ("xpert_engine_adapter_host_evictions", "Adapters that left host memory."),
    "bytes_loaded": ("xpert_engine_adapter_loaded_bytes", "Bytes of adapters read from disk."),
    "bytes_uploaded": ("xpert_engine_adapter_uploaded_bytes", "Bytes of adapters copied to the device."),
    "prefix_hits": ("xpert_engine_prefix_hits", "Prompts that began with a prefix kept from an earlier one."),
    "prefix_tokens": ("xpert_engine_prefix_tokens", "Prompt tokens that kept prefixes spared."),
    "made": ("xpert_engine_adapter_folders", "Adapter folders written for vLLM."),
    "reused": ("xpert_engine_adapter_folders_reused", "Sets of experts whose adapter folder was at hand for vLLM."),
    "evicted": ("xpert_engine_adapter_folders_evicted", "Adapter folders for vLLM that were given up."),
}
_ENGINE_GAUGES = {
    "experts": ("xpert_engine_experts", "Experts that the engine knows."),
    "resident": ("xpert_engine_adapters_on_device", "Adapters on the device."),
    "in_host": ("xpert_engine_adapters_in_host", "Adapters in host memory."),
    "device_bytes": ("xpert_engine_adapter_device_bytes", "Bytes of adapters on the device."),
    "host_bytes": ("xpert_engine_adapter_host_bytes", "Bytes of adapters in host memory."),
    "prefix_bytes": ("xpert_engine_prefix_bytes", "Bytes of kept prefixes."),
    "adapters": ("xpert_engine_adapter_folders_kept", "Adapter folders kept for vLLM."),
    "bytes": ("xpert_engine_adapter_folder_bytes", "Bytes of adapter folders kept for vLLM."),
}


@dataclass(frozen=True)
class Moment:
    """How things stand when somebody looks. `running` requests are in the batch, `waiting` ones admitted and not yet
    there; `generations` of the mixture have requests or are current; `engine`: see `engine_figures`."""

    running: int = 0
    waiting: int = 0
    generations: int = 1
    ready: bool = True
    engine: Mapping[str, int] = field(default_factory=dict)


class ServerMetrics:
    """The metrics of one server. `observe` is a `Hear` of RequestWatch, and what it hears of is all that is counted;
    `moment` is asked at every scrape and must be quick."""

    def __init__(self, experts: Iterable[str], moment: Callable[[], Moment]) -> None:
        self.registry = _Registry()
        to = self.registry
        Info("xpert_build", "The version of xpert.", registry=to).info({"version": xpert.__version__})
        self._requests = Counter(
            "xpert_requests",
            "Requests that have ended, by the path's pattern, the status and the kind of model asked for.",
            ("route", "status", "model_kind"),
            registry=to,
        )
        self._seconds = Histogram(
            "xpert_request_seconds",
            "Seconds from a request's arrival to the end of its reply.",
            ("route",),
            buckets=_REQUEST_SECONDS,
            registry=to,
        )
        self._first_token = Histogram(
            "xpert_time_to_first_token_seconds",
            "Seconds from a request's arrival to the first text of its reply.",
            buckets=_FIRST_TOKEN_SECONDS,
            registry=to,
        )
        self._per_token = Histogram(
            "xpert_time_per_output_token_seconds",
            "Mean seconds per token of a reply after its first, one observation a request.",
            buckets=_TOKEN_SECONDS,
            registry=to,
        )
        self._queue = Histogram(
            "xpert_queue_seconds", "Seconds that requests waited for the engine.", buckets=_QUEUE_SECONDS, registry=to
        )
        self._tokens = Counter("xpert_tokens", "Tokens of prompts and replies.", ("kind",), registry=to)
        self._by_expert = Counter(
            "xpert_expert_requests", "Requests answered with an expert, alone or mixed.", ("expert",), registry=to
        )
        self._fallbacks = Counter(
            "xpert_base_fallbacks", "Requests for the mixture that its router left to the base model.", registry=to
        )
        self._left = Counter("xpert_clients_left", "Requests whose client left before the reply's end.", registry=to)
        # Made at once, and so at 0 from the start: a rate has something to begin from.
        self._prompt, self._completion = self._tokens.labels("prompt"), self._tokens.labels("completion")
        self._experts: dict[str, Counter] = {}
        self.serve(experts)
        to.register(_Standing(moment))

    def serve(self, experts: Iterable[str]) -> None:
        """The experts of the current mixture: new ones begin at 0, and the series of those that are gone end."""
        keys = frozenset(experts)
        for key in self._experts.keys() - keys:
            self._by_expert.remove(key)
        self._experts = {key: self._by_expert.labels(key) for key in sorted(keys)}

    def observe(self, seen: Seen) -> None:
        """Counts a request that has ended. An expert that is no longer served is not counted."""
        facts, route = seen.facts, seen.route or "none"
        self._requests.labels(route, str(seen.status), facts.model_kind).inc()
        self._seconds.labels(route).observe(seen.seconds)
        if seen.ended == "left":
            self._left.inc()
        if facts.queue_seconds is not None:
            self._queue.observe(facts.queue_seconds)
        if facts.first_token_seconds is not None:
            self._first_token.observe(facts.first_token_seconds)
        if facts.token_seconds is not None and facts.completion_tokens is not None and facts.completion_tokens > 1:
            self._per_token.observe(facts.token_seconds / (facts.completion_tokens - 1))
        self._prompt.inc(facts.prompt_tokens or 0)
        self._completion.inc(facts.completion_tokens or 0)
        for key in facts.experts:
            if (expert := self._experts.get(key)) is not None:
                expert.inc()
        if facts.fell_back:
            self._fallbacks.inc()

    def render(self, accept: str | None = None) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics where `accept` asks for it, else Prometheus's text."""
        encode, content_type = choose_encoder(accept or "")
        return encode(self.registry), content_type


def engine_figures(engine: object) -> dict[str, int]:
    """What an engine tells of itself: the `counters` of one that holds adapters in memory, the `adapters` of one that
    writes them for vLLM. An engine that tells nothing has none."""
    counters, adapters = getattr(engine, "counters", None), getattr(engine, "adapters", None)
    if isinstance(counters, Mapping):
        return dict(counters)
    return asdict(adapters) if is_dataclass(adapters) and not isinstance(adapters, type) else {}


class _Registry(CollectorRegistry):
    """Without the series `*_created`, which double what is sent and which nobody asked for."""

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _Standing(Collector):
    """What is read off when somebody looks, in place of being kept up to date."""

    def __init__(self, moment: Callable[[], Moment]) -> None:
        self._moment = moment

    def collect(self) -> Iterator[Metric]:
        now = self._moment()
        yield GaugeMetricFamily("xpert_requests_running", "Requests in the batch.", now.running)
        yield GaugeMetricFamily("xpert_requests_waiting", "Requests admitted and not yet in the batch.", now.waiting)
        yield GaugeMetricFamily(
            "xpert_generations", "Generations of the mixture with requests, the current one included.", now.generations
        )
        yield GaugeMetricFamily("xpert_ready", "1 while requests are taken, 0 once the server stops.", int(now.ready))
        for key, (name, text) in _ENGINE_COUNTERS.items():
            if key in now.engine:
                yield CounterMetricFamily(name, text, now.engine[key])
        for key, (name, text) in _ENGINE_GAUGES.items():
            if key in now.engine:
                yield GaugeMetricFamily(name, text, now.engine[key])
