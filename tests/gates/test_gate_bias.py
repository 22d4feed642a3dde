"""What a request as a whole says of the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from xpert import plugins
from xpert.errors import BadInput, NotFound
from xpert.experts.gate_bias import BiasedGate, ExpertCosines
from xpert.protocols import RoutableExpert
from xpert.records import Row

SKILLS = ("casing", "arithmetic", "reversal")


@pytest.fixture
def routable(rows: list[Row]) -> list[RoutableExpert]:
    return [RoutableExpert(skill, tuple(r.prompt for r in rows[:100] if r.skill == skill)) for skill in SKILLS]


@pytest.fixture
def prompts(rows: list[Row]) -> list[str]:
    return [row.prompt for row in rows[100:] if row.skill in SKILLS]


def test_a_prompt_is_nearest_to_the_expert_for_it(routable: list[RoutableExpert], rows: list[Row]) -> None:
    of_skill = [(row.prompt, row.skill) for row in rows[100:] if row.skill in SKILLS]
    pairs = ExpertCosines(routable).gate_bias([prompt for prompt, _ in of_skill])
    for bias, (_, skill) in zip(pairs, of_skill, strict=True):
        assert [key for key, _ in bias] == list(SKILLS)
        assert all(-1 <= cosine <= 1 for _, cosine in bias)
        assert max(bias, key=lambda pair: pair[1])[0] == skill


def test_a_description_stands_for_its_expert(routable: list[RoutableExpert]) -> None:
    space = ExpertCosines(routable, descriptions={"reversal": "Spell the word backwards."})
    cosine = space.cosines(["Spell the word backwards."])[0]
    assert cosine[2] == pytest.approx(1, abs=1e-4)
    assert cosine[2] > cosine[:2].max()


def test_cosines_do_not_depend_on_order_or_company(routable: list[RoutableExpert], prompts: list[str]) -> None:
    whole = ExpertCosines(routable).cosines(prompts)
    turned = ExpertCosines(routable[::-1]).cosines(prompts[::-1])
    assert np.array_equal(turned[::-1, ::-1], whole)
    alone = [ExpertCosines(routable).cosines([prompt])[0] for prompt in prompts[:5]]
    assert np.allclose(alone, whole[:5], atol=1e-5)
    assert ExpertCosines(routable).cosines([]).shape == (0, 3)
    assert not ExpertCosines(routable).cosines(["", "\n"]).any()
    assert ExpertCosines([]).gate_bias(["x"]) == [()]


def test_glider_makes_its_requests_bias(
    routable: list[RoutableExpert], prompts: list[str], make_gate: Callable[..., Any]
) -> None:
    gate = make_gate("glider", [], embedder="lsa")
    assert isinstance(gate, BiasedGate)
    found = gate.request_bias(routable, device="cpu").gate_bias(prompts)
    assert found == ExpertCosines(routable, embedder="lsa").gate_bias(prompts)
    others = [
        name for name in plugins.names("gate") if name != "glider" and plugins.load("gate", name).learned != "mixture"
    ]
    assert not any(isinstance(make_gate(name, []), BiasedGate) for name in others)


def test_mistakes(routable: list[RoutableExpert]) -> None:
    with pytest.raises(BadInput, match=r"expert 'x' has neither a description nor exemplars.* Train it with shots"):
        ExpertCosines([*routable, RoutableExpert("x", (" ",))])
    with pytest.raises(BadInput, match="expert 'casing' has neither"):
        ExpertCosines(routable, descriptions={"casing": " "})
    with pytest.raises(NotFound, match=r"unknown expert 'casings'\. Did you mean 'casing'"):
        ExpertCosines(routable, descriptions={"casings": "words"})
    with pytest.raises(NotFound, match="unknown embedder 'lsi'"):
        ExpertCosines(routable, embedder="lsi")
