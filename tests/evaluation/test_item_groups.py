"""Clusters and keywords of a suite's items: who is in which group, by what name, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpert.cluster_folder import cluster_pool, embed_like, read_clusters
from xpert.errors import BadInput, NotFound
from xpert.experts.item_groups import ItemSpace, by_cluster, by_names, cluster_names, of_keywords
from xpert.experts.model_keywords import SAMPLES, keyword_questions, keywords_by_model, keywords_in
from xpert.experts.term_keywords import keywords_by_terms, telling_terms_of_items
from xpert.features import FeatureOptions
from xpert.judges import Judge, Question
from xpert.pool import pool_from_rows
from xpert.records import Row, SuiteItem


@pytest.fixture
def items(rows: list[Row]) -> list[SuiteItem]:
    return [SuiteItem(row, (row.response,), "exact", row.skill or "all") for row in rows[:60]]


# ── clusters ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_clusters_part_the_items_and_find_their_kinds(items: list[SuiteItem]) -> None:
    found = by_cluster("5", ItemSpace(items, "lsa"))
    assert sorted(row for rows in found.members.values() for row in rows) == list(range(len(items)))
    pure = sum(max(_counts([items[row].skill for row in rows])) for rows in found.members.values())
    assert pure / len(items) > 0.9
    assert any("capitals" in name for name in found.members)
    assert found.how["clusters"] == 5
    assert found.how["embedder"].startswith("lsa/")
    assert by_cluster("5", ItemSpace(items, "lsa")) == found
    assert by_cluster("none", ItemSpace(items, "lsa")).members == {}


def _counts(values: list[str]) -> list[int]:
    return [values.count(value) for value in set(values)]


@pytest.mark.parametrize(("count", "clusters"), [(60, 5), (20, 2), (19, 0), (3, 0)])
def test_auto_makes_no_small_clusters(items: list[SuiteItem], count: int, clusters: int) -> None:
    assert len(by_cluster("auto", ItemSpace(items[:count], "lsa")).members) == clusters


def test_auto_takes_no_more_than_there_are_different_prompts(items: list[SuiteItem]) -> None:
    assert len(by_cluster("auto", ItemSpace([items[0]] * 60, "lsa")).members) == 1


def test_a_folder_of_clusters_gives_the_nearest_centroid(
    rows: list[Row], items: list[SuiteItem], tmp_path: Path
) -> None:
    folder = cluster_pool(pool_from_rows(rows), out=tmp_path / "c", features=FeatureOptions(clusters="6"))
    found = by_cluster(str(tmp_path / "c"), ItemSpace(items, "minilm-is-not-asked"))
    embedded = embed_like(folder, [item.row for item in items])
    names = cluster_names(folder.clusters.terms)
    for row, vector in enumerate(embedded):  # the plain version
        nearest = max(range(6), key=lambda number: float(vector @ folder.clusters.centroids[number]))
        assert row in found.members[names[nearest]]
    # What stood in the pool is where the pool's clusters put it.
    labels = np.array([next(n for n, name in enumerate(names) if row in found.members[name]) for row in range(60)])
    assert (labels == folder.clusters.labels[:60]).mean() > 0.95
    assert found.how["pool"] == folder.manifest["inputs"]["pool"]


def test_what_fits_no_centroid_is_in_no_cluster(rows: list[Row], tmp_path: Path) -> None:
    cluster_pool(pool_from_rows(rows), out=tmp_path / "c", features=FeatureOptions(clusters="6"))
    strange = SuiteItem(Row("x", (), "ζ", None, {}), ("ζ",), "exact", "all")
    found = by_cluster(str(tmp_path / "c"), ItemSpace([strange], "lsa"))
    assert found.members == {}
    assert found.how["items_without"] == 1


def test_a_folder_whose_embedder_is_forgotten_or_another(
    rows: list[Row], items: list[SuiteItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_pool(pool_from_rows(rows), out=tmp_path / "c")
    found = read_clusters(tmp_path / "c")
    monkeypatch.setenv("XPERT_CACHE", str(tmp_path / "another cache"))
    with pytest.raises(NotFound, match="not in the cache"):
        embed_like(found, [items[0].row])
    changed = {**found.manifest, "figures": {**found.manifest["figures"], "embedder": "lsa/0"}}
    with pytest.raises(BadInput, match="by lsa/0, and lsa is lsa/"):
        embed_like(type(found)(found.path, found.clusters, changed), [items[0].row])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("0", "clusters is 0, but the suite has 60 items"),
        ("61", "clusters is 61"),
        ("-3", "clusters is -3"),
        ("nowhere", "not a clusters folder"),
    ],
)
def test_clusters_that_cannot_be(items: list[SuiteItem], setting: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        by_cluster(setting, ItemSpace(items, "lsa"))


def test_too_few_different_prompts(items: list[SuiteItem]) -> None:
    with pytest.raises(BadInput, match="only 2 prompts"):
        by_cluster("3", ItemSpace([items[0], items[1], items[0]], "lsa"))


def test_names_of_clusters_are_told_apart() -> None:
    assert cluster_names([["a", "b", "c", "d"], [], ["a", "b", "c"]]) == ["a, b, c", "cluster 1", "a, b, c (2)"]


# ── groups by name ───────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=5), max_size=20), st.integers(1, 5))
def test_groups_by_name_equal_the_plain_version(names: list[list[str]], least: int) -> None:
    plain = {name: tuple(row for row, own in enumerate(names) if name in own) for name in "abcdef"}
    found = by_names(names, least)
    assert found == {name: rows for name, rows in plain.items() if len(rows) >= least}
    assert [len(rows) for rows in found.values()] == sorted(map(len, found.values()), reverse=True)


# ── telling terms ────────────────────────────────────────────────────────────────────────────────────────────────


def test_telling_terms_tell_the_kinds_apart(items: list[SuiteItem]) -> None:
    prompts = [item.row.prompt for item in items]
    found = keywords_by_terms(prompts, 5)
    assert len(found.members) >= 5
    for name, rows in found.members.items():
        assert len(rows) >= 5
        assert all(word in prompts[row].lower() for row in rows for word in name.split())
        assert len({items[row].skill for row in rows}) == 1 or name == "word"
    assert all(len(terms) <= 5 for terms in telling_terms_of_items(prompts, 5))
    assert found.how["by"] == "telling-terms"


def test_terms_of_the_same_items_are_told_once() -> None:
    prompts = ["zebra stripes forever"] * 6 + ["quiet ocean", "tall mountain", "deep forest", "wide desert"] * 3
    names = list(keywords_by_terms(prompts, 5).members)
    assert len(names) == 1, names


@pytest.mark.parametrize("prompts", [[], ["1 + 1"] * 30, ["the of and"] * 30, ["all the same words"] * 30])
def test_prompts_without_telling_terms_have_no_keywords(prompts: list[str]) -> None:
    assert keywords_by_terms(prompts, 3).members == {}


def test_a_card_holds_the_thousand_largest_keywords() -> None:
    found = of_keywords({f"k{n}": (n, n + 1) for n in range(1005)}, {"by": "x"}, items=1010, smaller=2)
    assert len(found.members) == 1000
    assert found.how == {"by": "x", "smaller_left_out": 7, "items_without": 1010 - 1001}


# ── a model's keywords ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("reply", "names"),
    [
        ("algebra, number theory", ["algebra", "number theory"]),
        ("Keywords: Algebra, algebra; LOGIC.", ["algebra", "logic"]),
        ("**Keywords:** grammar | syntax", ["grammar", "syntax"]),
        ("1. Addition\n2. Subtraction", ["addition", "subtraction"]),
        ("- French\n- vocabulary\n\nThe answer is 42, surely.", ["french", "vocabulary"]),
        ("one, two, three, four, five, six", ["one", "two", "three", "four", "five"]),
        ("12, ?, x, a keyword that is far too long, ok", ["ok"]),
        ("", []),
        ("\n\n", []),
    ],
)
def test_keywords_of_a_reply(reply: str, names: list[str]) -> None:
    assert keywords_in(reply) == names


class Table:
    """Answers each sample of a prompt from a list."""

    identity = "table"

    def __init__(self, answer: Callable[[Question], str]) -> None:
        self.answer = answer
        self.asked: list[Question] = []

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
        for index, question in reversed(list(enumerate(questions))):
            self.asked.append(question)
            yield index, self.answer(question)


def test_keywords_are_those_that_several_samples_name() -> None:
    replies = ["sums, maths", "sums, luck", "logic", "maths, sums", "nothing here"]
    prompts = [f"prompt {n}" for n in range(4)]
    table = Table(lambda question: "" if "prompt 3" in question.text else replies[question.sample])
    found = keywords_by_model(prompts, Judge(table), 2)
    assert found.members == {"maths": (0, 1, 2), "sums": (0, 1, 2)}
    assert (found.how["items_unnamed"], found.how["items_without"]) == (1, 1)
    assert len(table.asked) == 4 * SAMPLES
    assert {(q.temperature, q.sample) for q in table.asked} == {(0.7, sample) for sample in range(SAMPLES)}
    assert keywords_by_model(prompts, Judge(table), 4).members == {}


def test_replies_are_kept_by_model_and_question(tmp_path: Path) -> None:
    first, again, other = (Table(lambda question: "sums, logic") for _ in range(3))
    found = keywords_by_model(["a", "b"], Judge(first, tmp_path), 1)
    assert keywords_by_model(["a", "b"], Judge(again, tmp_path), 1) == found
    assert again.asked == []
    other.identity = "another model"
    keywords_by_model(["a"], Judge(other, tmp_path), 1)
    assert len(other.asked) == SAMPLES


def test_a_long_prompt_is_shown_by_its_ends() -> None:
    [question] = {q.text for q in keyword_questions(["a" * 5000 + " the end"])}
    assert len(question) < 2000
    assert "the end" in question


def test_the_engine_answers_the_same_whatever_the_batch(tiny_base: Path) -> None:
    from xpert.experts.model_keywords import EngineAnswerer
    from xpert.experts.serving import open_engine

    lm, engine = open_engine(str(tiny_base), device="cpu", dtype="float32", max_batch=4)
    answerer = EngineAnswerer(lm, engine)
    questions: list[Any] = [Question(f"name {n}", 0.7, 6, sample) for n in range(3) for sample in range(2)]
    together = dict(answerer.answers(questions))
    assert sorted(together) == list(range(6))
    alone = [dict(answerer.answers([question]))[0] for question in questions]
    assert [together[n] for n in range(6)] == alone
    assert len(set(alone)) > 3, "samples differ"
    assert answerer.identity == f"engine {lm.fingerprint}"
