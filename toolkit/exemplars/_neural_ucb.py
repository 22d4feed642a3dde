"""NeuralUCB with a diagonal covariance: a small network's guess of a reward, and a bonus for what it does not know.

Zhou et al. 2020, arXiv:1911.04462, in the form that EASE uses. Imports torch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

__all__ = ["Guesses", "NeuralUcb"]

_FLAT = 1e-6  # a column of inputs that spreads less than this is rounding, and is left as it is


@dataclass(frozen=True)
class Guesses:
    """Of m inputs: mean [m], bonus [m] >= 0, and the gradients [m, p] of the means, for `NeuralUcb.chose`."""

    mean: Tensor
    bonus: Tensor
    gradients: Tensor


class NeuralUcb:
    """Reward as a function of an input [d]: four linear layers with ReLU between them, float32, on the CPU.

    `fit` trains from the same initial weights each time, on all that is known, inputs standardised: Adam with weight
    decay lambda / n, mean squared error. The bonus of an input is sqrt(sum_p lambda nu g_p^2 / U_p), g the gradient of
    its mean; U begins at lambda and grows by g^2 of every input chosen. Memory O(m p) in `guess`.
    """

    def __init__(
        self, inputs: int, *, hidden: int, steps: int, rate: float, regulariser: float, nu: float, seed: int
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(inputs, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, 1),
            )
        self.initial = copy.deepcopy(self.net.state_dict())
        self.steps, self.rate, self.regulariser, self.nu = steps, rate, regulariser, nu
        self.u = torch.full((sum(parameter.numel() for parameter in self.net.parameters()),), regulariser)
        self.mean = torch.zeros(inputs)
        self.spread = torch.ones(inputs)

    def fit(self, inputs: Tensor, rewards: Tensor) -> float:
        """Trains on inputs [n, d] and rewards [n]; gives the last loss."""
        self.net.load_state_dict(self.initial)
        self.mean = inputs.mean(dim=0)
        spread = inputs.std(dim=0, correction=0)
        # The released code divides by 1e-30 where a column is constant, which blows up any candidate that differs.
        self.spread = torch.where(spread < _FLAT, torch.ones_like(spread), spread)
        scaled = self._scaled(inputs)
        optimiser = torch.optim.Adam(
            self.net.parameters(), lr=self.rate, weight_decay=self.regulariser / len(inputs), fused=True
        )
        loss = torch.zeros(())
        for _ in range(self.steps):
            optimiser.zero_grad()
            loss = (self.net(scaled)[:, 0] - rewards).square().mean()
            loss.backward()
            optimiser.step()
        return float(loss.detach())

    def guess(self, inputs: Tensor) -> Guesses:
        """Means, bonuses and gradients of inputs [m, d]."""
        weights = {name: parameter.detach() for name, parameter in self.net.named_parameters()}

        def mean(values: dict[str, Tensor], one: Tensor) -> Tensor:
            found: Tensor = functional_call(self.net, values, (one,))[0]
            return found

        scaled = self._scaled(inputs)
        found = vmap(grad(mean), in_dims=(None, 0))(weights, scaled)
        gradients = torch.cat([found[name].flatten(1) for name in weights], dim=1)
        with torch.inference_mode():
            means = self.net(scaled)[:, 0]
        bonus = (self.regulariser * self.nu * gradients.square() / self.u).sum(dim=1).sqrt()
        return Guesses(means.clone(), bonus, gradients)

    def chose(self, gradient: Tensor) -> None:
        """The input with this gradient [p] has been tried."""
        self.u += gradient.square()

    def _scaled(self, inputs: Tensor) -> Tensor:
        return (inputs - self.mean) / self.spread
