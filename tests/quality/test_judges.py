"""Judges: replies reach their own questions and are kept, every failure is told, what a reply says is read strictly."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xpert.chat_form import encode_prompt
from xpert.errors import BadInput, NotFound, Unavailable
from xpert.judges import Judge, Question, open_judge
from xpert.language_model import load_model
from xpert.preferences import ask_votes, read_choice
from xpert.records import Message

Start = Callable[[Callable[[str], Any]], Any]


def ask(spec: str, count: int = 12, **settings: Any) -> tuple[Judge, list[str]]:
    judge = open_judge(spec, **{"retries": 0, "timeout": 20.0, **settings})
    return judge, judge.ask([Question(f"question {index}") for index in range(count)])


# ── endpoints ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_replies_that_end_in_another_order_reach_their_questions(endpoint: Start) -> None:
    ended: list[int] = []
    lock = threading.Lock()

    def slow_first(question: str) -> str:
        index = int(question.split()[1])
        time.sleep(0.03 * (6 - index % 6))
        with lock:
            ended.append(index)
        return f"reply {index}"

    server = endpoint(slow_first)
    _, replies = ask(server.spec, concurrency=6)
    assert replies == [f"reply {index}" for index in range(12)]
    assert ended != sorted(ended)
    assert {request["model"] for request in server.asked} == {"scripted"}


def test_concurrency_is_bounded(endpoint: Start) -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def count(_: str) -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return "A"

    ask(endpoint(count).spec, concurrency=3)
    assert 1 < most <= 3


def test_what_was_answered_is_not_asked_again(endpoint: Start) -> None:
    server = endpoint(lambda question: question.upper())
    judge, first = ask(server.spec, 5)
    assert judge.asked == len(server.asked) == 5
    again, second = ask(server.spec, 7)
    assert again.asked == 2
    assert second[:5] == first
    repeated = again.ask([Question("new"), Question("new"), Question("new", sample=1)])
    assert repeated == ["NEW"] * 3
    assert again.asked == 4  # a repeated sample is a question of its own
    assert open_judge(server.spec, cache=None).ask([Question("new")]) == ["NEW"]
    assert len(server.asked) == 10


def test_a_run_that_failed_goes_on_from_there(endpoint: Start) -> None:
    broken = True

    def script(question: str) -> Any:
        if broken and question == "question 2":
            return 500
        time.sleep(0.05)  # those that run beside the failure end after it, and are kept all the same
        return "fine"

    server = endpoint(script)
    with pytest.raises(Unavailable, match="the judge fails"):
        ask(server.spec, concurrency=3)
    answered = len(server.asked) - 1
    assert 2 <= answered < 11
    broken = False
    judge, replies = ask(server.spec)
    assert judge.asked == 12 - answered
    assert replies == ["fine"] * 12


def test_a_line_cut_short_by_a_stop_is_asked_again(endpoint: Start, tmp_path: Path) -> None:
    server = endpoint(lambda question: "fine")
    ask(server.spec, 3, cache=tmp_path)
    [file] = tmp_path.glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-9])
    judge, _ = ask(server.spec, 3, cache=tmp_path)
    assert judge.asked == 1
    judge, replies = ask(server.spec, 3, cache=tmp_path)
    assert (judge.asked, replies) == (0, ["fine"] * 3)


def test_a_passing_failure_is_tried_again(endpoint: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_, **__: 0.0)
    failures = iter([503, 429])
    server = endpoint(lambda question: next(failures, "A"))
    _, replies = ask(server.spec, 1, retries=2)
    assert replies == ["A"]
    assert len(server.asked) == 3


def test_the_key_comes_from_the_environment(endpoint: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = endpoint(lambda question: "A")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    ask(server.spec, 1)
    assert server.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("reply", "error", "said"),
    [
        (401, BadInput, "Set OPENAI_API_KEY"),
        (404, NotFound, "knows no such model or path: .*scripted 404"),
        (400, BadInput, "refuses the question: .*scripted 400"),
        (500, Unavailable, "the judge fails: .*scripted 500"),
        (429, Unavailable, "the judge fails: .*scripted 429"),
        ({"hello": 1}, Unavailable, "not a chat completion"),
    ],
)
def test_failures_are_told(endpoint: Start, reply: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        ask(endpoint(lambda question: reply).spec, 1)


def test_a_judge_that_is_too_slow(endpoint: Start) -> None:
    wait = threading.Event()
    try:
        with pytest.raises(Unavailable, match="did not answer in time"):
            ask(endpoint(lambda question: wait.wait(5) or "A").spec, 1, timeout=0.1)
    finally:
        wait.set()


def test_a_judge_that_is_not_there() -> None:
    with socket.socket() as taken:  # bound and not listening: nobody answers at its port
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(Unavailable, match="cannot be reached"):
            ask(f"http://127.0.0.1:{taken.getsockname()[1]}/v1#x", 1)


def test_an_endpoint_that_wants_the_limit_under_another_name(endpoint: Start) -> None:
    def modern(_: str) -> Any:
        return (400, "use 'max_completion_tokens' instead") if "max_tokens" in server.asked[-1] else "A"

    server = endpoint(modern)
    _, replies = ask(server.spec, 3, concurrency=1)
    assert replies == ["A"] * 3
    assert ["max_tokens" in request for request in server.asked] == [True, False, False, False]


def test_without_the_package_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(Unavailable, match=r"xpert-toolkit\[judge\]"):
        open_judge("http://localhost:1/v1#m")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("http://localhost:1/v1", "names no model. Write http://HOST:PORT/v1#MODEL"),
        ("localhost:8000/v1#m", "is not understood"),
        ("ftp://host#m", "is not understood"),
        ("local:", "is not understood"),
        ("", "is not understood"),
    ],
)
def test_specs_that_cannot_be_read(spec: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        open_judge(spec)
    assert said in str(caught.value)


# ── models in this process ───────────────────────────────────────────────────────────────────────────────────────


def greedy(lm: Any, text: str, count: int) -> str:
    import torch

    ids = list(encode_prompt(lm.tokenizer, (Message("user", text),)))
    made: list[int] = []
    while len(made) < count:
        with torch.no_grad():
            token = int(lm.model(torch.tensor([ids + made])).logits[0, -1].argmax())
        if token in lm.stop_ids:
            break
        made.append(token)
    return str(lm.tokenizer.decode(made, skip_special_tokens=True)).strip()


def test_a_local_judge_answers_a_batch_as_one_by_one(tiny_base: Path) -> None:
    lm = load_model(str(tiny_base), device="cpu")
    texts = ["Add.", "Which country is the city in? " * 4, "x", "Write the word in capitals."]
    questions = [Question(text, max_tokens=4 + index) for index, text in enumerate(texts)]
    judge = open_judge(f"local:{tiny_base}", device="cpu")
    assert judge.ask(questions) == [greedy(lm, q.text, q.max_tokens) for q in questions]
    assert open_judge(str(tiny_base), device="cpu").ask(questions[:1])  # the same judge under its other name
    assert judge.asked == 4


def test_draws_differ_by_sample_and_not_by_batch(tiny_base: Path) -> None:
    questions = [Question("Say something.", 1.0, 8, sample) for sample in range(4)]
    together = open_judge(str(tiny_base), device="cpu", cache=None).ask(questions)
    alone = [open_judge(str(tiny_base), device="cpu", cache=None).ask([question])[0] for question in questions[:2]]
    assert len(set(together)) > 1
    assert together[:2] == alone


def test_a_question_longer_than_the_context(tiny_base: Path) -> None:
    with pytest.raises(BadInput, match="context holds 512"):
        open_judge(str(tiny_base), device="cpu").ask([Question("word " * 600)])


# ── reading replies ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("A", "A"),
        (" b.\n", "B"),
        ("**A**", "A"),
        ("[[B]]", "B"),
        ("Text B", "B"),
        ("A, since it explains more.", "A"),
        ("Text A is clearer than text B.", "A"),
        ("B is better.", "B"),
        ("Both are fine.\nThe answer is B", "B"),
        ("Verdict: **A**", "A"),
        ("I compared them.\n\nB", "B"),
        ("<think>A seems good, answer: A</think>\nB", "B"),
        ("<think>The answer is A", None),
        ("U", None),
        ("A good text explains more.", None),
        ("The answer is a matter of taste.", None),
        ("Both.", None),
        ("", None),
    ],
)
def test_what_a_reply_says(reply: str, choice: str | None) -> None:
    assert read_choice(reply) == choice
    assert read_choice("U", "ABU") == "U"


class Scripted:
    identity = "scripted"

    def __init__(self, script: Callable[[str], str]) -> None:
        self.script = script

    def answers(self, questions: Any) -> Any:
        for index in reversed(range(len(questions))):
            yield index, self.script(questions[index].text)


TEMPLATE = "Which? A: {a} B: {b}"


def test_both_orders_cancel_a_liking_for_the_first_place() -> None:
    texts = [("good", "bad"), ("bad", "good"), ("{b}", "{a}")]
    always_first = ask_votes(Judge(Scripted(lambda _: "A")), TEMPLATE, texts)
    assert always_first.share.tolist() == [0.5, 0.5, 0.5]
    assert (always_first.first_shown, always_first.second_shown) == (6, 0)
    honest = ask_votes(Judge(Scripted(lambda text: "A" if "A: good" in text else "B")), TEMPLATE, texts[:2], votes=3)
    assert honest.share.tolist() == [1.0, 0.0]
    assert honest.a.tolist() == [6, 0]


def test_replies_that_decide_nothing() -> None:
    texts = [("good", "bad"), ("other", "bad")]
    votes = ask_votes(
        Judge(Scripted(lambda text: {"good": "A", "othe": "U"}.get(text[10:14], "hm"))), TEMPLATE, texts, choices="ABU"
    )
    assert votes.share[0] == 1.0
    assert str(votes.share[1]) == "nan"
    assert (votes.undecided, votes.unreadable) == (1, 2)
    with pytest.raises(BadInput, match=r"none of the judge's 4 replies names one of A, B; the first is 'hm'"):
        ask_votes(Judge(Scripted(lambda _: "hm")), TEMPLATE, texts)
