"""Experts for the tiny base: random adapters with cards and exemplars of one skill each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from xpert.records import Row
from xpert.registry.card import BaseModel, ExpertCard


@pytest.fixture
def exemplars_of(rows: list[Row]) -> Callable[[str], list[str]]:
    """The prompts of one of the five skills."""
    return lambda skill: [row.prompt for row in rows if row.skill == skill]


@pytest.fixture(scope="session")
def base_model(tiny_base: Path) -> BaseModel:
    from xpert.language_model import model_fingerprint

    return BaseModel(str(tiny_base), model_fingerprint(str(tiny_base)), "llama")


@pytest.fixture
def make_expert(
    make_adapter: Callable[..., Path], base_model: BaseModel, exemplars_of: Callable[[str], list[str]]
) -> Callable[..., Path]:
    """An expert folder: `make_expert("casing", seed=1)`."""

    def make(skill: str, *, seed: int, base: BaseModel = base_model, exemplars: Sequence[str] | None = None) -> Path:
        folder = make_adapter(seed=seed)
        prompts = exemplars_of(skill) if exemplars is None else list(exemplars)
        lines = [
            {"prompt": prompt, "skill": skill, "kind": "shot" if index < 8 else "row"}
            for index, prompt in enumerate(prompts)
        ]
        (folder / "exemplars.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        ExpertCard(base=base, adapter={"method": "lora", "rank": 4}, name=skill, skills=(skill,)).write(folder)
        return folder

    return make


@pytest.fixture
def mixture_file(make_expert: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a mixture of experts for casing, arithmetic and reversal."""
    from xpert.experts.mixture import assemble, open_expert, write_mixture

    def make(router: str = "centroid", name: str = "three", **params: Any) -> Path:
        experts = [open_expert(make_expert(s, seed=i)) for i, s in enumerate(("casing", "arithmetic", "reversal"), 1)]
        path = tmp_path / f"{name}.json"
        write_mixture(path, assemble(experts, router=router, router_params=params, name=name))
        return path

    return make
