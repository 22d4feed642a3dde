from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpert.errors import NotFound, Unavailable
from xpert.experts.metrics import METRICS, normalise, score

CASES = [
    # metric, prediction, answers, score
    ("exact", " The Moon. ", ["the moon"], 1),
    ("exact", "“Paris”", ["paris"], 1),
    ("exact", "Paris, France", ["paris"], 0),
    ("exact", "no", ["yes", "No"], 1),
    ("exact", "ﬁve", ["five"], 1),
    ("choice", "B", ["B"], 1),
    ("choice", "(b) because it is blue", ["B"], 1),
    ("choice", "The answer is C.", ["C"], 1),
    ("choice", "The correct option is: D", ["D"], 1),
    ("choice", "Both", ["B"], 0),
    ("choice", "A. They eat", ["B"], 0),
    ("choice", "A dog", ["A"], 0),
    ("choice", "The answer is a dog", ["A"], 0),
    ("choice", "I think so", ["I"], 0),
    ("choice", "C because it is cold", ["C"], 1),
    ("choice", "b", ["B"], 1),
    ("choice", "credit cards", ["Credit cards"], 1),
    ("number", "So 3 + 4 = 7", ["7"], 1),
    ("number", "It costs $1,234.50.", ["1234.5"], 1),
    ("number", "-3", ["3"], 0),
    ("number", "seven", ["7"], 0),
    ("number", "18 apples, 20 pears", ["20"], 1),
    ("f1", "the cat sat", ["a cat sat"], 1),
    ("f1", "cat sat down", ["cat sat"], 0.8),
    ("f1", "", ["cat"], 0),
    ("set", "snail, donkey and spider", ["spider, snail, donkey"], 1),
    ("set", "snail", ["snail, donkey"], 2 / 3),
    ("contains", "It is the Eiffel Tower in Paris.", ["eiffel tower"], 1),
    ("contains", "parisian", ["paris"], 0),
    ("chrf", "the same sentence", ["the same sentence"], 1),
    ("rougeL", "police killed the gunman", ["police kill the gunman"], 1),  # by stemming
    ("rougeL", "the gunman police killed", ["police killed the gunman"], 0.5),
]


@pytest.mark.parametrize(("metric", "prediction", "answers", "expected"), CASES)
def test_cases(metric: str, prediction: str, answers: list[str], expected: float) -> None:
    assert score(metric, prediction, answers) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@given(prediction=st.text(max_size=40), answer=st.text(max_size=40))
def test_scores_lie_between_0_and_1(metric: str, prediction: str, answer: str) -> None:
    assert 0 <= score(metric, prediction, [answer]) <= 1


@pytest.mark.parametrize("metric", [m for m in METRICS if m not in ("number", "contains", "rougeL", "chrf")])
@given(answer=st.text(alphabet="abcdefg ,", max_size=20))
def test_the_answer_itself_scores_1(metric: str, answer: str) -> None:
    assert score(metric, answer, [answer]) == 1


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_unknown_metrics_name_the_nearest() -> None:
    with pytest.raises(NotFound, match="Did you mean 'exact'"):
        score("exat", "a", ["a"])


def test_exec_says_that_it_needs_a_sandbox() -> None:
    with pytest.raises(Unavailable, match="needs a sandbox"):
        score("exec", "print(1)", ["1"])


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Rome", ["B"], 1),
        ("B", ["Rome"], 1),
        ("B. Rome", ["Rome"], 1),
        ("(b)", ["B"], 1),
        ("Paris", ["B"], 0),
        ("D", ["B"], 0),
        ("Berlin", ["B"], 0),
        ("", ["B"], 0),
    ],
)
def test_a_choice_is_named_by_its_text_or_its_letter(prediction: str, answers: list[str], expected: float) -> None:
    assert score("choice", prediction, answers, ["Paris", "Rome", "Oslo"]) == expected


def test_choices_that_are_letters_name_themselves() -> None:
    assert score("choice", "B", ["B"], ["C", "B", "A"]) == 1
    assert score("choice", "A", ["B"], ["C", "B", "A"]) == 0
