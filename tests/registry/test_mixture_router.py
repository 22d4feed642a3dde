"""A mixture with a trained router travels with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from xpert.errors import BadInput, Corrupt, NotFound
from xpert.experts.mixture_file import load_mixture
from xpert.registry.store import Registry
from xpert.storage import hash_file

Maker = Callable[..., Path]


@pytest.fixture
def mixture(registry: Registry, expert: Maker, tmp_path: Path) -> Callable[..., Path]:
    """`mixture(file="./router.safetensors")`: a mixture file of two published experts behind a gate with that file."""
    entries = []
    for seed, name in enumerate(("a", "b")):
        folder = expert(name, seed=seed)
        version = registry.publish(folder, f"acme/{name}")
        weights = hash_file(folder / "adapter_model.safetensors")
        entries.append({"key": name, "ref": version.ref, "fingerprint": weights, "weight": 1.0})
    save_file({"layer": np.ones((2, 8), np.float32)}, tmp_path / "router.safetensors")

    def make(file: str = "./router.safetensors", fingerprint: str | None = None) -> Path:
        sha256 = fingerprint or hash_file(tmp_path / "router.safetensors")
        value = {
            "kind": "mixture",
            "schema": 2,
            "name": "two",
            "router": "fixed",
            "registry": str(registry.folder),
            "base": {"ref": "tiny", "fingerprint": "tiny-fingerprint"},
            "experts": entries,
            "gate": {"name": "softmax-top-k", "params": {}, "file": file, "fingerprint": sha256},
        }
        path = tmp_path / "mixture.json"
        path.write_text(json.dumps(value))
        return path

    return make


def test_the_router_is_published_and_loaded(registry: Registry, mixture: Callable[..., Path], tmp_path: Path) -> None:
    version = registry.publish(mixture(), "acme/two")
    assert {file.path for file in registry.show("acme/two").files} == {"mixture.json", "gate.safetensors"}
    loaded = load_mixture("acme/two", registry)
    assert loaded.gate is not None and loaded.gate.file is not None
    assert hash_file(loaded.gate.file) == hash_file(tmp_path / "router.safetensors") == loaded.gate.fingerprint
    assert str(tmp_path) not in (registry.pull("acme/two") / "mixture.json").read_text()  # no path of this machine
    assert registry.publish(mixture(str(tmp_path / "router.safetensors")), "acme/two") == version  # however named


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"file": "./nowhere.safetensors"}, NotFound, "is not there"),
        ({"file": 3}, Corrupt, "names no file"),
        ({"fingerprint": "0" * 64}, Corrupt, "not the one that was mixed"),
        ({"file": "./mixture.json"}, BadInput, "not safetensors"),
        ({"file": "./pickle.safetensors"}, BadInput, "a pickle"),
        ({"file": "./link.safetensors"}, BadInput, "a symbolic link"),
    ],
)
def test_routers_that_may_not_enter(
    registry: Registry,
    mixture: Callable[..., Path],
    tmp_path: Path,
    change: dict[str, object],
    error: type[Exception],
    said: str,
) -> None:
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04N.")
    (tmp_path / "link.safetensors").symlink_to("router.safetensors")
    with pytest.raises(error, match=said):
        registry.publish(mixture(**change), "acme/two")


def test_a_mixture_of_folders_is_published_once_its_experts_are(
    registry: Registry, expert: Maker, mixture: Callable[..., Path], tmp_path: Path
) -> None:
    """What joint training writes names its experts by folders beside it."""
    folder = tmp_path / "joint"
    value = json.loads(mixture().read_text()) | {"registry": None}
    (folder / "experts").mkdir(parents=True)
    (tmp_path / "router.safetensors").rename(folder / "router.safetensors")
    for seed, entry in enumerate(value["experts"]):
        made = expert(f"joint-{seed}", seed=10 + seed)
        made.rename(folder / "experts" / entry["key"])
        weights = hash_file(folder / "experts" / entry["key"] / "adapter_model.safetensors")
        entry |= {"ref": f"./experts/{entry['key']}", "fingerprint": weights}
    (folder / "mixture.json").write_text(json.dumps(value))
    registry.publish(folder / "experts/a", "acme/joint-a")
    with pytest.raises(BadInput, match=r"'./experts/b', which is no registered expert. Publish that expert first"):
        registry.publish(folder, "acme/joint")
    registry.publish(folder / "experts/b", "acme/joint-b")
    version = registry.publish(folder, "acme/joint")
    assert version.kind == "mixture" and version.uses == ("acme/joint-a@1", "acme/joint-b@1")
    assert registry.publish(folder / "mixture.json", "acme/joint") == version
    loaded = load_mixture("acme/joint", registry)
    assert loaded.keys == ("a", "b") and loaded.gate is not None and loaded.gate.file is not None
    assert [one.ref for one in loaded.experts] == ["acme/joint-a@1", "acme/joint-b@1"]
    elsewhere = Registry(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="no registered expert"):
        elsewhere.publish(folder, "acme/joint")
