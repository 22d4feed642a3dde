"""An engine that follows a script, and questions for aggregators."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xpert import plugins
from xpert.experts.aggregating import Encoding, aggregate
from xpert.protocols import (
    EngineRequest,
    Piece,
    Question,
    RoutableExpert,
    Route,
    Sampling,
    TokenLogprob,
    Verdict,
    WeightedExperts,
)
from xpert.records import Message

__all__ = ["ScriptedEngine", "ask", "encoding", "ids_of", "made", "named", "question", "routable", "spread", "text_of"]

Script = Callable[[str, str, Sampling], str]
"""(experts joined by "+", or "base"; prompt; sampling) -> the reply."""
Likelihood = Callable[[str, str, str], float]
"""(experts, prompt, continuation) -> the log-probability of each of its tokens."""


def ids_of(text: str) -> tuple[int, ...]:
    """A token per character."""
    return tuple(map(ord, text))


def text_of(ids: Iterable[int]) -> str:
    return "".join(map(chr, ids))


def named(experts: WeightedExperts) -> str:
    return "+".join(key for key, _ in experts) or "base"


class ScriptedEngine:
    """Replies and likelihoods by script, in pieces of two requests in turn; remembers what it was asked.

    `calls`: the experts of the requests of each call, in order.
    """

    def __init__(self, script: Script, likelihood: Likelihood | None = None) -> None:
        self.script = script
        self.likelihood = likelihood
        self.requests: list[EngineRequest] = []
        self.weighed: list[tuple[EngineRequest, str]] = []
        self.calls: list[list[str]] = []

    def generate(
        self, requests: Iterable[EngineRequest], *, cancelled: Callable[[str], bool] | None = None
    ) -> Iterator[Piece]:
        asked = list(requests)
        self.requests += asked
        self.calls.append([named(request.experts) for request in asked])
        for request in reversed(asked):  # replies may end in any order
            text = self.script(named(request.experts), text_of(request.prompt_ids), request.sampling)
            tokens = tuple(TokenLogprob(ord(c), -0.5) for c in text) if request.sampling.logprobs is not None else ()
            yield Piece(request.id, text[:3], tokens=tokens[:3])
            yield Piece(request.id, text[3:], "stop", len(request.prompt_ids), len(text), tokens[3:])

    def continuation_logprobs(
        self, requests: Sequence[EngineRequest], continuations: Sequence[tuple[int, ...]]
    ) -> list[list[float]]:
        assert self.likelihood is not None, "nothing was to be weighed"
        found = []
        for request, ids in zip(requests, continuations, strict=True):
            assert ids, "an engine takes no empty continuation"
            self.weighed.append((request, text_of(ids)))
            each = self.likelihood(named(request.experts), text_of(request.prompt_ids), text_of(ids))
            found.append([each] * len(ids))
        return found

    def add_expert(self, key: str, folder: Path) -> None:
        raise NotImplementedError

    def prompt_logprobs(self, requests: Sequence[EngineRequest], alternatives: int = 0) -> list[list[TokenLogprob]]:
        raise NotImplementedError


def encoding(context: int = 100_000, keys: Mapping[str, str] | None = None) -> Encoding:
    def prompt(messages: Sequence[Message]) -> tuple[int, ...]:
        return ids_of("\n".join(f"{message.role}: {message.content}" for message in messages))

    return Encoding(prompt, ids_of, context, keys or {})


def question(
    text: str = "What is 2 + 2?",
    experts: WeightedExperts = (("a", 0.5), ("b", 0.3), ("c", 0.2)),
    *,
    id: str = "q",
    choices: tuple[str, ...] = (),
    **sampling: Any,
) -> Question:
    settings = Sampling(**({"max_tokens": 64, "seed": 1} | sampling))
    return Question(id, (Message("user", text),), Route(experts, (), "for a test"), settings, choices)


def routable(key: str, **known: Any) -> RoutableExpert:
    facts: dict[str, Any] = {
        "exemplars": (f"{key} adds numbers", f"{key} writes words in capitals", f"what {key} knows of towns"),
        "exemplar_skills": ("sums", "casing", "towns"),
        "description": f"expert {key}: all about {key * 3}",
        "skill_scores": {"sums": 0.5, "casing": 0.5, "towns": 0.5},
    }
    return RoutableExpert(key, **(facts | known))


def made(name: str, *, experts: Sequence[RoutableExpert] | None = None, seed: int = 0, **params: Any) -> Any:
    plugin = plugins.load("aggregator", name)
    aggregator = plugin(plugin.Options.from_mapping(params), seed=seed)
    aggregator.prepare([routable(key) for key in "abc"] if experts is None else experts)
    return aggregator


def ask(aggregator: Any, one: Question, engine: ScriptedEngine, *, context: int = 100_000) -> Verdict:
    verdict = aggregate(engine, encoding(context), aggregator, [one])[0].verdict
    assert verdict is not None
    return verdict


def spread(*words: object) -> int:
    """A number that depends on all of the words."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:4], "big")
