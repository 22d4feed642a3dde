"""Balance losses against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from xpert.experts.gates._learned_losses import entropy, localised_balance, null_balance, switch_balance

ALL = torch.ones(1, 2, dtype=torch.bool)


def tensor(*tokens: list[float]) -> torch.Tensor:
    return torch.tensor([list(tokens)])


def test_the_switch_loss_by_hand() -> None:
    p = tensor([0.5, 0.3, 0.2], [0.1, 0.6, 0.3])
    chosen = tensor([1, 1, 0], [0, 1, 1]).bool()
    # shares 1/2, 1, 1/2; means 0.3, 0.45, 0.25
    assert float(switch_balance(p, chosen, ALL)) == pytest.approx(3 * (0.15 + 0.45 + 0.125))
    even = torch.full((1, 2, 4), 0.25)
    assert float(switch_balance(even, even > 0, ALL)) == pytest.approx(4)  # k of k experts: k


def test_padding_does_not_count() -> None:
    p = tensor([0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.9, 0.05, 0.05])
    chosen = tensor([1, 1, 0], [0, 1, 1], [1, 0, 0]).bool()
    mask = torch.tensor([[True, True, False]])
    kinds, first = torch.tensor([1]), torch.tensor([True, False, False])
    short, padded = (p[:, :2], chosen[:, :2], ALL), (p, chosen, mask)
    assert torch.allclose(switch_balance(*padded), switch_balance(*short))
    assert torch.allclose(null_balance(*padded, 2), null_balance(*short, 2))
    assert torch.allclose(entropy(p, mask), entropy(p[:, :2], ALL))
    assert torch.allclose(
        localised_balance(p, mask, kinds, first, 0.1), localised_balance(p[:, :2], ALL, kinds, first, 0.1)
    )


def test_null_experts_count_with_their_mean_share() -> None:
    p = tensor([0.4, 0.3, 0.2, 0.1], [0.4, 0.1, 0.2, 0.3])
    chosen = tensor([1, 0, 1, 0], [1, 0, 1, 0]).bool()
    # slots: 2, 0, 2, 0 of 4; the nulls' shares 1/2 and 0 become 1/4 each
    assert float(null_balance(p, chosen, ALL, 2)) == pytest.approx(4 * (0.5 * 0.4 + 0.25 * 0.2 + 0.25 * 0.2))
    other = tensor([1, 0, 0, 1], [1, 0, 0, 1]).bool()
    assert torch.allclose(null_balance(p, chosen, ALL, 2), null_balance(p, other, ALL, 2))


def test_the_localised_loss_by_hand() -> None:
    p = torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]])
    mask, first = torch.ones(2, 1, dtype=torch.bool), torch.tensor([True, False])
    z = torch.tensor([0.55, 0.45, 0.45, 0.55])  # the row of kind 1 is raised in the first half
    found = localised_balance(p, mask, torch.tensor([1, 0]), first, 0.1)
    assert float(found) == pytest.approx(float(z.var() / z.mean() ** 2))


def test_the_localised_loss_is_zero_where_z_is_flat_and_which_half_wins() -> None:
    delta = 0.2
    low, high = (1 - delta) / 2, (1 + delta) / 2  # Q proportional to 1 / I
    p = torch.tensor([[[low, high]] * 3, [[high, low]] * 3])
    mask, first = torch.tensor([[True, True, True], [True, False, False]]), torch.tensor([True, False])
    assert float(localised_balance(p, mask, torch.tensor([1, 0]), first, delta)) == pytest.approx(0, abs=1e-8)
    mirrored = localised_balance(p, mask, torch.tensor([0, 1]), first, delta)
    assert float(mirrored) > 0.1  # rows of kind 1 are to send LESS to the first half
    logits = torch.zeros(2, 1, 2, requires_grad=True)
    even = torch.softmax(logits, -1)
    localised_balance(even, torch.ones(2, 1, dtype=torch.bool), torch.tensor([1, 0]), first, delta).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0, 0] > 0 > logits.grad[1, 0, 0]  # descent lowers the first half for kind 1


def test_one_number_has_no_variance() -> None:
    p = torch.ones(1, 2, 1, requires_grad=True)
    found = localised_balance(p, ALL, torch.tensor([1]), torch.tensor([False]), 0.1)
    found.backward()
    assert found.item() == 0
    assert p.grad is not None and p.grad.isfinite().all()


def test_entropy_by_hand_and_at_exact_zeros() -> None:
    p = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]], requires_grad=True)
    found = entropy(p, ALL)
    assert found.item() == pytest.approx(math.log(2) / 2)
    found.backward()
    assert p.grad is not None and p.grad.isfinite().all()
