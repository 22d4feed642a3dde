"""How a server runs: one dataclass is the options of `xpert serve`, a --config file, and what `create_app` takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xpert.config import Config, option

__all__ = ["ServeOptions"]


@dataclass(frozen=True)
class ServeOptions(Config):
    max_batch: int = option(16, "replies computed at a time", minimum=1)
    max_queue: int = option(64, "requests that may wait for a place; beyond, 429 with Retry-After", minimum=0)
    deadline: float = option(600.0, "seconds a request may take, its time in the queue included", minimum=0.1)
    max_body: int = option(8 << 20, "bytes of a request's body; beyond, 413", minimum=1024)
    max_n: int = option(64, "replies that one request may ask for: prompts times `n`", minimum=1)
    overrides: bool = option(True, "whether a request may choose router and aggregator, as in `NAME:router=skills,k=3`")
    grace: float = option(30.0, "seconds that running answers get once the server is told to stop", minimum=0)
    follow: str = option(
        "name",
        "what is served anew without a restart: name: the newest version of what was named without one, and a changed "
        "file; experts: also the newest version of each expert; all: also every other expert of the base in the "
        "registry that the router can choose; none: nothing",
        choices=("name", "experts", "all", "none"),
    )
    watch: float = option(5.0, "seconds between two looks at the registry", minimum=0.1)
    api_keys: Path | None = option(None, "file of hashed API keys and their limits, made by `xpert keys`")
    cors: tuple[str, ...] = option(
        (), "origins whose pages may ask from a browser, such as https://chat.example.org; * is every one"
    )
    embedder: str | None = option(None, "what /v1/embeddings answers with: minilm, st:NAME or base; without it, 404")
    access_log: str = option(
        "none", "a line per request on stderr: as JSON, as text, or none", choices=("json", "text", "none")
    )
    metrics: bool = option(True, "whether /metrics answers")
    trace: bool = option(False, "send OpenTelemetry traces; where to, its own OTEL_* environment variables say")
    request_log: Path | None = option(
        None, "folder to which prompts, routes and replies are logged, for `xpert registry gaps`"
    )
    request_log_replies: bool = option(True, "whether the request log holds replies too")
