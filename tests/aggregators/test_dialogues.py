"""Driving aggregators: one question by hand, as a server does, and many in lockstep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest

from tests.aggregators.scripted import ScriptedEngine, encoding, ids_of, made, question, text_of
from xpert.errors import BadInput
from xpert.experts.aggregating import (
    LEAST_ROOM,
    Dialogue,
    Step,
    aggregate,
    answers_of,
    ask_seed,
    by_expert,
    engine_requests,
)
from xpert.protocols import Answer, Ask, EngineRequest, Question, Sampling, Verdict, Weigh, Weighed
from xpert.records import Message

Steps = Generator[Sequence[Ask | Weigh], Sequence[Answer | Weighed], Verdict]
ME = (Message("user", "hello"),)


class Written:
    """An aggregator whose steps are written in the test."""

    several = False

    def __init__(self, steps: Callable[[Question], Steps]) -> None:
        self.answer = steps


def echo(suffix: str = "!") -> ScriptedEngine:
    return ScriptedEngine(lambda experts, prompt, sampling: prompt.split(": ")[-1] + suffix, lambda *words: -0.25)


def test_one_question_driven_by_hand_equals_the_batch() -> None:
    def engine() -> ScriptedEngine:
        return ScriptedEngine(lambda e, p, s: f"{e} says {s.seed}", lambda *words: -0.001 * len(words[-1]))

    asked = question(temperature=0.8)
    aggregator = made("b4", forms=1)
    dialogue = Dialogue("chat-7", aggregator, asked, encoding(), where="prompt q")
    steps = 0
    while dialogue.verdict is None:
        steps += 1
        answers = answers_of(engine().generate(dialogue.step.generations))
        requests = list(dialogue.step.weighings)
        weighed = engine().continuation_logprobs(requests, dialogue.step.continuations)
        assert all(request.id.startswith("chat-7.") for request in (*dialogue.step.generations, *requests))
        dialogue.resume(answers, {request.id: one for request, one in zip(requests, weighed, strict=True)})
    assert steps == 2 and dialogue.step == Step()
    assert dialogue.verdict == aggregate(engine(), encoding(), aggregator, [asked])[0].verdict


def test_results_come_in_the_order_of_the_step() -> None:
    seen: list[Any] = []

    def steps(asked: Question) -> Steps:
        other = (Message("user", "bye"),)
        seen.extend(
            (
                yield [
                    Ask(other, (), asked.sampling),
                    Weigh(ME, (("a", 1.0),), ("ab", "", "cde")),
                    Ask(ME, (("a", 1.0),), dataclasses.replace(asked.sampling, logprobs=0)),
                ]
            )
        )
        assert (yield []) == [], "a step without anything"
        seen.extend((yield [Weigh(ME, (), ("", ""))]))
        return Verdict("done", (), "in order")

    found = aggregate(echo(), encoding(), Written(steps), [question()])[0]  # type: ignore[arg-type]  # is no plug-in
    bye, weighed, hello, empty = seen
    assert bye.text == "bye!" and bye.tokens == () and bye.finished == "stop"
    assert weighed == Weighed(((-0.25, -0.25), (), (-0.25, -0.25, -0.25)))
    assert hello.text == "hello!" and "".join(chr(token.token) for token in hello.tokens) == "hello!"
    assert empty == Weighed(((), ()))
    assert found.verdict == Verdict("done", (), "in order") and found.replies == 2
    assert found.completion_tokens == 4 + 6


def test_a_step_that_has_no_room_can_be_answered_by_another() -> None:
    tried: list[int] = []

    def steps(asked: Question) -> Steps:
        for length in (300, 200, 40):
            tried.append(length)
            try:
                found = yield [Ask((Message("user", "x" * length),), (), asked.sampling)]
            except BadInput as error:
                assert "the base model's context holds 100" in str(error)
                continue
            assert isinstance(found[0], Answer)
            return Verdict(found[0].text, (), "it fits")
        raise AssertionError

    found = aggregate(echo(), encoding(100), Written(steps), [question()])[0]  # type: ignore[arg-type]
    assert tried == [300, 200, 40] and found.verdict is not None and found.verdict.text == "x" * 40 + "!"


def test_an_aggregators_own_mistakes_are_not_swallowed() -> None:
    def steps(asked: Question) -> Steps:
        yield [Ask(ME, (), asked.sampling)]
        raise BadInput("cannot be")

    with pytest.raises(BadInput, match="cannot be"):
        aggregate(echo(), encoding(), Written(steps), [question()])  # type: ignore[arg-type]


def test_a_question_may_fill_the_context_and_other_prompts_may_not() -> None:
    own = Ask(ME, (), Sampling(max_tokens=50))
    length = len(encoding().prompt(ME))
    assert engine_requests(own, "x", encoding(length + 1)).generations[0].sampling.max_tokens == 1
    with pytest.raises(BadInput, match="32 of them for the reply"):
        engine_requests(own, "x", encoding(length + LEAST_ROOM - 1), least_room=LEAST_ROOM)
    short = Ask(ME, (), Sampling(max_tokens=5))
    engine_requests(short, "x", encoding(length + 5), least_room=LEAST_ROOM)
    with pytest.raises(BadInput, match="the prompt has 11 tokens"):
        engine_requests(own, "x", encoding(length))


def test_continuations_are_cut_to_the_context() -> None:
    step = engine_requests(Weigh(ME, (), ("abcdef", "", "gh")), "x", encoding(len(encoding().prompt(ME)) + 4))
    assert [text_of(ids) for ids in step.continuations] == ["abcd", "gh"]
    assert [request.id for request in step.weighings] == ["x/0", "x/2"]


def test_seeds_depend_on_question_and_ask_alone() -> None:
    seeds = {ask_seed(seed, id, number) for seed in (0, 1) for id in ("p", "q") for number in range(5)}
    assert len(seeds) == 20 and all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert ask_seed(None, "q", 3) is None
    assert ask_seed(5, "q", 3) == ask_seed(5, "q", 3)


def test_requests_of_one_expert_are_neighbours_and_long_queues_go_first() -> None:
    queue = ["a", "b", "base", "b", "c", "b", "a", "base"]
    requests = [
        EngineRequest(str(n), ids_of("x"), () if key == "base" else ((key, 1.0),)) for n, key in enumerate(queue)
    ]
    assert [request.id for request in by_expert(requests)] == ["1", "3", "5", "2", "7", "0", "6", "4"]


def test_verdicts_are_told_as_they_come() -> None:
    heard: list[int] = []
    found = aggregate(
        echo(),
        encoding(),
        made("majority"),
        [question(id=f"q{n}", experts=(("a", 1.0),)) for n in range(5)],
        finished=lambda index, dialogue: heard.append(index),
        at_once=2,
    )
    assert heard == [0, 1, 2, 3, 4] and [d.question.id for d in found] == ["q0", "q1", "q2", "q3", "q4"]


def test_the_chat_form_of_a_model(tiny_base: Any) -> None:
    from transformers import AutoTokenizer

    from xpert.chat_form import answer_ids, encode_prompt, end_of_turn
    from xpert.experts.aggregating import model_encoding

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    made_for = model_encoding(tokenizer, 512, {"a": "a@1"})
    assert made_for.prompt(ME) == encode_prompt(tokenizer, ME)
    assert (*made_for.continuation("grass is green"), *end_of_turn(tokenizer)) == answer_ids(
        tokenizer, ["grass is green"]
    )[0]
    assert made_for.continuation("") == ()
    assert made_for.experts((("a", 0.7), ("b", 0.3))) == (("a@1", 0.7), ("b", 0.3))
