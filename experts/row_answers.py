"""Answering a batch of routed rows: by the route's experts as one, in two stages, or by an aggregator."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from xpert.experts.aggregated import question_of
from xpert.experts.aggregating import Dialogue, aggregate, model_encoding
from xpert.experts.cascading import confidence_of, escalated, first_stage, unsure
from xpert.experts.reply import Reply
from xpert.progress import SILENT, Progress
from xpert.protocols import Aggregator, EngineRequest, Route, Sampling, TokenLogprob
from xpert.records import Row

if TYPE_CHECKING:
    from xpert.experts.serving import MixtureRunner

__all__ = ["answer_aggregated", "answer_in_stages"]


def answer_in_stages(
    runner: MixtureRunner,
    rows: Sequence[Row],
    routes: Sequence[Route],
    samplings: Sequence[Sampling],
    *,
    progress: Progress = SILENT,
    finished: Callable[[int, Reply], None] | None = None,
) -> list[Reply]:
    """Replies in the order of the rows, all in one batch; `finished(index, reply)` hears of each as it ends.

    First answers of routes with a second stage are thrown away where they are not sure enough, and given anew in a
    second pass over all of them.
    """
    routes = list(routes)
    requests = [
        runner.engine_request(
            str(index), row.messages, route.experts, first_stage(route, own), where=f"prompt {row.id}"
        )
        for index, (row, route, own) in enumerate(zip(rows, routes, samplings, strict=True))
    ]
    begin = time.monotonic()
    clock: dict[int, dict[str, float]] = {index: {} for index in range(len(rows))}
    texts: list[list[str]] = [[] for _ in rows]
    told: list[list[TokenLogprob]] = [[] for _ in rows]
    spent: list[tuple[int, int]] = [(0, 0)] * len(rows)
    confidence: dict[int, float] = {}
    replies: dict[int, Reply] = {}
    again: list[int] = []

    def feed(stage: int) -> Iterator[EngineRequest]:
        for index in range(len(rows)) if stage == 1 else again:
            if stage == 2:
                routes[index], texts[index] = escalated(routes[index], confidence[index]), []
                requests[index] = runner.engine_request(
                    str(index),
                    rows[index].messages,
                    routes[index].experts,
                    samplings[index],
                    where=f"prompt {rows[index].id}",
                )
            clock[index].setdefault("queued", time.monotonic() - begin)
            yield requests[index]

    with progress.task("answering", total=len(rows)) as task:
        tokens = 0
        for stage in (1, 2):
            for piece in runner.engine.generate(feed(stage)):
                index = int(piece.request_id)
                clock[index].setdefault("first_token", time.monotonic() - begin)
                texts[index].append(piece.text)
                told[index].extend(piece.tokens)
                if piece.finished is None:
                    continue
                tokens += piece.completion_tokens
                spent[index] = (spent[index][0] + piece.prompt_tokens, spent[index][1] + piece.completion_tokens)
                two_stages = routes[index].escalation is not None
                if two_stages and stage == 1:
                    confidence[index] = confidence_of(told[index])
                    if unsure(routes[index], confidence[index]):
                        del clock[index]["first_token"]
                        again.append(index)
                        continue
                clock[index]["total"] = time.monotonic() - begin
                reply = replies[index] = Reply(
                    rows[index].id,
                    "".join(texts[index]),
                    routes[index],
                    piece.finished,
                    *spent[index],
                    clock[index],
                    stage=stage if two_stages else None,
                    confidence=confidence.get(index),
                )
                if finished is not None:
                    finished(index, reply)
                task.advance(1, f"{tokens / max(time.monotonic() - begin, 1e-9):,.0f} tokens/s")
            if not again:
                break
    return [replies[index] for index in range(len(rows))]


def answer_aggregated(
    runner: MixtureRunner,
    aggregator: Aggregator,
    rows: Sequence[Row],
    routes: Sequence[Route],
    samplings: Sequence[Sampling],
    *,
    progress: Progress = SILENT,
    finished: Callable[[int, Reply], None] | None = None,
) -> list[Reply]:
    """Replies in the order of the rows, each made by the aggregator; `finished(index, reply)` hears of each verdict."""
    choice = runner.mixture.aggregator
    assert choice is not None
    name, begin = choice.name, time.monotonic()
    replies: dict[int, Reply] = {}

    def ended(index: int, dialogue: Dialogue) -> None:
        verdict = dialogue.verdict
        assert verdict is not None
        replies[index] = Reply(
            dialogue.question.id,
            verdict.text,
            dataclasses.replace(routes[index], experts=verdict.experts),
            verdict.finished,
            dialogue.prompt_tokens,
            dialogue.completion_tokens,
            {"total": time.monotonic() - begin},
            {"by": name, "reason": verdict.reason, "replies": dialogue.replies, "log": dict(verdict.log)},
        )
        if finished is not None:
            finished(index, replies[index])

    questions = [
        question_of(row, route, sampling) for row, route, sampling in zip(rows, routes, samplings, strict=True)
    ]
    encoding = model_encoding(runner.lm.tokenizer, runner.engine.context, runner.keys)
    aggregate(runner.engine, encoding, aggregator, questions, finished=ended, progress=progress)
    return [replies[index] for index in range(len(rows))]
