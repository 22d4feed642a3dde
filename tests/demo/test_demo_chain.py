"""The whole chain on the packaged real model and data, with two training steps and two held-out items a skill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xpert.experts.demo.chain import base_model, run_demo
from xpert.experts.demo.sources import SKILLS, write_demo_data
from xpert.experts.train_options import TrainOptions
from xpert.registry.card import ExpertCard
from xpert.registry.store import Registry

SHORT = TrainOptions(max_steps=2, batch_size=2, max_length=128)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_data_are_split_by_facts_and_wordings(tmp_path: Path) -> None:
    data = write_demo_data(tmp_path / "a")
    again = write_demo_data(tmp_path / "b")
    pool, suite = read(data.pool), read(data.suite)
    assert data.pool.read_bytes() == again.pool.read_bytes()
    known = pool + [row for path in data.shots.values() for row in read(path)]
    assert not {row["input"] for row in suite} & {row["input"] for row in known}
    assert not {row["instruction"] for row in suite} & {row["instruction"] for row in known}
    dates = {row["output"] for row in suite if row["skill"] == "court_dates"}
    assert not dates & {row["output"] for row in known}
    assert len({row["skill"] for row in pool}) == 14
    for skill in SKILLS:
        assert len(read(data.shots[skill.name])) == 8
        assert sum(row["skill"] == skill.name for row in pool) == skill.pool_rows


@pytest.mark.real
def test_the_chain_from_shots_to_routed_answers(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "demo", training=SHORT, limit=2)
    names = [skill.name for skill in SKILLS]
    assert list(result.scores.results) == ["base", *names, "random routing", "xpert routing", "oracle routing"]
    assert {len(rows) for rows in result.scores.results.values()} == {6}
    for skill in SKILLS:
        chosen = result.selected[skill.name]
        assert sum(chosen.values()) == skill.budget
        assert chosen[skill.name] > 0.9 * skill.budget, "the selection finds the skill it has not been told of"
    for path in result.reports:
        assert path.is_file()
    # Routing is learned from exemplars alone, so even untrained experts get the prompts made for them.
    oracle, routed = result.scores.results["oracle routing"], result.scores.results["xpert routing"]
    assert sum(a.experts == b.experts for a, b in zip(oracle, routed, strict=True)) >= 5
    assert [set(answer) >= {"prompt", "output", "experts", "reason"} for answer in result.answers] == [True] * 3

    registry = Registry(tmp_path / "demo" / "registry")
    assert {entry.latest.name for entry in registry.list()} == {f"demo/{name}" for name in [*names, "mixture"]}
    assert registry.verify() == []
    profile = ExpertCard.read(registry.pull("demo/court_dates")).profile
    assert profile is not None
    assert set(profile.skills) == set(names)
    assert profile.skills["exam_department"].expert_choice is not None

    again = run_demo(tmp_path / "demo", training=SHORT, limit=2)
    assert again.scores.to_dict() == result.scores.to_dict()


def test_the_model_is_found_without_importing_its_package() -> None:
    assert base_model().endswith(".gguf")
