"""Sketches keep inner products, and do not care how vectors come to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput
from xpert.sketches import KINDS, Sketch

every_kind = pytest.mark.parametrize("kind", KINDS)


def whole(sketch: Sketch, sizes: dict[str, int], vectors: torch.Tensor) -> torch.Tensor:
    out = sketch.empty(len(vectors))
    for name, block in zip(sizes, vectors.split(list(sizes.values()), dim=1), strict=True):
        sketch.add(out, name, block)
    return out


@every_kind
@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 90), min_size=1, max_size=5), dims=st.integers(1, 40), seed=st.integers(0, 5))
def test_it_is_the_plain_sum_over_buckets(kind: str, sizes: list[int], dims: int, seed: int) -> None:
    """Every coordinate goes to one bucket with one sign: S has one entry of +-1 a column, buckets of even size."""
    named = {f"block{number}": size for number, size in enumerate(sizes)}
    sketch = Sketch(named, dims, kind=kind, seed=seed)
    matrix = whole(sketch, named, torch.eye(sum(sizes)))  # [P, dims]: the sketches of the unit vectors
    assert ((matrix != 0).sum(1) == 1).all()
    assert (matrix.abs().sum(1) == 1).all()
    loads = (matrix != 0).sum(0)[: sketch.buckets]
    assert loads.max() - loads.min() <= 1
    vectors = torch.randn(3, sum(sizes), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(whole(sketch, named, vectors), vectors @ matrix, rtol=1e-5, atol=1e-5)


@every_kind
def test_rows_are_sketched_alone_and_blocks_in_any_order(kind: str) -> None:
    sizes = {"a": 700, "b": 90, "c": 1500}
    sketch = Sketch(sizes, 256, kind=kind)
    vectors = torch.randn(6, 2290, generator=torch.Generator().manual_seed(2))
    together = whole(sketch, sizes, vectors)
    assert torch.equal(torch.cat([whole(sketch, sizes, row[None]) for row in vectors]), together)
    backwards = sketch.empty(6)
    for name, block in reversed(list(zip(sizes, vectors.split(list(sizes.values()), dim=1), strict=True))):
        sketch.add(backwards, name, block)
    torch.testing.assert_close(backwards, together)


@every_kind
def test_inner_products_are_right_on_average(kind: str) -> None:
    sizes = {"a": 60, "b": 41}
    x, y = torch.randn(2, 101, generator=torch.Generator().manual_seed(3))
    found = []
    for seed in range(400):
        sx, sy = whole(Sketch(sizes, 29, kind=kind, seed=seed), sizes, torch.stack([x, y]))
        found.append(float(sx @ sy))
    exact, spread = float(x @ y), np.std(found) / 20
    assert abs(np.mean(found) - exact) < 4 * spread
    assert np.std(found) < 1.5 * float(x.norm() * y.norm()) * (2 / 29) ** 0.5


@every_kind
def test_cosines_of_low_rank_gradients_survive_at_8192(kind: str) -> None:
    """155,648 numbers, rows of four kinds that share part of their outer products: correlation 0.99 or more."""
    generator = torch.Generator().manual_seed(4)
    sizes = {f"layer{number}": 8 * 1024 for number in range(19)}
    kinds = torch.arange(48) % 4
    blocks = []
    for _ in sizes:
        left, right = torch.randn(4, 8, 3, generator=generator), torch.randn(4, 3, 1024, generator=generator)
        own = torch.randn(48, 8, 3, generator=generator), torch.randn(48, 3, 1024, generator=generator)
        blocks.append((left[kinds] @ right[kinds] + 0.8 * own[0] @ own[1]).flatten(1))
    vectors = torch.nn.functional.normalize(torch.cat(blocks, 1), dim=1)
    kept = torch.nn.functional.normalize(whole(Sketch(sizes, 8192, kind=kind), sizes, vectors), dim=1)
    upper = np.triu_indices(48, 1)
    exact, sketched = ((v @ v.T).numpy()[upper] for v in (vectors, kept))
    assert np.corrcoef(exact, sketched)[0, 1] >= 0.99


def test_one_outlying_input_does_not_meet_itself() -> None:
    """A layer 4,096 wide whose input 7 is large in every row of A: folded modulo 8,192 its rows would collide."""
    block = torch.zeros(2, 8, 4096)
    block[0, :, 7] = 1.0
    block[1, :, 7] = torch.tensor([1.0, -1.0] * 4)
    sketched = whole(Sketch({"a": 8 * 4096}, 8192), {"a": 8 * 4096}, block.flatten(1))
    assert (sketched != 0).sum(1).tolist() == [8, 8]
    assert float(sketched[0] @ sketched[1]) == 0.0


def test_seeds_differ_and_repeat() -> None:
    sizes = {"a": 500}
    vector = torch.randn(1, 500, generator=torch.Generator().manual_seed(5))
    first, again, other = (whole(Sketch(sizes, 64, seed=seed), sizes, vector) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(BadInput, match=r"unknown sketch 'fol'\. Did you mean 'fold'"):
        Sketch(sizes, 64, kind="fol")
