"""Planted tasks are found, ranked and told of; what is served, or asked by few, is not."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpert.embedding import normalise
from xpert.errors import BadInput
from xpert.experts.gaps.finding import find_gaps
from xpert.experts.gaps.grouping import central_first, embed_together, group
from xpert.experts.gaps.options import GapOptions
from xpert.experts.gaps.pilots import find_pilots
from xpert.experts.server.request_log import RequestRecord
from xpert.protocols import Candidate, RoutableExpert
from xpert.records import Message
from xpert.registry.skills.taxonomy import Skill, Taxonomy

WORDS = {
    "knitting": "yarn needles scarf wool stitches gauge cable sock lace ribbing skein mohair jumper shawl purl crochet",
    "chess": "chess knight bishop rook queen pawn castling checkmate gambit opening endgame fork pin stalemate tempo",
}
TWO = GapOptions(clusters="2", near=1.0)
"""As many clusters as tasks, and no two of the planted prompts are one."""
Planted = Callable[..., list[RequestRecord]]


Tasks = Callable[[Iterable[str]], Counter[str]]


def test_planted_tasks_are_found_and_ranked_by_traffic_times_lack_of_fit(planted: Planted, tasks_of: Tasks) -> None:
    records = planted()
    found = find_gaps(records, TWO)
    knitting, chess = found.gaps
    assert tasks_of(prompt.text for prompt in knitting.chosen) == {"knitting": len(knitting.chosen)}
    assert tasks_of(prompt.text for prompt in chess.chosen) == {"chess": len(chess.chosen)}
    assert 20 <= len(knitting.chosen) <= 30 and 8 <= len(chess.chosen) <= 12
    assert (knitting.prompts, knitting.requests) == (30, 30)
    assert knitting.share == 30 / 82
    # All that fell back score alike, under the 40 that were served.
    assert knitting.lack == pytest.approx(40 / 82)
    assert knitting.priority == pytest.approx(30 / 82 * 40 / 82)
    assert {"knit", "rows"} & set(knitting.terms) and {"strongest", "white"} & set(chess.terms)
    assert set(knitting.slug.split("-")) <= set(" ".join(knitting.terms).split())
    assert knitting.nearest_expert is not None
    assert knitting.nearest_expert[0] == "casing" and knitting.nearest_expert[1] == pytest.approx(0.2)
    assert (found.unserved, found.prompts, found.withheld) == (42, 42, 0)


def test_clusters_by_themselves_hold_one_task_each(planted: Planted, tasks_of: Tasks) -> None:
    found = find_gaps(planted())
    assert 2 <= len(found.gaps) <= 8
    for gap in found.gaps:
        assert len(tasks_of(prompt.text for prompt in gap.chosen)) == 1
    assert [gap.priority for gap in found.gaps] == sorted((gap.priority for gap in found.gaps), reverse=True)
    assert len({gap.slug for gap in found.gaps}) == len(found.gaps)


@pytest.mark.parametrize("below", [None, 0.5, 0.96])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_served_is_in_no_gap(planted: Planted, seed: int, below: float | None) -> None:
    records = planted(seed=seed, casing=12)
    found = find_gaps(records, GapOptions(below=below, min_prompts=1, near=1.0))
    told = {prompt.text for gap in found.gaps for prompt in gap.chosen}
    served = {r.messages[0].content for r in records if r.experts and (below is None or (r.chance or 0) >= below)}
    assert told and not told & served
    assert sum(gap.requests for gap in found.gaps) == len(records) - len(served)


def test_traffic_decides_between_equal_fits_and_fit_between_equal_traffic(planted: Planted, tasks_of: Tasks) -> None:
    records = planted(knitting=12, chess=12)
    chess = [record for record in records if tasks_of([record.messages[0].content])["chess"]]
    again = [dataclasses.replace(r, id=f"{r.id}-{n}", time=r.time + n) for r in chess for n in range(3)]
    first = find_gaps(sorted([*records, *again], key=lambda r: r.time), TWO).gaps[0]
    assert first.chosen[0].text.startswith("Which move") and (first.prompts, first.requests) == (12, 48)
    worse = [
        dataclasses.replace(r, candidates=(Candidate("casing", 0.05),))
        if tasks_of([r.messages[0].content])["knitting"]
        else r
        for r in records
    ]
    worst = find_gaps(worse, TWO).gaps[0]
    assert worst.chosen[0].text.startswith("Give me the rows") and worst.lack > first.lack


def test_a_chance_says_how_badly_a_prompt_fits(planted: Planted) -> None:
    found = find_gaps(planted(casing=0, chance=0.25), TWO)
    assert [gap.lack for gap in found.gaps] == [0.75, 0.75]
    assert [gap.chance for gap in found.gaps] == [0.25, 0.25]


def test_clusters_of_few_prompts_are_withheld(planted: Planted) -> None:
    found = find_gaps(planted(knitting=0, chess=4), GapOptions(near=1.0))
    assert (found.gaps, found.unserved, found.withheld) == ((), 4, 4)
    for clusters in ("3", "8", "14"):
        found = find_gaps(planted(), dataclasses.replace(TWO, clusters=clusters))
        assert all(gap.prompts >= 5 for gap in found.gaps)
        assert sum(gap.requests for gap in found.gaps) + found.withheld == found.unserved == 42
    assert found.withheld
    repeated = planted(knitting=0, chess=2)
    often = [dataclasses.replace(r, id=f"{r.id}-{n}") for r in repeated for n in range(20)]
    assert find_gaps(often).gaps == ()  # two prompts asked twenty times each are two prompts


def test_nothing_unserved_is_no_gap(planted: Planted) -> None:
    found = find_gaps(planted(knitting=0, chess=0))
    assert (found.gaps, found.unserved, found.prompts, found.withheld) == ((), 0, 0, 0)


def test_the_order_of_what_came_at_once_makes_no_difference_to_the_gaps(planted: Planted) -> None:
    one, two = (find_gaps(planted(seed=seed), TWO).gaps for seed in (1, 2))
    assert [(gap.slug, gap.prompts) for gap in one] == [(gap.slug, gap.prompts) for gap in two]


def test_the_taxonomy_names_the_nearest_skill(planted: Planted) -> None:
    crafts = Skill("handicraft", words=tuple(WORDS["knitting"].split()))
    known = Taxonomy.of([crafts, Skill("board-games", words=tuple(WORDS["chess"].split()))])
    knitting, chess = find_gaps(planted(), TWO, taxonomy=known).gaps
    assert knitting.skill == ("handicraft", 1.0) and chess.skill == ("board-games", 1.0)
    assert knitting.label == "handicraft"
    other = Taxonomy.of([Skill("cooking", words=("stew",))])
    assert find_gaps(planted(), TWO, taxonomy=other).gaps[0].skill is None


def test_without_candidates_the_nearest_expert_is_told_by_its_exemplars(planted: Planted) -> None:
    experts = [
        RoutableExpert(key, tuple(texts), (), {})
        for key, texts in (
            ("wool", ["knit a woollen scarf", "yarn for socks"]),
            ("cook", ["boil an egg", "bake bread"]),
        )
    ]
    gaps = find_gaps(planted(candidates=()), TWO, experts=experts).gaps
    assert gaps[0].nearest_expert is not None and gaps[0].nearest_expert[0] == "wool"
    assert find_gaps(planted(candidates=()), TWO).gaps[0].nearest_expert is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": "many"}, "clusters is 'many'"),
        ({"clusters": "50"}, "clusters is 50"),
        ({"embedder": "lm"}, "needs a base model"),
        ({"embedder": "lsaa"}, "unknown embedder 'lsaa'"),
    ],
)
def test_options_that_do_not_fit(planted: Planted, options: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        find_gaps(planted(), GapOptions(**options))


# ── clusters and those who stand for them ────────────────────────────────────────────────────────────────────────


@given(n=st.integers(1, 30), count=st.integers(1, 40), seed=st.integers(0, 9))
def test_those_that_stand_for_a_cluster_begin_with_its_centre_and_are_different(n: int, count: int, seed: int) -> None:
    rows = normalise(np.random.default_rng(seed).normal(size=(n, 4)))
    centroid = normalise(rows.mean(axis=0, keepdims=True))[0]
    chosen = central_first(rows, centroid, count)
    central = np.round(rows @ centroid, 6)
    standing = [row for row in range(n) if central[row] >= central.mean() - central.std() - 1e-6]
    assert set(chosen) <= set(standing)
    assert len(chosen) == len(set(chosen)) == min(len(standing), count)
    assert central[chosen[0]] == pytest.approx(central.max(), abs=1e-5)
    slow = [chosen[0]]
    while len(slow) < len(chosen):
        left = [row for row in standing if row not in slow]
        worth = {
            row: 0.6 * round(float(rows[row] @ centroid), 6)
            - 0.4 * max(0.0, *(round(float(rows[row] @ rows[other]), 6) for other in slow))
            for row in left
        }
        best = max(worth.values())
        assert worth[chosen[len(slow)]] == pytest.approx(best, abs=1e-4)
        slow.append(chosen[len(slow)])


def test_few_prompts_are_one_cluster() -> None:
    texts = ["knit a scarf", "play chess", "boil an egg"]
    assert len(group(texts, embed_together(texts, "lsa"), least=2).terms) == 1


# ── pilots ───────────────────────────────────────────────────────────────────────────────────────────────────────


def served(
    text: str, number: int, *, expert: str = "casing", chance: float | None = 0.9, **given: object
) -> RequestRecord:
    plain = RequestRecord(
        id=f"r{number}",
        time=float(number),
        mixture="three",
        fingerprint="one",
        model="three",
        messages=(Message("user", text),),
        experts=((expert, 1.0),),
        candidates=(Candidate(expert, 0.5),),
        chance=chance,
    )
    return dataclasses.replace(plain, **given)  # type: ignore[arg-type]


CASING = RoutableExpert(
    "casing",
    ("Write the word tree in capitals.", "Write the word house in capitals.", "Shout the word loudly."),
    ("casing",),
    {},
    exemplar_skills=("casing", "casing", "shouting"),
)


def test_pilots_are_served_well_and_far_from_the_exemplars() -> None:
    records = [
        served("Write the word TREE in capitals", 1),  # an exemplar already
        served("Uppercase: meadow river", 2),
        served("Uppercase: meadow river!", 3),
        served("Make every letter of bridge a big one", 4),
        served("Translate the bridge", 5, chance=0.5),
        served("Paint the bridge", 6, chance=None),
        served("Spell bridge backwards", 7, expert="reversal"),
        served("Cross the bridge", 8, finished="error"),
        served("Burn the bridge", 9, routed=False),
    ]
    found = find_pilots(records, [CASING])
    assert {pilot.prompt.text for pilot in found["casing"]} == {
        "Uppercase: meadow river",
        "Make every letter of bridge a big one",
    }
    cosines = [pilot.cosine for pilot in found["casing"]]
    assert cosines == sorted(cosines) and cosines[-1] < 0.8
    assert all(pilot.skill in ("casing", "shouting") for pilot in found["casing"])
    assert len(find_pilots(records, [CASING], GapOptions(pilots=1))["casing"]) == 1
    assert find_pilots(records, [CASING], GapOptions(pilots=0)) == {}
    assert find_pilots(records, [CASING], GapOptions(pilot_chance=0.95)) == {}
    assert find_pilots(records, [dataclasses.replace(CASING, exemplars=(), exemplar_skills=())]) == {}
