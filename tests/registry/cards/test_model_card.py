"""The model card: metadata that huggingface_hub reads back the same, and a page that no card's text can break."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.registry.card import BaseModel, ExpertCard, Interval, SkillProfile, SkillScore
from xpert.registry.hub_licences import HUB_LICENCES, hub_licence
from xpert.registry.model_card import model_card, model_card_data

GOOD, BAD = Interval(0.9, 0.8, 0.95, 40), Interval(0.2, 0.1, 0.3, 40)
FULL = ExpertCard(
    base=BaseModel("acme/tiny@main", "f" * 64, "LlamaForCausalLM"),
    adapter={"type": "LORA", "rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    name="sums",
    description="LoRA expert for sums.",
    skills=("sums", "carry"),
    selection={
        "inputs": {"pool": "a" * 64, "shots": "b" * 64},
        "config": {"method": "kshot", "budget": "500"},
        "figures": {"pool_rows": 47318, "shots": 8, "rows": 500},
        "datasets": ["acme/sums", "/etc/passwd"],
        "languages": {"en": 500, "es": 8},
    },
    training={
        "figures": {
            "rows": 508,
            "shots": 8,
            "steps": 96,
            "supervised_tokens": 5012,
            "first_loss": 2.5,
            "final_loss": 0.25,
            "trainable_parameters": 1234567,
        },
        "device": "cpu",
        "dtype": "float32",
    },
    licences={"Apache-2.0": 508},
    profile=SkillProfile(
        "suite", "e" * 64, {"sums": SkillScore("exact", GOOD, BAD, GOOD, BAD), "carry": SkillScore("f1", BAD, GOOD)}
    ),
    spent={"tokens": 123456, "seconds": 78.25},
    created="2026-01-31T12:00:00Z",
)


def head_of(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    return found


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


# ── metadata ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_hub_s_own_reader_gets_the_metadata_back() -> None:
    text = model_card(FULL, on_hub=True)
    made, read = model_card_data(FULL, on_hub=True), ModelCard(text)
    assert read.data.to_dict() == made.to_dict() == head_of(text)
    assert str(read) == text
    assert read.data.eval_results == made.eval_results


def test_the_fields_are_those_the_hub_documents() -> None:
    head = head_of(model_card(FULL, on_hub=True))
    assert head["library_name"] == "peft" and head["pipeline_tag"] == "text-generation"
    assert head["base_model"] == "acme/tiny" and head["base_model_relation"] == "adapter"
    assert head["tags"] == ["base_model:adapter:acme/tiny", "lora", "peft", "xpert"]
    assert head["license"] == "apache-2.0" and "license_name" not in head
    assert head["datasets"] == ["acme/sums"] and head["language"] == ["en", "es"]
    assert head["metrics"] == ["exact_match", "accuracy", "f1"]
    assert set(head) <= {
        *("base_model", "base_model_relation", "datasets", "language", "library_name", "license", "license_name"),
        *("metrics", "model-index", "pipeline_tag", "tags"),
    }


def test_the_model_index_tells_expert_and_base_apart() -> None:
    index = head_of(model_card(FULL, on_hub=True))["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == "sums" and eval_results_to_model_index(name, results) == index
    told = {(r.task_name, r.metric_name): (r.metric_type, r.metric_value) for r in results}
    assert told == {
        ("sums", "exact"): ("exact_match", 0.9),
        ("sums", "exact of the base model alone"): ("exact_match", 0.2),
        ("sums", "accuracy by likelihood of choices"): ("accuracy", 0.9),
        ("sums", "accuracy by likelihood of choices of the base model alone"): ("accuracy", 0.2),
        ("carry", "f1"): ("f1", 0.2),
        ("carry", "f1 of the base model alone"): ("f1", 0.9),
    }
    assert {r.task_type for r in results} == {"text-generation"} and {r.dataset_type for r in results} == {"suite"}
    assert results[0].metric_args == {"items": 40, "interval_95": [0.8, 0.95]}
    assert results[0].dataset_args == {"fingerprint": "e" * 64}


def test_without_scores_there_is_no_index_and_a_path_is_no_base() -> None:
    bare = ExpertCard(BaseModel("/srv/models/tiny", "f" * 64), {"rank": 1})
    head = head_of(model_card(bare, on_hub=False))
    assert head == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "peft", "xpert"]}


LICENCES: list[tuple[Mapping[str, int], dict[str, str]]] = [
    ({"MIT": 3}, {"license": "mit"}),
    ({"CC0-1.0": 3}, {"license": "cc0-1.0"}),
    ({"Apache 2.0": 3, "apache-2.0": 1, "Apache": 2}, {"license": "apache-2.0"}),
    ({"CC BY-SA 4.0": 3}, {"license": "cc-by-sa-4.0"}),
    ({"GPL-3.0-or-later": 3}, {"license": "gpl-3.0"}),
    ({"OpenRAIL++": 1}, {"license": "openrail++"}),
    ({"Acme Terms: v2\n": 3}, {"license": "other", "license_name": "acme-terms-v2"}),
    ({"other": 3}, {"license": "other", "license_name": "other"}),
    ({"MIT": 3, "CC0-1.0": 0}, {"license": "mit"}),
    ({"MIT": 3, "CC0-1.0": 1}, {}),
    ({"MIT": 3, "unknown": 1}, {}),
    ({"unknown": 3}, {}),
    ({"***": 3}, {}),
    ({}, {}),
]


@pytest.mark.parametrize(("licences", "found"), LICENCES)
def test_licences(licences: Mapping[str, int], found: dict[str, str]) -> None:
    assert hub_licence(licences) == found
    assert found.get("license", "mit") in HUB_LICENCES


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_tells_all() -> None:
    text = model_card(FULL, on_hub=True)
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    wanted = "What it is for/How to load it/Where it came from/Scores/Licences/What it cost/Limits"
    assert titles == wanted.split("/")
    for row in (
        "| base model | acme/tiny (`ffffffffffff`) |",
        "| selected by | kshot |",
        "| budget | 500 |",
        "| shots | 8 (`bbbbbbbbbbbb`) |",
        "| pool | 47,318 rows (`aaaaaaaaaaaa`) |",
        "| rows trained on | 508, of them 8 shots |",
        "| loss | 2.500 at first, 0.250 at last |",
        "| adapter | rank 8, alpha 16, on q_proj, v_proj |",
        "| sums | exact | 40 | 20.0 [10, 30] | 90.0 [80, 95] |",
        "| sums | likeliest choice | 40 | 20.0 [10, 30] | 90.0 [80, 95] |",
        "| carry | f1 | 40 | 90.0 [80, 95] | 20.0 [10, 30] |",
        "| Apache-2.0 | 508 |",
        "| tokens read in all | 123,456 |",
        "| seconds in all | 78.2 |",
    ):
        assert row in text, row
    assert "does worse than the base model alone on carry." in section(text, "Limits")
    assert "It is meant for sums, carry." in text
    compile(section(text, "How to load it").split("```")[1].removeprefix("python\n"), "card", "exec")


def test_what_is_not_known_is_said() -> None:
    text = model_card(ExpertCard(BaseModel("b", "f"), {}, licences={"unknown": 7}), on_hub=False)
    assert "have not stated what it is meant for" in text and "has not been scored" in text
    assert "| tokens read in all | not known |" in text and "7 of the rows" in text
    assert "## Scores" not in text and text.count("# expert\n") == 1


def test_no_path_of_the_maker_s_machine_is_shown() -> None:
    private = "/srv/private/bob"
    assert FULL.profile is not None
    card = dataclasses.replace(
        FULL,
        base=BaseModel(f"{private}/models/tiny/", "f" * 64),
        profile=dataclasses.replace(FULL.profile, suite=f"{private}/suite.jsonl"),
        selection={"source": f"{private}/rows.jsonl", "config": {"method": f"{private}/steps.yaml"}},
    )
    text = model_card(card, on_hub=False)
    assert private not in text and "bob" not in text
    assert 'from_pretrained("tiny")' in text and "suite.jsonl" in text and "| selected by | steps.yaml |" in text
    windows = dataclasses.replace(card, base=BaseModel(r"C:\Users\bob\tiny", "f" * 64))
    assert "bob" not in model_card(windows, on_hub=False)


def test_merges_name_their_members() -> None:
    training = {
        "method": "merge by svd",
        "experts": [{"key": "a|b", "weight": 0.5}, {"key": "c", "weight": 1}, "?"],
        "error": {"total": 0.0123},
    }
    text = model_card(dataclasses.replace(FULL, training=training, selection={}), on_hub=True)
    assert r"| merged of (weight) | a\|b (0.5), c (1) |" in text and "| made by | merge by svd |" in text
    assert "| relative error against the weighted sum | 0.0123 |" in text
    unknown = dataclasses.replace(FULL, training={**training, "error": {"total": None}})
    assert "weighted sum | undefined |" in model_card(unknown, on_hub=True)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.append(tag)


EVIL = [
    "<script>alert(1)</script>",
    "a | b | c\n| d | e |",
    "[click](javascript:alert(1)) ![x](http://a.b/c.png)",
    "---\nlicense: mit\n---",
    "```\n# heading\n```",
    "x\n\n## Limits\n\n- none",
    "\u202egnp.exe \u2028 \x00\x1b[31m \ud800",
    "*bold* _slanted_ ~~gone~~ `code` $x$ \\",
    "<!-- hidden -->",
    "1. one",
    "- item",
    "no",
    "''\"\": {}",
    "../../etc",
    " ",
]


def spoilt(text: str) -> ExpertCard:
    """A card whose every text is this one."""
    score = SkillScore(text, GOOD, BAD, GOOD, BAD)
    return ExpertCard(
        base=BaseModel(text or "b", text or "f", text),
        adapter={"rank": text, "alpha": text, "target_modules": [text, 7]},
        name=text,
        description=text,
        skills=(text,),
        selection={
            "inputs": {"pool": text, "shots": text},
            "config": {"method": text, "budget": text},
            "figures": {"pool_rows": text, "shots": text},
            "source": text,
            "datasets": [text, 3],
            "languages": {text: 1},
        },
        training={
            "method": text,
            "device": text,
            "dtype": text,
            "figures": {"rows": text, "steps": text, "loss": text},
        },
        licences={text: 3},
        profile=SkillProfile(text, text, {text: score}),
        created=text,
    )


def check_page(card: ExpertCard, on_hub: bool) -> None:
    text = model_card(card, on_hub=on_hub)
    text.encode()  # no halves of characters
    read = ModelCard(text)
    assert read.data.to_dict() == model_card_data(card, on_hub=on_hub).to_dict() == head_of(text)
    body = read.text
    parser = Tags()
    parser.feed(re.sub(r"^```python$.*?^```$", "", body, flags=re.MULTILINE | re.DOTALL))
    assert parser.found == []
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u2028\u2029\u202a-\u202e]", text)
    assert len(re.findall(r"^## ", body, re.MULTILINE)) == 7 and len(re.findall(r"^# ", body, re.MULTILINE)) == 1
    assert body.count("```") % 2 == 0 and len(re.findall(r"^```", body, re.MULTILINE)) == 2
    widths = {5} | {2}
    for line in body.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) - 1 in widths, line
    assert not re.search(r"(?<!\\)\]\(", body.split("## How to load it")[0])


@pytest.mark.parametrize("text", EVIL)
def test_no_text_can_break_the_page(text: str) -> None:
    for on_hub in (True, False):
        check_page(spoilt(text), on_hub)


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab|\\`<>&*_[]()#-+!~$:/.'\"\n\r\t\0{}%@1 \u2028é日"), max_size=20), st.booleans())
def test_any_text_can_not(text: str, on_hub: bool) -> None:
    check_page(spoilt(text), on_hub)
