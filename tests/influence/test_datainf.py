"""DataInf: the closed form against its formula looped row by row, and the scorer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from xpert.chat_form import encode_examples
from xpert.data import pool_from_rows
from xpert.errors import BadInput
from xpert.features import FeatureOptions, Features
from xpert.influence.datainf import DatainfScores, datainf_targets, row_weights
from xpert.language_model import load_model
from xpert.linear_capture import make_batch, row_losses
from xpert.lora_training import Checkpoint, LoraOptions, warm_up
from xpert.records import Message, Row, Shots
from xpert.selectors.scorers.datainf import Datainf, DatainfOptions

Gradients = dict[str, torch.Tensor]


def peft_gradients(base: Path, checkpoint: Checkpoint, rows: Sequence[Row]) -> list[Gradients]:
    """Each row's adapter gradients by peft and autograd, one row at a time."""
    from peft import PeftModel

    lm = load_model(str(base), device="cpu")
    model = PeftModel.from_pretrained(lm.model, checkpoint.folder, is_trainable=True).eval()
    named = {n: p for n, p in model.named_parameters() if "lora_" in n}
    found = []
    for row in rows:
        batch = make_batch(encode_examples(lm.tokenizer, [row]), lm.device)
        got = torch.autograd.grad(row_losses(model, batch).sum(), list(named.values()))
        found.append(dict(zip(named, (gradient.flatten() for gradient in got), strict=True)))
    assert len(parameters_to_vector(named.values())) == sum(len(g) for g in found[0].values())
    return found


def plain_datainf(v: Gradients, inverted: Sequence[Gradients], scored: Sequence[Gradients]) -> list[float]:
    scores = [0.0] * len(scored)
    for name, target in v.items():
        damp = 0.1 * float(np.mean([float(g[name].square().mean()) for g in inverted]))
        if damp == 0:
            continue
        h = torch.zeros_like(target)
        for g in inverted:
            own = g[name]
            h += (target - (target @ own) / (damp + own @ own) * own) / (len(inverted) * damp)
        for index, g in enumerate(scored):
            scores[index] += float(h @ g[name])
    return scores


@pytest.mark.parametrize("trained", [False, True], ids=["a random adapter", "a trained adapter"])
def test_the_formula_looped(tiny_base: Path, rows: list[Row], tmp_path: Path, trained: bool) -> None:
    settings = LoraOptions(rank=4, layers=("q_proj", "down_proj"), epochs=1, learning_rate=1e-2, batch_size=4)
    checkpoint = warm_up(str(tiny_base), rows[:12] if trained else [], settings, tmp_path, device="cpu", seed=3)[-1]
    pool, shots, scored = rows[20:30], rows[100:103], rows[50:55]
    stored = datainf_targets(str(tiny_base), checkpoint, pool, shots, (0, 0, 0), tmp_path, device="cpu")
    found = DatainfScores(str(tiny_base), checkpoint, stored).open("cpu")(scored)

    gradients = peft_gradients(tiny_base, checkpoint, [*pool, *shots, *scored])
    v = {name: torch.stack([g[name] for g in gradients[10:13]]).mean(0) for name in gradients[0]}
    want = plain_datainf(v, gradients[:10], gradients[13:])
    assert np.allclose(found["scores"][:, 0], want, rtol=2e-3, atol=1e-3 * max(map(abs, want)))
    lengths = [sum(float(part.square().sum()) for part in g.values()) ** 0.5 for g in gradients[13:]]
    assert np.allclose(found["norm"], lengths, rtol=1e-3)
    of_a = max(float(part.abs().max()) for g in gradients for name, part in g.items() if "lora_A" in name)
    assert (of_a > 0) is trained


def test_one_row_is_the_exact_inverse() -> None:
    """n = 1: h is (lambda + g g^T)^-1 v, which a solver finds as well."""
    generator = torch.Generator().manual_seed(0)
    g, v = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    weights, damp = row_weights((g @ v).view(1, 1), (g @ g).view(1), 6)
    want = torch.linalg.solve(damp * torch.eye(6) + torch.outer(g, g), v)
    assert torch.allclose(v / damp - weights[0, 0] * g, want, rtol=1e-4, atol=1e-4)
    assert damp == pytest.approx(0.1 * float(g.square().mean()))


def scores_of(rows: Sequence[Row], base: Path, shots: Shots, **options: Any) -> tuple[Any, Any]:
    features = Features(
        pool_from_rows(list(rows)),
        FeatureOptions(base=str(base), max_length=128),
        shots=shots,
        cache=None,
        device="cpu",
    )
    scorer = Datainf(DatainfOptions(inverted_rows=20, rank=4, **options))
    scorer.prepare(features, shots, np.random.default_rng(0))
    return scorer, scorer.score(np.arange(len(rows), dtype=np.int64))


@pytest.mark.parametrize("options", [{}, {"normalise": True}, {"warmup": 0.5}], ids=str)
def test_a_planted_copy_of_a_shot_ranks_near_the_top(tiny_base: Path, rows: list[Row], options: dict[str, Any]) -> None:
    shot = rows[150]
    scorer, scores = scores_of([*rows[:40], shot], tiny_base, Shots((shot,)), **options)
    assert (scores > scores[40]).sum() <= 1
    assert scorer.explain(40).startswith("influence ")


def test_rows_and_groups_without_room(tiny_base: Path, rows: list[Row]) -> None:
    long = Row("long", (Message("user", "word " * 400),), "answer", rows[0].skill)
    shots = Shots(tuple(rows[150:152]))
    scorer, scores = scores_of([*rows[:8], long], tiny_base, shots)
    assert np.isnan(scores[8]) and np.isfinite(scores[:8]).all()
    assert scorer.explain(8) == "its prompt leaves no room for the answer"
    with pytest.raises(BadInput, match="no target of group 2 has room"):
        scores_of(rows[:8], tiny_base, Shots((rows[1], long)))
    with pytest.raises(BadInput, match="none of the 1 rows that DataInf inverts"):
        scores_of([long], tiny_base, shots)
