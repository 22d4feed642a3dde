"""Searches over ordered lists: EASE against random search on a reward that is known, and the parts it is made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert import plugins
from xpert.data import pool_from_rows
from xpert.errors import BadInput
from xpert.exemplars import ease
from xpert.exemplars._searching import draw_lists
from xpert.exemplars._transport import set_distances, transport
from xpert.features import FeatureOptions, Features
from xpert.few_shot import exemplar_text
from xpert.protocols import Exemplars, ExemplarTask, ListScore
from xpert.records import Message, Row, Shots
from xpert.shot_ordering import choose_exemplars

SHOTS = 16


def shot(index: int) -> Row:
    return Row(f"s{index}", (Message("user", f"question {index}"),), f"answer {index}")


class Reader:
    """An embedder that knows a text by which numbered exemplars stand in it, and where."""

    identity = "reader"

    def __init__(self, ordered: bool = True, blocks: int = 8) -> None:
        self.ordered, self.blocks = ordered, blocks

    def fit(self, texts: Sequence[str]) -> None:
        random = np.random.default_rng(0)
        self.vectors = random.normal(size=(self.blocks, SHOTS, 24)).astype(np.float32)

    def embed(self, texts: Sequence[str], progress: Any = None) -> Any:
        rows = np.zeros((len(texts), 24), np.float32)
        for row, text in enumerate(texts):
            numbers = [int(line.split()[1]) for line in text.split("\n") if line.startswith("question")]
            for place, number in enumerate(numbers[: self.blocks]):
                rows[row] += self.vectors[place if self.ordered else 0, number]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def planted(rows: Sequence[int]) -> ListScore:
    """Shots 0, 1, 2 in this order are best; each right shot helps, and more so in its right place."""
    value = sum(0.2 * (row < 3) + 0.13 * (row == place) for place, row in enumerate(rows))
    return ListScore(math.log(0.01 + 0.98 * min(1.0, value)), float(value > 0.98))


def task_of(score: Callable[[Sequence[int]], ListScore], shots: int = SHOTS) -> ExemplarTask:
    rows = tuple(shot(index) for index in range(shots))
    features = Features(pool_from_rows(rows), FeatureOptions(base="none"), cache=None, device="cpu")
    return ExemplarTask(Shots(rows), features, (shot(0), shot(1), shot(2)), score)


def run(
    name: str, score: Callable[[Sequence[int]], ListScore], *, seed: int = 0, count: int = 3, **options: Any
) -> Any:
    plugin = plugins.load("orderer", name)
    task = task_of(score)
    [found] = choose_exemplars(plugin(plugin.Options(**options)), task, count, seed=seed)
    return found


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ease, "open_embedder", lambda *_, **__: Reader())


EASE: dict[str, Any] = {
    "rounds": 24, "first": 8, "candidates": 300, "kept": 30, "hidden": 32, "steps": 60, "rate": 3e-3,
}  # fmt: skip
searches = pytest.mark.parametrize(("name", "options"), [("search", {"rounds": 12}), ("ease", {**EASE, "rounds": 12})])


def test_ease_finds_a_planted_list_sooner_than_random_search(reader: None) -> None:
    guided = [math.exp(run("ease", planted, seed=seed, **EASE).score) for seed in range(4)]
    drawn = [math.exp(run("search", planted, seed=seed, rounds=24).score) for seed in range(4)]
    assert np.mean(guided) > np.mean(drawn) + 0.15
    assert max(guided) > 0.95


@searches
def test_the_best_list_is_kept_and_every_list_is_scored_once(name: str, options: Any, reader: None) -> None:
    seen: list[tuple[int, ...]] = []

    def score(rows: Sequence[int]) -> ListScore:
        seen.append(tuple(rows))
        return planted(rows)

    found: Exemplars = run(name, score, **options)
    assert len(seen) == len(set(seen)) == 12
    assert found.score == max(planted(rows).log_likelihood for rows in seen)
    assert tuple(found.rows.tolist()) == max(seen, key=lambda rows: planted(rows).log_likelihood)
    assert [step["shots"] for step in found.log] == [[f"s{row}" for row in rows] for rows in seen]
    assert [step["best"] for step in found.log] == sorted(step["best"] for step in found.log)
    assert f"round {seen.index(tuple(found.rows.tolist())) + 1}" in found.reasons[0]


@searches
def test_the_same_seed_gives_the_same_search(name: str, options: Any, reader: None) -> None:
    one, two, other = (run(name, planted, seed=seed, **options) for seed in (3, 3, 4))
    assert one.rows.tolist() == two.rows.tolist()
    assert list(one.log) == list(two.log)
    assert list(one.log) != list(other.log)


@searches
def test_a_perfect_accuracy_ends_the_search(name: str, options: Any, reader: None) -> None:
    found = run(name, lambda rows: ListScore(-1.0, float(rows[0] % 4 == 1)), reward="accuracy", **options)
    assert found.score == 1
    assert len(found.log) < 12
    assert [step["accuracy"] for step in found.log] == [0.0] * (len(found.log) - 1) + [1.0]


@searches
def test_a_search_ends_when_all_lists_are_scored(name: str, options: Any, reader: None) -> None:
    plugin = plugins.load("orderer", name)
    more = {**options, "rounds": 100, "first": 2} if name == "ease" else {"rounds": 100}
    [found] = choose_exemplars(plugin(plugin.Options(**more)), task_of(planted, shots=3), 2)
    assert {tuple(step["shots"]) for step in found.log} == set(itertools.permutations(["s0", "s1", "s2"], 2))
    assert len(found.log) == 6


def test_all_equal_rewards_keep_the_first_list(reader: None) -> None:
    for name, options in (("search", {"rounds": 5}), ("ease", {**EASE, "rounds": 10})):
        found = run(name, lambda rows: ListScore(-0.5, 0.0), **options)
        assert [f"s{row}" for row in found.rows] == found.log[0]["shots"]


def test_ease_refuses_an_embedder_that_sees_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ease, "open_embedder", lambda *_, **__: Reader(ordered=False))
    with pytest.raises(BadInput, match="its reverse the same vector"):
        run("ease", planted, **EASE)


def test_ease_refuses_an_embedder_that_reads_the_beginning_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ease, "open_embedder", lambda *_, **__: Reader(blocks=2))
    with pytest.raises(BadInput, match="only the beginning of a list of 3"):
        run("ease", planted, **EASE)


def test_one_exemplar_has_no_order(reader: None) -> None:
    assert run("ease", planted, count=1, **EASE).rows.tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(shots=st.integers(1, 9), wanted=st.integers(1, 40), seed=st.integers(0, 99), data=st.data())
def test_lists_are_distinct_and_new(shots: int, wanted: int, seed: int, data: Any) -> None:
    count = data.draw(st.integers(1, min(shots, 4)))
    seen = draw_lists(shots, count, 10, np.random.default_rng(seed + 1), ())
    found = draw_lists(shots, count, wanted, np.random.default_rng(seed), seen)
    assert len(set(found)) == len(found) == min(wanted, math.perm(shots, count) - len(seen))
    assert not set(found) & set(seen)
    assert all(len(set(rows)) == count and min(rows) >= 0 and max(rows) < shots for rows in found)


def test_lists_are_drawn_alike() -> None:
    random = np.random.default_rng(0)
    drawn = [rows for _ in range(300) for rows in draw_lists(30, 2, 2, random, ())]
    first = np.bincount([rows[0] for rows in drawn], minlength=30)
    assert first.min() > 5  # 20 on average; a draw that favours some indices leaves others out


@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 4), m=st.integers(1, 6), seed=st.integers(0, 999))
def test_transport_equals_the_linear_programme(k: int, m: int, seed: int) -> None:
    from scipy.optimize import linprog

    costs = np.random.default_rng(seed).random((k, m))
    sums = np.zeros((k + m, k * m))
    for i, j in itertools.product(range(k), range(m)):
        sums[i, i * m + j] = sums[k + j, i * m + j] = 1
    plain = linprog(costs.ravel(), A_eq=sums, b_eq=[1 / k] * k + [1 / m] * m)
    assert transport(costs) == pytest.approx(plain.fun, abs=1e-9)


def test_set_distances_do_not_see_order_and_know_the_queries_themselves() -> None:
    vectors = np.eye(5, dtype=np.float32)
    found = set_distances(vectors, vectors[:2], [(0, 1), (1, 0), (0, 2), (3, 4)])
    assert found.tolist() == [0.0, 0.0, 0.5, 1.0]


def test_neural_ucb_follows_its_formula() -> None:
    import torch

    from xpert.exemplars._neural_ucb import NeuralUcb

    torch.manual_seed(0)
    inputs, rewards = torch.randn(6, 4), torch.rand(6)
    inputs[:, 3] = 2.0  # a constant column must not blow up
    ucb = NeuralUcb(4, hidden=16, steps=300, rate=1e-2, regulariser=0.1, nu=0.01, seed=1)
    before = torch.get_rng_state()
    again = NeuralUcb(4, hidden=16, steps=300, rate=1e-2, regulariser=0.1, nu=0.01, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    loss = ucb.fit(inputs, rewards)
    assert loss < float(rewards.var()) / 4
    ucb.fit(inputs[:3], rewards[:3])
    assert ucb.fit(inputs, rewards) == loss == again.fit(inputs, rewards)  # always from the initial weights

    new = torch.randn(3, 4) + torch.tensor([0, 0, 0, 2.0])
    found = ucb.guess(new)
    scaled = (new - inputs.mean(0)) / torch.tensor([*inputs[:, :3].std(0, correction=0).tolist(), 1.0])
    parameters = list(ucb.net.parameters())
    for row in range(3):
        mean = ucb.net(scaled[row : row + 1])[0, 0]
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(mean, parameters)])
        torch.testing.assert_close(found.mean[row], mean.detach())
        torch.testing.assert_close(found.gradients[row], gradient)
        torch.testing.assert_close(found.bonus[row], (0.1 * 0.01 * gradient**2 / 0.1).sum().sqrt())
    ucb.chose(found.gradients[0])
    assert (ucb.guess(new).bonus < found.bonus).all()
    expected = (0.1 * 0.01 * found.gradients[1] ** 2 / (0.1 + found.gradients[0] ** 2)).sum().sqrt()
    torch.testing.assert_close(ucb.guess(new).bonus[1], expected)


def test_the_text_of_a_list_holds_its_order() -> None:
    rows = [shot(2), shot(0)]
    assert exemplar_text(rows) == "question 2\nanswer 2\n\nquestion 0\nanswer 0"
