"""What cards say of where an expert came from: the selection behind it, what was spent, languages and datasets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xpert.experts.spending import in_all, spent_of, spent_on_selection
from xpert.experts.train import TrainOptions, train
from xpert.experts.training_data import gather_rows, languages_of
from xpert.pool_build import build_pool
from xpert.records import Message, Row, Shots
from xpert.registry.card import BaseModel, ExpertCard
from xpert.registry.card_schema import check_card
from xpert.selection import select
from xpert.selection_folder import write_jsonl, write_rows
from xpert.storage import MANIFEST, hash_file, read_json, write_json, write_manifest

QUICK = TrainOptions(batch_size=4, rank=2, alpha=4, max_steps=2, epochs=1.0)


@pytest.fixture
def chosen(tmp_path: Path, write_jsonl: Callable[..., Path], columns: Callable[..., list[dict[str, Any]]]) -> Path:
    """A real selection of 6 rows from a pool of 60 by 4 shots; all rows say that they are English."""
    spoken = [{**row, "language": "en-GB"} for row in columns(60)]
    pool = build_pool([write_jsonl("rows.jsonl", spoken)], tmp_path / "pool")
    shots = write_jsonl("shots.jsonl", [{**row, "lang": "en"} for row in columns(4, seed=9, skills=("casing",))])
    select(pool, shots=shots, budget="6", out=tmp_path / "chosen", report=False)
    return tmp_path / "chosen"


def test_a_trained_expert_s_card_is_complete(chosen: Path, tiny_base: Path, tmp_path: Path) -> None:
    folder = train(chosen, str(tiny_base), tmp_path / "expert", QUICK, device="cpu")
    check_card(read_json(folder / "expert.json"), "here")
    card, manifest = ExpertCard.read(folder), read_json(chosen / MANIFEST)
    said = card.selection
    assert said["inputs"] == manifest["inputs"] and said["inputs"]["shots"] and said["inputs"]["pool"]
    assert said["config"]["method"] == "kshot" and said["config"]["budget"] == "6"
    assert (said["figures"]["pool_rows"], said["figures"]["shots"], said["figures"]["rows"]) == (60, 4, 6)
    assert (said["seed"], said["created"]) == (0, manifest["created"])
    assert said["languages"] == {"en": 10}
    assert card.base.fingerprint and card.adapter["rank"] == 2 and card.training["options"]["max_steps"] == 2
    assert sum(card.licences.values()) == 10
    figures = card.training["figures"]
    assert card.spent["tokens"] == figures["tokens"] > 0
    selecting = sum(manifest["timings"].values())
    assert card.spent["seconds"] == pytest.approx(figures["seconds"] + selecting, abs=0.01)
    text = (folder / "README.md").read_text()
    for told in (
        "| selected by | kshot |",
        "| budget | 6 |",
        "| shots | 4 (`",
        "| pool | 60 rows (`",
        "language:\n- en\n",
    ):
        assert told in text
    assert str(tmp_path) not in text and str(tiny_base.parent) not in text


def test_an_old_selection_still_trains(tiny_base: Path, rows: list[Row], tmp_path: Path) -> None:
    """As selections were written before they told of figures, timings and sources."""
    folder = tmp_path / "old"
    folder.mkdir()
    write_jsonl(folder / "selected.jsonl", ({**row.columns, "_xpert": {"rank": 1}} for row in rows[:6]))
    write_rows(folder / "rows.jsonl", rows[:6])
    write_rows(folder / "shots.jsonl", Shots(tuple(rows[50:52])), columns=True)
    write_manifest(folder, "selection", inputs={"pool": "p"}, config={"method": "kshot"}, seed=3)
    manifest = read_json(folder / MANIFEST)
    for name in ("figures", "timings", "created", "versions"):
        del manifest[name]
    write_json(folder / MANIFEST, manifest)
    expert = train(folder, str(tiny_base), tmp_path / "expert", QUICK, device="cpu")
    check_card(read_json(expert / "expert.json"), "here")
    card = ExpertCard.read(expert)
    assert card.selection["config"] == {"method": "kshot"} and "figures" not in card.selection
    assert set(card.spent) == {"tokens"}  # the seconds of the selection are not known, so neither is their sum
    assert "seconds in all | not known" in (expert / "README.md").read_text()


def test_gate_vectors_add_to_what_was_spent(chosen: Path, tiny_base: Path, tmp_path: Path) -> None:
    from xpert.experts.gate_options import GateOptions
    from xpert.experts.gate_vectors import add_gate

    folder = train(chosen, str(tiny_base), tmp_path / "expert", QUICK, device="cpu")
    before = ExpertCard.read(folder).spent
    note = add_gate(folder, chosen, "phatgoose", GateOptions(steps=2, batch_size=4), device="cpu")
    after = ExpertCard.read(folder).spent
    assert note["figures"]["tokens"] > 0
    assert after["tokens"] == before["tokens"] + note["figures"]["tokens"]
    assert after["seconds"] == pytest.approx(before["seconds"] + note["figures"]["seconds"], abs=0.01)
    check_card(read_json(folder / "expert.json"), "here")


def test_a_pipeline_s_file_is_named_without_its_path(chosen: Path) -> None:
    manifest = read_json(chosen / MANIFEST)
    manifest["config"]["method"] = "/somewhere/private/steps.yaml"
    manifest["figures"]["sources"] = ["hf:acme/sums:main:train", "rows.jsonl", "hf:acme/sums:main:test", "hf:words"]
    write_json(chosen / MANIFEST, manifest)
    said = gather_rows(chosen, use_shots=True, hold_out="0", seed=0).selection
    assert said["config"]["method"] == "steps.yaml"
    assert said["datasets"] == ["acme/sums", "words"]
    assert "sources" not in said["figures"] and "files" not in said["figures"]


def test_the_pool_s_sources_reach_the_selection(chosen: Path, tmp_path: Path) -> None:
    assert read_json(chosen / MANIFEST)["figures"]["sources"] == ["rows.jsonl"]
    whole = gather_rows(tmp_path / "pool", use_shots=False, hold_out="0", seed=0).selection
    assert whole["source"] == "pool" and "datasets" not in whole


@pytest.mark.parametrize(
    ("columns_of", "found"),
    [
        ([{"language": "en"}, {"Lang": "DE-at"}, {"lang": "en_US"}], {"en": 2, "de": 1}),
        ([{"language": "en"}, {}], {}),
        ([{"language": "English"}], {}),
        ([{"language": None, "lang": "fra"}], {"fra": 1}),
        ([], {}),
    ],
)
def test_languages(columns_of: list[dict[str, Any]], found: dict[str, int]) -> None:
    rows = [Row(str(i), (Message("user", "x"),), "y", None, columns) for i, columns in enumerate(columns_of)]
    assert languages_of(rows) == found


def test_sums_leave_out_what_a_part_does_not_know() -> None:
    assert in_all([{"tokens": 3, "seconds": 0.5}, {"tokens": 4, "seconds": 1}]) == {"tokens": 7, "seconds": 1.5}
    assert in_all([{"tokens": 3, "seconds": 0.5}, {"tokens": None, "seconds": 1}]) == {"seconds": 1.5}
    assert in_all([{"tokens": 3}, {}]) == {}


def test_what_older_cards_say_was_spent() -> None:
    old = ExpertCard(BaseModel("b", "f"), {}, training={"figures": {"tokens": 5, "seconds": 2.0, "loss": 1}})
    assert spent_of(old) == {"tokens": 5, "seconds": 2.0}
    assert spent_of(ExpertCard(BaseModel("b", "f"), {}, training={"figures": []})) == {}
    assert spent_of(ExpertCard(BaseModel("b", "f"), {}, spent={"tokens": 1})) == {"tokens": 1}
    assert spent_on_selection({"source": "x"}) == {"tokens": 0, "seconds": 0}
    assert spent_on_selection({"config": {}}) == {"tokens": 0, "seconds": None}


def test_the_card_s_hashes_are_of_what_lies_there(chosen: Path, tiny_base: Path, tmp_path: Path) -> None:
    folder = train(chosen, str(tiny_base), tmp_path / "expert", QUICK, device="cpu")
    card = json.loads((folder / "expert.json").read_text())
    assert card["files"] == {p.name: hash_file(p) for p in folder.iterdir() if p.name != "expert.json"}
