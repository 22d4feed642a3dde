"""Router centroid by prototypes: an expert without exemplars is reached by the centroids on its card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xpert import plugins
from xpert.embedding import normalise
from xpert.errors import BadInput
from xpert.experts.mixing import mix
from xpert.experts.prototypes import add_prototypes
from xpert.experts.routing import MixtureRouter
from xpert.progress import SILENT, Progress, Silent
from xpert.protocols import Floats, RoutableExpert, RouteRequest
from xpert.records import Message
from xpert.registry.store import Registry


def opened(experts: Sequence[RoutableExpert], **params: Any) -> Any:
    kind = plugins.load("router", "centroid")
    router = kind(kind.Options.from_mapping(params))
    router.prepare(experts)
    return router


class Letters:
    """Counts of the letters a to f: a space that stays."""

    identity = "letters/1"

    def raw(self, texts: Sequence[str]) -> Floats:
        return normalise(np.array([[text.count(letter) for letter in "abcdef"] for text in texts], np.float32))

    def settle(self, rows: Floats) -> Floats:
        return rows

    def fit(self, texts: Sequence[str]) -> None: ...

    def embed(self, texts: Sequence[str], progress: Progress = SILENT) -> Floats:
        return self.raw(texts)


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Letters:
    """The embedder `letters`, wherever one is opened."""
    known: Callable[..., Any] = plugins.load
    made = Letters()

    def load(kind: str, name: str) -> Any:
        return (lambda _: made) if (kind, name) == ("embedder", "letters") else known(kind, name)

    monkeypatch.setattr("xpert.plugins.load", load)
    return made


def by_prototypes(key: str, texts: Sequence[str], identity: str = "letters/1") -> RoutableExpert:
    rows = Letters().raw(list(texts))
    return RoutableExpert(key, (), prototypes={identity: (("",) * len(rows), rows)})


def ask(text: str) -> list[RouteRequest]:
    return [RouteRequest("1", (Message("user", text),))]


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize("mode", ["nearest", "centroid"])
def test_an_expert_is_reached_by_its_prototypes(mode: str) -> None:
    experts = [
        RoutableExpert("x/ab", ("ab", "aab", "abb", "aabb", "aaabb", "aabbb", "ba", "bba")),
        by_prototypes("x/cd", ["c", "d"]),
    ]
    router = opened(experts, embedder="letters", mode=mode)
    (route,) = router.route(ask("ccccd"))
    assert route.experts == (("x/cd", 1.0),) and "nearest skill 'x/cd' of x/cd, cosine 0.97" in route.reason
    assert router.route(ask("aab"))[0].experts == (("x/ab", 1.0),)
    assert router.route(ask("efff"))[0].experts == ()
    own, other = router.thresholds
    assert 0 < other < 1 and own > 0  # its exemplars' scores and the others' have set both


@pytest.mark.usefixtures("letters")
def test_prototypes_alone_are_held_against_each_other() -> None:
    experts = [by_prototypes("x/ab", ["aab"]), by_prototypes("x/bc", ["bbc"]), by_prototypes("x/e", ["e"])]
    router = opened(experts, embedder="letters")
    shared = float(Letters().raw(["aab"])[0] @ Letters().raw(["bbc"])[0])
    assert router.thresholds.tolist() == pytest.approx([shared, shared, 0], abs=1e-5) and router.thresholds[2] > 0
    assert router.route(ask("aaab"))[0].experts == (("x/ab", 1.0),)
    assert router.route(ask("f"))[0].experts == ()


@pytest.mark.usefixtures("letters")
def test_exemplars_are_used_where_there_are_both() -> None:
    both = RoutableExpert("x", ("ab",), prototypes=by_prototypes("x", ["ef"]).prototypes)
    router = opened([both, RoutableExpert("y", ("cd",))], embedder="letters", threshold=0.5)
    assert router.route(ask("ab"))[0].experts == (("x", 1.0),) and router.route(ask("ef"))[0].experts == ()


@pytest.mark.parametrize(
    ("embedder", "identity", "said"),
    [
        ("letters", "minilm/1", "no exemplars and no prototypes of embedder letters (it has those of minilm/1)"),
        ("lsa", "letters/1", "no exemplars and no prototypes of embedder lsa (it has those of letters/1)"),
    ],
)
@pytest.mark.usefixtures("letters")
def test_prototypes_of_another_space_are_no_use(embedder: str, identity: str, said: str) -> None:
    with pytest.raises(BadInput) as error:
        opened([by_prototypes("x", ["a"], identity)], embedder=embedder)
    assert said in str(error.value)


def test_a_mixture_of_the_registry_takes_them_in(
    make_expert: Callable[..., Path], exemplars_of: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """By the states of the real tiny base: one expert has exemplars, one prototypes alone, one neither."""
    registry = Registry(tmp_path / "registry")
    registry.publish(make_expert("casing", seed=1), "me/casing")
    for skill, seed, by in (("city", 2, "lm"), ("colour", 3, None)):
        folder = make_expert(skill, seed=seed)
        if by is not None:
            add_prototypes(folder, by, device="cpu")
        (folder / "exemplars.jsonl").unlink()
        registry.publish(folder, f"me/{skill}")
    told = Told()
    mixture = mix(registry, router="centroid", router_params={"embedder": "lm"}, device="cpu", progress=told)
    assert mixture.keys == ("me/casing", "me/city") and "out: me/colour@1 has no exemplars" in told.text
    router = MixtureRouter(mixture, device="cpu")
    routes = router.route(ask(exemplars_of("city")[0]) + ask(exemplars_of("casing")[0]))
    assert [route.candidates[0].expert for route in routes] == ["me/city", "me/casing"]
    assert mix(registry, router="centroid", device="cpu").keys == ("me/casing",)
    with pytest.raises(BadInput, match="'me/city' has no exemplars and no prototypes of embedder lsa"):
        mix(registry, router="centroid", experts=["me/casing", "me/city"])
    with pytest.raises(BadInput, match="'me/colour' has no exemplars, which router centroid needs"):
        mix(registry, router="centroid", router_params={"embedder": "lm"}, experts=["me/colour"], device="cpu")
    assert mix(registry, router="skills").keys == ("me/casing", "me/city", "me/colour")


class Told(Silent):
    text = ""

    def say(self, message: str) -> None:
        self.text += f"{message}\n"
