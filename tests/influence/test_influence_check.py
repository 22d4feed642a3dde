"""`xpert influence check` on a small real model: figures, resuming, and what a user may get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from xpert.array_cache import ArrayCache
from xpert.influence import retraining as retraining_module
from xpert.influence.retraining import RetrainingOptions, Trainer
from xpert.language_model import load_model
from xpert.records import Row

Run = Callable[..., Result]
SMALL = ("--rows", "10", "--subsets", "4", "--trainings", "2", "--steps", "2", "--batch-size", "4", "--device", "cpu")


@pytest.fixture
def places(
    tmp_path: Path, tiny_base: Path, columns: Callable[..., Any], write_jsonl: Callable[..., Path]
) -> dict[str, Path]:
    rows, held_out = columns(40), columns(20, seed=5, skills=("arithmetic", "casing"))
    long = [{**row, "instruction": "word " * 400} for row in rows[:12]]
    suite = [{"prompt": row["instruction"], "answers": [row["output"]], "skill": row["skill"]} for row in held_out]
    plain = [{key: value for key, value in row.items() if key != "skill"} for row in held_out[:4]]
    return {
        "pool": write_jsonl("pool.jsonl", rows),
        "shots": write_jsonl("shots.jsonl", held_out[:4]),
        "targets": write_jsonl("targets.jsonl", held_out[10:16]),
        "other": write_jsonl("other.jsonl", held_out[10:16:2]),
        "long": write_jsonl("long.jsonl", long),
        "plain": write_jsonl("plain.jsonl", plain),
        "suite": write_jsonl("suite.jsonl", suite[10:]),
        "base": tiny_base,
    }


def check(xpert: Run, places: dict[str, Path], *more: object, pool: str = "pool", shots: str = "shots") -> Result:
    common = ("--base", places["base"], "--max-length", "128", *SMALL)
    return xpert("influence", "check", places[pool], "--shots", places[shots], *common, *more)


def test_methods_are_compared_on_the_same_trainings_and_resumed(
    xpert: Run, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer._train
    done: list[int] = []

    def stopped(self: Trainer, rows: Any, seed: int, progress: Any) -> Any:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(seed)
        return whole(self, rows, seed, progress)

    monkeypatch.setattr(Trainer, "_train", stopped)
    assert check(xpert, places, "--method", "similarity").exit_code == 130
    monkeypatch.setattr(Trainer, "_train", whole)
    counted: list[int] = []
    monkeypatch.setattr(
        Trainer, "_train", lambda self, rows, seed, progress: counted.append(seed) or whole(self, rows, seed, progress)
    )
    first = check(xpert, places, "--method", "similarity,ekfac", "-p", "ekfac.factor-rows=8", "--json", "--quiet")
    assert first.exit_code == 0, first.output
    assert len(counted) == 1 + 4 * 2 - 5
    found = json.loads(first.stdout)
    assert [method["name"] for method in found["methods"]] == ["similarity", "ekfac"]
    assert found["targets"] == ["skill arithmetic", "skill casing"]
    assert (found["rows"], found["subset_rows"], found["subsets"], found["steps"]) == (10, 5, 4, 2)
    for method in found["methods"]:
        assert method["score"]["low"] <= method["score"]["value"] <= method["score"]["high"]
        assert method["score"]["value"] == pytest.approx(np.mean(list(method["targets"].values())))
    counted.clear()
    shown = check(xpert, places, "--method", "length,similarity", "--quiet")
    assert shown.exit_code == 0, shown.output
    assert not counted
    assert "random scores" in shown.stdout and "no method can be expected above" in shown.stdout
    line = next(line for line in shown.stdout.splitlines() if line.startswith("similarity"))
    assert f"{found['methods'][0]['score']['value']:.2f}" in line


@pytest.mark.parametrize("source", ["targets", "suite"])
def test_the_loss_may_be_that_of_held_out_rows(xpert: Run, places: dict[str, Path], source: str) -> None:
    own = check(xpert, places, "--method", "length", "--json", "--quiet")
    held_out = check(xpert, places, "--method", "length", f"--{source}", places[source], "--json", "--quiet")
    assert held_out.exit_code == 0, held_out.output
    first, second = json.loads(own.stdout), json.loads(held_out.stdout)
    assert second["targets"] == first["targets"]
    assert second["loss_before"] != first["loss_before"]


def test_training_on_a_target_lowers_its_loss_and_nothing_is_left_in_the_model(
    tiny_base: Path, rows: list[Row], tmp_path: Path
) -> None:
    options = RetrainingOptions(steps=12, batch_size=4, learning_rate=1e-2)
    trainer = Trainer(
        lambda: load_model(str(tiny_base), device="cpu"), "x", rows[:3], options, 128, ArrayCache(tmp_path)
    )
    before, after = trainer.losses([], 0), trainer.losses(rows[:3], 0)
    assert (after < before).all()
    assert np.array_equal(trainer._train([], 0, retraining_module.SILENT), before)
    assert np.array_equal(trainer._train(rows[:3], 0, retraining_module.SILENT), after)
    assert not np.array_equal(trainer.losses(rows[:3], 1), after)


# more words of the command -> a part of the one line
MISTAKES: dict[str, str] = {
    "--method ekfc": "Did you mean 'ekfac'?",
    "--method facility": "unknown scorer 'facility'",
    "--method length,length": "names length twice",
    "--method length,": "names nothing",
    "-p less.epochs=2 --method length": "of none of the methods",
    "-p length=2 --method length": "of none of the methods",
    "-p length.odrer=x --method length": "method length: unknown parameter 'odrer'",
    "--method length --share 1.5": "share is 1.5; the most is 0.99",
    "--method length --share 0.01": "a share of 0.01 of 10 rows is 0",
    "--method length --subsets 3": "subsets is 3; the least is 4",
    "--method length --subsets 300": "there are not 300 different ones",
    "--method length --rows 300": "300 rows are wanted, but the pool holds 40",
    "--method length --learning-rate 0": "the trainings changed nothing",
    "--method length --targets {targets} --suite {suite}": "both say whose loss counts",
    "--method length --targets {other}": "no target is of skill casing",
    "--method length --targets {long}": "has no room for its answer in 128 tokens",
    "--method length --group topic": "has no column 'topic'",
    "--method ekfac -p ekfac.layers=q_porj": "unknown layer 'q_porj'",
    "--method length --layers q_porj": "unknown layer 'q_porj'",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words: str, xpert: Run, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    if "--method ekfac" not in words and "learning-rate" not in words and "long" not in words:
        monkeypatch.setattr(Trainer, "losses", lambda self, rows, seed, progress=None: _made_up(self, rows))
    if "--layers" in words:
        monkeypatch.undo()
    result = check(xpert, places, *words.format(**places).split(), "--quiet")
    assert result.exit_code == 2, (result.output, result.exception)
    assert MISTAKES[words] in result.stderr
    assert len(result.stderr.splitlines()) == 1


def _made_up(trainer: Trainer, rows: list[Row]) -> Any:
    return np.random.default_rng(len(rows[0].id) if rows else 0).random(len(trainer._targets), np.float32)


def test_pools_without_enough_room_are_said(xpert: Run, places: dict[str, Path]) -> None:
    result = check(xpert, places, "--method", "length", "--quiet", pool="long")
    assert result.exit_code == 2
    assert "the pool holds 0 that do not overlap the shots and have room" in result.stderr


def test_a_method_that_gives_no_score_is_refused(
    xpert: Run, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpert.selectors.scorers.length import PLUGIN

    monkeypatch.setattr(PLUGIN, "score", lambda self, rows: np.full(len(rows), np.nan, np.float32))
    monkeypatch.setattr(PLUGIN, "explain", lambda self, row: "too odd")
    monkeypatch.setattr(Trainer, "losses", lambda self, rows, seed, progress=None: _odd(self, rows))
    result = check(xpert, places, "--method", "length", "--quiet")
    assert result.exit_code == 2
    assert "length gives row r0" in result.stderr and "no score: too odd" in result.stderr


def _odd(trainer: Trainer, rows: list[Row]) -> Any:
    return np.full(len(trainer._targets), sum(int(row.id[1:]) for row in rows), np.float32)
