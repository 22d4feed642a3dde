"""The scorers less and grand: planted rows, groups, order, and the mistakes that are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xpert import plugins
from xpert.data import pool_from_rows
from xpert.errors import BadInput
from xpert.features import FeatureOptions, Features
from xpert.influence.grouping import shot_groups
from xpert.records import Message, Row, Shots
from xpert.selectors._influence import warm_up_rows

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8}


@pytest.fixture
def score(tiny_base: Path) -> Callable[..., Any]:
    """Scores of `rows` by a scorer: `score("less", rows, shots, **parameters)`; with `explain`, its words too.

    In float32, as they are compared to the last digits: `auto` is bfloat16 on processors that multiply in it.
    """

    def score(name: str, rows: Sequence[Row], shots: Sequence[Row], explain: int | None = None, **more: Any) -> Any:
        max_length = more.pop("max_length", 128)
        features = Features(
            pool_from_rows(list(rows)),
            FeatureOptions(base=str(tiny_base), max_length=max_length),
            shots=Shots(tuple(shots)),
            cache=None,
            device="cpu",
        )
        plugin = plugins.load("scorer", name)
        exact = {"dtype": "float32"} if "dtype" in {field.name for field in dataclasses.fields(plugin.Options)} else {}
        scorer = plugin(plugin.Options.from_mapping({**exact, **(QUICK if name == "less" else {}), **more}))
        scorer.prepare(features, features.shots, np.random.default_rng(0))
        found = scorer.score(np.arange(len(rows)))
        return found if explain is None else (found, scorer.explain(explain))

    return score


@pytest.mark.parametrize(
    "settings",
    [
        {"form": "plain"},
        {"form": "plain", "sketch_dim": 0},
        {"form": "plain", "warmup": 0},
        {"form": "plain", "sketch": "countsketch", "ckpts": "last"},
    ],
)
def test_a_shot_in_the_pool_ranks_first(settings: dict[str, Any], rows: list[Row], score: Callable[..., Any]) -> None:
    shots = [rows[100]]
    planted = [*rows[:30], Row("copy", rows[100].messages, rows[100].response), *rows[30:40]]
    found = score("less", planted, shots, **settings)
    assert found.argmax() == 30
    assert found[30] == pytest.approx(1, abs=1e-3)


def test_copies_of_the_shots_rank_first_in_adam_s_form(rows: list[Row], score: Callable[..., Any]) -> None:
    """Adam bends a row's direction, so a copy's cosine is less than 1; it is the greatest all the same."""
    shots = rows[100:105]
    copies = [Row(f"copy{n}", row.messages, row.response) for n, row in enumerate(shots)]
    for sketch_dim in (8192, 0):
        found = score("less", [*rows[:30], *copies], shots, sketch_dim=sketch_dim)
        assert set(np.argsort(-found)[:5].tolist()) == set(range(30, 35))


def test_sketched_and_exact_scores_agree(rows: list[Row], score: Callable[..., Any]) -> None:
    shots = rows[100:106]
    sketched, exact = (score("less", rows[:40], shots, layers="all", sketch_dim=d) for d in (8192, 0))
    assert np.corrcoef(sketched, exact)[0, 1] > 0.99


def test_a_row_counts_by_its_best_group(rows: list[Row], score: Callable[..., Any]) -> None:
    """Skills 0 and 1 are groups: the score is the greater of the scores with each alone. One skill has a single row."""
    shots = [rows[100], rows[105], rows[101]]  # arithmetic twice, casing once
    both = score("less", rows[:20], shots, sketch_dim=0)
    first, second = score("less", rows[:20], shots[:2], sketch_dim=0), score("less", rows[:20], shots[2:], sketch_dim=0)
    np.testing.assert_allclose(both, np.maximum(first, second), atol=1e-5)
    together = score("less", rows[:20], shots, sketch_dim=0, group="none")
    np.testing.assert_allclose(together, (2 * first + second) / 3, atol=1e-5)
    _, words = score("less", rows[:20], shots, explain=1)
    assert words.startswith("gradient cosine ")
    assert words.endswith(("with skill arithmetic", "with skill casing"))


def test_permuting_rows_permutes_scores(rows: list[Row], score: Callable[..., Any]) -> None:
    order = np.random.default_rng(1).permutation(40)
    shots = rows[100:104]
    for name in ("less", "grand"):
        straight = score(name, rows[:40], shots)
        permuted = score(name, [rows[index] for index in order], shots)
        np.testing.assert_allclose(permuted, straight[order], rtol=1e-4, atol=1e-3 if name == "less" else 1e-4)


def test_checkpoints_are_weighted_by_their_learning_rates(
    rows: list[Row], tiny_base: Path, score: Callable[..., Any], tmp_path: Path
) -> None:
    """Two epochs of one step each: rates of 1 and 1/2 of the highest, so that the last alone is a third of the sum."""
    shots = rows[100:103]
    small = {"warmup": 0.2, "batch_size": 8, "epochs": 2, "group": "none", "sketch_dim": 0}
    both, last = score("less", rows[:40], shots, **small), score("less", rows[:40], shots, ckpts="last", **small)
    from xpert.gradients import ExactScores
    from xpert.lora_training import LoraOptions, _course, warm_up

    pool = pool_from_rows(rows[:40])
    options = LoraOptions(epochs=2, batch_size=8, max_length=128)
    kept = warm_up(str(tiny_base), warm_up_rows(pool, 8, 0), options, tmp_path, device="cpu")
    assert [c.learning_rate for c in kept] == pytest.approx([2e-4 * _course(step, 2, 0.03) for step in (0, 1)])
    each = ExactScores(str(tiny_base), tuple(kept), tuple(shots), (0, 0, 0), "adam", 128).open("cpu")(rows[:40])
    weights = np.array([c.learning_rate for c in kept]) / sum(c.learning_rate for c in kept)
    np.testing.assert_allclose(both, each["scores"][:, :, 0] @ weights, atol=1e-5)
    np.testing.assert_allclose(last, each["scores"][:, 1, 0], atol=1e-5)


def test_rows_without_room_are_not_scored(rows: list[Row], score: Callable[..., Any]) -> None:
    long = Row("long", (Message("user", "word " * 400),), "yes")
    for name, words in (("less", "leaves no room"), ("grand", "leaves no room")):
        found, said = score(name, [*rows[:20], long], rows[100:103], explain=20, max_length=64)
        assert np.isnan(found).tolist() == [False] * 20 + [True]
        assert words in said
    with pytest.raises(BadInput, match="no shot of skill casing has room for its answer"):
        casing = Row("long", (Message("user", "word " * 400),), "yes", "casing")
        score("less", rows[:20], [rows[100], casing], max_length=64)


def test_grand_ranks_both_ways(rows: list[Row], score: Callable[..., Any]) -> None:
    high, words = score("grand", rows[:10], [], explain=0)
    assert words == f"gradient norm {high[0]:.4g}"
    assert (high > 0).all()
    assert (score("grand", rows[:10], [], order="low") == -high).all()
    few = score("grand", rows[:10], [], layers="q_proj,v_proj")
    assert (few < high).all()


def test_groups_of_shots(rows: list[Row]) -> None:
    shots = Shots((rows[0], rows[1], Row("bare", (Message("user", "x"),), "y")))
    assert shot_groups(shots, "none") == (["all shots"], (0, 0, 0))
    assert shot_groups(shots, "skill") == (["skill arithmetic", "skill casing", "shots without a skill"], (0, 1, 2))
    assert shot_groups(Shots(tuple(rows[:3])), "licence") == (["licence MIT", "licence CC0-1.0"], (0, 1, 0))
    with pytest.raises(BadInput, match=r"shot bare has no column 'licence'. Group by one of id, input"):
        shot_groups(shots, "licence")


def test_the_warm_up_share_follows_content(rows: list[Row]) -> None:
    chosen = warm_up_rows(pool_from_rows(rows), 10, 0)
    turned = warm_up_rows(pool_from_rows(rows[::-1]), 10, 0)
    assert [row.id for row in chosen] == [row.id for row in turned]
    assert len({row.id for row in chosen}) == 10
    assert [row.id for row in warm_up_rows(pool_from_rows(rows), 10, 1)] != [row.id for row in chosen]
    assert warm_up_rows(pool_from_rows(rows), 0, 0) == []


def test_mistakes(rows: list[Row], score: Callable[..., Any]) -> None:
    with pytest.raises(BadInput, match="form is adam, but warmup is 0"):
        score("less", rows[:10], rows[100:101], warmup=0)
    with pytest.raises(BadInput, match=r"unknown layer 'q_prj'\. Did you mean 'q_proj'"):
        score("less", rows[:10], rows[100:101], layers="q_prj")
    with pytest.raises(BadInput, match="unknown layer 'dense'"):
        score("grand", rows[:10], [], layers="dense")
    with pytest.raises(BadInput, match=r"method 'less' needs shots"):
        score("less", rows[:10], [])
