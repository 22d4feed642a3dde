"""Expert folders of unequal ranks, scalings and modules for the tiny base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xpert.registry.card import BaseModel, ExpertCard

FOLDERS: dict[str, dict[str, Any]] = {
    "a": {"r": 4},
    "b": {"r": 8, "use_rslora": True, "lora_alpha": 4},
    "c": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "d": {"r": 4, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
}


@pytest.fixture(scope="session")
def base_card(tiny_base: Path) -> BaseModel:
    from xpert.language_model import model_fingerprint

    return BaseModel(str(tiny_base), model_fingerprint(str(tiny_base)), "llama")


@pytest.fixture(scope="session")
def experts(make_adapter: Callable[..., Path], base_card: BaseModel) -> dict[str, Path]:
    """Expert folders with cards and an exemplar each."""
    found = {}
    for key, settings in FOLDERS.items():
        folder = make_adapter(seed=ord(key), **settings)
        (folder / "exemplars.jsonl").write_text(f'{{"prompt": "the {key} of it", "skill": "{key}", "kind": "shot"}}\n')
        adapter = {"rank": settings["r"], "alpha": 8}
        ExpertCard(base=base_card, adapter=adapter, name=key, skills=(key,), licences={"MIT": 2}).write(folder)
        found[key] = folder
    return found
