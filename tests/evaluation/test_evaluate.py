"""The evaluation against an engine that answers from a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from xpert.experts.evaluate import EvalOptions, Subject, bootstrap, evaluate, usable_items
from xpert.protocols import EngineRequest, Piece
from xpert.records import Message, Row, SuiteItem


class TableEngine:
    """Expert `right` answers rightly, any other wrongly; prefers the right choice likewise."""

    def __init__(self, answers: dict[int, str]) -> None:
        self.answers = answers
        self.generated: list[EngineRequest] = []

    def add_expert(self, key: str, folder: Path) -> None: ...

    def generate(
        self, requests: Iterable[EngineRequest], *, cancelled: Callable[[str], bool] | None = None
    ) -> Iterator[Piece]:
        for request in reversed(list(requests)):  # replies come in any order
            self.generated.append(request)
            right = request.experts == (("right", 1.0),)
            text = self.answers[request.prompt_ids[0]] if right else "wrong"
            yield Piece(request.id, text[:2])
            yield Piece(request.id, text[2:], finished="stop")

    def continuation_logprobs(
        self, requests: Sequence[EngineRequest], continuations: Sequence[tuple[int, ...]]
    ) -> list[list[float]]:
        likely = [request.experts == (("right", 1.0),) for request in requests]
        return [[-1.0 if (c[0] == ord("A")) == good else -2.0] for c, good in zip(continuations, likely, strict=True)]


def make_items(count: int = 12) -> list[SuiteItem]:
    return [
        SuiteItem(
            Row(f"i{n}", (Message("user", str(n)),), f"answer{n}"),
            (f"answer{n}",),
            "exact",
            "odd" if n % 2 else "even",
            None,
        )
        for n in range(count)
    ]


def run(items: list[SuiteItem], subjects: list[Subject], engine: TableEngine | None = None):  # type: ignore[no-untyped-def]
    engine = engine or TableEngine({int(i.row.prompt): i.answers[0] for i in items})
    return evaluate(
        engine, lambda item: (int(item.row.prompt),), lambda text: tuple(ord(c) for c in text), items, subjects
    )


def test_each_pair_of_item_and_experts_is_generated_once() -> None:
    items = make_items()
    engine = TableEngine({int(i.row.prompt): i.answers[0] for i in items})
    mixed = Subject("mixed", lambda rows: [(("right", 1.0),) if r.skill == "odd" else () for r in rows])
    found = run(items, [Subject.fixed("base", ()), Subject.fixed("right", (("right", 1.0),)), mixed], engine)
    assert len(engine.generated) == found.generated == 24
    assert found.interval("base").score == 0
    assert found.interval("right").score == 1
    assert found.interval("mixed", "odd").score == 1
    assert found.interval("mixed", "even").score == 0
    assert found.mean_over_skills("mixed") == 0.5
    assert [r.id for r in found.results["mixed"]] == [i.row.id for i in items]


def test_choices_are_weighed_by_likelihood() -> None:
    items = [
        SuiteItem(Row(str(n), (Message("user", str(n)),), "A"), ("A",), "choice", "s", ("B", "A")) for n in range(4)
    ]
    found = run(items, [Subject.fixed("base", ()), Subject.fixed("right", (("right", 1.0),))])
    base, right = found.choice_interval("base"), found.choice_interval("right")
    assert base is not None
    assert right is not None
    assert (base.score, right.score) == (0, 1)


def test_without_choices_there_is_no_choice_score() -> None:
    assert run(make_items(2), [Subject.fixed("base", ())]).choice_interval("base") is None


def test_a_limit_counts_per_skill() -> None:
    assert [item.row.id for item in usable_items(make_items(), EvalOptions(limit=2))] == ["i0", "i1", "i2", "i3"]


def test_the_interval_covers_the_mean_and_narrows_with_n() -> None:
    rng = np.random.default_rng(0)
    few, many = bootstrap(rng.random(20).tolist()), bootstrap(rng.random(2000).tolist())
    for interval in (few, many):
        assert interval.low <= interval.score <= interval.high
    assert many.high - many.low < few.high - few.low
    # The normal interval is the slow plain version for a mean of many values.
    assert many.high - many.low == pytest.approx(2 * 1.96 * np.sqrt(1 / 12 / 2000), rel=0.1)
    constant = bootstrap([0.5] * 9)
    assert (constant.low, constant.score, constant.high, constant.n) == (0.5, 0.5, 0.5, 9)


def test_resamples_are_drawn_alike_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(1).random(101).tolist()
    whole = bootstrap(scores, 3)
    picks = np.random.default_rng(3).integers(0, 101, size=(2000, 101))
    assert (whole.low, whole.high) == tuple(np.quantile(np.array(scores)[picks].mean(axis=1), [0.025, 0.975]))
    monkeypatch.setattr("xpert.experts.evaluate._RESAMPLED_AT_ONCE", 101 * 7)
    assert bootstrap(scores, 3) == whole
