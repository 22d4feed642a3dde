"""Mixture files: round trip, what they refuse, and where they find their experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from xpert.errors import BadInput, Corrupt, NotFound
from xpert.experts.mixing import mix
from xpert.experts.mixture import assemble, open_expert
from xpert.experts.mixture_file import load_mixture, write_mixture
from xpert.registry.card import BaseModel
from xpert.registry.store import Registry


def test_round_trip(mixture_file: Callable[..., Path]) -> None:
    path = mixture_file("fixed", weights="casing:0.5,reversal:0.5")
    mixture = load_mixture(path)
    assert mixture.keys == ("casing", "arithmetic", "reversal")
    assert mixture.name == "three"
    before = path.read_text()
    write_mixture(path, replace(mixture, created="another day"))
    assert path.read_text() == before
    with pytest.raises(BadInput, match="exists already"):
        write_mixture(path, replace(mixture, router_params={}))


def test_a_folder_with_its_experts_can_be_moved(make_expert: Callable[..., Path], tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(make_expert("casing", seed=1), home / "experts" / "casing")
    write_mixture(home / "m.json", assemble([open_expert(home / "experts" / "casing")], router="fixed"))
    assert json.loads((home / "m.json").read_text())["experts"][0]["ref"] == "./experts/casing"
    home.rename(tmp_path / "moved")
    assert load_mixture(tmp_path / "moved" / "m.json").experts[0].folder == tmp_path / "moved" / "experts" / "casing"


def test_an_expert_is_a_mixture_of_one(make_expert: Callable[..., Path]) -> None:
    mixture = load_mixture(make_expert("casing", seed=1))
    assert mixture.router == "fixed" and mixture.keys == ("casing",)


def test_registered_experts_and_mixtures(make_expert: Callable[..., Path], tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    for seed, skill in enumerate(("casing", "city"), 1):
        registry.publish(make_expert(skill, seed=seed), f"me/{skill}")
    experts = [open_expert(f"me/{skill}", registry) for skill in ("casing", "city")]
    assert [expert.ref for expert in experts] == ["me/casing@1", "me/city@1"]
    path = tmp_path / "m.json"
    write_mixture(path, assemble(experts, router="centroid", registry=str(registry.folder)))
    assert load_mixture(path).keys == ("me/casing", "me/city")  # found through the registry the file names
    registry.publish(path, "me/both")
    assert load_mixture("me/both@1", registry).keys == ("me/casing", "me/city")
    assert load_mixture("me/both", registry).name == "me/both"
    assert load_mixture("me/city", registry).router == "fixed"
    with pytest.raises(NotFound, match=r"(?i)did you mean 'me/casing"):
        load_mixture("me/casign", registry)


def test_an_expert_that_the_router_could_never_choose(make_expert: Callable[..., Path], tmp_path: Path) -> None:
    """An adapter imported without exemplars does not spoil the mixture of all experts, and is refused where named."""
    registry = Registry(tmp_path / "registry")
    registry.publish(make_expert("casing", seed=1), "me/casing")
    registry.publish(make_expert("city", seed=2, exemplars=[]), "me/bare")
    assert mix(registry, router="centroid").keys == ("me/casing",)
    assert mix(registry, router="fixed").keys == ("me/bare", "me/casing")
    for named in (["me/casing", "me/bare"], ["me/bare"]):
        with pytest.raises(BadInput, match="expert 'me/bare' has no exemplars, which router centroid needs"):
            mix(registry, router="centroid", experts=named)


def test_a_mixture_pulled_elsewhere_finds_its_experts(
    make_expert: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Registry(tmp_path / "there")
    there.publish(make_expert("casing", seed=1), "me/casing")
    path = tmp_path / "m.json"
    mixture = assemble([open_expert("me/casing", there)], router="fixed", registry=str(there.folder))
    write_mixture(path, mixture)
    there.publish(path, "me/one")
    pulled = there.pull("me/one", tmp_path / "moved" / "one")
    here = tmp_path / "here"
    there.folder.rename(here)
    with pytest.raises(NotFound, match=r"does not say its registry, and .* has no me/casing@1. .*--registry"):
        load_mixture(pulled)
    with pytest.raises(NotFound, match=r"registry .*there is not here, and .* has no me/casing@1. .*--registry"):
        load_mixture(path)
    assert load_mixture(pulled, Registry(here)).keys == ("me/casing",)
    monkeypatch.setenv("XPERT_REGISTRY", str(here))
    assert load_mixture(pulled).keys == ("me/casing",)


def test_changed_weights_are_noticed(mixture_file: Callable[..., Path]) -> None:
    path = mixture_file()
    folder = load_mixture(path).experts[0].folder
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Corrupt, match="expert 'casing' is not the one that was mixed"):
        load_mixture(path)


def test_different_bases_are_named(make_expert: Callable[..., Path], base_model: BaseModel) -> None:
    other = BaseModel("some/other", "f" * 64)
    experts = [
        open_expert(make_expert("casing", seed=1)),
        open_expert(make_expert("city", seed=2, base=other)),
    ]
    with pytest.raises(BadInput) as caught:
        assemble(experts, router="centroid")
    assert base_model.ref in str(caught.value) and "some/other" in str(caught.value)
    with pytest.raises(BadInput, match="'casing' belongs to base"):
        assemble(experts[:1], router="centroid", base=other)


def test_exemplars_of_other_skills_do_not_stand_for_the_expert(make_expert: Callable[..., Path]) -> None:
    folder = make_expert("casing", seed=1)
    lines = (folder / "exemplars.jsonl").read_text()
    stray = json.dumps({"prompt": "Which country?", "skill": "city", "kind": "row"})
    (folder / "exemplars.jsonl").write_text(lines + stray + "\n")
    routable = open_expert(folder).routable()
    assert "Which country?" not in routable.exemplars
    assert set(routable.exemplar_skills) == {"casing"}


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", Corrupt, "not valid JSON"),
        ('{"kind": "pool"}', BadInput, "not a mixture"),
        ('{"kind": "mixture"}', Corrupt, "no schema number"),
        ('{"kind": "mixture", "schema": 99}', BadInput, "newer xpert"),
        ('{"kind": "mixture", "schema": 1}', Corrupt, "damaged"),
    ],
)
def test_damaged_files(content: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(error, match=message):
        load_mixture(tmp_path / "m.json")


def test_names_that_mean_something_else(make_expert: Callable[..., Path]) -> None:
    expert = open_expert(make_expert("casing", seed=1))
    with pytest.raises(BadInput, match="may not be called 'base'"):
        assemble([replace(expert, key="base")], router="fixed")
    with pytest.raises(BadInput, match="two experts of the mixture are called 'casing'"):
        assemble([expert, expert], router="fixed")
    with pytest.raises(BadInput, match="at least one expert"):
        assemble([], router="fixed")
