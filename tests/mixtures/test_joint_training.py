"""Joint training on the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from xpert import plugins
from xpert.errors import BadInput
from xpert.experts.mixture import load_mixture
from xpert.experts.mixture_training import train_mixture
from xpert.experts.train_options import TrainOptions
from xpert.registry.card import ExpertCard
from xpert.storage import hash_file

QUICK: dict[str, Any] = {"batch_size": 4, "learning_rate": 3e-3, "checkpoint_steps": 3, "epochs": 2.0}
PARAMS: dict[str, dict[str, Any]] = {
    "softmax-top-k": {"balance": "switch", "per": "block"},
    "shared-experts": {"shared": ("words",)},
    "rank-wise": {"speed": 0.01},
}


def _options(**changes: Any) -> TrainOptions:
    return TrainOptions(**{**QUICK, **changes})


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    files = [folder / "gate.safetensors", *sorted(folder.glob("experts/*/adapter_model.safetensors"))]
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def _same(first: Path, second: Path) -> bool:
    import torch

    a, b = _tensors(first), _tensors(second)
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6, rtol=1e-5) for name in a)


LEARNED = ["softmax-top-k", "top-p", "null-experts", "shared-experts", "rank-wise", "tree", "random-top-k"]


@pytest.mark.parametrize("gate", LEARNED)
def test_the_loss_falls_with_every_gate(gate: str, source: Path, mixture_file: Path, tmp_path: Path) -> None:
    params = PARAMS.get(gate, {})
    out = train_mixture(source, mixture_file, gate, tmp_path / "out", _options(), gate_params=params, device="cpu")
    losses = [record["loss"] for record in _log(out)]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert not list(tmp_path.glob(".out*"))
