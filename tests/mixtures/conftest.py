"""Two ready experts of unequal ranks and modules on the tiny base, a mixture of them, and rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xpert.experts.mixture import assemble, open_expert
from xpert.experts.mixture_file import write_mixture
from xpert.language_model import LanguageModel, load_model
from xpert.model_files import find_model
from xpert.registry.card import BaseModel, ExpertCard

SHAPES: dict[str, dict[str, Any]] = {
    "sums": {"r": 4, "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]},
    "words": {"r": 2, "use_rslora": True, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]},
}


@pytest.fixture
def lm(tiny_base: Path) -> LanguageModel:
    """A base of the test's own: joint training builds itself into it."""
    return load_model(str(tiny_base), device="cpu")


@pytest.fixture(scope="session")
def ready(tiny_base: Path, make_adapter: Callable[..., Path]) -> dict[str, Path]:
    """Expert folders with cards."""
    folders = {}
    for key, settings in SHAPES.items():
        folder = make_adapter(seed=len(key), scale=0.05, **settings)
        base = BaseModel(str(tiny_base), find_model(str(tiny_base)).fingerprint(), "LlamaForCausalLM")
        ExpertCard(base=base, adapter={"rank": settings["r"]}, name=key, skills=("arithmetic",)).write(folder)
        line = {"prompt": f"what {key} is for", "skill": "arithmetic", "kind": "row"}
        (folder / "exemplars.jsonl").write_text(json.dumps(line) + "\n")
        folders[key] = folder
    return folders


@pytest.fixture
def mixture_file(ready: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "mixture.json"
    members = [open_expert(folder, key=key) for key, folder in ready.items()]
    write_mixture(path, assemble(members, router="uniform", name="pair"))
    return path


@pytest.fixture
def source(write_jsonl: Callable[..., Path], columns: Callable[..., list[dict[str, Any]]]) -> Path:
    return write_jsonl("rows.jsonl", columns(22))
