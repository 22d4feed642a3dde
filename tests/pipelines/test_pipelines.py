"""Pipelines of steps: what they choose, that budgets are hit, and what users may get wrong in the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xpert.data import pool_from_rows
from xpert.errors import BadInput
from xpert.features import FeatureOptions, Features
from xpert.protocols import Selection
from xpert.records import Budget, Row, Shots
from xpert.selection import choose
from xpert.selectors._pipeline import make_pipeline

Steps = list[dict[str, Any]]


@pytest.fixture(scope="module")
def _features() -> dict[int, Features]:
    return {}


@pytest.fixture
def run(rows: list[Row], _features: dict[int, Features]) -> Callable[..., Selection]:
    shots = Shots(tuple(rows[190:195]))

    def run(steps: Steps, budget: str, seed: int = 0) -> Selection:
        if 0 not in _features:
            _features[0] = Features(pool_from_rows(rows[:180]), FeatureOptions(clusters="5"), shots=shots, cache=None)
        return choose(make_pipeline(steps), _features[0], shots, Budget.parse(budget), seed=seed)

    run.features = lambda: (run([{"pick": {"method": "random"}}], "1"), _features[0])[1]
    return run


def test_shares_are_of_the_whole_budget_and_picks_never_meet(run: Callable[..., Selection]) -> None:
    found = run([{"pick": {"method": "kshot", "share": "40%"}}, {"pick": {"method": "facility"}}], "50")
    assert len(set(found.rows.tolist())) == 50
    labels = [reason.split(":")[0] for reason in found.reasons]
    assert labels == ["kshot"] * 20 + ["facility"] * 30
    alone = run([{"pick": {"method": "kshot"}}], "20")
    assert found.rows[:20].tolist() == alone.rows.tolist()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(30, 400), share=st.floats(0.1, 0.9), weights=st.sampled_from(["size", "equal", None]))
def test_token_budgets_are_used_up(
    run: Callable[..., Selection], tokens: int, share: float, weights: str | None
) -> None:
    steps: Steps = [{"pick": {"method": "random", "share": f"{share:.3f}"}}, {"pick": {"method": "kcenter"}}]
    if weights:
        steps.insert(0, {"allocate": {"by": "cluster", "weights": weights}})
    found = run(steps, f"{tokens}tok")
    lengths = run.features().lengths()
    left = tokens - int(lengths[found.rows].sum())
    assert left >= 0
    assert not any(lengths[row] <= left for row in set(range(180)) - set(found.rows.tolist()))


def test_filters_hold(run: Callable[..., Selection], rows: list[Row]) -> None:
    steps: Steps = [
        {"filter": {"by": "similarity", "above-quantile": 0.5}},
        {"filter": {"by": "length", "below": 5}},
        {"filter": {"column": "licence", "among": ["MIT"]}},
        {"pick": {"method": "random"}},
    ]
    features = run.features()
    similar = (features.embeddings() @ features.shot_embeddings().T).max(axis=1).round(6)
    fits = similar >= np.quantile(similar, 0.5)
    fits &= features.lengths() <= 5
    fits &= np.array([row.columns["licence"] == "MIT" for row in rows[:180]])
    found = run(steps, str(fits.sum()))
    assert sorted(found.rows.tolist()) == np.flatnonzero(fits).tolist()
    assert (
        next(entry["dropped"] for entry in found.log if entry["step"] == "filter")
        == (similar < np.quantile(similar, 0.5)).sum()
    )
    with pytest.raises(BadInput, match=f"filters leave {fits.sum()} rows, less than the {fits.sum() + 1}"):
        run(steps, str(fits.sum() + 1))


def test_allocation_gives_every_group_its_share(run: Callable[..., Selection], rows: list[Row]) -> None:
    steps: Steps = [{"allocate": {"by": "column skill", "weights": "equal"}}, {"pick": {"method": "kshot"}}]
    found = run(steps, "25")
    skills = [rows[row].skill for row in found.rows]
    assert {skill: skills.count(skill) for skill in set(skills)} == dict.fromkeys({row.skill for row in rows}, 5)


def test_a_score_is_a_weighted_sum_and_may_be_picked_by(run: Callable[..., Selection]) -> None:
    steps: Steps = [
        {"score": {"name": "worth", "of": {"similarity": 2, "length": -1}, "scale": "none"}},
        {"pick": {"best": "worth"}},
    ]
    found = run(steps, "10")
    features = run.features()
    similar = (features.embeddings() @ features.shot_embeddings().T).max(axis=1).round(6)
    worth = 2 * similar - features.lengths()
    assert found.rows.tolist() == np.argsort(-worth.astype(np.float32), kind="stable")[:10].tolist()
    ranked: Steps = [{"score": {"name": "w", "of": {"length": 1}, "scale": "rank"}}, {"pick": {"best": "w"}}]
    longest = run(ranked, "10").rows
    assert features.lengths()[longest].min() >= np.sort(features.lengths())[-10]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a pipeline is a list of steps"),
        ("- filter: {by: similarity, above: 0.1}", "a pipeline ends with a pick"),
        ("- pick: {method: kshot}\n- pick: {method: random}", "only the last"),
        ("- pick: {method: kshot, share: 60%}\n- pick: {method: random, share: 60%}", "shares sum to 1.2"),
        ("- pick: {method: kshot, share: 100%}\n- pick: {method: random}", "nothing for the last pick"),
        ("- pick: {method: kshto}", "step 1 (pick): unknown method 'kshto'. Did you mean 'kshot'"),
        ("- pick: {method: kshot, params: {tua: 0.5}}", "unknown parameter 'tua'. Did you mean 'tau'"),
        ("- pikc: {method: kshot}", "step 1: unknown step 'pikc'. Did you mean 'pick'"),
        ("- pick: {method: kshot, shares: 1}", "unknown parameter 'shares'. Did you mean 'share'"),
        ("- pick: kshot", "pick holds `key: value` pairs"),
        ("- pick: {method: kshot, best: length}", "one of method and best"),
        ("- pick: {method: kshot, share: lots}", "share 'lots' is not understood"),
        ("- filter: {by: simlarity, above: 0}\n- pick: {method: kshot}", "Did you mean 'similarity'"),
        ("- filter: {by: similarity}\n- pick: {method: kshot}", "a filter by a score has a bound"),
        ("- filter: {duplicates: 0.9, above: 1}\n- pick: {method: kshot}", "bounds belong to a filter by a score"),
        ("- filter: {column: skill}\n- pick: {method: kshot}", "column and among go together"),
        ("- filter: {by: length, above-quantile: 3}\n- pick: {method: kshot}", "above-quantile is 3"),
        ("- score: {name: x}\n- pick: {best: x}", "a score step has a name"),
        ("- score: {name: length, of: {similarity: 1}}\n- pick: {best: length}", "the name of a scorer"),
        ("- score: {name: x, of: {similarity: much}}\n- pick: {best: x}", "must be a number"),
        ("- allocate: {by: skill}\n- pick: {method: kshot}", "allocate by 'skill' is not understood"),
        ("- filter: {by: length, below: -5}\n- pick: {method: kshot}", "leaves no row"),
        ("- filter: {column: lisence, among: [MIT]}\n- pick: {method: kshot}", "no row has a column 'lisence'"),
        ("- allocate: {by: column lisence}\n- pick: {method: random}", "no row has a column 'lisence'"),
        ("- [", "not valid YAML"),
    ],
)
def test_mistakes_in_the_file_are_said(
    text: str, said: str, xpert: Callable[..., Result], columns: Any, write_jsonl: Any, tmp_path: Path
) -> None:
    pool, shots = write_jsonl("pool.jsonl", columns(40)), write_jsonl("shots.jsonl", columns(3, seed=9))
    path = tmp_path / "steps.yaml"
    path.write_text(text, encoding="utf-8")
    result = xpert("select", pool, "--shots", shots, "--method", path, "--budget", 5, "-o", tmp_path / "out", "--quiet")
    assert result.exit_code == 2
    assert said in result.stderr
    assert str(path) in result.stderr or "leaves no row" in said or "no row has" in said
    assert not (tmp_path / "out").exists()


def test_a_pipeline_from_the_command_line(
    xpert: Callable[..., Result], columns: Any, write_jsonl: Any, tmp_path: Path
) -> None:
    pool, shots = write_jsonl("pool.jsonl", columns(80)), write_jsonl("shots.jsonl", columns(3, seed=9))
    path = tmp_path / "steps.yaml"
    steps = [
        {"filter": {"duplicates": 0.999}},
        {"pick": {"method": "kshot", "share": "40%"}},
        {"pick": {"method": "random"}},
    ]
    path.write_text(yaml.safe_dump(steps), encoding="utf-8")
    arguments = ["select", pool, "--shots", shots, "--method", path, "--budget", "10", "-o", tmp_path / "out"]
    result = xpert(*arguments, "--json", "--quiet", "--explain")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert value["rows"] == 10
    assert [entry["step"] for entry in value["log"] if "of" not in entry] == ["filter", "pick", "pick"]
    again = xpert(*arguments)
    assert "already" in again.stderr
    assert xpert(*arguments, "-p", "tau=1").stderr.startswith(f"xpert: {path}: a pipeline takes no --param")
    missing = [*arguments[:-5], tmp_path / "none.yaml", *arguments[-4:]]
    assert "no such pipeline file" in xpert(*missing).stderr


def test_a_manifest_tells_the_settings_of_every_step(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    steps: Steps = [
        {"filter": {"by": "complexity", "above": 1}},
        {"score": {"name": "worth", "of": {"length": 1, "qurating": 2}, "params": {"qurating": {"pairs": str(pairs)}}}},
        {"pick": {"method": "kmq", "share": "40%", "params": {"share": "equal"}}},
        {"pick": {"best": "worth"}},
    ]
    pairs.write_text("one", encoding="utf-8")
    first = make_pipeline(steps).written()
    assert first[0]["filter"]["params"]["measure"] == "steps"
    assert first[2]["pick"]["params"]["share"] == "equal"
    assert first[2]["pick"]["params"]["quality"]
    assert first[3]["pick"]["params"] == {}
    pairs.write_text("another", encoding="utf-8")
    assert make_pipeline(steps).written() != first
