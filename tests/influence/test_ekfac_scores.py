"""EK-FAC influence on a small real model: streamed scores against plain autograd, the curvature, and the scorer."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from xpert.chat_form import encode_examples
from xpert.data import pool_from_rows
from xpert.errors import BadInput
from xpert.features import FeatureOptions, Features
from xpert.influence import curvature as curvature_module
from xpert.influence.curvature import block_curvature, measure_curvature
from xpert.influence.ekfac import CurvatureOptions, EkfacScores, ekfac_targets
from xpert.influence.kronecker import blocks_of
from xpert.language_model import LanguageModel, load_model
from xpert.linear_capture import linear_layers, make_batch, row_losses
from xpert.records import Message, Row, Shots
from xpert.selectors.scorers.ekfac import Ekfac, EkfacOptions

Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def lm(tiny_base: Path) -> LanguageModel:
    return load_model(str(tiny_base), device="cpu")


def plain_gradients(lm: LanguageModel, row: Row, layers: Sequence[str]) -> Gradients:
    """A row's gradient by ordinary autograd, one row at a time."""
    weights = {name: layer.weight for name, layer in linear_layers(lm.model, layers).items()}
    batch = make_batch(encode_examples(lm.tokenizer, [row]), lm.device)
    found = torch.autograd.grad(row_losses(lm.model, batch).sum(), list(weights.values()))
    return dict(zip(weights, found, strict=True))


def plain_directions(
    lm: LanguageModel, rows: Sequence[Row], shots: Sequence[Row], groups: Sequence[int], layers: Sequence[str]
) -> list[Gradients]:
    """(H + 0.001)^-1 of each group's mean gradient, by block; of unit length where there are several."""
    curvature = measure_curvature(lm, rows, layers=layers, max_length=256)
    blocks = blocks_of(linear_layers(lm.model, layers))
    gradients = [plain_gradients(lm, row, layers) for row in shots]
    directions = []
    for group in sorted(set(groups)):
        own = [shot for shot, number in zip(gradients, groups, strict=True) if number == group]
        direction = {}
        for block, members in blocks.items():
            mean = torch.cat([torch.stack([shot[member] for shot in own]).mean(0) for member in members])
            direction[block] = block_curvature(curvature, block, lm.device).inverse(mean, 1e-3)
        length = sum(float(v.square().sum()) for v in direction.values()) ** 0.5 if len(set(groups)) > 1 else 1.0
        directions.append({block: v / length for block, v in direction.items()})
    return directions


@pytest.mark.parametrize("layers", [("attention",), ("all",), ("v_proj", "down_proj")])
@pytest.mark.parametrize("groups", [(0, 0, 0), (0, 1, 0)])
def test_scores_are_those_of_explicit_gradients(
    lm: LanguageModel, rows: list[Row], tmp_path: Path, layers: tuple[str, ...], groups: tuple[int, ...]
) -> None:
    options = CurvatureOptions(layers=layers, damp=1e-3, max_length=256)
    stored = ekfac_targets(lm.ref, rows[:20], rows[100:103], groups, options, tmp_path, device="cpu")
    with_norms = EkfacScores(lm.ref, stored, norms=True, max_length=256).open("cpu")(rows[50:56])
    streamed = EkfacScores(lm.ref, stored, max_length=256).open("cpu")(rows[50:56])
    blocks = blocks_of(linear_layers(lm.model, layers))
    directions = plain_directions(lm, rows[:20], rows[100:103], groups, layers)
    for index, row in enumerate(rows[50:56]):
        own = plain_gradients(lm, row, layers)
        want = [
            sum(float((d[block] * torch.cat([own[m] for m in members])).sum()) for block, members in blocks.items())
            for d in directions
        ]
        scale = max(abs(value) for value in want)
        assert np.allclose(streamed["scores"][index], want, rtol=2e-3, atol=1e-4 * scale)
        assert np.allclose(with_norms["scores"][index], want, rtol=2e-3, atol=1e-4 * scale)
        length = sum(float(gradient.square().sum()) for gradient in own.values()) ** 0.5
        assert with_norms["norm"][index] == pytest.approx(length, rel=1e-4)
    assert "norm" not in streamed


@pytest.mark.parametrize("labels", ["sampled", "given"])
def test_the_batch_makes_no_difference(
    lm: LanguageModel, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str
) -> None:
    options = CurvatureOptions(layers=("all",), labels=labels)

    def run(tokens: int, folder: Path) -> Any:
        monkeypatch.setitem(curvature_module.BATCH_TOKENS, "cpu", tokens)
        stored = ekfac_targets(lm.ref, rows[:12], rows[100:104], (0,) * 4, options, folder, device="cpu")
        return EkfacScores(lm.ref, stored).open("cpu")(rows[50:62])["scores"]

    alone, together = run(1, tmp_path / "a"), run(4096, tmp_path / "b")
    assert np.allclose(alone, together, rtol=1e-2, atol=1e-2 * np.abs(alone).max())


def test_drawn_labels_give_the_gauss_newton_matrix(lm: LanguageModel, rows: list[Row]) -> None:
    """The trace over one layer, from many draws, against J^T (diag p - p p^T) J column by column."""
    row, name = rows[2], "model.layers.1.mlp.down_proj"
    layer = linear_layers(lm.model, ("down_proj",))[name]
    batch = make_batch(encode_examples(lm.tokenizer, [row]), lm.device)
    logits = lm.model(batch.input_ids).logits[batch.supervised]
    trace = 0.0
    for position in logits:
        p = torch.softmax(position, 0).detach()
        root = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())  # root root^T = diag p - p p^T
        for column in range(len(p)):
            gradient = torch.autograd.grad(position @ root[:, column], layer.weight, retain_graph=True)[0]
            trace += float(gradient.square().sum()) / len(logits)
    copies = [Row(f"c{number}", row.messages, row.response) for number in range(600)]
    drawn = measure_curvature(lm, copies, layers=("down_proj",), seed=1)[f"{name}.lam"].sum()
    given = measure_curvature(lm, copies[:2], layers=("down_proj",), labels="given")[f"{name}.lam"].sum()
    assert drawn == pytest.approx(trace, rel=0.2)
    assert given != pytest.approx(trace, rel=0.2)


def make_features(rows: Sequence[Row], base: Path, shots: Shots, cache: Path | None = None, **more: Any) -> Features:
    options = FeatureOptions(base=str(base), max_length=more.pop("max_length", 128))
    return Features(pool_from_rows(list(rows)), options, shots=shots, cache=cache, device="cpu", **more)


def scores_of(options: dict[str, Any], features: Features, shots: Shots) -> tuple[Any, Any]:
    scorer = Ekfac(EkfacOptions(factor_rows=30, **options))
    scorer.prepare(features, shots, np.random.default_rng(0))
    return scorer, scorer.score(np.arange(len(features.pool), dtype=np.int64))


@pytest.mark.parametrize("normalise", [True, False])
def test_a_planted_copy_of_a_shot_ranks_near_the_top(tiny_base: Path, rows: list[Row], normalise: bool) -> None:
    shot = rows[150]
    pool = [*rows[:40], shot, *rows[40:60]]
    _, scores = scores_of({"normalise": normalise}, make_features(pool, tiny_base, Shots((shot,))), Shots((shot,)))
    assert (scores > scores[40]).sum() <= 2


def test_scores_are_kept_and_other_shots_find_the_curvature(
    tiny_base: Path, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Shots(tuple(rows[150:153])), Shots(tuple(rows[153:156]))
    _, scores = scores_of({}, make_features(rows[:40], tiny_base, first, tmp_path), first)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(curvature_module, "measure_curvature", never)
    _, other = scores_of({}, make_features(rows[:40], tiny_base, second, tmp_path), second)
    assert not np.allclose(scores, other)
    monkeypatch.setattr(EkfacScores, "open", never)
    features = make_features(rows[:40], tiny_base, first, tmp_path)
    scorer, again = scores_of({}, features, first)
    assert again.tobytes() == scores.tobytes()
    assert features.computed(scorer._groups.row_pass) == 40
    assert len(pickle.dumps(scorer._groups.row_pass)) < 5000


def test_only_the_rows_asked_for_are_computed(tiny_base: Path, rows: list[Row]) -> None:
    shots = Shots(tuple(rows[150:153]))
    features = make_features(rows[:40], tiny_base, shots)
    scorer = Ekfac(EkfacOptions(factor_rows=10))
    scorer.prepare(features, shots, np.random.default_rng(0))
    scorer.score(np.array([3, 7], np.int64))
    assert features.computed(scorer._groups.row_pass) == 2
    assert "influence" in scorer.explain(7)


def test_groups_count_by_the_best(tiny_base: Path, rows: list[Row]) -> None:
    shots = Shots(tuple(rows[150:155]))  # five skills
    features = make_features(rows[:30], tiny_base, shots)
    scorer, scores = scores_of({"damp": 1e-3}, features, shots)
    each = features.compute(scorer._groups.row_pass, np.arange(30))["scores"]
    assert each.shape == (30, 5)
    assert np.array_equal(scores, each.max(axis=1))
    assert f"on skill {shots.rows[int(each[4].argmax())].skill}" in scorer.explain(4)
    _, together = scores_of({"damp": 1e-3, "group": "none"}, features, shots)
    assert not np.allclose(scores, together)


def test_the_pools_order_does_not_matter(tiny_base: Path, rows: list[Row]) -> None:
    shots = Shots(tuple(rows[150:153]))
    _, scores = scores_of({}, make_features(rows[:40], tiny_base, shots), shots)
    _, backwards = scores_of({}, make_features(rows[39::-1], tiny_base, shots), shots)
    assert spearmanr(scores, backwards[::-1]).statistic > 0.999


def long_prompt(row: Row) -> Row:
    return Row("long", (Message("user", "word " * 400),), row.response, row.skill)


def test_a_row_without_room_is_not_scored(tiny_base: Path, rows: list[Row]) -> None:
    shots = Shots(tuple(rows[150:153]))
    scorer, scores = scores_of({}, make_features([*rows[:20], long_prompt(rows[0])], tiny_base, shots), shots)
    assert np.isnan(scores[20]) and np.isfinite(scores[:20]).all()
    assert scorer.explain(20) == "its prompt leaves no room for the answer"


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no damping": ({"damp": 0.0}, "damp is 0"),
    "a layer that is not there": ({"layers": ("q_porj",)}, "Did you mean 'q_proj'"),
    "a column that is not there": ({"group": "topic"}, "has no column 'topic'"),
    "no rows for the curvature": ({"factor_rows": 0}, "factor-rows is 0"),
    "an unknown kind of label": ({"labels": "true"}, "unknown labels 'true'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, tiny_base: Path, rows: list[Row]) -> None:
    options, message = MISTAKES[mistake]
    shots = Shots(tuple(rows[150:153]))
    with pytest.raises(BadInput, match=message):
        scorer = Ekfac(EkfacOptions(**options))
        scorer.prepare(make_features(rows[:10], tiny_base, shots), shots, np.random.default_rng(0))


def test_shots_and_pools_without_room_are_said(tiny_base: Path, rows: list[Row]) -> None:
    shots = Shots((long_prompt(rows[0]),))
    with pytest.raises(BadInput, match="no target of group 1 has room"):
        scores_of({}, make_features(rows[:10], tiny_base, shots), shots)
    shots = Shots(tuple(rows[150:153]))
    with pytest.raises(BadInput, match="none of the 1 rows for the curvature"):
        scores_of({}, make_features([long_prompt(rows[0])], tiny_base, shots), shots)


def test_a_loss_that_is_no_number_names_its_row(
    tiny_base: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch, make_broken: Callable[[], None]
) -> None:
    shots = Shots(tuple(rows[150:153]))
    make_broken()
    with pytest.raises(BadInput, match=r"the loss is not a number \(rows r00"):
        scores_of({}, make_features(rows[:10], tiny_base, shots), shots)


@pytest.fixture
def make_broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def make() -> None:
        def broken(model: Any, batch: Any) -> torch.Tensor:
            return row_losses(model, batch) * float("nan")

        monkeypatch.setattr(curvature_module, "row_losses", broken)

    return make
