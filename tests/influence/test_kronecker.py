"""EK-FAC's maths: exact where the curvature is a Kronecker product, and equal to its slow plain form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from xpert.influence.kronecker import (
    BlockCurvature,
    blocks_of,
    eigenvectors,
    row_gradients,
    squared_projections,
    streamed_products,
)


def measured(x: torch.Tensor, delta: torch.Tensor) -> BlockCurvature:
    """The curvature of rows of one position each: x [n, d_in], delta [n, d_out]."""
    q_a, q_s = eigenvectors(x.T @ x), eigenvectors(delta.T @ delta)
    return BlockCurvature(q_a, q_s, squared_projections(x[:, None], delta[:, None], q_a, q_s) / len(x))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_inverse(hessian: torch.Tensor, v: torch.Tensor, damp: float) -> torch.Tensor:
    damped = hessian.double() + damp * torch.eye(len(hessian), dtype=torch.float64)
    found: torch.Tensor = torch.linalg.solve(damped, v.double().flatten())
    return found.view(v.shape).float()


def test_exact_on_a_linear_model_with_square_loss() -> None:
    """loss = |W x - y|^2 / 2 at W = truth: the Hessian is E[x x^T] on each output, and the noise is independent."""
    d_in, d_out, n = 5, 4, 400_000
    mix = normal(d_in, d_in, seed=1)
    x, noise = normal(n, d_in, seed=2) @ mix, normal(n, d_out, seed=3)
    hessian = torch.kron(torch.eye(d_out), mix.T @ mix)
    v = normal(d_out, d_in, seed=4)
    curvature = measured(x, noise)
    for damp in (0.05, None, 2.0):
        want = exact_inverse(hessian, v, curvature.damping(damp))
        got = curvature.inverse(v, damp)
        # What is left is sampling noise, 1 / sqrt(n).
        assert float((got - want).norm() / want.norm()) < 0.02


def test_exact_where_the_factors_are_exact() -> None:
    """Rows that hold every pair of an input and an output gradient: the moments factor without any noise."""
    x, delta = normal(6, 5, seed=1), normal(7, 4, seed=2)
    pairs_x, pairs_delta = x.repeat_interleave(7, 0), delta.repeat(6, 1)
    gradients = row_gradients(pairs_x[:, None], pairs_delta[:, None]).flatten(1)
    hessian = gradients.T @ gradients / len(gradients)
    curvature = measured(pairs_x, pairs_delta)
    for damp in (1e-3, None, 1.0):
        v = normal(4, 5, seed=3)
        want = exact_inverse(hessian, v, curvature.damping(damp))
        assert torch.allclose(curvature.inverse(v, damp), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_the_corrected_eigenvalues_are_the_best_in_their_basis() -> None:
    """Inputs and output gradients that depend on each other: the diagonal that EK-FAC takes is the exact one's."""
    x = normal(300, 4, seed=1)
    delta = normal(300, 3, seed=2) * x[:, :1].abs()
    curvature = measured(x, delta)
    gradients = row_gradients(x[:, None], delta[:, None])
    exact = torch.einsum("noi,npj->oipj", gradients, gradients).view(12, 12) / 300
    basis = torch.kron(curvature.q_s.contiguous(), curvature.q_a.contiguous())
    assert torch.allclose((basis.T @ exact @ basis).diagonal().view(3, 4), curvature.lam, rtol=1e-4)


def test_with_much_damping_it_is_the_gradient() -> None:
    curvature = measured(normal(50, 5, seed=1), normal(50, 4, seed=2))
    v = normal(4, 5, seed=3)
    assert torch.allclose(curvature.inverse(v, 1e6) * 1e6, v, rtol=1e-4)
    assert not torch.allclose(curvature.inverse(v, 1.0) * 1.0, v, rtol=0.1)


def test_a_layer_without_any_gradient_takes_no_part() -> None:
    curvature = measured(normal(50, 5, seed=1), torch.zeros(50, 4))
    assert curvature.inverse(normal(4, 5, seed=3)).abs().max() == 0


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(0, 99)
)
def test_streamed_products_are_those_of_row_gradients(b: int, t: int, d_in: int, d_out: int, g: int, seed: int) -> None:
    x, delta, v = (
        normal(b, t, d_in, seed=seed),
        normal(b, t, d_out, seed=seed + 1),
        normal(g, d_out, d_in, seed=seed + 2),
    )
    plain = torch.stack(
        [torch.stack([sum(delta[i, s] @ one @ x[i, s] for s in range(t)) for one in v]) for i in range(b)]
    )
    assert torch.allclose(streamed_products(x, delta, v), plain, atol=1e-4)


def test_blocks_stack_the_layers_that_share_an_input() -> None:
    names = ["0.attn.q_proj", "0.attn.k_proj", "0.attn.v_proj", "0.attn.o_proj", "0.mlp.up_proj", "1.attn.v_proj"]
    assert blocks_of({name: nn.Linear(2, 2) for name in names}) == {
        "0.attn.q_proj+k_proj+v_proj": ("0.attn.q_proj", "0.attn.k_proj", "0.attn.v_proj"),
        "0.attn.o_proj": ("0.attn.o_proj",),
        "0.mlp.up_proj": ("0.mlp.up_proj",),
        "1.attn.v_proj": ("1.attn.v_proj",),
    }


@pytest.mark.parametrize("damp", [1e-3, 1.0])
def test_stacked_outputs_differ_from_layers_apart(damp: float) -> None:
    """What q and k do together is curvature too: their joint inverse is not each one's own."""
    x, q = normal(80, 4, seed=1), normal(80, 3, seed=2)
    both = torch.cat([q, q + 0.1 * normal(80, 3, seed=3)], dim=1)
    v = normal(6, 4, seed=4)
    joint, alone = measured(x, both).inverse(v, damp), measured(x, both[:, :3]).inverse(v[:3], damp)
    assert not torch.allclose(joint[:3], alone, rtol=0.2)
