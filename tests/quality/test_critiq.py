"""CritiQ: criteria are kept, banned and rewritten by rule, the votes become a rating, and failures are told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xpert import plugins
from xpert.criteria import KNOWN, Criterion, MiningOptions, _Mining, majority, mine, read_criteria
from xpert.data import pool_from_rows
from xpert.errors import BadInput
from xpert.features import FeatureOptions, Features
from xpert.judges import Judge
from xpert.records import Budget, Row
from xpert.selection import choose

GOOD, BAD = "a golden text", "a plain text"
TEXTS = [(GOOD + f" {i}", BAD + f" {i}") if i % 3 else (BAD + f" {i}", GOOD + f" {i}") for i in range(12)]
RNG = np.random.default_rng(0)
PREFERRED = [bool(i % 3) for i in range(12)]


class Scripted:
    """A manager and worker in one; agreement by what the criterion's sentence says, such as `right on 9 of 12`."""

    identity = "scripted"

    def __init__(self, written: list[str], rewritten: str = "nothing usable") -> None:
        self.written, self.rewritten = written, rewritten
        self.asked: list[str] = []

    def answers(self, questions: Any) -> Any:
        # In another order than asked: replies must be matched by their index.
        for index in reversed(range(len(questions))):
            self.asked.append(questions[index].text)
            yield index, self.reply(questions[index].text)

    def reply(self, text: str) -> str:
        if text.startswith("Some people"):
            return self.written.pop(0) if self.written else "I have no idea"
        if text.startswith("By the criterion"):
            return f"critique of {re.findall('golden text ([0-9]+)', text)}"
        if text.startswith("The criterion below"):
            return self.rewritten
        a = text.split("Text A:\n")[1].split("\n\nText B:\n")[0]
        pair = int(a.split()[-1])
        said = re.search(r"right on (\d+) of 12", text)
        if said is None:
            return "U"
        right = pair < int(said[1])
        return "A" if ("golden" in a) == right else "B"


def run(written: list[str], rewritten: str = "nothing usable", **options: Any) -> tuple[Any, Any, Scripted]:
    script = Scripted(written, rewritten)
    judge = Judge(script)
    settings = MiningOptions(**{"criteria": 2, "rounds": 2, **options})
    kept, log = mine(TEXTS, PREFERRED, judge, judge, settings, np.random.default_rng(0))
    return kept, log, script


def test_criteria_are_kept_banned_and_replaced() -> None:
    kept, log, _ = run(["1. **Gold**: right on 12 of 12\n2. Lead: right on 6 of 12", "tin: right on 9 of 12"])
    assert [(one.criterion.name, one.accuracy) for one in kept] == [("gold", 1.0), ("tin", 0.75)]
    tried = [(step["step"], step["criterion"]) for step in log if "criterion" in step]
    assert tried[: len(KNOWN)] == [("start", criterion.name) for criterion in KNOWN]
    assert tried[len(KNOWN) :] == [("round 1", "gold"), ("round 1", "lead"), ("round 2", "gold"), ("round 2", "tin")]


def test_one_between_is_rewritten_after_critiques_of_its_own_wrong_pairs() -> None:
    kept, _, script = run(["gold: right on 8 of 12"], "Gold: now right on 11 of 12", criteria=1, critiques=3)
    assert [(one.criterion.description, one.right, one.answers) for one in kept] == [("now right on 11 of 12", 22, 24)]
    [rewrite] = [text for text in script.asked if text.startswith("The criterion below")]
    assert rewrite.index("critique of ['8']") < rewrite.index("critique of ['9']") < rewrite.index("critique of ['10']")
    assert "['11']" not in rewrite


def test_the_best_version_is_kept() -> None:
    """A rewriting that agrees less, or as often, does not replace what it was made of."""
    script = Scripted(["gold: right on 8 of 12\niron: right on 12 of 12"], "gold: right on 7 of 12")
    settings = MiningOptions(criteria=2, rounds=3, keep=0.75)
    mining = _Mining([(GOOD + f" {i}", BAD + f" {i}") for i in range(12)], Judge(script), Judge(script), settings, RNG)
    active = mining.start()
    for _ in range(3):
        active = mining.revise([mining.measure(criterion, "round") for criterion in active])
    assert mining.best["gold"].criterion.description == "right on 8 of 12"
    assert [criterion.name for criterion in active] == ["gold", "iron"]


def test_a_version_below_chance_goes_back_to_the_best_one() -> None:
    with pytest.raises(BadInput, match=r"agrees with the pairs at 0.75 or more; the best is 'gold' at 0.67"):
        run(["gold: right on 8 of 12"], "gold: right on 3 of 12", criteria=1, rounds=3)
    script = Scripted(["gold: right on 8 of 12"], "gold: right on 3 of 12")
    judge = Judge(script)
    with pytest.raises(BadInput):
        mine(TEXTS, PREFERRED, judge, judge, MiningOptions(criteria=1, rounds=3), np.random.default_rng(0))
    rewrites = [text for text in script.asked if text.startswith("The criterion below")]
    assert len(rewrites) == 2
    assert all("Criterion, gold: right on 8 of 12" in text for text in rewrites)  # never the worse version


def test_where_no_criterion_can_be_written() -> None:
    with pytest.raises(BadInput, match="no criterion agrees with the pairs"):
        run([])
    _, log, _ = run(["gold: right on 12 of 12"])
    assert {"step": "manager", "criteria wanted": 2, "written": 1} in log


def test_banned_names_are_not_taken_again() -> None:
    kept, _, script = run(
        ["lead: right on 1 of 12\ngold: right on 12 of 12", "LEAD: right on 12 of 12", "tin: right on 12 of 12"]
    )
    assert [one.criterion.name for one in kept] == ["gold", "tin"]
    assert any("Write none of these again:" in text and "lead" in text for text in script.asked)


def test_a_worker_that_always_says_the_first_agrees_at_one_half() -> None:
    class Lazy(Scripted):
        def reply(self, text: str) -> str:
            return "A" if text.startswith("Below are two") else super().reply(text)

    judge = Judge(Lazy([]))
    with pytest.raises(BadInput, match="none could be tried"):
        mine(TEXTS, PREFERRED, judge, judge, MiningOptions(rounds=1), np.random.default_rng(0))


def test_the_majority_of_criteria_labels_a_pair() -> None:
    judge = Judge(Scripted([]))
    criteria = [Criterion(f"c{right}", f"right on {right} of 12") for right in (12, 8, 4)]
    pairs = [(GOOD + f" {i}", BAD + f" {i}") for i in range(12)]
    assert majority(judge, criteria, pairs, 1, 8).tolist() == [1.0] * 8 + [0.0] * 4
    even = majority(judge, criteria[::2], pairs, 1, 8)
    assert even[:4].tolist() == [1.0] * 4
    assert np.isnan(even[4:]).all()


def test_reading_a_managers_criteria() -> None:
    reply = (
        "Here are the criteria:\n1. Depth: It explains why.\n- **Use of {braces}**: strange marks\n"
        "**clear steps:** The steps are numbered.\nshort: no\n2) A-B test/x: It is compared with others.\nno colon here"
    )
    assert [(one.name, one.description) for one in read_criteria(reply)] == [
        ("depth", "It explains why."),
        ("clear steps", "The steps are numbered."),
        ("a-b test/x", "It is compared with others."),
    ]


# ── the scorer ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def preferred(tmp_path: Path) -> Callable[..., Path]:
    """Preferred pairs of rows: one with `capitals` before one without."""

    def write(rows: list[Row], count: int = 30) -> Path:
        good = [row.id for row in rows if row.skill == "casing"]
        bad = [row.id for row in rows if row.skill != "casing"]
        lines = [{"a": good[i % len(good)], "b": bad[i % len(bad)], "preferred": "a"} for i in range(count)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return tmp_path / "pairs.jsonl"

    return write


class Shouting:
    """Counts what it is asked."""

    identity = "shouting"
    asked = 0

    def answers(self, questions: Any) -> Any:
        for index in reversed(range(len(questions))):
            self.asked += 1
            yield index, script(questions[index].text)


@pytest.fixture
def shouting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shouting:
    """Whatever judge is named, this one answers, and its replies are kept."""
    answerer = Shouting()
    opened = lambda spec, **_: Judge(answerer, tmp_path / "kept")  # noqa: E731
    monkeypatch.setattr("xpert.selectors.scorers._preference_fit.open_judge", opened)
    return answerer


def script(question: str) -> str:
    """Only the criterion `shouting` finds the capitals; the others have no opinion."""
    if question.startswith("Some people"):
        return "shouting: It asks for capitals."
    if not question.startswith("Below are two texts") or "Criterion, shouting" not in question:
        return "U"
    a, b = question.split("Text A:")[1].split("Text B:")
    return "U" if ("capitals" in a) == ("capitals" in b) else "A" if "capitals" in a else "B"


def select(features: Any, **params: Any) -> Any:
    plugin = plugins.load("selector", "critiq")
    return choose(plugin(plugin.Options.from_mapping(params)), features, None, Budget.parse("10"))


def test_from_pairs_to_a_selection(shouting: Shouting, rows: list[Row], preferred: Callable[..., Path]) -> None:
    features = Features(pool_from_rows(rows[:60]), FeatureOptions(), cache=None, device="cpu")
    params = {"pairs": str(preferred(rows[:60], 15)), "manager": "m", "rounds": 1, "labelled": 100}
    found = select(features, **params)
    assert [rows[row].skill for row in found.rows] == ["casing"] * 10
    kept = [step for step in found.log if step["step"] == "kept"]
    assert kept == [{"step": "kept", "criterion": "shouting", "accuracy": 1.0}]
    labelled = next(step for step in found.log if step["step"] == "labelled")
    assert 20 <= labelled["with a majority"] < labelled["pairs"] == 100
    assert found.log[-1]["held-out accuracy"] > 0.9
    asked = shouting.asked
    again = select(features, **params)
    assert (shouting.asked, again.rows.tolist(), list(again.log)) == (asked, found.rows.tolist(), list(found.log))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({}, "needs pairs"),
        ({"pairs": "x"}, "needs manager"),
        ({"pairs": "/nope", "manager": "m"}, "no such file of pairs"),
        ({"pairs": "x", "manager": "m", "keep": 0.5}, "ban=0.5 is not below keep=0.5"),
        ({"pairs": "x", "manager": "m", "labelled": 5}, "labelled is 5; the least is 20"),
    ],
)
def test_mistakes(rows: list[Row], params: dict[str, Any], said: str) -> None:
    features = Features(pool_from_rows(rows[:10]), FeatureOptions(), cache=None, device="cpu")
    with pytest.raises(BadInput) as caught:
        select(features, **params)
    assert said in str(caught.value)


def test_too_few_preferred_pairs(rows: list[Row], preferred: Callable[..., Path]) -> None:
    features = Features(pool_from_rows(rows[:60]), FeatureOptions(), cache=None, device="cpu")
    with pytest.raises(BadInput, match="9 preferred pairs are too few"):
        select(features, pairs=str(preferred(rows[:60], 9)), manager="m")


def test_drawn_pairs_without_a_majority_leave_too_few(
    shouting: Shouting, rows: list[Row], preferred: Callable[..., Path]
) -> None:
    features = Features(pool_from_rows(rows[:60]), FeatureOptions(), cache=None, device="cpu")
    with pytest.raises(BadInput, match="decided pairs are too few"):
        select(
            features,
            pairs=str(preferred(rows[:60], 15)),
            manager="m",
            rounds=1,
            labelled=25,
        )
