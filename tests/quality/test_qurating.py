"""QuRating: a planted ranking is recovered, draws follow ratings, budgets and domains are hit, mistakes are told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert import plugins
from xpert.bradley_terry import STRENGTHS, fit_pairs, pair_accuracy, solve
from xpert.data import pool_from_rows
from xpert.errors import BadInput, NotFound
from xpert.features import FeatureOptions, Features
from xpert.preferences import draw_pairs, read_pairs
from xpert.progress import SILENT
from xpert.records import Budget, Message, Row
from xpert.selection import choose
from xpert.selectors._gumbel import gumbel_order
from xpert.selectors._scaling import standardised

# ── the fit ──────────────────────────────────────────────────────────────────────────────────────────────────────


def planted(rows: int = 300, dimensions: int = 12, seed: int = 0) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, dimensions)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x, x @ random.normal(size=dimensions) * 3


def ranks(values: Any) -> Any:
    return np.argsort(np.argsort(values))


def test_a_planted_ranking_is_recovered_from_noisy_votes() -> None:
    x, truth = planted()
    random = np.random.default_rng(1)
    pairs = np.array(draw_pairs(len(x), 400, random))
    chance = 1 / (1 + np.exp(-(truth[pairs[:, 0]] - truth[pairs[:, 1]])))
    votes = random.binomial(5, chance) / 5
    fit = fit_pairs(x[pairs[:, 0]] - x[pairs[:, 1]], votes, random)
    assert np.corrcoef(ranks(x @ fit.weights), ranks(truth))[0, 1] > 0.95
    assert (fit.pairs, fit.held_out) == (400, 80)
    assert fit.accuracy > 0.75
    assert fit.strength in STRENGTHS


def test_votes_at_random_teach_nothing_and_it_shows() -> None:
    x, _ = planted()
    random = np.random.default_rng(2)
    pairs = np.array(draw_pairs(len(x), 600, random))
    fit = fit_pairs(x[pairs[:, 0]] - x[pairs[:, 1]], random.integers(2, size=600).astype(float), random)
    assert 0.35 < fit.accuracy < 0.65


def test_the_solution_has_no_slope_and_flipped_pairs_change_nothing() -> None:
    random = np.random.default_rng(3)
    x, p = random.normal(size=(50, 4)), random.random(50)
    weights = solve(x, p, 0.1)
    slope = x.T @ (1 / (1 + np.exp(-x @ weights)) - p) / 50 + 0.1 * weights
    assert np.abs(slope).max() < 1e-4
    flip = random.integers(2, size=50).astype(bool)
    flipped = solve(np.where(flip[:, None], -x, x), np.where(flip, 1 - p, p), 0.1)
    np.testing.assert_allclose(flipped, weights, atol=1e-4)


def test_pair_accuracy() -> None:
    assert pair_accuracy(np.array([1.0, -1.0, 0.0, 5.0]), np.array([0.9, 0.9, 0.1, 0.5])) == pytest.approx(0.5)
    assert np.isnan(pair_accuracy(np.array([1.0]), np.array([0.5])))


# ── the draw ─────────────────────────────────────────────────────────────────────────────────────────────────────


@given(values=st.lists(st.integers(-5, 5), min_size=1, max_size=40), seed=st.integers(0, 100))
@settings(deadline=None)
def test_at_tau_to_zero_the_draw_is_the_top(values: list[int], seed: int) -> None:
    logits = np.array(values, float)
    top = np.argsort(-logits, kind="stable").tolist()
    assert gumbel_order(logits, 0.0, np.random.default_rng(seed)).tolist() == top
    almost = gumbel_order(logits, 1e-9, np.random.default_rng(seed))
    assert logits[almost].tolist() == logits[top].tolist()


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_how_often_a_row_is_drawn_follows_the_logits(tau: float) -> None:
    logits, draws = np.array([0.0, 1.0, 2.0, -1.0, 0.5]), 6000
    random = np.random.default_rng(0)
    orders = np.array([gumbel_order(logits, tau, random)[:2] for _ in range(draws)])
    p = np.exp(logits / tau) / np.exp(logits / tau).sum()
    first = np.bincount(orders[:, 0], minlength=5) / draws
    np.testing.assert_allclose(first, p, atol=0.02)
    # Drawn second: p_i after any other j, which is p_j * p_i / (1 - p_j).
    second = [sum(p[j] * p[i] / (1 - p[j]) for j in range(5) if j != i) for i in range(5)]
    np.testing.assert_allclose(np.bincount(orders[:, 1], minlength=5) / draws, second, atol=0.02)


def test_scores_all_alike_have_no_spread() -> None:
    assert standardised(np.full(5, 1e6 + 0.1, np.float32)).tolist() == [0] * 5
    assert standardised(np.array([1.0, 3.0])).tolist() == [-1.0, 1.0]


# ── the selector ─────────────────────────────────────────────────────────────────────────────────────────────────


class Planted:
    """Features with a ranking; rows of three domains."""

    options = FeatureOptions()
    lengths_unit = "tokens"
    device = "cpu"
    progress = SILENT

    def __init__(self, count: int = 60, seed: int = 0) -> None:
        self.vectors, self.truth = planted(count, 6, seed)
        self.costs = np.random.default_rng(seed).integers(1, 9, size=count).astype(np.int64)
        self.pool = pool_from_rows(
            [Row(f"r{i}", (Message("user", f"p {i}"),), "x", None, {"topic": "abbccc"[i % 6]}) for i in range(count)]
        )

    def embeddings(self) -> Any:
        return self.vectors

    def lengths(self) -> Any:
        return self.costs


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., Path]:
    """A file of pairs with certain votes by the planted ranking."""

    def write(features: Planted, count: int = 200) -> Path:
        drawn = draw_pairs(len(features.pool), count, np.random.default_rng(5))
        lines = [{"a": f"r{a}", "b": f"r{b}", "p": float(features.truth[a] > features.truth[b])} for a, b in drawn]
        path = tmp_path / "pairs.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        return path

    return write


def run(features: Any, budget: str, seed: int = 0, kind: str = "selector", **params: Any) -> Any:
    params = {key: str(value) if isinstance(value, Path) else value for key, value in params.items()}
    if kind == "ranked":
        from xpert.selectors._ranked import ranked

        plugin = ranked(plugins.load("scorer", "qurating"))
    else:
        plugin = plugins.load("selector", "qurating")
    return choose(plugin(plugin.Options.from_mapping(params)), features, None, Budget.parse(budget), seed=seed)


def test_ratings_rank_as_planted(judged: Callable[..., Path]) -> None:
    features = Planted()
    found = run(features, "100%", kind="ranked", pairs=judged(features))
    assert np.corrcoef(ranks(found.pool_scores), ranks(features.truth))[0, 1] > 0.95
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    fit = next(step for step in found.log if step["step"] == "Bradley-Terry fit")
    assert fit["held-out accuracy"] > 0.85
    assert fit["held-out pairs"] == 40
    assert re.fullmatch(r"educational [+-].*", found.reasons[0])
    best = run(features, "10", pairs=judged(features), tau=0)
    assert best.rows.tolist() == found.rows[:10].tolist()


def test_budgets_and_seeds(judged: Callable[..., Path]) -> None:
    features = Planted()
    pairs = judged(features)
    for domain in (None, "topic"):
        for budget in ("20", "45%", "100%", "130tok"):
            found = run(features, budget, pairs=pairs, domain=domain)
            again = run(features, budget, pairs=pairs, domain=domain)
            assert found.rows.tolist() == again.rows.tolist()
            assert found.scores.tobytes() == again.scores.tobytes()
            assert list(found.log) == list(again.log)
            assert len(set(found.rows.tolist())) == len(found.rows)
            if budget == "130tok":
                left = 130 - int(features.costs[found.rows].sum())
                assert left >= 0
                assert not any(features.costs[row] <= left for row in set(range(60)) - set(found.rows.tolist()))
            else:
                assert len(found.rows) == Budget.parse(budget).limit(60)
        assert (
            run(features, "20", pairs=pairs, domain=domain, seed=1).rows.tolist()
            != run(features, "20", pairs=pairs, domain=domain).rows.tolist()
        )
        assert not set(range(9)) & set(run_without(features, pairs, domain))


def run_without(features: Planted, pairs: Path, domain: str | None) -> list[int]:
    """Rows chosen where the first nine are excluded, by pairs of the others."""
    lines = [line for line in pairs.read_text().splitlines() if not re.search(r'"r[0-8]"', line)]
    pairs.with_name("others.jsonl").write_text("\n".join(lines))
    plugin = plugins.load("selector", "qurating")
    selector = plugin(plugin.Options(pairs=str(pairs.with_name("others.jsonl")), domain=domain))
    return list(choose(selector, features, None, Budget.parse("40"), excluded=range(9)).rows.tolist())  # type: ignore


@pytest.mark.parametrize("tau", [0.0, 2.0])
def test_domains_keep_their_shares(judged: Callable[..., Path], tau: float) -> None:
    features = Planted()
    found = run(features, "30", pairs=judged(features), domain="topic", tau=tau)
    topics = [features.pool.row(int(row)).columns["topic"] for row in found.rows]
    assert {topic: topics.count(topic) for topic in "abc"} == {"a": 5, "b": 10, "c": 15}
    quotas = {step["domain"]: step["quota"] for step in found.log if step["step"] == "domain"}
    assert quotas == {"a": 5, "b": 10, "c": 15}
    tokens = run(features, "150tok", pairs=judged(features), domain="topic", tau=tau)
    assert sum(step["quota"] for step in tokens.log if step["step"] == "domain") == 150


def test_votes_near_one_half_are_left_out(tmp_path: Path) -> None:
    features = Planted()
    drawn = draw_pairs(60, 60, np.random.default_rng(0))
    shares = [0.6, 0.75, 0.2] * 20
    lines = [json.dumps({"a": f"r{a}", "b": f"r{b}", "p": p}) for (a, b), p in zip(drawn, shares, strict=True)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    assert run(features, "5", pairs=tmp_path / "p.jsonl").log[0] == {"step": "pairs", "given": 60, "confident": 40}
    assert run(features, "5", pairs=tmp_path / "p.jsonl", conf=0).log[0]["confident"] == 60


def test_a_judge_that_knows_what_is_good(endpoint: Callable[..., Any], rows: list[Row]) -> None:
    def capitals(question: str) -> str:
        a, b = question.split("Text A:")[1].split("Text B:")
        return "A" if ("capitals" in a) > ("capitals" in b) else "B" if "capitals" in b else "I cannot say"

    server = endpoint(capitals)
    features = Features(pool_from_rows(rows[:60]), FeatureOptions(), cache=None, device="cpu")
    params = {"judge": server.spec, "judged": 100, "criterion": "style"}
    found = run(features, "12", kind="ranked", **params)
    assert [rows[row].skill for row in found.rows] == ["casing"] * 12
    judge = next(step for step in found.log if step["step"] == "judge")
    # Where neither or both qualify, the scripted judge follows the place or says nothing.
    assert judge["questions"] == 200
    assert judge["unreadable"] > 0
    asked = len(server.asked)
    assert asked == 200
    again = run(features, "12", kind="ranked", **params)
    assert len(server.asked) == asked  # kept
    assert list(again.log) == list(found.log)


def test_a_judge_that_looks_at_the_place_alone(endpoint: Callable[..., Any]) -> None:
    with pytest.raises(
        BadInput, match=r"decides 0 of 25 pairs alike .* of 50 replies 50 prefer what is shown first, 0"
    ):
        run(Planted(), "5", judge=endpoint(lambda _: "A").spec, judged=25)


def test_a_local_judge_and_the_bases_states(rows: list[Row], tiny_base: Path, tmp_path: Path) -> None:
    options = FeatureOptions(base=str(tiny_base), max_length=64)
    features = Features(pool_from_rows(rows[:40]), options, cache=None, device="cpu")
    drawn = draw_pairs(40, 120, np.random.default_rng(0))
    lines = [
        {"a": rows[a].id, "b": rows[b].id, "p": float(len(rows[a].prompt) > len(rows[b].prompt))} for a, b in drawn
    ]
    lines += [{"a": "some text of its own", "b": "another text\nof two lines", "p": 1.0}]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = run(features, "40", kind="ranked", pairs=path, on="base")
    assert found.log[2]["on"] == "base"
    assert found.log[2]["held-out accuracy"] > 0.7
    with pytest.raises(BadInput, match=r"none of the judge's .* replies"):  # a random model decides nothing
        run(features, "5", judge=str(tiny_base), judged=2, excerpt=20, reply_tokens=2)
    assert run(features, "40", pairs=path).log[1]["on"] == "embeddings"


def test_the_command_line(
    xpert: Callable[..., Result], columns: Callable[..., Any], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = columns(60)
    pool = write_jsonl("pool.jsonl", rows)
    drawn = draw_pairs(60, 100, np.random.default_rng(0))
    votes = [{"a": rows[a]["id"], "b": rows[b]["id"], "preferred": "a" if a % 5 else "b"} for a, b in drawn]
    pairs = write_jsonl("pairs.jsonl", votes)
    common = ("select", pool, "--method", "qurating", "--budget", "10", "-p", f"pairs={pairs}", "-p", "domain=skill")
    done = xpert(*common, "-o", tmp_path / "out", "--explain", "--no-report")
    assert done.exit_code == 0, done.output
    assert "held-out accuracy" in done.stdout
    assert len((tmp_path / "out" / "selected.jsonl").read_text().splitlines()) == 10
    # Another content of the file is another selection.
    pairs.write_text(pairs.read_text().replace('"preferred": "b"', '"preferred": "a"'))
    again = xpert(*common, "-o", tmp_path / "out", "--no-report")
    assert again.exit_code == 2
    assert "other inputs, options or seed" in again.stderr
    listed = xpert("methods").stdout
    assert len(re.findall(r"^  qurating ", listed, re.MULTILINE)) == 2
    assert "xpert methods qurating --kind scorer" in xpert("methods", "qurating").stdout


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────

GOOD = '{"a": "r1", "b": "r2", "p": 1}'


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "holds no pairs"),
        (["{"], "line 1: not valid JSON"),
        (["[1, 2]"], "line 1: a line is an object"),
        ([GOOD, '{"a": "r1", "p": 1}'], "line 2: 'b' is None"),
        ([GOOD, "", '{"a": "r1", "b": "r99", "p": 1}'], "line 3: 'b' is 'r99', which is no row of the pool"),
        (['{"a": "r1", "b": "r2"}'], "line 1: 'p' is None"),
        (['{"a": "r1", "b": "r2", "p": 1.5}'], "line 1: 'p' is 1.5"),
        (['{"a": "r1", "b": "r2", "p": true}'], "line 1: 'p' is True"),
        (['{"a": "r1", "b": "r2", "preferred": "r1"}'], "line 1: 'preferred' is 'r1', not 'a' or 'b'"),
        (['{"a": "r1", "b": "r1", "p": 1}'], "line 1: both sides of the pair are the same"),
        ([GOOD] * 19, "19 decided pairs are too few to learn from; the least is 20"),
        (['{"a": "r1", "b": "r2", "p": 0.6}'] * 30, "0 decided pairs are too few"),
    ],
)
def test_files_of_pairs_that_cannot_be_used(tmp_path: Path, lines: Sequence[str], said: str) -> None:
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    with pytest.raises(BadInput) as caught:
        run(Planted(), "5", pairs=tmp_path / "p.jsonl")
    assert said in str(caught.value)


def test_pairs_of_rows_alike(tmp_path: Path) -> None:
    features = Planted()
    features.vectors[:] = features.vectors[0]
    (tmp_path / "p.jsonl").write_text("\n".join([GOOD] * 20))
    with pytest.raises(BadInput, match="same vector"):
        run(features, "5", pairs=tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({}, "needs pairs to learn from. Give pairs=FILE, or judge=MODEL"),
        ({"pairs": "x", "judge": "y"}, "takes pairs or a judge, not both"),
        ({"pairs": "/nope.jsonl"}, "/nope.jsonl: no such file of pairs"),
        ({"judge": "http://localhost:1/v1"}, "names no model"),
        ({"judge": "x", "criterion": "styel"}, "did you mean 'style'"),
        ({"pairs": "x", "tau": -1}, "tau is -1.0; the least is 0"),
    ],
)
def test_mistakes(params: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as caught:
        run(Planted(), "5", **params)
    assert said.lower() in str(caught.value).lower()


def test_a_domain_that_rows_lack(judged: Callable[..., Path]) -> None:
    features = Planted()
    with pytest.raises(BadInput, match="pool row r0: domain column 'tpoic' is missing"):
        run(features, "5", pairs=judged(features), domain="tpoic")


def test_a_text_is_a_side_and_an_id_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"a": "r1", "b": "a text", "p": 0.25}')
    [pair] = read_pairs(tmp_path / "p.jsonl", ["r0", "r1"])
    assert (pair.a, pair.b, pair.p) == (1, "a text", 0.25)
    with pytest.raises(NotFound):
        read_pairs(tmp_path / "nope", [])


@given(rows=st.integers(2, 30), count=st.integers(1, 500), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_drawn_pairs_are_different_pairs_of_different_rows(rows: int, count: int, seed: int) -> None:
    drawn = draw_pairs(rows, count, np.random.default_rng(seed))
    assert len(drawn) == min(count, rows * (rows - 1) // 2)
    assert len({frozenset(pair) for pair in drawn}) == len(drawn)
    assert all(a != b for a, b in drawn)


def test_pairs_of_a_pool_of_one() -> None:
    with pytest.raises(BadInput, match="a pool of 1 row"):
        draw_pairs(1, 5, np.random.default_rng(0))
