"""What the members that ask more than once ask, and what they make of it."""

from __future__ import annotations

import pytest

from tests.aggregators.scripted import ScriptedEngine, ask, made, named, question, routable, text_of
from xpert.errors import BadInput
from xpert.experts.aggregators._prompting import cut_text, cut_words, without_thinking
from xpert.protocols import Sampling

OPTIONS = "Capital of Italy?\nA. Paris\nB. Rome\nC. Oslo\nAnswer with a letter."


def prompts(engine: ScriptedEngine) -> list[tuple[str, str]]:
    return [(named(request.experts), text_of(request.prompt_ids)) for request in engine.requests]


# ── expert ───────────────────────────────────────────────────────────────────────────────────────────────────────


def reading(final: str = "Rome") -> ScriptedEngine:
    def script(experts: str, prompt: str, sampling: Sampling) -> str:
        return final if "Reply 1:" in prompt else f"<think>hm, {experts}</think>{experts} says so at some length"

    return ScriptedEngine(script)


def test_the_aggregator_reads_all_replies_and_writes() -> None:
    engine = reading()
    verdict = ask(made("expert", expert="b"), question(), engine)
    assert verdict.text == "Rome" and verdict.reason == "b wrote it from 3 replies"
    assert dict(verdict.experts) == {"a": 0.5, "b": 0.3, "c": 0.2}
    who, prompt = prompts(engine)[-1]
    assert who == "b" and "What is 2 + 2?" in prompt and "think" not in prompt
    assert all(f"{key} says so" in prompt for key in "abc")
    assert {reply["expert"] for reply in verdict.log["replies"]} == set("abc")


def test_the_order_of_replies_is_drawn() -> None:
    def order(seed: int, id: str) -> str:
        log = ask(made("expert", seed=seed), question(id=id), reading()).log
        return "".join(reply["expert"] for reply in log["replies"])

    drawn = [order(0, f"q{n}") for n in range(60)]
    assert {places: drawn.count(places) > 2 for places in drawn} == dict.fromkeys(
        ("abc", "acb", "bac", "bca", "cab", "cba"), True
    )
    assert drawn != [order(1, f"q{n}") for n in range(60)]


def test_replies_that_do_not_fit_are_cut_alike() -> None:
    engine = ScriptedEngine(lambda e, prompt, s: "short" if "Reply 1:" in prompt else f"{e} " + "word " * 60)
    verdict = ask(made("expert"), question(max_tokens=400), engine, context=800)
    assert verdict.text == "short"
    cut = verdict.log["cut_to_characters"]
    assert cut == 150 and f"cut to {cut} characters each" in verdict.reason
    assert len(engine.requests) == 4, "what does not fit is not asked"
    final = engine.requests[-1]
    assert len(final.prompt_ids) + 32 <= 800 and final.sampling.max_tokens == min(400, 800 - len(final.prompt_ids))
    engine = ScriptedEngine(lambda e, prompt, s: "a long reply" if e == "c" else "yes")
    verdict = ask(made("expert"), question(max_tokens=400), engine, context=240)
    assert (verdict.text, verdict.experts) == ("yes", (("a", 0.5), ("b", 0.5)))
    assert verdict.reason.startswith("no replies fit the context behind the question: 2 of 3 replies agree")


# ── choice-shuffle ───────────────────────────────────────────────────────────────────────────────────────────────


def knowing(right: str, form: str = "{letter}") -> ScriptedEngine:
    """Answers with the letter that `right` has in the prompt it sees."""

    def script(experts: str, prompt: str, sampling: Sampling) -> str:
        lines = [line for line in prompt.splitlines() if line.endswith(f". {right}")]
        return form.format(letter=lines[0][0], text=right) if lines else "not shown"

    return ScriptedEngine(script)


@pytest.mark.parametrize(
    ("form", "text"),
    [("{letter}", "B"), ("({letter})", "B"), ("{text}", "Rome"), ("{letter}. {text}", "B. Rome")],
)
def test_letters_are_mapped_back(form: str, text: str) -> None:
    engine = knowing("Rome", form)
    verdict = ask(made("choice-shuffle", orders=6), question(OPTIONS), engine)
    assert verdict.text == text and verdict.reason == "all 6 orders of the options agree"
    shown = {prompt for _, prompt in prompts(engine)}
    assert len(shown) == 6, "six different orders of three"
    assert all(prompt.count("Rome") == 1 and "Answer with a letter." in prompt for prompt in shown)
    assert {who for who, _ in prompts(engine)} == {"a+b+c"}


def test_a_bias_for_a_letter_is_outvoted() -> None:
    """Always the first option: every option gets its share, and none is in the lead for its place."""
    engine = ScriptedEngine(lambda experts, prompt, sampling: "A")
    verdict = ask(made("choice-shuffle", orders=6), question(OPTIONS), engine)
    assert sorted(vote["answer"] for vote in verdict.log["votes"]) == ["A", "A", "B", "B", "C", "C"]


def test_choices_that_are_not_in_the_prompt_are_written_under_it() -> None:
    engine = knowing("Rome")
    verdict = ask(made("choice-shuffle"), question("Capital of Italy?", choices=("Paris", "Rome")), engine)
    assert verdict.text == "Rome" and len(engine.requests) == 2, "two options have two orders"
    assert all("Answer with the letter of one option." in prompt for _, prompt in prompts(engine))


def test_choices_may_be_the_letters_of_the_prompt() -> None:
    engine = knowing("Oslo")
    assert ask(made("choice-shuffle"), question(OPTIONS, choices=("A", "B", "C")), engine).text == "C"


def test_many_options_have_different_orders() -> None:
    texts = tuple(f"town {n}" for n in range(9))
    engine = knowing("town 7")
    verdict = ask(made("choice-shuffle", orders=12), question("Which?", choices=texts), engine)
    assert verdict.text == "town 7" and len({prompt for _, prompt in prompts(engine)}) == 12


def test_a_question_without_options_gets_a_single_answer() -> None:
    engine = ScriptedEngine(lambda experts, prompt, sampling: "four")
    verdict = ask(made("choice-shuffle"), question(), engine)
    assert verdict.text == "four" and verdict.reason == "the question has no options to shuffle: a single answer"
    assert prompts(engine) == [("a+b+c", "user: What is 2 + 2?")]


def test_replies_that_name_no_option_lead_to_a_single_answer() -> None:
    engine = ScriptedEngine(lambda experts, prompt, sampling: "who knows")
    verdict = ask(made("choice-shuffle", orders=3), question(OPTIONS), engine)
    assert verdict.text == "who knows" and "no reply named an option" in verdict.reason
    assert prompts(engine)[-1] == ("a+b+c", f"user: {OPTIONS}")


# ── best-of ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_likeliest_reply_per_token_wins() -> None:
    likely = {"a much longer reply": -0.5, "short": -0.9, "": 0.0}
    replies = {"a": "", "b": "short", "c": "a much longer reply"}
    engine = ScriptedEngine(lambda e, p, s: replies[e], lambda experts, prompt, text: likely[text])
    verdict = ask(made("best-of", samples=1), question(), engine)
    assert verdict.text == "a much longer reply" and verdict.experts == (("c", 1.0),)
    assert [reply["mean_logprob"] for reply in verdict.log["replies"]] == [None, -0.9, -0.5]
    assert {named(request.experts) for request, _ in engine.weighed} == {"a+b+c"}


@pytest.mark.parametrize(("under", "judge"), [("base", "base"), ("c", "c"), ("route", "a+b+c")])
def test_who_judges(under: str, judge: str) -> None:
    engine = ScriptedEngine(lambda e, p, s: f"{e} {s.seed}", lambda *words: -1.0)
    verdict = ask(made("best-of", samples=2, under=under), question(), engine)
    assert {named(request.experts) for request, _ in engine.weighed} == {judge}
    assert verdict.text.startswith("a "), "equal ones: the heaviest expert's first sample"
    assert len(engine.requests) == 6 and {r.sampling.temperature for r in engine.requests} == {0.7}


def test_equal_replies_are_weighed_once_and_empty_ones_never() -> None:
    engine = ScriptedEngine(lambda e, p, s: "" if e == "a" else "same", lambda *words: -1.0)
    ask(made("best-of", samples=2), question(), engine)
    assert [text for _, text in engine.weighed] == ["same"]
    empty = ask(made("best-of", samples=2), question(), ScriptedEngine(lambda e, p, s: ""))
    assert empty.text == "" and empty.reason.endswith("all of them empty")


# ── cook ─────────────────────────────────────────────────────────────────────────────────────────────────────────

PASSAGES = {
    "a": "Vitamins are in fruit. Fruit is sweet.",
    "b": "Rome is a town in Italy. It is old.",
    "c": "Italy has a town that is called Rome. It is the capital.",
}


def cooking() -> ScriptedEngine:
    def script(experts: str, prompt: str, sampling: Sampling) -> str:
        return PASSAGES[experts] if "short passage" in prompt else f"{experts} answers"

    return ScriptedEngine(script)


def towns(*keys: str) -> list[object]:
    texts = ("which town is the capital of Italy", "Rome is a town", "fruit has vitamins")
    return [routable(key, exemplars=texts, exemplar_skills=()) for key in keys]


def test_passages_like_the_question_and_each_other_are_kept() -> None:
    engine = cooking()
    aggregator = made("cook", experts=towns("a", "b", "c"), top=2)  # type: ignore[arg-type]  # routable experts
    verdict = ask(aggregator, question("Which town is the capital of Italy?"), engine)
    assert verdict.text == "base answers" and set(verdict.log["used"]) == {"b", "c"}
    assert dict(verdict.experts) == pytest.approx({"b": 0.6, "c": 0.4})
    who, prompt = prompts(engine)[-1]
    assert who == "base" and PASSAGES["b"] in prompt and PASSAGES["c"] in prompt and PASSAGES["a"] not in prompt
    scores = {one["expert"]: one for one in verdict.log["passages"]}
    assert scores["a"]["relevance"] < min(scores["b"]["relevance"], scores["c"]["relevance"])
    assert scores["a"]["agreement"] < min(scores["b"]["agreement"], scores["c"]["agreement"])
    asked = [request.sampling.max_tokens for request in engine.requests]
    assert asked == [96, 96, 96, 64], "passages have a length of their own"


def test_passages_are_cut_to_sentences() -> None:
    engine = cooking()
    aggregator = made("cook", experts=towns("a", "b", "c"), top=3, words=8)  # type: ignore[arg-type]
    ask(aggregator, question(), engine)
    prompt = prompts(engine)[-1][1]
    assert "Rome is a town in Italy." in prompt and "It is old" not in prompt


def test_a_named_expert_answers() -> None:
    assert ask(made("cook", expert="c"), question(), cooking()).text == "c answers"


def test_passages_that_do_not_fit_are_left_out() -> None:
    def script(experts: str, prompt: str, sampling: Sampling) -> str:
        return f"{experts} knows of towns. " * 8 if "short passage" in prompt else "answer"

    verdict = ask(made("cook", top=3), question(), ScriptedEngine(script), context=300)
    assert verdict.text == "answer" and len(verdict.log["used"]) == 1
    assert verdict.reason.endswith("2 more did not fit the context")


def test_without_exemplars_nothing_can_be_compared() -> None:
    with pytest.raises(BadInput, match="no expert has exemplars to fit it on"):
        made("cook", experts=[routable("a", exemplars=(), exemplar_skills=())])
    made("cook", experts=[routable("a", exemplars=(), exemplar_skills=())], mode="top-down")


def test_top_down_asks_until_nothing_is_needed() -> None:
    def likelihood(experts: str, prompt: str, text: str) -> float:
        assert experts == "base"
        if text in ("Yes", "No"):
            needs = "sweet" not in prompt
            return -0.1 if (text == "Yes") == needs else -2.0
        best = "bbb" if "It is old" not in prompt else "aaa"
        return -1.0 if best in text else -3.0

    engine = cooking()
    engine.likelihood = likelihood
    verdict = ask(made("cook", mode="top-down", top=3), question(), engine)
    assert verdict.log["used"] == ["b", "a"] and verdict.text == "base answers"
    assert [one.get("asked") for one in verdict.log["rounds"]] == ["b", "a", None]
    assert dict(verdict.experts) == pytest.approx({"a": 5 / 8, "b": 3 / 8})
    final = prompts(engine)[-1][1]
    assert PASSAGES["a"] in final and PASSAGES["b"] in final
    named_once = [text for _, text in engine.weighed if text.startswith("expert")]
    assert len(named_once) == 3 + 2, "an expert that wrote is not asked again"


def test_top_down_stops_at_its_limit_and_at_once() -> None:
    greedy = cooking()
    greedy.likelihood = lambda experts, prompt, text: -9.0 if text == "No" else -1.0
    assert len(ask(made("cook", mode="top-down", top=1), question(), greedy).log["used"]) == 1
    content = cooking()
    content.likelihood = lambda experts, prompt, text: -9.0 if text == "Yes" else -1.0
    verdict = ask(made("cook", mode="top-down"), question(), content)
    assert verdict.log["used"] == [] and verdict.experts == () and len(content.requests) == 1
    assert prompts(content) == [("base", "user: What is 2 + 2?")]


# ── what they share ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "words", "cut"),
    [
        ("One two. Three four.", 9, "One two. Three four."),
        ("One two. Three four.", 3, "One two."),
        ("One two. Three four.", 2, "One two."),
        ("One two three four", 2, "One two"),
        ("One is 1.5 and two", 4, "One is 1.5 and"),
        ("", 2, ""),
    ],
)
def test_cutting_words(text: str, words: int, cut: str) -> None:
    assert cut_words(text, words) == cut


@pytest.mark.parametrize(
    ("text", "characters", "cut"),
    [
        ("One two. Three.", 15, "One two. Three."),
        ("One two. Three.", 14, "One two."),
        ("One two. Three.", 8, "One two."),
        ("One two three", 9, "One two"),
        ("One two three", 7, "One two"),
        ("Onetwothree", 4, "Onet"),
        ("一二三四五六", 3, "一二三"),
        (" spaced", 3, "sp"),
    ],
)
def test_cutting_texts(text: str, characters: int, cut: str) -> None:
    assert cut_text(text, characters) == cut


@pytest.mark.parametrize(
    ("text", "left"),
    [("<think>a\nb</think>\nfour", "four"), ("<think>never ends", ""), ("a<think>b</think>c<think>d</think>e", "ace")],
)
def test_thinking_is_left_out(text: str, left: str) -> None:
    assert without_thinking(text) == left
