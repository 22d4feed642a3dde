"""The contract suite of selectors that read rows with a model: a tiny real one, whatever it is worth as a judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xpert import plugins
from xpert.data import pool_from_rows
from xpert.errors import BadInput
from xpert.features import FeatureOptions, Features
from xpert.protocols import Selection
from xpert.records import Budget, Row, Shots
from xpert.selection import choose

# Small settings under which each method does all it does.
SETTINGS: dict[str, dict[str, Any]] = {
    "adapt": {"sketch_dim": 64, "keep": "90%"},
    "kmq-iterative": {"rounds": 2, "rank": 4},
    "datainf": {"inverted_rows": 20, "rank": 4},
    "ekfac": {"factor_rows": 20},
    "less": {"epochs": 2, "rank": 4, "batch_size": 8, "sketch_dim": 256},
    "quad": {"reward_params": "epochs=1,rank=4,batch-size=8,sketch-dim=256", "batch": 2},
    "clusterucb": {"reward_params": "epochs=1,rank=4,batch-size=8,sketch-dim=256", "evaluate": "40%"},
}
MODEL_READERS = [
    name
    for name in plugins.names("selector")
    if "base" in plugins.load("selector", name).needs and "judge" not in plugins.load("selector", name).needs
]
every_reader = pytest.mark.parametrize("name", MODEL_READERS)


@pytest.fixture
def run(rows: list[Row], tiny_base: Path) -> Callable[..., Selection]:
    shots = Shots(tuple(rows[190:196]))

    def run(name: str, budget: str, *, order: Sequence[int] = range(40), base: bool = True, **more: Any) -> Selection:
        options = FeatureOptions(base=str(tiny_base) if base else None, clusters="4", max_length=128)
        pool = pool_from_rows([rows[index] for index in order])
        features = Features(pool, options, shots=shots, cache=None, device="cpu")
        plugin = plugins.load("selector", name)
        selector = plugin(plugin.Options(**SETTINGS.get(name, {})))
        return choose(selector, features, shots, Budget.parse(budget), seed=1, **more)

    return run


@every_reader
def test_budgets_seeds_and_excluded_rows(name: str, run: Callable[..., Selection]) -> None:
    found = run(name, "12", excluded=[0, 7, 9])
    assert len(set(found.rows.tolist())) == 12
    assert not set(found.rows.tolist()) & {0, 7, 9}
    assert all(found.reasons)
    assert np.isfinite(found.scores).all()
    again = run(name, "12", excluded=[0, 7, 9])
    assert again.rows.tolist() == found.rows.tolist()
    assert again.scores.tobytes() == found.scores.tobytes()
    assert list(again.log) == list(found.log)
    assert len(run(name, "40").rows) == 40


@every_reader
def test_token_budgets(name: str, run: Callable[..., Selection], rows: list[Row], tiny_base: Path) -> None:
    lengths = Features(pool_from_rows(rows[:40]), FeatureOptions(base=str(tiny_base)), cache=None).lengths()
    limit = int(lengths.sum()) // 3
    taken = run(name, f"{limit}tok").rows
    left = limit - int(lengths[taken].sum())
    assert left >= 0
    assert not any(lengths[row] <= left for row in range(40) if row not in set(taken.tolist()))


@every_reader
def test_without_a_base_it_is_said(name: str, run: Callable[..., Selection]) -> None:
    with pytest.raises(BadInput, match="--base MODEL"):
        run(name, "5", base=False)


@every_reader
def test_what_a_method_says_of_itself(name: str) -> None:
    plugin = plugins.load("selector", name)
    assert plugin.needs <= {"shots", "answers", "embeddings", "clusters", "lengths", "base", "judge"}
    assert plugin.cost
    assert plugin.source


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("quad", {"reward": "qurating", "reward_params": "pairs={}"}),
        ("clusterucb", {"reward": "qurating", "reward_params": "pairs={}"}),
        ("qdit", {"quality": "qurating", "quality_params": "pairs={}"}),
        ("dpp", {"quality": "qurating", "quality_params": "pairs={}"}),
        ("votek", {"stage": "full", "uncertainty": "qurating", "uncertainty_params": "pairs={}"}),
        ("kmq-iterative", {"progress": "qurating", "progress_params": "pairs={}"}),
        ("kmq-iterative", {"quality": "qurating", "quality_params": "pairs={}"}),
    ],
)
def test_options_tell_what_a_scorer_reads(name: str, params: dict[str, str], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    given = {key: value.format(pairs) for key, value in params.items()}
    told = []
    for text in ("one", "another"):
        pairs.write_text(text, encoding="utf-8")
        told.append(plugins.load("selector", name).Options(**given).to_dict())
    assert told[0] != told[1]
