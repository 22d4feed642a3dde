"""Routing among many experts: the fast ranking equals a slow plain one, and batches change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert import plugins
from xpert.embedding import normalise
from xpert.experts.routers import _skill_thresholds, centroid
from xpert.experts.routers._choice import SHOWN, best_places, ranked, shuffled
from xpert.experts.routers._familiarity import Familiarity
from xpert.experts.routers._skill_space import PromptSpace, SkillGroup, SkillSpace, groups_of
from xpert.experts.routers._skill_thresholds import calibrated
from xpert.protocols import Floats, RoutableExpert, Route, RouteRequest
from xpert.records import Message

Plain = tuple[list[tuple[str, float]], dict[str, str]]
WORDS = [f"{a}{b}" for a in ("ba", "ce", "di", "fo", "gu", "hy", "ja", "ke", "lo", "mu") for b in "bcdfghklmnprst"]
ROUTERS = ["centroid", "centroid:mode=centroid", "skills", "skills:fallback=global", "glider", "random"]


def many(count: int, seed: int = 0) -> list[RoutableExpert]:
    """Experts of one to three skills and one to twelve exemplars each."""
    random = np.random.default_rng(seed)
    experts = []
    for number in range(count):
        own = random.choice(WORDS, 6)
        texts = tuple(text(random, own) for _ in range(int(random.integers(1, 13))))
        skills = tuple(f"s{number}.{random.integers(1, 4)}" for _ in texts)
        experts.append(RoutableExpert(f"x{number:03}", texts, tuple(sorted(set(skills))), {}, skills))
    return experts


def text(random: np.random.Generator, own: Sequence[str]) -> str:
    return " ".join([*random.choice(own, 4), *random.choice(WORDS, 4)])


def prompts(count: int, seed: int = 1) -> list[RouteRequest]:
    random = np.random.default_rng(seed)
    texts = [text(random, random.choice(WORDS, 6)) for _ in range(count - 3)]
    return [
        RouteRequest(f"r{i}", (Message("user", one),))
        for i, one in enumerate([*texts, "", "?!", "words that none of them has"])
    ]


def opened(name: str, experts: Sequence[RoutableExpert], **params: Any) -> Any:
    plugin, _, given_params = name.partition(":")
    kind = plugins.load("router", plugin)
    pairs = dict(pair.split("=") for pair in given_params.split(",") if pair)
    router = kind(kind.Options.from_mapping({**pairs, **params}))
    router.prepare(experts)
    return router


# ── contract among many ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*ROUTERS, "fixed"])
def test_routes_among_many_are_sound_and_list_the_best(name: str) -> None:
    experts = many(120)
    for route in opened(name, experts).route(prompts(20)):
        listed = [candidate.expert for candidate in route.candidates]
        assert SHOWN <= len(listed) <= len(experts) and len(set(listed)) == len(listed)
        assert {key for key, _ in route.experts} <= set(listed)
        scores = [candidate.score for candidate in route.candidates]
        assert scores == sorted(scores, reverse=True)
        assert not route.experts or sum(weight for _, weight in route.experts) == pytest.approx(1)


@pytest.mark.parametrize(("name", "params"), [("centroid", {"threshold": -1}), ("random", {}), ("glider", {})])
def test_all_that_answer_are_listed(name: str, params: dict[str, Any]) -> None:
    route = opened(name, many(120), top=70, **params).route(prompts(4)[:1])[0]
    assert len(route.experts) <= 70 and len(route.candidates) == 70
    assert [key for key, _ in route.experts] == [one.expert for one in route.candidates[: len(route.experts)]]


@pytest.mark.parametrize("name", ROUTERS)
def test_batches_and_order_of_experts_change_nothing(name: str) -> None:
    requests, experts = prompts(40), many(120)
    router = opened(name, experts)
    together = router.route(requests)
    assert [router.route([request])[0] for request in requests] == together
    assert router.route(requests[::-1])[::-1] == together
    assert opened(name, experts[::-1]).route(requests) == together


def test_batches_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    router, requests = opened("centroid", many(60)), prompts(23)
    expected = router.route(requests)
    monkeypatch.setattr("xpert.experts.routers._skill_space._CELLS", 900)
    monkeypatch.setattr(centroid, "_BATCH", 7)
    assert router.route(requests) == expected


# ── the best places ──────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 35))
def test_best_places_are_those_of_a_sort(values: list[int], most: int) -> None:
    scores = np.array(values, np.float64)
    expected = sorted(range(len(values)), key=lambda place: (-values[place], place))[:most]
    assert best_places(scores, most).tolist() == expected


@given(st.dictionaries(st.text(max_size=3), st.integers(-2, 2), min_size=1, max_size=20), st.integers(1, 25))
def test_ranked_is_the_same_for_scores_by_key(scores: dict[str, int], most: int) -> None:
    keys = sorted(scores)
    places = best_places(np.array([scores[key] for key in keys]), most)
    assert [candidate.expert for candidate in ranked(scores, most)] == [keys[place] for place in places]


def test_shuffling_is_one_to_one_and_even() -> None:
    found = shuffled(np.arange(100_000, dtype=np.uint64))
    assert len(np.unique(found)) == 100_000
    bits = (found[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.01


# ── centroid against its plain form ──────────────────────────────────────────────────────────────────────────────


def plain_score(vectors: Floats, prompt: Floats, mode: str) -> float:
    if mode == "centroid":
        mean = vectors.mean(axis=0)
        return float(prompt.astype(np.float64) @ (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float64))
    nearest = sorted((float(row.astype(np.float64) @ prompt.astype(np.float64)) for row in vectors), reverse=True)[:3]
    return sum(nearest) / len(nearest)


def plain_ranking(router: Any, request: RouteRequest, mode: str) -> Plain:
    """(experts with their scores, best first; the nearest skill of each), one product at a time in Python."""
    texts = [one for group in router.groups for one in group.texts]
    embedder = plugins.load("embedder", "lsa")(context())
    embedder.fit(texts)
    prompt = embedder.embed([request.prompt])[0] * Familiarity(texts).of([request.prompt])[0]
    best: dict[str, float] = {}
    label: dict[str, str] = {}
    for group in router.groups:
        score = round(plain_score(embedder.embed(list(group.texts)), prompt, mode), 5)
        if score > best.get(group.expert, -2.0):
            best[group.expert], label[group.expert] = score, group.label
    return sorted(best.items(), key=lambda item: (-item[1], item[0])), label


def context() -> Any:
    from xpert.protocols import EmbedderContext

    return EmbedderContext()


@pytest.mark.parametrize("mode", ["nearest", "centroid"])
def test_centroid_ranks_as_a_plain_loop_does(mode: str) -> None:
    router = opened("centroid", many(70), mode=mode, threshold=0.2, top=4)
    for request in [*prompts(9)[:6], *prompts(9)[-2:]]:
        route: Route = router.route([request])[0]
        expected, label = plain_ranking(router, request, mode)
        assert [c.expert for c in route.candidates] == [key for key, _ in expected[:SHOWN]]
        assert [c.score for c in route.candidates] == pytest.approx([score for _, score in expected[:SHOWN]], abs=1e-5)
        assert {key for key, _ in route.experts} == {key for key, score in expected[:4] if score >= 0.2}
        assert f"nearest skill {label[expected[0][0]]!r} of {expected[0][0]}" in route.reason


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=12), st.integers(0, 1000), st.sampled_from(["nearest", "centroid"])
)
def test_the_matrix_by_levels_scores_as_each_group_by_itself(sizes: list[int], seed: int, mode: str) -> None:
    random = np.random.default_rng(seed)
    vectors = normalise(random.standard_normal((sum(sizes), 5)))
    groups = [SkillGroup(f"x{i}", "s", tuple("t" * size)) for i, size in enumerate(sizes)]
    space = SkillSpace(groups, vectors, mode)
    asked = normalise(random.standard_normal((3, 5)))
    starts = np.cumsum([0, *sizes])
    plain = np.array(
        [
            [plain_score(vectors[a:b], prompt, mode) for a, b in zip(starts, starts[1:], strict=False)]
            for prompt in asked
        ]
    )
    assert space.scores(asked) == pytest.approx(plain, abs=1e-5)
    every = np.arange(len(sizes))
    assert np.array([space.exact(prompt, every) for prompt in asked]) == pytest.approx(plain, abs=1e-6)
    assert np.stack([space.own(asked, group) for group in every], axis=1) == pytest.approx(plain, abs=1e-5)


def plain_thresholds(groups: Sequence[SkillGroup], mode: str, reject: float, strictness: float) -> list[float]:
    """As they were found before there were many experts: lists of scores, one exemplar and skill at a time."""
    own: list[list[float]] = [[] for _ in groups]
    others: list[list[float]] = [[] for _ in groups]
    for fold in range(2):
        kept = {i: [t for at, t in enumerate(g.texts) if at % 2 != fold] for i, g in enumerate(groups)}
        kept = {i: texts for i, texts in kept.items() if texts}
        if not any(groups[i].texts[fold::2] for i in kept):
            continue
        space = lsa_space()
        vectors = space.learn([one for texts in kept.values() for one in texts])
        rows = np.split(vectors, np.cumsum([len(texts) for texts in kept.values()])[:-1])
        for i in kept:
            for left in groups[i].texts[fold::2]:
                prompt = space.prompts([left])[0]
                for j, own_rows in zip(kept, rows, strict=True):
                    if j == i:
                        own[i].append(plain_score(own_rows, prompt, mode))
                    elif groups[j].expert != groups[i].expert:
                        others[j].append(plain_score(own_rows, prompt, mode))
    low = np.quantile([score for scores in own for score in scores], reject, method="lower")
    found = []
    for mine, theirs in zip(own, others, strict=True):
        weakest = float(np.quantile(mine, reject, method="lower") if len(mine) >= 8 else low)
        strongest = float(-np.quantile([-s for s in theirs], reject, method="lower")) if theirs else 0.0
        found.append(strongest + strictness * (weakest - strongest) if strongest < weakest else weakest)
    return found


def lsa_space() -> PromptSpace:
    return PromptSpace(plugins.load("embedder", "lsa")(context()), fitted=True)


@pytest.mark.parametrize("mode", ["nearest", "centroid"])
@pytest.mark.parametrize("reject", [0.02, 0.3, 1.0])
def test_thresholds_equal_those_of_plain_lists(mode: str, reject: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_skill_thresholds, "_BLOCK", 9)
    groups = [group for expert in many(14, seed=3) for group in groups_of(expert, None)]
    vectors = lsa_space().learn([one for group in groups for one in group.texts])
    found = calibrated(groups, vectors, mode, lsa_space, reject=reject, strictness=0.4)
    assert found.tolist() == pytest.approx(plain_thresholds(groups, mode, reject, 0.4), abs=1e-5)


def test_of_many_strangers_an_even_sample_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [group for expert in many(60, seed=4) for group in groups_of(expert, None)]
    vectors = lsa_space().learn([one for group in groups for one in group.texts])
    whole = calibrated(groups, vectors, "nearest", lsa_space, reject=0.4, strictness=0)
    monkeypatch.setattr(_skill_thresholds, "STRANGERS", 60)
    some = calibrated(groups, vectors, "nearest", lsa_space, reject=0.4, strictness=0)
    assert 0 < np.abs(whole - some).mean() < 0.05 and whole.min() > 0.05
