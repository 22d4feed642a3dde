"""Fixtures of the aggregators' tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.aggregators.scripted import ScriptedEngine, spread
from tests.conftest import make_columns
from xpert.protocols import Sampling


@pytest.fixture
def noisy() -> Callable[[], ScriptedEngine]:
    """Engines whose replies and likelihoods depend on experts, prompt and seed, and on nothing else."""

    def script(experts: str, prompt: str, sampling: Sampling) -> str:
        drawn = sampling.seed if sampling.temperature else None
        return f"Let us see.\nThe answer is {'ABCD'[spread(experts, prompt, drawn) % 4]}"

    return lambda: ScriptedEngine(script, lambda *words: -(spread(*words) / 2**32) / len(words[-1]))


@pytest.fixture(scope="session")
def three(make_adapter: Callable[..., Path], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture file of experts for casing, arithmetic and reversal behind router `fixed`, which takes them all."""
    from xpert.experts.mixture import assemble, open_expert
    from xpert.experts.mixture_file import write_mixture
    from xpert.language_model import model_fingerprint
    from xpert.registry.card import BaseModel, ExpertCard

    base = BaseModel(str(tiny_base), model_fingerprint(str(tiny_base)), "llama")
    experts = []
    for seed, skill in enumerate(("casing", "arithmetic", "reversal"), 1):
        folder = make_adapter(seed=seed)
        columns = make_columns(60, skills=(skill,))
        lines = [
            {"prompt": f"{c['instruction']} {c['input']}", "skill": skill, "kind": "shot" if n < 8 else "row"}
            for n, c in enumerate(columns)
        ]
        (folder / "exemplars.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        ExpertCard(base=base, adapter={"method": "lora", "rank": 4}, name=skill, skills=(skill,)).write(folder)
        experts.append(open_expert(folder))
    path = tmp_path_factory.mktemp("mixture") / "three.json"
    write_mixture(path, assemble(experts, router="fixed", name="three"))
    return path
