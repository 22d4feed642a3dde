"""Shots that are prompts alone: what reads no answers chooses by them as by labelled ones, the rest refuses by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from xpert import plugins
from xpert.comparison import compare
from xpert.data import pool_from_rows, read_shots
from xpert.errors import BadInput
from xpert.experts.training_data import gather_rows
from xpert.features import FeatureOptions
from xpert.pool import Pool
from xpert.records import Row, Shots
from xpert.selection import read_selection, select

SELECTORS = {name: plugins.load("selector", name) for name in plugins.names("selector")}
READS_ANSWERS = sorted(name for name, plugin in SELECTORS.items() if "answers" in plugin.needs)
PROMPTS_ONLY = sorted(
    name for name, plugin in SELECTORS.items() if not plugin.needs & {"answers", "base", "judge"} and name != "qurating"
)
ASKED_FOR: list[tuple[str, dict[str, str]]] = [
    *((name, {}) for name in PROMPTS_ONLY),
    ("dsir", {"text": "prompt"}),
    ("facility", {"mode": "shots"}),
    ("kmq", {"quality": "shots"}),
    ("quad", {"reward": "similarity"}),
    ("quad", {"reward": "dsir", "reward_params": "text=prompt"}),
]


@pytest.fixture
def pool(rows: list[Row]) -> Pool:
    return pool_from_rows(rows[:60])


@pytest.fixture
def labelled(rows: list[Row]) -> Shots:
    return Shots(tuple(row for row in rows[100:] if row.skill == "casing")[:4])


@pytest.fixture
def asked(labelled: Shots) -> Shots:
    return Shots(tuple(dataclasses.replace(row, response="") for row in labelled))


def chosen(pool: Pool, shots: Shots, out: Path, method: str, params: dict[str, str]) -> list[str]:
    found = select(pool, shots=shots, method=method, params=params, budget="6", out=out, report=False)
    return [row.id for row in found.rows]


def test_those_that_read_answers_are_the_ones_known() -> None:
    assert READS_ANSWERS == ["datainf", "dsir", "ekfac", "less"]
    assert {"kshot", "mmr", "similarity", "kcenter"} <= set(PROMPTS_ONLY)


@pytest.mark.parametrize(("method", "params"), ASKED_FOR)
def test_a_method_that_reads_prompts_chooses_as_by_labelled_shots(
    pool: Pool, labelled: Shots, asked: Shots, tmp_path: Path, method: str, params: dict[str, str]
) -> None:
    one, two = (chosen(pool, shots, tmp_path / name, method, params) for name, shots in (("a", labelled), ("b", asked)))
    assert one == two
    assert len(one) == 6


@pytest.mark.parametrize("method", READS_ANSWERS)
def test_a_method_that_reads_answers_refuses_by_name(pool: Pool, asked: Shots, tmp_path: Path, method: str) -> None:
    message = f"'{method}' reads the shots' answers, and 4 of 4 shots have none, as r"
    with pytest.raises(BadInput, match=message) as told:
        select(pool, shots=asked, method=method, budget="6", out=tmp_path / "out")
    assert "fill them in, or use a method that reads prompts alone" in (told.value.hint or "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "params"),
    [("quad", {"reward": "dsir"}), ("clusterucb", {"reward": "dsir"}), ("dpp", {"quality": "dsir"})],
)
def test_a_scorer_inside_a_method_refuses_by_its_own_name(
    pool: Pool, asked: Shots, tmp_path: Path, method: str, params: dict[str, str]
) -> None:
    with pytest.raises(BadInput, match="'dsir' reads the shots' answers"):
        select(pool, shots=asked, method=method, params=params, budget="6", out=tmp_path / "out")


def test_a_pipeline_refuses_for_its_parts(pool: Pool, asked: Shots, tmp_path: Path) -> None:
    steps = tmp_path / "steps.yaml"
    steps.write_text("steps:\n  - pick: {best: dsir}\n")
    with pytest.raises(BadInput, match="reads the shots' answers"):
        select(pool, shots=asked, method=str(steps), budget="6", out=tmp_path / "out", report=False)
    steps.write_text("steps:\n  - pick: {method: dsir, params: {text: prompt}}\n")
    found = select(pool, shots=asked, method=str(steps), budget="6", out=tmp_path / "out", report=False)
    assert len(found.rows) == 6


@pytest.mark.parametrize("field", ["response", "both"])
def test_embedding_what_is_not_there_is_refused(pool: Pool, asked: Shots, tmp_path: Path, field: str) -> None:
    options = FeatureOptions(embed_field=field)
    with pytest.raises(BadInput, match="shot r00101 has no answer to compare with"):
        select(pool, shots=asked, method="kshot", features=options, budget="6", out=tmp_path / "out")


def test_one_unanswered_shot_is_enough(pool: Pool, labelled: Shots, asked: Shots, tmp_path: Path) -> None:
    mixed = Shots((*labelled.rows[:3], asked.rows[3]))
    with pytest.raises(BadInput, match="1 of 4 shots have none"):
        select(pool, shots=mixed, method="dsir", budget="6", out=tmp_path / "out")


def test_a_comparison_refuses_before_any_method_is_run(pool: Pool, asked: Shots, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'less' reads the shots' answers"):
        compare(pool, ["kshot", "less"], shots=asked, budget="6", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_leaves_them_out_and_remembers_them(pool: Pool, labelled: Shots, asked: Shots, tmp_path: Path) -> None:
    mixed = Shots((*labelled.rows[:1], *asked.rows[1:]))
    found = select(pool, shots=mixed, method="kshot", budget="6", out=tmp_path / "out", report=False)
    data = gather_rows(found.path, use_shots=True, hold_out="0", seed=0)
    assert data.shots == 1 and len(data.rows) == 7 and all(row.response for row in data.rows)
    assert [row.prompt for row in data.unanswered] == [row.prompt for row in asked.rows[1:]]
    assert data.selection["unanswered_shots"] == 3
    assert gather_rows(found.path, use_shots=False, hold_out="0", seed=0).unanswered == ()


def test_the_command_takes_a_file_of_prompts(
    xpert: Callable[..., Result], write_jsonl: Callable[..., Path], columns: Any, tmp_path: Path
) -> None:
    source = write_jsonl("pool.jsonl", columns(60))
    prompts = [{"prompt": f"{row['instruction']}\n\n{row['input']}"} for row in columns(4, seed=5, skills=("casing",))]
    shots = write_jsonl("shots.jsonl", prompts)
    result = xpert("select", source, "--shots", shots, "--budget", 5, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "4 of 4 shots have no answer: they steer the selection" in result.stderr
    found = read_selection(tmp_path / "out")
    assert found.shots is not None and len(found.shots.unanswered) == 4
    assert {row.skill for row in found.rows} == {"casing"}
    refused = xpert("select", source, "--shots", shots, "--budget", 5, "-o", tmp_path / "o2", "--method", "less")
    assert refused.exit_code == 2 and len(refused.stderr.strip().splitlines()) == 1
    assert "method 'less' reads the shots' answers" in refused.stderr
    with pytest.raises(BadInput):
        read_shots(shots)


def test_an_expert_keeps_unanswered_shots_as_exemplars(labelled: Shots, asked: Shots, rows: list[Row]) -> None:
    from xpert.experts.expert_folder import _exemplars
    from xpert.experts.training_data import TrainingRows, skills_of

    data = TrainingRows(tuple(rows[:3]), 0, (), {}, asked.rows)
    lines = [json.loads(line) for line in _exemplars(rows[:3], data).splitlines()]
    assert [line["kind"] for line in lines] == ["shot"] * 4 + ["row"] * 3
    assert [line["prompt"] for line in lines[:4]] == [row.prompt for row in asked]
    assert skills_of(data) == ("casing",)
    assert data.fingerprint != TrainingRows(tuple(rows[:3]), 0, (), {}).fingerprint
