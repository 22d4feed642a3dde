"""Subjects of an evaluation whose answers take several requests: behind an aggregator, or with a second stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xpert.experts.aggregated import question_of
from xpert.experts.aggregating import aggregate, model_encoding
from xpert.experts.cascading import confidence_of, first_stage, unsure
from xpert.experts.evaluate import Given, Subject
from xpert.experts.routing import MixtureRouter
from xpert.progress import SILENT, Progress
from xpert.protocols import Aggregator, Engine, EngineRequest, Piece, RouteRequest, Sampling, TokenLogprob
from xpert.records import SuiteItem

if TYPE_CHECKING:
    from xpert.language_model import LanguageModel

__all__ = ["aggregated_subject", "requests_of", "staged_subject"]


def aggregated_subject(
    subject: Subject,
    router: MixtureRouter,
    aggregator: Aggregator,
    lm: LanguageModel,
    engine: Any,
    keys: Mapping[str, str],
    *,
    progress: Progress = SILENT,
) -> Subject:
    """The subject scored by what its mixture's aggregator makes of the routes' experts; `keys` are the engine's."""
    encoding = model_encoding(lm.tokenizer, engine.context, keys)

    def answers(items: Sequence[SuiteItem], sampling: Sampling) -> list[Given]:
        routes = router.route(requests_of(items))
        questions = [
            question_of(item.row, route, sampling, item.choices or ())
            for item, route in zip(items, routes, strict=True)
        ]
        given = []
        for dialogue in aggregate(engine, encoding, aggregator, questions, progress=progress):
            assert dialogue.verdict is not None
            experts = encoding.experts(dialogue.verdict.experts)
            given.append(Given(dialogue.verdict.text, experts, dialogue.replies, dialogue.completion_tokens))
        return given

    return dataclasses.replace(subject, answers=answers)


def staged_subject(first: Subject, second: Subject, router: MixtureRouter, lm: LanguageModel, engine: Any) -> Subject:
    """The subject `first`, of whose answers those that are not sure enough are given anew by `second`.

    Cost: one answer per item, and one more where the first is not sure enough.
    """
    from xpert.chat_form import encode_prompt

    def answers(items: Sequence[SuiteItem], sampling: Sampling) -> list[Given]:
        routes = router.route(requests_of(items))
        prompts = [encode_prompt(lm.tokenizer, item.row.messages) for item in items]
        asked = first.asks(items)
        replies = _replies(
            engine,
            [
                one.request(str(index), prompts[index], first_stage(routes[index], sampling))
                for index, one in enumerate(asked)
            ],
        )
        given = {index: Given(reply.text, asked[index].experts, 1, reply.tokens) for index, reply in replies.items()}
        again = [index for index, reply in replies.items() if unsure(routes[index], confidence_of(reply.told))]
        anew = second.asks(items) if again else []
        requests = [anew[index].request(str(index), prompts[index], sampling) for index in again]
        for index, reply in _replies(engine, requests).items():
            given[index] = Given(reply.text, anew[index].experts, 2, given[index].tokens + reply.tokens)
        return [given[index] for index in range(len(items))]

    return dataclasses.replace(first, answers=answers)


@dataclasses.dataclass
class _Reply:
    text: str = ""
    tokens: int = 0
    told: list[TokenLogprob] = dataclasses.field(default_factory=list)


def _replies(engine: Engine, requests: Sequence[EngineRequest]) -> dict[int, _Reply]:
    replies: dict[int, _Reply] = {}
    pieces: Iterable[Piece] = engine.generate(requests) if requests else ()
    for piece in pieces:
        reply = replies.setdefault(int(piece.request_id), _Reply())
        reply.text += piece.text
        reply.tokens += piece.completion_tokens if piece.finished else 0
        reply.told += piece.tokens
    return replies


def requests_of(items: Sequence[SuiteItem]) -> list[RouteRequest]:
    return [RouteRequest(item.row.id, item.row.messages, item.skill) for item in items]
