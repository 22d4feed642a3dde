"""Consistency on related items, against plain versions that draw every pair and every resample by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpert.errors import BadInput
from xpert.experts.consistency import agreement, consistency, find_probes
from xpert.experts.evaluate import BOOTSTRAP_SAMPLES, Evaluation, ItemResult
from xpert.experts.item_groups import ItemSpace
from xpert.experts.metrics import METRICS, RIGHT_OR_WRONG, score
from xpert.experts.profiles import Views, as_profile
from xpert.protocols import Floats
from xpert.records import Message, Row, SuiteItem


def item(number: int, *, skill: str = "s", probe: str | None = None, metric: str = "exact") -> SuiteItem:
    row = Row(f"i{number}", (Message("user", f"prompt {number}"),), "a", skill)
    return SuiteItem(row, ("a",), metric, skill, None, probe)


def evaluation(items: Sequence[SuiteItem], right: Sequence[float], seed: int = 0) -> Evaluation:
    def results(scores: Sequence[float]) -> list[ItemResult]:
        return [ItemResult(i.row.id, i.skill, "", s, None, ()) for i, s in zip(items, scores, strict=True)]

    return Evaluation(items, {"expert": results(right), "base": results([0.0] * len(right))}, seed=seed)


class Space(ItemSpace):
    """Items whose embeddings are given."""

    def __init__(self, items: Sequence[SuiteItem], rows: Floats) -> None:
        super().__init__(items, "given")
        self._rows = rows

    def embeddings(self) -> Floats:
        return self._rows

    @property
    def identity(self) -> str:
        return "given"


# ── the figures ──────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.booleans(), min_size=2, max_size=12))
def test_agreement_is_the_share_of_agreeing_pairs(right: list[bool]) -> None:
    pairs = list(itertools.combinations(right, 2))
    assert agreement(sum(right), len(right)) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


@given(st.data())
def test_consistency_equals_the_plain_version(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(2, 4), min_size=1, max_size=6))
    right = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=sum(sizes), max_size=sum(sizes)))
    seed = data.draw(st.integers(0, 9))
    items = [item(n) for n in range(sum(sizes))]
    ends = np.cumsum(sizes)
    clusters = [tuple(range(end - size, end)) for size, end in zip(sizes, ends.tolist(), strict=True)]
    found = evaluation(items, right, seed)
    got = consistency(found, "expert", clusters, "s")
    assert got is not None
    every = [all(right[row] for row in rows) for rows in clusters]
    pairs = [[right[a] == right[b] for a, b in itertools.combinations(rows, 2)] for rows in clusters]
    alike = [sum(same) / len(same) for same in pairs]
    for interval, values in ((got.all_right, every), (got.agreement, alike)):
        rng = np.random.default_rng(found.seed_of("s"))
        draws = rng.integers(0, len(values), size=(BOOTSTRAP_SAMPLES, len(values)))
        means = sorted(sum(values[at] for at in draw) / len(values) for draw in draws.tolist())
        assert interval.n == len(clusters)
        assert interval.score == pytest.approx(sum(values) / len(values))
        assert interval.low == pytest.approx(np.quantile(means, 0.025))
        assert interval.high == pytest.approx(np.quantile(means, 0.975))


def test_without_clusters_there_is_no_consistency() -> None:
    assert consistency(evaluation([item(0)], [1.0]), "expert", [], "s") is None


# ── which items are related ──────────────────────────────────────────────────────────────────────────────────────


def test_items_of_one_skill_and_probe_are_related() -> None:
    items = [
        *(item(n, probe="x") for n in range(3)),
        item(3, skill="t", probe="x"),
        item(4, probe="y"),
        item(5),
        item(6, skill="t", probe="x", metric="number"),
        item(7, probe="y", metric="f1"),
    ]
    for way in ("field", "auto"):
        found = find_probes(items, way, 0.9, ItemSpace(items, "not asked"))
        assert found.of_skill == {"s": ((0, 1, 2),), "t": ((3, 6),)}
        assert found.how == {"by": "the suite's probe", "left_out": {"f1": 1}, "alone": 2}
    assert find_probes(items, "none", 0.9, ItemSpace(items, "not asked")).of_skill == {}


def test_without_the_field_nothing_is_related_unless_asked_for() -> None:
    items = [item(0), item(1)]
    assert find_probes(items, "field", 0.9, ItemSpace(items, "not asked")).how == {}


@given(st.integers(0, 999), st.sampled_from([0.0, 0.5, 0.9]))
def test_near_items_of_a_skill_equal_the_plain_version(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(12, 3)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    items = [item(n, skill=str(rng.choice(["s", "t"])), metric=str(rng.choice(["exact", "f1"]))) for n in range(12)]
    founders: list[list[int]] = []
    for row, one in enumerate(items):
        if one.metric != "exact":
            continue
        for rest in founders:
            cosine = round(float(rows[rest[0]] @ rows[row]), 6)
            if items[rest[0]].skill == one.skill and cosine >= threshold:
                rest.append(row)
                break
        else:
            founders.append([row])
    found = find_probes(items, "auto", threshold, Space(items, rows))
    assert sorted(group for groups in found.of_skill.values() for group in groups) == sorted(
        tuple(rest) for rest in founders if len(rest) > 1
    )
    assert found.how["threshold"] == threshold


def test_the_metrics_of_right_and_wrong_give_nothing_between() -> None:
    pairs = [("a b c", "a b d"), ("b", "b"), ("12", "12.0"), ("x, y", "y"), ("the cat sat", "a cat sat down")]
    for metric in RIGHT_OR_WRONG & METRICS.keys():
        assert {score(metric, *(said, [wanted])) for said, wanted in pairs} <= {0.0, 1.0}
    for metric in METRICS.keys() - RIGHT_OR_WRONG:
        assert any(0 < score(metric, said, [wanted]) < 1 for said, wanted in pairs), metric


def test_a_profile_keeps_single_scores_beside_consistency() -> None:
    items = [item(n, probe=str(n // 2)) for n in range(6)] + [item(6, skill="t")]
    found = evaluation(items, [1, 1, 1, 0, 0, 0, 1])
    views = Views(probes=find_probes(items, "field", 0.9, ItemSpace(items, "not asked")))
    profile = as_profile(found, "expert", "base", suite="s", suite_fingerprint="f", views=views)
    own, other = profile.skills["s"].consistency, profile.skills["s"].base_consistency
    assert own is not None
    assert other is not None
    assert profile.skills["s"].expert.score == pytest.approx(0.5)
    assert own.all_right.score == pytest.approx(1 / 3)
    assert own.agreement.score == pytest.approx(2 / 3)
    assert (other.all_right.score, other.agreement.score) == (0, 1), "a base that is always wrong agrees with itself"
    assert profile.skills["t"].consistency is None


# ── the field in a suite ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_suite_carries_probes(tmp_path_factory: pytest.TempPathFactory) -> None:
    from xpert.data import read_suite

    folder = tmp_path_factory.mktemp("suites")

    def written(*probes: str) -> str:
        path = folder / f"s{len(list(folder.iterdir()))}.jsonl"
        rows = (f'{{"prompt": "p{n}", "answers": ["a"]{probe}}}\n' for n, probe in enumerate(probes))
        path.write_text("".join(rows))
        return str(path)

    plain = read_suite(written("", ', "probe": null', ', "probe": " "'))
    assert [one.probe for one in plain] == [None, None, None]
    named = read_suite(written(', "probe": "x "', ', "probe": 7', ""))
    assert [one.probe for one in named] == ["x", "7", None]
    assert plain.fingerprint == read_suite(written("", "", "")).fingerprint != named.fingerprint
    for wrong in ("true", "1.5", "[1]"):
        with pytest.raises(BadInput, match=r"row 2 has a probe that is no text\. Write"):
            read_suite(written("", f', "probe": {wrong}'))
