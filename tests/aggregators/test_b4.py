"""B4: its score by hand and by brute force, and the aggregator that reads it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.special import betaln

from tests.aggregators.scripted import ScriptedEngine, ask, made, question
from xpert.experts.aggregators._passing import Group, b4_score, groups_of, scored_groups

Likely = Callable[[str, str, str], float]


def matrix(*rows: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.array([[mark == "1" for mark in row] for row in rows])


def test_the_score_by_hand() -> None:
    passes = matrix("11", "11", "10")
    both, first = groups_of(passes)
    assert both == Group((0, 1), (0, 1)) and first == Group((2,), (0,))
    # B(3,1) B(3,2) B(2,2) B(1,1): two answers pass both checks, the other one passes one of these two
    assert b4_score(passes, both, 1, 1) == pytest.approx(math.log(1 / 3 * 1 / 12 * 1 / 6))
    # B(2,2) B(2,3) B(3,1) B(3,1): the others pass the check, and the one that it fails
    assert b4_score(passes, first, 1, 1) == pytest.approx(math.log(1 / 6 * 1 / 12 * 1 / 3 * 1 / 3))
    # the priors enter where they should: E0 of the second group has two ones and no zero, so B(3, b0)
    assert b4_score(passes, first, 1, 5) - b4_score(passes, first, 1, 1) == pytest.approx(betaln(3, 5) - betaln(3, 1))
    assert b4_score(passes, both, 7, 1) == pytest.approx(betaln(9, 1) + betaln(9, 2) + betaln(2, 2))


def plainly(passes: np.ndarray[Any, np.dtype[np.bool_]], row: int, a_xy: float, b0: float) -> float:
    """The score of a row's group, by counting every cell."""
    answers, checks = passes.shape
    same = [other for other in range(answers) if all(passes[other, c] == passes[row, c] for c in range(checks))]
    ones = {True: 0, False: 0}
    cells = {True: 0, False: 0}
    for other in range(answers):
        for check in range(checks):
            if other not in same:
                ones[bool(passes[row, check])] += int(passes[other, check])
                cells[bool(passes[row, check])] += 1
    y, x = int(passes[row].sum()), len(same)
    return float(
        betaln(y + a_xy, checks - y + 1)
        + betaln(x + a_xy, answers - x + 1)
        + betaln(ones[True] + 1, cells[True] - ones[True] + 1)
        + betaln(ones[False] + 1, cells[False] - ones[False] + b0)
    )


@pytest.mark.parametrize("seed", range(20))
def test_grouping_and_score_equal_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    passes = rng.random((rng.integers(1, 9), rng.integers(1, 7))) < rng.random()
    a_xy, b0 = float(rng.choice([1, 10, 1000])), float(rng.choice([1, 1e4]))
    scored = scored_groups(passes, "b4", a_xy=a_xy, b0=b0)
    assert sorted(row for group, _ in scored for row in group.rows) == list(range(len(passes)))
    for group, score in scored:
        for row in group.rows:
            assert score == pytest.approx(plainly(passes, row, a_xy, b0), abs=1e-6)
            assert tuple(np.flatnonzero(passes[row])) == group.checks
    rows, checks = rng.permutation(len(passes)), rng.permutation(passes.shape[1])
    moved = scored_groups(passes[rows][:, checks], "b4", a_xy=a_xy, b0=b0)
    assert sorted(score for _, score in moved) == pytest.approx(sorted(score for _, score in scored), abs=1e-6)


def test_the_baselines() -> None:
    passes = matrix("111000", "000110", "000110", "000110", "000110")
    assert scored_groups(passes, "max-pass", a_xy=1, b0=1)[0] == (Group((0,), (0, 1, 2)), 3.0)
    group, score = scored_groups(passes, "codet", a_xy=1, b0=1)[0]
    assert group.rows == (1, 2, 3, 4) and score == 4.0
    tied = matrix("10", "01", "01")
    assert scored_groups(tied, "max-pass", a_xy=1, b0=1)[0][0].rows == (1, 2), "of equal ones the larger"


def judging(replies: dict[str, str], yes: dict[str, set[str]]) -> ScriptedEngine:
    """Experts that reply and judge by table: judge -> the answers it takes for right."""

    def likelihood(experts: str, prompt: str, word: str) -> float:
        right = any(f"\n{answer}\n" in prompt for answer in yes[experts])
        return -0.1 if (word == "Yes") == right else -4.0

    return ScriptedEngine(lambda experts, prompt, sampling: replies[experts], likelihood)


def test_the_answer_that_experts_find_right_wins() -> None:
    engine = judging({"a": "five", "b": "four", "c": "six"}, {"a": {"four"}, "b": {"four", "six"}, "c": {"six"}})
    verdict = ask(made("b4", forms=2, rule="max-pass"), question(), engine)
    assert verdict.text == "four" and verdict.experts == (("b", 1.0),), "4 of 6, as six, which is later"
    assert verdict.reason.startswith("max-pass: passes 4 of 6 checks")
    assert [one["passed"] for one in verdict.log["answers"]] == [0, 4, 4]
    assert len(engine.weighed) == 3 * 6 * 2, "answers x checks x (Yes, No)"


def test_an_answer_given_twice_is_judged_once() -> None:
    engine = judging({"a": "Five", "b": "four", "c": "five!"}, {"a": {"Five"}, "b": {"four"}, "c": {"Five"}})
    verdict = ask(made("b4", forms=3), question(), engine)
    assert verdict.text == "Five" and verdict.experts == (("a", 0.5), ("c", 0.5))
    assert verdict.log["groups"][0]["replies"] == [0, 2] and len(engine.weighed) == 2 * 9 * 2


def test_what_all_agree_on_is_not_checked() -> None:
    engine = judging(dict.fromkeys("abc", "four"), {})
    verdict = ask(made("b4"), question(), engine)
    assert verdict.text == "four" and not engine.weighed


def test_samples_make_more_answers() -> None:
    engine = judging({"a": "five", "b": "four", "c": "six"}, {key: set() for key in "abc"})
    ask(made("b4", samples=3), question(), engine)
    assert len(engine.requests) == 9 and {r.sampling.temperature for r in engine.requests} == {0.7}
