"""Files are cut into blobs and come back as they were; equal tensors are kept once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from xpert.errors import BadInput, Corrupt
from xpert.registry.blobs import BlobStore, Drafts
from xpert.registry.cutting import LEAST_PART, describe_file
from xpert.registry.store import Registry
from xpert.storage import hash_file, read_json, write_json

Maker = Callable[..., Path]


def _tensors(seed: int, sizes: list[int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"t{i}": rng.integers(0, 255, size, dtype=np.uint8) for i, size in enumerate(sizes)}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 100, LEAST_PART - 1, LEAST_PART, LEAST_PART + 1, 200_000]), max_size=8))
def test_a_cut_file_comes_back(sizes: list[int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "w.safetensors"
        save_file(_tensors(0, sizes), path)
        file = describe_file(path, "w.safetensors")
        large = sum(size >= LEAST_PART for size in sizes)
        assert (file.size, file.sha256) == (path.stat().st_size, hash_file(path))
        assert large <= len(file.blobs) <= 2 * large + 1
        assert all(part.size >= LEAST_PART for part in file.parts) or len(file.parts) > large
        store = BlobStore(Path(name) / "blobs", Drafts(Path(name) / "drafts"))
        assert not store.holds(file)
        store.put(path, file)
        store.put(path, file)
        assert store.holds(file)
        store.copy(file, Path(name) / "out", what="it")
        assert (Path(name) / "out").read_bytes() == path.read_bytes() == store.read(file, most=file.size, what="it")


def _with_weights(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_file(tensors, folder / "adapter_model.safetensors")
    card = read_json(folder / "expert.json")
    card["files"]["adapter_model.safetensors"] = hash_file(folder / "adapter_model.safetensors")
    write_json(folder / "expert.json", card)
    return folder


def _stored(registry: Registry) -> int:
    return sum(path.stat().st_size for path in (registry.folder / "blobs").glob("??/*"))


def test_equal_tensors_of_two_experts_are_kept_once(registry: Registry, expert: Maker, tmp_path: Path) -> None:
    shared = _tensors(7, [400_000] * 4)
    first = _with_weights(expert("a", seed=1), {**shared, "own": np.zeros(100_000, np.uint8)})
    second = _with_weights(expert("b", seed=2), {**shared, "own": np.ones(100_000, np.uint8)})
    registry.publish(first, "acme/a")
    before = _stored(registry)
    registry.publish(second, "acme/b")
    assert before > 1_700_000 and _stored(registry) - before < 120_000
    registry.remove("acme/a")
    freed = registry.gc()
    assert 100_000 < freed.size < 120_000
    pulled = load_file(registry.pull("acme/b", tmp_path / "out") / "adapter_model.safetensors")
    assert all((pulled[name] == tensor).all() for name, tensor in shared.items())
    assert registry.verify() == []


def test_damage_in_a_shared_part_is_told_of_both(registry: Registry, expert: Maker, tmp_path: Path) -> None:
    shared = _tensors(7, [400_000])
    for name in ("a", "b"):
        registry.publish(_with_weights(expert(name, seed=ord(name)), shared), f"acme/{name}")
    part = max((registry.folder / "blobs").glob("??/*"), key=lambda path: path.stat().st_size)
    part.chmod(0o644)
    data = bytearray(part.read_bytes())
    data[1234] ^= 4
    part.write_bytes(bytes(data))
    assert {problem.where for problem in registry.verify()} == {
        "acme/a@1: adapter_model.safetensors",
        "acme/b@1: adapter_model.safetensors",
    }
    for name in ("a", "b"):
        with pytest.raises(Corrupt, match="damaged"):
            registry.pull(f"acme/{name}", tmp_path / name)


def test_parts_of_another_file_are_not_accepted(tmp_path: Path) -> None:
    """Sound parts in a wrong order, or of a file with another sha256, do not make the file."""
    path = tmp_path / "w.safetensors"
    save_file(_tensors(1, [LEAST_PART, 2 * LEAST_PART]), path)
    file = describe_file(path, "w.safetensors")
    store = BlobStore(tmp_path / "blobs", Drafts(tmp_path / "drafts"))
    store.put(path, file)
    turned = type(file)(file.path, file.size, file.sha256, file.parts[::-1])
    with pytest.raises(Corrupt, match="another file"):
        store.copy(turned, tmp_path / "out", what="it")


def test_a_file_that_changes_while_it_is_published(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(_tensors(1, [LEAST_PART]), path)
    file = describe_file(path, "w.safetensors")
    store = BlobStore(tmp_path / "blobs", Drafts(tmp_path / "drafts"))
    for change in (b"x" * file.size, path.read_bytes()[:-5]):
        path.write_bytes(change)
        with pytest.raises(BadInput, match="changed while"):
            store.put(path, file)
    assert not store.holds(file)
