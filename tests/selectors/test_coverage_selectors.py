"""Vote-k, IDEAL, DPP, QDIT, SemDeDup and DSIR: each fast form against a slow plain one, and what must hold of it."""

from __future__ import annotations

import hashlib
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert import plugins
from xpert.budgeting import BudgetMeter
from xpert.clustering import Clusters
from xpert.data import pool_from_rows
from xpert.errors import BadInput
from xpert.records import Budget, Message, Row, Shots
from xpert.selection import choose
from xpert.selectors.dpp import Volume
from xpert.selectors.ideal import Cascades, edge_chances
from xpert.selectors.scorers.dsir import NgramBuckets
from xpert.selectors.semdedup import keep_order, repeats
from xpert.selectors.votek import Votes
from xpert.similarity import nearest

few = settings(max_examples=15, deadline=None)


def points(rows: int, seed: int, *, d: int = 6) -> Any:
    drawn = np.random.default_rng(seed).normal(size=(rows, d))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


class Given:
    """Features that are given, not computed."""

    lengths_unit = "tokens"

    def __init__(self, embeddings: Any, texts: Any = None, shots: Any = ("shot",)) -> None:
        self._embeddings = embeddings
        texts = texts or [(f"prompt {row}", "answer") for row in range(len(embeddings))]
        self.pool = pool_from_rows([Row(f"r{i}", (Message("user", p),), a) for i, (p, a) in enumerate(texts)])
        self.shots = Shots(tuple(Row(f"s{i}", (Message("user", text),), "yes") for i, text in enumerate(shots)))

    def embeddings(self) -> Any:
        return self._embeddings

    def lengths(self) -> Any:
        return np.random.default_rng(len(self._embeddings)).integers(1, 40, size=len(self._embeddings))

    def clusters(self) -> Clusters:
        _, labels = np.unique(self._embeddings[:, :3].argmax(axis=1), return_inverse=True)
        centroids = np.eye(int(labels.max()) + 1, self._embeddings.shape[1], dtype=np.float32)
        return Clusters(labels.astype(np.int32), centroids, [[] for _ in centroids])


def run(name: str, features: Any, budget: str, **params: Any) -> Any:
    plugin = plugins.load("selector", name)
    return choose(plugin(plugin.Options(**params)), features, features.shots, Budget.parse(budget), seed=0)


# ── vote-k ───────────────────────────────────────────────────────────────────────────────────────────────────────


class PlainVotes:
    """As published, with exact fractions for floats and the ties of `Votes`."""

    def __init__(self, neighbours: Any) -> None:
        self.voters = [np.flatnonzero((neighbours == row).any(axis=1)).tolist() for row in range(len(neighbours))]
        self.times = [0] * len(neighbours)
        self.taken: list[int] = []

    def take(self, among: Any) -> None:
        def rank(row: int) -> Any:
            score = sum(Fraction(1, 10 ** self.times[voter]) for voter in self.voters[row] if voter not in self.taken)
            return -score, -len(self.voters[row]), row

        best = min((row for row in among if row not in self.taken), key=rank)
        self.taken.append(best)
        for voter in self.voters[best]:
            self.times[voter] += 1


@few
@given(seed=st.integers(0, 10_000), rows=st.integers(2, 70), k=st.integers(1, 40))
def test_votes_are_counted_as_published(seed: int, rows: int, k: int) -> None:
    embeddings = points(rows, seed, d=3)
    _, neighbours = nearest(embeddings, embeddings, k, skip_self=True)
    votes, plain = Votes(neighbours), PlainVotes(neighbours)
    votes.take(BudgetMeter(rows))  # to the last row: t comes to be as many as there are neighbours
    for _ in range(rows):
        plain.take(range(rows))
    assert votes.rows == plain.taken
    counts = np.bincount(neighbours.ravel(), minlength=rows)
    assert votes.rows[0] == counts.argmax()
    assert votes.scores[0] == counts.max()


def test_a_voter_that_was_heard_has_a_tenth_of_a_vote() -> None:
    # 0, 1 and 2 vote for 3 and 4; 3 for 4, 4 for 3, 5 for 0.
    neighbours = np.array([[3, 4], [3, 4], [3, 4], [4, 0], [3, 0], [0, 3]])
    votes = Votes(neighbours)
    votes.take(BudgetMeter(6))
    # Five vote for 3. Of the voters of 4, 0, 1 and 2 were heard then and 3 is taken; 0 has 3, 4 and 5, and 4 is next.
    assert votes.rows[:3] == [3, 4, 0]
    assert votes.scores[:3] == [5, pytest.approx(0.3), pytest.approx(0.1)]


@pytest.mark.parametrize("budget", [20, 37])
def test_the_second_stage_takes_the_best_of_each_bucket_with_votes_up_to_date(budget: int) -> None:
    features = Given(points(120, 5))
    found = run("votek", features, str(budget), stage="full", uncertainty="length", neighbours=7)
    _, neighbours = nearest(features.embeddings(), features.embeddings(), 7, skip_self=True)
    plain = PlainVotes(neighbours)
    for _ in range(budget // 10):
        plain.take(range(120))
    order = [row for row in np.argsort(-features.lengths(), kind="stable") if row not in plain.taken]
    for bucket in np.array_split(np.array(order)[: int(0.9 * len(order))], budget - budget // 10):
        plain.take(bucket.tolist())
    assert found.rows.tolist() == plain.taken
    assert [step["step"] for step in found.log] == ["graph", "by votes", "by buckets"]
    assert "length" in found.reasons[0]


def test_the_second_stage_spends_a_token_budget() -> None:
    features = Given(points(120, 6))
    found = run("votek", features, "700tok", stage="full", uncertainty="length")
    left = 700 - int(features.lengths()[found.rows].sum())
    assert 0 <= left < min(length for row, length in enumerate(features.lengths()) if row not in found.rows)
    assert found.log[2]["buckets"] > 10


# ── IDEAL ────────────────────────────────────────────────────────────────────────────────────────────────────────


def reached(neighbours: Any, carries: Any, start: Any) -> set[int]:
    active, frontier = set(start), list(start)
    while frontier:
        frontier = [int(w) for v in frontier for w in neighbours[v][carries[v]] if w not in active]
        active.update(frontier)
        frontier = list(dict.fromkeys(frontier))
    return active


@few
@given(seed=st.integers(0, 10_000), rows=st.integers(2, 40), samples=st.integers(1, 6), p=st.sampled_from([None, 0.4]))
def test_lazy_greedy_on_drawn_edges_is_the_plain_one(seed: int, rows: int, samples: int, p: float | None) -> None:
    embeddings = points(rows, seed, d=3)
    cosines, neighbours = nearest(embeddings, embeddings, 4, skip_self=True)
    chances = edge_chances(cosines, p)
    taken, gains = Cascades(neighbours, chances, samples, np.random.default_rng(seed)).take(BudgetMeter(rows))
    random = np.random.default_rng(seed)
    outcomes = [random.random(chances.shape) < chances for _ in range(samples)]

    def influence(chosen: list[int]) -> int:
        return sum(len(reached(neighbours, carries, chosen)) for carries in outcomes)

    plain: list[int] = []
    for gain in gains[:12]:
        values = [influence([*plain, row]) if row not in plain else -1 for row in range(rows)]
        before = influence(plain) if plain else 0
        plain.append(int(np.argmax(values)))
        assert gain == (max(values) - before) / samples
    assert taken[:12] == plain
    assert sum(gains) == pytest.approx(rows)  # all rows are taken, so all are reached


def test_chances_are_shares_of_the_cosines() -> None:
    cosines = np.array([[0.6, 0.2], [0.5, -0.5], [-0.1, -0.2]], dtype=np.float32)
    assert edge_chances(cosines) == pytest.approx(np.array([[0.75, 0.25], [1, 0], [0.5, 0.5]]))
    assert (edge_chances(cosines, 0.3) == 0.3).all()


def test_when_all_edges_carry_one_row_of_each_component_is_taken() -> None:
    centres = np.eye(5, 8)
    rows = np.repeat(np.arange(5), 9)[np.random.default_rng(0).permutation(45)]
    scattered = centres[rows] + 0.05 * np.random.default_rng(1).normal(size=(45, 8))
    embeddings = (scattered / np.linalg.norm(scattered, axis=1, keepdims=True)).astype(np.float32)
    found = run("ideal", Given(embeddings), "7", p=1.0, neighbours=8, samples=2)
    assert sorted(rows[found.rows[:5]]) == [0, 1, 2, 3, 4]
    assert found.scores.tolist() == [9, 9, 9, 9, 9, 0, 0]


def test_when_no_edge_carries_every_row_reaches_itself() -> None:
    found = run("ideal", Given(points(20, 0)), "20", p=0.0, samples=3)
    assert found.rows.tolist() == list(range(20))
    assert set(found.scores.tolist()) == {1.0}


# ── DPP ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def chen(embeddings: Any, ridge: float, bonus: Any, weight: float, wanted: int, first: int) -> list[int]:
    """Chen's recursion, all rows in each step."""
    vectors = embeddings.astype(np.float64)
    left, factors, taken = np.full(len(vectors), 1 + ridge), np.empty((0, len(vectors))), [first]
    while len(taken) < wanted:
        last = taken[-1]
        found = (vectors @ vectors[last] - factors[:, last] @ factors) / np.sqrt(left[last])
        factors, left = np.vstack([factors, found]), left - found**2
        values = bonus + weight * np.log(np.maximum(left, 1e-12))
        values[taken] = -np.inf
        taken.append(int(values.argmax()))
    return taken


@few
@given(seed=st.integers(0, 10_000), held=st.integers(1, 60), ridge=st.sampled_from([0.01, 0.5]), relevant=st.booleans())
def test_held_rows_give_the_sequence_of_chens_recursion(seed: int, held: int, ridge: float, relevant: bool) -> None:
    embeddings = points(200, seed, d=12)
    bonus = np.random.default_rng(seed).random(200) * relevant
    volume = Volume(embeddings, ridge, bonus, 0.7, held=held)
    volume.take(BudgetMeter(40))
    assert volume.rows == chen(embeddings, ridge, bonus, 0.7, 40, volume.rows[0])
    if relevant:
        assert volume.rows[0] == bonus.argmax()
    vectors = embeddings[volume.rows].astype(np.float64)
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, 1 + ridge)
    assert np.log(volume.shares).sum() == pytest.approx(np.linalg.slogdet(likeness)[1], rel=1e-6, abs=1e-6)


@few
@given(seed=st.integers(0, 10_000), held=st.integers(1, 30))
def test_the_linear_kernel_fills_its_dimensions_and_no_more(seed: int, held: int) -> None:
    embeddings = points(50, seed, d=6)
    volume = Volume(embeddings, 0.0, np.zeros(50), held=held)
    volume.take(BudgetMeter(20))
    assert volume.rows == chen(embeddings, 0.0, np.zeros(50), 1.0, 6, volume.rows[0])
    found = run("dpp", Given(embeddings), "20", ridge=0.0)
    assert len(found.rows) == 20
    assert found.rows[6:].tolist() == sorted(set(range(50)) - set(found.rows[:6].tolist()))[:14]
    assert "no volume" in found.reasons[6]
    assert found.log[-1] == {"step": "no volume left", "rows": 14}


def test_theta_weighs_quality_against_volume() -> None:
    features = Given(points(60, 3))
    by_length = np.argsort(-features.lengths(), kind="stable")[:10].tolist()
    assert run("dpp", features, "10", quality="length", theta=1.0).rows.tolist() == by_length
    plain = run("dpp", features, "10")
    no_quality = run("dpp", features, "10", quality="length", theta=0.0)
    assert no_quality.rows.tolist() == plain.rows.tolist()
    assert "length" in no_quality.reasons[0]


# ── QDIT ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@few
@given(seed=st.integers(0, 10_000), alpha=st.floats(0, 0.95), block=st.integers(1, 100))
def test_qdit_is_the_plain_greedy_of_the_weighted_sum(seed: int, alpha: float, block: int) -> None:
    features = Given(points(100, seed))
    similar = np.maximum(np.round(features.embeddings() @ features.embeddings().T, 6), 0).astype(np.float64)
    lengths = features.lengths()
    quality = (lengths - lengths.min()) / (lengths.max() - lengths.min())
    first = similar.sum(axis=0)
    covered, values = np.zeros(100), []
    taken: list[int] = []
    for _ in range(15):
        gains = np.maximum(similar - covered, 0).sum(axis=1)
        total = (1 - alpha) * (gains - first.min()) / (first.max() - first.min()) + alpha * quality
        total[taken] = -np.inf
        taken.append(int(total.argmax()))
        values.append(total[taken[-1]])
        covered = np.maximum(covered, similar[taken[-1]])
    found = run("qdit", features, "15", alpha=alpha)
    assert found.scores == pytest.approx(np.array(values), abs=1e-3)
    if (np.diff(np.sort(found.scores)) > 1e-4).all():
        assert found.rows.tolist() == taken


def test_qdit_by_quality_alone() -> None:
    features = Given(points(40, 0))
    found = run("qdit", features, "9", alpha=1.0)
    assert found.rows.tolist() == np.argsort(-features.lengths(), kind="stable")[:9].tolist()
    assert found.scores[0] == 1


# ── SemDeDup ─────────────────────────────────────────────────────────────────────────────────────────────────────


@few
@given(
    seed=st.integers(0, 10_000),
    eps=st.floats(0.001, 1),
    block=st.integers(1, 80),
    keep=st.sampled_from(["hard", "easy", "random"]),
)
def test_dropping_repeats_is_the_plain_loop(seed: int, eps: float, block: int, keep: str) -> None:
    embeddings = points(70, seed, d=4)
    labels = np.random.default_rng(seed).integers(3, size=70)
    centroids = points(3, seed + 1, d=4)
    order = keep_order(embeddings, labels, centroids, keep, np.random.default_rng(seed))
    found = repeats(embeddings, labels, order, eps, block=block)
    cosines = np.round(embeddings @ embeddings.T, 6)
    kept: list[int] = []
    for row in order.tolist():
        like = [other for other in kept if labels[other] == labels[row]]
        if any(cosines[row, other] >= np.float32(1 - eps) for other in like):
            assert found.of[row] in like
            assert cosines[row, found.of[row]] == max(cosines[row, other] for other in like)
        else:
            assert found.of[row] == -1
            kept.append(row)
    distance = 1 - (embeddings * centroids[labels]).sum(axis=1)
    if keep != "random":
        along = distance[order] if keep == "easy" else -distance[order]
        assert (np.diff(along) >= -2e-6).all()


def test_survivors_come_first_and_dropped_rows_by_how_little_they_repeat() -> None:
    features = Given(points(60, 2, d=4))
    found = run("semdedup", features, "60", eps=0.1)
    labels = features.clusters().labels.astype(np.int64)
    order = keep_order(features.embeddings(), labels, features.clusters().centroids, "hard", np.random.default_rng(0))
    truth = repeats(features.embeddings(), labels, order, 0.1)
    kept = int((truth.of < 0).sum())
    assert 0 < kept < 60
    assert set(found.rows[:kept].tolist()) == set(np.flatnonzero(truth.of < 0).tolist())
    assert (np.diff(truth.cosines[found.rows[kept:]]) >= 0).all()
    assert all(reason.startswith("brought back") == (place >= kept) for place, reason in enumerate(found.reasons))


# ── DSIR ─────────────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = [
    ("What is 3 + 5?", "8"),
    ("What is 3 + 6?", "It's nine, isn't it?"),
    ("", ""),
    ("Écrivez: «bonjour» — ÇA VA?", "日本 日本 日本"),
    ("name the COLOUR of grass", "green green green grass"),
]


def plain_counts(text: str, buckets: int) -> Any:
    """As released: word-punct tokens, then each uni- and bigram hashed by itself."""
    counts = np.zeros(buckets)
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    for gram in [*words, *(" ".join(pair) for pair in zip(words[:-1], words[1:], strict=True))]:
        counts[int(hashlib.sha256(gram.encode("utf-8")).hexdigest(), 16) % buckets] += 1
    return counts


@pytest.mark.parametrize("pseudo_count", [0.0, 0.5])
def test_importance_is_that_of_the_released_code(pseudo_count: float) -> None:
    texts = [TEXTS[index % len(TEXTS)] for index in np.random.default_rng(0).integers(99, size=30)]
    shots = ("What is 7 + 5?", "What is the COLOUR?")
    features = Given(points(30, 0), texts, shots)
    found = run("dsir", features, "30", gumbel=False, buckets=500, pseudo_count=pseudo_count)
    target = sum(plain_counts(f"{shot}\nyes", 500) for shot in shots) + pseudo_count
    counts = np.array([plain_counts(f"{prompt}\n{answer}", 500) for prompt, answer in texts])
    gain = np.log(target / target.sum() + 1e-8) - np.log(counts.sum(axis=0) / counts.sum() + 1e-8)
    weights = counts @ gain
    assert found.scores == pytest.approx(weights[found.rows], rel=1e-5, abs=1e-4)
    assert (np.diff(found.scores) <= 0).all()


def test_buckets_do_not_depend_on_what_is_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{prompt} {answer} {place % 7}" for place, (prompt, answer) in enumerate(TEXTS * 9)]
    whole = [(part.tolist(), sizes.tolist()) for part, sizes in NgramBuckets(10_000).read(texts)]
    monkeypatch.setattr("xpert.selectors.scorers.dsir._TEXTS", 4)
    monkeypatch.setattr("xpert.selectors.scorers.dsir._MOST_KEPT", 10)
    parts = [(part.tolist(), sizes.tolist()) for part, sizes in NgramBuckets(10_000).read(texts)]
    assert [bucket for part, _ in parts for bucket in part] == whole[0][0]
    assert [size for _, sizes in parts for size in sizes] == whole[0][1]


def test_gumbel_noise_is_one_draw_a_row() -> None:
    features = Given(points(5, 0), TEXTS)
    plain = run("dsir", features, "5", gumbel=False).pool_scores
    noisy = run("dsir", features, "5").pool_scores
    assert noisy == pytest.approx(plain + np.random.default_rng(0).gumbel(size=5), rel=1e-5)


def test_rows_of_too_few_words_are_not_scored() -> None:
    features = Given(points(5, 0), TEXTS)
    found = run("dsir", features, "5", min_words=8, gumbel=False)
    assert found.log == [{"step": "scores", "rows": 3, "not scored": 2}]
    assert sum(reason.startswith("not scored") for reason in found.reasons) == 2


# ── what users get wrong ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("votek", {"uncertainty": "length"}, "no part in stage fast"),
        ("votek", {"stage": "full", "uncertainty": "no"}, "unknown scorer"),
        ("votek", {"stage": "full"}, "--base MODEL"),
        ("votek", {"stage": "full", "uncertainty": "length", "uncertainty_params": "a=1"}, "unknown parameter"),
        ("votek", {"neighbours": 0}, "neighbours"),
        ("ideal", {"p": 1.5}, "p "),
        ("ideal", {"samples": 0}, "samples"),
        ("dpp", {"theta": 0.3}, "no part without quality"),
        ("dpp", {"quality": "lenght"}, "unknown scorer"),
        ("dpp", {"ridge": -1.0}, "ridge"),
        ("qdit", {"quality": "similarity"}, "needs shots"),
        ("qdit", {"alpha": 2.0}, "alpha"),
        ("semdedup", {"keep": "soft"}, "keep"),
        ("dsir", {}, "needs shots"),
        ("dsir", {"buckets": 1}, "buckets"),
    ],
)
def test_mistakes_are_said(name: str, params: dict[str, Any], message: str) -> None:
    features = Given(points(20, 0))
    features.shots = None  # type: ignore[assignment]

    def base() -> str:
        raise BadInput("no base", hint="give it with --base MODEL")

    features.base = base
    with pytest.raises(BadInput, match=re.escape(message)):
        run(name, features, "5", **params)
