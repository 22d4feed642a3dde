from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from xpert.errors import BadInput, Corrupt
from xpert.registry import card as cards
from xpert.registry.card import (
    BaseModel,
    Consistency,
    ExpertCard,
    Interval,
    Prototypes,
    SkillProfile,
    SkillScore,
)
from xpert.registry.card_schema import card_schema, check_card, field_tables
from xpert.registry.store import Registry
from xpert.storage import hash_file

ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., Result]
Maker = Callable[..., Path]

INTERVAL = Interval(0.5, 0.4, 0.6, 30)
EVEN = Consistency(INTERVAL, INTERVAL)
SCORE = SkillScore("exact", INTERVAL, INTERVAL, INTERVAL, INTERVAL, EVEN, EVEN)
FULL = ExpertCard(
    base=BaseModel("acme/tiny@main", "f" * 64, "LlamaForCausalLM"),
    adapter={
        "type": "LORA",
        "rank": 8,
        "alpha": 16,
        "dropout": 0.0,
        "rslora": False,
        "target_modules": ["q_proj"],
        "x": 1,
    },
    name="sums",
    description="Adds.",
    skills=("sums",),
    selection={
        "fingerprint": "0" * 64,
        "inputs": {"pool": "a", "shots": None},
        "config": {"method": "kshot"},
        "own": [1],
    },
    training={"key": "k", "options": {"rank": 8}, "seed": 0, "figures": {"tokens": 3}, "own": {"deep": [{}]}},
    licences={"MIT": 3},
    profile=SkillProfile("suite", "e" * 64, {"a b": SCORE}, {"c": SCORE}, {"k": SCORE}, {"any": []}, {"items": 30}),
    gates={"arrow": {"data": "x"}},
    prototypes=(Prototypes("minilm/1", 2, "prototypes.safetensors", "minilm/1", ("sums", ""), (3, 1)),),
    spent={"tokens": 10, "seconds": 1.5},
    files={"adapter_model.safetensors": "0" * 64, "more/notes.md": "1" * 64},
    created="2026-01-31T12:00:00Z",
)


def plain(card: ExpertCard = FULL) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(card.to_dict()))
    return found


def change(value: dict[str, Any], path: str, new: Any) -> dict[str, Any]:
    """A copy with one field set (`KILL` removes it)."""
    value = copy.deepcopy(value)
    *ways, last = path.split("/")
    place: Any = value
    for way in ways:
        place = place[int(way) if isinstance(place, list) else way]
    if new is KILL:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = new
    return value


KILL = object()
SCORED = "profile/skills/a b"
SPOILS: dict[str, tuple[str, Any, str]] = {
    "no base": ("base", KILL, "the card has no 'base'"),
    "base is a text": ("base", "tiny", 'base is "tiny", not an object'),
    "no fingerprint": ("base/fingerprint", KILL, "base has no 'fingerprint'"),
    "empty fingerprint": ("base/fingerprint", "", "base.fingerprint is empty"),
    "no adapter": ("adapter", KILL, "the card has no 'adapter'"),
    "no schema": ("schema", KILL, "the card has no 'schema'"),
    "odd schema": ("schema", "2", 'schema is "2", not 1 or 2'),
    "schema 0": ("schema", 0, "schema is 0, not 1 or 2"),
    "rank of no rank": ("adapter/rank", 0, "adapter.rank is 0; the least is 1"),
    "name is a number": ("name", 7, "name is 7, not a text"),
    "skills are a text": ("skills", "sums", 'skills is "sums", not a list'),
    "a skill is a number": ("skills/0", 7, "skills[0] is 7, not a text"),
    "score is a text": (f"{SCORED}/expert/score", "0.5", 'profile.skills["a b"].expert.score is "0.5", not a number'),
    "score is true": (f"{SCORED}/expert/score", True, "not a number"),
    "score is no number": (f"{SCORED}/base/low", float("nan"), "is nan, which is not a number of JSON"),
    "score without base": (f"{SCORED}/base", KILL, "profile.skills[\"a b\"] has no 'base'"),
    "a negative count": (f"{SCORED}/expert/n", -1, "expert.n is -1; the least is 0"),
    "half an item": (f"{SCORED}/expert/n", 1.5, "expert.n is 1.5, not a whole number"),
    "odd consistency": (f"{SCORED}/consistency", {"all_right": None}, "consistency"),
    "negative licence": ("licences/MIT", -3, "licences.MIT is -3; the least is 0"),
    "negative tokens": ("spent/tokens", -1, "spent.tokens is -1; the least is 0"),
    "an absolute path": ("files", {"/etc/passwd": "0" * 64}, "/etc/passwd"),
    "a path that leaves": ("files", {"a/../../b": "0" * 64}, "no plain path inside the folder"),
    "a hidden file": ("files", {".ssh": "0" * 64}, "no plain path inside the folder"),
    "a path with a line's end": ("files", {"a\n": "0" * 64}, "no plain path inside the folder"),
    "a backslash": ("files", {"a\\b": "0" * 64}, "no plain path inside the folder"),
    "a short hash": ("files", {"a": "0" * 63}, "files.a is"),
    "a hash with a line's end": ("files", {"a": "0" * 64 + "\n"}, "files.a is longer"),
    "prototypes elsewhere": ("prototypes/0/file", "../p.safetensors", "prototypes[0].file names"),
    "prototypes without labels": ("prototypes/0/labels", ["sums"], "prototypes[0] has not one label and one count"),
    "a negative prototype": ("prototypes/0/counts/0", -1, "prototypes[0].counts[0] is -1"),
    "flat prototypes": ("prototypes/0/dimensions", 0, "prototypes[0].dimensions is 0"),
    "an unknown field": ("colour", "red", 'the card has the unknown field "colour"'),
    "an unknown field of a score": (f"{SCORED}/median", 1, 'has the unknown field "median"'),
    "a gate is a text": ("gates/arrow", "x", "gates.arrow is"),
    "an odd date": ("created", "yesterday", "created is"),
    "an endless name": ("name", "x" * 300, "name is longer than 256 characters"),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_is_no_card(spoil: str) -> None:
    path, new, said = SPOILS[spoil]
    with pytest.raises(Corrupt) as caught:
        check_card(change(plain(), path, new), "here")
    assert said in caught.value.what and caught.value.where == "here"
    assert len(caught.value.what) < 300


def test_a_full_card_fits_and_comes_back_the_same() -> None:
    check_card(plain(), "here")
    check_card(FULL.to_dict(), "here")  # tuples as they are before writing
    assert ExpertCard.from_dict(plain(), where="here").to_dict() == FULL.to_dict()


def test_unknown_keys_where_the_form_is_open() -> None:
    for place in ("selection", "training", "adapter"):
        check_card(change(plain(), f"{place}/anything", {"at": ["all"]}), "here")


def test_schema_1_fits() -> None:
    old = plain() | {"schema": 1, "profile": None}
    for name in ("prototypes", "spent", "gates"):
        del old[name]
    check_card(old, "here")
    score = {"metric": "exact", "expert": dataclasses.asdict(INTERVAL), "base": dataclasses.asdict(INTERVAL)}
    old["profile"] = {"suite": "s", "suite_fingerprint": "f", "skills": {"a": score | {"expert_choice": None}}}
    check_card(old, "here")


def test_a_newer_card_is_no_damage() -> None:
    with pytest.raises(BadInput, match="newer xpert") as caught:
        check_card(plain() | {"schema": 3, "colour": "red"}, "here")
    assert not isinstance(caught.value, Corrupt)


def test_depth_and_size_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    deep: Any = []
    for _ in range(sys.getrecursionlimit() + 100):
        deep = [deep]
    with pytest.raises(Corrupt, match="nested more than 32 deep"):
        check_card(change(plain(), "training/deep", deep), "here")
    monkeypatch.setattr("xpert.registry.card_schema._MOST_VALUES", 1000)
    with pytest.raises(Corrupt, match="more than 1,000 values"):
        check_card(change(plain(), "training/wide", [0] * 1000), "here")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in inner for found in _places(part, (*path, key)))]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_the_check_passes_can_be_read(data: st.DataObject) -> None:
    """Any field replaced by anything: a card is refused, or reads without a fault and is written the same again."""
    value = plain()
    places = [path for path in _places(value) if path]
    *ways, last = data.draw(st.sampled_from(places))
    place = value
    for way in ways:
        place = place[way]
    place[last] = data.draw(json_values)
    try:
        check_card(value, "here")
    except BadInput as error:
        assert error.what
        return
    check_card(json.loads(json.dumps(ExpertCard.from_dict(value, where="here").to_dict())), "here")


FORMS: Mapping[str, type] = {
    "": ExpertCard,
    "interval": Interval,
    "consistency": Consistency,
    "score": SkillScore,
    "profile": SkillProfile,
    "prototypes": Prototypes,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_schema_names_the_fields_of_the_classes(form: str) -> None:
    schema = card_schema()["$defs"][form] if form else card_schema()
    names = {field.name for field in dataclasses.fields(FORMS[form])}
    assert set(schema["properties"]) - ({"kind", "schema"} if not form else set()) == names
    assert get_type_hints(FORMS[form], vars(cards)).keys() == names


def test_every_field_has_a_title_and_a_meaning() -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(card_schema())

    def walk(form: Mapping[str, Any]) -> None:
        for name, part in form.get("properties", {}).items():
            assert part["title"] and part["description"].endswith("."), name
            walk(part)

    walk(card_schema())
    for form in card_schema()["$defs"].values():
        assert form["title"] and form["description"]
        walk(form)


def test_the_document_holds_the_fields() -> None:
    text = (ROOT / "docs" / "registry" / "card.md").read_text(encoding="utf-8")
    assert field_tables() in text, "write the output of `xpert registry schema --markdown` into docs/registry/card.md"
    (example,) = [part.split("```")[0] for part in text.split("```json\n")[1:]]
    check_card(json.loads(example), "docs/registry/card.md")


def test_the_command_prints_it(xpert: Run) -> None:
    assert json.loads(xpert("registry", "schema").stdout) == card_schema()
    assert json.loads(xpert("registry", "schema", "--json").stdout) == card_schema()
    assert xpert("registry", "schema", "--markdown").stdout == field_tables()


def test_publishing_and_verify_apply_it(registry: Registry, expert: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = expert()
    path = folder / "expert.json"
    sound = json.loads(path.read_text())
    path.write_text(json.dumps(sound | {"licences": {"MIT": -1}}))
    with pytest.raises(Corrupt, match=r"licences\.MIT is -1"):
        registry.publish(folder, "acme/a")
    with monkeypatch.context() as patched:  # as an older xpert let it in
        patched.setattr("xpert.registry.intake.check_card", lambda value, where: None)
        registry.publish(folder, "acme/a")
    (problem,) = registry.verify()
    assert problem.where == "acme/a@1" and "licences.MIT is -1" in problem.what


@pytest.mark.parametrize("fault", ["no file", "no tensor", "another shape", "another type", None])
def test_prototypes_must_be_there(fault: str | None, registry: Registry, expert: Maker) -> None:
    folder = expert()
    rows = np.ones((2, 3), np.float16 if fault == "another type" else np.float32)
    if fault != "no file":
        save_file({"other" if fault == "no tensor" else "p": rows}, folder / "prototypes.safetensors")
    part = Prototypes("e", 4 if fault == "another shape" else 3, "prototypes.safetensors", "p", ("a", "b"), (1, 1))
    card = ExpertCard.read(folder)
    files = {**card.files}
    if fault != "no file":
        files["prototypes.safetensors"] = hash_file(folder / "prototypes.safetensors")
    dataclasses.replace(card, prototypes=(part,), files=files).write(folder)
    if fault is None:
        assert registry.publish(folder, "acme/a").version == 1
        return
    with pytest.raises(Corrupt, match="prototypes"):
        registry.publish(folder, "acme/a")
