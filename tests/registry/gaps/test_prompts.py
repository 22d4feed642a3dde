"""What of a log is unserved, what counts as one prompt, and how badly prompts fit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpert.experts.gaps.prompts import different_prompts, lacks_of_fit, shared_system, unserved
from xpert.experts.request_usage import request_usage
from xpert.experts.server.request_log import RequestRecord
from xpert.protocols import Candidate
from xpert.records import Message

_count = itertools.count()


def asked(
    *turns: str | tuple[str, str], expert: str | None = None, score: float | None = 0.1, **given: Any
) -> RequestRecord:
    """A routed request: user turns as texts, others as (role, text)."""
    number = next(_count)
    messages = tuple(Message("user", turn) if isinstance(turn, str) else Message(*turn) for turn in turns)
    plain: dict[str, Any] = {
        "id": f"r{number:06d}",
        "time": 1_764_504_000.0 + number,
        "mixture": "m",
        "fingerprint": "one",
        "model": "m",
        "messages": messages,
        "experts": ((expert, 1.0),) if expert else (),
        "candidates": (Candidate("a", score),) if score is not None else (),
        "fell_back": expert is None,
    }
    return RequestRecord(**(plain | given))


def texts(records: list[RequestRecord], *, near: float = 0.8, system: str | None = None) -> list[tuple[str, int]]:
    found = different_prompts(records, lacks_of_fit(records), near=near, system=system)
    return [(prompt.text, prompt.requests) for prompt in found]


# ── who is served ────────────────────────────────────────────────────────────────────────────────────────────────


def test_fallbacks_are_unserved_and_what_names_its_model_is_not_asked() -> None:
    records = [
        asked("one"),
        asked("two", expert="a"),
        asked("three", routed=False, fell_back=False, model="base"),
        asked("four", routed=False, fell_back=False, model="a", expert="a"),
    ]
    assert unserved(records, None) == records[:1]


@pytest.mark.parametrize(
    ("chance", "score", "below", "left"),
    [
        (0.4, 0.9, 0.5, True),
        (0.6, 0.1, 0.5, False),  # the chance counts where there is one
        (None, 0.4, 0.5, True),
        (None, 0.5, 0.5, False),
        (None, None, 0.5, False),
        (0.4, 0.9, None, False),
    ],
)
def test_below_takes_in_what_an_expert_answered_badly(
    chance: float | None, score: float | None, below: float | None, left: bool
) -> None:
    records = [asked("one", expert="a", chance=chance, score=score)]
    assert bool(unserved(records, below)) == left


def test_a_prompt_that_is_served_by_now_is_out() -> None:
    assert unserved([asked("Fold it."), asked("fold it", expert="a")], None) == []
    again = [asked("Fold it.", expert="a"), asked("fold it")]
    assert unserved(again, None) == again[1:]


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), max_size=20))
def test_no_text_whose_last_request_is_served_is_unserved(requests: list[tuple[str, bool]]) -> None:
    records = [asked(f"text {name}", expert="a" if served else None) for name, served in requests]
    last = {f"text {name}": served for name, served in requests}
    left = {record.messages[0].content for record in unserved(records, None)}
    assert left == {text for text, served in last.items() if not served}


# ── what is one prompt ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_text_and_near_copies_are_one_prompt() -> None:
    long = "Please knit me a warm woollen scarf with a pattern of small blue fish and long fringes"
    records = [asked(long), asked(f"  {long.upper()}! "), asked(f"{long} today"), asked("Knit socks.")]
    assert texts(records) == [(long, 3), ("Knit socks.", 1)]
    assert len(texts(records, near=1.0)) == 3


def test_figures_tell_prompts_apart() -> None:
    one = "Add the two numbers that stand here one after the other: 3 and 5"
    assert len(texts([asked(one), asked(one.replace("5", "6"))])) == 2


def test_a_conversation_is_one_prompt() -> None:
    turns: list[str | tuple[str, str]] = ["Knit a scarf."]
    records = [asked(*turns)]
    for number in range(4):
        turns = [*turns, ("assistant", f"Row {number}."), f"And row {number + 1}?"]
        records.append(asked(*turns))
    assert texts(records) == [("Knit a scarf.", 5)]
    assert len(texts([*records, asked("Knit a hat.", ("assistant", "Row 0."), "And row 1?")])) == 2


def test_a_conversation_that_was_served_at_first_begins_where_it_was_not() -> None:
    records = [asked("Hello.", expert="a"), asked("Hello.", ("assistant", "Hello."), "Knit a scarf.")]
    left = unserved(records, None)
    assert [text for text, _ in texts(left)] == ["Hello.\n\nKnit a scarf."]


def test_a_system_turn_of_most_requests_is_left_out_and_a_rare_one_is_the_task() -> None:
    common, rare = ("system", "You are the helper of a yarn shop."), ("system", "Answer in Welsh.")
    records = [asked(common, "One."), asked(common, "Two."), asked(rare, "Three.")]
    system = shared_system(records)
    assert system == common[1]
    assert [text for text, _ in texts(records, system=system)] == ["One.", "Two.", "Answer in Welsh.\n\nThree."]
    assert shared_system(records[1:]) is None
    prompts = different_prompts(records, lacks_of_fit(records), near=0.8, system=system)
    assert [len(prompt.messages) for prompt in prompts] == [1, 1, 2]


@given(st.lists(st.sampled_from(["knit a scarf", "Knit a scarf.", "darn a sock", "sew a hem", "  sew a hem "])))
def test_every_request_is_counted_once(asks: list[str]) -> None:
    records = [asked(text) for text in asks]
    found = texts(records)
    assert sum(count for _, count in found) == len(records)
    assert len(found) == len({text.strip(" .").lower() for text in asks})


# ── how badly they fit ───────────────────────────────────────────────────────────────────────────────────────────


def test_lack_of_fit_is_by_chance_or_by_rank_within_one_state_of_the_mixture() -> None:
    records = [
        asked("a", score=0.2),
        asked("b", score=0.8, expert="a"),
        asked("c", score=0.5, expert="a"),
        asked("d", score=0.5, expert="a"),
        asked("e", score=90.0, fingerprint="two"),  # of another router: says nothing about the others
        asked("f", score=0.7, chance=0.25),
        asked("g", score=None),
    ]
    lacks = lacks_of_fit(records)
    assert [lacks[record.id] for record in records] == [4 / 5, 0, 2 / 5, 2 / 5, 0, 0.75, 1.0]


@given(st.lists(st.tuples(st.floats(-1, 1) | st.none(), st.floats(0, 1) | st.none()), min_size=1))
def test_lack_of_fit_lies_between_nothing_and_all_and_falls_with_the_score(
    given_: list[tuple[float | None, float | None]],
) -> None:
    records = [asked("x", score=score, chance=chance) for score, chance in given_]
    lacks = lacks_of_fit(records)
    assert all(0 <= value <= 1 for value in lacks.values())
    ranked = [
        (record.score, lacks[record.id]) for record in records if record.chance is None and record.score is not None
    ]
    assert all(two <= one for (low, one), (high, two) in itertools.permutations(ranked, 2) if low <= high)


# ── usage ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_usage_is_counted_per_expert_and_day() -> None:
    noon = 1_764_504_000.0
    records = [
        asked("1", time=noon, experts=(("a", 0.75), ("b", 0.25)), fell_back=False, chance=0.8, prompt_tokens=3),
        asked("2", time=noon, expert="a", chance=0.6, completion_tokens=4),
        asked("3", time=noon),
        asked("4", time=noon + 86_400),
        asked("5", time=noon, expert="c", routed=False),
        asked("6", time=noon, routed=False, fell_back=False, model="base"),
    ]
    found = request_usage(records, known=["d"])
    assert [(one.expert, one.requests, one.share, one.tokens, one.chance, one.asked) for one in found.experts] == [
        ("a", 2, 0.875, 7, 0.7, 0),
        ("b", 1, 0.125, 0, None, 0),
        ("c", 0, 0.0, 0, None, 1),
        ("d", 0, 0.0, 0, None, 0),
    ]
    assert [(day.day, day.routed, day.fell_back) for day in found.days] == [("2025-11-30", 3, 1), ("2025-12-01", 1, 1)]
    assert (found.requests, found.routed, found.fell_back, found.base_asked) == (6, 4, 2, 1)
