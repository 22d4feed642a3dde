"""How much each expert of a mixture is used, by the requests that a server has logged."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from xpert.experts.server.request_log import RequestRecord

__all__ = ["DayUse", "ExpertUse", "RequestUsage", "request_usage"]


@dataclass(frozen=True)
class ExpertUse:
    """requests: routed to it, alone or among others; share: of all weight that the router gave. tokens: of prompts and
    replies where it weighs most. chance: the mean where it weighs most and the router is calibrated. asked: requests
    that named it themselves, which count nowhere else here."""

    expert: str
    requests: int
    share: float
    tokens: int
    chance: float | None
    asked: int


@dataclass(frozen=True)
class DayUse:
    """Of a day (UTC): the requests that a router routed, and how many of them fell back to the base model."""

    day: str
    routed: int
    fell_back: int


@dataclass(frozen=True)
class RequestUsage:
    """Experts by share, the most used first; days in order. base_asked: requests that named the base model."""

    experts: tuple[ExpertUse, ...]
    days: tuple[DayUse, ...]
    requests: int
    routed: int
    fell_back: int
    base_asked: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def request_usage(records: Sequence[RequestRecord], *, known: Iterable[str] = ()) -> RequestUsage:
    """Experts in `known` are told of though nobody used them. Time O(records)."""
    routed = [record for record in records if record.routed]
    requests: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    weights: defaultdict[str, float] = defaultdict(float)
    chances: defaultdict[str, list[float]] = defaultdict(list)
    for record in routed:
        for key, weight in record.experts:
            requests[key] += 1
            weights[key] += weight
        if record.experts:
            first = record.experts[0][0]
            tokens[first] += record.prompt_tokens + record.completion_tokens
            if record.chance is not None:
                chances[first].append(record.chance)
    named = [record for record in records if not record.routed]
    asked = Counter(key for record in named for key, _ in record.experts)
    total = sum(weights.values())
    experts = [
        ExpertUse(
            key,
            requests[key],
            round(weights[key] / total, 6) if total else 0.0,
            tokens[key],
            round(sum(chances[key]) / len(chances[key]), 4) if chances[key] else None,
            asked[key],
        )
        for key in {**weights, **asked, **dict.fromkeys(known)}
    ]
    return RequestUsage(
        experts=tuple(sorted(experts, key=lambda use: (-use.share, -use.asked, use.expert))),
        days=_days(routed),
        requests=len(records),
        routed=len(routed),
        fell_back=sum(record.fell_back for record in routed),
        base_asked=sum(not record.experts for record in named),
    )


def _days(routed: Sequence[RequestRecord]) -> tuple[DayUse, ...]:
    counts: Counter[str] = Counter()
    fell: Counter[str] = Counter()
    for record in routed:
        day = datetime.fromtimestamp(record.time, UTC).strftime("%Y-%m-%d")
        counts[day] += 1
        fell[day] += record.fell_back
    return tuple(DayUse(day, counts[day], fell[day]) for day in sorted(counts))
