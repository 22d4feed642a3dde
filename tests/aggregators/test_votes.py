"""Which answer a reply gives, and who wins a vote."""

from __future__ import annotations

import pytest

from tests.aggregators.scripted import ScriptedEngine, ask, made, question, routable
from xpert.errors import BadInput, NotFound
from xpert.experts.aggregators._answers import lettered_choices, reader
from xpert.protocols import Sampling, Verdict

LETTERED = "What is the capital of Italy?\n\nA. Paris\nB) Rome\n(C) Oslo\n\nAnswer with a letter."


def said(**replies: str) -> ScriptedEngine:
    """Experts that always say the same."""
    return ScriptedEngine(lambda experts, prompt, sampling: replies[experts])


@pytest.mark.parametrize(
    ("by", "text", "answer"),
    [
        ("whole", " Rome,  of\ncourse! ", "rome, of course"),
        ("whole", "  \n ", ""),
        ("last-line", "I think.\nSo: ROME.\n\n", "so: rome"),
        ("number", "3 and 4 make 1,007.50 in all", "1007.5"),
        ("number", "no idea", ""),
        ("choice", "B", "B"),
        ("choice", "rome", "B"),
        ("choice", "(c)", "C"),
        ("choice", "Let us think.\nThe answer is B.", "B"),
        ("choice", "Let us think. Paris?\nNo: it must be Rome.", "B"),
        ("choice", "either Paris or Rome", ""),
        ("choice", "I do not know", ""),
        ("choice", "D", ""),
    ],
)
def test_the_answer_in_a_reply(by: str, text: str, answer: str) -> None:
    assert reader(by, question(LETTERED), [text])(text) == answer


@pytest.mark.parametrize(
    ("one", "texts", "by"),
    [
        (question(LETTERED), ["Rome"], "choice"),
        (question("Which?", choices=("x", "y")), ["x"], "choice"),
        (question(), ["It is 4.", "2 and 2 make\n4"], "number"),
        (question(), ["It costs 4 euros", "$5."], "number"),
        (question(), ["Napoleon lost in 1815 at Waterloo in Belgium", "1815"], "whole"),
        (question(), ["four", "five"], "whole"),
        (question(), ["I add.\nfour", "four"], "last-line"),
        (question(), ["", "four"], "whole"),
    ],
)
def test_how_answers_are_read_by_themselves(one: object, texts: list[str], by: str) -> None:
    assert reader("auto", one, texts).by == by  # type: ignore[arg-type]  # a Question, whatever the table says


def test_options_are_the_last_list_of_lines() -> None:
    assert lettered_choices(LETTERED) == ("Paris", "Rome", "Oslo")
    assert lettered_choices(f"A. one\nB. two\n\n{LETTERED}") == ("Paris", "Rome", "Oslo")
    assert lettered_choices("A. one thing alone") == ()
    assert lettered_choices("B. two\nC. three") == ()
    assert lettered_choices("Vitamin A. and so on: B. too") == ()


def test_a_majority_wins_in_the_words_of_its_heaviest_expert() -> None:
    verdict = ask(made("majority"), question(), said(a="Five", b="four!", c="Four"))
    assert verdict.text == "four!"
    assert verdict.experts == (("b", 0.5), ("c", 0.5))
    assert verdict.reason == "2 of 3 replies agree, with 67% of the votes"
    assert [vote["answer"] for vote in verdict.log["votes"]] == ["five", "four", "four"]


def test_a_tie_goes_to_the_heaviest_expert() -> None:
    verdict = ask(made("majority"), question(), said(a="one", b="two", c="three"))
    assert verdict.text == "one" and verdict.experts == (("a", 1.0),)
    even = question(experts=(("c", 0.5), ("b", 0.5)))
    assert ask(made("majority"), even, said(c="three", b="two")).text == "two"


def test_replies_without_an_answer_do_not_vote() -> None:
    verdict = ask(made("majority", by="number"), question(), said(a="who knows", b="no idea", c="it is 4"))
    assert verdict.text == "it is 4" and verdict.log["share"] == 1.0
    nobody = ask(made("majority", by="number"), question(), said(a="who knows", b="no idea", c="none"))
    assert nobody.text == "who knows"


def test_one_expert_and_none() -> None:
    alone = ask(made("majority"), question(experts=(("b", 1.0),)), said(b="four"))
    assert alone.text == "four" and alone.experts == (("b", 1.0),) and alone.reason == "the only reply"
    base = ask(made("majority"), question(experts=()), said(base="four"))
    assert base.text == "four" and base.experts == ()


# ── weighted ─────────────────────────────────────────────────────────────────────────────────────────────────────


def profiled(**scores: dict[str, float]) -> list[object]:
    return [routable(key, skill_scores=one) for key, one in scores.items()]


def weighted(experts: list[object], text: str = "adds numbers", **params: object) -> Verdict:
    aggregator = made("weighted", experts=experts, **params)  # type: ignore[arg-type]  # routable experts
    return ask(aggregator, question(text), said(a="one", b="two", c="two"))


def test_a_vote_counts_as_the_profile_says_of_the_nearest_skill() -> None:
    experts = profiled(a={"sums": 0.9, "casing": 0.1}, b={"sums": 0.3, "casing": 0.6}, c={"sums": 0.4, "casing": 0.6})
    sums = weighted(experts)
    assert sums.text == "one" and sums.log["weighed_by"] == "their scores on sums"
    assert sums.log["weights"] == {"a": 0.9, "b": 0.3, "c": 0.4}
    casing = weighted(experts, "writes words in capitals")
    assert casing.text == "two" and casing.log["weighed_by"] == "their scores on casing"
    assert dict(casing.experts) == pytest.approx({"b": 0.5, "c": 0.5})


def test_a_question_like_no_exemplar_takes_the_means() -> None:
    experts = profiled(a={"sums": 0.9, "casing": 0.7}, b={"sums": 0.3, "casing": 0.1}, c={"sums": 0.4, "casing": 0.0})
    verdict = weighted(experts, "xyzzy qwert")
    assert verdict.text == "one" and verdict.log["weighed_by"] == "their mean scores"
    assert verdict.log["weights"] == {"a": 0.8, "b": 0.2, "c": 0.2}
    assert weighted(experts, weight="mean").log["weights"] == verdict.log["weights"]


def test_without_profiles_the_route_weighs() -> None:
    experts = profiled(a={"sums": 0.9}, b={}, c={"sums": 0.1})
    verdict = weighted(experts)
    assert verdict.log["weights"] == {"a": 0.5, "b": 0.3, "c": 0.2}
    assert verdict.log["weighed_by"] == "the route, since b has no profile"
    assert verdict.text == "one", "0.5 against 0.5 is a tie, which the heaviest wins"
    assert weighted(profiled(a={"sums": 0.0}, b={"sums": 0.9}, c={"sums": 0.9}), weight="route").text == "one"


def test_profiles_of_nothing_but_zeros_count_alike() -> None:
    verdict = weighted(profiled(a={"sums": 0.0}, b={"sums": 0.0}, c={"sums": 0.0}))
    assert verdict.text == "two" and verdict.log["weights"] == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_a_power_makes_the_better_count_for_more() -> None:
    experts = profiled(a={"sums": 0.6}, b={"sums": 0.4}, c={"sums": 0.4})
    assert weighted(experts).text == "two"
    assert weighted(experts, power=2).text == "one"


# ── complexity ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_longest_reasoned_samples_vote() -> None:
    answers = iter(["4", "4", "4", "a\nb\nc\n5", "a\nb\n5", "a\nb\nc\nd\n6"])
    samples: list[Sampling] = []

    def script(experts: str, prompt: str, sampling: Sampling) -> str:
        samples.append(sampling)
        assert experts == "a+b+c"
        return next(answers)

    class InOrder(ScriptedEngine):
        def generate(self, requests, *, cancelled=None):  # type: ignore[no-untyped-def]  # as the class it extends
            return super().generate(list(requests)[::-1])

    verdict = ask(made("complexity", samples=6, keep=3), question(), InOrder(script))
    assert verdict.text == "a\nb\nc\n5" and verdict.log["steps"] == [1, 1, 1, 4, 3, 5]
    assert [vote["steps"] for vote in verdict.log["votes"]] == [5, 4, 3]
    assert {sampling.temperature for sampling in samples} == {0.7} and len({s.seed for s in samples}) == 6


@pytest.mark.parametrize(("unit", "steps"), [("lines", 2), ("sentences", 3), ("words", 9)])
def test_what_a_step_is(unit: str, steps: int) -> None:
    from xpert.experts.aggregators.complexity import reasoning_steps

    assert reasoning_steps("First 2.5 pears. Then more!\n\nSo it is 4", unit) == steps
    assert reasoning_steps("", unit) == 0


def test_a_temperature_that_was_asked_for_stays() -> None:
    engine = said(**{"a+b+c": "4"})
    ask(made("complexity", samples=2, keep=1), question(temperature=0.2), engine)
    assert {request.sampling.temperature for request in engine.requests} == {0.2}


@pytest.mark.parametrize(
    ("name", "params", "error", "message"),
    [
        ("majority", {"by": "words"}, NotFound, "unknown by 'words'"),
        ("majority", {"weigh": "true"}, NotFound, "unknown parameter 'weigh'"),
        ("complexity", {"samples": "3"}, BadInput, "keep is 6, and only 3 are sampled"),
        ("complexity", {"temperature": "0"}, BadInput, "temperature is 0"),
        ("expert", {"expert": "d"}, NotFound, "unknown expert 'd'"),
        ("expert", {"expert": "auto"}, BadInput, "has not been chosen for this mixture"),
        ("best-of", {"under": "d"}, NotFound, "unknown expert 'd'"),
        ("cook", {"expert": "auto"}, NotFound, "unknown expert 'auto'"),
        ("cook", {"embedder": "lsaa"}, NotFound, "did you mean 'lsa'"),
        ("weighted", {"power": "-1"}, BadInput, "power is -1"),
        ("b4", {"forms": "9"}, BadInput, "the most is 4"),
        ("b4", {"rule": "codett"}, NotFound, "did you mean 'codet'"),
        ("choice-shuffle", {"orders": "0"}, BadInput, "the least is 1"),
    ],
)
def test_mistakes(name: str, params: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        made(name, **params)
    assert message in str(raised.value).replace("Did", "did")
