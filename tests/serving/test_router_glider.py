"""Router glider: experts whose description lies near the prompt, or near what a model says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from xpert import plugins
from xpert.errors import BadInput, NotFound
from xpert.experts.expert_folder import training_sentence
from xpert.experts.routers.glider import description_of
from xpert.judges import Judge, Question
from xpert.protocols import RoutableExpert, Route, RouteRequest
from xpert.records import Message

LAW = RoutableExpert("x/law", (), ("contracts",), description="Explains contracts and the law of tenants.")
CODE = RoutableExpert("x/code", ("Write a function that sorts a list.",), description="Writes Python functions.")
FOOD = RoutableExpert("x/food", ("Name a dish with rice.", "How long do I boil an egg?"), ("cooking_meals",))
THREE = [LAW, CODE, FOOD]


def opened(experts: Sequence[RoutableExpert], **params: Any) -> Any:
    kind = plugins.load("router", "glider")
    router = kind(kind.Options.from_mapping(params))
    router.prepare(experts)
    return router


def one(router: Any, text: str) -> Route:
    return router.route([RouteRequest("1", (Message("user", text),))])[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("prompt", "nearest"),
    [
        ("Is this clause allowed in contracts?", "x/law"),
        ("Python functions for primes", "x/code"),
        ("I want to boil rice", "x/food"),
    ],
)
def test_the_nearest_description_answers(prompt: str, nearest: str) -> None:
    route = one(opened(THREE), prompt)
    assert route.experts == ((nearest, 1.0),)
    assert f"glider: the prompt is nearest to the description of {nearest}, cosine" in route.reason
    assert route.candidates[0].expert == nearest and f"next {route.candidates[1].expert}" in route.reason


@pytest.mark.parametrize("prompt", ["", "Zebra xylophone", "?"])
def test_what_is_near_to_none_is_the_bases(prompt: str) -> None:
    route = one(opened(THREE), prompt)
    assert route.experts == () and route.reason.endswith("which is not above 0.00; the base answers")


def test_threshold_top_and_temperature() -> None:
    text = "Python functions about contracts and rice"
    sharp, even = (one(opened(THREE, top=3, temperature=t), text) for t in (0.01, 10))
    assert [key for key, _ in sharp.experts] == [candidate.expert for candidate in sharp.candidates]
    assert sharp.experts[0][1] > 0.9 and even.experts[0][1] < 0.4
    between = (sharp.candidates[0].score + sharp.candidates[1].score) / 2
    assert len(one(opened(THREE, top=3, threshold=between), text).experts) == 1
    assert one(opened(THREE, threshold=0.999), text).experts == ()


def test_a_description_is_the_cards_or_made_of_skills_and_exemplars() -> None:
    assert description_of(LAW) == "Explains contracts and the law of tenants."
    assert description_of(FOOD) == "cooking meals\nName a dish with rice.\nHow long do I boil an egg?"
    long = RoutableExpert("x", ("a" * 1000, "b", "c", "d"))
    assert len(description_of(long)) < 320 and description_of(long).endswith("b\nc")
    assert description_of(RoutableExpert("x", (), skill_scores={"maps": 0.5})) == "maps"
    assert description_of(RoutableExpert("x", (), ("law",), skill_scores={"maps": 0.0})) == "law"


@pytest.mark.parametrize(
    "written",
    [
        training_sentence([], 88),
        training_sentence(["sums", "dates"], 1204),
        "LoRA expert, trained jointly with b/x behind gate top-p in mixture me/two.",
    ],
)
def test_the_sentence_that_training_writes_is_no_description(written: str) -> None:
    assert description_of(dataclasses.replace(FOOD, description=written)) == description_of(FOOD)
    own = "LoRA expert for sums of money."
    assert description_of(dataclasses.replace(FOOD, description=own)) == own


def test_of_no_experts_the_base_answers() -> None:
    assert one(opened([]), "law").experts == ()


# ── what a model says of the task ────────────────────────────────────────────────────────────────────────────────


class Describer:
    identity = "describer"

    def __init__(self, reply: str) -> None:
        self.reply, self.asked = reply, []  # type: str, list[str]

    def answers(self, questions: Sequence[Question]) -> Any:
        for index, question in enumerate(questions):
            self.asked.append(question.text)
            yield index, self.reply


def described(monkeypatch: pytest.MonkeyPatch, reply: str, **params: Any) -> tuple[Any, Describer]:
    describer = Describer(reply)
    monkeypatch.setattr("xpert.judges.open_judge", lambda spec, **_: Judge(describer))
    return opened(THREE, describe="model", model="any", **params), describer


def test_the_models_description_is_compared_and_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    router, describer = described(monkeypatch, "  about the law\nof contracts.\n\nIt is long.")
    route = one(router, "Can my landlord keep the deposit?")
    assert route.experts == (("x/law", 1.0),)
    assert "the task 'about the law of contracts.' is nearest to the description of x/law" in route.reason
    assert "landlord" in describer.asked[0]
    assert one(router, "Can my landlord keep the deposit?") == route and len(describer.asked) == 1


def test_a_long_prompt_is_shown_without_its_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    router, describer = described(monkeypatch, "law")
    one(router, "first " + "x" * 5000 + " last")
    assert len(describer.asked[0]) < 1800 and "first" in describer.asked[0] and " last" in describer.asked[0]


def test_where_the_model_says_nothing_the_prompt_is_taken_and_the_reason_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router, _ = described(monkeypatch, " \n ")
    route = one(router, "boil rice")
    assert route.experts == (("x/food", 1.0),)
    assert "the prompt (the model said nothing of its task)" in route.reason


def test_the_base_itself_describes(tiny_base: Path) -> None:
    """A language model in this process, named by `base` as a mixture names it; its text is of no worth here."""
    router = opened(THREE, describe="model", base=str(tiny_base))
    prompts = [RouteRequest(str(i), (Message("user", text),)) for i, text in enumerate(("boil rice", "law"))]
    together = router.route(prompts)
    assert [router.route([prompt])[0] for prompt in prompts] == together
    assert opened(THREE, describe="model", model=str(tiny_base)).route(prompts) == together


def test_states_of_the_base_as_embedder(tiny_base: Path) -> None:
    route = one(opened(THREE, embedder="lm", base=str(tiny_base)), "Explains contracts and the law of tenants.")
    assert route.experts == (("x/law", 1.0),) and route.candidates[0].score == pytest.approx(1, abs=1e-3)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"model": "m"}, BadInput, "describe=prompt asks no model"),
        ({"describe": "model"}, BadInput, "describe=model needs a model"),
        ({"describe": "model", "model": "http://here/v1"}, BadInput, "names no model"),
        ({"describe": "model", "model": "no/such folder"}, NotFound, "no/such folder"),
        ({"embedder": "lsaa"}, NotFound, "Did you mean 'lsa'"),
        ({"embedder": "lm"}, BadInput, "lm needs a base model"),
        ({"describe": "words"}, NotFound, "unknown describe 'words'"),
        ({"threshold": "2"}, BadInput, "threshold is 2"),
        ({"top": "0"}, BadInput, "top is 0"),
        ({"temperature": "0"}, BadInput, "temperature is 0"),
    ],
)
def test_mistakes(params: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        opened(THREE, **params)
    assert message in f"{caught.value} {getattr(caught.value, 'hint', '')}"


def test_an_expert_that_nothing_can_be_said_of() -> None:
    with pytest.raises(BadInput, match="'x/mute' has no description, skills or exemplars") as error:
        opened([*THREE, RoutableExpert("x/mute", (" ",))])
    assert "describe it in its card" in str(error.value.hint)
