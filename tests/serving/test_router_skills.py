"""Router skills: experts by what they got right on a prompt's keywords."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from xpert import plugins
from xpert.embedding import normalise
from xpert.errors import BadInput, NotFound
from xpert.experts.prototypes import FixedSpace
from xpert.experts.routers._keyword_votes import KeywordVotes
from xpert.experts.routers._prompt_keywords import PromptKeywords, stem
from xpert.judges import Judge, Question
from xpert.protocols import Floats, RoutableExpert, Route, RouteRequest
from xpert.records import Message

Votes = dict[str, tuple[float, float]]


def expert(key: str, votes: Votes | None = None, **known: Any) -> RoutableExpert:
    return RoutableExpert(key, known.pop("exemplars", ()), keyword_votes=votes or {}, **known)


ALGEBRA = expert("x/algebra", {"algebra": (20, 0), "rivers": (0, 20), "equation": (8, 2)})
RIVERS = expert("x/rivers", {"algebra": (4, 16), "rivers": (19, 1), "equation": (2, 8)})
ALL_ROUND = expert("x/round", {"algebra": (12, 8), "rivers": (12, 8), "equation": (6, 4)})
THREE = [ALGEBRA, RIVERS, ALL_ROUND]


def opened(experts: Sequence[RoutableExpert], seed: int = 0, **params: Any) -> Any:
    kind = plugins.load("router", "skills")
    router = kind(kind.Options.from_mapping(params), seed=seed)
    router.prepare(experts)
    return router


def ask(text: str, id: str = "1") -> RouteRequest:
    return RouteRequest(id, (Message("user", text),))


def one(router: Any, text: str, id: str = "1") -> Route:
    return router.route([ask(text, id)])[0]  # type: ignore[no-any-return]


# ── whom it recruits ─────────────────────────────────────────────────────────────────────────────────────────────


def test_an_expert_right_on_all_algebra_is_recruited_for_algebra() -> None:
    route = one(opened(THREE, k=1), "Solve this with some algebra.")
    assert route.experts == (("x/algebra", 1.0),)
    assert one(opened(THREE, k=1), "Name two rivers of France").experts == (("x/rivers", 1.0),)


def test_weights_are_local_times_global() -> None:
    route = one(opened(THREE), "an equation of algebra")
    overall = np.array([(28 - 22) / 55, (25 - 25) / 55, (30 - 20) / 55])  # algebra, rivers, round
    shared = (overall - overall.min() + 1) ** 2
    local = np.array([20 / 25 + 6 / 15, -12 / 25 - 6 / 15, 4 / 25 + 2 / 15])
    expected = np.maximum(local, 0) * shared / shared.max()
    assert {c.expert: c.score for c in route.candidates} == pytest.approx(
        dict(zip(("x/algebra", "x/rivers", "x/round"), expected, strict=True))
    )
    # x/rivers was mostly wrong on both keywords: it is not recruited although k is 3.
    assert dict(route.experts) == pytest.approx(
        {"x/algebra": expected[0] / expected.sum(), "x/round": expected[2] / expected.sum()}
    )


def test_tau_says_how_much_the_overall_standing_counts() -> None:
    scores = [one(opened(THREE, tau=tau), "algebra").candidates for tau in (0.25, 0.5, 1e6)]
    ratio = [{c.expert: c.score for c in found} for found in scores]
    ratios = [each["x/round"] / each["x/algebra"] for each in ratio]
    assert ratios[0] > ratios[1] > ratios[2] and ratios[2] == pytest.approx((4 / 25) / (20 / 25), rel=1e-4)


def test_few_items_say_little() -> None:
    few, many = expert("x/few", {"algebra": (2, 0)}), expert("x/many", {"algebra": (36, 4)})
    assert one(opened([few, many], k=1), "algebra").experts == (("x/many", 1.0),)


def test_the_reason_names_keywords_votes_and_both_terms() -> None:
    reason = one(opened(THREE, k=1), "Two equations").reason
    assert "keywords 'equation' (from 'equations')" in reason
    assert "x/algebra equation +0.40 (8 right, 2 wrong), local 0.40, global 0.88" in reason


# ── where nothing speaks for an expert ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Who painted this?", "no keyword of the profiles in the prompt"),
        ("", "no keyword of the profiles in the prompt"),
        ("Play chess", "keywords 'chess'; no expert is better than another on them"),
    ],
)
def test_an_unknown_skill_falls_back(text: str, said: str) -> None:
    experts = [*(replace(one, keyword_votes={**one.keyword_votes, "chess": (1, 9)}) for one in THREE)]
    route = one(opened(experts, fallback="base"), text)
    assert route.experts == () and said in route.reason and route.reason.endswith("the base answers")
    assert {candidate.score for candidate in route.candidates} == {0.0}
    best = one(opened(experts, k=2), text)
    assert [key for key, _ in best.experts] == ["x/round", "x/algebra"]
    assert f"{said}; the best over all" in best.reason
    assert best.candidates[0].score == 0 and all(c.score <= 0 for c in best.candidates)


def test_of_no_experts_the_base_answers() -> None:
    route = one(opened([]), "algebra")
    assert not route.experts and not route.candidates and "has no experts" in route.reason


# ── drawing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_draws_follow_the_weights() -> None:
    router = opened(THREE, draw="sample", k=1)
    routes = router.route([ask("algebra", str(i)) for i in range(3000)])
    score = {c.expert: c.score for c in routes[0].candidates}
    drawn = Counter(route.experts[0][0] for route in routes)
    assert set(drawn) == {"x/algebra", "x/round"}
    expected = score["x/round"] / (score["x/round"] + score["x/algebra"])
    assert drawn["x/round"] / 3000 == pytest.approx(expected, abs=0.03)


def test_with_replacement_an_expert_may_be_drawn_again() -> None:
    router = opened(THREE, draw="sample", replacement="true", k=3)
    routes = router.route([ask("algebra", str(i)) for i in range(300)])
    shares = {round(weight * 3, 9) for route in routes for _, weight in route.experts}
    assert shares == {1.0, 2.0, 3.0}
    assert any("drawn 3 of 3 times" in route.reason for route in routes)
    assert all(sum(weight for _, weight in route.experts) == pytest.approx(1) for route in routes)


@given(st.integers(0, 2**31), st.text(max_size=5), st.sampled_from(["top", "sample"]))
def test_a_draw_depends_on_seed_and_id_alone(seed: int, id: str, draw: str) -> None:
    requests = [ask("rivers and algebra", id), ask("algebra", f"{id}2")]
    router, again = (opened(experts, seed, draw=draw, k=2) for experts in (THREE, THREE[::-1]))
    assert router.route(requests) == again.route(requests[::-1])[::-1]


def test_another_seed_draws_otherwise() -> None:
    requests = [ask("rivers algebra", str(i)) for i in range(40)]
    routes = [opened(THREE, seed, draw="sample", k=1).route(requests) for seed in (0, 1)]
    assert [r.experts for r in routes[0]] != [r.experts for r in routes[1]]


# ── keywords of a prompt ─────────────────────────────────────────────────────────────────────────────────────────


def test_words_pairs_and_plurals_are_found_the_most_telling_first() -> None:
    items = {"division": 40.0, "long division": 9.0, "city": 12.0, "sum of squares": 7.0, "c++": 5.0, "glass": 3.0}
    find = PromptKeywords(items)
    found = find.in_text("Do a long division for all cities, then the sums of the squares.")
    assert [(k.name, k.said) for k in found] == [
        ("sum of squares", "sums squares"),
        ("long division", "long division"),
        ("city", "cities"),
        ("division", "division"),
    ]
    assert [str(k) for k in find.like(["c++", "Squares", "cities"])] == ["'c++'", "'city' (from 'cities')"]


def test_the_exact_spelling_comes_first() -> None:
    find = PromptKeywords({"fraction": 5.0, "fractions": 50.0})
    assert [k.name for k in find.in_text("add a fraction")] == ["fraction"]
    assert [k.name for k in find.in_text("add fractions")] == ["fractions"]


def test_no_more_than_five() -> None:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    found = PromptKeywords({word: float(n) for n, word in enumerate(words)}).in_text(" ".join(words))
    assert [k.name for k in found] == words[:5]


@pytest.mark.parametrize(
    ("word", "expected"),
    [("cities", "city"), ("sums", "sum"), ("glass", "glass"), ("bus", "bus"), ("notes", "note"), ("gas", "gas")],
)
def test_stems(word: str, expected: str) -> None:
    assert stem(word) == expected


class Letters:
    """Counts of the letters a to f."""

    def raw(self, texts: Sequence[str]) -> Floats:
        return normalise(np.array([[text.count(letter) for letter in "abcdef"] for text in texts], np.float32))


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    space = FixedSpace("letters", Letters())  # type: ignore[arg-type]  # raw is all that is used of it
    monkeypatch.setattr("xpert.experts.prototypes.open_space", lambda *_, **__: space)


@pytest.mark.usefixtures("letters")
def test_keywords_nearest_to_the_prompt_by_an_embedder() -> None:
    experts = [expert("x/a", {"aab": (9, 1)}), expert("x/e", {"eef": (9, 1)})]
    router = opened(experts, keywords="embed", threshold=0.9, fallback="base")
    route = one(router, "aab aab e")
    assert route.experts == (("x/a", 1.0),) and "keywords 'aab' at cosine 0.98" in route.reason
    assert one(router, "cccc").experts == ()


class Named:
    """Names the same keywords for every prompt in all samples but the last."""

    identity = "named"

    def __init__(self, *replies: str) -> None:
        self.replies, self.asked = replies, 0

    def answers(self, questions: Sequence[Question]) -> Any:
        for index, question in enumerate(questions):
            self.asked += 1
            yield index, self.replies[question.sample % len(self.replies)]


@pytest.mark.usefixtures("letters")
def test_keywords_that_a_model_names(monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = Named("eefe, Aab", "eefe, aab", "something")
    monkeypatch.setattr("xpert.judges.open_judge", lambda spec, **_: Judge(answerer))
    experts = [expert("x/a", {"aab": (9, 1)}), expert("x/e", {"eef": (9, 1)})]
    router = opened(experts, keywords="model", model="any", embedder="minilm", threshold=0.9)
    route = one(router, "what is this?")
    assert "'eef' (from 'eefe') at cosine 0.99, 'aab'" in route.reason
    assert {key for key, _ in route.experts} == {"x/a", "x/e"}
    without = opened(experts, keywords="model", model="any")
    assert one(without, "what is this?").experts == (("x/a", 1.0),)
    assert answerer.asked == 10 and one(router, "what is this?") == route and answerer.asked == 10


# ── experts without a profile by keywords ────────────────────────────────────────────────────────────────────────


def test_an_unprofiled_expert_is_routed_to_by_what_it_was_made_for() -> None:
    experts = [
        *THREE,
        expert("x/skill", skills=("long_division",)),
        expert("x/texts", exemplars=("shout this word", "shout that word", "shout it", "shout")),
        expert("x/known", skills=("poems",), skill_scores={"poems": 0.8}),
    ]
    router = opened(experts, k=1)
    assert one(router, "do long division").experts == (("x/skill", 1.0),)
    assert one(router, "Shout it!").experts == (("x/texts", 1.0),)
    assert "poems +0.30 (4 right, 1 wrong assumed)" in one(router, "Write poems").reason
    assert one(router, "word").experts == (("x/texts", 1.0),)  # of two exemplars, as they are four


def test_what_is_assumed_weighs_less_than_what_was_measured() -> None:
    votes = KeywordVotes([ALGEBRA, expert("x/b", skills=("algebra",), exemplars=("algebra one",) * 50)])
    assert votes.of_expert[1]["algebra"].value == 0.5 < votes.of_expert[0]["algebra"].value
    assert votes.standing[1] == 0 and votes.items["algebra"] == 20
    assert votes.local(["algebra", "rivers"]).tolist() == pytest.approx([0.0, 0.5])


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"replacement": "true"}, BadInput, "replacement=true says how experts are drawn"),
        ({"embedder": "minilm"}, BadInput, "keywords=terms uses no embedder"),
        ({"model": "m"}, BadInput, "keywords=terms asks no model"),
        ({"keywords": "embed", "model": "m"}, BadInput, "keywords=embed asks no model"),
        ({"keywords": "model"}, BadInput, "keywords=model needs a model"),
        ({"keywords": "embed", "embedder": "lsa"}, BadInput, "is fitted on the texts it embeds"),
        ({"keywords": "embed", "embedder": "lm"}, BadInput, "lm needs a base model"),
        ({"keywords": "words"}, NotFound, "unknown keywords 'words'"),
        ({"fallback": "globe"}, NotFound, "Did you mean 'global'"),
        ({"k": "0"}, BadInput, "k is 0; the least is 1"),
        ({"tau": "0"}, BadInput, "tau is 0"),
        ({"keywords": "model", "model": "http://here/v1"}, BadInput, "names no model"),
    ],
)
def test_mistakes(params: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        opened(THREE, **params)
    assert message in f"{caught.value} {getattr(caught.value, 'hint', '')}"


def test_an_expert_that_nothing_is_known_of() -> None:
    with pytest.raises(BadInput, match="'x/nothing' has no keyword votes, skills or exemplars") as error:
        opened([ALGEBRA, expert("x/nothing", exemplars=(" ",))])
    assert "xpert profile" in str(error.value.hint)


def test_from_the_command_line(
    mixture_file: Callable[..., Any], write_jsonl: Callable[..., Path], xpert: Callable[..., Result]
) -> None:
    prompts = write_jsonl("prompts.jsonl", [{"instruction": "Some casing, please."}, {"instruction": "Who?"}])
    result = xpert("route", mixture_file("skills", fallback="base"), "--prompts", prompts, "--quiet")
    assert result.exit_code == 0, result.stderr
    routes = [json.loads(line) for line in result.stdout.splitlines()]
    assert routes[0]["experts"][0]["expert"] == "casing" and "(5 right, 0 wrong assumed)" in routes[0]["reason"]
    assert routes[1]["experts"] == []


def test_where_all_are_mostly_wrong_the_least_wrong_is_recruited() -> None:
    """As with small models, whose votes are below zero everywhere."""
    votes = {"x/bad": (1, 9), "x/worse": (0, 10), "x/least": (4, 6)}
    route = one(opened([expert(key, {"chess": vote}) for key, vote in votes.items()], k=1), "Play chess")
    assert [key for key, _ in route.experts] == ["x/least"]
    assert [candidate.expert for candidate in route.candidates] == ["x/least", "x/bad", "x/worse"]
