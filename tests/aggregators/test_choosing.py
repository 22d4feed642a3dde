"""Who aggregates best: trials of one right and two wrong replies, and the command that chooses by them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests.aggregators.scripted import ScriptedEngine, encoding, text_of
from xpert.experts.aggregator_choice import Trial, score_candidates, trials_of
from xpert.protocols import Sampling
from xpert.records import Message, Row, SuiteItem


def item(id: str, answer: str, skill: str = "s") -> SuiteItem:
    return SuiteItem(Row(id, (Message("user", f"question {id}"),), answer, skill), (answer,), "exact", skill)


ITEMS = [item("i0", "zero"), item("i1", "one"), item("i2", "two", "t"), item("i3", "three")]


def test_a_trial_has_one_right_and_two_wrong_replies() -> None:
    replies = {
        "a": ["zero", "wrong a", "two", ""],
        "b": ["no", "<think>x</think> One!", "two", "also no"],
        "c": ["nil", "wrong c", "", "never"],
    }
    trials = trials_of(ITEMS, replies)
    assert [trial.item for trial in trials] == [0, 1, 2], "nobody is right on the last"
    assert set(trials[0].replies) == {"zero", "no", "nil"}
    assert set(trials[1].replies) == {"wrong a", "One!", "wrong c"}
    for trial in trials:
        assert len(trial.replies) == 3 and all(text.strip() for text in trial.replies)
        answer = ITEMS[trial.item].answers[0]
        assert [text.casefold().strip("!") == answer for text in trial.replies].index(True) == trial.right


def test_missing_wrong_replies_come_from_other_items_of_the_skill_first() -> None:
    replies = {"a": ["zero", "one", "two", "three"], "b": ["ZERO", "one", "far off", "near miss"]}
    trials = {trial.item: set(trial.replies) for trial in trials_of(ITEMS, replies)}
    assert trials[0] < {"zero", "ZERO", "one", "three", "near miss"} and len(trials[0]) == 3
    assert "far off" not in trials[0] | trials[1] | trials[3], "another skill's, and there are enough"
    assert "far off" in trials[2]


def test_an_item_without_any_wrong_reply_is_left_out() -> None:
    assert trials_of(ITEMS[:1], {"a": ["zero"], "b": ["Zero."]}) == []
    assert trials_of(ITEMS[:1], {"a": ["zero"], "b": ["no"]})[0].replies in (("zero", "no"), ("no", "zero"))


def test_the_place_of_the_right_reply_is_drawn_and_the_seed_decides() -> None:
    items = [item(f"i{n}", f"right {n}") for n in range(90)]
    replies = {
        "a": [f"right {n}" for n in range(90)],
        "b": [f"b{n}" for n in range(90)],
        "c": [f"c{n}" for n in range(90)],
    }
    places = [trial.right for trial in trials_of(items, replies, seed=1)]
    assert all(15 < places.count(place) < 45 for place in range(3))
    turned = dict(reversed(list(replies.items())))
    assert trials_of(items, turned, seed=1) == trials_of(items, replies, seed=1)
    assert [trial.right for trial in trials_of(items, replies, seed=2)] != places


def test_each_candidate_reads_all_trials_in_one_step() -> None:
    trials = [Trial(0, ("no", "zero", "nil"), 1), Trial(1, ("one", "w", "v"), 0)]

    def script(experts: str, prompt: str, sampling: Sampling) -> str:
        if experts == "b":
            return "zero" if "question i0" in prompt else "one"
        return "zero"

    engine = ScriptedEngine(script)
    found = score_candidates(engine, encoding(), ITEMS, trials, ["base", "a", "b"], Sampling(max_tokens=9))
    assert found == {"base": [1.0, 0.0], "a": [1.0, 0.0], "b": [1.0, 1.0]}
    assert engine.calls == [["base", "base", "a", "a", "b", "b"]] or len(engine.calls) == 1
    prompt = text_of(engine.requests[0].prompt_ids)
    assert prompt.index("Reply 1:\nno") < prompt.index("Reply 2:\nzero") < prompt.index("Reply 3:\nnil")


@pytest.fixture(scope="module")
def suite(three: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items whose right answer is what one of the experts says: `reversal` for all but one."""
    from tests.conftest import make_columns, to_row
    from xpert.experts.aggregating import model_encoding
    from xpert.experts.aggregator_choice import _replies
    from xpert.experts.mixture_file import load_mixture
    from xpert.experts.serving import load_engine

    items = [
        SuiteItem(row, ("x",), "exact", row.skill or "")
        for row in map(to_row, make_columns(6, seed=3, skills=("casing", "reversal")))
    ]
    lm, engine = load_engine(load_mixture(three), device="cpu", max_batch=8)
    answers = _replies(
        engine, model_encoding(lm.tokenizer, engine.context), items, ["casing", "reversal"], Sampling(max_tokens=6)
    )
    engine.close()
    path = tmp_path_factory.mktemp("suite") / "suite.jsonl"
    lines = [
        {
            "id": one.row.id,
            "prompt": one.row.prompt,
            "skill": one.skill,
            "answers": [answers["casing" if n == 0 else "reversal"][n]],
        }
        for n, one in enumerate(items)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_command_writes_a_mixture_that_aggregates(
    xpert: Callable[..., Result], three: Path, suite: Path, tmp_path: Path
) -> None:
    from xpert.experts.mixture_file import load_mixture

    out = tmp_path / "chosen.json"
    told = xpert("aggregator", "choose", three, "--on", suite, "-o", out, "--max-tokens", 6, "--json", "--quiet")
    assert told.exit_code == 0, told.stderr
    value: dict[str, Any] = json.loads(told.stdout)
    assert set(value["scores"]) == {"base", "casing", "arithmetic", "reversal"}
    means = [score["score"] for score in value["scores"].values()]
    assert means == sorted(means, reverse=True) and value["aggregator"] == next(iter(value["scores"]))
    assert value["trials"] + value["skipped"] == 6 and value["trials"] >= 5
    mixture = load_mixture(out)
    assert mixture.name == "chosen" and mixture.aggregator is not None
    assert mixture.aggregator.to_dict() == {"name": "expert", "params": {"expert": value["aggregator"]}}
    assert mixture.experts == load_mixture(three).experts
    again = xpert("aggregator", "choose", three, "--on", suite, "-o", tmp_path / "b.json", "--max-tokens", 6, "--quiet")
    assert f"{value['aggregator']} aggregates, by {value['trials']} trials" in again.stdout
    assert again.stdout.count("\n") == 5


def test_mistakes_of_choosing(
    xpert: Callable[..., Result], three: Path, suite: Path, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    hopeless = write_jsonl("h.jsonl", [{"prompt": "Say x.", "answers": ["quite impossible"]}])
    one = tmp_path / "one.json"
    value = json.loads(three.read_text())
    one.write_text(json.dumps(value | {"router_params": {"expert": "casing"}}))
    taken = tmp_path / "taken.json"
    taken.write_text("{}")
    out = tmp_path / "o.json"
    for arguments, message in [
        ((three, "--on", hopeless, "-o", out, "--max-tokens", 2), "no item of the suite has both a right and a wrong"),
        ((one, "--on", suite, "-o", out), "router fixed names one expert"),
        ((three, "--on", suite, "-o", taken), "taken.json: the output exists already"),
        ((three, "--on", suite, "-o", tmp_path), "is a folder; a mixture is a file"),
        ((tmp_path / "no.json", "--on", suite, "-o", out), "no.json: no such mixture"),
    ]:
        told = xpert("aggregator", "choose", *arguments, "--quiet")
        assert told.exit_code == 2 and message in told.stderr, told.stderr
        assert not out.exists()
