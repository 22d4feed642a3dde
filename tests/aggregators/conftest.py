"""Fixtures of the aggregators' tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.aggregators.scripted import ScriptedEngine, spread
from xpert.protocols import Sampling


@pytest.fixture
def noisy() -> Callable[[], ScriptedEngine]:
    """Engines whose replies and likelihoods depend on experts, prompt and seed, and on nothing else."""

    def script(experts: str, prompt: str, sampling: Sampling) -> str:
        drawn = sampling.seed if sampling.temperature else None
        return f"Let us see.\nThe answer is {'ABCD'[spread(experts, prompt, drawn) % 4]}"

    return lambda: ScriptedEngine(script, lambda *words: -(spread(*words) / 2**32) / len(words[-1]))
