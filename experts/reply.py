"""What comes of one prompt: the answer, who gave it, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xpert.experts.routing import explain
from xpert.protocols import Route

__all__ = ["Reply"]


@dataclass(frozen=True)
class Reply:
    """An answer, who gave it and why; timings in seconds since the batch began.

    queued: until the engine took the request; first_token: until its first text; total: until its end. Tokens are of
    all that was computed for it. aggregated: how one reply came of several, with an aggregator. stage and confidence:
    of a route with two stages, which one answered (1 or 2), and how sure the first answer was.
    """

    id: str
    output: str
    route: Route
    finished: str
    prompt_tokens: int
    completion_tokens: int
    timings: Mapping[str, float] = field(default_factory=dict)
    aggregated: Mapping[str, Any] | None = None
    stage: int | None = None
    confidence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "output": self.output,
            "experts": explain(self.id, self.route)["experts"],
            "reason": self.route.reason,
            "finished": self.finished,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "timings": {name: round(seconds, 4) for name, seconds in self.timings.items()},
            **({"aggregated": dict(self.aggregated)} if self.aggregated is not None else {}),
            **({"stage": self.stage} if self.stage is not None else {}),
            **({"confidence": round(self.confidence, 6)} if self.confidence is not None else {}),
        }
