"""Bradley-Terry and means: beside closed forms and slow plain versions; files of contests; what cannot be said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput
from xpert.registry.ranking.contests import Contests, contests_of, read_contests, task_wins
from xpert.registry.ranking.means import mean_scores
from xpert.registry.ranking.pairwise import bradley_terry, strengths_of


def contests(wins: Any) -> Contests:
    """Contests with the whole wins [n, n] given; systems a, b, c ..."""
    wins = np.asarray(wins)
    first, second = np.nonzero(wins)
    names = tuple("abcdefgh"[: len(wins)])
    return Contests(names, first, second, np.ones(len(first)), wins[first, second])


def plain(wins: Any, prior: float) -> Any:
    """Minorisation and maximisation (Hunter 2004), an opponent of worth 1 standing for the prior."""
    wins = np.asarray(wins, dtype=float)
    worth = np.ones(len(wins))
    for _ in range(20_000):
        new = np.empty_like(worth)
        for i in range(len(wins)):
            met = sum((wins[i, j] + wins[j, i]) / (worth[i] + worth[j]) for j in range(len(wins)) if j != i)
            new[i] = (wins[i].sum() + prior / 2) / (met + prior / (worth[i] + 1))
        if not prior:
            new /= np.exp(np.log(new).mean())
        if np.abs(np.log(new) - np.log(worth)).max() < 1e-13:
            break
        worth = new
    return np.log(new) - np.log(new).mean()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50))
def test_two_systems_have_the_closed_form(won: int, lost: int) -> None:
    found = bradley_terry(contests([[0, won], [lost, 0]]), prior=0)
    assert found.strengths["a"] - found.strengths["b"] == pytest.approx(math.log(won / lost), abs=1e-7)
    chance = won / (won + lost)
    assert found.errors["a"] == pytest.approx(0.5 / math.sqrt((won + lost) * chance * (1 - chance)), rel=1e-6)
    assert found.contests == won + lost


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 2.0]))
def test_newton_finds_what_the_slow_way_finds(seed: int, prior: float) -> None:
    rng = np.random.default_rng(seed)
    wins = rng.integers(0 if prior else 1, 6, (4, 4)) * (1 - np.eye(4, dtype=int))
    found = bradley_terry(contests(wins), prior=prior)
    assert [found.strengths[s] for s in "abcd"] == pytest.approx(plain(wins, prior), abs=1e-6)
    assert sum(found.strengths.values()) == pytest.approx(0, abs=1e-9)
    assert list(found.strengths.values()) == sorted(found.strengths.values(), reverse=True)


@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_errors_are_those_of_the_curvature(prior: float) -> None:
    """Beside second differences of the likelihood, inverted where strengths add up to zero."""
    wins = np.array([[0, 5, 2], [1, 0, 4], [3, 2, 0]], dtype=float)

    def likelihood(t: Any) -> float:
        pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
        own = sum(prior / 2 * (math.log1p(math.exp(-x)) + math.log1p(math.exp(x))) for x in t)
        return float(-sum(wins[i, j] * math.log1p(math.exp(t[j] - t[i])) for i, j in pairs) - own)

    found = bradley_terry(contests(wins.astype(int)), prior=prior)
    # Where the prior placed them, the chances against strength zero add up to half of all.
    at = np.array([found.strengths[s] for s in "abc"])
    shifts = np.linspace(-2, 2, 40_001)
    at = at + (shifts[np.argmax([likelihood(at + s) for s in shifts[::400]]) * 400] if prior else 0)
    step, eye = 1e-4, np.eye(3)
    curvature = np.array(
        [
            [
                likelihood(at + step * (eye[i] + eye[j]))
                - likelihood(at + step * (eye[i] - eye[j]))
                - likelihood(at + step * (eye[j] - eye[i]))
                + likelihood(at - step * (eye[i] + eye[j]))
                for j in range(3)
            ]
            for i in range(3)
        ]
    ) / (-4 * step**2)
    centre = eye - 1 / 3
    variance = centre @ np.linalg.pinv(curvature, rcond=1e-5) @ centre
    assert [found.errors[s] for s in "abc"] == pytest.approx(np.sqrt(np.diag(variance)), rel=2e-3)


def test_the_undefeated_stay_finite_and_are_refused_without_a_prior() -> None:
    lopsided = contests([[0, 30, 30], [0, 0, 1], [0, 1, 0]])
    found = bradley_terry(lopsided)
    assert list(found.strengths) == ["a", "b", "c"] and 2 < found.strengths["a"] < 10
    assert found.strengths["b"] == pytest.approx(found.strengths["c"])
    assert bradley_terry(lopsided, prior=0.01).strengths["a"] > found.strengths["a"]
    for wins in ([[0, 1], [0, 0]], [[0, 0], [1, 0]]):
        with pytest.raises(BadInput, match=r"b has never, even by a chain, .* a"):
            bradley_terry(contests(wins), prior=0)
    with pytest.raises(BadInput, match="prior is -1"):
        bradley_terry(lopsided, prior=-1)
    huge = bradley_terry(contests([[0, 10**6, 0], [0, 0, 10**6], [1, 0, 0]]), prior=1e-3)
    assert np.isfinite(list(huge.strengths.values())).all() and list(huge.strengths) == ["a", "b", "c"]


def test_groups_that_never_met_are_told() -> None:
    apart = np.zeros((5, 5), dtype=int)
    apart[0, 1] = apart[1, 0] = apart[2, 3] = apart[3, 4] = 1
    found = bradley_terry(contests(apart))
    assert found.components == (("a", "b"), ("c", "d", "e"))
    assert "a, b | c, d, e" in found.warnings[0]
    apart[1, 2] = 1
    joined = bradley_terry(contests(apart))
    assert joined.components == (("a", "b", "c", "d", "e"),) and not joined.warnings


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.none() | st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=5))
def test_a_task_is_one_contest_of_each_two(rows: list[list[int | None]]) -> None:
    scores = {str(t): {"abcd"[s]: float(v) for s, v in enumerate(row) if v is not None} for t, row in enumerate(rows)}
    found = contests_of(scores)
    wins = found.wins()
    for a, one in enumerate(found.systems):
        for b, other in enumerate(found.systems):
            both = [t for t in scores.values() if one in t and other in t and one != other]
            assert wins[a, b] == sum((t[one] > t[other]) + 0.5 * (t[one] == t[other]) for t in both)
    array = np.array([[np.nan if v is None else v for v in row] for row in rows])
    kept = [s for s in range(4) if np.isfinite(array[:, s]).any()]
    assert np.array_equal(task_wins(array).sum(axis=0)[np.ix_(kept, kept)], wins)


def test_strengths_of_many_draws_are_those_of_each() -> None:
    wins = np.random.default_rng(0).integers(0, 5, (6, 4, 4)).astype(float)
    together = strengths_of(wins, 0.5)
    for one, alone in zip(together, wins, strict=True):
        assert one == pytest.approx(strengths_of(alone[None], 0.5)[0], abs=1e-8)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_both_forms_of_rows_are_read(tmp_path: Path) -> None:
    found = read_contests(
        write(
            tmp_path / "pairs.jsonl",
            {"winner": "x", "loser": "y", "judge": 3},
            {"a": "y", "b": "x", "result": "b"},
            {"a": "x", "b": "y", "result": "a"},
            {"a": "x", "b": "z", "result": "tie"},
        )
    )
    assert found.systems == ("x", "y", "z") and found.count.sum() == 4
    assert found.wins().tolist() == [[0, 3, 0.5], [0, 0, 0], [0.5, 0, 0]]


ROWS: dict[str, tuple[Any, str]] = {
    "no json": ("{", "line 2"),
    "a list": ("[1, 2]", "line 2"),
    "nobody": ({"score": 1}, "line 2 names no two systems"),
    "half": ({"winner": "x"}, "line 2 names no two systems"),
    "odd result": ({"a": "x", "b": "y", "result": "x"}, "line 2 has the result 'x'"),
    "no result": ({"a": "x", "b": "y"}, "line 2 has the result None"),
    "a list for a result": ({"a": "x", "b": "y", "result": ["a"]}, "line 2 has the result"),
    "a number": ({"winner": 1, "loser": "y"}, "line 2 names a system by something that is not text"),
    "itself": ({"winner": "x", "loser": "x"}, "line 2 lets x meet itself"),
}


@pytest.mark.parametrize("row", ROWS)
def test_wrong_rows_are_told_by_their_line(row: str, tmp_path: Path) -> None:
    wrong, said = ROWS[row]
    path = write(tmp_path / "pairs.jsonl", {"winner": "x", "loser": "y"}, wrong)
    with pytest.raises(BadInput) as told:
        read_contests(path)
    assert said in str(told.value) and "pairs.jsonl" in str(told.value)


GAPS = {"sums": {"x": 0.5, "y": 0.25}, "law": {"x": 0.25}, "logic": {"x": 0.0, "y": 0.5}}


def test_means_say_what_they_are_over() -> None:
    common = mean_scores(GAPS)
    assert common.scores == {"y": 0.375, "x": 0.25} and list(common.scores) == ["y", "x"]
    assert common.tasks == {"x": 2, "y": 2}
    assert common.warnings == ("the mean is over the 2 of 3 tasks that all experts have",)
    own = mean_scores(GAPS, over="own")
    assert own.scores == {"y": 0.375, "x": 0.25} and own.tasks == {"x": 3, "y": 2}
    assert "of 3, y 2" in own.warnings[0]
    assert mean_scores({"t": {"x": 1.0, "y": 0.5}}).warnings == ()
    with pytest.raises(BadInput, match="no task is common"):
        mean_scores({"t": {"x": 1.0}, "u": {"y": 1.0}})


def test_means_of_unlike_metrics_and_scales_warn() -> None:
    metrics = {"sums": "exact", "law": "exact", "logic": "chrf"}
    metric, _ = mean_scores(GAPS, metrics=metrics, over="own").warnings
    assert metric.startswith("the mean adds up different metrics: chrf (1), exact (2)")
    # Law alone lacks an expert, and is not part of the common mean: only what is added up is warned of.
    assert not any("metrics" in w for w in mean_scores(GAPS, metrics={**metrics, "logic": "exact"}).warnings)
    (scale,) = mean_scores({"bleu": {"x": 31.0, "y": 20.0}, "sums": {"x": 0.5, "y": 1.0}}).warnings
    assert "scores of bleu reach 31, those of sums stay within 1" in scale
