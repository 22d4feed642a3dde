"""Two stages: first answers that are not sure enough are given anew, in answering and in scoring."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from xpert.errors import BadInput
from xpert.experts.cascading import confidence_of, escalated, first_stage, unsure
from xpert.protocols import Escalation, Route, RouteRequest, Sampling, TokenLogprob
from xpert.records import Row, SuiteItem

A = (("casing", 1.0),)
B = (("reversal", 1.0),)
SHORT = Sampling(max_tokens=6)


class Staged:
    """Routes everything to `casing`, and on to `reversal` below a confidence; odd prompts have no second stage."""

    def __init__(self, below: float) -> None:
        self.below = below

    def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        second = Escalation(B, self.below)
        return [Route(A, (), "staged", None if int(request.id[1:]) % 2 else second) for request in requests]


def test_confidence_is_the_geometric_mean() -> None:
    tokens = [TokenLogprob(1, math.log(0.9)), TokenLogprob(2, math.log(0.4))]
    assert confidence_of(tokens) == pytest.approx(math.sqrt(0.9 * 0.4))
    assert confidence_of([]) == 0.0 and confidence_of([TokenLogprob(1, 1e-9)]) == 1.0
    route = Route(A, (), "why", Escalation(B, 0.5))
    assert unsure(route, 0.49) and not unsure(route, 0.5) and not unsure(Route(A, (), ""), 0.0)
    assert first_stage(route, Sampling()).logprobs == 0 and first_stage(route, Sampling(logprobs=3)).logprobs == 3
    assert first_stage(Route(A, (), ""), Sampling()).logprobs is None
    again = escalated(route, 0.2)
    assert again.experts == B
    assert again.reason == "why; the first answer's confidence 0.20 is under 0.50: reversal answers anew"
    assert escalated(Route(A, (), "", Escalation((), 0.5)), 0.2).reason.endswith("the base answers anew")


@pytest.fixture
def runner_of(three: Path) -> Callable[[float], Any]:
    from xpert.experts.mixture_file import load_mixture
    from xpert.experts.serving import MixtureRunner, load_engine

    mixture = load_mixture(three)
    lm, engine = load_engine(mixture, device="cpu", max_batch=4)
    return lambda below: MixtureRunner(mixture, lm, engine, Staged(below))  # type: ignore[arg-type]  # is no mixture's


def test_the_runner_escalates_by_confidence(runner_of: Callable[[float], Any], rows: list[Row]) -> None:
    rows = rows[:8]
    first = runner_of(0.0).answer(rows, SHORT)
    assert [reply.stage for reply in first] == [1, None] * 4
    assert [reply.confidence is None for reply in first] == [False, True] * 4
    everything = runner_of(1.1).answer(rows, SHORT)
    assert [reply.stage for reply in everything] == [2, None] * 4
    middle = sorted(reply.confidence for reply in first if reply.confidence is not None)[2]
    heard: list[int] = []
    some = runner_of(middle).answer(rows, SHORT, finished=lambda index, reply: heard.append(index))
    assert sorted(heard) == list(range(8)), "each is told once, a first answer that is thrown away never"
    for row, sure, other, reply in zip(rows, first, everything, some, strict=True):
        assert sure.confidence == other.confidence == reply.confidence
        second = reply.confidence is not None and reply.confidence < middle
        wanted = other if second else sure
        assert (reply.output, reply.stage) == (wanted.output, wanted.stage), row.id
        assert reply.route.experts == (B if second else A)
        assert ("answers anew" in reply.route.reason) == second
        assert reply.to_dict()["experts"] == [{"expert": (B if second else A)[0][0], "weight": 1.0}]
        assert ("stage" in reply.to_dict()) == (reply.stage is not None)
        assert reply.completion_tokens >= sure.completion_tokens
    assert {reply.stage for reply in some} == {1, 2, None}


def test_confidences_are_those_of_the_engines_tokens(runner_of: Callable[[float], Any], rows: list[Row]) -> None:
    runner = runner_of(0.0)
    reply = runner.answer(rows[:1], SHORT)[0]
    asked = runner.engine_request("x", rows[0].messages, A, Sampling(max_tokens=6, logprobs=0))
    tokens = [token for piece in runner.engine.generate([asked]) for token in piece.tokens]
    assert tokens and reply.confidence == pytest.approx(math.exp(sum(t.logprob for t in tokens) / len(tokens)))
    assert 0 < reply.confidence < 1


def test_a_second_stage_and_an_aggregator_exclude_each_other(three: Path, rows: list[Row]) -> None:
    from xpert.experts.aggregated import question_of

    with pytest.raises(BadInput, match="exclude each other") as raised:
        question_of(rows[0], Route(A, (), "", Escalation(B, 0.5)), SHORT)
    assert raised.value.where == f"prompt {rows[0].id}"


def test_scores_are_those_of_the_stage_that_answers(runner_of: Callable[[float], Any], rows: list[Row]) -> None:
    from xpert.experts.evaluate import EvalOptions, Subject
    from xpert.experts.staged_subjects import staged_subject
    from xpert.experts.subjects import score_subjects

    runner = runner_of(0.0)
    answered = runner.answer(rows[:8], SHORT)
    items = [SuiteItem(row, (reply.output,), "exact", "s") for row, reply in zip(rows[:8], answered, strict=True)]
    first, second = Subject.fixed("staged", A), Subject.fixed("staged", B)

    def scored(below: float, known: Any = None) -> Any:
        subject = staged_subject(first, second, Staged(below), runner.lm, runner.engine)  # type: ignore[arg-type]
        plain = Subject.fixed("plain", A)
        options = EvalOptions(max_tokens=6)
        return score_subjects(runner.lm, runner.engine, [subject, plain], items, options, known=known)

    never = scored(0.0)
    assert [r.score for r in never.results["staged"]] == [1.0] * 8 == [r.score for r in never.results["plain"]]
    always = scored(1.1, known=never)
    outputs = [reply.output for reply in runner_of(1.1).answer(rows[:8], SHORT)]
    assert [r.output for r in always.results["staged"]] == outputs
    assert [r.experts for r in always.results["staged"]] == [B, A] * 4
    assert [r.score for r in always.results["plain"]] == [1.0] * 8
    assert always.generated == 8 + 4, "first answers and second ones; the plain subject's are known"
    assert never.generated == 16
