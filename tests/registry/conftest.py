"""Small experts made on the spot, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from xpert.registry.card import BaseModel, ExpertCard, Interval, SkillProfile, SkillScore
from xpert.registry.store import Registry
from xpert.storage import hash_file, write_json

NAMES = ("adapter_model.safetensors", "adapter_config.json", "exemplars.jsonl")


def make_expert(
    folder: Path,
    *,
    seed: int = 0,
    description: str = "",
    skills: tuple[str, ...] = ("arithmetic",),
    scores: dict[str, float] | None = None,
    base: str = "tiny",
) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {f"layer.lora_{part}.weight": rng.normal(size=(4, 8)).astype(np.float32) for part in "AB"}
    save_file(tensors, folder / NAMES[0])
    write_json(folder / NAMES[1], {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "seed": seed})
    (folder / NAMES[2]).write_text(json.dumps({"prompt": "1 + 1", "skill": skills[0], "kind": "shot"}) + "\n")
    (folder / "README.md").write_text(f"# An expert ({seed})\n")
    profile = None
    if scores:
        made = {
            skill: SkillScore("exact", Interval(s, s - 0.05, min(1.0, s + 0.05), 40), Interval(0.1, 0.05, 0.2, 40))
            for skill, s in scores.items()
        }
        profile = SkillProfile("suite", "f" * 64, made)
    ExpertCard(
        base=BaseModel(base, f"{base}-fingerprint"),
        adapter={"rank": 4},
        description=description,
        skills=skills,
        profile=profile,
        licences={"MIT": 3},
        files={name: hash_file(folder / name) for name in NAMES},
    ).write(folder)
    return folder


@pytest.fixture
def expert(tmp_path: Path) -> Callable[..., Path]:
    """`expert("a", seed=1, ...)`: a sound expert folder."""

    def make(name: str = "expert", **settings: object) -> Path:
        return make_expert(tmp_path / "experts" / name, **settings)

    return make


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A registry in a folder that does not exist yet."""
    return Registry(tmp_path / "registry")


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the Hub's client speak, without Xet and without the user's own token; a stand-in answers it."""
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.utils.disable_progress_bars()
